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

COMPUTED = 4 << 20
"""Bytes of a block in float32, if a row has no more: they stay in a cache from the product to the rounding. 4096 x 4096
numbers with R = 16 took 20 ms on two cores; 36 by 512 KB, whose products are slow, and 26 by 16 MB."""
# of a row that float32 can sum the squares of
_LEAST, _MOST = 1e-15, 1e18


class LayerMerge:
    """The merge of one tensor, by blocks of some stored `rows`: `measure` all where `twice`, then `merge` each once.

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
        self._squares = torch.zeros(self.columns // self.each if self.twice else 0, dtype=torch.float64)
        self._factor = self._squares
        self.rows = min(len(self.left), max(1, COMPUTED // (4 * self.columns)))
        # once: memory that is new for each block took more time in the system than the products
        self._memory = torch.empty(self.rows, self.columns, dtype=self.compute)

    def measure(self, block: Tensor, first: int) -> None:
        """Add the squares of a block of rows (n, columns), the first of which is row `first` of the tensor."""
        self._squares += self._direction(block, first).double().square_().sum(0).view(-1, self.each).sum(1)
        if first + len(block) == self.left.shape[0]:
            self._factor = self._divide(self._squares.sqrt(), 0, "column").repeat_interleave(self.each)

    def merge(self, block: Tensor, first: int) -> None:
        """Replace a block of rows by the merged ones."""
        direction = self._direction(block, first)
        if self.magnitude is None:
            block.copy_(direction)
        else:
            factor = self._factor if self.twice else self._divide(_norms(direction), first, "row")[:, None]
            block.copy_(direction.mul_(factor))
        if self.finite and (self.largest is None or not self.largest.isfinite()):
            self._check(block, first)

    def _direction(self, block: Tensor, first: int) -> Tensor:
        """W + scaling * B A of these rows, in the dtype that is computed in."""
        direction = self._memory[: len(block)].copy_(block)
        return direction.addmm_(self.left[first : first + len(block)], self.right, alpha=self.scaling)

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


def _norms(rows: Tensor) -> Tensor:
    """The norms of the rows, in float64 where squares of float32 would be rounded to few bits or to infinity."""
    norm = torch.linalg.vector_norm(rows, dim=1)
    odd = ~((norm > _LEAST) & (norm < _MOST))
    if odd.any():
        norm = norm.double()
        norm[odd] = torch.linalg.vector_norm(rows[odd].double(), dim=1)
    return norm


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Inside, float32 products are float32's, on the CPU, whatever the process has chosen for its models."""
    # not by torch.get_float32_matmul_precision, which raises where somebody has set this one
    matmul = torch.backends.mkldnn.matmul
    precision = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.device("cpu"):
            yield
    finally:
        matmul.fp32_precision = precision
