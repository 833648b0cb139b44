"""Class-conditional Mahalanobis distance with one tied covariance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from rm_ood import covariance
from rm_ood.errors import CalibrationError, CalibrationWarning, FormatError, InputError, NotFittedError
from rm_ood.moments import ClassMoments
from rm_ood.ops.metric import Gaussian, Metric
from rm_ood.ops.packing import MODES
from rm_ood.vectors import as_labels, as_vectors, is_finite

Shrinkage = Literal["oas", "likelihood"] | float
# Of the draw of the rows of one half.
_SEED = 0
# Rows of W that are taken in float64 at a time.
_OFFSET_ROWS = 64


class MahalanobisDetector:
    """Score = min over classes of (x - mu_c)^T S^-1 (x - mu_c), a squared distance: larger is more OOD.

    The stored whitening, rounded to `dtype`, *is* the metric: the class offsets are made from it, so the score is an
    exact Mahalanobis distance of a metric within rounding of S^-1, the same on every machine that loads it.

    Args:
        shrinkage: weight of the identity in the covariance: `"oas"` (from the data), `"likelihood"` (under which one half
            of the rows is the likeliest given the other, see `rm_ood.covariance`) or a fraction in [0, 1].
        floor: least weight of the identity; no eigenvalue is below floor * trace / d. LayerNorm output lies in a
            hyperplane: without a floor, rounding noise across it would be flagged.
        dtype: float32 or float64 of the stored state and of scoring; the fit is in float64 always.

    Attributes:
        classes_: labels in `np.unique` order. class_counts_: (k,) int64. means_: (k, d) float64, units of x.
        whitening_: W, (d, d) lower triangular. center_: (d,). offsets_: W (means_ - center_), (k, d).
        shrinkage_: weight that was used. n_samples_, n_features_in_: n, d. effective_rank_: of the covariance.
    """

    # Whether vectors are scaled to length 1 first.
    _UNIT: ClassVar[bool] = False

    classes_: np.ndarray[Any, Any]
    class_counts_: Tensor
    means_: Tensor
    whitening_: Tensor
    center_: Tensor
    offsets_: Tensor
    shrinkage_: float
    n_samples_: int
    n_features_in_: int
    effective_rank_: float

    def __init__(
        self, *, shrinkage: Shrinkage = "oas", floor: float = 1e-4, dtype: torch.dtype = torch.float32
    ) -> None:
        covariance.check_shrinkage(shrinkage, floor)
        if dtype not in (torch.float32, torch.float64):
            raise InputError(f"dtype={dtype}: expected torch.float32 or torch.float64; half precision gives negative")
        self.shrinkage = shrinkage
        self.floor = floor
        self.dtype = dtype
        self._metric: Metric | None = None
        # Of a saved detector, or of one on another device before.
        self._precision: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and other processes make their own from the state.
        return {**self.__dict__, "_precision": self.precision, "_metric": None}

    def fit(self, x: Any, y: Any = None) -> Self:
        """Fit on in-distribution vectors; for `"likelihood"`, halves are drawn by row, seeded.

        Args:
            x: (n, d), tensor or array; any real dtype.
            y: n labels of any one type, or None for a single class.

        Raises:
            NonFiniteError: NaN or infinity in x.
            CalibrationError: no rows, one row in every class, or no variance.
            InputError: x or y of the wrong form.

        Warns:
            CalibrationWarning: fewer than 10 rows a feature, constant features, or a class of one row.
        """
        x = as_vectors(x)
        if len(x) == 0:
            raise CalibrationError(f"fit needs vectors, got 0 samples of {x.shape[1]} features")
        if y is None:
            classes, labels = np.arange(1), torch.zeros(len(x), dtype=torch.int64)
        else:
            classes, labels = as_labels(y, len(x))
        moments = ClassMoments(x.shape[1], len(classes), device=x.device)
        if self.shrinkage != "likelihood":
            return self._fit_moments(moments.update(x, labels), classes)
        drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(_SEED))
        half, other = ((x[rows.to(x.device)], labels[rows]) for rows in drawn.tensor_split(2))
        other_half = moments.copy().update(*other)
        return self._fit_moments(moments.update(*half), classes, other_half=other_half)

    @classmethod
    def from_moments(
        cls,
        moments: ClassMoments,
        *,
        shrinkage: Shrinkage = "oas",
        floor: float = 1e-4,
        dtype: torch.dtype = torch.float32,
        other_half: ClassMoments | None = None,
        blind_to: Tensor | None = None,
    ) -> Self:
        """Fit from moments alone; classes are 0 to k - 1. Raises and warns as `fit`, and refuses an empty class.

        Args:
            other_half: moments of further rows, which the fit is on as well; needed for `shrinkage="likelihood"`. Rows that
                belong together, such as the responses to one prompt, should be in one half.
            blind_to: (c, d), directions that the distance is not to see, such as that of the reward.

        Raises:
            InputError: `"likelihood"` without another half.
        """
        detector = cls(shrinkage=shrinkage, floor=floor, dtype=dtype)
        return detector._fit_moments(moments, np.arange(moments.n_classes), other_half=other_half, blind_to=blind_to)

    @classmethod
    def from_state(
        cls,
        tensors: dict[str, Tensor],
        *,
        shrinkage: Shrinkage = "oas",
        floor: float = 1e-4,
        classes: Any = None,
        effective_shrinkage: float = math.nan,
        effective_rank: float = math.nan,
        precision: Any = None,
    ) -> Self:
        """Rebuild a detector from `state_tensors()`; it scores bit-identically.

        Args:
            tensors: exactly the names, shapes and dtypes of `state_tensors()`.
            shrinkage, floor: the settings. classes: labels, 0 to k - 1 by default.
            effective_shrinkage, effective_rank: what the fit reported, for reports only.
            precision: the saved detector's, whose mode a GPU takes again where it holds; None lets the certificate choose.

        Raises:
            FormatError: a malformed precision or an unknown mode; a tensor that is missing, unknown, of another shape or
                dtype, not finite; a whitening that is not lower triangular with a positive diagonal.
        """
        recorded = check_precision(precision)
        detector = cls(shrinkage=shrinkage, floor=floor)._load(tensors, classes, effective_shrinkage, effective_rank)
        detector._precision = recorded
        return detector

    def score(self, x: Any) -> Tensor:
        """Squared distance to the nearest class, (n,) in `dtype`, dimensionless, larger = more OOD.

        A row with NaN or infinity scores +inf; other rows are not affected. 0 rows give an empty result.

        Raises:
            NotFittedError: before fit. MismatchError: another width. InputError: not a dense real (n, d).
        """
        return self._lowest(x)

    def sq_distances(self, x: Any) -> Tensor:
        """Squared distance to every class, (n, k), columns in the order of `classes_`; otherwise as `score`."""
        return self._distances(x)[0]

    def own_sq_distances(self, x: Any) -> Tensor:
        """`sq_distances` as they move with the vectors: of a detector that weighs its distances, those before."""
        return self.sq_distances(x)

    @property
    def precision(self) -> dict[str, Any] | None:
        """Of the distances that a kernel measured: `mode` (see `rm_ood.ops.pack`) and `certificate`, the largest relative
        change of a squared distance; kept by whoever saves and loads it. None where none has."""
        return self._precision if self._metric is None else self._metric.precision

    def clone(self) -> Self:
        """An unfitted detector with the same settings."""
        return type(self)(shrinkage=self.shrinkage, floor=self.floor, dtype=self.dtype)

    def scaled(self, factor: float) -> Self:
        """The detector for vectors that are all `factor` > 0 times as long: the same distances there.

        Raises:
            InputError: a factor that is not finite and positive.
        """
        check_factor(factor)
        state = self.state_tensors()
        moved = {
            "whitening": state["whitening"] / factor,
            "center": state["center"] * factor,
            "means": state["means"] * factor,
        }
        scaled = self.clone()._load({**state, **moved}, self.classes_, self.shrinkage_, self.effective_rank_)
        scaled._precision = self.precision
        return scaled

    def state_tensors(self) -> dict[str, Tensor]:
        """The fitted state: whitening, center, offsets in `dtype`; means float64; class_counts int64."""
        self._check_fitted()
        return {
            "whitening": self.whitening_,
            "center": self.center_,
            "offsets": self.offsets_,
            "means": self.means_,
            "class_counts": self.class_counts_,
        }

    def to(self, device: torch.device | str) -> Self:
        """Move the fitted state, and with it the scoring, to a device; returns itself."""
        for name, tensor in self.state_tensors().items():
            setattr(self, f"{name}_", tensor.to(device))
        self._renew_metric(self.precision).prepare()
        return self

    def _lowest(self, x: Any) -> Tensor:
        return self._ready().lowest(as_vectors(x, n_features=self.n_features_in_))

    def _distances(self, x: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self._measured(x)[0]

    def _measured(self, x: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(distances, their minimum, its class) under each Gaussian of this detector."""
        return self._ready().distances(as_vectors(x, n_features=self.n_features_in_))

    def _ready(self) -> Metric:
        metric = self._metric
        if metric is None:
            self._check_fitted()
            return self._renew_metric(self._precision)
        # One of them was put in anew.
        return metric if self._is_current(metric.whitenings) else self._renew_metric(None)

    def _is_current(self, whitenings: tuple[Tensor, ...]) -> bool:
        return whitenings[0] is self.whitening_

    def _renew_metric(self, precision: dict[str, Any] | None) -> Metric:
        self._metric = Metric(self._gaussians(), unit=self._UNIT, recorded=precision)
        return self._metric

    def _gaussians(self) -> list[Gaussian]:
        return [Gaussian(self.whitening_, self.center_, self.offsets_, self.means_)]

    def _check_fitted(self) -> None:
        if not hasattr(self, "whitening_"):
            raise NotFittedError(f"{type(self).__name__} is not fitted; call fit(x, y) first")

    def _load(
        self, tensors: dict[str, Tensor], classes: Any, effective_shrinkage: float, effective_rank: float
    ) -> Self:
        """Take over a saved state, and its dtype."""
        _check_state(tensors)
        self.dtype = tensors["whitening"].dtype
        for name, tensor in tensors.items():
            setattr(self, f"{name}_", tensor.contiguous())
        k, d = self.means_.shape
        self.classes_ = np.arange(k) if classes is None else np.asarray(classes)
        if self.classes_.shape != (k,):
            raise FormatError(f"classes: expected {k}, got shape {self.classes_.shape}")
        self.n_samples_, self.n_features_in_ = int(self.class_counts_.sum()), d
        self.shrinkage_, self.effective_rank_ = effective_shrinkage, effective_rank
        return self

    def _fit_moments(
        self,
        moments: ClassMoments,
        classes: np.ndarray[Any, Any],
        *,
        other_half: ClassMoments | None = None,
        blind_to: Tensor | None = None,
    ) -> Self:
        half = moments
        if other_half is not None:
            moments = half.copy().merge(other_half)
        counts, n, k, d = moments.counts, moments.n_samples, moments.n_classes, moments.n_features
        if n == 0:
            raise CalibrationError("the moments hold 0 samples; update them before fitting")
        if bool((counts == 0).any()):
            empty = [str(classes[c]) for c in (counts == 0).nonzero().flatten().tolist()]
            raise CalibrationError(f"no samples of class {', '.join(empty)}; fit the classes that are there")
        scatter = moments.within_scatter()
        chosen = self._chosen_shrinkage(half, other_half)
        shrinkage = covariance.effective_shrinkage(chosen, self.floor, scatter, n)
        constant, rank = int((scatter.diagonal() == 0).sum()), covariance.effective_rank(scatter)
        shrunk = covariance.shrunk_covariance(scatter, n, k, shrinkage, out=scatter)
        if blind_to is not None:
            shrunk = covariance.blinded(shrunk, blind_to)
        whitening = covariance.whitening(shrunk, overwrite=True).to(self.dtype)
        means = moments.means
        center = means.mean(0).to(self.dtype)
        offsets = _offsets(means, center, whitening).to(self.dtype)
        in_range = all(is_finite(t) for t in (whitening, center, offsets))
        if not in_range or not bool((whitening.diagonal() > 0).all()):
            raise CalibrationError(f"the scale of the vectors does not fit {self.dtype}; rescale them, or use float64")
        _warn_about(counts, classes, constant, n, d)
        self.classes_, self.class_counts_, self.means_ = classes, counts, means
        self.whitening_, self.center_, self.offsets_ = whitening, center, offsets
        self._metric, self._precision = None, None
        self.shrinkage_, self.effective_rank_ = shrinkage, rank
        self.n_samples_, self.n_features_in_ = n, d
        return self

    def _chosen_shrinkage(self, half: ClassMoments, other_half: ClassMoments | None) -> str | float:
        if self.shrinkage != "likelihood":
            return self.shrinkage
        if other_half is None:
            raise InputError(
                "shrinkage='likelihood' is chosen between two halves of the rows, which moments of all of them are not: pass "
                "the second half's as other_half=, or fit on the vectors"
            )
        return covariance.likelihood_shrinkage(
            half.within_scatter(), half.n_samples, other_half.within_scatter(), other_half.n_samples, half.n_classes
        )


