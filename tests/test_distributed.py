"""The command: shards one by one, as a job array does them, then all of them; and under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import preference_rows
from test_gang import assert_same_fit

from rm_ood import OODGuard
from rm_ood.distributed import _local_gpu, main
from rm_ood.errors import InputError
from rm_ood.one_pass import Pass
from rm_ood.reward_model import load_reward_model

pytestmark = pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
ROWS = preference_rows(160)


@pytest.fixture
def command(shared_decoder: Any, decoder_tokenizer: Any, tmp_path: Path) -> list[str]:
    shared_decoder.save_pretrained(tmp_path / "model")
    decoder_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return [
        "fit", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"), "--no-progress", "--alpha", "0.05",
        "--max-length", "128", "--calibration-share", "0.75", "--output", str(tmp_path / "guard"),
    ]  # fmt: skip


def test_a_job_array_and_the_merge(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    run = Pass.run
    monkeypatch.setattr(Pass, "run", lambda self, *a, **k: (passes.append(self.shard.index), run(self, *a, **k))[1])
    shards = ["--shards", "2", "--shard-dir", str(tmp_path / "shards")]
    for index in (1, 0):
        assert main([*command, *shards, "--only", str(index)]) == 0
        assert f"Done: fit {index} of 2" in capsys.readouterr().out
    assert main([*command, *shards, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["guard"] == str(tmp_path / "guard")
    assert passes == [1, 0]
    assert OODGuard.from_pretrained(tmp_path / "guard").state.record["rows"] == len(ROWS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "--resume and --only need --shard-dir"),
        (["--only", "1", "--shard-dir", "x"], "--only needs --shards"),
        (["--only", "1", "--shard-dir", "x", "--shards", "2", "--channels", "auto"], "--only and --channels auto"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], message: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--shards=0", "--timeout=0", "--timeout=nan", "--only=-1", "--only=a"])
def test_counts_that_are_none_are_an_error_of_usage(
    option: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, option])
    assert ended.value.code == 2
    assert f"argument {option.partition('=')[0]}: expected a" in capsys.readouterr().err


def test_torchrun(command: list[str], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--log-dir", str(tmp_path)]
    done = subprocess.run(
        [
            *torchrun,
            "-m",
            "rm_ood.distributed",
            *command,
            "--json",
            "--shards",
            "2",
            "--shard-dir",
            str(tmp_path / "shards"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # One of them prints.
    assert json.loads(done.stdout)["guard"] == str(tmp_path / "guard")
    # The same shards in one process: the same batches, so the same numbers in float32 too.
    assert main([*command[:-1], str(tmp_path / "alone"), "--shards", "2"]) == 0
    model = load_reward_model(str(tmp_path / "model"))
    assert_same_fit(*(OODGuard.from_pretrained(tmp_path / name, *model) for name in ("guard", "alone")))


def test_each_process_of_a_machine_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert _local_gpu() == 1
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="process 2 of this machine has no GPU of its own: 2 are here"):
        _local_gpu()
