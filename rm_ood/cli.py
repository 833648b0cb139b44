"""The command line: `rm-ood demo | fit | calibrate | check | study | study-scores | doctor | serve | report`.

Results go to stdout (`--json`: one object), progress to stderr. Exit codes: 0 done, 1 bad input, 2 usage, 3 the guard and
the model do not belong together.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rm_ood import commands
from rm_ood.errors import MismatchError, OODGuardError, OODGuardWarning

DONE, BAD_INPUT, USAGE, MISMATCH = 0, 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    return carry_out(f"rm-ood {arguments.command}", arguments)


def carry_out(name: str, arguments: argparse.Namespace) -> int:
    """Run what a command's arguments say, print its result, or what went wrong in one line; returns the exit code.

    Args:
        name: the command, as errors begin.
    """
    try:
        with warnings.catch_warnings():
            # A warning is for the person at the terminal: one line, without the source line it was raised at.
            warnings.simplefilter("always", OODGuardWarning)
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            result = arguments.run(arguments)
    except MismatchError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return MISMATCH
    except BrokenPipeError:
        # The reader of stdout (head, less) has seen enough; the interpreter must not fail on its last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (OODGuardError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as stopped:
        print(f"{name}: interrupted; {str(stopped) or 'nothing was written'}", file=sys.stderr)
        return 130
    if result is None:
        # One of several processes, another of which has the result.
        return DONE
    if arguments.json:
        print(json.dumps(result["json"], allow_nan=False))
    elif result["text"]:
        print(result["text"])
    return DONE


def _show_warning(message: Any, category: type[Warning], *_: Any) -> None:
    name = "warning" if issubclass(category, OODGuardWarning) else category.__name__
    print(f"rm-ood: {name}: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    from rm_ood import __version__

    parser = argparse.ArgumentParser(
        prog="rm-ood", description="Out-of-distribution guard for reward models: fit, calibrate, flag."
    )
    parser.add_argument("--version", action="version", version=f"rm-ood {__version__}")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = add_command(
        parsers, "demo", commands.demo, "train a small reward model, guard it, and measure it under shift; needs no hub",
        """
        rm-ood demo
        rm-ood demo --output my-demo --seed 1 --json > report.json
        """,
    )  # fmt: skip
    demo.add_argument(
        "--output", default="rm-ood-demo", metavar="DIR", help="where the files go (default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="same seed, same numbers (default: %(default)s)")

    fit = add_command(
        parsers, "fit", commands.fit, "fit and calibrate a guard on in-distribution preference data",
        """
        rm-ood fit --model my-reward-model --data pairs.jsonl.gz --output guard
        rm-ood fit --model org/reward-model --data org/preferences --output guard --channels final --alpha 0.05
        rm-ood fit --model my-reward-model --data pairs.jsonl.gz --output guard --channels auto
        """,
    )  # fmt: skip
    fit_arguments(fit)

    calibrate = add_command(
        parsers, "calibrate", commands.calibrate, "replace a guard's calibration by other trusted data",
        """
        rm-ood calibrate --guard guard --model my-reward-model --data trusted-traffic.jsonl
        """,
    )  # fmt: skip
    guard_arguments(calibrate)
    _data_arguments(calibrate, "rows with prompt and response, labels or not")
    calibrate.add_argument("--output", metavar="GUARD", help="save here instead of in place")
    calibrate.add_argument("--overwrite", action="store_true", help="replace another guard in --output")

    check = add_command(
        parsers, "check", commands.check, "reward and verdict of every row of a file",
        """
        rm-ood check --guard guard --model my-reward-model --data answers.jsonl --output verdicts.jsonl
        rm-ood check --guard guard --model my-reward-model --data pairs.jsonl.gz --output - | head
        """,
    )  # fmt: skip
    guard_arguments(check)
    _data_arguments(check, "rows with prompt and response, or preference rows (two verdicts each)")
    check.add_argument("--output", required=True, metavar="OUT", help="JSON Lines file (.gz compresses), - for stdout")

    study = add_command(
        parsers, "study", commands.study, "how far the reward model can be trusted under shift, and whether the flag tells",
        """
        rm-ood study --guard guard --model my-reward-model --data held-out-pairs.jsonl.gz --output study
        rm-ood study --guard guard --model my-reward-model --data pairs.jsonl --subset domain --output study \\
            --shift "word noise:response" --shift "best of n" --shift aligned=pairs-de.jsonl --shift my_shifts.py:emoji
        """,
    )  # fmt: skip
    guard_arguments(study)
    _data_arguments(
        study,
        "clean preference rows (one or several rejected each; RM-Bench, RewardBench 2), neither trained nor fitted on",
    )
    _study_arguments(study)

    doctor = add_command(
        parsers, "doctor", commands.doctor, "does this guard still work here: fingerprint, canaries, planted shifts",
        """
        rm-ood doctor --guard guard --model my-reward-model
        rm-ood doctor --guard guard --model my-reward-model --data fresh-traffic.jsonl --record
        """,
    )  # fmt: skip
    guard_arguments(doctor)
    doctor.add_argument(
        "--data", metavar="PATH|ID", help="clean rows to plant shifts in (default: everyday English that comes along)"
    )
    doctor.add_argument("--split", default="train", help="split of a Hub data set (default: %(default)s)")
    doctor.add_argument("--seed", type=int, default=0, help="of the draw and the noise (default: %(default)s)")
    doctor.add_argument("--record", action="store_true", help="keep the findings in the guard, for its card")

    serve = add_command(
        parsers, "serve", commands.serve, "reward and verdict over HTTP",
        """
        rm-ood serve --guard guard --model my-reward-model
        rm-ood serve --guard guard --model my-reward-model --mode enforce --monitor-state monitor.json
        rm-ood serve --guard guard --model my-reward-model --host 0.0.0.0 --api-key-file key
        rm-ood serve --guard guard --model my-reward-model --channels final --engine http://127.0.0.1:30000
        """,
    )  # fmt: skip
    guard_arguments(serve)
    _serve_arguments(serve)
    _engine_arguments(serve)

    scores = add_command(
        parsers, "study-scores", commands.study_scores,
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

    report = add_command(
        parsers, "report", commands.report, "the guard card: what it was fitted on, and what it promises",
        """
        rm-ood report --guard guard
        rm-ood report --guard guard --html card.html
        """,
    )  # fmt: skip
    report.add_argument("--guard", required=True, metavar="GUARD", help="folder or Hub id of a saved guard")
    report.add_argument("--html", metavar="FILE", help="also write a self-contained page")
    return parser


def add_command(parsers: Any, name: str, run: Any, summary: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = parsers.add_parser(
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


def fit_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rm-ood fit`."""
    _model_arguments(parser)
    _data_arguments(parser, "preference rows: prompt/chosen/rejected or prompt/completion/label")
    parser.add_argument("--output", required=True, metavar="GUARD", help="folder to save the guard in")
    parser.add_argument("--overwrite", action="store_true", help="replace another guard in that folder")
    parser.add_argument("--calibration-data", metavar="DATA", help="calibrate on these rows, not on a share of --data")
    parser.add_argument(
        "--calibration-share", type=float, default=0.3, help="share of the prompts held out (default: %(default)s)"
    )
    _settings(parser)


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="ID|PATH", help="reward model: folder or Hub id")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model's repository ships")
    parser.add_argument("--dtype", default="auto", help="torch dtype of the model (default: the checkpoint's)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")