def check_factor(factor: float) -> None:
    """Raises InputError for a factor that is not finite and positive."""
    if not (math.isfinite(factor) and factor > 0):
        raise InputError(f"factor={factor}: expected a finite number above 0")


def _offsets(means: Tensor, center: Tensor, whitening: Tensor) -> Tensor:
    """Class means in whitened space, from the stored, rounded state: so its rounding cancels out of the distance."""
    differences = means - center.double()
    # By rows of W, whose copy in float64 stays in the cache.
    return torch.cat([differences @ rows.double().T for rows in torch.split(whitening, _OFFSET_ROWS)], 1)


def _warn_about(counts: Tensor, classes: np.ndarray[Any, Any], constant: int, n: int, d: int) -> None:
    single = [str(classes[c]) for c in (counts == 1).nonzero().flatten().tolist()]
    messages = []
    if constant:
        messages.append(f"{constant} of {d} features are constant; only the floor gives them a scale")
    if single:
        messages.append(f"class {', '.join(single)} has 1 sample: its mean is that sample")
    if n < 10 * d:
        messages.append(f"{n} samples for {d} features, fewer than 10 each: the covariance rests on shrinkage")
    for message in messages:
        warnings.warn(message, CalibrationWarning, stacklevel=4)


def check_precision(value: Any) -> dict[str, Any] | None:
    """A detector's `precision` as it was saved; raises FormatError for what none can have been."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or value.keys() != {"mode", "certificate"}:
        raise FormatError(f"precision: expected a mode and a certificate, got {value!r}")
    mode, certificate = value["mode"], value["certificate"]
    if not isinstance(mode, str) or mode not in MODES:
        raise FormatError(f"precision: mode={mode!r}: expected one of {', '.join(map(repr, MODES))}")
    if type(certificate) is not float or not 0 <= certificate < math.inf:
        raise FormatError(f"precision: certificate={certificate!r}: expected a finite float from 0")
    return {"mode": mode, "certificate": certificate}


def _check_state(tensors: dict[str, Tensor]) -> None:
    expected = {"whitening", "center", "offsets", "means", "class_counts"}
    if tensors.keys() != expected:
        missing, unknown = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
        raise FormatError(f"detector state: missing {missing}, unknown {unknown}")
    whitening, means = tensors["whitening"], tensors["means"]
    if means.ndim != 2 or 0 in means.shape:
        raise FormatError(f"means: expected shape (k, d), got {tuple(means.shape)}")
    k, d = means.shape
    if whitening.dtype not in (torch.float32, torch.float64):
        raise FormatError(f"whitening: expected float32 or float64, got {whitening.dtype}")
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "whitening": ((d, d), whitening.dtype),
        "center": ((d,), whitening.dtype),
        "offsets": ((k, d), whitening.dtype),
        "means": ((k, d), torch.float64),
        "class_counts": ((k,), torch.int64),
    }
    for name, (shape, dtype) in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise FormatError(
                f"{name}: expected {dtype} of shape {shape}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        if tensor.is_floating_point() and not is_finite(tensor):
            raise FormatError(f"{name}: holds NaN or infinity")
    if bool(whitening.triu(1).any()) or not bool((whitening.diagonal() > 0).all()):
        raise FormatError("whitening: not lower triangular with a positive diagonal")
    if not bool((tensors["class_counts"] > 0).all()):
        raise FormatError("class_counts: not all positive")
    # Looser than the fit's own rounding, tighter than any other guard's offsets.
    if not torch.allclose(tensors["offsets"].double(), _offsets(means, tensors["center"], whitening), 1e-4, 1e-4):
        raise FormatError("offsets: not those of the means, center and whitening")
