"""`rm-ood study` from files: what is read, what is refused before a model is loaded, and going on after an interrupt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import POISON, preference_rows

from rm_ood import InputError, OODGuard, artifact
from rm_ood.cli import main
from rm_ood.study.cache import ScoreCache
from rm_ood.study.command import DEFAULT_SHIFTS, Plan, words_of

SHIFTS = ("--shift", "word noise:response:0.5", "--shift", "character noise:prompt:0.2")


@pytest.fixture(scope="module")
def place(minilm_guard: OODGuard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reward model, guard, the data that it was fitted on, and clean rows."""
    folder = tmp_path_factory.mktemp("study")
    minilm_guard.model.save_pretrained(folder / "model")
    minilm_guard.tokenizer.save_pretrained(folder / "model")
    minilm_guard.save_pretrained(folder / "guard")
    rows = [{"kind": "ab"[i % 2], **row} for i, row in enumerate(preference_rows(60, seed=3))]
    for name, given in (("fit", preference_rows(100)), ("clean", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 30}) + "\n" for i in range(40)))
    (folder / "mine.py").write_text("def shout(text, context):\n    return text.upper() + ' !!!'\n")
    return folder


def arguments(place: Path, output: Path, *more: object) -> list[str]:
    parts = ["study", "--guard", place / "guard", "--model", place / "model", "--data", place / "clean.jsonl"]
    return [str(part) for part in (*parts, "--output", output, "--device", "cpu", *more)]


def run(*parts: Any) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return main(arguments(*parts))


def test_a_study_from_files_with_everything(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*SHIFTS[:2], "--shift", f"{place / 'mine.py'}:shout:prompt", "--subset", "kind", "--limit", 30]
    options += [
        "--examples",
        1,
        "--bootstrap",
        20,
        "--fit-data",
        place / "fit.jsonl",
        "--background",
        place / "text.jsonl",
    ]
    assert run(place, tmp_path / "out", *options, "--json") == 0
    captured = capsys.readouterr()
    doc = json.loads(captured.out)
    assert "score:" in captured.err
    assert doc == json.loads((tmp_path / "out" / "study.json").read_text())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "study.json", "report.html", "report.md", "scores.parquet", "scores.sqlite",
    }  # fmt: skip
    assert doc["model"] == "model"
    assert doc["command"].startswith("rm-ood study --guard")
    assert "'word noise:response:0.5'" in doc["command"]
    assert doc["id"]["n"] == 30
    assert set(doc["id"]["subsets"]) == {"a", "b"}
    assert [(row["name"], row["side"]) for row in doc["shifts"]] == [("word noise", "response"), ("shout", "prompt")]
    names = {"single Gaussian", "Mahalanobis++", "nearest neighbours", "residual", "norm", "relative"}
    for axis, channels in (("prompt", ["prompt/mean@0.67"]), ("response", ["final", "response/mean@0.67"])):
        assert set(doc["shifts"][0]["auroc"][axis]) >= {f"{name} {channel}" for name in names for channel in channels}
    assert "response given prompt" in doc["shifts"][0]["auroc"]["response"]
    assert doc["examples"]
    # Again, and more of it: nothing is read twice.
    assert run(place, tmp_path / "out", *options, "--no-progress") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "0 of them read by the reward model in this run" in captured.out
    assert "shout, prompt" in captured.out


def test_what_is_wrong_is_told_before_a_model_is_loaded(place: Path, tmp_path: Path, capsys: Any) -> None:
    for options, message in [
        (["--shift", "wordy noise"], "no such shift"),
        (["--shift", "word noise:sideways"], "neither a side"),
        (["--subset", "nothing"], "no value in the grouping column 'nothing'"),
        (["--model", "no/such-model", "--guard", tmp_path], "ood_guard.safetensors"),
        (["--data", tmp_path / "none.jsonl"], "no data file"),
    ]:
        assert run(place, tmp_path / "out", "--model", "no/such-model", *options) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(place, tmp_path / "out", "--limit", 0)
    assert "--limit: expected a whole number from 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(place, tmp_path / "out", "--background", place / "text.jsonl", *SHIFTS, "--no-progress") == 1
    assert "pass the fit data too" in capsys.readouterr().err
    assert run(place, tmp_path / "out", "--fit-data", place / "clean.jsonl", *SHIFTS, "--no-progress") == 1
    assert "none of these rows has a prompt that the guard was fitted on" in capsys.readouterr().err


