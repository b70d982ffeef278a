"""Measure the errors of ours, plain PyTorch and PEFT against float64, into bench/results/<device>/errors.json.

    python tools/measure_errors.py --seed 2468 --configurations 200
    python -m bench.figures                                  # the table in docs/correctness.md, from that file

Random layers, lora_B not zero and gains spread over 0.5 to 1.5 (tests/support/parity_ratios.py). On a CPU the kernels
run in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from dora_kernels.planning import devices  # noqa: E402

if not torch.cuda.is_available():
    devices.interpret_on_cpu()  # before anything that imports triton, as peft does

from bench.lib import machine, report  # noqa: E402
from dora_kernels.testing import compare, geometric_mean  # noqa: E402
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


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0."""
    parser = argparse.ArgumentParser(prog="tools/measure_errors.py", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=2468, help="of the configurations (default: %(default)s)")
    parser.add_argument("--configurations", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>/errors.json")
    arguments = parser.parse_args(argv)
    device = torch.device(DEVICE)
    out = arguments.out or machine.ROOT / "bench" / "results" / machine.device_folder(device) / "errors.json"
    information = machine.meta(device) | {"seed": arguments.seed, "configurations": arguments.configurations}
    rows: list[dict[str, object]] = []
    for dtypes, name in NAMES.items():
        rows += measure(arguments.seed, arguments.configurations, dtypes)
        print(name, flush=True)
    report.write(out, information, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
