"""Layers that read the same x, sharing the low-rank product or not: time, memory held and peak of a training step.

    python -m bench.studies.shared        # bench/results/<device>/shared.json, two minutes on two cores

Two PEFT models of the same tensors are enabled, one with fuse_shared_inputs: q, k and v of an attention (k and v of
fewer heads), and gate and up of an MLP. A step is forward and backward with every gradient wanted. Nothing is timed
before y and every gradient of both were held against stock PEFT in float64, with stock PEFT in the same dtypes as the
yardstick. JSON {meta, rows}, a row per case and way.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import pathlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dora_kernels
from bench.lib.machine import ROOT, device_folder, meta
from bench.lib.measure import failure, interleave, peak_bytes, saved_bytes, stopwatch_of
from bench.lib.report import write
from dora_kernels import ops
from dora_kernels.planning import plan
from dora_kernels.testing import Comparison, compare

BLOCKS = {
    "q, k, v": (1024, {"q_proj": 1024, "k_proj": 256, "v_proj": 256}),
    "gate, up": (1024, {"gate_proj": 2816, "up_proj": 2816}),
    "q, k, v of Llama-3.1-8B": (4096, {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024}),
}
"""Of each block: in features, and out features by name. By default the first two are measured."""

PRECISIONS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "bf16-autocast": (torch.float32, torch.bfloat16),
}
"""The dtype of x, weight and adapters; autocast's."""

WAYS = {"apart": False, "shared": True}

# M, K, the N of each sibling, R: q, k and v of Llama-3.1-8B at two lengths, without grouped queries, of Llama-3.1-70B;
# gate and up of Llama-3.1-8B
PREDICTED = (
    (8192, 4096, (4096, 1024, 1024), 64),
    (512, 4096, (4096, 1024, 1024), 64),
    (8192, 4096, (4096, 4096, 4096), 64),
    (8192, 8192, (8192, 1024, 1024), 64),
    (8192, 4096, (14336, 14336), 64),
)


class Siblings(nn.Module):
    """Linear layers that are called with one x."""

    def __init__(self, features: int, widths: dict[str, int]) -> None:
        super().__init__()
        for name, width in widths.items():
            self.add_module(name, nn.Linear(features, width, bias=False))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.children()]


@dataclass(frozen=True)
class SharedCase:
    """One block with M tokens at rank R."""

    block: str
    precision: str
    M: int
    R: int

    def __str__(self) -> str:
        return f"{self.block} M={self.M} R={self.R} {self.precision}"


LLAMA = SharedCase("q, k, v of Llama-3.1-8B", "bf16", 8192, 64)


class SharedProblem:
    """A case's tensors: the stock model, x, and a dy for each layer."""

    def __init__(self, case: SharedCase, device: torch.device) -> None:
        import peft  # not for those who read the tables only

        torch.manual_seed(0)
        dtype, self.autocast = PRECISIONS[case.precision]
        features, widths = BLOCKS[case.block]
        config = peft.LoraConfig(use_dora=True, target_modules=list(widths), r=case.R, lora_alpha=2 * case.R)
        block = Siblings(features, widths).to(device, dtype)
        self.model = peft.get_peft_model(block, config, autocast_adapter_dtype=False).train()
        for name, parameter in self.model.named_parameters():
            if "magnitude" in name:
                parameter.data.mul_(1 + 0.3 * torch.randn_like(parameter).tanh())
            elif "lora_B" in name:
                nn.init.normal_(parameter, std=0.5 / case.R)
        self.x = torch.randn(1, case.M, features, device=device).to(dtype).requires_grad_()
        self.dys = [torch.randn(1, case.M, width, device=device).to(dtype) for width in widths.values()]

    def enabled(self, fuse_shared_inputs: bool) -> nn.Module:
        """A copy of the model, taken over, with the same base weights."""
        model = copy.deepcopy(self.model)
        report = dora_kernels.enable(model, fuse_shared_inputs=fuse_shared_inputs)
        if report.left_alone or any(bool(layer.shares_with) != fuse_shared_inputs for layer in report.layers):
            raise RuntimeError(
                f"bench.studies.shared: expected every layer to be taken over, and to share if asked; {report}"
            )
        return model

    def frozen(self) -> nn.Module:
        """The layers without adapters."""
        return copy.deepcopy(self.model).unload()

    def forward(self, model: nn.Module) -> list[Tensor]:
        device = self.x.device.type
        autocast = contextlib.nullcontext() if self.autocast is None else torch.autocast(device, self.autocast)
        with autocast:
            return model(self.x)

    def step(self, model: nn.Module) -> dict[str, Tensor]:
        """y of each layer, dx, and the gradients of the adapters by name."""
        ys = self.forward(model)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        dys = [dy.to(y.dtype) for y, dy in zip(ys, self.dys, strict=True)]
        gradients = torch.autograd.grad(ys, [self.x, *trained.values()], dys)
        return {f"y{at}": y for at, y in enumerate(ys)} | dict(zip(("dx", *trained), gradients, strict=True))

    def exact(self) -> dict[str, Tensor]:
        """A step of stock PEFT in float64."""
        twin = copy.copy(self)
        twin.model, twin.autocast = copy.deepcopy(self.model).double(), None
        twin.x, twin.dys = self.x.detach().double().requires_grad_(), [dy.double() for dy in self.dys]
        return twin.step(twin.model)


Comparing = Callable[[dict[str, Tensor]], list[Comparison]]


