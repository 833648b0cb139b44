"""Which turn of a dialogue is off: what the head reads at every turn's end, from the one forward pass of the whole."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from rm_ood.channels import FINAL
from rm_ood.embed import Embedder
from rm_ood.errors import CaptureError, InputError
from rm_ood.reward_model import eval_mode, pad_id
from rm_ood.state import FittedState, class_log_odds
from rm_ood.text import Encoded


@dataclass(frozen=True)
class TurnScore:
    """One turn of a dialogue, as the head reads it at the turn's end.

    Attributes:
        turn: number of the message, from 0; the response is the last.
        role: `"user"`, `"assistant"`, ...
        score: squared Mahalanobis distance of `final` to the nearer class; larger = more OOD; NaN where the turn was cut
            away or its end cannot be told.
        ood_score, p_value, is_ood: the score standardised, ranked among the calibration responses and held against alpha;
            None for turns that are no assistant's, which were never calibrated, and for turns without a score.
        class_log_odds: positive = chosen-like; None for a one-class guard.
    """

    turn: int
    role: str
    score: float
    ood_score: float | None
    p_value: float | None
    is_ood: bool | None
    class_log_odds: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values; a score that is no number is None."""
        values = asdict(self)
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in values.items()}


def score_turns(state: FittedState, column: Embedder, encoded: Encoded) -> list[TurnScore]:
    """The turns of one encoded dialogue.

    Raises:
        InputError: text that is no dialogue, or a head that reads one pooled vector per item (encoders).
        CaptureError: the self-check failed.
    """
    if not encoded.turn_ends:
        raise InputError(
            f"turn scores need a chat template: this guard reads text_format={state.config.text_format!r}. Fit it on messages "
            "with text_format='chat'."
        )
    text = column.text(state.config.text_format)
    batch = text.pad([encoded], device=column.device, beside=column.capture.reader.pad_columns)
    ends = [_read_out(encoded, end, column) for end in encoded.turn_ends]
    columns = torch.tensor([[max(end, 0) for end in ends]], device=column.device)
    with eval_mode(column.model, switch=state.config.eval_mode == "switch"), torch.inference_mode():
        captured = column.capture.forward(batch.inputs, batch.spans, columns)[1]
        if bool(captured.mismatch.any()) or captured.turns is None:
            raise CaptureError(
                "read-out self-check failed: the head's output at the read-out position is not the reward"
            )
        distances = state.detectors[FINAL].sq_distances(captured.turns[0]).double().cpu().numpy()
    known = np.array([end >= 0 for end in ends])
    scores = np.where(known, distances.min(1), np.inf)
    lengths = np.array([[0, n] for n in _lengths(encoded)], dtype=np.int64)
    ranking = state.profile((FINAL,)).rank(scores[:, None], (FINAL,), lengths, _groups(state, len(ends)))
    odds = class_log_odds(distances) if distances.shape[1] > 1 else None
    turns = []
    for i, role in enumerate(encoded.turn_roles):
        p = float(ranking.p[i]) if role == "assistant" and known[i] else None
        turns.append(
            TurnScore(
                turn=i,
                role=role,
                score=float(scores[i]) if known[i] else float("nan"),
                ood_score=None if p is None else float(ranking.score[i]),
                p_value=p,
                is_ood=None if p is None else p <= state.config.alpha,
                class_log_odds=float(odds[i]) if odds is not None and known[i] else None,
            )
        )
    return turns


def _groups(state: FittedState, n: int) -> list[str] | None:
    if state.config.groups in (None, "length"):
        return None
    raise InputError(
        f"turn scores: this guard is calibrated by the column {state.config.groups!r}, which turns do not have"
    )


def _read_out(encoded: Encoded, end: int, column: Embedder) -> int:
    """Where the model would read a dialogue that ends at column `end`."""
    if column.capture.rule == "last_token":
        return end
    pad = pad_id(column.model)
    while end > 0 and encoded.input_ids[end] == pad:
        end -= 1
    return end


def _lengths(encoded: Encoded) -> list[int]:
    """Own words of each turn, in tokens: from the end of the turn before."""
    words = [p or r for p, r in zip(encoded.prompt_mask, encoded.response_mask, strict=True)]
    lengths, start = [], 0
    for end in encoded.turn_ends:
        lengths.append(sum(words[start : end + 1]))
        start = max(start, end + 1)
    return lengths
