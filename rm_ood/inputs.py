"""Ready-made model inputs: where prompt and response are in them, and what the reader of their verdicts should know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rm_ood.channels import Channel
from rm_ood.config import GuardConfig
from rm_ood.errors import InputError
from rm_ood.skew import EndsCheck
from rm_ood.spans import Spans, spans_of_inputs

Notes = list[tuple[str, ...]]


def read_inputs(
    config: GuardConfig,
    tokenizer: Any,
    ends: EndsCheck | None,
    inputs: Mapping[str, Any],
    prompt_end: Tensor | None,
    prompt_mask: Tensor | None,
    response_mask: Tensor | None,
) -> tuple[Spans, Notes]:
    """Spans of a batch and reasons for its rows.

    Args:
        config: settings with `text_format` settled.
        ends: the fit items' first and last tokens, where they are known.
        inputs: the model's inputs.
        prompt_end, prompt_mask, response_mask: as in a call of the guard.
    Raises:
        InputError: the spans cannot be told, or the guard takes a prompt-only pass.
    """
    needs_prompt = any(Channel.parse(name).reads_prompt for name in config.joined)
    if config.prompt_pass and needs_prompt:
        raise InputError(
            "this guard judges prompts in a forward of their own (prompt_pass=True), which a batch of ready-made inputs "
            "cannot give: use check(prompt, response)"
        )
    spans = spans_of_inputs(tokenizer, inputs, prompt_end, prompt_mask, response_mask)
    if spans.prompt_end is None and spans.prompt_mask is None and needs_prompt:
        raise InputError(
            "this guard judges prompts: pass prompt_end=, (B,), the column of the last token before each response (encode() "
            "gives it), or fit the guard with channels of the response only"
        )
    ids = inputs["input_ids"]
    masks_given = prompt_mask is not None and response_mask is not None
    note = ("approximate_spans",) if not masks_given and config.text_format == "chat" else ()
    if ends is None:
        return spans, [note] * len(ids)
    return spans, [(*note, *more) for more in ends.inputs(ids, inputs.get("attention_mask"))]
