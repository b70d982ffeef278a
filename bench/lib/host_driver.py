"""An H100 that is not there: Triton's own JIT and launcher for sm_90 over a driver that launches nothing.

What is real: compilation, dispatch and specialisation of every launch, Triton's launcher in C, and the package's code.
What is not: libcuda.so.1 (host_driver.c, built here with gcc), and so the device. CPU tensors stand for the device's:
the launcher takes their pointers, torch's operators on them are the CPU's. Where the package asks what a tensor's
device is, it is told of the H100 (`pretended_gpu`). Left out is what torch.cuda takes to tell Triton the device and the
stream, well below a microsecond a launch. For a process of its own: a driver, once loaded, stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import pathlib
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import triton
import triton.backends.nvidia.driver as nvidia

import dora_kernels
from dora_kernels import passes
from dora_kernels.planning import costs, devices, plan

H100 = devices.DeviceFacts("an H100 that is not there", "sm_90", 132)
SOURCE = pathlib.Path(__file__).with_name("host_driver.c")


def why_not() -> str:
    """The reason that nothing can be measured here; "" where it can."""
    if devices.interpreting():
        return "TRITON_INTERPRET is set, and the interpreter launches nothing; expected it unset"
    if shutil.which("gcc") is None:
        return "gcc is not there; expected it, to build a driver that launches nothing, and Triton's launcher"
    return ""


class Driver:
    """The driver that launches nothing, built, loaded and made Triton's.

    Triton finds by its name, libcuda.so.1, what is loaded already. What it compiles and caches meanwhile is what it
    would compile beside NVIDIA's driver.
    """

    def __init__(self) -> None:
        # kept as long as the driver: Triton 3.6 links a launcher for each kernel against the file
        self._folder = tempfile.TemporaryDirectory(prefix="dora_kernels_driver_")
        library = pathlib.Path(self._folder.name, "libcuda.so.1")
        include = pathlib.Path(nvidia.__file__).with_name("include")
        flags = ["-O2", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", f"-I{include}"]
        subprocess.run(["gcc", *flags, str(SOURCE), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        if ctypes.CDLL(library.name)._handle != loaded._handle:  # as Triton's launcher looks for it
            raise RuntimeError("another libcuda.so.1 is loaded; expected none in this process so far")
        self._launches_so_far = loaded.launches_so_far
        self._launches_so_far.restype = ctypes.c_long
        self._start_counting, self._stop_counting = loaded.start_counting, loaded.stop_counting
        self.decode_nothing = loaded.decode_nothing
        triton.knobs.nvidia.libcuda_path = self._folder.name

        driver = nvidia.CudaDriver()
        # what torch.cuda would be asked for
        driver.get_current_device = lambda: 0
        driver.get_current_stream = lambda device: 0
        driver.get_device_capability = lambda device: (9, 0)
        triton.runtime.driver.set_active(driver)

    def launches(self, step: Callable[[], object]) -> int:
        """The Triton kernels that one call of `step` launches."""
        before = self._launches_so_far()
        step()
        return self._launches_so_far() - before

    def count_instructions(self, step: Callable[[], object], calls: int, name: str) -> None:
        """Call `step` so often; under callgrind the instructions are written under `name`."""
        self._start_counting()
        for _ in range(calls):
            step()
        self._stop_counting(name.encode())


@functools.cache
def loaded() -> Driver:
    """The driver of this process: once loaded it stays."""
    return Driver()


@contextlib.contextmanager
def pretended_gpu(planned: costs.Shape) -> Iterator[None]:
    """Inside, calls with CPU tensors go to the Triton kernels as calls with an H100's would.

    planned: the sizes that the planner is told. The tensors are tiny, so that torch's operators on the CPU cost their
    dispatch and no more; the ways and the launches are to be those of a real layer.
    """

    def shape_of(*tensors: object) -> costs.Shape:
        own_shape(*tensors)  # its time is part of a call
        return planned

    def asked_of(own: Callable[..., bool]) -> Callable[..., bool]:
        """plan.project_by_kernel or outer_by_kernel, told the planned number of rows and their length."""
        return lambda M, K, *rest, **named: own(planned.M, planned.K, *rest, **named)

    own_shape, device_model = costs.Shape.of, passes._device_model
    on_gpu = types.SimpleNamespace(device=torch.device("cuda", 0))
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (devices, "device_facts", functools.cache(lambda device: H100)),
            (passes, "_device_model", lambda tensor: device_model(on_gpu)),
            (costs.Shape, "of", staticmethod(shape_of)),
            (plan, "project_by_kernel", asked_of(plan.project_by_kernel)),
            (plan, "outer_by_kernel", asked_of(plan.outer_by_kernel)),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        # "auto" takes the reference for CPU tensors before it looks at their device's facts
        stack.enter_context(dora_kernels.options(backend="triton"))
        _forget_choices()
        stack.callback(_forget_choices)
        yield


def _forget_choices() -> None:
    """Clear every cache of the package: a choice made for tensors of the same sizes was made for others."""
    for name, package in list(sys.modules.items()):
        if name.partition(".")[0] == "dora_kernels":
            for value in list(vars(package).values()):
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()
