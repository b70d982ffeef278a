"""What the benchmarks' calls compile, recorded on meta tensors: one list for warm.py."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import precompile
import specializations
import torch
from candidates import SUBJECTS
from specializations import Inputs, Specialization, Target, recording, step

import dora_kernels
from bench import fused, kernels, shapes
from bench.problem import SCALING
from bench.shapes import Case
from dora_kernels.kernels import KERNELS

# of bench/shapes.py and bench/roof.py, and of the whole model (a layer under autocast) -> of tools/specializations.py
VARIANTS = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
    "bf16-autocast": "bf16 autocast, fp32 adapters",
    "bf16-fp32": "bf16, fp32 adapters",
}
MODEL = ((4096, 4096), (1024, 4096), (12288, 4096), (4096, 12288))


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A specialisation, and the first stage that needs it."""

    stage: str
    specialization: Specialization


def wanted(target: Target, shared_limit: int, tuning: bool) -> list[Wanted]:
    """Everything that the plans' benchmarks launch, each once, in their order; with the candidates of the tuning."""
    found: dict[tuple[str, str], Wanted] = {}
    parts = [("kernels", _kernels), ("layer", _layer), ("model", _model), ("decisive", _decisive)]
    for stage, part in parts:
        for recorded in part(target):
            _add(found, stage, recorded)
    if tuning:
        _add(found, "tuning", precompile.specializations_of(list(SUBJECTS), 2, target, shared_limit))
    return list(found.values())


def _add(found: dict[tuple[str, str], Wanted], stage: str, recorded: list[Specialization]) -> None:
    for specialization in recorded:
        found.setdefault((specialization.name, specialization.key), Wanted(stage, specialization))


@contextlib.contextmanager
def _recording(target: Target, precision: str, overrides: dict | None = None) -> Iterator[list[Specialization]]:
    with recording(target, specializations.VARIANTS[VARIANTS[precision]], overrides) as recorded:
        yield recorded


def _kernels(target: Target) -> Iterator[list[Specialization]]:
    for precision in ("bf16", "bf16-fp32", "fp16", "fp32"):
        for sizes in kernels.GPU_CASES:
            yield _alone(target, Case(*sizes, precision, "meta"), tuple(kernels.CALLS))


def _alone(target: Target, case: Case, names: tuple[str, ...], overrides: dict | None = None) -> list[Specialization]:
    """Kernels of bench.kernels, one by one."""
    operands = kernels.Operands.random(case)
    with _recording(target, case.precision, overrides) as recorded, kernels.every_call_by_kernel():
        for name in names:
            kernels.CALLS[name](operands, KERNELS)
    return recorded


def _layer(target: Target) -> Iterator[list[Specialization]]:
    """Every provider of ours, and dropout."""
    for case in shapes.core_grid("meta"):
        for options in ({}, {"way": "split"}, {"way": "merged"}, {"precision": "exact"}, {"drop": True}):
            with _recording(target, case.precision) as recorded:
                inputs = _inputs(case)
                step(inputs, scaling=SCALING, bias=False, **options)
                _infer(inputs, **{name: value for name, value in options.items() if name != "drop"})
            yield recorded


def _inputs(case: Case) -> Inputs:
    variant = specializations.VARIANTS[VARIANTS[case.precision]]
    return Inputs.of(variant, case.M, case.N, case.K, case.R)


def _infer(inputs: Inputs, **options: str) -> None:
    with torch.no_grad(), dora_kernels.options(**options):
        dora_kernels.dora_linear(inputs.x, inputs.weight, *inputs.adapter(), SCALING, None)


def _model(target: Target) -> Iterator[list[Specialization]]:
    for N, K in MODEL:
        with _recording(target, "bf16-autocast") as recorded:
            step(_inputs(Case(4096, N, K, 384, "bf16-autocast", "meta")), scaling=SCALING, bias=False)
        yield recorded


def _decisive(target: Target) -> Iterator[list[Specialization]]:
    for N, R in ((4096, 384), (8192, 384), (14336, 384)):
        yield _alone(target, Case(8192, N, 8192 if N == 8192 else 4096, R, "bf16", "meta"), ("merge", "norm"))
    for precision in ("highest", "high"):
        variant = dataclasses.replace(specializations.VARIANTS["bf16, fp32 adapters"], precision=precision)
        for R in (64, 384):
            operands = kernels.Operands.random(Case(8192, 8192, 8192, R, "bf16-fp32", "meta"))
            with recording(target, variant) as recorded, kernels.every_call_by_kernel():
                kernels.CALLS["norm"](operands, KERNELS)
            yield recorded
    for N, R in ((4096, 64), (14336, 384)):
        for M in (1, 16, 128, 512, 2048, 8192):
            for way in ("split", "merged", "auto"):
                with _recording(target, "bf16") as recorded:
                    _infer(_inputs(Case(M, N, 4096, R, "bf16", "meta")), way=way)
                yield recorded
    with _recording(target, "bf16") as recorded:  # the host's cost
        inputs = _inputs(Case(16, 256, 256, 16, "bf16", "meta"))
        step(inputs, scaling=SCALING, bias=False)
        _infer(inputs)
    yield recorded
    for sizes in ((8192, 4096, 4096, 64), (8192, 14336, 4096, 384), (8192, 8192, 8192, 64)):
        operands = kernels.Operands.random(Case(*sizes, "bf16", "meta"))
        given = (operands.x, operands.low, operands.weight, operands.lora_B, operands.gain)
        for settings in itertools.product(fused.FUSED_TILES, (True, False), (True, False)):
            with _recording(target, "bf16") as recorded:
                fused.fused_linear(*given, *settings)
            yield recorded
