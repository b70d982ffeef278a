"""The one error measure of the project, and the bound that tests, tools and benchmarks hold results to.

error(t) = RMS(t - exact) / RMS(exact), with exact in float64. The yardstick is plain PyTorch in the same dtypes.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# A single result may be twice as far from exact as PyTorch's own, plus 2 ulp (a tensor of a few elements can be
# exact by luck); the geometric mean over many results may be MEAN_RATIO of PyTorch's.
WORST_RATIO = 2.0
MEAN_RATIO = 1.1


def rms_error(actual: Tensor, exact: Tensor) -> float:
    """RMS(actual - exact) / RMS(exact) in float64; inf where actual has a NaN or inf that exact has not.

    Raises ValueError where the shapes differ.
    """
    if actual.shape != exact.shape:
        raise ValueError(f"rms_error: actual has shape {tuple(actual.shape)}; expected {tuple(exact.shape)}")
    if actual.numel() == 0:
        return 0.0
    actual, exact = actual.detach().double(), exact.detach().double()
    error, size = (actual - exact).square().mean().sqrt().item(), exact.square().mean().sqrt().item()
    if not math.isfinite(error):
        return math.inf
    return error / size if size else (0.0 if error == 0 else math.inf)


@dataclass(frozen=True)
class Comparison:
    """One tensor: its error, the yardstick's, and whether the first is within the bound."""

    name: str
    error: float
    yardstick: float
    ulp: float

    @property
    def limit(self) -> float:
        """The largest error allowed."""
        return WORST_RATIO * self.yardstick + 2 * self.ulp

    @property
    def ok(self) -> bool:
        """True where the error is within the limit."""
        return self.error <= self.limit

    @property
    def ratio(self) -> float:
        """error / yardstick, with the error of a correctly rounded result (0.15 ulp RMS) as the floor of both."""
        floor = 0.15 * self.ulp
        return max(self.error, floor) / max(self.yardstick, floor)


def compare(
    name: str, actual: Tensor, yardstick: Tensor, exact: Tensor, through: torch.dtype | None = None
) -> Comparison:
    """`actual` against `exact` (float64), with `yardstick` (PyTorch in the same dtypes) as the measure.

    The ulp is that of the coarsest of actual, yardstick and `through`, the dtype of an intermediate result.
    """
    ulp = max(torch.finfo(dtype or actual.dtype).eps for dtype in (actual.dtype, yardstick.dtype, through))
    return Comparison(name, rms_error(actual, exact), rms_error(yardstick, exact), ulp)


def geometric_mean(ratios: list[float]) -> float:
    """The geometric mean of positive numbers."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
