"""From a within-class scatter to a whitening: tied covariance, shrinkage with a floor, Cholesky. All in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rm_ood.errors import CalibrationError, InputError
from rm_ood.ops.linalg import cholesky_, inverse

# Rules that choose the shrinkage from the data.
SHRINKAGES = ("oas", "likelihood")
# Of `blinded`: small beside the 2^53 of a double, large beside anything a distance is read for.
_BLIND = 1e6
# Least trace, and one over the largest, of a matrix whose entries are squared as they are: all that matters is in range.
_LEAST = 1e-100


def oas_shrinkage(scatter: Tensor, n: int) -> float:
    """Oracle approximating shrinkage towards (trace / d) I, from the scatter alone.

    Args:
        scatter: sum of centred outer products, (d, d) float64; its scale does not matter.
        n: rows that went into it.

    Returns:
        The weight of the identity, a fraction in [0, 1]; 0 for one feature.

    Reference:
        Chen et al., "Shrinkage algorithms for MMSE covariance estimation", IEEE Trans. Sign. Proc. 58(10), 2010; equal
        to scikit-learn's `OAS(assume_centered=True)` on the centred rows.
    """
    d = scatter.shape[0]
    if d == 1:
        return 0.0
    rank = effective_rank(scatter)
    if math.isnan(rank):
        return 1.0
    # Their formula by the mean square of the entries when the mean variance is 1.
    alpha = 1.0 / rank
    spread = (n + 1.0) * (alpha - 1.0 / d)
    return 1.0 if spread <= 0 else min((alpha + 1.0) / spread, 1.0)


def likelihood_shrinkage(
    scatter_a: Tensor, n_a: int, scatter_b: Tensor, n_b: int, n_classes: int = 1, *, grid: Sequence[float] | None = None
) -> float:
    """The shrinkage under which each half of the rows is the likeliest, as Gaussian, given the other half's covariance.

    From moments alone: the log-likelihood of a half needs its rows only through their scatter, here about that half's
    own means, so that a shift of the means between the halves does not count. One eigendecomposition a half; the grid
    costs d values a point. Halves must be disjoint, by prompt where rows share prompts. Each covariance is of half of
    the rows, so the weight is a little large for a fit on all of them.

    Args:
        scatter_a, scatter_b: within-class scatter of each half, (d, d) float64, in the same units.
        n_a, n_b: rows in them. n_classes: k, means that were estimated in each half.
        grid: weights to choose from, fractions in (0, 1]; by default 97, evenly spaced in the logarithm from 1e-6 to 1.

    Returns:
        The weight of the identity, one of the grid; the least one on ties.

    Raises:
        CalibrationError: no more rows than classes in a half, no variance in it, or another width in the other.
        InputError: an empty grid, or weights outside (0, 1].

    Reference:
        Friedman, "Regularized Discriminant Analysis", JASA 84(405), 1989, chooses by held-out error; the likelihood in
        its place as Warton, "Penalized normal likelihood and ridge regularization", JASA 103(481), 2008.
    """
    weights = (
        torch.logspace(-6, 0, 97, dtype=torch.float64) if grid is None else torch.tensor(grid, dtype=torch.float64)
    )
    if len(weights) == 0 or not bool(((weights > 0) & (weights <= 1)).all()):
        raise InputError(f"grid={grid}: expected fractions in (0, 1]")
    if scatter_a.shape != scatter_b.shape:
        raise CalibrationError(f"halves of different widths, {scatter_a.shape[0]} and {scatter_b.shape[0]} features")
    # Without shrinkage: as the fit makes it, with the fit's refusals.
    a, b = (shrunk_covariance(s, n, n_classes, 0.0) for s, n in ((scatter_a, n_a), (scatter_b, n_b)))
    weights = weights.sort().values.to(a.device)
    b = b.to(a.device)
    total = (n_b - n_classes) * _likelihoods(a, b, weights) + (n_a - n_classes) * _likelihoods(b, a, weights)
    return float(weights[total.argmax()])


def _likelihoods(covariance: Tensor, heldout: Tensor, weights: Tensor) -> Tensor:
    """Mean log-likelihood, up to a constant, of rows of covariance `heldout` under the other, shrunk by each weight."""
    # In units of the mean variance: squares of very small or large units stay in range.
    unit = covariance.diagonal().mean()
    values, vectors = torch.linalg.eigh(covariance / unit)
    spread = ((heldout / unit) @ vectors).mul_(vectors).sum(0)
    shrunk = (1 - weights[:, None]) * values.clamp(min=0) + weights[:, None]
    likelihoods: Tensor = -(shrunk.log() + spread / shrunk).sum(1) / 2
    return likelihoods


def effective_shrinkage(shrinkage: str | float, floor: float, scatter: Tensor, n: int) -> float:
    """The larger of the shrinkage asked for (`"oas"` or a fraction) and the floor."""
    chosen = oas_shrinkage(scatter, n) if shrinkage == "oas" else float(shrinkage)
    return max(chosen, floor)


def check_shrinkage(shrinkage: str | float, floor: float) -> None:
    """Refuse settings that are not `"oas"`, `"likelihood"` or a fraction.

    Raises:
        InputError: names the setting and what came.
    """
    if isinstance(shrinkage, str) and shrinkage not in SHRINKAGES:
        raise InputError(f"shrinkage={shrinkage!r}: expected 'oas', 'likelihood' or a number in [0, 1]")
    for name, value in (("shrinkage", shrinkage), ("floor", floor)):
        if isinstance(value, str) and name == "shrinkage":
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= float(value) <= 1:
            raise InputError(f"{name}={value!r}: expected a number in [0, 1]")


def shrunk_covariance(
    scatter: Tensor, n: int, n_classes: int, shrinkage: float, *, out: Tensor | None = None
) -> Tensor:
    """(1 - a) S + a (tr S / d) I with S = scatter / (n - k): no eigenvalue is below a tr S / d.

    That bound is why the floor needs no eigendecomposition: shrinkage of at least `floor` is the floor. scikit-learn
    divides by n, without the classes that were estimated.

    Args:
        scatter: within-class scatter, (d, d) float64.
        n: rows in it; n_classes: k, means that were estimated from them.
        shrinkage: a, a fraction in [0, 1].
        out: (d, d) float64 to write to, such as the scatter itself.

    Raises:
        CalibrationError: n <= k leaves no degree of freedom, or no feature varies.
    """
    if n <= n_classes:
        few = "1 sample" if n == 1 else f"{n} samples in {n_classes} classes"
        raise CalibrationError(f"a covariance needs more samples than classes, got {few}; pass more vectors")
    trace = float(scatter.trace())
    if not trace > 0:
        raise CalibrationError(f"no variance: all {n} vectors are equal within their class")
    d = scatter.shape[0]
    covariance = torch.mul(scatter, (1 - shrinkage) / (n - n_classes), out=out)
    covariance.diagonal().add_(shrinkage * trace / (n - n_classes) / d)
    return covariance


def blinded(covariance: Tensor, directions: Tensor) -> Tensor:
    """A covariance under which distances hardly change along some directions: their variance is made a million times larger.

    In the limit the distance is the least over all moves along the directions, which is the distance of the components
    that are left under their own covariance (matrix inversion lemma); here a millionth of the rest is left.

    Args:
        covariance: (d, d) float64, positive definite. directions: (c, d), not zero, of any length.
    """
    w = directions.to(covariance) / torch.linalg.vector_norm(directions.to(covariance), dim=1, keepdim=True)
    variances = ((w @ covariance) * w).sum(1)
    blinded: Tensor = covariance + w.T @ (_BLIND * variances[:, None] * w)
    return blinded


def whitening(covariance: Tensor, *, overwrite: bool = False) -> Tensor:
    """W = L^-1 with covariance = L L^T: lower triangular, positive diagonal, W covariance W^T = I.

    Args:
        covariance: (d, d), symmetric.
        overwrite: use its memory, which must be contiguous, and leave nothing of it.

    Raises:
        CalibrationError: the covariance is singular in float64; shrinkage or a floor above 0 prevents it.
    """
    factor, info = cholesky_(
        covariance if overwrite else covariance.detach().clone(memory_format=torch.contiguous_format)
    )
    if info != 0:
        raise CalibrationError(
            f"the covariance is singular: direction {info} of {len(covariance)} has no variance of its own. "
            "Set floor or shrinkage above 0, or pass more vectors."
        )
    return inverse(factor)


def effective_rank(scatter: Tensor) -> float:
    """(tr S)^2 / tr(S^2): d for a sphere, 1 for a line; the share of d that carries the variance. NaN without variance."""
    trace = float(scatter.trace())
    scaled = scatter if _LEAST < trace < 1 / _LEAST else scatter / trace
    norm = float(torch.linalg.matrix_norm(scaled))
    return (float(scaled.trace()) / norm) ** 2 if norm > 0 else math.nan
