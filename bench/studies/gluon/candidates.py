"""The GEMMs of gemm.py on a GPU: held to float64, and timed in turn with cuBLAS."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench.kernels import steps_for
from bench.lib.apart import Row
from bench.lib.measure import capture, interleave, stopwatch_of
from bench.lib.problem import SCALING
from bench.lib.shapes import LayerCase
from bench.studies.gluon.gemm import GROUP_M, VARIANTS, launcher
from dora_kernels.testing import compare

SECONDS_EACH = 0.8  # of one interleaved measurement


@dataclass(frozen=True)
class GemmInputs:
    """Tensors of one product, named as in the kernel. N(0, 1): power, and so the clock, depends on data."""

    x: Tensor
    weight: Tensor
    low: Tensor
    lora: Tensor
    gain: Tensor
    bias: Tensor
    nn: bool

    @classmethod
    def random(cls, case: LayerCase, nn: bool) -> GemmInputs:
        """Of the forward pass, or nn: of dx, which reduces over N and has K columns."""
        generator = torch.Generator(case.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=case.device, generator=generator).bfloat16()

        M, N, K, R = case.M, case.N, case.K, case.R
        rows, columns = (N, K) if nn else (K, N)
        gain = torch.rand(columns, device=case.device, generator=generator) + 0.5
        lora = normal(R, columns) if nn else normal(columns, R)
        return cls(normal(M, rows), normal(N, K), normal(M, R), lora, gain, normal(columns), nn)

    def product(self) -> Tensor:
        """x @ weight, as the frozen layer computes it."""
        return self.x @ (self.weight if self.nn else self.weight.T)

    def results(self, dtype: torch.dtype, adapter: bool = True) -> dict[str, Tensor]:
        """z and y as PyTorch computes them in this dtype; without the adapter, y alone, the product."""
        x, weight, low, lora = (tensor.to(dtype) for tensor in (self.x, self.weight, self.low, self.lora))
        product = x @ (weight if self.nn else weight.T)
        if not adapter:
            return {"y": product}
        z = torch.addmm(product, low, lora if self.nn else lora.T, alpha=SCALING)
        exact = torch.promote_types(dtype, torch.float32)
        y = self.gain.to(exact) * z.to(exact) + self.bias.to(exact)
        return {"y": y.to(dtype), "z": z}


@dataclass(frozen=True)
class Candidate:
    """A launch of a variant."""

    variant: str
    programs: int | None = None
    group_m: int = GROUP_M

    @property
    def name(self) -> str:
        """The variant, and what is not the default."""
        notes = [self.variant]
        notes += [f"{self.programs} programs"] if self.programs else []
        return ", ".join(notes + ([f"groups of {self.group_m}"] if self.group_m != GROUP_M else []))

    def prepare(self, inputs: GemmInputs) -> tuple[Callable[[], None], dict[str, Tensor]]:
        """The launch, and what it writes, full of NaN until then."""
        variant = VARIANTS[self.variant]
        shape = inputs.x.shape[0], inputs.gain.shape[0]
        outputs = {
            name: torch.full(shape, float("nan"), dtype=torch.bfloat16, device=inputs.x.device)
            for name in ("y", "z")
            if name == "y" or variant.both
        }
        gain, bias, low, lora = 4 * [None]
        if variant.adapter:
            gain, bias, low, lora = inputs.gain, inputs.bias, inputs.low, inputs.lora
        written = outputs["y"], outputs.get("z")
        arguments = (inputs.x, inputs.weight, gain, bias, *written, low, lora)
        return launcher(variant, *arguments, self.programs, self.group_m, SCALING), outputs


def sizes(case: LayerCase) -> Row:
    """The columns that name a case."""
    return {"M": case.M, "N": case.N, "K": case.K, "R": case.R}


def check_variant(name: str, cases: Sequence[LayerCase]) -> Iterator[Row]:
    """Error and yardstick of the worse output; and the same to the bit with two programs, of many tiles each."""
    for case in cases:
        inputs = GemmInputs.random(case, VARIANTS[name].nn)
        launch, outputs = Candidate(name).prepare(inputs)
        launch()
        adapter = VARIANTS[name].adapter
        yardstick, exact = inputs.results(torch.bfloat16, adapter), inputs.results(torch.float64, adapter)
        compared = [compare(key, outputs[key], yardstick[key], exact[key]) for key in outputs]
        row = {"variant": name, **sizes(case), "ok": all(one.ok for one in compared)}
        worst = max(compared, key=lambda one: one.ratio)
        row |= {"error": worst.error, "yardstick": worst.yardstick, "output": worst.name}
        launch, again = Candidate(name, programs=2).prepare(inputs)
        launch()
        row["same"] = all(torch.equal(outputs[key], again[key]) for key in outputs)
        if not row["same"]:
            row |= {"ok": False, "reason": "not the same with two programs"}
        yield row


def time_candidates(case: LayerCase, candidates: Sequence[Candidate]) -> Iterator[Row]:
    """Microseconds of each as a CUDA graph, and percent: cuBLAS' time for the same product over it."""
    forward, dx = GemmInputs.random(case, nn=False), GemmInputs.random(case, nn=True)
    steps, _ = steps_for(case)

    def two_kernels() -> dict[str, Tensor]:
        base = forward.product()
        y = steps.epilogue(base, forward.low, forward.lora, forward.gain, forward.bias, SCALING, base.dtype)
        return {"base": base, "y": y}

    calls: dict[str, Callable[[], dict[str, Tensor]]] = {
        "cuBLAS": lambda: {"y": forward.product()},
        "cuBLAS dx": lambda: {"y": dx.product()},
        "cuBLAS + epilogue": two_kernels,
    }
    for candidate in candidates:
        launch, outputs = candidate.prepare(dx if VARIANTS[candidate.variant].nn else forward)
        calls[candidate.name] = functools.partial(_launched, launch, outputs)
    pool = torch.cuda.graph_pool_handle()
    graphs = {name: capture(call, pool)[0] for name, call in calls.items()}
    replays = {name: graph.replay for name, graph in graphs.items()}
    timings = interleave(replays, stopwatch_of(torch.device(case.device)), SECONDS_EACH)
    known = {candidate.name: candidate for candidate in candidates}
    for name, timing in timings.items():
        of_dx = name == "cuBLAS dx" or name in known and VARIANTS[known[name].variant].nn
        cublas = timings["cuBLAS dx" if of_dx else "cuBLAS"].median
        row = {"candidate": name, **(asdict(known[name]) if name in known else {}), **sizes(case)}
        row |= {"us": 1e3 * timing.median, "p20_us": 1e3 * timing.p20, "p80_us": 1e3 * timing.p80}
        row |= {"percent": 100 * cublas / timing.median}
        yield row | {"teraflops": 2e-9 * case.M * case.N * case.K / timing.median}


def _launched(launch: Callable[[], None], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    launch()
    return outputs
