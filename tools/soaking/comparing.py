"""The criterion: ours may be as far from float64 as stock PEFT is, times a factor, plus FLOOR ulps.

    error(ours) <= FACTOR * error(stock) + FLOOR * ulp       for each tensor
    geometric mean of error(ours) / error(stock) <= MEAN     over all tensors of an operation (no error below an ulp)

error is the RMS over that of the tensor in float64; the largest element may have LARGEST times as much. ulp is that of
the coarsest dtype in the operation. Both twins begin with the same bits (twins.follow), so no rounding of an earlier
operation is in it. In float32 and float64, two thirds of all operations, a limit is 1e-5 or less, and a norm from
before an optimizer step is 1e-2 off. In half precision stock's own gradients are 1e-2 to 1e-1 off, and a single one of
ours was 4 times that by chance (of 57, whose mean was 1): there it is the mean that sees what FACTOR lets pass.

A model of 15 layers may make much of one rounding, and stock may be exact by luck. So where ours is beyond a limit,
stock runs TRIES times more with every number moved by an ulp up or down, and error(stock) is the largest of all: its
own answers to numbers that its dtype cannot tell apart. A fault of ours cannot raise it. Where even this is more than
NO_DIGIT, as for gradients of 1e-7 through a softmax at its end in bfloat16, stock has not a digit right to measure by:
there ours has to be finite alone, and the soak says at its end how many such tensors there were.

In float64 stock is what it is compared with, and seems to make no error: there an ulp is LEAST_ULP, which a gradient
through a gain of 1e-3 can be off (1 + (gain - 1) is rounded at 1), and a norm rounded to float32 3,000 times over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_kernels.testing import Comparison, compare, geometric_mean
from soaking.models import normal
from soaking.twins import Records, Twin

FACTOR, MEAN, FLOOR, TRIES = 8.0, 2.0, 4.0, 4
LARGEST = 4.0
NO_DIGIT = 0.5
LEAST_ULP = 1e-11
not_judged: list[str] = []
"""The names of tensors of which stock has no digit right."""


@dataclass(frozen=True)
class Difference:
    """The first thing that differs after an operation."""

    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.what}: {self.detail}"


def differing(one: dict[str, object], other: dict[str, object]) -> Difference | None:
    """The first entry of two descriptions that differs: ours and stock's."""
    for name in dict.fromkeys([*one, *other]):
        if one.get(name) != other.get(name):
            return Difference(name, f"ours {one.get(name)}, stock {other.get(name)}")
    return None


def unlike(ours: Records, stock: Records, ulp: float) -> list[str]:
    """The names of the tensors that differ by more than FLOOR ulps, which float64 has to judge."""
    names = []
    for name, value in ours.items():
        other = stock[name]
        if value is None or other is None:
            if (value is None) != (other is None):
                names.append(name)
        elif (value.dtype, value.shape) != (other.dtype, other.shape) or not _alike(value, other, ulp):
            names.append(name)
    return names


def _alike(one: Tensor, other: Tensor, ulp: float) -> bool:
    if torch.equal(one, other):
        return True
    comparison = compare("", one, other, other.double())
    return comparison.error <= FLOOR * ulp and comparison.max_error <= LARGEST * FLOOR * ulp


def judged(
    ours: Records, stock: Records, ulp: float, exact: Callable[[], Records], again: Callable[[], Records]
) -> Difference | None:
    """The first tensor that is not as good as stock's. exact() is asked if need be; again(): stock a little moved."""
    if list(ours) != list(stock):
        return Difference("records", f"ours {list(ours)}, stock {list(stock)}")
    names = unlike(ours, stock, ulp)
    for name in names:
        one, other = ours[name], stock[name]
        if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
            shown = [None if tensor is None else (tensor.dtype, tuple(tensor.shape)) for tensor in (one, other)]
            return Difference(name, f"ours is {shown[0]}, stock's {shown[1]}")
    if not names:
        return None
    truth = exact()
    pairs = {
        name: [compare(name, value, stock[name], truth[name])] for name, value in ours.items() if value is not None
    }
    worst = _worst(pairs, ulp)
    if worst is not None:
        for _ in range(TRIES):
            run = again()
            for name, comparisons in pairs.items():
                comparisons.append(compare(name, ours[name], run[name], truth[name]))
        worst = _worst(pairs, ulp)
    not_judged.extend(name for name, stock in pairs.items() if max(one.yardstick for one in stock) > NO_DIGIT)
    return worst


def _worst(pairs: dict[str, list[Comparison]], ulp: float) -> Difference | None:
    """The first error beyond a limit; those of each tensor are ours, and stock's in one run or in several."""
    ratios = []
    for name, comparisons in pairs.items():
        ours = comparisons[0]
        error, largest = max(one.yardstick for one in comparisons), max(one.max_yardstick for one in comparisons)
        if error > NO_DIGIT and (math.isfinite(ours.error) or not math.isfinite(error)):
            continue
        limit, largest_limit = FACTOR * error + FLOOR * ulp, LARGEST * (FACTOR * largest + FLOOR * ulp)
        if not (ours.error <= limit and ours.max_error <= largest_limit):
            detail = f"error {ours.error:.3g}, largest {ours.max_error:.3g}; stock's {error:.3g} and {largest:.3g}"
            return Difference(name, f"{detail}, ulp {ulp:.1g}")
        if ours.error != error:
            ratios.append(max(ours.error, ulp) / max(error, ulp))
    mean = geometric_mean(ratios) if ratios else 1.0
    if mean > MEAN:
        return Difference("all tensors", f"errors are {mean:.3g} times stock's in the mean of {len(ratios)}")
    return None


def moved(twin: Twin, seed: int, ulp: float) -> Twin:
    """A copy of a stock twin with every number of its parameters an ulp up or down.

    ulp: of the dtype that computes. Under autocast float32's own would round to the same bfloat16 again.
    """
    copied = twin.copied()
    for i, parameter in enumerate(copied.model.parameters()):
        step = normal(parameter.shape, seed + i, torch.float64).sign()
        parameter.data = (parameter.data.double() * (1 + ulp * step)).to(parameter.dtype)
    return copied
