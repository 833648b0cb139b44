from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from rm_ood import hub
from rm_ood.artifact import CONFIG_FILE, GUARD_FILE


def test_local_paths_never_reach_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        pytest.fail("the Hub was called")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "guard").mkdir(parents=True)
    for path in (tmp_path, "org/guard", "./org/none", "/org/none", "~/none", "none", "a/b/c", tmp_path / "none"):
        assert hub.local_folder(path) == Path(path)


def test_a_hub_id_fetches_the_guards_two_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(repo: str, **options: Any) -> str:
        calls.append((repo, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.local_folder("org/guard", revision="v1", token="t") == tmp_path
    assert calls == [("org/guard", {"allow_patterns": [GUARD_FILE, CONFIG_FILE], "revision": "v1", "token": "t"})]


class Guard:
    """What `upload` needs of a guard."""

    def save_pretrained(self, path: str) -> None:
        Path(path, GUARD_FILE).write_bytes(b"guard")

    def report(self) -> Any:
        return SimpleNamespace(to_markdown=lambda: "# card é")


def test_an_upload_holds_the_guard_and_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            log.append(("token", token))

        def create_repo(self, repo_id: str, **options: Any) -> None:
            log.append(("create", repo_id, options))

        def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> str:
            files = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
            log.append(("upload", repo_id, options, files, folder_path))
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    address = hub.upload(Guard(), "org/guard", token="secret", private=True, commit_message="first")
    assert address == "https://hub/commit"
    assert log[:2] == [("token", "secret"), ("create", "org/guard", {"private": True, "exist_ok": True})]
    _, repo, options, files, folder = log[2]
    assert (repo, options) == ("org/guard", {"commit_message": "first"})
    assert files == {GUARD_FILE: b"guard", "README.md": "# card é".encode()}
    assert not Path(folder).exists()
