"""The cost of a backward pass with some of its steps beside dx, on the few multiprocessors that our GEMM leaves free.

Predictions, as all of costs.py. Beside dx a step costs nothing until it takes longer than dx does.
"""

from dataclasses import replace

from dora_kernels.planning import costs
from dora_kernels.planning.costs import Device, Shape
from dora_kernels.planning.measured import BESIDE
from dora_kernels.planning.tiles import GEMMS, PROGRAMS_BESIDE


def fastest_beside(shape: Shape, device: Device) -> str:
    """The name in BESIDE of what is to run beside dx: "none" where the GEMM is not ours, or has nothing to do."""
    if device.facts.name == "cpu" or device.facts.target not in GEMMS or min(shape[:4]) == 0:
        return "none"
    times = beside_seconds(shape, device)
    return min(times, key=lambda name: times[name])


def beside_seconds(shape: Shape, device: Device) -> dict[str, float]:
    """The time of dx through a merged weight and of the sums over the tokens, by what runs beside dx: of BESIDE."""
    M, N, K = shape[:3]
    side = side_of(device)
    alone = {step: costs.seconds(made, shape, device) for step, made in costs.sum_costs(shape, device).items()}
    aside = {step: costs.seconds(made, shape, side) for step, made in costs.sum_costs(shape, side, "kernel").items()}
    times = {"none": costs.gemm(M, K, N, device).seconds(shape, device) + sum(alone.values())}
    dx = costs.own_gemm(M, K, N, 0, device, free=PROGRAMS_BESIDE).seconds(shape, device)
    for name, steps in BESIDE.items():
        if steps:
            rest = sum(time for step, time in alone.items() if step not in steps)
            times[name] = max(dx, sum(aside[step] for step in steps)) + rest
    return times


def side_of(device: Device) -> Device:
    """The multiprocessors beside dx as a device: what they read, from memory too, comes through the L2 cache."""
    share = PROGRAMS_BESIDE / device.facts.multiprocessors
    return replace(
        device,
        facts=replace(device.facts, multiprocessors=PROGRAMS_BESIDE),
        l2=device.side,
        matmul=share * device.matmul,
        matmul_float32=share * device.matmul_float32,
    )
