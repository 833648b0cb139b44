"""How kinds of reward models are read: which module is the head, at which token, and which output is the reward.

Sequence classifiers need no entry here. Everything else is a `RewardReader` under the name of its class; a new kind is a
few lines, ours or the user's (`register_reader`), and the self-check of every batch tells whether they are right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rm_ood.errors import InputError
from rm_ood.wrappers import unwrap

READ_OUTS = ("non_pad", "last_token", "before_pad", "first")


@dataclass(frozen=True)
class RewardReader:
    """How one kind of reward model is read.

    Attributes:
        head: dotted path of the module that the reward is computed from: what enters it is the channel `final`. None takes
            the last Linear with `config.num_labels` outputs. For an MLP head the path chooses: the whole head reads the
            backbone's output, its last Linear what the hidden layers made of it.
        reward: name of the output that is the reward, with `:i` for one of several columns; `"output"` for a bare tensor or
            the first of a tuple; or a function (output, positions (B,)) -> (B,).
        read_out: rule for the token that is read (see `read_out_positions`), or a function (model, inputs) -> (B,) columns.
        agrees: function (model, head's own output at the read-out (B, k), output, rewards (B,)) -> (B,) bool, where the reward
            is more than one column of the head's output; None compares that column with the reward, exactly.
        prompt_head: dotted path of a module that reads the prompt's vector, (B, H): the channel `prompt/prompt_end`.
        head_shift: columns by which the head's tokens stand to the right of the input's (a decoder fed shifted inputs).
        pad_columns: pad columns beside the longest item, for models whose rule looks past an item's end.
        suffix: attribute of the model with the id of a token that ends every item.
        inputs: keyword arguments that the forward needs for its outputs to hold the reward.
    """

    head: str | None = None
    reward: str | Callable[[Any, Tensor], Tensor] = "auto"
    read_out: str | Callable[[Any, Mapping[str, Any]], Tensor] = "non_pad"
    agrees: Callable[[Any, Tensor, Any, Tensor], Tensor] | None = None
    prompt_head: str | None = None
    head_shift: int = 0
    pad_columns: int = 0
    suffix: str | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)


def register_reader(class_name: str, reader: RewardReader) -> None:
    """Read every model of a class (or of one derived from it) in this way; the last registration holds."""
    _READERS[class_name] = reader


def reader_of(model: Any) -> RewardReader:
    """The reader of a model's class; the default one for sequence classifiers and unknown classes.

    Raises:
        InputError: a pairwise ranker or a generative judge, which has no vector of one response.
    """
    inner = unwrap(model)
    names = [cls.__name__ for cls in type(inner).__mro__]
    if pairwise := next((name for name in names if name in _PAIRWISE), None):
        raise InputError(
            f"{pairwise} compares two responses or writes its judgement: no vector belongs to one response, so there is nothing "
            "to guard. Use a reward model that scores one response."
        )
    found = next((_READERS[name] for name in names if name in _READERS), None)
    prefix = getattr(getattr(inner, "config", None), "value_head_prefix", None)
    is_plain = any(name.endswith("ForSequenceClassification") for name in names)
    if found is None and isinstance(prefix, str) and not is_plain:
        return RewardReader(head=prefix, reward="output", read_out="last_token", agrees=_normalised)
    return found or RewardReader()


def repeats(name: str) -> Callable[[Any, Tensor, Any, Tensor], Tensor]:
    """`agrees` for a model that returns its head's own output as `name` and makes the reward of it."""

    def agrees(model: Any, head: Tensor, output: Any, rewards: Tensor) -> Tensor:
        value = output_named(output, name).detach().flatten(1)
        equal = head.flatten(1).to(value) == value
        return (equal | value.isnan()).all(1)

    return agrees


def output_named(output: Any, name: str) -> Tensor:
    """A field of a model's output.

    Args:
        name: a field or key; `"output"` for a bare tensor or the first of a tuple; `"auto"` for the first that there is of
            logits, end_scores, score, scores, rewards, reward, the bare tensor.
    Raises:
        InputError: there is none; the message lists what there is.
    """
    if isinstance(output, Tensor) or (isinstance(output, (tuple, list)) and not hasattr(output, "_fields")):
        if name in ("output", "auto"):
            first = output if isinstance(output, Tensor) else output[0]
            return first if isinstance(first, Tensor) else torch.stack(list(output))
        names = ["output"]
    else:
        fields = dict(output) if isinstance(output, Mapping) else vars(output)
        wanted = _AUTO if name == "auto" else (name,)
        found = next((fields[n] for n in wanted if fields.get(n) is not None), None)
        if found is not None:
            return found if isinstance(found, Tensor) else torch.stack(list(found))
        names = sorted(str(key) for key in fields)
    raise InputError(
        f"reward={name!r}: not among the model's outputs, {names[:20]}. Name the one that holds the reward, for example "
        "reward='end_scores', or 'output' for a bare tensor or the first of a tuple."
    )


_AUTO = ("logits", "end_scores", "score", "scores", "rewards", "reward")
# LLM-Blender's ranker, and T5 rankers such as SteamSHP and SliC-pair, which generate the letter of the better response.
_PAIRWISE = frozenset({"DebertaV2PairRM", "CrossCompareReward", "T5ForConditionalGeneration"})


def _normalised(model: Any, head: Tensor, output: Any, rewards: Tensor) -> Tensor:
    """OpenRLHF: in eval mode the value may be standardised by two numbers of the model."""
    inner = unwrap(model)
    value = head[:, 0]
    if getattr(inner, "normalize_reward", False):
        value = (value - inner.mean) / inner.std
    equal: Tensor = value.to(rewards) == rewards
    return equal


def _beaver(model: Any, head: Tensor, output: Any, rewards: Tensor) -> Tensor:
    """Safe-RLHF: scores may go through the model's own normaliser, element by element."""
    inner = unwrap(model)
    does = getattr(inner, "do_normalize", getattr(inner.config, "do_normalize", False))
    value = inner.normalizer.normalize(head) if does else head
    equal: Tensor = value[:, 0].to(rewards) == rewards
    return equal


def _urm_reward(output: Any, positions: Tensor) -> Tensor:
    """URM: (mean, spread) of every attribute, and the attributes' weights."""
    values, weights = output[0], output[1]
    reward: Tensor = (values.unflatten(1, (-1, 2))[:, :, 0] * weights).sum(1)
    return reward


def _before_own_pad(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    return before_first(inputs["input_ids"], unwrap(model).PAD_ID)


def before_first(ids: Tensor, pad: int) -> Tensor:
    """Column before the first `pad` of each row, the last column where there is none, (B,)."""
    return ((ids == pad).int().argmax(-1) - 1) % ids.shape[-1]


_GATED = RewardReader(
    head="regression_layer",
    reward="score",
    read_out="before_pad",
    agrees=repeats("rewards"),
    prompt_head="gating.layers.0",
)
_QUANTILES = replace(_GATED, agrees=repeats("reward_quantiles"))
_READERS: dict[str, RewardReader] = {
    # transformers: the decoder reads the inputs shifted to the right, and the longest row of a batch would be read a token
    # early without a pad column beside it.
    "T5GemmaForSequenceClassification": RewardReader(head_shift=1, pad_columns=1),
    # ArmoRM, QRM (Llama 3 and 3.1), LDL-Reward, URM: several objectives, weighted.
    "LlamaForRewardModelWithGating": _GATED,
    "LlamaForRewardModelWithGating3": _QUANTILES,
    "LlamaForRewardModelWithGating31": _QUANTILES,
    "LDLRewardModel27B": RewardReader(
        head="regression_layer", reward="score", read_out="before_pad", agrees=repeats("rewards")
    ),
    "LlamaForSequenceClassificationWithNormal_Weights": RewardReader(
        head="score",
        reward=_urm_reward,
        agrees=lambda model, head, output, rewards: (head.to(output[0]) == output[0]).all(1),
        inputs={"return_dict": False},
    ),
    # Value heads on all tokens.
    "GRewardModel": RewardReader(head="v_head.summary", reward="output", read_out="last_token"),
    "LlamaRewardModel": RewardReader(head="regression_head", reward="output", read_out="last_token"),
    "MistralRewardModel": RewardReader(head="regression_head", reward="output", read_out="last_token"),
    "GPTRewardModel": RewardReader(head="v_head", reward="scores", read_out=_before_own_pad),
    "InternLM2ForRewardModel": RewardReader(head="v_head", read_out="last_token", suffix="reward_token_id"),
    "LlamaForScore": RewardReader(head="score_head", reward="end_scores", read_out="last_token", agrees=_beaver),
    "GPTNeoXRewardModel": RewardReader(head="out_proj", read_out="last_token"),
    # MLP heads.
    "INFORMForSequenceClassification": RewardReader(read_out="before_pad"),
    "Qwen2ForRewardModel": RewardReader(),
}
