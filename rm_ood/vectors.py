"""The statistics column's front door: a caller's vectors and labels, tensors or arrays, as checked tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rm_ood.errors import InputError, MismatchError, NonFiniteError

# Dtypes of vectors; others are converted or refused.
_FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def as_vectors(x: Any, *, n_features: int | None = None, name: str = "x") -> Tensor:
    """`x` as a dense real floating tensor (n, d), on its own device, without gradient; NaN and infinity pass.

    Integers and booleans become float64; a NumPy array is copied only where PyTorch cannot read it in place.

    Raises:
        InputError: not two-dimensional, no columns, sparse, meta, complex, or not numeric.
        MismatchError: the width is not `n_features`.
    """
    tensor = x if isinstance(x, Tensor) else as_tensor(x, name=name)
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        raise InputError(f"{name}: sparse vectors are not supported, got {tensor.layout}; pass {name}.to_dense()")
    if tensor.is_meta:
        raise InputError(f"{name}: a tensor on the meta device holds no values")
    if tensor.dtype not in _FLOATING:
        if tensor.is_complex() or tensor.is_quantized:
            raise InputError(f"{name}: expected real vectors, got {tensor.dtype}. Complex data not supported")
        if tensor.is_floating_point():
            raise InputError(f"{name}: {tensor.dtype} has too few bits for a distance; pass bfloat16 or wider vectors")
        tensor = tensor.to(torch.float64)
    shape = tensor.shape
    if len(shape) != 2:
        hint = f" Reshape your data: {name}[None] is one vector." if len(shape) == 1 else ""
        raise InputError(f"{name}: expected shape (n, d), got {tuple(shape)}.{hint}")
    if shape[1] == 0:
        raise InputError(f"{name}: 0 features, shape {tuple(shape)}")
    if n_features is not None and shape[1] != n_features:
        raise MismatchError(f"{name}: expected {n_features} features, got {shape[1]}")
    return tensor


def is_finite(x: Tensor) -> bool:
    """Whether a floating tensor holds no NaN or infinity: they pass through the extremes, which take one fast pass."""
    return x.numel() == 0 or bool(torch.stack(torch.aminmax(x)).isfinite().all())


def check_finite(x: Tensor, *, name: str = "x") -> None:
    """Refuse vectors (n, d) with NaN or infinity.

    Raises:
        NonFiniteError: the message has the first row indices and the count.
    """
    if is_finite(x):
        return
    bad = (~x.isfinite().all(1)).nonzero().flatten()
    shown = ", ".join(map(str, bad[:10].tolist())) + (", ..." if len(bad) > 10 else "")
    raise NonFiniteError(
        f"{name}: {len(bad)} of {len(x)} rows hold NaN or infinity (rows {shown}). "
        "float16 activations overflow at 65504: run the model in bfloat16 or float32."
    )


def unit_rows(x: Tensor) -> Tensor:
    """The rows of x (n, d) at Euclidean length 1, float64; NaN where there is no direction: zeros, or not finite."""
    # By the largest entry first: the squares stay in range.
    scaled = x.to(torch.float64) / x.to(torch.float64).abs().amax(1, keepdim=True)
    unit: Tensor = scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return unit


def as_labels(y: Any, n: int) -> tuple[np.ndarray[Any, Any], Tensor]:
    """The distinct labels in `np.unique` order, and the index of each row's label in them, (n,) int64.

    Raises:
        InputError: not one label a row, or labels that cannot be ordered.
    """
    labels = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if labels.shape != (n,):
        raise InputError(f"y: expected one label for each of {n} rows, shape ({n},), got {labels.shape}")
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise InputError(f"y: {int((~np.isfinite(labels)).sum())} labels are NaN or infinite")
    try:
        classes, index = np.unique(labels, return_inverse=True)
    except TypeError as error:
        raise InputError("y: labels of different types cannot be ordered; use strings or integers for all") from error
    return classes, torch.from_numpy(index.astype(np.int64))


def as_tensor(x: Any, *, name: str = "x") -> Tensor:
    """A dense real NumPy array, or what NumPy makes one of, as a tensor that shares its memory where PyTorch can.

    Raises:
        InputError: sparse, ragged, complex, or not numeric.
    """
    if hasattr(x, "toarray") and hasattr(x, "nnz"):
        raise InputError(f"{name}: sparse vectors are not supported; pass {name}.toarray()")
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise InputError(f"{name}: rows of different lengths are no (n, d) array") from error
    if array.dtype.kind == "c":
        raise InputError(f"{name}: expected real vectors, got {array.dtype}. Complex data not supported")
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name}: expected numbers, got dtype {array.dtype} from {type(x).__name__}")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    # PyTorch has neither negative strides nor foreign byte order, and warns about read-only memory.
    native = array.dtype.newbyteorder("=")
    copy = not array.flags.writeable or any(stride < 0 for stride in array.strides) or array.dtype != native
    return torch.from_numpy(array.astype(native) if copy else array)