def checked(case: SharedCase, device: torch.device) -> tuple[SharedProblem, dict[str, nn.Module], Comparing]:
    """The problem, the model of each way, and what compares a step's results with stock PEFT in float64.

    Raises RuntimeError where a model is not good enough, or does not do what the name of its way says.
    """
    problem = SharedProblem(case, device)
    models = {way: problem.enabled(fused) for way, fused in WAYS.items()}
    exact, yardstick = problem.exact(), problem.step(problem.model)

    def comparisons(results: dict[str, Tensor]) -> list[Comparison]:
        return [compare(name, results[name], yardstick[name], exact[name], problem.autocast) for name in exact]

    for way, model in models.items():
        before = ops.calls.copy()
        results = problem.step(model)
        shared = sum(count for (name, _), count in (ops.calls - before).items() if name == "shared_low")
        reason = failure(comparisons(results))
        if reason is not None or shared != WAYS[way]:
            raise RuntimeError(
                f"bench.studies.shared: {case} {way}: {reason or f'the product was shared {shared} times'}"
            )
    return problem, models, comparisons


def measure(case: SharedCase, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """A row for each way; RuntimeError as `checked`."""
    problem, models, _ = checked(case, device)
    steps = {way: lambda model=model: problem.step(model) for way, model in models.items()}
    times = interleave(steps, stopwatch_of(device), seconds)
    return [
        vars(case)
        | {
            "way": way,
            "ms": vars(times[way]),
            "saved_bytes": saved_bytes(lambda model=model: problem.forward(model), problem.x, *model.parameters()),
            "peak_bytes": peak_bytes(steps[way], device),
        }
        for way, model in models.items()
    ]


def predicted(M: int, K: int, widths: Sequence[int], R: int, device: plan.Device) -> tuple[float, float]:
    """Seconds of a bf16 training step of siblings, apart and shared, by the cost model."""
    shapes = [plan.Shape(M, N, K, R, itemsize=2) for N in widths]
    apart = saved = 0.0
    for shape in shapes:
        forward, backward = (
            plan.forward_costs(shape, "split"),
            plan.backward_costs(shape, plan.dx_way("auto", shape, device)),
        )
        apart += plan.seconds(forward | backward, shape, device)
        saved += forward["low"].seconds(shape, device) + backward["dA"].seconds(shape, device)
    ranks = R * len(shapes)
    # beside the two products: lora_A put together, dlow put together, dA taken apart, each read and written
    copies = plan.Cost(4 * ranks * K + 2 * M * ranks, 0, launches=2 + len(shapes))
    shared = (plan.Cost(M * K, 2 * M * K * ranks), plan.Cost(M * K, 2 * M * K * ranks, launches=2), copies)
    return apart, apart - saved + sum(step.seconds(shapes[0], device) for step in shared)


def measured_table(rows: list[dict[str, Any]]) -> str:
    """A line per case: what sharing does to time and memory."""
    lines = [
        "| block | precision | M | R | apart | shared | over apart | held, apart and shared | peak, apart and shared |",
        "| --- " * 9 + "|",
    ]
    cases: dict[SharedCase, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(SharedCase(row["block"], row["precision"], row["M"], row["R"]), {})[row["way"]] = row
    for case, ways in cases.items():
        times = [ways[way]["ms"]["median"] for way in WAYS]
        memory = [
            " and ".join(f"{ways[way][name] / 2**20:.1f}" for way in WAYS) + " MiB"
            for name in ("saved_bytes", "peak_bytes")
        ]
        cells = (case.block, case.precision, case.M, case.R, *(f"{time:.3g} ms" for time in times))
        lines.append(f"| {' | '.join(map(str, (*cells, f'{times[1] / times[0]:.2f}', *memory)))} |")
    return "\n".join(lines)


def predicted_table() -> str:
    """The cost model's predictions for bf16 on an H200, as a table."""
    lines = ["| M | N | K | R | apart | shared | shared over apart |", "| --- " * 7 + "|"]
    for M, K, widths, R in PREDICTED:
        apart, shared = predicted(M, K, widths, R, plan.DEVICES["NVIDIA H200"])
        cells = (M, ", ".join(map(str, widths)), K, R, f"{1e3 * apart:.2f} ms", f"{1e3 * shared:.2f} ms")
        lines.append(f"| {' | '.join(map(str, (*cells, f'{shared / apart:.3f}')))} |")
    return "\n".join(lines)


def section(measured: dict[str, list[dict[str, Any]]]) -> str:
    """The text between the markers of docs/performance.md; rows by where they were measured."""
    parts = [f"{where}:\n\n{measured_table(rows)}" for where, rows in measured.items()]
    return "\n\n".join([*parts, f"Predicted for an H200 in bf16, none of it measured:\n\n{predicted_table()}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0."""
    from rich.progress import track  # optional, and not for those who import the cases

    parser = argparse.ArgumentParser(prog="python -m bench.studies.shared", description=__doc__.splitlines()[0])
    parser.add_argument("--block", nargs="+", choices=BLOCKS, default=list(BLOCKS)[:2])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[512], metavar="M")
    parser.add_argument("--rank", nargs="+", type=int, default=[16, 64], metavar="R")
    parser.add_argument("--seconds", type=float, default=8, help="timing per case (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, help="default: bench/results/<device>/shared.json")
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = arguments.out or ROOT / "bench" / "results" / device_folder(device) / "shared.json"
    cases = [
        SharedCase(block, precision, M, R)
        for block in arguments.block
        for precision in arguments.precision
        for M in arguments.tokens
        for R in arguments.rank
    ]
    where, rows = meta(device, arguments.commit), []
    for case in track(cases, "bench.studies.shared"):
        rows += measure(case, device, arguments.seconds)
    write(out, where, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
