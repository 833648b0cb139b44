"""Stand-ins for published reward models outside transformers: same class names, heads, token rules and output keys, over a
tiny Llama. Their weights cannot be had here; their code was read (ArmoRM, QRM, LDL, URM, GRM, INF-ORM, Qwen2.5-Math-RM,
InternLM2, UltraRM, Starling, Beaver, OpenRLHF, OpenAssistant Pythia)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import ModelOutput

WIDTH = 32


def config(pad: int | None, **changes: Any) -> LlamaConfig:
    settings = {
        "vocab_size": 49_152, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": pad,
        "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaConfig(**{**settings, **changes})


class _Base(LlamaPreTrainedModel):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.build(config)
        self.post_init()

    def build(self, config: LlamaConfig) -> None:
        raise TypeError

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


def first_pad(ids: Tensor, pad: int) -> Tensor:
    return (torch.eq(ids, pad).int().argmax(-1) - 1) % ids.shape[-1]


def last_attended(mask: Tensor) -> Tensor:
    return mask.cumsum(dim=1).argmax(dim=1)


def rows(x: Tensor) -> Tensor:
    return torch.arange(len(x))


@dataclass
class GatedOutput(ModelOutput):
    rewards: Tensor | None = None
    hidden_state: Tensor | None = None
    prompt_embedding: Tensor | None = None
    gating_output: Tensor | None = None
    score: Tensor | None = None
    logits: Tensor | None = None
    reward_quantiles: Tensor | None = None
    weights: Tensor | None = None


class Gating(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, 16), nn.Linear(16, out)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.layers[1](torch.relu(self.layers[0](x))), 1)


# SmolLM2's own opening of an assistant turn: <|im_start|>assistant
PATTERN = [1, 520, 9531]


def find_gate(ids: list[int]) -> int:
    for start in range(len(ids) - len(PATTERN), -1, -1):
        if ids[start : start + len(PATTERN)] == PATTERN:
            return start
    raise ValueError("no assistant turn")


class LlamaForRewardModelWithGating(_Base):
    objectives = 19

    def build(self, config: LlamaConfig) -> None:
        self.regression_layer = nn.Linear(WIDTH, self.objectives, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(self.objectives), requires_grad=False)
        self.gating = Gating(WIDTH, self.objectives)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> GatedOutput:
        tokens = self.hidden(input_ids, attention_mask)
        at = first_pad(input_ids, self.config.pad_token_id)
        hidden = tokens[rows(at), at]
        rewards = self.regression_layer(hidden)
        gate = torch.tensor([find_gate(ids.tolist()) for ids in input_ids])
        prompt = tokens[rows(at), gate]
        weights = self.gating(prompt)
        score = (weights * (rewards @ self.reward_transform_matrix)).sum(1)
        return GatedOutput(rewards, hidden, prompt, weights, score, score)


class LlamaForRewardModelWithGating31(_Base):
    objectives, quantiles = 5, 3

    def build(self, config: LlamaConfig) -> None:
        self.regression_layer = nn.Linear(WIDTH, self.objectives * self.quantiles)
        self.gating = Gating(WIDTH, self.objectives)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> GatedOutput:
        tokens = self.hidden(input_ids, attention_mask)
        at = first_pad(input_ids, self.config.pad_token_id)
        quantiles = self.regression_layer(tokens[rows(at), at]).unflatten(1, (self.objectives, self.quantiles))
        gate = torch.tensor([find_gate(ids.tolist()) for ids in input_ids])
        weights = self.gating(tokens[rows(at), gate])
        rewards = quantiles.mean(2)
        score = (rewards * weights).sum(1, keepdim=True)
        return GatedOutput(
            rewards=rewards, reward_quantiles=quantiles, gating_output=weights, score=score, logits=score
        )


class LDLRewardModel27B(_Base):
    def build(self, config: LlamaConfig) -> None:
        self.regression_layer = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 7))
        self.gating_layer = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 7))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> GatedOutput:
        tokens = self.hidden(input_ids, attention_mask)
        at = first_pad(input_ids, self.config.pad_token_id)
        hidden = tokens[rows(at), at]
        rewards, weights = self.regression_layer(hidden), torch.softmax(self.gating_layer(hidden), 1)
        score = (rewards * weights).sum(1)
        return GatedOutput(rewards=rewards, weights=weights, hidden_state=hidden, score=score, logits=score)


class LlamaForSequenceClassificationWithNormal_Weights(_Base):
    def build(self, config: LlamaConfig) -> None:
        self.score = nn.Linear(WIDTH, 10, bias=False)
        self.weights = nn.Sequential(nn.Linear(WIDTH, 16), nn.SELU(), nn.Linear(16, 5))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, return_dict: bool | None = None) -> Any:
        tokens = self.hidden(input_ids, attention_mask)
        columns = torch.arange(input_ids.shape[1])
        at = torch.where(input_ids != self.config.pad_token_id, columns, 0).argmax(-1)
        logits, weights = self.score(tokens)[rows(at), at], self.weights(tokens)[rows(at), at]
        return SequenceClassifierOutputWithPast(logits=logits) if return_dict is not False else (logits, weights)


class ValueHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.summary = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.summary(x)


class GRewardModel(_Base):
    def build(self, config: LlamaConfig) -> None:
        self.v_head = ValueHead()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        value = self.v_head(self.hidden(input_ids, attention_mask)).squeeze(-1)
        left = bool((attention_mask[:, -1].sum() == len(value)).item()) and not bool(attention_mask.all())
        at = torch.full((len(value),), value.shape[1] - 1) if left else last_attended(attention_mask)
        return value[rows(at), at]


class INFORMForSequenceClassification(_Base):
    def build(self, config: LlamaConfig) -> None:
        config.num_labels = 1
        self.score = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        logits = self.score(self.hidden(input_ids, attention_mask))
        at = first_pad(input_ids, self.config.pad_token_id)
        return SequenceClassifierOutputWithPast(logits=logits[rows(at), at])


class Qwen2ForRewardModel(_Base):
    def build(self, config: LlamaConfig) -> None:
        config.num_labels = 1
        self.score = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        logits = self.score(self.hidden(input_ids, attention_mask))
        columns = torch.arange(input_ids.shape[1])
        at = torch.where(input_ids != self.config.pad_token_id, columns, 0).argmax(-1)
        return (logits[rows(at), at],)


class InternLM2ForRewardModel(_Base):
    def build(self, config: LlamaConfig) -> None:
        self.v_head = nn.Linear(WIDTH, 1, bias=False)
        self.reward_token_id = 49_151

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        at = last_attended(attention_mask)
        if not bool((input_ids[rows(at), at] == self.reward_token_id).all()):
            raise ValueError("the last token is not the reward token")
        value = self.v_head(self.hidden(input_ids, attention_mask)).squeeze(-1)
        return SequenceClassifierOutputWithPast(logits=value[rows(at), at][:, None])


class LlamaRewardModel(_Base):
    def build(self, config: LlamaConfig) -> None:
        self.regression_head = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        value = self.regression_head(self.hidden(input_ids, attention_mask)).squeeze(-1)
        return torch.gather(value, 1, last_attended(attention_mask).view(-1, 1))


class GPTRewardModel(nn.Module):
    """No transformers class at all; the backbone is `transformer`, and the pad id is the model's own."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = LlamaModel(config)
        self.v_head = nn.Linear(WIDTH, 1, bias=False)
        self.PAD_ID = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        value = self.v_head(self.transformer(input_ids, attention_mask=attention_mask)[0]).squeeze(-1)
        scores = []
        for row, ids in zip(value, input_ids, strict=True):
            pads = (ids == self.PAD_ID).nonzero()
            scores.append(row[(pads[0].item() if len(pads) else len(ids)) - 1])
        return {"scores": torch.stack(scores)}


