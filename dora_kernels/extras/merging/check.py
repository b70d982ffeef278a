"""Tensors that were written, against the merge in float64: PEFT's own where it is installed and has such a layer."""

from __future__ import annotations

import importlib.util
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
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


class Checked(NamedTuple):
    """A tensor that was written: how far it is from the merge in float64, as rms over rms, and whose merge that is."""

    name: str
    error: float
    merge: str


def check_jobs(jobs: Sequence[Planned], count: int, made: Path, folder: bool) -> list[Checked]:
    """Compare `count` of the jobs, spread over all. Raises ValueError where a row differs by more than its rounding."""
    count = min(count, len(jobs))
    chosen = [jobs[index * (len(jobs) - 1) // max(1, count - 1)] for index in range(count)]
    return [_check(job, made / job.shard.path.name if folder else made) for job in chosen]


def _check(job: Planned, path: Path) -> Checked:
    by_peft = job.adapter.norm_axis == "out" and job.adapter.ndim == 2 and importlib.util.find_spec("peft") is not None
    base, written = _matrix(job, job.shard), _matrix(job, Source.of(path))
    finfo = torch.finfo(job.dtype)
    least = finfo.smallest_normal * finfo.eps / 2  # by which the smallest numbers are rounded, which have fewer places
    most = finfo.eps / 2 + _COMPUTED.get(job.dtype, 2e-5)
    wrong = size = 0.0
    for rows, exact in _by_peft(job, base) if by_peft else _by_definition(job, base):
        # not those of zeros, of which PEFT makes NaN, nor those that are not finite if these are allowed
        finite = exact.isfinite().all(1)
        exact, found = exact[finite], written[rows][finite].double()
        off, length = ((found - exact).abs() - least).clamp(min=0).norm(dim=1), exact.norm(dim=1)
        bad = ~(off <= most * length)
        if bad.any():
            first = int(bad.nonzero()[0])
            row = rows.start + int(finite.nonzero()[first])
            raise ValueError(
                f"merge: {shown(job.entry.key)}: row {row} differs from the merge in float64 by "
                f"{float(off[first] / length[first]):.2e} of its length; expected at most {most:.2e}"
            )
        wrong += float(off.square().sum())
        size += float(length.square().sum())
    return Checked(job.entry.key, math.sqrt(wrong / size) if size else 0.0, "PEFT" if by_peft else "the definition")


def _matrix(job: Planned, source: Source) -> Tensor:
    """The job's tensor in a file, (N, K) or of a convolution (N, K * kernel)."""
    content = bytearray(job.entry.end - job.entry.start)
    with source.opened() as number:
        source.read_into(number, memoryview(content), job.entry.start)
    stored = torch.frombuffer(content, dtype=job.dtype).view(job.entry.shape).flatten(1)
    return stored.T if job.transposed else stored


def _blocks(matrix: Tensor) -> Iterator[slice]:
    each = max(1, _BLOCK // (8 * matrix.shape[1]))
    return (slice(start, min(start + each, len(matrix))) for start in range(0, len(matrix), each))


def _by_definition(job: Planned, base: Tensor) -> Iterator[tuple[slice, Tensor]]:
    adapter = job.adapter
    lora_A, lora_B = adapter.lora_A.double().flatten(1), adapter.lora_B.double().flatten(1)
    magnitude = None if adapter.magnitude is None else adapter.magnitude.double()
    each = adapter.lora_A[0, 0].numel()

    def directions() -> Iterator[tuple[slice, Tensor]]:
        return ((rows, base[rows].double() + adapter.scaling * lora_B[rows] @ lora_A) for rows in _blocks(base))

    if magnitude is None:
        yield from directions()
    elif adapter.norm_axis == "out":
        for rows, direction in directions():
            yield rows, over_norm(magnitude[rows], torch.linalg.vector_norm(direction, dim=1))[:, None] * direction
    else:
        squares = sum(direction.square().sum(0).view(-1, each).sum(1) for _, direction in directions())
        gain = over_norm(magnitude, torch.sqrt(squares)).repeat_interleave(each)  # type: ignore[arg-type]
        yield from ((rows, gain * direction) for rows, direction in directions())


def _by_peft(job: Planned, base: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The merge of PEFT's layer over some rows at a time, which no other row has a part in."""
    from peft import LoraConfig, get_peft_model

    adapter = job.adapter
    for rows in _blocks(base):
        weight = base[rows].double()
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
