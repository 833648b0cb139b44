"""Where a saved guard lives: a folder, or a repository of its own on the Hugging Face Hub.

`huggingface_hub.ModelHubMixin` is not used: it deletes and rewrites the folder's `config.json`, and it feeds whatever a
downloaded `config.json` says to the constructor.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from rm_ood.artifact import CONFIG_FILE, GUARD_FILE
from rm_ood.errors import InputError

_OPTIONS = frozenset({"revision", "token", "cache_dir", "local_files_only", "force_download"})


def local_folder(path: str | Path, **options: Any) -> Path:
    """The folder of a saved guard, fetched from the Hub where `path` is no local path.

    Raises:
        FileNotFoundError: neither a folder nor to be had from the Hub.
        InputError: an option that the Hub does not know.
    """
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise InputError(f"from_pretrained: unknown options {unknown}; for a Hub id there are {sorted(_OPTIONS)}")
    text = os.fspath(path)
    if os.path.exists(text) or text.startswith((".", "/", "~")) or text.count("/") != 1:
        return Path(text)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(text, allow_patterns=[GUARD_FILE, CONFIG_FILE], **options))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"no folder {text} here, and no guard of that name could be had from the Hub ({type(error).__name__})"
        ) from error


def upload(guard: Any, repo_id: str, **options: Any) -> str:
    """Save `guard` with its card and upload it; `options` go to `HfApi.upload_folder` (`private` to `create_repo`)."""
    from huggingface_hub import HfApi

    api = HfApi(token=options.pop("token", None))
    api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        guard.save_pretrained(folder)
        Path(folder, "README.md").write_text(guard.report().to_markdown(), encoding="utf-8")
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))
