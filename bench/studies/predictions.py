"""The predictions of the cost model for a training step on GPUs, for docs/performance.md: nothing here is measured.

python tools/roofline.py --predict        # prints the first table
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from bench.lib import tuned
from bench.lib.shapes import WAY_SHAPES
from dora_kernels.planning import costs, plan, side_costs
from dora_kernels.planning.costs import Cost, Device, Shape
from dora_kernels.planning.measured import PARTS

# costs.DEVICES has the constants of these under the driver's names
CARDS = {"H200": costs.DEVICES["NVIDIA H200"], "H100": costs.DEVICES["NVIDIA H100 80GB HBM3"]}
# seconds between two kernels of a CUDA graph, and of a stream that the host keeps filled
GAPS = {"graph": 1e-6, "eager": 4e-6}
# in bf16: M, N, K, R
SHAPES = (
    (8192, 4096, 4096, 64),
    (8192, 14336, 4096, 384),
    (8192, 8192, 8192, 64),
    (65536, 4096, 4096, 64),
    (512, 4096, 4096, 64),
)
STEPS = "norm low base epilogue prepare merge dx P dB token_sums dA dz addmm".split()
# over NF4, with a byte of scale for every 64 codes
NF4_SHAPES = ((8192, 4096, 4096, 64), (8192, 14336, 4096, 64), (8192, 4096, 14336, 64), (512, 4096, 4096, 64))
NF4_BYTES = 0.52
# of PEFT's layers: bf16 passes over (M, N), (M, K) and (N, K), and launches, beside the two products. For its norm
# QDoRA decodes the weight once more: the codes are 0.26 of a pass.
PEFT = {"QLoRA": (12, 6, 0, 12), "QDoRA": (34, 6, 10.26, 30), "QDoRA, autocast": (64, 6, 11.26, 40)}


def step_costs(shape: Shape, device: Device) -> tuple[dict[str, Cost], str]:
    """The costs of a training step in which every gradient is wanted, and how dx is made: "merged" or "dz"."""
    way = plan.dx_way("auto", shape, device)
    return costs.forward_costs(shape, "split", device) | costs.backward_costs(shape, way, device), way


def frozen_costs(shape: Shape, device: Device) -> dict[str, Cost]:
    """The costs of the two products of a frozen linear layer."""
    M, N, K = shape[:3]
    return {"base": costs.gemm(M, N, K, device), "dx": costs.gemm(M, K, N, device)}


def ratios_table() -> str:
    """A step over the frozen linear layer with each of GAPS before a launch, its launches, and how dx is made."""
    columns = [f"{card}: {column}" for card in CARDS for column in (*GAPS, "launches", "dx by")]
    lines = [f"| M, N, K, R | {' | '.join(columns)} |", "| --- " * (1 + len(columns)) + "|"]
    for sizes in SHAPES:
        shape, cells = Shape(*sizes, 2), []
        for device in CARDS.values():
            steps, way = step_costs(shape, device)
            for gap in GAPS.values():
                model = dataclasses.replace(device, launch=gap)
                frozen = costs.seconds(frozen_costs(shape, device), shape, model)
                cells.append(f"{costs.seconds(steps, shape, model) / frozen:.2f}")
            cells += [str(sum(step.launches for step in steps.values())), "W'" if way == "merged" else way]
        lines.append(f"| {', '.join(map(str, sizes))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def steps_table() -> str:
    """Microseconds of each step without its launch."""
    lines = [f"| M, N, K, R | card | {' | '.join(STEPS)} |", "| --- " * (2 + len(STEPS)) + "|"]
    for sizes in SHAPES:
        shape = Shape(*sizes, 2)
        for card, device in CARDS.items():
            graph = dataclasses.replace(device, launch=0.0)
            times = {name: 1e6 * cost.seconds(shape, graph) for name, cost in step_costs(shape, device)[0].items()}
            cells = [f"{times[name]:.{0 if times[name] >= 100 else 1}f}" if name in times else "" for name in STEPS]
            lines.append(f"| {', '.join(map(str, sizes))} | {card} | {' | '.join(cells)} |")
    return "\n".join(lines)


def nf4_table() -> str:
    """Milliseconds of a step over NF4 on an H200, Linear4bit's and PEFT's among them."""
    device, over = CARDS["H200"], (" (target 1.25)", " (target 0.6)", "")
    columns = [*PEFT, "ours", *(f"ours over {name}{target}" for name, target in zip(PEFT, over, strict=True))]
    lines = [f"| M, N, K, R | frozen | {' | '.join(columns)} |", "| --- " * (2 + len(columns)) + "|"]
    for sizes in NF4_SHAPES:
        shape = Shape(*sizes, 2, NF4_BYTES)
        M, N, K = sizes[:3]
        decoded = 2 * costs.seconds(costs.dense_costs(shape), shape, device)
        frozen = decoded + costs.seconds(frozen_costs(shape, device), shape, device)
        ours = costs.seconds(step_costs(shape, device)[0], shape, device)
        theirs = [
            frozen + 2 * (of_y * M * N + of_x * M * K + of_weight * N * K) / device.bandwidth + launches * device.launch
            for of_y, of_x, of_weight, launches in PEFT.values()
        ]
        times = [f"{1e3 * seconds:.2f}" for seconds in (frozen, *theirs, ours)]
        ratios = [f"{ours / seconds:.2f}" for seconds in theirs]
        lines.append(f"| {', '.join(map(str, sizes))} | {' | '.join((*times, *ratios))} |")
    return "\n".join(lines)


def way_seconds(shape: Shape, device: Device) -> dict[str, dict[str, float]]:
    """The time of a forward pass that keeps what it has to, and of a backward pass, by each of their ways."""
    forward = {
        "split": costs.forward_costs(shape, "split", device),
        "fused": costs.forward_costs(shape, "fused", device),
        "merged": costs.merged_forward_costs(shape, device),
    }
    merge = costs.seconds({"merge": costs.merge_cost(shape, device)}, shape, device)
    return {
        "forward": {way: costs.seconds(steps, shape, device) for way, steps in forward.items()},
        "backward": {way: merge + rest for way, rest in side_costs.beside_seconds(shape, device).items()},
    }


def ways_table(measured: Iterable[dict[str, Any]] = ()) -> str:
    """Microseconds of each way, with a gap of 1 us before a launch, and what won where bench.studies.ways measured."""
    found = {data["meta"]["device"]: data["rows"] for data in measured}
    lines = []
    for sizes in WAY_SHAPES:
        shape = Shape(*sizes, 2)
        for card, device in CARDS.items():
            times = way_seconds(shape, dataclasses.replace(device, launch=GAPS["graph"]))
            if not lines:
                columns = [f"{name}: {way}" for name, of in times.items() for way in of]
                lines = [
                    f"| M, N, K, R | card | {' | '.join(columns)} | measured |",
                    "| --- " * (3 + len(columns)) + "|",
                ]
            cells = [f"{1e6 * seconds:.0f}" for of in times.values() for seconds in of.values()]
            won = _won(found.get(device.facts.name, ()), sizes)
            lines.append(f"| {', '.join(map(str, sizes))} | {card} | {' | '.join(cells)} | {won} |")
    return "\n".join(lines)


def _won(rows: Iterable[dict[str, Any]], sizes: tuple[int, ...]) -> str:
    """The ways that won the passes of one shape; "" where nothing was measured."""
    us: dict[str, dict[str, float]] = {"forward": {}, "backward": {}}
    for row in rows:
        if tuple(row[letter] for letter in "MNKR") == sizes and row["pass"] in us and "us" in row:
            us[row["pass"]][row["way"]] = row["us"]
    of_both = {name: of for name, of in us.items() if PARTS[name][0] in of and len(of) > 1}
    return ", ".join(tuned.won(name, of) for name, of in of_both.items())
