"""Measure the errors of ours, plain PyTorch and PEFT against float64, into bench/results/<device>/errors.json.

    python tools/measure_errors.py --seed 2468 --configurations 200
    python tools/measure_errors.py --ways --configurations 4         # high ranks, by way: errors-by-way.json
    python -m bench.figures                                  # the tables in docs/correctness.md, from these files

Random layers, lora_B not zero and gains spread over 0.5 to 1.5 (tests/support/parity_ratios.py). On a CPU the kernels
run in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from dora_kernels.planning import devices  # noqa: E402

if not torch.cuda.is_available():
    devices.interpret_on_cpu()  # before anything that imports triton, as peft does

from bench.lib import machine, outputs, report  # noqa: E402
from dora_kernels.testing import compare, geometric_mean, rms_error  # noqa: E402
from tests.support.parity_ratios import NAMES, configurations, peft_dora  # noqa: E402
from tests.support.problem import DEVICE  # noqa: E402


def measure(seed: int, count: int, dtypes: tuple[torch.dtype, torch.dtype]) -> list[dict[str, object]]:
    """A row for each tensor: geometric means of the errors, and of ours over PEFT's own."""
    errors: dict[str, dict[str, list[float]]] = {}
    for configuration in configurations(seed, count):
        problem = configuration.problem(*dtypes)
        exact = problem.exact()
        stock = problem.run(peft_dora)
        results = {
            "pytorch": problem.yardstick(),
            "peft": stock,
            "reference": problem.ours("reference"),
            "kernels": problem.ours("triton"),
        }
        for name in exact:
            found = errors.setdefault(name, {})
            for who, tensors in results.items():
                comparison = compare(name, tensors[name], stock[name], exact[name])
                found.setdefault(who, []).append(max(comparison.error, 0.15 * comparison.ulp))
                found.setdefault(f"{who}/peft", []).append(comparison.ratio)
    rows = []
    for name, found in errors.items():
        row: dict[str, object] = {"dtype": NAMES[dtypes], "tensor": "y" if name == "y" else f"d{name}"}
        for who in ("pytorch", "peft", "reference", "kernels"):
            row[who] = geometric_mean(found[who])
            row[f"{who}_over_peft"] = geometric_mean(found[f"{who}/peft"])
            row[f"{who}_over_peft_worst"] = max(found[f"{who}/peft"])
        rows.append(row)
    return rows


RANKS = (128, 256, 384)
WAYS = ("split", "merged")
HALF = {dtypes: name for dtypes, name in NAMES.items() if dtypes[0] == dtypes[1] and dtypes[0].itemsize == 2}


def measure_ways(seed: int, count: int, dtypes: tuple[torch.dtype, torch.dtype], R: int) -> list[dict[str, object]]:
    """A row for each tensor: geometric means of the errors of PyTorch and of the kernels each way, all at rank R."""
    errors: dict[str, dict[str, list[float]]] = {}
    for drawn in configurations(seed, count):
        problem = dataclasses.replace(drawn, M=96, N=256, K=512, R=R, bias=True).problem(*dtypes)
        exact = problem.exact()
        results = {"pytorch": problem.yardstick()} | {way: problem.ours("triton", way) for way in WAYS}
        for who, tensors in results.items():
            for name, value in tensors.items():
                errors.setdefault(name, {}).setdefault(who, []).append(rms_error(value, exact[name]))
    return [
        {"dtype": HALF[dtypes], "R": R, "tensor": "y" if name == "y" else f"d{name}"}
        | {who: geometric_mean(values) for who, values in found.items()}
        for name, found in errors.items()
    ]


@outputs.command("measure_errors")
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0."""
    parser = argparse.ArgumentParser(prog="tools/measure_errors.py", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=2468, help="of the configurations (default: %(default)s)")
    parser.add_argument("--configurations", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--ways", action="store_true", help="the kernels each way at high ranks, in half precision")
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>/errors.json, or errors-by-way.json")
    arguments = parser.parse_args(argv)
    device = torch.device(DEVICE)
    name = "errors-by-way.json" if arguments.ways else "errors.json"
    out = arguments.out or machine.ROOT / "bench" / "results" / machine.device_folder(device) / name
    outputs.claim("measure_errors", out)
    information = machine.meta(device) | {"seed": arguments.seed, "configurations": arguments.configurations}
    rows: list[dict[str, object]] = []
    for dtypes, name in (HALF if arguments.ways else NAMES).items():
        if arguments.ways:
            for R in RANKS:
                rows += measure_ways(arguments.seed, arguments.configurations, dtypes, R)
        else:
            rows += measure(arguments.seed, arguments.configurations, dtypes)
        print(name, flush=True)
    report.write(out, information, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
