"""`OODGuard`: wrap a reward model, fit on preference data, flag prompts and responses that are out of its ground."""

from __future__ import annotations

import json
import numbers
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import torch
from torch import Tensor

from rm_ood import artifact, hub
from rm_ood.calls import Call, prompt_numbers, read_call, read_vectors
from rm_ood.capture import Capture, Captured
from rm_ood.card import GuardCard
from rm_ood.channels import Channel
from rm_ood.config import GuardConfig
from rm_ood.decision import Decision, Decisions
from rm_ood.detectors.mahalanobis import MahalanobisDetector
from rm_ood.dialogue import Dialogue, Response, Text
from rm_ood.embed import Embedder, embedded, needed_channels
from rm_ood.errors import CalibrationWarning, InputError, MismatchError, NotFittedError
from rm_ood.fit import Fitter
from rm_ood.flag_rate import default_budget
from rm_ood.identity import TIERS
from rm_ood.inputs import Notes, read_inputs
from rm_ood.monitor import TrafficMonitor
from rm_ood.outputs import Observation, with_verdicts
from rm_ood.recalibration import Recalibration, calibrated, recalibrated
from rm_ood.reward_model import eval_mode
from rm_ood.scoring import Scoring
from rm_ood.skew import EndsCheck
from rm_ood.spans import Spans
from rm_ood.state import FittedState
from rm_ood.suspects import Suspect, find_suspects
from rm_ood.traffic import TrafficCheck
from rm_ood.turns import TurnScore, score_turns
from rm_ood.workers import ALONE, Workers
from rm_ood.wrappers import adapters


