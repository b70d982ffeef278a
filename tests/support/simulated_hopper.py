"""Whole layers through the launcher of the GEMM for Hopper and the simulated kernel, on CPU tensors."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from dora_kernels.kernels.hopper import launch
from dora_kernels.planning import devices
from tests.support.gluon_gemm import SOURCE
from tests.support.gluon_simulator import Simulator
from tests.support.gluon_values import Descriptor

# as many as leave some beside a side, and fewer than there are tiles
MULTIPROCESSORS = 7


class SimulatedKernel:
    """gemm_kernel as a launch plan takes one. launches: for each the tensors that it had, by name, and its programs."""

    def __init__(self, seed: int, source: str) -> None:
        self.seed, self.source = seed, source
        self.signature = inspect.signature(Simulator().load(source).gemm_kernel)
        self.arg_names = list(self.signature.parameters)
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            (programs,) = grid
            named = self.signature.bind(*arguments, **constants)
            tensors = {name: value.base for name, value in named.arguments.items() if isinstance(value, Descriptor)}
            self.launches.append(tensors | {"programs": programs})
            simulator = Simulator(num_warps, maxnreg)
            kernel = simulator.load(self.source).gemm_kernel
            simulator.launch(kernel, programs, self.seed + len(self.launches), *named.args)

        return run


@contextlib.contextmanager
def simulated_hopper(seed: int = 0, source: str = SOURCE) -> Iterator[SimulatedKernel]:
    """Inside, the CPU has MULTIPROCESSORS for which the GEMM is built, and its launches are simulated."""
    kernel = SimulatedKernel(seed, source)
    facts_of = devices.device_facts
    facts = devices.DeviceFacts("cpu", "interpreter", MULTIPROCESSORS)
    with (
        mock.patch.object(launch, "why_not_gluon", lambda: None),
        mock.patch.object(launch, "kernel", lambda: kernel),
        mock.patch.object(launch, "descriptor", Descriptor),
        mock.patch.object(devices, "device_facts", lambda device: facts if device.type == "cpu" else facts_of(device)),
    ):
        yield kernel
