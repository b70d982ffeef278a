"""The one error measure of the project, and the bound that tests, tools and benchmarks hold results to.

error(t) = RMS(t - exact) / RMS(exact), with exact in float64. The yardstick is plain PyTorch in the same dtypes.
max_error(t) = max |t - exact| / RMS(exact) beside it, for the single element that an RMS does not see.
"""

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from dora_kernels.functional.arguments import check_floats, check_items, check_number, check_type, described

# A single result may be twice as far from exact as PyTorch's own, plus 2 ulp (a tensor of a few elements can be
# exact by luck); the geometric mean over many results may be MEAN_RATIO of PyTorch's.
WORST_RATIO = 2.0
MEAN_RATIO = 1.1
# The RMS of a million elements does not see a single one that is wrong; the largest error does. It is the tail of a
# distribution, so it gets more room: in 1,500 random layers of up to 80 x 80 in four precisions a correct result stayed
# below 2.6, except for layers with one input feature or one output.
WORST_MAX_RATIO = 8.0


def rms_error(actual: Tensor, exact: Tensor) -> float:
    """RMS(actual - exact) / RMS(exact) in float64; inf if actual has a NaN or inf that exact does not have.

    Raises ValueError unless both are tensors of floating-point numbers, of one shape and on one device.
    """
    _check_like("rms_error", exact, actual=actual)
    return _errors(actual, exact)[0]


def _check_like(function: str, exact: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError unless all are dense tensors of floating-point numbers, with exact's shape and device."""
    for name, tensor in {"exact": exact, **tensors}.items():
        check_floats(function, name, tensor)
        if tensor.shape != exact.shape:
            shapes = f"{tuple(tensor.shape)} but exact has {tuple(exact.shape)}"
            raise ValueError(f"{function}: {name} has shape {shapes}; expected one shape")
        if tensor.device != exact.device:
            raise ValueError(f"{function}: {name} is on {tensor.device} but exact is on {exact.device}; expected one")


def _errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """The RMS and the largest element of actual - exact, both over RMS(exact)."""
    if actual.numel() == 0:
        return 0.0, 0.0
    actual, exact = actual.detach().double(), exact.detach().double()
    difference, size = actual - exact, exact.square().mean().sqrt().item()
    errors = difference.square().mean().sqrt().item(), difference.abs().max().item()
    if not math.isfinite(errors[0]):
        return math.inf, math.inf
    return tuple(error / size if size else (0.0 if error == 0 else math.inf) for error in errors)


@dataclass(frozen=True)
class Comparison:
    """The errors of one tensor and of its yardstick, and the bound on the first by the second."""

    name: str
    error: float
    yardstick: float
    ulp: float
    max_error: float = 0.0
    max_yardstick: float = 0.0

    @property
    def limit(self) -> float:
        """The largest RMS error allowed."""
        return WORST_RATIO * self.yardstick + 2 * self.ulp

    @property
    def max_limit(self) -> float:
        """The largest error of one element allowed."""
        return WORST_MAX_RATIO * (self.max_yardstick + 2 * self.ulp)

    @property
    def ok(self) -> bool:
        """True if both errors are within their limits."""
        return self.error <= self.limit and self.max_error <= self.max_limit

    @property
    def ratio(self) -> float:
        """error / yardstick, with the error of a correctly rounded result (0.15 ulp RMS) as the floor of both."""
        floor = 0.15 * self.ulp
        return max(self.error, floor) / max(self.yardstick, floor)


def compare(
    name: str, actual: Tensor, yardstick: Tensor, exact: Tensor, through: torch.dtype | None = None
) -> Comparison:
    """The errors of `actual` and of `yardstick` (PyTorch in the same dtypes) against `exact` (float64).

    The ulp is that of the coarsest of actual, yardstick and `through`, the dtype of an intermediate result. Raises
    ValueError as rms_error, and unless name is a str and through a floating-point dtype.
    """
    check_type("compare", "name", name, str, "a str")
    _check_like("compare", exact, actual=actual, yardstick=yardstick)
    if through is not None and not (isinstance(through, torch.dtype) and through.is_floating_point):
        raise ValueError(f"compare: through is {described(through)}; expected a floating-point dtype, or None")
    ulp = max(torch.finfo(dtype or actual.dtype).eps for dtype in (actual.dtype, yardstick.dtype, through))
    (error, max_error), (measure, max_measure) = _errors(actual, exact), _errors(yardstick, exact)
    return Comparison(name, error, measure, ulp, max_error, max_measure)


def geometric_mean(ratios: list[float]) -> float:
    """The geometric mean of positive numbers. Raises ValueError where there is none, or one that is not positive."""
    check_items("geometric_mean", "ratios", ratios, Real, "a positive number")
    if not ratios or not all(0 < check_number("geometric_mean", "ratios", ratio) for ratio in ratios):
        raise ValueError(f"geometric_mean: ratios is {described(ratios)}; expected positive numbers, at least one")
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
