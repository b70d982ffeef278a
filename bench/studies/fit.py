"""Fit the constants of costs.py to what was measured, on half of the shapes; judge them on the other half.

    python -m bench.studies.fit nvidia-h200                   # reads bench/results/nvidia-h200/{kernels,layer}.json
    python -m bench.studies.fit some-card --target sm_120

Prints the constants of costs.Device, and of the shapes that were not fitted to: how many steps are predicted within
25%, and how often the planner picks the faster way of a forward pass. The same for the constants in use.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.lib.machine import ROOT
from bench.lib.roof import planned_cost, shape_of
from bench.lib.shapes import PRECISIONS, LayerCase
from dora_kernels.planning import costs, plan

WITHIN = 0.25
# the share of the misfit that a step has to mend: else a cache that bounds nothing would be fitted to be infinite
CLEARLY = 1e-3
BY_LIBRARY = {"base", "dx", "low", "outer_product"}
CONSTANTS = [field.name for field in dataclasses.fields(costs.Device) if field.type is float]
Rows = list[dict[str, Any]]


def case_of(row: dict[str, Any]) -> LayerCase:
    """The case of a row of kernels.json or layer.json."""
    return LayerCase(row["M"], row["N"], row["K"], row["R"], row["precision"])


def halves(rows: Rows) -> tuple[Rows, Rows]:
    """(to fit, to judge): every second case goes to either half, so that no case is in both."""
    cases = list(dict.fromkeys(map(case_of, rows)))
    fitted = set(cases[::2])
    return [row for row in rows if case_of(row) in fitted], [row for row in rows if case_of(row) not in fitted]


def measured_steps(rows: Rows) -> Rows:
    """The rows of kernels.json that costs.py predicts: our kernels, and the products that may be the library's."""
    return [row for row in rows if row["ms"] and (row["by"] == "kernel" or row["kernel"] in BY_LIBRARY)]


def predicted_seconds(row: dict[str, Any], device: costs.Device) -> float:
    """The time that costs.py predicts for a row of kernels.json."""
    case = case_of(row)
    return planned_cost(row["kernel"], case, device, row["by"]).seconds(shape_of(case), device)


def misfit(rows: Rows, device: costs.Device) -> list[float]:
    """|log(predicted / measured)| of each row."""
    return [abs(math.log(1e3 * predicted_seconds(row, device) / row["ms"]["median"])) for row in rows]


def fit(rows: Rows, start: costs.Device) -> costs.Device:
    """The constants with the smallest mean misfit: each in turn by steps that shrink from 1.5 to 1.01.

    The mean of absolute logarithms, so that one outlier counts as one row. What no row clearly depends on stays.
    """

    def cost(device: costs.Device) -> float:
        return statistics.fmean(misfit(rows, device))

    best, least = start, cost(start)
    factor = 1.5
    while factor > 1.01:
        improved = False
        for name in CONSTANTS:
            for scale in (factor, 1 / factor):
                tried = dataclasses.replace(best, **{name: scale * getattr(best, name)})
                if cost(tried) < (1 - CLEARLY) * least:
                    best, least, improved = tried, cost(tried), True
        if not improved:
            factor = math.sqrt(factor)
    return best


def share_within(rows: Rows, device: costs.Device) -> float:
    """The share of rows whose prediction is within WITHIN of the measurement."""
    close = [abs(1e3 * predicted_seconds(row, device) / row["ms"]["median"] - 1) <= WITHIN for row in rows]
    return statistics.fmean(close)


def choices(rows: Rows, device: costs.Device) -> list[bool]:
    """For each forward pass of layer.json without gradients: whether plan.py picks the way measured faster.

    A pick that is within 3% of the faster way is right: that is what two runs of one of them differ by.
    """
    times: dict[LayerCase, dict[str, float]] = {}
    for row in rows:
        if row["step"] == "inference" and row["ok"] and row["provider"] in ("ours_split", "ours_merged"):
            clock = row["graph_ms"] or row["ms"]
            times.setdefault(case_of(row), {})[row["provider"].removeprefix("ours_")] = clock["median"]
    right = []
    for case, ways in times.items():
        precision = PRECISIONS[case.precision]
        shape = costs.Shape(case.M, case.N, case.K, case.R, precision.dtype.itemsize)
        wider = precision.adapter_dtype != precision.dtype and not precision.autocast
        if len(ways) == 2:
            picked = plan.forward_way("auto", True, shape, device, needs_base=False, adapters_are_wider=wider)
            right.append(ways[picked] <= 1.03 * min(ways.values()))
    return right


def verdict(name: str, device: costs.Device, steps: Rows, layers: Rows) -> str:
    """One line: what the constants predict of rows that they were not fitted to."""
    right = choices(layers, device)
    ways = f"{sum(right)} of {len(right)} ways" if right else "no ways measured"
    return f"{name}: {100 * share_within(steps, device):.0f}% of {len(steps)} steps within 25%, {ways} right"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 where there are no kernel measurements."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.fit", description=__doc__.partition("\n")[0])
    parser.add_argument("device", help="a folder of --results")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--target", choices=costs.DEVICES, help="whose constants are in use (default: the card's)")
    arguments = parser.parse_args(argv)
    folder = arguments.results / arguments.device
    steps = measured_steps(_rows(folder / "kernels.json"))
    if len({case_of(row) for row in steps}) < 2:
        expected = "expected a run of bench.kernels"
        message = f"bench.studies.fit: {folder}/kernels.json has fewer than two measured cases; {expected}"
        print(message, file=sys.stderr)
        return 2
    layers = _rows(folder / "layer.json")
    fitted_steps, judged_steps = halves(steps)
    _, judged_layers = halves(layers) if layers else ([], [])
    card = json.loads((folder / "kernels.json").read_text()).get("meta", {}).get("device")
    before = costs.DEVICES[arguments.target or (card if card in costs.DEVICES else "sm_90")]
    after = fit(fitted_steps, before)
    print(f"replace(device, {', '.join(f'{name}={getattr(after, name):.3g}' for name in CONSTANTS)})")
    print(verdict("in use", before, judged_steps, judged_layers))
    print(verdict("fitted", after, judged_steps, judged_layers))
    return 0


def _rows(path: Path) -> Rows:
    return json.loads(path.read_text())["rows"] if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
