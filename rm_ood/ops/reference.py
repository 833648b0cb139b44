"""The two operators in a few plain lines: what every fast path is tested against, run in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def class_scatter(x: Tensor, labels: Tensor, pivot: Tensor, n_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per-class counts (k,) int64 and sums (k, d), and the pooled scatter (d, d), of x - pivot."""
    centred = x.to(pivot.dtype) - pivot
    members = torch.nn.functional.one_hot(labels, n_classes)
    return members.sum(0), members.to(pivot.dtype).T @ centred, centred.T @ centred


def whitened_sq_distance(
    x: Tensor, whitening: Tensor, center: Tensor, class_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """|W (x - center) - t_c|^2 as (n, k), its minimum (n,) and the class of the minimum (n,)."""
    z = (x.to(whitening.dtype) - center) @ whitening.T
    sq = (z.unsqueeze(1) - class_offsets).square().sum(2)
    sq = sq.masked_fill(~x.isfinite().all(1, keepdim=True), torch.inf)
    lowest = sq.min(1)
    return sq, lowest.values, lowest.indices
