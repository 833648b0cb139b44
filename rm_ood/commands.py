"""What the commands of `rm-ood` do: parsed arguments in, `{"json": ..., "text": ...}` out; `text` is what a person reads.

Modules are imported where a command needs them: one command does not load what another one takes.
"""

from __future__ import annotations

import argparse
import shlex
import threading
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rm_ood.errors import InputError, SaveError
from rm_ood.workers import ALONE, Workers

if TYPE_CHECKING:
    from collections.abc import Callable

    from rm_ood.guard import OODGuard
    from rm_ood.serve.engine import EngineBackend
    from rm_ood.serve.scorer import Scorer
    from rm_ood.serve.settings import ServeSettings


def demo(a: argparse.Namespace) -> dict[str, Any]:
    from rm_ood.demo import print_table, run_demo

    report = run_demo(Path(a.output), seed=a.seed, progress=a.progress)
    if not a.json:
        print_table(report)
    written = f"\nFiles in {a.output}: guard/, reward-model/, report.json, report.html"
    return {"json": report, "text": written}


def fit(a: argparse.Namespace, workers: Workers = ALONE) -> dict[str, Any] | None:
    """The result is the first process's, where there are several."""
    from rm_ood.choice import fit_choosing

    guard, dataset, calibration = to_fit(a)
    choice = None
    if _chooses(a):
        choice = fit_choosing(guard, dataset, calibration=calibration, progress=a.progress, workers=workers)
    else:
        guard.fit(dataset, calibration=calibration, progress=a.progress, workers=workers)
    if not workers.is_first:
        return None
    guard.save_pretrained(a.output, overwrite=a.overwrite)
    card = guard.report()
    found = {"guard": str(a.output), **card.to_dict(), **({} if choice is None else {"choice": choice.to_dict()})}
    lines = [str(card), *([] if choice is None else [str(choice)]), f"Saved to {a.output}"]
    return {"json": found, "text": "\n".join(lines)}


def to_fit(a: argparse.Namespace) -> tuple[OODGuard, Any, Any]:
    """The guard that the arguments of `fit` ask for, its data, and its calibration: a share or other data."""
    from rm_ood.choice import pool
    from rm_ood.config import GuardConfig
    from rm_ood.guard import OODGuard
    from rm_ood.reward_model import load_reward_model

    settings = {f.name: getattr(a, f.name) for f in fields(GuardConfig) if hasattr(a, f.name)}
    if _chooses(a):
        del settings["channels"]
    GuardConfig.from_dict(settings)  # a wrong option is told before a model is loaded
    _check_target(Path(a.output), a.overwrite)
    model, tokenizer = load_reward_model(a.model, **model_options(a))
    if _chooses(a):
        settings["channels"] = pool(model, settings.get("axes", GuardConfig.axes), settings.get("layers"))
    calibration = a.calibration_share if a.calibration_data is None else _dataset(a.calibration_data, a.split)
    return OODGuard(model, tokenizer, **settings), _dataset(a.data, a.split), calibration


def _chooses(a: argparse.Namespace) -> bool:
    return getattr(a, "channels", None) == "auto"


def calibrate(a: argparse.Namespace) -> dict[str, Any]:
    guard = _load(a)
    guard.calibrate(_dataset(a.data, a.split), progress=a.progress)
    output = a.output or a.guard
    guard.save_pretrained(output, overwrite=a.output is None or a.overwrite)
    card = guard.report()
    return {"json": {"guard": str(output), **card.to_dict()}, "text": f"{card}\nSaved to {output}"}


def check(a: argparse.Namespace) -> dict[str, Any]:
    from rm_ood.batch import check_file

    if a.json and a.output == "-":
        raise InputError("--json and --output -: both would go to stdout; write the verdicts to a file")
    summary = check_file(_load(a), _dataset(a.data, a.split), a.output, progress=a.progress)
    flagged = ", ".join(f"{axis} {count}" for axis, count in summary["flagged"].items())
    text = f"{summary['items']} items, flagged: {flagged}; rows in {a.output}"
    return {"json": summary, "text": "" if a.output == "-" else text}


