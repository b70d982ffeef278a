"""Layers that read the same x, sharing the low-rank product or not: time, memory held and peak of a training step.

    python -m bench.studies.shared        # bench/results/<device>/shared.json, two minutes on two cores

Two PEFT models of the same tensors are enabled, one with fuse_shared_inputs: q, k and v of an attention (k and v of
fewer heads), and gate and up of an MLP. A step is forward and backward with every gradient wanted. Nothing is timed
before y and every gradient of both were held against stock PEFT in float64, with stock PEFT in the same dtypes as the
yardstick. JSON {meta, rows}, a row per case and way.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track

from bench.lib import outputs
from bench.lib.machine import ROOT, device_folder, meta
from bench.lib.measure import interleave, peak_bytes, saved_bytes, stopwatch_of
from bench.lib.report import write
from bench.lib.siblings import BLOCKS, PRECISIONS, WAYS, SharedCase, checked
from dora_kernels.planning import costs, plan

# M, K, the N of each sibling, R: q, k and v of Llama-3.1-8B at two lengths, without grouped queries, of Llama-3.1-70B;
# gate and up of Llama-3.1-8B
PREDICTED = (
    (8192, 4096, (4096, 1024, 1024), 64),
    (512, 4096, (4096, 1024, 1024), 64),
    (8192, 4096, (4096, 4096, 4096), 64),
    (8192, 8192, (8192, 1024, 1024), 64),
    (8192, 4096, (14336, 14336), 64),
)


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


def predicted(M: int, K: int, widths: Sequence[int], R: int, device: costs.Device) -> tuple[float, float]:
    """Seconds of a bf16 training step of siblings, apart and shared, by the cost model."""
    shapes = [costs.Shape(M, N, K, R, itemsize=2) for N in widths]
    apart = saved = 0.0
    for shape in shapes:
        forward = costs.forward_costs(shape, "split", device)
        backward = costs.backward_costs(shape, plan.dx_way("auto", shape, device), device)
        apart += costs.seconds(forward | backward, shape, device)
        saved += forward["low"].seconds(shape, device) + backward["dA"].seconds(shape, device)
    together = costs.Shape(M, sum(widths), K, R * len(shapes), itemsize=2)
    shared = costs.forward_costs(together, "split", device), costs.backward_costs(together, "merged", device)
    # beside the two products: lora_A put together, dlow put together, dA taken apart, each read and written
    copies = costs.Cost(4 * together.R * K + 2 * M * together.R, 0, launches=2 + len(shapes))
    steps = (shared[0]["low"], shared[1]["dA"], copies)
    return apart, apart - saved + sum(step.seconds(together, device) for step in steps)


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
        apart, shared = predicted(M, K, widths, R, costs.DEVICES["NVIDIA H200"])
        cells = (M, ", ".join(map(str, widths)), K, R, f"{1e3 * apart:.2f} ms", f"{1e3 * shared:.2f} ms")
        lines.append(f"| {' | '.join(map(str, (*cells, f'{shared / apart:.3f}')))} |")
    return "\n".join(lines)


def section(measured: dict[str, list[dict[str, Any]]]) -> str:
    """The text between the markers of docs/performance.md; rows by where they were measured."""
    parts = [f"{where}:\n\n{measured_table(rows)}" for where, rows in measured.items()]
    return "\n\n".join([*parts, f"Predicted for an H200 in bf16, none of it measured:\n\n{predicted_table()}"])


@outputs.command("bench.studies.shared")
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0."""
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
    outputs.claim("bench.studies.shared", out)
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
