"""`rm-ood serve` as a process: SIGKILL and a restart, SIGHUP with a good and a bad guard, SIGTERM under load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import preference_rows
from serving import Client, wait_until

from rm_ood import OODGuard

ROWS = preference_rows(40, seed=11)


class Process:
    """`rm-ood serve` and the events that it logs."""

    def __init__(self, folder: Path, *more: str) -> None:
        command = [sys.executable, "-m", "rm_ood.cli", "serve", "--guard", "guard", "--model", "model", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--json", *more], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        self.events: list[dict[str, Any]] = []
        self.others: list[str] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("{"):
                self.events.append(json.loads(line))
            else:
                self.others.append(line)

    def find(self, event: str) -> list[dict[str, Any]]:
        return [found for found in self.events if found["event"] == event]

    def client(self) -> Client:
        wait_until(lambda: self.find("listening") or self.process.poll() is not None, 120)
        assert self.find("listening"), self.others
        return Client(int(self.find("listening")[0]["url"].rpartition(":")[2]))

    def end(self, number: int) -> tuple[int, str]:
        self.process.send_signal(number)
        assert self.process.stdout is not None
        out = self.process.stdout.read()
        return self.process.wait(30), out


@contextmanager
def command(folder: Path, *more: str) -> Iterator[Process]:
    served = Process(folder, *more)
    try:
        yield served
    finally:
        served.process.kill()
        served.process.wait()
        served.reader.join()
        for stream in (served.process.stdout, served.process.stderr):
            assert stream is not None
            stream.close()


def items(n: int) -> dict[str, Any]:
    return {"items": [{"prompt": row["prompt"], "response": row["chosen"]} for row in ROWS[:n]]}


def test_a_server_is_killed_restarted_reloaded_and_drained(tmp_path: Path, minilm_guard: OODGuard) -> None:
    minilm_guard.save_pretrained(tmp_path / "guard")
    minilm_guard.model.save_pretrained(tmp_path / "model")
    minilm_guard.tokenizer.save_pretrained(tmp_path / "model")
    state = tmp_path / "monitor.json"
    options = ("--monitor-state", "monitor.json", "--monitor-save", "0.01")

    def saved() -> int:
        return minilm_guard.monitor(state).state.requests if state.exists() else 0

    with command(tmp_path, *options) as served:
        client = served.client()
        assert client.get("/readyz").status == 200
        row = client.post("/v1/score", items(1)).json["results"][0]
        assert row == {"id": "0", **minilm_guard.check(ROWS[0]["prompt"], ROWS[0]["chosen"]).to_dict()}
        for n in (3, 8, 5):
            client.post("/v1/score", items(n))
        wait_until(lambda: saved() > 0)
        threads = [threading.Thread(target=_ask, args=(client, items(8))) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert served.end(signal.SIGKILL)[0] == -signal.SIGKILL
        for thread in threads:
            thread.join()
    before = saved()
    assert before >= 1

    with command(tmp_path, *options) as served:
        client = served.client()
        # It goes on where the saved state was.
        assert client.post("/v1/score", items(1)).json["monitor"]["requests"] == before + 1

        authority = tmp_path / "guard/ood_guard.safetensors"
        good = authority.read_bytes()
        os.kill(served.process.pid, signal.SIGHUP)
        wait_until(lambda: served.find("guard_replaced"), 60)
        assert served.find("guard_replaced")[0]["monitor_goes_on"]
        authority.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        os.kill(served.process.pid, signal.SIGHUP)
        wait_until(lambda: served.find("guard_rolled_back"))
        assert served.find("guard_rolled_back")[0]["error"] == "IntegrityError"
        authority.write_bytes(good)
        assert client.post("/v1/score", items(1)).json["monitor"]["requests"] == before + 2

        answered: list[int] = []
        threads = [threading.Thread(target=_ask_until_refused, args=(client, answered)) for _ in range(6)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(answered) >= 6)
        start = time.monotonic()
        code, out = served.end(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert code == 0
        assert time.monotonic() - start < 10
        # Every request that was accepted got its answer.
        assert set(answered) <= {200, 429}
        logged = [event["status"] for event in served.find("request")]
        assert json.loads(out)["requests"] == len(logged) == len(answered) + 2
        assert served.find("stopped")
    assert saved() >= before + 2
    assert not [line for line in served.others if "Traceback" in line]


def _ask(client: Client, body: dict[str, Any]) -> int | None:
    try:
        return client.post("/v1/score", body).status
    except (OSError, EOFError):
        return None


def _ask_until_refused(client: Client, answered: list[int]) -> None:
    while (status := _ask(client, items(8))) is not None:
        answered.append(status)


def test_a_hangup_while_the_model_is_loaded_is_kept(tmp_path: Path, minilm_guard: OODGuard) -> None:
    minilm_guard.save_pretrained(tmp_path / "guard")
    minilm_guard.model.save_pretrained(tmp_path / "model")
    minilm_guard.tokenizer.save_pretrained(tmp_path / "model")
    os.mkfifo(tmp_path / "key")
    with command(tmp_path, "--api-key-file", "key") as served:
        # It waits for its key, before it loads anything.
        with (tmp_path / "key").open("w") as key:
            os.kill(served.process.pid, signal.SIGHUP)
            key.write("correct-horse-battery-staple")
        served.client()
        wait_until(lambda: served.find("guard_replaced"), 60)
        assert [event["event"] for event in served.events[:2]] == ["listening", "hangup_kept"]
        assert served.end(signal.SIGTERM)[0] == 0


def test_a_port_that_is_taken_and_a_guard_that_is_none_are_told(tmp_path: Path, capsys: Any) -> None:
    from rm_ood.cli import main

    assert main(["serve", "--guard", str(tmp_path), "--model", str(tmp_path), "--host", "0.0.0.0"]) == 1
    assert "set a key" in capsys.readouterr().err
    assert main(["serve", "--guard", str(tmp_path), "--model", str(tmp_path)]) == 1
    assert "ood_guard.safetensors" in capsys.readouterr().err
    assert main(["serve", "--guard", str(tmp_path), "--model", str(tmp_path), "--max-queue", "8"]) == 1
    assert "would never fit" in capsys.readouterr().err
