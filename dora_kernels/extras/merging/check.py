"""Tensors that were written, against the merge in float64: PEFT's own where it is installed and has such a layer."""

from __future__ import annotations

import importlib.util
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dora_kernels.extras.merging.base import Source
from dora_kernels.extras.merging.plan import Planned
from dora_kernels.files.reading import shown
from dora_kernels.reference import over_norm

_BLOCK = 4 << 20
"""Bytes of float64 that are compared at a time; PEFT makes some ten times as much of them."""
_COMPUTED = {torch.float64: 1e-12}
"""Beside the rounding of what is written, by which a row may be off: of sums in float64, and in float32 for others."""

_Rows = Callable[[slice], Tensor]


class Checked(NamedTuple):
    """A tensor that was compared. error: by how much of its length the worst row is off; most: what rounding may make.

    merge: whose merge in float64 it was, "PEFT" or "the definition".
    """

    name: str
    error: float
    most: float
    merge: str


class CheckFailed(ValueError):
    """The error for a tensor that was written wrong. checked: all that were compared."""

    def __init__(self, message: str, checked: tuple[Checked, ...]) -> None:
        super().__init__(message, checked)
        self.checked = checked

    def __str__(self) -> str:
        return str(self.args[0])


def check_jobs(jobs: Sequence[Planned], count: int, made: Path, folder: bool) -> tuple[Checked, ...]:
    """Compare `count` of the jobs, spread over all. Raises CheckFailed where a row is off by more than its rounding."""
    count = min(count, len(jobs))
    chosen = [jobs[index * (len(jobs) - 1) // max(1, count - 1)] for index in range(count)]
    found = [_check(job, made / job.shard.path.name if folder else made) for job in chosen]
    checked = tuple(one for one, _ in found)
    for one, row in found:
        if not one.error <= one.most:
            raise CheckFailed(
                f"merge: {shown(one.name)}: row {row} differs from the merge in float64 by {one.error:.2e} of its "
                f"length; expected at most {one.most:.2e}",
                checked,
            )
    return checked


def _check(job: Planned, path: Path) -> tuple[Checked, int]:
    """The comparison of one tensor, and its worst row."""
    by_peft = job.adapter.norm_axis == "out" and job.adapter.ndim == 2 and importlib.util.find_spec("peft") is not None
    base, written = _rows_of(job, job.shard), _rows_of(job, Source.of(path))
    finfo = torch.finfo(job.dtype)
    least = finfo.smallest_normal * finfo.eps / 2  # by which the smallest numbers are rounded, which have fewer places
    worst, error = 0, 0.0
    for rows, exact in _by_peft(job, base) if by_peft else _by_definition(job, base):
        off = ((written(rows).double() - exact).abs() - least).clamp(min=0).norm(dim=1)
        off = torch.where(off == 0, 0, off / exact.norm(dim=1)).nan_to_num(nan=math.inf, posinf=math.inf)
        # not of zeros, of which PEFT makes NaN, nor where the base or the adapter is not finite and may be so
        off[~exact.isfinite().all(1)] = 0
        if len(off) and float(off.max()) > error:
            worst, error = rows.start + int(off.argmax()), float(off.max())
    most = finfo.eps / 2 + _COMPUTED.get(job.dtype, 2e-5)
    return Checked(job.entry.key, error, most, "PEFT" if by_peft else "the definition"), worst


def _rows_of(job: Planned, source: Source) -> _Rows:
    """The function that reads some of the N rows of the job's tensor from a file, (n, K) or (n, K * kernel)."""

    def stored(first: int, end: int) -> Tensor:
        size = (job.entry.end - job.entry.start) // job.entry.shape[0]
        content = bytearray((end - first) * size)
        with source.opened() as number:
            source.read_into(number, memoryview(content), job.entry.start + first * size)
        return torch.frombuffer(content, dtype=job.dtype).view(end - first, -1)

    if job.transposed:  # then a row is in all of it
        whole = stored(0, job.entry.shape[0]).T
        return lambda rows: whole[rows]
    return lambda rows: stored(rows.start, rows.stop)


def _blocks(job: Planned) -> Iterator[slice]:
    N, each = job.adapter.N, max(1, _BLOCK // (8 * job.adapter.lora_A[0].numel()))
    return (slice(start, min(start + each, N)) for start in range(0, N, each))


def _by_definition(job: Planned, base: _Rows) -> Iterator[tuple[slice, Tensor]]:
    adapter = job.adapter
    lora_A, lora_B = adapter.lora_A.double().flatten(1), adapter.lora_B.double().flatten(1)
    magnitude = None if adapter.magnitude is None else adapter.magnitude.double()
    each = adapter.lora_A[0, 0].numel()

    def directions() -> Iterator[tuple[slice, Tensor]]:
        return ((rows, base(rows).double() + adapter.scaling * lora_B[rows] @ lora_A) for rows in _blocks(job))

    if magnitude is None:
        yield from directions()
    elif adapter.norm_axis == "out":
        for rows, direction in directions():
            yield rows, over_norm(magnitude[rows], torch.linalg.vector_norm(direction, dim=1))[:, None] * direction
    else:
        squares = sum(direction.square().sum(0).view(-1, each).sum(1) for _, direction in directions())
        gain = over_norm(magnitude, torch.sqrt(squares)).repeat_interleave(each)  # type: ignore[arg-type]
        yield from ((rows, gain * direction) for rows, direction in directions())


def _by_peft(job: Planned, base: _Rows) -> Iterator[tuple[slice, Tensor]]:
    """The merge of PEFT's layer over some rows at a time, which no other row has a part in."""
    from peft import LoraConfig, get_peft_model

    adapter = job.adapter
    for rows in _blocks(job):
        weight = base(rows).double()
        beneath = nn.utils.skip_init(nn.Linear, weight.shape[1], len(weight), bias=False, dtype=torch.float64)
        beneath.weight.data = weight
        config = LoraConfig(r=adapter.R, target_modules=["layer"], use_dora=adapter.magnitude is not None)
        with torch.random.fork_rng(devices=[]):  # it draws an lora_A
            model: Any = get_peft_model(nn.Sequential(OrderedDict(layer=beneath)), config).double()
        layer = model.base_model.model.layer
        layer.scaling["default"] = adapter.scaling
        layer.lora_A["default"].weight.data = adapter.lora_A.double()
        layer.lora_B["default"].weight.data = adapter.lora_B[rows].double()
        if adapter.magnitude is not None:
            layer.lora_magnitude_vector["default"].weight.data = adapter.magnitude[rows].double()
        layer.merge()
        yield rows, layer.base_layer.weight.data
