"""A hundred thousand requests with names of their own: what a client sends makes neither series nor memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from serve_limits import endurance

from rm_ood import OODGuard


@pytest.mark.long
def test_series_and_memory_do_not_grow_with_requests(minilm_guard: OODGuard, tmp_path: Path) -> None:
    minilm_guard.save_pretrained(tmp_path / "guard")
    minilm_guard.model.save_pretrained(tmp_path / "model")
    minilm_guard.tokenizer.save_pretrained(tmp_path / "model")
    found = {row.metric: row.value for row in endurance(tmp_path, 100_000)}
    assert found["count"] <= 200
    # MiB, after the first thousands.
    assert found["growth"] <= 10
