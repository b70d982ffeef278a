"""Whole layers through the launcher of the GEMM for Hopper and the simulated kernel, on CPU tensors."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from dora_kernels.kernels.hopper import launch
from dora_kernels.planning import devices
from tests.support.gluon_simulator import Descriptor, Simulator

SOURCE = Path(launch.__file__).with_name("gemm.py")
# as many as leave some beside a side, and fewer than there are tiles
MULTIPROCESSORS = 7


class SimulatedKernel:
    """gemm_kernel as a launch plan takes one. launches: for each the tensors that it had, by name, and its programs."""

    def __init__(self, seed: int) -> None:
        self.simulator, self.seed = Simulator(), seed
        self.function = self.simulator.load(SOURCE.read_text()).gemm_kernel
        self.arg_names = list(inspect.signature(self.function).parameters)
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            (programs,) = grid
            named = dict(zip(self.arg_names, arguments, strict=False))
            tensors = {name: value.base for name, value in named.items() if isinstance(value, Descriptor)}
            self.launches.append(tensors | {"programs": programs})
            kernel = functools.partial(self.function, **constants)
            self.simulator.launch(kernel, programs, self.seed + len(self.launches), *arguments)

        return run


@contextlib.contextmanager
def simulated_hopper(seed: int = 0) -> Iterator[SimulatedKernel]:
    """Inside, the CPU has MULTIPROCESSORS for which the GEMM is built, and its launches are simulated."""
    kernel = SimulatedKernel(seed)
    facts_of = devices.device_facts
    facts = devices.DeviceFacts("cpu", "interpreter", MULTIPROCESSORS)
    with (
        mock.patch.object(launch, "why_not_gluon", lambda: None),
        mock.patch.object(launch, "kernel", lambda: kernel),
        mock.patch.object(launch, "descriptor", lambda tensor, block: Descriptor(tensor.detach(), block)),
        mock.patch.object(devices, "device_facts", lambda device: facts if device.type == "cpu" else facts_of(device)),
    ):
        yield kernel
