"""What a principal subspace leaves of a vector, alone or as ViM's virtual logit beside the head's."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rm_ood.detectors.learned import Forms, Learned, check_dtype, check_scale, fail_closed
from rm_ood.errors import CalibrationError, FormatError, InputError, MismatchError
from rm_ood.moments import ClassMoments
from rm_ood.ops.arithmetic import exact_dtype, without_autocast
from rm_ood.vectors import as_vectors, check_finite

_CHUNK = 4096


class ResidualSubspace(Learned):
    """Length of what the principal subspace of the fit vectors leaves of a vector; larger is more OOD.

    With the head's `weight` and `bias` it is ViM. The origin is where the head gives 0 (-pinv(weight) bias) instead of
    the mean, and the score is scale * residual - logsumexp(logits). The scale makes the residual one more logit.

    A reward head has one logit, which changes two things. Its logsumexp is the reward itself, so the score is scale *
    residual - reward. And only differences of rewards mean anything, so the mean logit, which ViM takes the scale from,
    is arbitrary and may be negative; here scale = sd(reward) / sd(residual) over the fit data, whatever is added to
    the reward. With two or more logits the scale is ViM's, mean(largest logit) / mean(residual).

    Args:
        n_components: size of the principal subspace, from 1 to d - 1; or the share of variance, in (0, 1), that it
            holds at least; or None for ViM's choice: 1,000 from d = 2,048, 512 from d = 768, else d / 2.
        weight, bias: of the head, (c, d) and (c,); bias is 0 if left out. Both None for the residual alone.
        dtype: float32 or float64 of the stored state and of scoring; the fit is in float64 always.

    Attributes:
        origin_: (d,) float64. residual_: orthonormal basis of what is left, (d - n_components_, d).
        head_weight_, head_bias_: (c, d), (c,); c = 0 without a head. scale_: () float64, 1 without a head.

    Reference:
        Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022.
    """

    _SETTINGS = ("n_components", "weight", "bias", "dtype")
    _TENSORS: ClassVar[Forms] = {
        "residual": ("r d", None),
        "origin": ("d", torch.float64),
        "head_weight": ("*c d", None),
        "head_bias": ("*c", None),
        "scale": ("", torch.float64),
    }

    residual_: Tensor
    origin_: Tensor
    head_weight_: Tensor
    head_bias_: Tensor
    scale_: Tensor

    def __init__(
        self,
        n_components: float | None = None,
        *,
        weight: Any = None,
        bias: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        _check_components(n_components)
        check_dtype(dtype)
        if weight is not None:
            weight = as_vectors(weight, name="weight")
            check_finite(weight, name="weight")
        if bias is not None:
            if weight is None:
                raise InputError("bias: a bias belongs to a weight; pass the head's weight too")
            bias = as_vectors(torch.as_tensor(bias)[None], n_features=len(weight), name="bias")[0]
            check_finite(bias[None], name="bias")
        self.n_components = n_components
        self.weight = weight
        self.bias = bias
        self.dtype = dtype

    @property
    def n_components_(self) -> int:
        """Size of the principal subspace that was used."""
        self._check_fitted()
        return self.residual_.shape[1] - self.residual_.shape[0]

    def fit(self, x: Any, y: Any = None) -> Self:
        """Fit on vectors (n, d); `y` is not read.

        Raises:
            NonFiniteError: NaN or infinity. MismatchError: a weight of another width. InputError: not a dense (n, d).
            CalibrationError: no more rows than components, no feature left for the residual, a head whose logits or
                residuals give no scale, or vectors outside the range of `dtype`.
        """
        x = as_vectors(x)
        d = x.shape[1]
        if self.weight is not None and self.weight.shape[1] != d:
            raise MismatchError(f"weight: expected {d} features as x has, got {self.weight.shape[1]}")
        state = self._subspace(ClassMoments(d, device=x.device).update(x))
        if self.weight is not None:
            state["scale"] = self._scale(x, state)
        return self._take(state)

    @classmethod
    def from_moments(
        cls, moments: ClassMoments, *, n_components: float | None = None, dtype: torch.dtype = torch.float32
    ) -> Self:
        """Fit the residual alone from moments, of all classes together: a head's scale needs the rows. Raises as `fit`."""
        detector = cls(n_components, dtype=dtype)
        return detector._take(detector._subspace(moments.pooled()))

    def score(self, x: Any) -> Tensor:
        """Scores (n,) in `dtype`: the residual's length in the units of x or, with a head, in the units of its logits.

        +inf where a row, or its score, is not finite.

        Raises:
            NotFittedError: before fit. MismatchError: another width. InputError: not a dense real (n, d).
        """
        self._check_fitted()
        x = as_vectors(x, n_features=self.n_features_in_).to(self.residual_.device)
        state = self.state_tensors()
        scores = self.residual_.new_empty(len(x))
        for start in range(0, len(x), _CHUNK):
            length, logits = _project(x[start : start + _CHUNK], state)
            if logits.shape[1]:
                length = self.scale_ * length - logits.logsumexp(1)
            scores[start : start + _CHUNK] = length
        return fail_closed(scores)

    def _subspace(self, moments: ClassMoments) -> dict[str, Tensor]:
        n, d, scatter, mean = moments.n_samples, moments.n_features, moments.within_scatter(), moments.means[0]
        if n == 0:
            raise CalibrationError(f"fit needs vectors, got 0 samples of {d} features")
        if not float(scatter.trace()) > 0:
            raise CalibrationError(f"no variance: all {n} vectors are equal")
        weight = mean.new_zeros(0, d) if self.weight is None else self.weight.to(mean)
        bias = mean.new_zeros(len(weight)) if self.bias is None else self.bias.to(mean)
        origin = mean if self.weight is None else -torch.linalg.pinv(weight) @ bias
        # About the origin, not the mean: by the parallel axes.
        values, vectors = torch.linalg.eigh(scatter + n * torch.outer(mean - origin, mean - origin))
        size = _size(self.n_components, values.flip(0).clamp(min=0))
        if size >= d:
            raise CalibrationError(f"{size} components of {d} features leave no residual; lower n_components")
        if n <= size:
            raise CalibrationError(f"{size} components need more than {size} samples, got {n}; lower n_components")
        check_scale(float(values[-1]) / n, self.dtype)
        head = {"head_weight": weight.to(self.dtype), "head_bias": bias.to(self.dtype)}
        if not all(bool(tensor.isfinite().all()) for tensor in head.values()):
            raise CalibrationError(f"weight: the scale of the head does not fit {self.dtype}; use float64")
        return {
            "residual": vectors[:, : d - size].T.to(self.dtype).contiguous(),
            "origin": origin,
            "scale": origin.new_ones(()),
            **head,
        }

    def _scale(self, x: Tensor, state: dict[str, Tensor]) -> Tensor:
        parts = [_project(x[start : start + _CHUNK], state) for start in range(0, len(x), _CHUNK)]
        length = torch.cat([length for length, _ in parts]).double()
        logits = torch.cat([logits for _, logits in parts]).double()
        single = logits.shape[1] == 1
        scale = logits[:, 0].std() / length.std() if single else logits.amax(1).mean() / length.mean()
        if not (bool(scale.isfinite()) and float(scale) > 0):
            what = "rewards or residuals that do not vary" if single else "largest logits that are negative on average"
            raise CalibrationError(f"x: {what} give the residual no scale beside the head; leave weight and bias out")
        return scale

    def _take(self, state: dict[str, Tensor]) -> Self:
        for name, tensor in state.items():
            setattr(self, f"{name}_", tensor)
        self.n_features_in_ = len(self.origin_)
        return self

    def _check_loaded(self) -> None:
        basis = self.residual_
        if not torch.allclose(basis @ basis.T, torch.eye(len(basis)).to(basis), 1e-3, 1e-3):
            raise FormatError("residual: rows that are not orthonormal")
        if not float(self.scale_) > 0:
            raise FormatError(f"scale: expected a number above 0, got {float(self.scale_)}")


