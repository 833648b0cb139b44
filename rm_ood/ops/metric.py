"""Distances of the same vectors to several Gaussians: one launch where a kernel runs, a PyTorch call each elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rm_ood.errors import InputError
from rm_ood.ops.distance import packed_sq_distance, whitened_sq_distance
from rm_ood.ops.distance_launch import INTERPRETED, unavailable, unsupported
from rm_ood.ops.packing import TOLERANCE, Packed, pack
from rm_ood.ops.streams import capturing, settle
from rm_ood.vectors import unit_rows

# Why vectors went to PyTorch on a device that has a kernel, or to another mode than the recorded one, in this process.
fallbacks: set[str] = set()


def declined(device: torch.device, reason: str) -> None:
    """Note that vectors go to PyTorch for a reason, if there is a kernel that they do not go to."""
    if (device.type != "cpu" or INTERPRETED) and unavailable(device) is None:
        fallbacks.add(reason)


class Gaussian(NamedTuple):
    """What a distance is measured with: W (d, d), a centre (d,), W (means - centre) (k, d), and the means (k, d)."""

    whitening: Tensor
    center: Tensor
    offsets: Tensor
    means: Tensor


class Metric:
    """The distances of a detector; keeps its whitenings packed once a kernel has asked for them.

    Args:
        recorded: `precision` of the same whitenings, whose mode is taken again where it still holds; None lets the
            certificate choose.

    Attributes:
        precision: mode and certificate of the packed form, of this process or recorded; None where there was none.
    """

    def __init__(self, recorded: dict[str, Any] | None = None) -> None:
        self.precision = recorded
        self._packed: Packed | None = None
        self._of: tuple[Tensor, ...] = ()

    def distances(
        self, x: Tensor, gaussians: Sequence[Gaussian], *, unit: bool = False
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`whitened_sq_distance` of x (n, d) under each Gaussian, on their device.

        Args:
            unit: scale the rows of x to length 1 first; a row of zeros then scores +inf.
        """
        whitening = gaussians[0].whitening
        x = x.to(whitening.device)
        if not self._runs(x, gaussians):
            rows = unit_rows(x) if unit else x
            return [whitened_sq_distance(rows, g.whitening, g.center, g.offsets) for g in gaussians]
        factors = None
        if unit:
            # In float64, whose range no square leaves.
            factors = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).reciprocal().float()
        sq, lowest, nearest = packed_sq_distance(x, self.packed(gaussians), factors=factors)
        return [(sq[i, :, : len(g.offsets)].contiguous(), lowest[i], nearest[i]) for i, g in enumerate(gaussians)]

    def packed(self, gaussians: Sequence[Gaussian]) -> Packed:
        """The packed form of these Gaussians; made on first use, which waits for the device."""
        if self._packed is None or not self._is_of(gaussians):
            packed = self._pack([(g.whitening, g.means) for g in gaussians])
            # Other streams score with it as well.
            settle(gaussians[0].whitening.device)
            self._packed = packed
            self._of = tuple(g.whitening for g in gaussians)
            self.precision = {"mode": packed.mode, "certificate": packed.certificate}
        return self._packed

    def _pack(self, pairs: list[tuple[Tensor, Tensor]]) -> Packed:
        if self.precision is None:
            return pack(pairs)
        mode = self.precision["mode"]
        try:
            packed = pack(pairs, mode=mode)
            if packed.error <= TOLERANCE or mode == "fp32":
                return packed
            reason = f"{packed.error:.1e} off, more than {TOLERANCE:.0e}"
        except InputError as error:
            reason = str(error)
        packed = pack(pairs)
        fallbacks.add(f"recorded mode {mode!r} does not hold these whitenings ({reason}): {packed.mode!r} instead")
        return packed

    def prepare(self, gaussians: Sequence[Gaussian]) -> None:
        """Pack now what a kernel will ask for, so that no call has to wait."""
        # Vectors of a model: whatever their dtype, a kernel takes them.
        if gaussians and self._runs(gaussians[0].center[None], gaussians):
            self.packed(gaussians)

    def _is_of(self, gaussians: Sequence[Gaussian]) -> bool:
        return len(gaussians) == len(self._of) and all(
            g.whitening is w for g, w in zip(gaussians, self._of, strict=True)
        )

    def _runs(self, x: Tensor, gaussians: Sequence[Gaussian]) -> bool:
        if x.device.type == "cpu" and not INTERPRETED:
            return False
        reason = unavailable(x.device)
        if reason is None and gaussians[0].whitening.dtype == torch.float64:
            reason = "a float64 detector"
        reason = reason or unsupported(x, max(len(g.offsets) for g in gaussians))
        if reason is None and capturing(x.device) and not self._is_of(gaussians):
            reason = "not packed before a graph was captured: move the detector to the device with `to` first"
        if reason is not None:
            fallbacks.add(reason)
        return reason is None
