"""The kernels that the benchmarks' calls compile, recorded on meta tensors: one list for warm.py."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any
from unittest import mock

import compile_kernels
import precompile
import specializations
import torch
from candidates import SUBJECTS
from precompile import VARIANTS
from specializations import Inputs, Specialization, Target, recording, step

import dora_kernels
from bench import kernels
from bench.lib import shapes
from bench.lib.problem import SCALING
from bench.lib.shapes import LayerCase
from bench.studies import beside, probe
from bench.studies.gluon import gemm
from bench.studies.one_layer import WAYS, planned
from dora_kernels.kernels import KERNELS
from dora_kernels.kernels.hopper.launch import why_not_gluon
from dora_kernels.planning import configs, measured
from dora_kernels.planning.tiles import GEMMS
from gpu_stages import consan
from gpu_stages.benchmarks import KERNEL_CASES

MODEL = ((4096, 4096), (1024, 4096), (12288, 4096), (4096, 12288))


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A specialisation, and the first stage that needs it."""

    stage: str
    specialization: Specialization

    @property
    def name(self) -> str:
        return self.specialization.name

    def tiles(self) -> str:
        return self.specialization.tiles()

    def signature(self) -> str:
        """The key of its launcher."""
        return str(list(self.specialization.signature.values()))

    def build(self) -> Any:
        """The compiled kernel."""
        return precompile.build(self.specialization)

    def resources(self, kernel: Any) -> dict[str, Any]:
        """The compiler's figures for it; of one with checks in it (consan.py) nobody cares for them."""
        if self.specialization.options.instrumentation_mode:
            return {"shared": kernel.metadata.shared}
        return dataclasses.asdict(compile_kernels.compile_ahead(self.specialization))


@dataclasses.dataclass(frozen=True)
class NotRecorded:
    """A part whose launches could not be recorded, as Wanted: what is built is the error that it ended with."""

    stage: str
    error: Exception
    name: str = "launches"

    def tiles(self) -> str:
        return "not recorded"

    def build(self) -> Any:
        raise self.error


def wanted(card: str, target: Target, parts: Collection[str], tuning: bool) -> list[Wanted | NotRecorded]:
    """All that these parts of the plans launch on the card of that name, each once, in their order.

    A part that raises costs itself alone: without the others' kernels every stage would compile its own, one by one.

    tuning: with its candidates, and what the race checker runs in the same plan. What is already tuned on this card
    has the tiles of its table, and goes the ways that were measured there.
    """
    tuned, ways = configs.tuned_configs(card, target.family), measured.table_of(card)
    found: dict[tuple[str, str, str], Wanted] = {}
    not_recorded: list[NotRecorded] = []
    if tuning and _takes_gluon(target):
        _add(found, "consan", consan.ahead(target))  # first: they take longest
    with (
        mock.patch.object(configs, "tuned_configs", lambda *key: tuned),
        mock.patch.object(measured, "table_of", lambda name: ways),
    ):
        for stage in parts:
            try:
                for recorded in PARTS[stage](target):
                    _add(found, stage, recorded)
            except Exception as error:
                not_recorded.append(NotRecorded(stage, error))
    if tuning:
        for candidate in precompile.candidates_of(SUBJECTS, 2, target):
            _add(found, "tuning", precompile.launched_by(candidate))
    return [*found.values(), *not_recorded]


def _add(found: dict[tuple[str, str, str], Wanted], stage: str, recorded: list[Specialization]) -> None:
    for specialization in recorded:
        # the kernel that is broken on purpose has the name and the arguments of the one that is not
        key = specialization.kernel.module, specialization.name, specialization.key
        found.setdefault(key, Wanted(stage, specialization))


@contextlib.contextmanager
def _recording(target: Target, precision: str, overrides: dict | None = None) -> Iterator[list[Specialization]]:
    with recording(target, specializations.VARIANTS[VARIANTS[precision]], overrides) as recorded:
        yield recorded


def _kernels(target: Target) -> Iterator[list[Specialization]]:
    for sizes, precision in map(shapes.sizes_of, KERNEL_CASES):
        yield _alone(target, LayerCase(*sizes, precision or "bf16", "meta"), tuple(kernels.CALLS))


def _alone(
    target: Target, case: LayerCase, names: tuple[str, ...], overrides: dict | None = None
) -> list[Specialization]:
    """Kernels of bench.kernels, one by one."""
    operands = kernels.KernelOperands.random(case)
    with _recording(target, case.precision, overrides) as recorded, kernels.every_call_by_kernel():
        for name in names:
            kernels.CALLS[name](operands, KERNELS)
    return recorded


