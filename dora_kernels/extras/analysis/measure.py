"""The change of a fine-tuned weight in magnitude and in direction (DoRA, arXiv 2402.09353, section 3.2).

For the rows w of a weight (N, K) and the rows v of the tuned one:

    delta M = mean | |v| - |w| |        delta D = mean 1 - cos(v, w)

The paper has a number per column, because it writes the weight as (in, out). A row of zeros has no direction: where w
or v is one, the row counts in delta M and not in delta D.

Everything is float64, and no small number is the difference of two large ones. With d = v - w,

    |v| - |w| = (2 w.d + |d|^2) / (|v| + |w|)
    1 - cos(v, w) = (|w|^2 |d|^2 - (w.d)^2) / (|w| |v| (|w| |v| + w.v))    where w.v >= 0

A change of 1e-8 of the weight, whose 1 - cos is below float64's resolution of a cosine, keeps its digits so. For an
adapter nothing dense is made: d = scaling * lora_B @ lora_A is known by its products with the weight's rows.

Letters: N out features, K in features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_kernels.functional.arguments import check_floats, check_number
from dora_kernels.quant import QuantizedWeight, Weight

_BLOCK_BYTES = 32 << 20
"""The size of the rows of a weight, in float64, that are read at once."""

CANCELLED = 1e-13
"""If |v|^2 is at most this times |w|^2 + |d|^2, w and d have cancelled but for rounding: v is a row of zeros."""


@dataclass(frozen=True)
class Change:
    """delta M and delta D of one weight; delta_direction is None where no row has a direction before and after."""

    delta_magnitude: float
    delta_direction: float | None


@torch.no_grad()
def adapter_change(
    weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor | None = None
) -> Change:
    """The change that an adapter makes: LoRA's without a magnitude, DoRA's with one.

    weight (N, K), dense or quantized, lora_A (R, K), lora_B (N, R), magnitude (N,). The tuned row is
    v = w + d, d = scaling * lora_B @ lora_A, and with a magnitude v * magnitude / |v|: its norm is |magnitude|, or 0
    where v is a row of zeros, and a negative magnitude turns it round.

    Raises ValueError where shapes do not fit or a value is not finite.
    """
    N, K = _matrix("adapter_change", "weight", weight)
    check_floats("adapter_change", "lora_A", lora_A)
    R = lora_A.shape[0] if lora_A.dim() else 0
    scaling = check_number("adapter_change", "scaling", scaling)
    expected = {"lora_A": (lora_A, (R, K)), "lora_B": (lora_B, (N, R))}
    if magnitude is not None:
        expected["magnitude"] = (magnitude, (N,))
    for name, (tensor, shape) in expected.items():
        check_floats("adapter_change", name, tensor)
        _check_weight("adapter_change", name, tensor, weight.device)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"adapter_change: {name} has shape {tuple(tensor.shape)} but weight has {(N, K)} and lora_A "
                f"{tuple(lora_A.shape)}; expected {shape}"
            )
    # In an orthonormal basis of the rows of lora_A, d has the coordinates scaling * lora_B triangle^T and its length.
    basis, triangle = torch.linalg.qr(lora_A.double().T)
    d = scaling * (lora_B.double() @ triangle.T)
    ww, wd = lora_A.new_empty(2, N, dtype=torch.float64)
    for rows in _row_blocks(N, K):
        w = weight[rows].double()
        ww[rows] = w.square().sum(1)
        wd[rows] = ((w @ basis) * d[rows]).sum(1)
    dd = d.square().sum(1)
    grown = 2 * wd + dd
    vv = torch.where(ww + grown <= CANCELLED * (ww + dd), 0, ww + grown)
    wv, across = ww + wd, (ww * dd - wd.square()).clamp(min=0)
    if magnitude is None:
        return _change("adapter_change", _grown_norms(ww, vv, grown), _turned(ww, vv, wv, across))
    magnitude = torch.where(vv == 0, 0, magnitude.double())
    wv, vv = wv * magnitude.sign(), torch.where(magnitude == 0, 0, vv)
    return _change("adapter_change", magnitude.abs() - ww.sqrt(), _turned(ww, vv, wv, across))


@torch.no_grad()
def weight_change(weight: Weight, tuned: Weight) -> Change:
    """The change from weight (N, K) to tuned (N, K), each dense or quantized.

    Raises ValueError where shapes do not fit or a value is not finite.
    """
    N, K = _matrix("weight_change", "weight", weight)
    _check_weight("weight_change", "tuned", tuned, weight.device)
    if tuple(tuned.shape) != (N, K):
        raise ValueError(f"weight_change: tuned has shape {tuple(tuned.shape)}; expected weight's {(N, K)}")
    grown, turned = [], []
    for rows in _row_blocks(N, K):
        w, v = weight[rows].double(), tuned[rows].double()
        d = v - w
        ww, vv = w.square().sum(1), v.square().sum(1)
        along = (w * d).sum(1) / torch.where(ww == 0, 1, ww)
        across = ww * (d - along[:, None] * w).square().sum(1)
        grown.append(_grown_norms(ww, vv, (d * (v + w)).sum(1)))
        turned.append(_turned(ww, vv, (w * v).sum(1), across))
    return _change("weight_change", torch.cat(grown), torch.cat(turned))


def _matrix(function: str, name: str, weight: Weight) -> tuple[int, int]:
    """The shape (N, K) of a weight of floating-point numbers."""
    _check_weight(function, name, weight)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{function}: {name} has shape {tuple(weight.shape)}; expected (N, K)")
    return tuple(weight.shape)


def _check_weight(function: str, name: str, value: Weight, device: torch.device | None = None) -> None:
    """Raise ValueError unless `value` is dense floating point or a QuantizedWeight, on `device`."""
    if not isinstance(value, QuantizedWeight):
        check_floats(function, name, value)
    if value.device.type == "meta" or device not in (None, value.device):
        raise ValueError(f"{function}: {name} is on {value.device}; expected {device or 'numbers'}")


def _row_blocks(N: int, K: int) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // (8 * K))
    return (slice(first, min(first + step, N)) for first in range(0, N, step))


def _grown_norms(ww: Tensor, vv: Tensor, grown: Tensor) -> Tensor:
    """|v| - |w| (N,) from grown = |v|^2 - |w|^2."""
    both = ww.sqrt() + vv.sqrt()
    return grown / torch.where(both == 0, 1, both)


def _turned(ww: Tensor, vv: Tensor, wv: Tensor, across: Tensor) -> Tensor:
    """1 - cos(v, w) (N,) from across = |w|^2 |v|^2 - (w.v)^2; -1 where a row has no direction."""
    norms = ww.sqrt() * vv.sqrt()
    has_direction, norms = norms != 0, torch.where(norms == 0, 1, norms)  # NaN, too, is to be seen
    turned = torch.where(wv >= 0, across / (norms * (norms + wv.clamp(min=0))), 1 - wv / norms).clamp(max=2)
    return torch.where(has_direction, turned, -1)


def _change(function: str, grown: Tensor, turned: Tensor) -> Change:
    directions = turned[turned != -1]
    magnitude = grown.abs().mean().item()
    direction = directions.mean().item() if len(directions) else None
    if not (math.isfinite(magnitude) and (direction is None or math.isfinite(direction))):
        raise ValueError(f"{function}: the change is not finite; expected finite weights and adapters")
    return Change(magnitude, direction)
