"""The whitening as a GPU reads it: the triangle alone, in blocks, as sums of half-precision parts with scaled rows.

The layout and the certificate are derived in ops/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from rm_ood.errors import InputError
from rm_ood.ops.arithmetic import without_autocast

# Rows and columns of a block: 64 half-precision columns are the 128 bytes that one bulk copy swizzles.
PANEL, WIDTH = 128, 64


class Mode(NamedTuple):
    """A whitening as a sum of `parts` tensors of `dtype`."""

    dtype: torch.dtype
    parts: int


# Cheapest first. fp16 has 11 bits, fp16x2 22, bf16x3 24 with the range of float32.
MODES = {
    "fp16": Mode(torch.float16, 1),
    "fp16x2": Mode(torch.float16, 2),
    "bf16x3": Mode(torch.bfloat16, 3),
    "fp32": Mode(torch.float32, 1),
}
# Relative change of any squared distance that is taken for the cheaper product: that of float32 arithmetic itself.
TOLERANCE = 1e-5
# Scaled rows of W have their largest entry in [2^11, 2^12), scaled vectors below 2^10: 64 times as far is still finite.
_ROW_EXPONENT, _X_EXPONENT = 12, 10
# Of the certificate: steps of the power iteration, which comes from below, and what is added for that.
_STEPS, _MARGIN = 24, 1.25
_PROBES = 16
# Largest |W mean_c| in whitened standard deviations up to which vectors are multiplied as they come: float32 then loses no
# more than 1e-6 of a distance. Beyond, the kernel takes the centre off first, and splits what is left.
_NEAR = 16.0
# Powers of two that float32 holds with room for the exponents of the rows.
_WITHIN = 100


@dataclass(frozen=True)
class Packed:
    """g whitenings of the same width, for one launch on the same vectors.

    Attributes:
        tiles: (g, parts, rows, 64) in the dtype of the mode; panel p of 128 rows of W is blocks p (p + 1) to
            (p + 1) (p + 2) of 128 rows, one for 64 columns.
        scales: (g, d) float32, powers of two: what a row of the product is multiplied by.
        shifts: (g, k, d) float32, W_g (mean_c - center) of the packed W; a whitening of fewer classes repeats its last one.
        center: (d,) float32 that is taken off the vectors first; None where the means are near enough to 0.
        x_scale: power of two that vectors are multiplied by before they are rounded to parts.
        mode: one of `MODES`.
        certificate: by how much, relatively, any squared distance may differ from that of the whitening given.
        x_rounding: by how much, relatively, the rounding of vectors to parts may change a squared distance of d.
    """

    tiles: Tensor
    scales: Tensor
    shifts: Tensor
    center: Tensor | None
    x_scale: float
    mode: str
    certificate: float
    x_rounding: float

    @property
    def error(self) -> float:
        """Of a squared distance as large as the fit data's: what the rounding of W and of vectors may change, relatively."""
        return self.certificate + self.x_rounding

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return replace(
            self,
            tiles=self.tiles.to(device),
            scales=self.scales.to(device),
            shifts=self.shifts.to(device),
            center=None if self.center is None else self.center.to(device),
        )

    def whitenings(self) -> Tensor:
        """The W's that the packed form holds exactly, (g, d, d) float32 up to its own rounding."""
        return unpack(self.tiles, self.scales, self.x_scale)


def pack(pairs: Sequence[tuple[Tensor, Tensor]], *, mode: str | None = None, tolerance: float = TOLERANCE) -> Packed:
    """Pack whitenings (d, d), lower triangular, each with its class means (k, d), on their own device.

    Args:
        pairs: (whitening, means), of one d.
        mode: one of `MODES`; None takes the cheapest whose certificate and rounding of vectors are together at most
            `tolerance`, for all of them.
        tolerance: relative change of a squared distance.

    Raises:
        InputError: an unknown mode, or one whose range the whitenings exceed.
    """
    if mode is not None and mode not in MODES:
        raise InputError(f"mode={mode!r}: expected one of {', '.join(map(repr, MODES))}")
    with torch.no_grad(), without_autocast(pairs[0][0].device.type):
        return _pack(pairs, mode, tolerance)


def _pack(pairs: Sequence[tuple[Tensor, Tensor]], mode: str | None, tolerance: float) -> Packed:
    wide = [(w.double(), means.double()) for w, means in pairs]
    center = _center(wide)
    if center is not None:
        wide = [(w, means - center.double()) for w, means in wide]
    exponent = _x_exponent(wide)
    tried = []
    for name in MODES if mode is None else (mode,):
        x_scale = 1.0 if name == "fp32" else math.ldexp(1.0, max(-_WITHIN, min(exponent, _WITHIN)))
        made = [_pack_one(w, name, x_scale) for w, _ in wide]
        tiles, scales = torch.stack([t for t, _ in made]), torch.stack([s for _, s in made])
        in_range = bool(tiles.isfinite().all()) and bool((scales.isfinite() & (scales > 0)).all())
        if not in_range or (abs(exponent) > _WITHIN and name != "fp32"):
            tried.append(f"{name}: out of range")
            continue
        stored = unpack(tiles, scales, x_scale, dtype=torch.float64)
        error = max(certificate(own, w) for own, (w, _) in zip(stored, wide, strict=True))
        rounding = max(_x_rounding(w, MODES[name].dtype, x_scale) for w, _ in wide)
        if mode is None and not error + rounding <= tolerance and name != "fp32":
            tried.append(f"{name}: {error + rounding:.1e}")
            continue
        shifts = [means @ own.T for own, (_, means) in zip(stored, wide, strict=True)]
        k = max(len(shift) for shift in shifts)
        padded = torch.stack([torch.cat([s, s[-1:].expand(k - len(s), -1)]) for s in shifts])
        return Packed(tiles, scales, padded.float(), center, x_scale, name, error, rounding)
    raise InputError(f"no packed form of these whitenings: {'; '.join(tried)}")