def _project(x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Length of the residual (n,) and logits of the head (n, c)."""
    residual, weight = state["residual"], state["head_weight"]
    with torch.no_grad(), without_autocast(x.device.type):
        exact = exact_dtype(x.device.type, weight.dtype)
        length = torch.linalg.vector_norm((x - state["origin"]).to(exact) @ residual.to(exact).T, dim=1)
        logits = x.to(exact) @ weight.to(exact).T + state["head_bias"]
        return length.to(residual.dtype), logits.to(weight.dtype)


def _check_components(n_components: Any) -> None:
    if n_components is None:
        return
    number = isinstance(n_components, int | float) and not isinstance(n_components, bool)
    if not number or not (n_components >= 1 if isinstance(n_components, int) else 0 < n_components < 1):
        raise InputError(
            f"n_components={n_components!r}: expected a whole number from 1, a share of the variance in (0, 1), or None"
        )


def _size(n_components: float | None, values: Tensor) -> int:
    """Components for eigenvalues (d,) from the largest."""
    d = len(values)
    if n_components is None:
        return 1000 if d >= 2048 else 512 if d >= 768 else max(1, d // 2)
    if isinstance(n_components, int):
        return n_components
    share = values.cumsum(0) / values.sum()
    # A share that needs every component still leaves the least one.
    return max(1, min(int((share < n_components).sum()) + 1, d - 1))