def guard_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name a saved guard and its reward model."""
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
    add("--limit", type=whole_number, metavar="N", help="the first N rows only")
    add("--subset", metavar="COLUMN", help="also tell accuracy, ECE and flags by the values of this column")
    add(
        "--examples",
        type=partial(whole_number, low=0),
        default=0,
        metavar="N",
        help="show N flagged texts per shift in the report (default: none)",
    )
    add("--fit-data", metavar="PATH|ID", help="what the guard was fitted on: fits the literature's detectors beside it")
    add("--background", metavar="PATH|ID", help="general text, for the relative Mahalanobis distance (with --fit-data)")
    add("--cache", metavar="FILE", help="scores by content, no texts (default: scores.sqlite in --output)")
    add(
        "--bootstrap",
        type=partial(whole_number, low=0),
        default=1000,
        metavar="N",
        help="draws for the intervals (default: 1000; 0: none)",
    )
    add("--seed", type=int, default=0, help="of the shifts, the draws and the bootstrap (default: %(default)s)")


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to serve on; other than loopback needs a key (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--api-key-file", metavar="FILE",
        help="file with the key that requests must bring; or the environment variable RM_OOD_API_KEY",
    )  # fmt: skip
    # Otherwise an abbreviation of --api-key-file, and its value part of an error.
    parser.add_argument("--api-key", action=_KeyOnTheCommandLine, nargs="?", dest="key", help=argparse.SUPPRESS)
    # Absent unless given: the defaults are ServeSettings'.
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    add(
        "--allowed-host", type=lambda text: tuple(text.split(",")), dest="allowed_hosts", metavar="NAME,NAME",
        help="names that requests may be for, beside this machine's own, such as *.example.com; * is any (default: any "
        "with a key, none without)",
    )  # fmt: skip
    add(
        "--mode", choices=["shadow", "warn", "enforce"],
        help="what becomes of a flagged item's reward: nothing; a header counts it too (default); it is withheld",
    )  # fmt: skip
    add("--withheld-reward", type=float, metavar="X", help="the number for it, where a protocol needs one")
    add("--monitor-state", type=Path, metavar="FILE", help="where the traffic monitor outlives the server")
    add("--monitor-save", type=float, dest="monitor_save_s", metavar="S", help="how often it is written (default: 10)")
    add("--channels", help="join these of the guard's channels alone, such as final (default: as saved)")
    add("--unready-on-alarm", action="store_true", help="/readyz fails once the traffic monitor has alarmed")
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="items in one forward, at most the guard's own (default); or in one request to the engine",
    )
    add("--batch-wait", type=float, dest="batch_wait_s", metavar="S", help="for an idle batch to fill (default: 0.002)")
    add("--max-items", type=int, metavar="N", help="answers in a request (default: 32)")
    add("--max-chars", type=int, metavar="N", help="characters of a text (default: 20000)")
    add("--max-body-bytes", type=int, metavar="N", help="of a request (default: 1 MiB)")
    add("--max-queue", type=int, metavar="N", help="items that wait for the model (default: 64)")
    add(
        "--max-wait", type=float, dest="max_wait_s", metavar="S",
        help="expected until an item has its scores; more is turned away (default: --model-timeout)",
    )  # fmt: skip
    add("--max-connections", type=int, metavar="N", help="open at once (default: 128)")
    add("--request-timeout", type=float, dest="request_timeout_s", metavar="S", help="to receive one (default: 10)")
    add("--model-timeout", type=float, dest="model_timeout_s", metavar="S", help="to score one (default: 30)")
    add("--drain-timeout", type=float, dest="drain_timeout_s", metavar="S", help="after SIGTERM (default: 30)")


def _engine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "inference engine",
        "in place of the reward model in this process; of --model only tokenizer, limit and head are read",
    )
    group.add_argument(
        "--engine", metavar="URL", help="SGLang or vLLM (with the plugin) that serves --model: http://host:port"
    )
    # Absent unless given: the defaults are EngineSettings'.
    add = partial(group.add_argument, default=argparse.SUPPRESS)
    add(
        "--engine-kind", choices=["auto", "sglang", "vllm", "vllm-vectors"],
        help="vllm: with the plugin; vllm-vectors: the backbone, without it (default: auto, one of the others)",
    )  # fmt: skip
    add("--engine-model", metavar="NAME", help="name that it serves the model under (default: its only one)")
    add("--engine-key-file", metavar="FILE", help="file with its key; or the environment variable RM_OOD_ENGINE_KEY")
    group.add_argument("--engine-key", action=_KeyOnTheCommandLine, nargs="?", dest="key", help=argparse.SUPPRESS)
    add("--engine-timeout", type=float, dest="engine_timeout_s", metavar="S", help="for one answer (default: 20)")
    add("--engine-retries", type=int, metavar="N", help="further tries after a lost connection (default: 2)")
    add("--engine-concurrency", type=int, metavar="N", help="requests in flight (default: 4)")
    add("--engine-probe", type=float, dest="engine_probe_s", metavar="S", help="between canary texts (default: 10)")


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


class _KeyOnTheCommandLine(argparse.Action):
    """A refusal that does not repeat the key."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error(
            "a key on the command line is seen by every user of this machine: use --api-key-file or --engine-key-file"
        )


def whole_number(text: str, low: int = 1) -> int:
    """An argument that counts something.

    Raises:
        argparse.ArgumentTypeError: it is not a whole number from `low`.
    """
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        raise argparse.ArgumentTypeError(f"expected a whole number from {low}, got {text!r}")
    return value


def amount(text: str, *, zero: bool = False) -> float:
    """An argument that measures something.

    Args:
        zero: whether it may be 0.
    Raises:
        argparse.ArgumentTypeError: it is not a finite number above 0, or from 0.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        raise argparse.ArgumentTypeError(f"expected a number {'from' if zero else 'above'} 0, got {text!r}")
    return value


def _confidence(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def _shrinkage(text: str) -> float | str:
    return text if text in ("oas", "likelihood") else float(text)


if __name__ == "__main__":
    sys.exit(main())
