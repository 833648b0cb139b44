"""The command line: `rm-ood demo | fit | calibrate | check | study | study-scores | doctor | report`.

Results go to stdout (`--json`: one object), progress to stderr. Exit codes: 0 done, 1 bad input, 2 usage, 3 the guard and
the model do not belong together.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from rm_ood.errors import InputError, MismatchError, OODGuardError, OODGuardWarning, SaveError

DONE, BAD_INPUT, USAGE, MISMATCH = 0, 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings():
            # A warning is for the person at the terminal: one line, without the source line it was raised at.
            warnings.simplefilter("always", OODGuardWarning)
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            result = arguments.run(arguments)
    except MismatchError as error:
        print(f"rm-ood {arguments.command}: {error}", file=sys.stderr)
        return MISMATCH
    except BrokenPipeError:
        # The reader of stdout (head, less) has seen enough; the interpreter must not fail on its last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (OODGuardError, OSError) as error:
        print(f"rm-ood {arguments.command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as stopped:
        print(f"rm-ood {arguments.command}: interrupted; {str(stopped) or 'nothing was written'}", file=sys.stderr)
        return 130
    if arguments.json:
        print(json.dumps(result["json"], allow_nan=False))
    elif result["text"]:
        print(result["text"])
    return DONE


def _show_warning(message: Any, category: type[Warning], *_: Any) -> None:
    name = "warning" if issubclass(category, OODGuardWarning) else category.__name__
    print(f"rm-ood: {name}: {message}", file=sys.stderr)


# -- commands


def _demo(a: argparse.Namespace) -> dict[str, Any]:
    from rm_ood.demo import print_table, run_demo

    report = run_demo(Path(a.output), seed=a.seed, progress=a.progress)
    if not a.json:
        print_table(report)
    written = f"\nFiles in {a.output}: guard/, reward-model/, report.json, report.html"
    return {"json": report, "text": written}


def _fit(a: argparse.Namespace) -> dict[str, Any]:
    from rm_ood.choice import fit_choosing, pool
    from rm_ood.config import GuardConfig
    from rm_ood.guard import OODGuard
    from rm_ood.reward_model import load_reward_model

    settings = {f.name: getattr(a, f.name) for f in fields(GuardConfig) if hasattr(a, f.name)}
    automatic = settings.get("channels") == "auto"
    if automatic:
        del settings["channels"]
    GuardConfig.from_dict(settings)  # a wrong option is told before a model is loaded
    _check_target(Path(a.output), a.overwrite)
    model, tokenizer = load_reward_model(a.model, **_model_options(a))
    if automatic:
        settings["channels"] = pool(model, settings.get("axes", GuardConfig.axes), settings.get("layers"))
    guard = OODGuard(model, tokenizer, **settings)
    calibration = a.calibration_share if a.calibration_data is None else _dataset(a.calibration_data, a.split)
    dataset, choice = _dataset(a.data, a.split), None
    if automatic:
        choice = fit_choosing(guard, dataset, calibration=calibration, progress=a.progress)
    else:
        guard.fit(dataset, calibration=calibration, progress=a.progress)
    guard.save_pretrained(a.output, overwrite=a.overwrite)
    card = guard.report()
    found = {"guard": str(a.output), **card.to_dict(), **({} if choice is None else {"choice": choice.to_dict()})}
    lines = [str(card), *([] if choice is None else [str(choice)]), f"Saved to {a.output}"]
    return {"json": found, "text": "\n".join(lines)}


def _calibrate(a: argparse.Namespace) -> dict[str, Any]:
    guard = _load(a)
    guard.calibrate(_dataset(a.data, a.split), progress=a.progress)
    output = a.output or a.guard
    guard.save_pretrained(output, overwrite=a.output is None or a.overwrite)
    card = guard.report()
    return {"json": {"guard": str(output), **card.to_dict()}, "text": f"{card}\nSaved to {output}"}


def _check(a: argparse.Namespace) -> dict[str, Any]:
    from rm_ood.batch import check_file

    if a.json and a.output == "-":
        raise InputError("--json and --output -: both would go to stdout; write the verdicts to a file")
    summary = check_file(_load(a), _dataset(a.data, a.split), a.output, progress=a.progress)
    flagged = ", ".join(f"{axis} {count}" for axis, count in summary["flagged"].items())
    text = f"{summary['items']} items, flagged: {flagged}; rows in {a.output}"
    return {"json": summary, "text": "" if a.output == "-" else text}


def _study(a: argparse.Namespace) -> dict[str, Any]:
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


def _report(a: argparse.Namespace) -> dict[str, Any]:
    from rm_ood.guard import OODGuard

    card = OODGuard.from_pretrained(a.guard).report()
    if a.html:
        Path(a.html).write_text(card.to_html(), encoding="utf-8")
    return {"json": card.to_dict(), "text": f"{card}" + (f"\nPage in {a.html}" if a.html else "")}


def _doctor(a: argparse.Namespace) -> dict[str, Any]:
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


def _study_scores(a: argparse.Namespace) -> dict[str, Any]:
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
    model, tokenizer = load_reward_model(a.model, **_model_options(a))
    return OODGuard.from_pretrained(a.guard, model, tokenizer, allow_dtype_change=a.allow_dtype_change)


def _model_options(a: argparse.Namespace) -> dict[str, Any]:
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


# -- arguments


def _parser() -> argparse.ArgumentParser:
    from rm_ood import __version__

    parser = argparse.ArgumentParser(
        prog="rm-ood", description="Out-of-distribution guard for reward models: fit, calibrate, flag."
    )
    parser.add_argument("--version", action="version", version=f"rm-ood {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = _command(
        commands, "demo", _demo, "train a small reward model, guard it, and measure it under shift; needs no hub",
        """
        rm-ood demo
        rm-ood demo --output my-demo --seed 1 --json > report.json
        """,
    )  # fmt: skip
    demo.add_argument(
        "--output", default="rm-ood-demo", metavar="DIR", help="where the files go (default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="same seed, same numbers (default: %(default)s)")

    fit = _command(
        commands, "fit", _fit, "fit and calibrate a guard on in-distribution preference data",
        """
        rm-ood fit --model my-reward-model --data pairs.jsonl.gz --output guard
        rm-ood fit --model org/reward-model --data org/preferences --output guard --channels final --alpha 0.05
        rm-ood fit --model my-reward-model --data pairs.jsonl.gz --output guard --channels auto
        """,
    )  # fmt: skip
    _model_arguments(fit)
    _data_arguments(fit, "preference rows: prompt/chosen/rejected or prompt/completion/label")
    fit.add_argument("--output", required=True, metavar="GUARD", help="folder to save the guard in")
    fit.add_argument("--overwrite", action="store_true", help="replace another guard in that folder")
    fit.add_argument("--calibration-data", metavar="DATA", help="calibrate on these rows, not on a share of --data")
    fit.add_argument(
        "--calibration-share", type=float, default=0.3, help="share of the prompts held out (default: %(default)s)"
    )
    _settings(fit)

    calibrate = _command(
        commands, "calibrate", _calibrate, "replace a guard's calibration by other trusted data",
        """
        rm-ood calibrate --guard guard --model my-reward-model --data trusted-traffic.jsonl
        """,
    )  # fmt: skip
    _guard_arguments(calibrate)
    _data_arguments(calibrate, "rows with prompt and response, labels or not")
    calibrate.add_argument("--output", metavar="GUARD", help="save here instead of in place")
    calibrate.add_argument("--overwrite", action="store_true", help="replace another guard in --output")

    check = _command(
        commands, "check", _check, "reward and verdict of every row of a file",
        """
        rm-ood check --guard guard --model my-reward-model --data answers.jsonl --output verdicts.jsonl
        rm-ood check --guard guard --model my-reward-model --data pairs.jsonl.gz --output - | head
        """,
    )  # fmt: skip
    _guard_arguments(check)
    _data_arguments(check, "rows with prompt and response, or preference rows (two verdicts each)")
    check.add_argument("--output", required=True, metavar="OUT", help="JSON Lines file (.gz compresses), - for stdout")

    study = _command(
        commands, "study", _study, "how far the reward model can be trusted under shift, and whether the flag tells",
        """
        rm-ood study --guard guard --model my-reward-model --data held-out-pairs.jsonl.gz --output study
        rm-ood study --guard guard --model my-reward-model --data pairs.jsonl --subset domain --output study \\
            --shift "word noise:response" --shift "best of n" --shift aligned=pairs-de.jsonl --shift my_shifts.py:emoji
        """,
    )  # fmt: skip
    _guard_arguments(study)
    _data_arguments(
        study,
        "clean preference rows (one or several rejected each; RM-Bench, RewardBench 2), neither trained nor fitted on",
    )
    _study_arguments(study)

    doctor = _command(
        commands, "doctor", _doctor, "does this guard still work here: fingerprint, canaries, planted shifts",
        """
        rm-ood doctor --guard guard --model my-reward-model
        rm-ood doctor --guard guard --model my-reward-model --data fresh-traffic.jsonl --record
        """,
    )  # fmt: skip
    _guard_arguments(doctor)
    doctor.add_argument(
        "--data", metavar="PATH|ID", help="clean rows to plant shifts in (default: everyday English that comes along)"
    )
    doctor.add_argument("--split", default="train", help="split of a Hub data set (default: %(default)s)")
    doctor.add_argument("--seed", type=int, default=0, help="of the draw and the noise (default: %(default)s)")
    doctor.add_argument("--record", action="store_true", help="keep the findings in the guard, for its card")

    scores = _command(
        commands, "study-scores", _study_scores,
        "accuracy, calibration and detection from files of reward pairs alone: the study of LeVine et al.",
        """
        rm-ood study-scores clean.csv shifted.csv --id clean.csv --output study
        rm-ood study-scores paper_scores --output study --json > study.json
        """,
    )  # fmt: skip
    scores.add_argument(
        "scores", nargs="+", metavar="CSV", help="columns chosen,rejected; .csv, .csv.gz, or folders of them"
    )
    scores.add_argument("--output", required=True, metavar="DIR", help="where JSON, Markdown and the table go")
    scores.add_argument(
        "--id", metavar="FILE", help="the in-distribution file of all (default: told by the paper's folder layout)"
    )

    report = _command(
        commands, "report", _report, "the guard card: what it was fitted on, and what it promises",
        """
        rm-ood report --guard guard
        rm-ood report --guard guard --html card.html
        """,
    )  # fmt: skip
    report.add_argument("--guard", required=True, metavar="GUARD", help="folder or Hub id of a saved guard")
    report.add_argument("--html", metavar="FILE", help="also write a self-contained page")
    return parser


def _command(commands: Any, name: str, run: Any, summary: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars on stderr")
    parser.set_defaults(run=run)
    return parser


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="ID|PATH", help="reward model: folder or Hub id")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model's repository ships")
    parser.add_argument("--dtype", default="auto", help="torch dtype of the model (default: the checkpoint's)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")


def _guard_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--guard", required=True, metavar="GUARD", help="folder or Hub id of a saved guard")
    _model_arguments(parser)
    parser.add_argument(
        "--allow-dtype-change", action="store_true", help="accept the model in another dtype than at fit"
    )


def _data_arguments(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument(
        "--data", required=True, metavar="PATH|ID", help=f"{help_text}; .jsonl, .jsonl.gz, .parquet, Hub id"
    )
    parser.add_argument("--split", default="train", help="split of a Hub data set (default: %(default)s)")


def _study_arguments(parser: argparse.ArgumentParser) -> None:
    from rm_ood.study.command import DEFAULT_SHIFTS, WORDS

    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="folder for study.json, report.html, report.md, scores.parquet")
    add(
        "--shift", action="append", metavar="SPEC",
        help="NAME[:SIDE][:SEVERITY], FILE.py:FUNCTION, aligned=FILE[:LANG] or translate=MODEL; several --shift add up; "
        f"default: {', '.join(DEFAULT_SHIFTS)}",
    )  # fmt: skip
    add("--words", choices=WORDS, default="rows", help="where word noise draws from (default: the words of the rows)")
    add("--limit", type=int, metavar="N", help="the first N rows only")
    add("--subset", metavar="COLUMN", help="also tell accuracy, ECE and flags by the values of this column")
    add(
        "--examples",
        type=int,
        default=0,
        metavar="N",
        help="show N flagged texts per shift in the report (default: none)",
    )
    add("--fit-data", metavar="PATH|ID", help="what the guard was fitted on: fits the literature's detectors beside it")
    add("--background", metavar="PATH|ID", help="general text, for the relative Mahalanobis distance (with --fit-data)")
    add("--cache", metavar="FILE", help="scores by content, no texts (default: scores.sqlite in --output)")
    add("--bootstrap", type=int, default=1000, metavar="N", help="draws for the intervals (default: 1000; 0: none)")
    add("--seed", type=int, default=0, help="of the shifts, the draws and the bootstrap (default: %(default)s)")


def _settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings (kept in the guard)")
    # Absent unless given: the defaults are GuardConfig's.
    add = partial(group.add_argument, default=argparse.SUPPRESS)
    add(
        "--channels",
        help="default, final, auto (those that see planted shifts best here), or a list: "
        "final,response/mean@0.67,response/contrast@0.67",
    )
    add(
        "--axes",
        type=lambda text: tuple(text.split(",")),
        help="some of prompt,response (default) and response_given_prompt",
    )
    add("--detector", choices=["mahalanobis"], help="default: mahalanobis")
    add("--alpha", type=float, help="tolerated false-alarm rate per item (default: 0.01)")
    add("--confidence", type=_confidence, help="that the rate is kept; 'none' keeps it on average (default: 0.95)")
    add("--groups", help="a column to calibrate by, or 'length'")
    add("--max-length", type=int, help="longest input in tokens (default: the tokenizer's or model's limit)")
    add("--on-too-long", choices=["flag", "truncate", "error"], help="default: flag")
    add("--batch-size", type=int, help="default: 16")
    add("--seed", type=int, help="seed of the split (default: 0)")
    add("--head", help="dotted path of the reward head, where the rule is wrong")
    add("--layers", help="dotted path of the list of blocks, where the rule is wrong")
    add("--reward", help="which output is the reward: auto (default), logits:i, end_scores, ...")
    add("--read-out", choices=["auto", "non_pad", "last_token", "before_pad", "first"], help="default: auto")
    add("--prompt-pass", action="store_true", help="judge the prompt in a second, prompt-only forward")
    add("--shrinkage", type=_shrinkage, help="oas (default), likelihood, or a coefficient in [0, 1]")
    add("--floor", type=float, help="smallest eigenvalue as a share of the mean one (default: 1e-4)")
    add(
        "--span-means",
        choices=["contrast", "unit", "raw"],
        help="the distance of span means (default: contrast, which costs one more forward per fit prompt)",
    )
    add("--project-out-reward", action="store_true", help="leave the reward's direction out of the channel final")
    add("--text-format", choices=["auto", "chat", "pair", "plain"], help="default: auto, settled by the data")
    add("--split-special-tokens", action="store_true", help="read typed special tokens as text")
    add("--append-eos", action="store_true", help="end plain text with the end token")
    add(
        "--no-special-tokens", dest="special_tokens", action="store_false",
        help="plain text without the special tokens that the tokenizer adds",
    )  # fmt: skip
    add("--allow-empty", action="store_true", help="accept empty prompts")
    add("--max-chars", type=int, help="longest text in characters (default: 200000)")
    add("--on-bad", choices=["error", "drop"], help="unusable rows: stop (default), or leave out and count")
    add("--one-class", action="store_true", help="one Gaussian for all responses")
    add("--max-calibration", type=int, help="calibration prompts kept (default: 10000)")


def _confidence(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def _shrinkage(text: str) -> float | str:
    return text if text in ("oas", "likelihood") else float(text)


if __name__ == "__main__":
    sys.exit(main())
