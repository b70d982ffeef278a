"""The cost of dropout in a training step: on all that the adapter adds (PEFT's meaning), or on its low-rank product.

    python -m bench.studies.dropout       # bench/results/<device>/dropout.json, two minutes on two cores

One DoraLinear, forward and backward with every gradient wanted, without dropout and with it in both meanings. Nothing
is timed before y and every gradient were held against the definition in float64, with the same mask; the yardstick is
the definition in the same dtypes. JSON {meta, rows}, a row per case and way.
"""

from __future__ import annotations

import argparse
import copy
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from bench.lib import outputs
from bench.lib.machine import ROOT, device_folder, meta
from bench.lib.measure import failure, interleave, peak_bytes, saved_bytes, stopwatch_of
from bench.lib.problem import lora_dropout_ref
from bench.lib.report import write
from dora_kernels import DoraLinear
from dora_kernels.reference import dora_linear_ref
from dora_kernels.testing import compare

WAYS = {"none": (0.0, "adapter"), "adapter": (0.1, "adapter"), "lora": (0.1, "lora")}
"""p, and what dropout falls on."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = ((512, 1024, 1024, 16), (512, 2048, 2048, 16), (2048, 2048, 2048, 16), (512, 4096, 1024, 64))
SEED = 7


@dataclass(frozen=True)
class DropoutCase:
    """M tokens through a weight (N, K) at rank R."""

    precision: str
    M: int
    N: int
    K: int
    R: int


class DropoutProblem:
    """A case's tensors, and a layer for each way with the same ones."""

    def __init__(self, case: DropoutCase, device: torch.device) -> None:
        torch.manual_seed(0)
        dtype = PRECISIONS[case.precision]
        layer = DoraLinear(case.K, case.N, case.R, 2 * case.R, device=device, dtype=dtype, adapter_dtype=dtype)
        nn.init.normal_(layer.lora_B.weight, std=0.5 / case.R)
        layer.lora_magnitude_vector.data.mul_(1 + 0.3 * torch.randn_like(layer.lora_magnitude_vector).tanh())
        self.layers = {}
        for way, (p, dropout_on) in WAYS.items():
            self.layers[way] = copy.deepcopy(layer)
            self.layers[way].dropout, self.layers[way].dropout_on = p, dropout_on
        self.x = torch.randn(case.M, case.K, device=device).to(dtype).requires_grad_()
        self.dy = torch.randn(case.M, case.N, device=device).to(dtype)

    def gradients(self, y: Tensor, layer: DoraLinear, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
        gradients = torch.autograd.grad(y, [x, *trained.values()], dy)
        return {"y": y} | dict(zip(("dx", *trained), gradients, strict=True))

    def step(self, way: str) -> dict[str, Tensor]:
        """y, dx and the gradients of the adapter."""
        torch.manual_seed(SEED)
        layer = self.layers[way]
        return self.gradients(layer(self.x), layer, self.x, self.dy)

    def defined(self, way: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same by the definition, with the mask of `step`, in dtype."""
        p, dropout_on = WAYS[way]
        torch.manual_seed(SEED)
        mask = F.dropout(torch.ones_like(self.x), p).to(dtype)
        layer = copy.deepcopy(self.layers[way]).to(dtype)
        x = self.x.detach().to(dtype).requires_grad_()
        weight, bias = layer.base()
        arguments = (weight, *layer.factors())
        if dropout_on == "adapter":
            y = dora_linear_ref(x, *arguments, bias, x_dropped=x * mask)
        else:
            y = lora_dropout_ref(x, x * mask, *arguments) + bias
        return self.gradients(y, layer, x, self.dy.to(dtype))


def measure(case: DropoutCase, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """A row for each way. Raises RuntimeError where one is not good enough."""
    problem = DropoutProblem(case, device)
    for way in WAYS:
        results, exact = problem.step(way), problem.defined(way, torch.float64)
        yardstick = problem.defined(way, PRECISIONS[case.precision])
        reason = failure(compare(name, results[name], yardstick[name], exact[name]) for name in exact)
        if reason is not None:
            raise RuntimeError(f"bench.studies.dropout: {case} {way}: {reason}")
    steps = {way: lambda way=way: problem.step(way) for way in WAYS}
    times = interleave(steps, stopwatch_of(device), seconds)
    return [
        vars(case)
        | {
            "way": way,
            "ms": vars(times[way]),
            "saved_bytes": saved_bytes(lambda layer=layer: layer(problem.x), problem.x, *layer.parameters()),
            "peak_bytes": peak_bytes(steps[way], device),
        }
        for way, layer in problem.layers.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """A line per case: time over the step without dropout, and the memory."""
    lines = [
        "| precision | M | N x K | R | no dropout | on the adapter | on its low-rank product | held, none and each | "
        "peak, none and each |",
        "| --- " * 9 + "|",
    ]
    cases: dict[DropoutCase, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(DropoutCase(*(row[name] for name in ("precision", "M", "N", "K", "R"))), {})[row["way"]] = row
    for case, ways in cases.items():
        none, adapter, lora = (ways[way]["ms"]["median"] for way in WAYS)
        memory = [
            ", ".join(f"{ways[way][name] / 2**20:.1f}" for way in WAYS) + " MiB"
            for name in ("saved_bytes", "peak_bytes")
        ]
        cells = (case.precision, case.M, f"{case.N} x {case.K}", case.R, f"{none:.3g} ms")
        lines.append(f"| {' | '.join(map(str, (*cells, f'{adapter / none:.2f}', f'{lora / none:.2f}', *memory)))} |")
    return "\n".join(lines)


@outputs.command("bench.studies.dropout")
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.dropout", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8, help="timing per case (default: %(default)s)")
    parser.add_argument("--shape", nargs=4, type=int, action="append", metavar=("M", "N", "K", "R"))
    parser.add_argument("--out", type=pathlib.Path, help="default: bench/results/<device>/dropout.json")
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = arguments.out or ROOT / "bench" / "results" / device_folder(device) / "dropout.json"
    outputs.claim("bench.studies.dropout", out)
    cases = [DropoutCase(precision, *shape) for precision in PRECISIONS for shape in arguments.shape or SHAPES]
    where, rows = meta(device, arguments.commit), []
    for case in track(cases, "bench.studies.dropout"):
        rows += measure(case, device, arguments.seconds)
    write(out, where, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
