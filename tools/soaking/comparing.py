"""The criterion: ours may be as far from float64 as stock PEFT is, FACTOR times, plus FLOOR ulps.

    error(ours) <= FACTOR * error(stock) + FLOOR * ulp      in the RMS, and 4 times that in the largest element

of each tensor, over the RMS of the tensor in float64. ulp is that of the coarsest dtype in the operation. Both twins
begin the operation with the same bits (twins.follow), so no rounding of an earlier one is in the difference: in
float32 the limit lies near 1e-6, and a norm of before an optimizer step is 1e-2 or more off.

A model of 15 layers may turn one rounding into many, and stock may be exact by luck. So where ours is beyond that, stock
runs TRIES times more with every number moved by an ulp up or down: error(stock) is then the largest of all. That is
stock's own answer to numbers that its dtype cannot tell apart; a fault of ours cannot raise it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_kernels.testing import Comparison, compare
from soaking.models import normal
from soaking.twins import Records, Twin

FACTOR, FLOOR, TRIES = 3.0, 4.0, 4
LARGEST = 4.0


@dataclass(frozen=True)
class Difference:
    """What differs after an operation."""

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
    """The first tensor that is not as good as stock's. exact() is asked if need be; again() for stock a little moved."""
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
    compared = {name: compare(name, ours[name], stock[name], truth[name]) for name in names}
    names = [name for name in names if not _is_good(compared[name], [compared[name]], ulp)]
    if not names:
        return None
    runs = [again() for _ in range(TRIES)]
    for name in names:
        others = [compared[name], *(compare(name, ours[name], run[name], truth[name]) for run in runs)]
        if not _is_good(compared[name], others, ulp):
            yardstick = max(other.yardstick for other in others)
            detail = f"error {compared[name].error:.3g}, stock's {compared[name].yardstick:.3g} and up to "
            return Difference(name, detail + f"{yardstick:.3g}, ulp {ulp:.1g}")
    return None


def _is_good(ours: Comparison, stock: list[Comparison], ulp: float) -> bool:
    error, largest = max(one.yardstick for one in stock), max(one.max_yardstick for one in stock)
    return ours.error <= FACTOR * error + FLOOR * ulp and ours.max_error <= LARGEST * (FACTOR * largest + FLOOR * ulp)


def moved(twin: Twin, seed: int) -> Twin:
    """A copy of a stock twin with every number of its parameters an ulp up or down."""
    copied = twin.copied()
    for i, parameter in enumerate(copied.model.parameters()):
        step = normal(parameter.shape, seed + i, torch.float64).sign()
        ulp = torch.finfo(parameter.dtype).eps
        parameter.data = (parameter.data.double() * (1 + ulp * step)).to(parameter.dtype)
    return copied
