"""Eval and decoding on a CPU: a layer by itself, which computes its norm at every call, and inside frozen_adapters.

    python -m bench.studies.evaluation                  # bench/results/cpu/evaluation.json, two minutes on one core
    python -m bench.studies.evaluation --before FILE    # with a column of what the same command wrote on another commit

One DoraLinear and the frozen linear layer, without gradients, on one thread, in process time, which other work on the
machine changes least: read the minimum. Nothing is timed before y was held against the definition in float64. JSON
{meta, rows}, a row per case and way. On a GPU bench.layer has the same two, as inference and
inference+frozen_adapters, and tools/gpu_suite.py runs it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import dora_kernels
from bench.lib import outputs
from bench.lib.machine import ROOT, meta
from bench.lib.measure import failure, interleave
from bench.lib.report import write
from dora_kernels import DoraLinear
from dora_kernels.reference import dora_linear_ref
from dora_kernels.testing import compare

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAYS = ("frozen", "alone", "in frozen_adapters")
N, K, R = 4096, 4096, 16


def stopwatch(step: Callable[[], object]) -> Callable[[], float]:
    """The process time of one call, in milliseconds."""
    start = time.process_time()
    step()
    elapsed = 1e3 * (time.process_time() - start)
    return lambda: elapsed


@torch.no_grad()
def measure(precision: str, M: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each of WAYS; RuntimeError where y is not good enough."""
    torch.manual_seed(0)
    dtype = PRECISIONS[precision]
    layer = DoraLinear(K, N, R, 2 * R, dtype=dtype, adapter_dtype=dtype).eval()
    nn.init.normal_(layer.lora_B.weight, std=0.5 / R)
    x = torch.randn(M, K).to(dtype)
    tensors = (x, layer.weight, layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector)
    exact = dora_linear_ref(*(tensor.double() for tensor in tensors), layer.scaling, layer.bias.double())
    yardstick = dora_linear_ref(*tensors, layer.scaling, layer.bias)

    with dora_kernels.frozen_adapters(layer):
        comparisons = [compare(way, y, yardstick, exact) for way, y in (("first", layer(x)), ("second", layer(x)))]
    comparisons.append(compare("alone", layer(x), yardstick, exact))
    reason = failure(comparisons)
    if reason is not None:
        raise RuntimeError(f"bench.studies.evaluation: {precision} M={M}: {reason}")
    steps = {"frozen": lambda: F.linear(x, layer.weight, layer.bias), "alone": lambda: layer(x)}
    times = interleave(steps, stopwatch, seconds / 2, rounds=(7, 400))
    with dora_kernels.frozen_adapters(layer):
        times |= interleave({WAYS[2]: lambda: layer(x)}, stopwatch, seconds / 2, rounds=(7, 400))
    case = {"precision": precision, "M": M, "N": N, "K": K, "R": R}
    return [case | {"way": way, "ms": vars(times[way])} for way in WAYS]


def table(rows: list[dict[str, Any]]) -> str:
    """A line per case: the least milliseconds of each way, and ours over the frozen layer."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    lines = [f"| precision | M | N x K | R | frozen | {' | '.join(f'{way} | over frozen' for way in ways[1:])} |"]
    lines.append("| --- " * (3 + 2 * len(ways)) + "|")
    cases: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        case = (row["precision"], row["M"], f"{row['N']} x {row['K']}", row["R"])
        cases.setdefault(case, []).append(row["ms"]["minimum"])
    for case, (frozen, *ours) in cases.items():
        cells = (*case, f"{frozen:.3g} ms", *(cell for ms in ours for cell in (f"{ms:.3g} ms", f"{ms / frozen:.2f}")))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def with_before(rows: list[dict[str, Any]], before: dict[str, Any]) -> list[dict[str, Any]]:
    """`rows`, and behind each case's the one that another commit's file has of the layer alone."""
    way = f"alone at {before['meta']['commit'][:10]}"
    alone = [row | {"way": way} for row in before["rows"] if row["way"] == "alone"]
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in (*rows, *alone):
        cases.setdefault((row["precision"], row["M"], row["N"], row["K"], row["R"]), []).append(row)
    return [row for group in cases.values() for row in group]


@outputs.command("bench.studies.evaluation")
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512], metavar="M")
    parser.add_argument("--seconds", type=float, default=16, help="timing per case (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "bench" / "results" / "cpu" / "evaluation.json")
    parser.add_argument("--before", type=pathlib.Path, metavar="FILE", help="what this wrote on another commit")
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    arguments = parser.parse_args(argv)
    outputs.claim("bench.studies.evaluation", arguments.out)
    torch.set_num_threads(1)
    where, rows = meta(torch.device("cpu"), arguments.commit), []
    for precision in arguments.precision:
        for M in arguments.tokens:
            rows += measure(precision, M, arguments.seconds)
    if arguments.before is not None:
        rows = with_before(rows, json.loads(arguments.before.read_text()))
    write(arguments.out, where, rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
