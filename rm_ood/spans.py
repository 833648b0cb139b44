"""Where prompt and response are among the tokens of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rm_ood.errors import InputError


@dataclass(frozen=True)
class Spans:
    """Where prompt and response are in a batch; None where nobody could tell.

    Attributes:
        prompt_end: (B,) int, column of the last token before the response.
        prompt_mask, response_mask: (B, T) bool.
    """

    prompt_end: Tensor | None
    prompt_mask: Tensor | None
    response_mask: Tensor | None

    def shifted(self, by: int) -> Spans:
        """The spans `by` columns further right, what leaves the row on the right cut off."""

        def move(mask: Tensor | None) -> Tensor | None:
            return None if mask is None else torch.nn.functional.pad(mask, (by, 0))[:, : mask.shape[1]]

        last = None if self.prompt_mask is None else self.prompt_mask.shape[1] - 1
        end = None if self.prompt_end is None else (self.prompt_end + by).clamp(max=last)
        return Spans(end, move(self.prompt_mask), move(self.response_mask))

    def lengths(self) -> NDArray[np.int64] | None:
        """Tokens in the prompt's and the response's span, (B, 2)."""
        if self.prompt_mask is None or self.response_mask is None:
            return None
        return torch.stack([self.prompt_mask.sum(1), self.response_mask.sum(1)], 1).cpu().numpy()


def spans_of_inputs(
    tokenizer: Any,
    inputs: Mapping[str, Any],
    prompt_end: Tensor | None,
    prompt_mask: Tensor | None,
    response_mask: Tensor | None,
) -> Spans:
    """Spans of inputs that came tokenised: what the caller gives, else what ids and segments tell.

    Without masks, every attended token that is not special counts, but position 0.

    Raises:
        InputError: tensors of another shape than the ids, or a column outside them.
    """
    ids = inputs.get("input_ids")
    if ids is None:
        raise InputError("guard(**inputs) needs input_ids, (B, T); inputs_embeds leave the read-out position unknown")
    types = inputs.get("token_type_ids")
    if prompt_end is None and types is not None and bool((types == 1).any(1).all()):
        prompt_end = (types == 1).int().argmax(1) - 1
    for name, mask in (("prompt_mask", prompt_mask), ("response_mask", response_mask)):
        if mask is not None and mask.shape != ids.shape:
            raise InputError(f"{name}: expected shape {tuple(ids.shape)} like input_ids, got {tuple(mask.shape)}")
    prompt_mask, response_mask = (None if m is None else m.bool() for m in (prompt_mask, response_mask))
    if prompt_end is None:
        return Spans(None, prompt_mask, response_mask)
    if prompt_end.shape != ids.shape[:1] or prompt_end.is_floating_point():
        raise InputError(
            f"prompt_end: expected shape ({len(ids)},) of integers, one column per row, got {tuple(prompt_end.shape)} "
            f"{prompt_end.dtype}"
        )
    # An index out of range would end in a device-side assertion, which takes the whole CUDA context with it.
    if bool(((prompt_end < 0) | (prompt_end >= ids.shape[1])).any()):
        raise InputError(f"prompt_end: a column outside 0 to {ids.shape[1] - 1}, the columns of input_ids")
    if prompt_mask is not None and response_mask is not None:
        return Spans(prompt_end, prompt_mask, response_mask)
    attended = inputs.get("attention_mask")
    words = torch.ones_like(ids, dtype=torch.bool) if attended is None else attended.bool()
    columns = torch.arange(ids.shape[1], device=ids.device)
    first = words.int().argmax(1)
    special = torch.tensor(sorted(tokenizer.all_special_ids), device=ids.device)
    words = words & ~torch.isin(ids, special) & (columns != first[:, None])
    in_prompt = columns <= prompt_end.to(ids.device)[:, None]
    return Spans(
        prompt_end,
        words & in_prompt if prompt_mask is None else prompt_mask,
        words & ~in_prompt if response_mask is None else response_mask,
    )