class OODGuard:
    """Out-of-distribution guard of a reward model.

    Hooks read the tensor that enters the reward head (and, for the default channels, span means in the upper half of the
    stack) from the same forward pass that gives the reward; a class-conditional Mahalanobis detector per channel, fitted
    on in-distribution preference data, scores them; conformal calibration on held-out prompts turns scores into p-values
    whose false-alarm rate holds. The reward model's own outputs are bit-identical with and without the guard.

    Args:
        model: a transformers sequence-classification reward model in eval mode; None for a guard that gets vectors.
        tokenizer: its fast tokenizer; None as for the model.
        axes: what is judged, some of `"prompt"`, `"response"` and `"response_given_prompt"` (is the response strange for this
            prompt).
        channels: `"default"`, `"final"` (what the head reads, and nothing else), or a list (see `rm_ood.channels`).
        detector: `"mahalanobis"`, or a `MahalanobisDetector` whose shrinkage and floor every channel takes.
        alpha: tolerated false-alarm rate per item, a fraction in (0, 1).
        confidence: probability that the true rate is at most `alpha`; None keeps it on average only.
        groups: a column to calibrate by, or `"length"`.
        max_length, on_too_long, batch_size, seed, **config: see `GuardConfig`.

    Raises:
        InputError: an option out of range, a model whose head or blocks are not found, a slow tokenizer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        axes: Sequence[str] = ("prompt", "response"),
        channels: str | Sequence[str | Channel] = "default",
        detector: str | MahalanobisDetector = "mahalanobis",
        alpha: float = 0.01,
        confidence: float | None = 0.95,
        groups: str | None = None,
        max_length: int | None = None,
        on_too_long: str = "flag",
        batch_size: int = 16,
        seed: int = 0,
        **config: Any,
    ) -> None:
        if isinstance(detector, MahalanobisDetector):
            if detector.dtype != torch.float32:
                raise InputError(f"detector: a guard scores in float32, got a detector of {detector.dtype}")
            config = {"shrinkage": detector.shrinkage, "floor": detector.floor, **config}
            detector = "mahalanobis"
        settings = {
            "axes": axes, "channels": channels, "detector": detector, "alpha": alpha, "confidence": confidence,
            "groups": groups, "max_length": max_length, "on_too_long": on_too_long, "batch_size": batch_size, "seed": seed,
        }  # fmt: skip
        self._bind(model, tokenizer, GuardConfig.from_dict({**settings, **config}), None)

    def _bind(self, model: Any, tokenizer: Any, config: GuardConfig, state: FittedState | None) -> None:
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self._lock = threading.Lock()
        self._swap(state)
        self._embedder: Embedder | None = None
        if model is not None:
            capture = Capture(
                model,
                needed_channels(config),
                head=config.head,
                layers=config.layers,
                read_out=config.read_out,
                reward=config.reward,
            )
            self._embedder = Embedder(model, tokenizer, config, capture)

    # -- fit and calibrate

    def fit(self, dataset: Any, *, calibration: Any = 0.3, progress: bool = True, workers: Workers = ALONE) -> Self:
        """Fit the detectors on in-distribution preference data and calibrate them on prompts held out from it.

        One pass; memory does not grow with the data. The split is by a seeded hash of the prompt, so calibration prompts
        are never fit prompts. They should not be prompts that the reward model was trained on either: its vectors on its
        own training data differ from those on fresh data, and the promise would be about the former.

        Args:
            dataset: rows as TRL's RewardTrainer takes them, or a path to JSONL(.gz) or Parquet (see `rm_ood.preferences`).
            calibration: share of the prompts to hold out, in [0, 1); or another dataset; 0 leaves calibration to
                `calibrate`.
            progress: show a progress bar on stderr.
            workers: who does it: this process, or several (see `rm_ood.distributed`), each of which ends with the guard.
        Returns:
            The guard itself. A failed or interrupted fit leaves it as it was.
        Raises:
            InputError, NonFiniteError: a row that cannot be used (under `on_bad="error"`).
            CalibrationError: a class is missing, or too few calibration prompts for `alpha`; names the number missing.
            MismatchError, WorkerError: of several processes, one that differs, fails or dies.
        """
        is_share = isinstance(calibration, numbers.Real)
        share = float(calibration) if is_share else 0.0
        if calibration is None or isinstance(calibration, bool) or not 0 <= share < 1:
            raise InputError(f"calibration={calibration!r}: expected a share of the prompts in [0, 1), or a dataset")
        column = self._model_column()
        fitter = Fitter(column, self.config, share, workers)
        fitter.run(dataset, labelled=True, progress=progress)
        state = workers.from_first(fitter.fitted, FittedState.to_saved, FittedState.from_saved)
        if not is_share:
            state = calibrated(column, state, calibration, progress=progress, workers=workers)
        self._swap(state.to(column.device))
        return self

    def calibrate(self, dataset: Any, *, progress: bool = True, workers: Workers = ALONE) -> Self:
        """Replace the calibration by other trusted data: serving traffic, or the initial policy's own rollouts.

        One response per prompt is drawn by a seeded hash. Warns where the new scores do not look like those of the
        held-out share of the fit data.

        Args:
            dataset: preference rows, or plain `prompt`/`response` rows without labels.
            progress, workers: as for `fit`.
        Returns:
            The guard itself; after an error it keeps its old calibration.
        Raises:
            NotFittedError: before `fit`.
            CalibrationError: too few prompts, prompts that were fitted on, or NaN scores.
        """
        column = self._model_column()
        self._swap(calibrated(column, self._fitted(), dataset, progress=progress, workers=workers))
        return self

    def recalibrate(self, dataset: Any, *, progress: bool = True) -> Recalibration:
        """Ask whether the guard still fits the model at hand, and mend what new thresholds can mend.

        `"pass"`: trusted data score as the calibration data did. `"recalibrated"`: the model's vectors were scaled, or the
        data score otherwise on the same vectors; detectors and thresholds follow. `"refit needed"`: the vectors are turned;
        the guard is left as it was.

        Args:
            dataset: trusted in-distribution rows, as for `calibrate`; as many prompts.
        Raises:
            NotFittedError: before `fit` and `calibrate`.
            CalibrationError: too few prompts, or prompts that were fitted on.
        """
        report, state = recalibrated(self._model_column(), self._fitted(), dataset, progress=progress)
        if state is not None:
            self._swap(state.to(self._model_column().device))
        return report

    # -- verdicts

    @overload
    def check(
        self,
        prompt: Text,
        response: str,
        *,
        groups: Sequence[str] | None = None,
        progress: bool = False,
        tools: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Decision: ...
    @overload
    def check(
        self,
        prompt: Sequence[Any] | Dialogue,
        response: Sequence[Any],
        *,
        groups: Sequence[str] | None = None,
        progress: bool = False,
        tools: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Decisions: ...
    def check(
        self,
        prompt: Any,
        response: Any,
        *,
        groups: Sequence[str] | None = None,
        progress: bool = False,
        tools: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Decision | Decisions:
        """Reward and verdict of one item, or of many.

        Args:
            prompt: a string, a message list or a `Dialogue`; or a list of those.
            response: a string (or one assistant message in a list); or a list, one per prompt. An entry of the list may
                itself be a list: several answers to that prompt, which come out one after the other, `prompt_index` telling
                which is whose. So it does where a prompt is listed once for each of its answers.
            groups: the group of each item, for a guard with a grouping column.
            progress: show a progress bar on stderr.
            tools: JSON schemas that the chat template renders for every prompt of the call, a list or a JSON string.
            chat_template_kwargs: further keywords of the chat template, such as `{"enable_thinking": False}`.
        Returns:
            A `Decision` for one item, `Decisions` for many.
        Raises:
            NotFittedError: the guard is not fitted or not calibrated.
            InputError: names the field, what came, and the remedy; nothing is scored.
        """
        scoring = self.scoring()
        call = read_call(prompt, response, self.config, tools=tools, template_kwargs=chat_template_kwargs)
        decisions = self._check_items(scoring, call, groups, progress)
        return decisions[0] if call.is_single else decisions

    def _check_items(self, scoring: Scoring, call: Call, groups: Sequence[str] | None, progress: bool) -> Decisions:
        state = scoring.state
        # A guard that is not calibrated says so before the forwards, not after.
        state.profile(state.config.joined)
        if not call.items:
            return state.nothing()
        scored, part = scoring.score(scoring.encode(call.items), progress=progress)
        decisions = state.decide(scored, part, groups=groups, prompt_index=call.prompt_index)
        self._watch(decisions)
        return decisions

    def suspects(self, dataset: Any, k: int = 20, *, share: float = 0.25, progress: bool = True) -> list[Suspect]:
        """What to read first: the k most suspicious items whose reward is high while the guard disagrees.

        High is the dataset's top `share` of rewards. The guard disagrees where an item is flagged, or nearer to the rejected
        class than to the chosen one. Flagged ones come first; equal responses are one, with their `count`. They do not count
        as traffic.

        Args:
            dataset: rows with responses, such as a policy's rollouts: `prompt`/`response`, or preference rows.
            k: at most so many. progress: show a progress bar on stderr.
        Raises:
            NotFittedError: the guard is not fitted or not calibrated. InputError: an unusable row.
        """
        return find_suspects(self.scoring(), dataset, k, share=share, progress=progress)

    def turn_scores(
        self,
        prompt: Any,
        response: Any,
        *,
        tools: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[TurnScore]:
        """Which turn of a dialogue is off: the channel `final` at every turn's end, from one forward of the whole.

        Only for models whose head reads every token (decoders). An assistant turn is ranked among the calibration responses;
        several turns are several tests, so among many clean turns some fall below alpha.

        Args:
            prompt: messages (or a `Dialogue`, or one string, which is one user turn).
            response: the last assistant turn, a string or a message.
            tools, chat_template_kwargs: as in `check`.
        Returns:
            One entry per message, the response last.
        Raises:
            NotFittedError: the guard is not fitted or not calibrated.
            InputError: plain text or text pairs, an encoder, or several items.
        """
        state, column = self._fitted(), self._model_column()
        call = read_call(prompt, response, self.config, tools=tools, template_kwargs=chat_template_kwargs)
        if not call.is_single:
            raise InputError("turn_scores takes one dialogue: messages and one response")
        text, (words, answer) = column.text(state.config.text_format), call.items[0]
        return score_turns(state, column, text.encode(words, answer, "dialogue", turns=True))

    def check_embeddings(
        self,
        embeddings: Any,
        rewards: Any = None,
        *,
        lengths: Any = None,
        groups: Sequence[str] | None = None,
        prompts: Any = None,
    ) -> Decisions:
        """Verdicts on vectors that came from elsewhere (an inference engine, a file); no model needed.

        Args:
            embeddings: (n, H) array or tensor for the channel `final`, or channel -> (n, H); a vector on the axis
                `response_given_prompt` is the prompt's and the response's side by side, (n, 2H).
            rewards: (n,) rewards, or None.
            lengths: (n, 2) tokens in the prompt's and the response's span, or None: then the standardisation leaves length
                out, for these vectors and for the calibration alike.
            groups: the group of each item, for a guard with a grouping column.
            prompts: (n,) keys that tell which items answer one prompt (numbers, or the prompts), for `prompt_index`: without
                them a monitor and a penalty take each item for a prompt of its own.
        Raises:
            MismatchError: a channel the guard lacks, or vectors of another width.
            InputError: arrays whose lengths differ, or dtypes that cannot be vectors.
        """
        state = self._fitted()
        vectors, values, part = read_vectors(embeddings, rewards, lengths)
        index = prompt_numbers(prompts, len(part.rewards))
        return state.decide(state.score(vectors, values), part, groups=groups, prompt_index=index)

    def __call__(
        self,
        *,
        prompt_end: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        response_mask: Tensor | None = None,
        groups: Sequence[str] | None = None,
        prompts: Any = None,
        **inputs: Any,
    ) -> Any:
        """The reward model's own forward; its output carries the verdicts as `.ood`, a `Decisions`.

        Args:
            prompt_end: (B,) column of the last token before the response. Without it `token_type_ids` tell, if given.
            prompt_mask, response_mask: (B, T) bool, the spans' own words, as `encode` gives them. Without them every token
                that is not special counts, role markers included, and the reason `approximate_spans` says so where the
                guard was fitted on a chat template.
            groups: the group of each row, for a guard with a grouping column.
            prompts: (B,) keys that tell which rows answer one prompt, as in `check_embeddings`.
            **inputs: the model's inputs, never altered.
        Raises:
            InputError: the spans cannot be told, or the guard takes a prompt-only pass.
        """
        state, column = self._on_this_model(), self._model_column()
        spans, notes = self._read_inputs(inputs, prompt_end, prompt_mask, response_mask)
        with eval_mode(column.model, switch=self.config.eval_mode == "switch"):
            outputs, captured = column.capture.forward(inputs, spans)
        return with_verdicts(outputs, self._decide(state, captured, spans, notes, groups, prompts))

    @contextmanager
    def observe(
        self,
        *,
        prompt_end: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        response_mask: Tensor | None = None,
        groups: Sequence[str] | None = None,
        prompts: Any = None,
        **inputs: Any,
    ) -> Iterator[Observation]:
        """Verdicts on calls that go around the model's own forward: backbone and head called by hand, as older trainers do.

        ```python
        with guard.observe(input_ids=ids, attention_mask=mask, prompt_end=ends) as seen:
            hidden = model.model(input_ids=ids, attention_mask=mask)[0]
            rewards = model.score(hidden)[rows, last]
        decisions = seen.decide(rewards)
        ```

        Args:
            prompt_end, prompt_mask, response_mask, groups, prompts, inputs: as in a call of the guard.
        Raises:
            CaptureError: after the block, if what was called did not pass the hooks.
        """
        state, column = self._on_this_model(), self._model_column()
        spans, notes = self._read_inputs(inputs, prompt_end, prompt_mask, response_mask)
        with eval_mode(column.model, switch=False), column.capture.listen(inputs, spans) as request:

            def decide(rewards: Tensor | None) -> Decisions:
                captured = column.capture.observed(request, rewards)
                return self._decide(state, captured, spans, notes, groups, prompts)

            yield Observation(decide)

    def _read_inputs(
        self,
        inputs: Mapping[str, Any],
        prompt_end: Tensor | None,
        prompt_mask: Tensor | None,
        response_mask: Tensor | None,
    ) -> tuple[Spans, Notes]:
        config, tokenizer = self._fitted().config, self._model_column().tokenizer
        return read_inputs(config, tokenizer, self._ends, inputs, prompt_end, prompt_mask, response_mask)

    def _decide(
        self,
        state: FittedState,
        captured: Captured,
        spans: Spans,
        notes: Notes,
        groups: Sequence[str] | None,
        prompts: Any,
    ) -> Decisions:
        n = len(captured.rewards)
        index = prompt_numbers(prompts, n)
        part = embedded(captured, spans.lengths(), notes, np.zeros(n, dtype=bool))
        with torch.inference_mode():
            scores = state.score(part.vectors, part.rewards)
        decisions = state.decide(scores, part, groups=groups, prompt_index=index)
        self._watch(decisions)
        return decisions

    def encode(self, prompts: Sequence[Text], responses: Sequence[Response]) -> dict[str, Tensor]:
        """Padded model inputs of items, with `prompt_end`, `prompt_mask` and `response_mask`: what `guard(**inputs)` takes."""
        column = self._model_column()
        text = column.text(self._fitted().config.text_format)
        encoded = [text.encode(p, r, f"items[{i}]") for i, (p, r) in enumerate(zip(prompts, responses, strict=True))]
        batch = text.pad(encoded, beside=column.capture.reader.pad_columns)
        return {**batch.inputs, **vars(batch.spans)}

    def scoring(self) -> Scoring:
        """The step before verdicts, for whoever keeps raw scores: `guard.state.decide` judges them. They are no traffic.

        Raises:
            NotFittedError, MismatchError: the guard is not fitted, or has no reward model.
        """
        return Scoring(self._on_this_model(), self._model_column(), self._ends)

    def monitor(
        self,
        path: str | Path | None = None,
        *,
        axes: Sequence[str] | None = None,
        channels: Sequence[str] | None = None,
        with_lengths: bool = True,
        **settings: Any,
    ) -> TrafficMonitor:
        """An alarm on the traffic that may be watched for ever: feed it with `monitor.watch(decisions)`.

        Args:
            path: where `monitor.save(path)` wrote, to go on from there; a new monitor if there is no such file.
            axes: the guard's axes that are watched, all by default.
            channels, with_lengths: for verdicts on vectors from elsewhere, what they are joined from, and whether span
                lengths come with them (see `check_embeddings`).
            settings: of `TrafficMonitor`; alpha and confidence are the guard's. `calibrate` and `fit` end it: verdicts of the
                new calibration are refused.
        Raises:
            NotFittedError, CalibrationError: the guard is not fitted or not calibrated. MismatchError: saved on another.
        """
        c = self._fitted().config
        profile = self._fitted().profile(c.joined if channels is None else tuple(channels), with_lengths=with_lengths)
        settings = {"alpha": c.alpha, "confidence": c.confidence, **settings}
        sizes = [scores.size for scores, _ in profile.axis_pools(None)]
        if settings.get("budget") is None and len(sizes) > 1:
            settings["budget"] = default_budget(sizes, settings["alpha"], settings["confidence"])
        return TrafficMonitor.open(path, profile.axis_scores(axes), **settings).bind(profile.digests)

    # -- life

    @property
    def state(self) -> FittedState:
        """What was fitted and calibrated; immutable, another one after `fit` or `calibrate`.

        Raises:
            NotFittedError: before `fit`.
        """
        return self._fitted()

    @property
    def column(self) -> Embedder:
        """The reward model with its hooks, which turns texts into vectors.

        Raises:
            MismatchError: a guard for vectors only.
        """
        return self._model_column()

    def save_pretrained(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the guard to a folder of its own (never the reward model's): one authority file, atomically.

        Raises:
            NotFittedError: before `fit`.
            SaveError: another guard is there and `overwrite` is off, or the disk refuses; what was there is untouched.
        """
        tensors, config = self._fitted().to_saved()
        artifact.write_guard(path, tensors, config, overwrite=overwrite)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        model: Any = None,
        tokenizer: Any = None,
        *,
        allow_dtype_change: bool = False,
        allow: Sequence[str] = (),
        verify: str = "canaries",
        channels: str | Sequence[str | Channel] | None = None,
        alpha: float | None = None,
        confidence: float | str | None = "saved",
        **hub_options: Any,
    ) -> Self:
        """A saved guard, from a folder or the Hub, bound to the reward model that it was fitted on.

        Args:
            path: folder, or Hub id.
            model, tokenizer: the reward model; None for vectors only (`check_embeddings`).
            allow_dtype_change: accept the model in another dtype than it was fitted in.
            allow: fields of the fingerprint in which the model may differ, as the error names them (`"weights"`,
                `"canaries"`, `"commit"`, ...). What differs is told in the reasons of every verdict.
            verify: how far to compare the model: `"config"` (milliseconds), `"weights"` (samples of every parameter) or
                `"canaries"` (and eight short texts through it).
            channels, alpha, confidence: join some of the saved channels only, or ask for another promise; the calibration
                matrix in the guard serves them exactly. By default as saved.
            **hub_options: `revision`, `token`, `cache_dir`, `local_files_only` for a Hub id.
        Raises:
            FileNotFoundError: no guard there. FormatError, IntegrityError: not a guard, or a changed one.
            MismatchError: another reward model; names the fields.
        """
        if verify not in TIERS:
            raise InputError(f"verify={verify!r}: expected one of {TIERS}")
        tensors, config = artifact.read_guard(hub.local_folder(path, **hub_options))
        state = FittedState.from_saved(tensors, config)
        changes = {"channels": channels, "alpha": alpha}
        changes = {name: value for name, value in changes.items() if value is not None}
        if confidence != "saved":
            changes["confidence"] = confidence
        if changes:
            state = state.with_settings(changes)
        guard = cls.__new__(cls)
        guard._bind(model, tokenizer, state.config, state)
        if model is not None:
            column = guard._model_column()
            allowed = {*allow, *(["dtype"] if allow_dtype_change else [])}
            try:
                changed = state.identity.check(column, state.config, verify, state.distances, allow=allowed)
            except BaseException:
                guard.detach()
                raise
            if changed:
                guard._swap(replace(state, overrides=tuple(changed)))
                warnings.warn(
                    f"the reward model differs from the fitted one in {changed}; every verdict says so in its reasons. "
                    "Recalibrate on its own vectors: guard.recalibrate(sample)",
                    CalibrationWarning,
                    stacklevel=2,
                )
            guard._fitted().to(column.device)
        return guard

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the saved guard with its card to a repository of its own; returns the commit's address."""
        return hub.upload(self, repo_id, **options)

    def report(self) -> GuardCard:
        """The guard card: what it was fitted and calibrated on, and what it promises."""
        return GuardCard.of(self._fitted())

    def keep(self, channels: str | Sequence[str | Channel]) -> Self:
        """Join these of the fitted channels into the verdict from now on, and forget the others but `final`.

        Raises:
            NotFittedError: before `fit`. InputError: a channel that was not fitted.
        """
        state = self._fitted().with_settings({"channels": channels})
        state = state.restricted(needed_channels(state.config))
        self.detach()
        self._bind(self.model, self.tokenizer, state.config, state)
        return self

    def on(self, model: Any, tokenizer: Any) -> OODGuard:
        """This guard on a reward model known to be that of its fit, such as one that was pickled beside it.

        Nothing is compared: a guard from a folder comes with `from_pretrained`, which does.
        """
        guard = OODGuard.__new__(OODGuard)
        guard._bind(model, tokenizer, self.config, self._state)
        return guard

    def annotate(self, **notes: Any) -> Self:
        """Keep JSON-able findings with the guard (the doctor's, as `doctor=`), for its card and its saved form."""
        state = self._fitted()
        self._swap(replace(state, record={**state.record, **json.loads(json.dumps(notes))}))
        return self

    def attach(self) -> Self:
        """Put the hooks back after `detach`."""
        self._model_column().capture.attach()
        return self

    def detach(self) -> None:
        """Remove the hooks; a second call does nothing."""
        if self._embedder is not None:
            self._embedder.capture.detach()

    def __enter__(self) -> Self:
        return self.attach() if self._embedder is not None else self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __getstate__(self) -> dict[str, Any]:
        """A pickled or copied guard leaves the model behind: it takes vectors, or is loaded with a model again."""
        return {"config": self.config, "state": self._state}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self._bind(None, None, saved["config"], saved["state"])

    def __repr__(self) -> str:
        model = "vectors only" if self.model is None else type(self.model).__name__
        state = "not fitted" if self._state is None else "not calibrated" if self._state.table is None else "calibrated"
        return f"OODGuard({model}, channels={list(self.config.joined)}, alpha={self.config.alpha}, {state})"

    # -- inside

    def _fitted(self) -> FittedState:
        if self._state is None:
            raise NotFittedError(
                "the guard is not fitted: call fit(dataset), or load one with OODGuard.from_pretrained"
            )
        return self._state

    def _on_this_model(self) -> FittedState:
        """The fitted state, knowing whether the adapters that are active now are those of the fit."""
        state = self._fitted()
        fitted = state.identity.fields.get("adapters")
        if fitted in (None, adapters(self.model)) or "adapters" in state.overrides:
            return state
        return replace(state, overrides=(*state.overrides, "adapters"))

    def _model_column(self) -> Embedder:
        if self._embedder is None:
            raise MismatchError(
                "this guard has no reward model, only vectors: use check_embeddings, or pass model and tokenizer to "
                "OODGuard.from_pretrained"
            )
        return self._embedder

    def _swap(self, state: FittedState | None) -> None:
        """One reference swap: a check that runs meanwhile ends on the state it began with."""
        self._state = state
        self._traffic: TrafficCheck | None = None
        self._ends: EndsCheck | None = None
        if state is not None and self.tokenizer is not None and "ends" in state.record:
            self._ends = EndsCheck(state.record["ends"], self.tokenizer, state.config.text_format)
        if state is not None and state.table is not None:
            self._traffic = TrafficCheck(state.profile(state.config.joined).calibration_scores())

    def _watch(self, decisions: Decisions) -> None:
        traffic = self._traffic
        if traffic is None or not len(decisions):
            return
        # One answer per prompt: several to one prompt are not independent draws of the traffic.
        first = np.unique(decisions.prompt_index, return_index=True)[1]
        score = np.max([axis.ood_scores for axis in decisions.axes.values()], axis=0)
        with self._lock:
            message = traffic.update(score[first])
        if message is not None:
            warnings.warn(message, CalibrationWarning, stacklevel=4)
