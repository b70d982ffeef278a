"""The numbers: blocks of rows of one stored tensor, merged in place.

A tensor is read as a matrix of rows, which are the layer's output features; where the layer's input features are stored
first (GPT-2's Conv1D), its columns are. Sums and products are float32 (float64 over float64), and each number is
rounded once, to the nearest, ties to even.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dora_kernels.extras.convert.adapter import DoraAdapter
from dora_kernels.files.reading import shown

CACHED = 1 << 20
"""Bytes of float32 that are computed at a time: they stay in the second cache from the product to the rounding."""
# of a row that float32 can sum the squares of
_LEAST, _MOST = 1e-15, 1e18


class LayerMerge:
    """The merge of one tensor, by blocks of its stored rows: `measure` all where `twice`, then `merge` each once.

    W' = gain * (W + scaling * B A), gain = magnitude / norm, 0 where the norm is 0; 1 of a plain LoRA. Of a norm over
    the columns of what is stored, the gain is known when all rows were measured.
    """

    def __init__(self, key: str, adapter: DoraAdapter, dtype: torch.dtype, transposed: bool, finite: bool) -> None:
        """dtype: the stored tensor's. finite: raise ValueError for what is not, or would be rounded to infinity."""
        self.key, self.dtype, self.finite = key, dtype, finite
        self.compute = torch.float64 if dtype == torch.float64 else torch.float32
        lora_A = adapter.lora_A.detach().resolve_neg().to(self.compute).flatten(1)
        lora_B = adapter.lora_B.detach().resolve_neg().to(self.compute).flatten(1)
        self.left, self.right = (lora_A.T.contiguous(), lora_B.T.contiguous()) if transposed else (lora_B, lora_A)
        self.scaling = adapter.scaling
        magnitude = adapter.magnitude
        self.magnitude = None if magnitude is None else magnitude.detach().resolve_neg().to(self.compute)
        self.gain = self.largest = None
        self.twice = False
        if self.magnitude is not None:
            self.twice = (adapter.norm_axis == "in") != transposed
            self.gain = torch.empty_like(self.magnitude)
            # a row is no longer than its magnitude, but for the rounding of float32
            self.largest = (1.001 * self.magnitude.double().abs().max()).to(dtype)
        self.columns = self.right.shape[1]
        # a convolution's input feature has a column for each element of the kernel
        self.each = math.prod(adapter.lora_A.shape[2:])
        self._squares = torch.zeros(self.columns // self.each if self.twice else 0, dtype=torch.float64, device="cpu")
        self._factor = self._squares
        self._rows = max(1, CACHED // (4 * self.columns))

    def measure(self, block: Tensor, first: int) -> None:
        """Add the squares of a block of rows (n, columns), the first of which is row `first` of the tensor."""
        for _, part in self._parts(block, first):
            self._squares += part.double().square_().sum(0).view(-1, self.each).sum(1)
        if first + len(block) == self.left.shape[0]:
            self._factor = self._divide(self._squares.sqrt(), 0, "column").repeat_interleave(self.each)

    def merge(self, block: Tensor, first: int) -> None:
        """Replace a block of rows by the merged ones."""
        for start, part in self._parts(block, first):
            rows = block[start - first : start - first + len(part)]
            if self.magnitude is None:
                rows.copy_(part)
            else:
                factor = self._factor if self.twice else self._divide(_norms(part), start, "row")[:, None]
                torch.mul(part, factor, out=rows)
            if self.finite and (self.largest is None or not self.largest.isfinite()):
                self._check(rows, start)

    def _parts(self, block: Tensor, first: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, W + scaling * B A) of some rows of a block at a time, in the dtype that is computed in."""
        for start in range(0, len(block), self._rows):
            part = block[start : start + self._rows].to(self.compute, copy=True)
            left = self.left[first + start : first + start + len(part)]
            torch.addmm(part, left, self.right, alpha=self.scaling, out=part)
            yield first + start, part

    def _divide(self, norm: Tensor, start: int, what: str) -> Tensor:
        """The gain of these norms, which is kept. Raises ValueError where a norm is not finite."""
        if self.finite and not norm.isfinite().all():
            row = start + int((~norm.isfinite()).nonzero()[0])
            raise ValueError(
                f"merge: {shown(self.key)}: the norm of {what} {row} is {float(norm[row - start])}; expected the base "
                "and the adapter finite, and --allow-nonfinite to merge what is not"
            )
        magnitude = self.magnitude[start : start + len(norm)]  # type: ignore[index]
        zero = norm == 0
        gain = torch.where(zero, 0, magnitude / torch.where(zero, 1, norm)).to(self.compute)
        self.gain[start : start + len(norm)] = gain  # type: ignore[index]
        return gain

    def _check(self, rows: Tensor, start: int) -> None:
        if not torch.linalg.vector_norm(rows, math.inf).isfinite():
            row = start + int((~rows.isfinite().all(1)).nonzero()[0])
            raise ValueError(
                f"merge: {shown(self.key)}: row {row} is not finite in {self.dtype} once it is merged; expected the "
                "base and the adapter finite and in its range, and --allow-nonfinite to merge what is not"
            )


def _norms(part: Tensor) -> Tensor:
    """The norms of the rows, in float64 where squares of float32 would be rounded to few bits or to infinity."""
    norm = torch.linalg.vector_norm(part, dim=1)
    odd = ~((norm > _LEAST) & (norm < _MOST))
    if odd.any():
        norm = norm.double()
        norm[odd] = torch.linalg.vector_norm(part[odd].double(), dim=1)
    return norm


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Inside, float32 products are float32's, on the CPU, whatever the process has chosen for its models."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
