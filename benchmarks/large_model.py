"""A reward model of the shape of an 8B Llama with random weights, made in place: only its cost is like one's."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

_TEMPLATE = "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s>{% endfor %}"
_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}


def large_reward_model(device: str, **shape: int) -> tuple[Any, Any]:
    """Model in bfloat16 and a tokenizer of words; keywords of `LlamaConfig` give another shape."""
    config = LlamaConfig(
        **{**_8B, "num_key_value_heads": 8, "vocab_size": 128_256, **shape},
        num_labels=1,
        pad_token_id=2,
        bos_token_id=0,
        eos_token_id=1,
        dtype=torch.bfloat16,
    )
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForSequenceClassification(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    words = ["<s>", "</s>", "<pad>", "<unk>", "user", "assistant", ":", "number", "yes", "no", "it", "is", "?"]
    vocabulary = {word: i for i, word in enumerate([*words, *map(str, range(200))])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = _TEMPLATE
    return model, tokenizer