def test_rows_that_the_fit_would_drop_are_left_out_and_counted(place: Path, tmp_path: Path, capsys: Any) -> None:
    tensors, config = artifact.read_guard(place / "guard")
    config["settings"] |= {"on_bad": "drop", "allow_empty": True}
    artifact.write_guard(tmp_path / "guard", tensors, config)
    good = preference_rows(12, seed=3)
    unusable = [{"prompt": "x"}, {"prompt": "y", "chosen": "same", "rejected": "same"}]
    empty = {"prompt": "", "chosen": "an answer", "rejected": "another"}
    for name, rows in (("some", [*unusable, *good, empty]), ("fit", [*unusable[:1], *preference_rows(100)])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    given = ["--guard", tmp_path / "guard", "--data", tmp_path / "some.jsonl", "--fit-data", tmp_path / "fit.jsonl"]
    options = [*given, *SHIFTS[:2], "--bootstrap", 0, "--no-progress"]
    assert run(place, tmp_path / "out", *options) == 0
    assert "Left out as unusable: 2 of the clean rows, 1 of the fit data." in capsys.readouterr().out
    doc = json.loads((tmp_path / "out" / "study.json").read_text())
    assert doc["dropped"] == {"clean rows": 2, "fit data": 1}
    assert doc["id"]["n"] == 13
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 of the clean rows, 1 of the fit data" in page


def test_another_model_exits_3(place: Path, tmp_path: Path, minilm: Any, capsys: Any) -> None:
    minilm[0].save_pretrained(tmp_path / "other")
    minilm[1].save_pretrained(tmp_path / "other")
    assert run(place, tmp_path / "out", "--model", tmp_path / "other", *SHIFTS) == 3
    assert "head_weights" in capsys.readouterr().err


def test_a_spoilt_cache_says_what_to_do(place: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scores.sqlite").write_bytes(b"spoilt" * 1000)
    assert run(place, tmp_path / "out", *SHIFTS, "--no-progress") == 1
    assert "Delete the file, or pass another one" in capsys.readouterr().err


def test_ctrl_c_keeps_the_scores_and_says_how_to_go_on(place: Path, tmp_path: Path, read: Any, capsys: Any) -> None:
    cache = tmp_path / "out" / "scores.sqlite"
    command = [sys.executable, "-m", "rm_ood.cli", *arguments(place, tmp_path / "out", *SHIFTS, "--bootstrap", "5")]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Tests that were started in the background of a shell pass on that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while _kept(cache) < 32 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        out, error = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130, error
    assert out == ""
    last = error.splitlines()[-1]
    assert last == (
        f"rm-ood study: interrupted; the scores so far are kept in {cache}: the same command goes on from there"
    )
    kept = _kept(cache)
    assert 32 <= kept < 360
    # The same command, here: what was kept is not read again, and the numbers are those of a study without a break.
    for folder in ("out", "fresh"):
        assert run(place, tmp_path / folder, *SHIFTS, "--bootstrap", 5, "--no-progress", "--json") == 0
    one, two = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    for doc in (one, two):
        del doc["seconds"], doc["command"]
    assert one == two
    with ScoreCache(cache) as resumed, ScoreCache(tmp_path / "fresh" / "scores.sqlite") as fresh:
        assert len(resumed) == len(fresh) > kept


def _kept(path: Path) -> int:
    """Records of a file that another process may be making just now."""
    import sqlite3

    try:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            return int(connection.execute("SELECT COUNT(*) FROM scores").fetchone()[0])
        finally:
            connection.close()
    except sqlite3.OperationalError:
        return 0


def test_a_plan_checks_and_reads(minilm_guard: OODGuard, place: Path) -> None:
    plan = Plan.of(minilm_guard, place / "clean.jsonl", limit=7)
    assert plan.shifts == DEFAULT_SHIFTS
    assert [row.id for row in plan.rows] == [str(i) for i in range(7)]
    with pytest.raises(InputError, match="no such shift"):
        Plan.of(minilm_guard, place / "clean.jsonl", ["nothing"])


def test_words_of_a_tokenizer_are_whole_and_in_a_fixed_order(minilm: Any, decoder_tokenizer: Any) -> None:
    for tokenizer, least in ((minilm[1], 10_000), (decoder_tokenizer, 5_000)):
        words = words_of(tokenizer)
        assert len(words) > least
        assert words == sorted(set(words))
        assert {"house", "quickly", "river"} <= set(words)
        assert all(word.isalpha() and word.islower() and len(word) > 2 for word in words)
    # "ization" begins no word.
    assert "ization" not in words_of(decoder_tokenizer)
    assert POISON in words_of(minilm[1])