def _layer(target: Target) -> Iterator[list[Specialization]]:
    """Our layer as the planner has it, and dropout. Layers that share the low-rank product launch nothing else."""
    for case in [*shapes.core_grid("meta"), shapes.dropout_case("meta")]:
        with _recording(target, case.precision) as recorded:
            inputs = _inputs(case)
            step(inputs, scaling=SCALING, bias=False, drop=case.dropout > 0)
            _infer(inputs)
        yield recorded


def _inputs(case: LayerCase) -> Inputs:
    variant = specializations.VARIANTS[VARIANTS[case.precision]]
    return Inputs.of(variant, case.M, case.N, case.K, case.R)


def _infer(inputs: Inputs, **options: str) -> None:
    with torch.no_grad(), dora_kernels.options(**options):
        dora_kernels.dora_linear(inputs.x, inputs.weight, *inputs.adapter(), SCALING, None)


def _model(target: Target) -> Iterator[list[Specialization]]:
    for N, K in MODEL:
        with _recording(target, "bf16-autocast") as recorded:
            step(_inputs(LayerCase(4096, N, K, 384, "bf16-autocast", "meta")), scaling=SCALING, bias=False)
        yield recorded


def _decisive(target: Target) -> Iterator[list[Specialization]]:
    for N, R in ((4096, 384), (8192, 384), (14336, 384)):
        yield _alone(target, LayerCase(8192, N, 8192 if N == 8192 else 4096, R, "bf16", "meta"), ("merge", "norm"))
    for precision in ("highest", "high"):
        variant = dataclasses.replace(specializations.VARIANTS["bf16, fp32 adapters"], precision=precision)
        for R in (64, 384):
            operands = kernels.KernelOperands.random(LayerCase(8192, 8192, 8192, R, "bf16-fp32", "meta"))
            with recording(target, variant) as recorded, kernels.every_call_by_kernel():
                kernels.CALLS["norm"](operands, KERNELS)
            yield recorded
    for N, R in ((4096, 64), (14336, 384)):
        for M in (1, 16, 128, 512, 2048, 8192):
            for way in ("split", "merged", "auto"):
                with _recording(target, "bf16") as recorded:
                    _infer(_inputs(LayerCase(M, N, 4096, R, "bf16", "meta")), way=way)
                yield recorded
    with _recording(target, "bf16") as recorded:  # the host's cost
        inputs = _inputs(LayerCase(16, 256, 256, 16, "bf16", "meta"))
        step(inputs, scaling=SCALING, bias=False)
        _infer(inputs)
    yield recorded


def _ways(target: Target) -> Iterator[list[Specialization]]:
    """Every way of bench.studies.ways; a backward pass follows each forward pass, for the fastest is not known yet."""
    for sizes in shapes.WAY_SHAPES:
        inputs = _inputs(LayerCase(*sizes, "bf16", "meta"))
        for way in WAYS["forward"]:
            with _recording(target, "bf16") as recorded:
                _infer(inputs, way=way)
                for steps in measured.BESIDE.values():
                    with planned(steps):
                        step(inputs, scaling=SCALING, bias=False, way=way)
            yield recorded


def _probe(target: Target) -> Iterator[list[Specialization]]:
    """The variants of the GEMM, and the sums beside it and by themselves."""
    with _recording(target, "bf16") as recorded:
        operands = kernels.KernelOperands.random(LayerCase(*probe.FIRST_SHAPE, "bf16", "meta"))
        for side in (None, beside.Side(operands.x.device)):
            beside.sums(operands, measured.BESIDE["all"], side)
        for variant in gemm.VARIANTS.values() if _takes_gluon(target) else ():
            _launch_variant(variant, target.multiprocessors)
    yield recorded


def _takes_gluon(target: Target) -> bool:
    return target.family in GEMMS and why_not_gluon() is None


def _launch_variant(variant: gemm.GemmVariant, programs: int) -> None:
    M, N, K, R = probe.FIRST_SHAPE
    right, lora = ((K, N), (R, N)) if variant.nn else ((N, K), (N, R))
    sizes = {"x": (M, K), "weight": right, "low": (M, R), "lora": lora, "y": (M, N), "z": (M, N)}
    sizes |= {"gain": (N,), "bias": (N,)}
    dtypes = zip(sizes, variant.dtypes().values(), strict=True)
    given = {name: torch.empty(sizes[name], dtype=dtype, device="meta") for name, dtype in dtypes if dtype}
    gemm.launcher(variant, **dict.fromkeys(sizes) | given, programs=programs)()


PARTS: dict[str, Callable[[Target], Iterator[list[Specialization]]]] = {
    "kernels": _kernels,
    "layer": _layer,
    "model": _model,
    "ways": _ways,
    "decisive": _decisive,
    "probe": _probe,
}
