"""A pretended H100 for machines without a GPU: torch and the package see "cuda:0", and the host computes.

    python -m pytest -p tools.pretended_gpu.plugin tests/test_ops.py       # or: make test-pretended-gpu
    python -m tools.pretended_gpu --idle tools/gpu_suite.py --plan first   # any script, or: -m bench.kernels

What it shows before a GPU does: tests and code that hold on the CPU alone. Tensors on two devices, a kernel that gets
a host tensor, float64 kernels, a wait inside a capture and Triton's interpreter for CPU tensors are refused as there;
autocast has CUDA's lists of operators, backward its own thread, memory is counted, aligned and poisoned. The package
chooses tile configurations, parts of sums and precisions as on an H100, and Triton's interpreter runs those kernels.

With --idle nothing is computed at all, except by the tests that a script starts: results have the right shapes, and are
zero. So a script that would take a host hours runs from beginning to end, and shows how it is put together.

What it cannot show: speed, races, rounding on tensor cores, whatever a compiler for a GPU does. A CUDA graph's replay
does nothing, streams are one, and clocks are the host's: a number measured under it is no measurement, and the card's
name says so ("Pretended ..."). Not for torch.compile, whose kernels would be for a real one.

How: backend.cpp puts operators on PyTorch's CUDA key (library.py builds it with g++), cuda.py answers in place of
torch.cuda, gemm.py in that of the one kernel in Gluon, and an import hook starts them with the first `import torch`.
Processes that are started meanwhile inherit it through PYTHONPATH (inherited/sitecustomize.py), but for those with
CUDA_VISIBLE_DEVICES="", which see no GPU.
"""

import importlib.abc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from tools.pretended_gpu import library

ROOT = Path(__file__).resolve().parent.parent.parent
# Libraries with kernels of their own: the first loads one for the driver, the second measures the card for minutes.
ELSEWHERE = ("bitsandbytes", "lycoris")
INHERITED = Path(__file__).resolve().parent / "inherited"


def start() -> None:
    """Pretend a GPU in this process and those that it starts; once, before torch is imported.

    With TRITON_INTERPRET=0 kernels are compiled ahead of time and cannot be launched.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if "torch" in sys.modules:
        raise RuntimeError("pretended_gpu: torch is imported already; expected to be started before")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    paths = [str(INHERITED), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))
    os.environ["PYTEST_PLUGINS"] = "tools.pretended_gpu.plugin"
    sys.meta_path.insert(0, _Finder())
    for name in ELSEWHERE:
        sys.modules[name] = None  # cannot be imported


def _torch_imported(torch: ModuleType) -> None:
    from tools.pretended_gpu import cuda

    cuda.answer(torch)


def _interpreter_imported(interpreter: ModuleType) -> None:
    """A kernel that is given a host tensor refuses it; what the interpreter does with tensors nobody sees."""
    from torch.utils._python_dispatch import _disable_current_modes

    run = interpreter.InterpretedFunction.run

    def checked(self, *arguments, **keywords):
        for tensor in _tensors([*arguments, *keywords.values()]):
            if not tensor.is_cuda and tensor.numel():
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        if library.is_idle():
            return None
        with library.inside(), _disable_current_modes():
            return run(self, *arguments, **keywords)

    interpreter.InterpretedFunction.run = checked


def _tensors(values):
    """Every tensor in nested tuples and lists."""
    import torch

    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value


def _devices_imported(devices: ModuleType) -> None:
    """The package takes the interpreter for a compiler: host tensors are none of its business."""

    def interpreting() -> bool:
        return False

    interpreting.cache_clear = lambda: None
    devices.interpreting = interpreting


def _launch_imported(launch: ModuleType) -> None:
    from tools.pretended_gpu import gemm

    gemm.answer(launch)


class _Finder(importlib.abc.MetaPathFinder):
    """Has something done as soon as a module is imported; the others find it."""

    before: dict[str, Callable[[str], None]] = {"torch": library.load}
    after: dict[str, Callable[[ModuleType], None]] = {
        "torch": _torch_imported,
        "triton.runtime.interpreter": _interpreter_imported,
        "dora_kernels.planning.devices": _devices_imported,
        "dora_kernels.kernels.hopper.launch": _launch_imported,
    }

    def find_spec(self, name, path=None, target=None):
        if name not in self.after:
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, specs), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                self.before.get(name, lambda origin: None)(spec.origin)
                execute(module)
                self.after[name](module)

            spec.loader.exec_module = exec_module
        return spec
