"""Distances of the same vectors to several Gaussians: one launch where a kernel runs, a few PyTorch calls each elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from rm_ood.errors import InputError
from rm_ood.ops.arithmetic import exact_dtype
from rm_ood.ops.distance import packed_sq_distance, triangle_sq_distance, whitened_sq_distance
from rm_ood.ops.distance_launch import INTERPRETED, unavailable, unsupported
from rm_ood.ops.packing import TOLERANCE, Packed, pack
from rm_ood.ops.streams import capturing, settle
from rm_ood.ops.triangle import Triangle
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
    """The distances of a detector; keeps its whitenings in the form that a kernel, or the CPU, has asked for.

    Args:
        gaussians: on one device, of one width and dtype.
        unit: scale vectors to length 1 first; a row of zeros then scores +inf.
        recorded: `precision` of the same whitenings, whose mode is taken again where it still holds; None lets the
            certificate choose.

    Attributes:
        precision: mode and certificate of the packed form, of this process or recorded; None where there was none.
        whitenings: those of the Gaussians, the very tensors.
    """

    def __init__(
        self, gaussians: Sequence[Gaussian], *, unit: bool = False, recorded: dict[str, Any] | None = None
    ) -> None:
        self.precision = recorded
        self.whitenings = tuple(g.whitening for g in gaussians)
        # Without what a caller may have asked of them: no gradient flows through.
        self._gaussians = [Gaussian(*(t.detach() if t.requires_grad else t for t in g)) for g in gaussians]
        self._unit = unit
        self._is_cpu = all(w.is_cpu for w in self.whitenings) and not INTERPRETED
        self._packed: Packed | None = None
        self._held: list[tuple[Triangle, Tensor, Tensor]] = []

    def distances(self, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`whitened_sq_distance` of x (n, d) under each Gaussian, on their device."""
        on_cpu = self._on_cpu(x)
        if on_cpu is not None:
            return [(sq.T.contiguous(), sq.amin(0), sq.argmin(0)) for sq in on_cpu]
        x = x.to(self._gaussians[0].whitening.device)
        if not self._runs(x):
            rows = unit_rows(x) if self._unit else x
            return [whitened_sq_distance(rows, g.whitening, g.center, g.offsets) for g in self._gaussians]
        factors = None
        if self._unit:
            # In float64, whose range no square leaves.
            factors = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).reciprocal().float()
        sq, lowest, nearest = packed_sq_distance(x, self.packed(), factors=factors)
        classes = [len(g.offsets) for g in self._gaussians]
        return [(sq[i, :, :k].contiguous(), lowest[i], nearest[i]) for i, k in enumerate(classes)]

    def lowest(self, x: Tensor) -> Tensor:
        """The minimum of `distances` under the first Gaussian, (n,)."""
        on_cpu = self._on_cpu(x)
        return self.distances(x)[0][1] if on_cpu is None else on_cpu[0].amin(0)

    def packed(self) -> Packed:
        """The packed form; made on first use, which waits for the device."""
        if self._packed is None:
            packed = self._pack([(g.whitening, g.means) for g in self._gaussians])
            # Other streams score with it as well.
            settle(self._gaussians[0].whitening.device)
            self._packed = packed
            self.precision = {"mode": packed.mode, "certificate": packed.certificate}
        return self._packed

    def prepare(self) -> None:
        """Pack now what a kernel will ask for, so that no call has to wait."""
        # Vectors of a model: whatever their dtype, a kernel takes them.
        if self._gaussians and self._runs(self._gaussians[0].center[None]):
            self.packed()

    def _on_cpu(self, x: Tensor) -> list[Tensor] | None:
        """The distances by PyTorch on a CPU, (k, n) each; None where they are not measured so."""
        # What is traced, or stands for a tensor, leaves nothing behind here: the operator takes it.
        if not self._is_cpu or is_compiling() or type(x) is not Tensor:
            return None
        dtype = self.whitenings[0].dtype
        # A process that lets float32 products be rounded has them in float64, of a W that is not kept.
        if exact_dtype("cpu", dtype) is not dtype:
            return None
        if not self._held:
            self._held = [(Triangle(g.whitening, pack=True), g.center, g.offsets[:, None]) for g in self._gaussians]
        x = x if x.is_cpu else x.cpu()
        rows = unit_rows(x) if self._unit else x
        return [triangle_sq_distance(rows, *held) for held in self._held]

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

    def _runs(self, x: Tensor) -> bool:
        if x.is_cpu and not INTERPRETED:
            return False
        reason = unavailable(x.device)
        if reason is None and self._gaussians[0].whitening.dtype == torch.float64:
            reason = "a float64 detector"
        reason = reason or unsupported(x, max(len(g.offsets) for g in self._gaussians))
        if reason is None and capturing(x.device) and self._packed is None:
            reason = "not packed before a graph was captured: move the detector to the device with `to` first"
        if reason is not None:
            fallbacks.add(reason)
        return reason is None