def unpack(tiles: Tensor, scales: Tensor, x_scale: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whitenings (g, d, d) that tiles and scales stand for, in `dtype`."""
    g, d = scales.shape
    summed = tiles.to(dtype).sum(1)
    panels = -(-d // PANEL)
    whitening = summed.new_zeros(g, panels * PANEL, panels * PANEL)
    for p in range(panels):
        blocks = summed[:, p * (p + 1) * PANEL : (p + 1) * (p + 2) * PANEL].view(g, 2 * (p + 1), PANEL, WIDTH)
        rows = blocks.transpose(1, 2).reshape(g, PANEL, -1)
        whitening[:, p * PANEL : (p + 1) * PANEL, : (p + 1) * PANEL] = rows
    return whitening[:, :d, :d] * (scales.to(dtype) * x_scale)[:, :, None]


def certificate(stored: Tensor, whitening: Tensor) -> float:
    """By how much |stored v|^2 may differ from |whitening v|^2, relatively, over all v.

    The spectral norm of A^T A - I with A = stored whitening^-1, by power iteration in float64, 4 d^2 operations a step.

    Args:
        stored, whitening: (d, d), lower triangular.
    """
    stored, whitening = stored.double(), whitening.double()
    seeded = torch.Generator().manual_seed(0)
    v = torch.randn(len(whitening), 1, generator=seeded, dtype=torch.float64).to(whitening.device)
    norm = v.new_zeros(())
    for _ in range(_STEPS):
        v = v / torch.linalg.vector_norm(v).clamp(min=torch.finfo(torch.float64).tiny)
        turned = stored @ torch.linalg.solve_triangular(whitening, v, upper=False)
        v = torch.linalg.solve_triangular(whitening.T, stored.T @ turned, upper=True) - v
        norm = torch.linalg.vector_norm(v)
    return _MARGIN * float(norm)


def _x_rounding(whitening: Tensor, dtype: torch.dtype, x_scale: float) -> float:
    """Relative change of a squared distance of d where every feature moves by half a step of the dtype's smallest numbers.

    One power of two serves all columns: where one is far larger than the others, those end among the smallest numbers of half
    precision, whose steps do not shrink with them. With |z|^2 = d, z moves by |W e| <= |W|_F e, and |z|^2 by 2 |z| |W e|.
    """
    if dtype != torch.float16:
        return 0.0
    half_step = float(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps) / 2 / x_scale
    return 2 * half_step * float(torch.linalg.matrix_norm(whitening)) / math.sqrt(len(whitening))


def _pack_one(whitening: Tensor, mode: str, x_scale: float) -> tuple[Tensor, Tensor]:
    """Tiles (parts, rows, 64) and scales (d,) of one float64 whitening."""
    dtype, parts = MODES[mode]
    d = len(whitening)
    exponents = torch.zeros(d, dtype=torch.int32, device=whitening.device)
    if mode != "fp32":
        exponents = _ROW_EXPONENT - torch.frexp(whitening.abs().amax(1)).exponent
    rest = torch.ldexp(whitening, exponents[:, None])
    split = []
    for _ in range(parts):
        split.append(rest.to(dtype))
        rest = rest - split[-1].double()
    scales = torch.ldexp(torch.full_like(whitening[0], 1 / x_scale), -exponents).float()
    return _blocks(torch.stack(split)), scales


def _blocks(parts: Tensor) -> Tensor:
    """(p, d, d) as (p, rows, 64): blocks on and below the diagonal."""
    p, d = parts.shape[:2]
    panels = -(-d // PANEL)
    padded = parts.new_zeros(p, panels * PANEL, panels * PANEL)
    padded[:, :d, :d] = parts
    rows = [
        padded[:, i * PANEL : (i + 1) * PANEL, : (i + 1) * PANEL].reshape(p, PANEL, -1, WIDTH).transpose(1, 2)
        for i in range(panels)
    ]
    return torch.cat([row.reshape(p, -1, WIDTH) for row in rows], 1).contiguous()


def _center(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
    """The mean of all class means, where some lie so far off that products with them would cost digits."""
    far = max(float(torch.linalg.vector_norm(means @ w.T, dim=1).max()) / len(w) ** 0.5 for w, means in pairs)
    return torch.cat([means for _, means in pairs]).mean(0).float() if far > _NEAR else None


def _x_exponent(pairs: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Of the power of two that takes the largest typical feature of the fit data to 2^10: the same bits, within range."""
    peak = 0.0
    for whitening, means in pairs:
        seeded = torch.Generator().manual_seed(0)
        probes = torch.randn(len(whitening), _PROBES, generator=seeded, dtype=torch.float64).to(whitening.device)
        # W^-1 is the Cholesky factor of the covariance, so these are draws from the fitted Gaussian.
        spread = torch.linalg.solve_triangular(whitening, probes, upper=False).square().mean(1).sqrt()
        peak = max(peak, float((means.abs().amax(0) + 8 * spread).max()))
    return _X_EXPONENT - math.frexp(peak)[1]
