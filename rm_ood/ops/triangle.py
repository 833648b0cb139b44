"""Products with a triangular matrix in blocks of its rows, without the zeros to the right of them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Up to so many rows of x, and columns, the whole of W at once is fastest; the whole of z, too, up to so many columns.
_WHOLE_ROWS, _WHOLE_COLUMNS = 8, 512
# Rows of a triangle at a time, by the most columns: small where what is left out is the time, large where reading it is.
_BLOCKS = ((512, 128), (math.inf, 256))
# The same where the blocks lie in memory one after another: those are read faster.
_PACKED_BLOCKS = ((512, 96), (2048, 128), (math.inf, 256))
# Of a packed W that lies in memory as a whole, for more than KEPT_ROWS rows of x: they pay for more products.
_FINE_BLOCK = 48
# Rows of x up to which z is made as a whole; a thread keeps the memory of it, and a triangle the views of so many sizes.
KEPT_ROWS, _KEPT_SIZES = 64, 8
# Columns that are left free after each of those rows: a power of two apart, they would share few places of the cache.
_FREE = 16
# Entries of a part of z that is used while it is in the cache.
_PART = 2**19


def block_rows(d: int, *, packed: bool = False) -> int:
    """Rows of a triangle of d columns that are taken at a time, for up to `KEPT_ROWS` rows of x."""
    return next(rows for most, rows in (_PACKED_BLOCKS if packed else _BLOCKS) if d <= most)


class _Part(NamedTuple):
    """Columns of z from one on, and the (columns of x, block of W^T, columns of z) that they are made from."""

    first: int
    z: Tensor
    products: list[tuple[Tensor, Tensor, Tensor]]


class Workspace(NamedTuple):
    """Memory of a product: of x - center (n, d), and of the parts of z, which all have the same."""

    centred: Tensor
    parts: list[_Part]


class _Memory(threading.local):
    """Of a thread, by width and dtype: products follow one another, so all triangles share it."""

    def __init__(self) -> None:
        self.by_kind: dict[tuple[int, torch.dtype], Tensor] = {}


class _Views(threading.local):
    """A triangle's workspaces in a thread's memory, by number of rows."""

    def __init__(self) -> None:
        self.by_rows: dict[int, Workspace] = {}


_memory = _Memory()


class Triangle:
    """Products with W: after one with W itself everything else is out of the cache, so there is little else to a call.

    Args:
        whitening: (d, d), lower triangular, without gradient; of any strides, float32 or float64.
        pack: make a copy that is read faster, of a little more than half of its memory (up to 512 columns, of all of it).
    """

    def __init__(self, whitening: Tensor, *, pack: bool = False) -> None:
        self.dtype = whitening.dtype
        whole = pack and len(whitening) <= _WHOLE_COLUMNS
        self._transposed = whitening.T.contiguous() if whole else whitening.T
        self._by_blocks = pack and not whole
        self._size = block_rows(len(whitening), packed=pack)
        self._many_size = _FINE_BLOCK if whole else self._size
        self._blocks: dict[int, list[Tensor]] = {}
        self._views = _Views()

    def whiten(self, x: Tensor, center: Tensor) -> Tensor:
        """W (x - center) for each of up to `KEPT_ROWS` rows of x (n, d), (n, d); overwritten by the thread's next call.

        Centred in the wider of the two dtypes: a float64 row far from 0 keeps its digits.
        """
        n, d = x.shape
        if n <= _WHOLE_ROWS and d <= _WHOLE_COLUMNS:
            centred = x - center
            return torch.mm(centred if centred.dtype is self.dtype else centred.to(self.dtype), self._transposed)
        ((_, z),) = self.parts(x, center, self._views.by_rows.get(n) or self._kept(n))
        return z

    def parts(self, x: Tensor, center: Tensor, space: Workspace) -> Iterator[tuple[int, Tensor]]:
        """`whiten` of as many rows as the workspace has, in parts: the first column, and the columns from there on (n, w).

        Each is overwritten by the next, which so is in the cache of the core.
        """
        torch.sub(x, center, out=space.centred)
        for first, z, products in space.parts:
            for columns, block, part in products:
                torch.mm(columns, block, out=part)
            yield first, z

    def workspace(self, n: int) -> Workspace:
        """For n rows; in one part where there are few columns, and elsewhere than on a CPU, where each is several launches."""
        new, d = self._transposed.new_empty, len(self._transposed)
        whole = d <= _WHOLE_COLUMNS or not self._transposed.is_cpu
        width = d if whole else max(_PART // max(n, 1) // self._size, 1) * self._size
        # Memory made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            return self._divided(new(n, d), new(n, min(width, d)))

    def _kept(self, n: int) -> Workspace:
        """Of the thread's memory, with one part."""
        d = len(self._transposed)
        kind = (d, self.dtype)
        with torch.inference_mode(False):
            if kind not in _memory.by_kind:
                _memory.by_kind[kind] = self._transposed.new_empty(2, KEPT_ROWS, d + _FREE)[..., :d]
            views = self._views.by_rows
            if len(views) >= _KEPT_SIZES:
                views.clear()
            views[n] = self._divided(*_memory.by_kind[kind][:, :n])
            return views[n]

    def _divided(self, centred: Tensor, z: Tensor) -> Workspace:
        (n, d), width = centred.shape, z.shape[1]
        size = self._size if n <= KEPT_ROWS else self._many_size
        if size not in self._blocks:
            # Rows of W up to `last` have only zeros from column `last` on.
            columns = torch.split(self._transposed, size, 1)
            blocks = [block[: (i + 1) * size] for i, block in enumerate(columns)]
            self._blocks[size] = [block.contiguous() for block in blocks] if self._by_blocks else blocks
        parts = []
        for first in range(0, d, width):
            blocks = self._blocks[size][first // size : -(-(first + width) // size)]
            own = z[:, : d - first]
            pairs = zip(blocks, torch.split(own, size, 1), strict=True)
            parts.append(_Part(first, own, [(centred[:, : len(block)], block, part) for block, part in pairs]))
        return Workspace(centred, parts)