def study(a: argparse.Namespace) -> dict[str, Any]:
    from rm_ood.guard import OODGuard
    from rm_ood.study.command import DEFAULT_SHIFTS, Plan
    from rm_ood.study.terminal import table

    plan = Plan.of(
        OODGuard.from_pretrained(a.guard),
        _dataset(a.data, a.split),
        a.shift or DEFAULT_SHIFTS,
        subset=a.subset,
        limit=a.limit,
        words=a.words,
        seed=a.seed,
    )
    fit_data, background = (None if data is None else _dataset(data, a.split) for data in (a.fit_data, a.background))
    output = Path(a.output)
    cache = Path(a.cache) if a.cache else output / "scores.sqlite"
    guard = _load(a)
    output.mkdir(parents=True, exist_ok=True)
    try:
        study = plan.run(
            guard,
            cache=cache,
            fit_data=fit_data,
            background=background,
            n_bootstrap=a.bootstrap,
            n_examples=a.examples,
            model=Path(a.model).name,
            command=shlex.join(["rm-ood", *a.argv]),
            progress=a.progress,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the scores so far are kept in {cache}: the same command goes on from there") from None
    files = study.save(output)
    reads = f"{study.n_texts} distinct texts, {study.n_forwarded} of them read by the reward model in this run"
    text = f"{table(study.doc)}\n\n{reads}\nFiles: {', '.join(str(file) for file in files)}"
    return {"json": study.doc, "text": text}


def serve(a: argparse.Namespace) -> dict[str, Any]:
    from rm_ood.serve.hangup import hangups

    with hangups() as asked:
        return _serve(a, asked)


def _serve(a: argparse.Namespace, asked: threading.Event) -> dict[str, Any]:
    from rm_ood.guard import OODGuard

    try:
        from rm_ood.serve import logs
        from rm_ood.serve.scorer import GuardScorer
        from rm_ood.serve.server import Server
    except ImportError as error:
        raise InputError(f"serving needs {error.name}: pip install 'rm_ood[serve]'") from error
    from rm_ood.serve.settings import ServeSettings, check_host, read_api_key

    given = {f.name: getattr(a, f.name) for f in fields(ServeSettings) if hasattr(a, f.name)}
    settings = ServeSettings(**given, api_key=read_api_key(a.api_key_file))
    check_host(a.host, settings.api_key)
    scorer: Scorer
    load: Callable[[], Scorer]
    if _asks_engine(a):
        load = engine = _engine_loader(a, settings)
        scorer = backend = engine()
        logs.configure()
        backend.tell()
    else:
        guard = _load(a)

        def load() -> GuardScorer:
            options = {"allow_dtype_change": a.allow_dtype_change, "channels": getattr(a, "channels", None)}
            return GuardScorer(
                OODGuard.from_pretrained(a.guard, guard.model, guard.tokenizer, **options), settings.batch_size
            )

        scorer = GuardScorer(guard, settings.batch_size)
        logs.configure()
    server = Server(scorer, settings, a.host, a.port, load, asked)
    server.serve_forever()
    return {"json": server.summary(), "text": ""}


def _asks_engine(a: argparse.Namespace) -> bool:
    """Whether `serve` has an engine; its other options need one, and those of a model here are then nobody's."""
    given = sorted(name for name in vars(a) if name.startswith("engine_"))
    if a.engine is None and given:
        raise InputError(f"--{given[0].removesuffix('_s').replace('_', '-')} needs --engine URL")
    if a.engine is not None and (a.device is not None or a.dtype != "auto"):
        raise InputError("--device and --dtype are the engine's own settings: leave them out beside --engine")
    return a.engine is not None


def _engine_loader(a: argparse.Namespace, settings: ServeSettings) -> Callable[[], EngineBackend]:
    from rm_ood.guard import OODGuard
    from rm_ood.integrations.model_files import model_files
    from rm_ood.serve.engine import EngineSettings, load_backend
    from rm_ood.serve.settings import read_engine_key

    names = {f.name: f"engine_{f.name}" for f in fields(EngineSettings)}
    given = {name: getattr(a, option) for name, option in names.items() if hasattr(a, option)}
    engine = EngineSettings(url=a.engine, key=read_engine_key(getattr(a, "engine_key_file", None)), **given)
    if engine.timeout_s >= settings.model_timeout_s:
        raise InputError(
            f"--engine-timeout {engine.timeout_s:g}: expected less than --model-timeout ({settings.model_timeout_s:g}), which a "
            "request has in all"
        )
    OODGuard.from_pretrained(a.guard)  # a broken guard is told before anything else is read
    files = model_files(a.model, trust_remote_code=a.trust_remote_code)
    return lambda: load_backend(
        a.guard, files, engine, settings.batch_size,
        channels=getattr(a, "channels", None), allow_dtype_change=a.allow_dtype_change,
    )  # fmt: skip


def report(a: argparse.Namespace) -> dict[str, Any]:
    from rm_ood.guard import OODGuard

    card = OODGuard.from_pretrained(a.guard).report()
    if a.html:
        Path(a.html).write_text(card.to_html(), encoding="utf-8")
    return {"json": card.to_dict(), "text": f"{card}" + (f"\nPage in {a.html}" if a.html else "")}


def doctor(a: argparse.Namespace) -> dict[str, Any]:
    from rm_ood.doctor import plant
    from rm_ood.rows import iter_rows

    guard = _load(a)
    items = groups = None
    if a.data is not None:
        column, reader = guard.config.group_column, guard.config.reader(labelled=False)
        read = [reader.items(row, number)[0] for number, row in enumerate(iter_rows(_dataset(a.data, a.split)))]
        items = [(item.prompt, item.response) for item in read]
        groups = None if column is None else [str(item.group) for item in read]
    findings = plant(guard, items, groups=groups, seed=a.seed, progress=a.progress)
    identity, overrides = guard.state.identity, guard.state.overrides
    samples = 0 if identity.weights is None else len(identity.weights.values)
    tiers = {
        "config": "same" if not overrides else f"differs in {', '.join(overrides)}, as was allowed",
        "weights": f"same in {samples} parameters" if samples else "not recorded",
        "canaries": "not recorded" if identity.canaries is None else "same",
    }
    if a.record and overrides:
        raise InputError("--record: these findings are of another model than the guard was fitted on; nothing is kept")
    if a.record:
        guard.annotate(doctor=findings.to_dict()).save_pretrained(a.guard, overwrite=True)
    lines = ["Is this the reward model that the guard was fitted on?"]
    lines += [f"  {name}: {value}" for name, value in tiers.items()]
    lines += ["", "What does it catch?", str(findings)]
    lines += [f"Recorded in {a.guard}: rm-ood report shows it"] if a.record else []
    return {"json": {"identity": tiers, **findings.to_dict()}, "text": "\n".join(lines)}


def study_scores(a: argparse.Namespace) -> dict[str, Any]:
    from rm_ood.study.paper import markdown, study_scores, write_study

    doc = study_scores(a.scores, a.id, progress=a.progress)
    written = ", ".join(path.name for path in write_study(doc, a.output))
    return {"json": doc, "text": f"{markdown(doc)}\n\nFiles in {a.output}: {written}"}


def _check_target(folder: Path, overwrite: bool) -> None:
    """Say before hours of fitting that its result could not be saved."""
    from rm_ood.artifact import GUARD_FILE

    if (folder / GUARD_FILE).exists() and not overwrite:
        raise SaveError(f"{folder} holds a guard already: pass --overwrite to replace it, or another --output")
    if (folder / "config.json").exists():
        raise SaveError(
            f"{folder} holds a model's config.json: a guard needs a folder of its own, pass another --output"
        )


def _load(a: argparse.Namespace) -> Any:
    from rm_ood.guard import OODGuard
    from rm_ood.reward_model import load_reward_model

    OODGuard.from_pretrained(a.guard)  # a broken guard is told before a model is loaded
    model, tokenizer = load_reward_model(a.model, **model_options(a))
    options = {"allow_dtype_change": a.allow_dtype_change, "channels": getattr(a, "channels", None)}
    return OODGuard.from_pretrained(a.guard, model, tokenizer, **options)


def model_options(a: argparse.Namespace) -> dict[str, Any]:
    """How `load_reward_model` is to load what `--model` names."""
    return {"trust_remote_code": a.trust_remote_code, "dtype": a.dtype, "device": a.device}


def _dataset(data: str, split: str) -> Any:
    """A path as it is; anything else is a data set on the Hub."""
    if Path(data).exists() or data.endswith((".jsonl", ".jsonl.gz", ".json", ".parquet")) or data.count("/") > 1:
        return data
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise FileNotFoundError(
            f"no data file at {data}; loading it from the Hub needs: pip install 'rm_ood[data]'"
        ) from error
    try:
        return load_dataset(data, split=split)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no data file at {data}, and no such data set on the Hub ({type(error).__name__})"
        ) from error
