"""Run by tests/test_ways.py: a guard on a model spread over two gloo processes gives the verdicts of the model alone."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def spread(model: Any, kind: str) -> Any:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for block in model.model.layers:
        plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
        parallelize_module(block.mlp, mesh, plan)
    return model


def work(rank: int, kind: str, store: str, words: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    import numpy as np
    from families import FAMILIES
    from test_ways import PROMPTS, RESPONSES, assert_same, fitted
    from transformers import AutoTokenizer

    from rm_ood import CalibrationWarning, OODGuard

    warnings.simplefilter("ignore", CalibrationWarning)
    tokenizer = AutoTokenizer.from_pretrained(words)
    model = next(f for f in FAMILIES if f.name == "Llama").build()
    alone = fitted(copy.deepcopy(model), tokenizer).check(PROMPTS, RESPONSES)
    guard = fitted(spread(model, kind), tokenizer)
    together = guard.check(PROMPTS, RESPONSES)
    assert_same(together, alone)
    assert np.isfinite(together.rewards).all()
    folder = Path(store).with_name(f"guard{rank}")
    guard.save_pretrained(folder)
    OODGuard.from_pretrained(folder, guard.model, tokenizer).detach()
    dist.barrier()
    print("same", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    root = Path(__file__).resolve().parent
    sys.path[:0] = [str(root), str(root.parent), str(root.parent / "benchmarks")]
    mp.spawn(work, args=(sys.argv[1], sys.argv[2], sys.argv[3]), nprocs=2)
