"""The command line on a real folder: help, results, exit codes, files."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import _WORDS, preference_rows

from rm_ood import OODGuard
from rm_ood.cli import main

COMMANDS = ("demo", "fit", "calibrate", "check", "study", "doctor", "serve", "study-scores", "report")


@pytest.fixture(scope="module")
def place(shared_decoder: Any, decoder_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved reward model, data, and a guard fitted by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    shared_decoder.save_pretrained(folder / "model")
    decoder_tokenizer.save_pretrained(folder / "model")
    write(folder / "pairs.jsonl", preference_rows(400))
    code = run("fit", "--model", folder / "model", "--data", folder / "pairs.jsonl", "--output", folder / "guard",
               "--alpha", 0.05, "--calibration-share", 0.5, "--no-progress")  # fmt: skip
    assert code == 0
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*arguments: object) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return main([str(a) for a in arguments])


def check(place: Path, data: Path, output: object, *more: object) -> int:
    return run(
        "check", "--guard", place / "guard", "--model", place / "model", "--data", data, "--output", output, *more
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_a_working_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(command, "--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"rm-ood {command}" in text.partition("examples:")[2]


@pytest.mark.parametrize(
    ("ids", "repeats"), [(["a", "a", "a"], 2), (["1", None], 1), (["\ud800", "\ud800"], 1), (["a", "b", None], 0)]
)
def test_ids_that_are_not_distinct_are_told(
    place: Path, tmp_path: Path, ids: list[str | None], repeats: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "a question", "response": f"answer {i}", "id": name} for i, name in enumerate(ids)]
    assert check(place, write(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl", "--no-progress") == 0
    said = capsys.readouterr().err
    told = f"{repeats} verdicts have the id of an earlier one, the first of them that of rows[1].response"
    assert (told in said) == bool(repeats), said
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(ids)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["fit"], ["check", "--guard", "g"]])
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2


def test_fit_prints_the_card_and_saves(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run("fit", "--model", place / "model", "--data", place / "pairs.jsonl", "--output", tmp_path / "g", "--json",
               "--channels", "final", "--alpha", 0.05, "--confidence", "none", "--shrinkage", 0.2, "--no-special-tokens",
               "--calibration-data",
               write(tmp_path / "other.jsonl", preference_rows(200, seed=5)))  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0, captured.err
    card = json.loads(captured.out)
    assert card["channels"] == ["final"]
    assert card["calibration"]["confidence"] is None
    assert card["calibration"]["n"] == 150
    assert "fit:" in captured.err
    guard = OODGuard.from_pretrained(tmp_path / "g")
    assert guard.config.shrinkage == 0.2
    assert not guard.config.special_tokens
    assert OODGuard.from_pretrained(place / "guard").config.special_tokens


def test_fit_refuses_to_replace_another_guard(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "fit",
        "--model",
        place / "model",
        "--data",
        place / "pairs.jsonl",
        "--output",
        place / "guard",
        "--no-progress",
    ]
    before = (place / "guard" / "ood_guard.safetensors").read_bytes()
    assert run(*options, "--alpha", 0.1) == 1
    assert "pass --overwrite" in capsys.readouterr().err
    assert (place / "guard" / "ood_guard.safetensors").read_bytes() == before


def test_check_writes_one_row_per_verdict(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [{"id": f"row-{i}", **row} for i, row in enumerate(preference_rows(5, seed=8))]
    pairs[4]["rejected"] = ["one answer", "another answer"]
    assert check(place, write(tmp_path / "in.jsonl", pairs), tmp_path / "out.jsonl.gz", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    with gzip.open(tmp_path / "out.jsonl.gz", "rt") as lines:
        verdicts = [json.loads(line) for line in lines]
    assert summary["items"] == len(verdicts) == 11
    assert [v["id"] for v in verdicts[:2]] == ["row-0#chosen", "row-0#rejected"]
    assert [v["id"] for v in verdicts[8:]] == ["row-4#chosen", "row-4#rejected[0]", "row-4#rejected[1]"]
    assert set(verdicts[0]) == {
        "id", "reward", "is_ood", "p_value", "axes", "nearest_class", "class_log_odds", "reasons", "truncated",
    }  # fmt: skip
    assert set(verdicts[0]["axes"]["response"]) == {"ood_score", "p_value", "is_ood", "channels"}
    assert summary["flagged"]["combined"] == sum(v["is_ood"] for v in verdicts)


def test_check_to_stdout_numbers_rows_without_ids(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": r["prompt"], "response": r["chosen"]} for r in preference_rows(3, seed=8)]
    assert check(place, write(tmp_path / "in.jsonl", rows), "-", "--no-progress") == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["id"] for line in captured.out.splitlines()] == ["0", "1", "2"]
    assert captured.err == ""


def test_a_bad_row_writes_nothing(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a secret word", "response": "fine"},
        {"prompt": "a secret word", "response": 3},
    ]
    assert check(place, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", "--no-progress") == 1
    message = capsys.readouterr().err
    assert "rows[1].response: expected str, got int" in message
    assert "secret" not in message
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a", "response": "b"}\n{"prompt": "a\xff"}\n', "line 2: not UTF-8"),
        (b'{"prompt": "a", "response": "b"}\nnot json\n', "line 2: not JSON"),
        (b'{"question": "a", "answer": "b"}\n', "Did you mean answer -> response, question -> prompt"),
    ],
)
def test_unreadable_data_exit_1(place: Path, tmp_path: Path, capsys: Any, content: bytes, message: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    assert check(place, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--no-progress") == 1
    assert message in capsys.readouterr().err


def test_missing_places_exit_1(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(place, tmp_path / "none.jsonl", tmp_path / "out.jsonl") == 1
    assert "no data file at" in capsys.readouterr().err
    assert run("report", "--guard", tmp_path / "none") == 1
    assert "ood_guard.safetensors" in capsys.readouterr().err
    assert run("fit", "--model", tmp_path / "none", "--data", place / "pairs.jsonl", "--output", tmp_path / "g") == 1
    assert "no reward model folder" in capsys.readouterr().err
    assert check(place, place / "pairs.jsonl", tmp_path / "no" / "folder.jsonl") == 1
    assert "cannot write" in capsys.readouterr().err


def test_another_model_exits_3(
    place: Path, tmp_path: Path, shared_decoder: Any, decoder_tokenizer: Any, capsys: Any
) -> None:
    import copy

    other = copy.deepcopy(shared_decoder)
    with torch.no_grad():
        other.score.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    decoder_tokenizer.save_pretrained(tmp_path / "other")
    code = run("check", "--guard", place / "guard", "--model", tmp_path / "other", "--data", place / "pairs.jsonl",
               "--output", "-")  # fmt: skip
    assert code == 3
    assert "head_weights" in capsys.readouterr().err


def test_a_folder_without_a_trained_head_is_no_reward_model(
    place: Path, tmp_path: Path, minilm: Any, capsys: Any
) -> None:
    model, tokenizer = minilm
    model.bert.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    assert run("fit", "--model", tmp_path / "encoder", "--data", place / "pairs.jsonl", "--output", tmp_path / "g") == 1
    assert "lacks 2 weights" in capsys.readouterr().err


def test_calibrate_in_place_and_elsewhere(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": r["prompt"], "response": r["chosen"]} for r in preference_rows(220, seed=6)]
    data = write(tmp_path / "traffic.jsonl", rows)
    before = (place / "guard" / "ood_guard.safetensors").read_bytes()
    options = ["calibrate", "--guard", place / "guard", "--model", place / "model", "--data", data, "--json"]
    assert run(*options, "--output", tmp_path / "new") == 0
    assert json.loads(capsys.readouterr().out)["calibration"]["n"] == 170
    assert (place / "guard" / "ood_guard.safetensors").read_bytes() == before
    assert OODGuard.from_pretrained(tmp_path / "new")._fitted().table.n == 220


def test_calibrate_warns_in_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"{i} \u0434\u0430", "response": "\u043d\u0435\u0442 " * 20} for i in range(200)]
    data = write(tmp_path / "odd.jsonl", rows)
    assert run("calibrate", "--guard", place / "guard", "--model", place / "model", "--data", data, "--output",
               tmp_path / "odd", "--no-progress") == 0  # fmt: skip
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("rm-ood: warning: the calibration data do not look like the held-out share")


def test_report_prints_the_card_and_writes_a_page(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("report", "--guard", place / "guard", "--html", tmp_path / "card.html") == 0
    text = capsys.readouterr().out
    assert "rank k =" in text
    page = (tmp_path / "card.html").read_text()
    assert "http" not in page.replace("<!doctype html>", "")
    assert "rank k =" in page
    assert run("report", "--guard", place / "guard", "--json") == 0
    assert json.loads(capsys.readouterr().out)["fit"]["items"] > 0


def test_wrong_settings_are_told_before_the_model_is_loaded(place: Path, tmp_path: Path, capsys: Any) -> None:
    assert (
        run("fit", "--model", "no/such-model", "--data", place / "pairs.jsonl", "--output", tmp_path, "--alpha", 7) == 1
    )
    assert "alpha=7.0: expected a fraction in (0, 1)" in capsys.readouterr().err


def test_interrupt_exits_130(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rm_ood.batch.check_file", stopped)
    assert check(place, place / "pairs.jsonl", tmp_path / "out.jsonl") == 130
    assert "nothing was written" in capsys.readouterr().err


def test_the_installed_command_runs(place: Path) -> None:
    command = Path(sys.executable).with_name("rm-ood")
    done = subprocess.run(
        [command, "report", "--guard", place / "guard", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["calibration"]["alpha"] == 0.05


def test_a_hub_data_set_goes_through_datasets(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import datasets

    rows = [{"prompt": " ".join(_WORDS[:5]), "response": "fine"}]
    asked: list[tuple[str, str]] = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        if name == "org/none":
            raise datasets.exceptions.DatasetNotFoundError(name)
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    options = [
        "--guard",
        place / "guard",
        "--model",
        place / "model",
        "--output",
        "-",
        "--split",
        "test",
        "--no-progress",
    ]
    assert run("check", *options, "--data", "org/data") == 0
    assert asked == [("org/data", "test")]
    assert run("check", *options, "--data", "org/none") == 1
    assert "no such data set" in capsys.readouterr().err


def test_check_writes_through_links_and_into_pipes(place: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "in.jsonl", [{"prompt": "a question", "response": "fine"}])
    (tmp_path / "real.jsonl").write_text("old")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    assert check(place, data, tmp_path / "link.jsonl", "--no-progress") == 0
    assert json.loads((tmp_path / "real.jsonl").read_text())["id"] == "0"
    assert (tmp_path / "link.jsonl").is_symlink()
    assert (tmp_path / "real.jsonl").stat().st_mode & 0o777 == 0o666 & ~_umask()
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE, text=True)
    assert check(place, data, tmp_path / "pipe", "--no-progress") == 0
    assert json.loads(reader.communicate(timeout=60)[0])["id"] == "0"
    assert not (tmp_path / "pipe").is_file()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_reader_that_stops_early_is_no_error(place: Path) -> None:
    command = f"{Path(sys.executable).with_name('rm-ood')} check --guard {place / 'guard'} --model {place / 'model'} " \
        f"--data {place / 'pairs.jsonl'} --output - --no-progress | head -n 1 ; exit ${{PIPESTATUS[0]}}"  # fmt: skip
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Error" not in done.stderr
    assert "rm-ood check:" not in done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_verdicts_and_summary_cannot_share_stdout(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(place, place / "pairs.jsonl", "-", "--json") == 1
    assert "both would go to stdout" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"), [("--dtype", "foo", "dtype='foo'"), ("--device", "foo", "device='foo'")]
)
def test_unusable_dtype_or_device(
    place: Path, tmp_path: Path, capsys: Any, option: str, value: str, message: str
) -> None:
    assert (
        run(
            "fit",
            "--model",
            place / "model",
            "--data",
            place / "pairs.jsonl",
            "--output",
            tmp_path / "g",
            option,
            value,
        )
        == 1
    )
    assert message in capsys.readouterr().err


def test_equal_responses_are_checked_all_the_same(place: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "in.jsonl", [{"prompt": "a question", "chosen": "same", "rejected": "same"}])
    assert check(place, data, tmp_path / "out.jsonl", "--no-progress") == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


# -- the doctor


def doctor(place: Path, *more: object, guard: Path | None = None, model: str = "model") -> int:
    return run(
        "doctor",
        "--guard",
        guard or place / "guard",
        "--model",
        place / model,
        "--device",
        "cpu",
        "--no-progress",
        *more,
    )


def test_doctor_says_who_the_model_is_and_what_is_caught(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(place, "--data", place / "pairs.jsonl") == 0
    text = capsys.readouterr().out
    assert "config: same" in text
    assert re.search(r"weights: same in \d+ parameters", text)
    assert "canaries: same" in text
    for shift in ("other script", "shuffled words", "code", "one word repeated", "empty response"):
        assert shift in text
    assert "caught: " in text
    assert "blind to: " in text


def test_doctor_records_its_findings_for_the_card(place: Path, tmp_path: Path, capsys: Any) -> None:
    guard = tmp_path / "guard"
    shutil.copytree(place / "guard", guard)
    assert doctor(place, "--json", "--record", guard=guard) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["identity"]["canaries"] == "same"
    assert {row["name"] for row in found["shifts"]} >= {"other script", "empty response"} or not found["shifts"]
    assert run("report", "--guard", guard, "--json") == 0
    assert json.loads(capsys.readouterr().out)["doctor"]["alpha"] == 0.05
    # Without --record the guard stays as it was.
    assert run("report", "--guard", place / "guard", "--json") == 0
    assert json.loads(capsys.readouterr().out)["doctor"] is None


def test_doctor_keeps_nothing_of_another_model(place: Path, tmp_path: Path, capsys: Any) -> None:
    guard = tmp_path / "guard"
    shutil.copytree(place / "guard", guard)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = ["--dtype", "bfloat16", "--allow-dtype-change", "--record"]
        assert main(["doctor", "--guard", str(guard), "--model", str(place / "model"), "--no-progress", *options]) == 1
        assert "--record: these findings are of another model" in capsys.readouterr().err
        assert (
            main(["doctor", "--guard", str(guard), "--model", str(place / "model"), "--no-progress", *options[:3]]) == 0
        )
    assert "config: differs in dtype, head_weights, as was allowed" in capsys.readouterr().out


def test_doctor_exits_3_when_a_canary_fails(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    assert doctor(place) == 0
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 1.01 * forward(self, x))
    capsys.readouterr()
    assert doctor(place) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "fingerprint tier 2): canaries: they differ in" in captured.err
