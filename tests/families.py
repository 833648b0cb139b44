"""Tiny random models of every sequence-classification family in transformers that reward models are built on."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers

VOCABULARY = 49_152
_WIDTH, _HEADS, _DEPTH = 32, 4, 3


@dataclass(frozen=True)
class Family:
    """One architecture and what is known of it.

    Attributes:
        name: the class without `ForSequenceClassification`, and a variant after a dash.
        head: dotted path of the head.
        pooled: the head reads one vector per item, (B, H), not all tokens.
        left: whether the reward survives left padding: `"yes"`, `"with position_ids"`, or why not.
        kind: `"decoder"`, `"encoder"` or `"seq2seq"`.
        config: settings beside the common ones.
    """

    name: str
    head: str = "score"
    pooled: bool = False
    left: str = "yes"
    kind: str = "decoder"
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def class_name(self) -> str:
        return f"{self.name.partition('-')[0]}ForSequenceClassification"

    def build(self, **changes: Any) -> Any:
        """A seeded random model in eval mode; `changes` are settings of its configuration."""
        cls = getattr(transformers, self.class_name)
        torch.manual_seed(0)
        model = cls(self._configuration(cls.config_class, changes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Default initialisation leaves rewards that differ in the fourth digit only.
                if parameter.ndim > 1:
                    parameter.mul_(4.0)
        return model

    def _configuration(self, config_class: Any, changes: dict[str, Any]) -> Any:
        settings = {**(_SEQ2SEQ if self.kind == "seq2seq" else _COMMON), **self.config, **changes}
        if self.name == "Gemma3":
            return config_class(
                text_config={**settings, "query_pre_attn_scalar": 8},
                vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                               "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
                mm_tokens_per_image=1, num_labels=1,
            )  # fmt: skip
        if self.name == "T5Gemma":
            stack = {**_COMMON, **settings, "query_pre_attn_scalar": 8}
            return config_class(encoder=stack, decoder=stack, **{**settings, "pad_token_id": settings["pad_token_id"]})
        # Some configurations have no setter for a common name; None leaves it out.
        return config_class(**{k: v for k, v in settings.items() if v is not None or k == "q_lora_rank"})


_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": _WIDTH, "intermediate_size": 64, "num_hidden_layers": _DEPTH,
    "num_attention_heads": _HEADS, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1,
}  # fmt: skip
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": _WIDTH, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
    "num_labels": 1,
}  # fmt: skip
_GPT2 = {"n_embd": _WIDTH, "n_layer": _DEPTH, "n_head": _HEADS, "n_positions": 256}
_T5 = {"d_kv": 8, "d_ff": 64, "num_layers": _DEPTH, "num_heads": _HEADS}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DEEPSEEK = {
    "num_key_value_heads": _HEADS, "kv_lora_rank": 8, "q_lora_rank": None,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_group": 1, "topk_group": 1, "head_dim": 8,
}  # fmt: skip
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
_ENCODER_PAD = {"pad_token_id": 0, "type_vocab_size": 2}
_CLS = "the vector is read at position 0"
_ABSOLUTE = "with position_ids"
_SHIFTED = "the decoder reads the inputs shifted"


FAMILIES = (
    Family("Llama"),
    Family("Mistral"),
    Family("Mixtral", config={"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("Ministral"),
    Family("Qwen2"),
    Family("Qwen2Moe", config={**_MOE, "shared_expert_intermediate_size": 32}),
    Family("Qwen3"),
    Family("Qwen3Moe", config=_MOE),
    Family("Qwen3Next", config={**_MOE, **_LINEAR, "shared_expert_intermediate_size": 32}),
    Family("Qwen3_5Text", config=_LINEAR),
    Family("Gemma"),
    Family("Gemma2", config={"query_pre_attn_scalar": 8}),
    Family("Gemma3Text", config={"query_pre_attn_scalar": 8}),
    Family("Gemma3", kind="multimodal"),
    Family("Phi", config={"num_key_value_heads": _HEADS}),
    Family("Phi3"),
    Family("Glm"),
    Family("Glm4"),
    Family("GptOss", config={"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("Olmo"),
    Family("Olmo2"),
    Family("Olmo3"),
    Family("SmolLM3"),
    Family("Starcoder2"),
    Family("StableLm", config={"num_key_value_heads": _HEADS}),
    Family("DeepseekV2", config=_DEEPSEEK),
    Family("DeepseekV3", config={**_DEEPSEEK, "q_lora_rank": 8}),
    Family("Nemotron"),
    Family("Jamba", config={"num_experts": 2, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1,
                            "mamba_d_state": 8, "mamba_dt_rank": 4, "expert_layer_period": 2}),
    Family("Exaone4"),
    Family("HunYuanDenseV1"),
    Family("HunYuanMoEV1", config={"num_experts": 2, "moe_topk": 1}),
    Family("SeedOss"),
    Family("Helium"),
    Family("GPTNeoX"),
    Family("GPT2", left=_ABSOLUTE, config=_GPT2),
    Family("GPTJ", config={**_GPT2, "rotary_dim": 8}),
    Family("GPTNeo", left=_ABSOLUTE, config={
        "num_hidden_layers": 2, "num_heads": _HEADS, "attention_types": [[["global", "local"], 1]]}),
    Family("Bloom", config={"n_layer": _DEPTH, "n_head": _HEADS}),
    Family("Falcon", config={"alibi": False, "head_dim": None}),
    Family("Falcon-alibi", config={"alibi": True, "head_dim": None}),
    Family("OPT", config={"ffn_dim": 64, "word_embed_proj_dim": _WIDTH}),
    Family("Mpt", config={"d_model": _WIDTH, "n_layers": _DEPTH, "n_heads": _HEADS, "max_seq_len": 256}),
    Family("GPTBigCode", left=_ABSOLUTE, config=_GPT2),
    Family("BioGpt", left=_ABSOLUTE),
    Family("Zamba", config={"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2, "use_mamba_kernels": False,
                            "n_mamba_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 4,
                            "attention_hidden_size": 64, "attention_head_dim": 16}),
    Family("Zamba2", config={"num_hidden_layers": 4, "hybrid_layer_ids": [1, 3],
                             "layer_types": ["linear_attention", "hybrid"] * 2, "use_mamba_kernels": False,
                             "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "chunk_size": 8,
                             "attention_hidden_size": 64, "attention_head_dim": 16, "num_mem_blocks": 1}),
    Family("ModernBertDecoder", head="classifier", config={"global_attn_every_n_layers": 1, "local_attention": 64}),
    Family("Deberta", head="classifier", pooled=True, left=_CLS, kind="encoder", config=_ENCODER_PAD),
    Family("DebertaV2", head="classifier", pooled=True, left=_CLS, kind="encoder", config=_ENCODER_PAD),
    Family("DebertaV2-relative", head="classifier", pooled=True, left=_CLS, kind="encoder", config={
        **_ENCODER_PAD, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 32,
        "position_biased_input": False, "share_att_key": True, "norm_rel_ebd": "layer_norm"}),
    Family("Bert", head="classifier", pooled=True, left=_CLS, kind="encoder", config=_ENCODER_PAD),
    Family("Roberta", head="classifier.out_proj", pooled=True, left=_CLS, kind="encoder", config={"pad_token_id": 0}),
    Family("XLMRoberta", head="classifier.out_proj", pooled=True, left=_CLS, kind="encoder", config={"pad_token_id": 0}),
    Family("Electra", head="classifier.out_proj", pooled=True, left=_CLS, kind="encoder", config=_ENCODER_PAD),
    Family("ModernBert-cls", head="classifier", pooled=True, left=_CLS, kind="encoder",
           config={"pad_token_id": 0, "classifier_pooling": "cls", "global_attn_every_n_layers": 1, "local_attention": 64}),
    Family("ModernBert-mean", head="classifier", pooled=True, kind="encoder",
           config={"pad_token_id": 0, "classifier_pooling": "mean", "global_attn_every_n_layers": 1, "local_attention": 64}),
    Family("T5", head="classification_head.out_proj", pooled=True, left=_SHIFTED, kind="seq2seq", config=_T5),
    Family("MT5", head="classification_head.out_proj", pooled=True, left=_SHIFTED, kind="seq2seq", config=_T5),
    Family("UMT5", head="classification_head.out_proj", pooled=True, left=_SHIFTED, kind="seq2seq", config=_T5),
    Family("T5Gemma", head="score.out_proj", left=_SHIFTED, kind="seq2seq"),
    Family("Bart", head="classification_head.out_proj", pooled=True, left=_SHIFTED, kind="seq2seq", config={
        "encoder_layers": _DEPTH, "decoder_layers": _DEPTH, "encoder_attention_heads": _HEADS,
        "decoder_attention_heads": _HEADS, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 256}),
)  # fmt: skip


@cache
def tiny(name: str) -> Any:
    """The model of a family; shared, so a test that changes it must copy it."""
    return next(f for f in FAMILIES if f.name == name).build()