class Normalizer(nn.Module):
    def normalize(self, data: Tensor) -> Tensor:
        return (data - 0.5) / 2.0


class LlamaForScore(_Base):
    def build(self, config: LlamaConfig) -> None:
        self.score_head = nn.Linear(WIDTH, 1)
        self.normalizer = Normalizer()
        self.do_normalize = True

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.hidden(input_ids, attention_mask)
        scores = self.score_head(hidden)
        at = last_attended(attention_mask)
        end = scores[rows(at), at]
        if self.do_normalize:
            scores, end = self.normalizer.normalize(scores), self.normalizer.normalize(end)
        return {"scores": scores, "end_scores": end, "last_hidden_state": hidden, "end_index": at}


class GPTNeoXRewardModel(_Base):
    pooling = "last"

    def build(self, config: LlamaConfig) -> None:
        self.out_proj = nn.Linear(WIDTH, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.hidden(input_ids, attention_mask)
        if self.pooling == "mean":
            pooled = (attention_mask[:, :, None] * hidden).sum(1) / attention_mask.sum(1, keepdim=True)
        else:
            at = last_attended(attention_mask)
            pooled = hidden[rows(at), at]
        return SequenceClassifierOutputWithPast(logits=self.out_proj(pooled))


class RewardModel(_Base):
    """OpenRLHF: the head's name is in the configuration; a bare tensor, standardised in eval mode if it is told to."""

    def build(self, config: LlamaConfig) -> None:
        config.value_head_prefix = "value_head"
        self.value_head = nn.Linear(WIDTH, 1, bias=False)
        self.normalize_reward = True
        self.register_buffer("mean", torch.tensor([0.25]), persistent=False)
        self.register_buffer("std", torch.tensor([3.0]), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, return_output: bool = False) -> Any:
        values = getattr(self, self.config.value_head_prefix)(self.hidden(input_ids, attention_mask)).squeeze(-1)
        at = attention_mask.size(1) - 1 - attention_mask.long().fliplr().argmax(dim=1, keepdim=True)
        reward = values.gather(dim=1, index=at).squeeze(1)
        if not self.training and self.normalize_reward:
            reward = (reward - self.mean) / self.std
        return reward


class DebertaV2PairRM(_Base):
    def build(self, config: LlamaConfig) -> None:
        self.pair_head = nn.Linear(WIDTH, 1)


def causal(config: LlamaConfig) -> LlamaForCausalLM:
    """Nemotron-70B-Reward-HF: a language model whose first-step logit of token 0 is the reward."""
    return LlamaForCausalLM(config)
