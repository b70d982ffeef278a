"""Launches of kernels that are compiled already, without Triton's JIT.

A launcher finds its `LaunchPlan` first: what sizes, dtypes and strides decide, chosen once (`planned`). Which compiled
kernel a launch takes, the arguments decide: Triton's JIT works it out in 9 to 16 us. A plan keeps the kernel that it
found, under all that the JIT looks at (`_read`), and calls it directly from then on, in 1.0 to 1.3 us.
"""

import functools
import importlib.metadata
import typing
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import jit

from dora_kernels.kernels.tile import Matrix, matrix, vector
from dora_kernels.planning.tiles import Config

# Of these it was read what JITFunction.run does, and what of an argument it specialises a kernel on.
KNOWN_VERSIONS = ("3.6", "3.7")
# Batches of any size meet the same plan and the same kernel. What else varies must not fill the memory.
PLANS, KERNELS_OF_PLAN, NUMBERS = 4096, 64, 1 << 16

_version = ".".join(importlib.metadata.version("triton").split(".")[:2])
# Triton's own, or None where another one is in its place already as this is imported.
_run = jit.JITFunction.run if jit.JITFunction.run.__code__.co_filename == jit.__file__ else None
# AMD's backend asks of each tensor whether its storage is within 2 GiB.
_ASKS_FOR_STORAGES = torch.version.hip is not None

Of = ParamSpec("Of")
Chosen = TypeVar("Chosen")
_forgetting: list[Callable[[], None]] = []


def planned(choose: Callable[Of, Chosen]) -> Callable[Of, Chosen]:
    """`choose`, which depends on its arguments alone, asked once for the same ones."""
    known = functools.lru_cache(PLANS)(choose)
    _forgetting.append(known.cache_clear)
    return known  # type: ignore[return-value]


def forget() -> None:
    """Forgets all plans, and the kernels that they keep: for who changes what their launchers choose by."""
    for clear in _forgetting:
        clear()


class LaunchPlan:
    """A kernel, its configuration, and its constants by name: all that does not change from launch to launch."""

    __slots__ = ("kernel", "config", "constants", "_strided", "_kept")

    def __init__(self, kernel: Any, config: Config | None, **constants: Any) -> None:
        self.kernel, self.config, self.constants = kernel, config, constants
        self._strided = tuple(not name.endswith("_ptr") for name in kernel.arg_names)
        self._kept: dict[tuple, tuple] = {}

    def launch(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Launches the kernel. Of a tensor it gets the pointer where the parameter's name ends in _ptr, else a Matrix
        or a Vector; so does a field of a tuple that is a Matrix by its annotation.
        """
        if _is_observed(self.kernel):
            self._launch_by_jit(grid, arguments)
            return
        active = triton.runtime.driver.active
        device = active.get_current_device()
        key: list = [active, device]
        try:
            values = _read(arguments, self._strided, key)
        except _Unknown:
            self._launch_by_jit(grid, arguments)
            return
        if _ASKS_FOR_STORAGES:
            key += _within_2_gib(arguments)
        kept = self._kept.get(tuple(key))
        if kept is None:
            self._keep(tuple(key), self._launch_by_jit(grid, arguments))
            return
        run, function, metadata, constants = kept
        programs_1 = grid[1] if len(grid) > 1 else 1
        stream = active.get_current_stream(device)
        run(grid[0], programs_1, 1, stream, function, metadata, None, None, None, *values, *constants)

    def _launch_by_jit(self, grid: tuple[int, ...], arguments: tuple) -> Any:
        """The compiled kernel, launched; None from the interpreter, which has none."""
        return self.kernel[grid](*_as_written(arguments, self._strided), **self.constants)

    def _keep(self, key: tuple, compiled: Any) -> None:
        if type(compiled) is not CompiledKernel:  # a hook of Triton's has kept it from being compiled
            return
        if len(self._kept) >= KERNELS_OF_PLAN:
            self._kept.clear()
        constants = tuple(self.constants[name] for name in self.kernel.arg_names if name in self.constants)
        self._kept[key] = compiled.run, compiled.function, compiled.packed_metadata, constants


def _is_observed(kernel: Any) -> bool:
    """True where a launch is to go through Triton's JIT: somebody looks on there, or has it compile something else.

    What Triton reads from the environment while it compiles is as it was at the first launch, as for the JIT itself.
    """
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        _version not in KNOWN_VERSIONS
        or type(kernel) is not jit.JITFunction  # the interpreter's
        or jit.JITFunction.run is not _run
        or kernel.pre_run_hooks
        or type(enter) is not knobs.HookChain
        or enter.calls
        or type(leave) is not knobs.HookChain
        or leave.calls
        or runtime.debug
        or knobs.compilation.instrumentation_mode
        or runtime.add_stages_inspection_hook
    )


class _Unknown(Exception):
    """An argument is of a type of which it is not known what the JIT specialises on."""


def _read(arguments: tuple, strided: Sequence[bool], key: list) -> list:
    """The arguments as a compiled kernel takes them, pointers as numbers; adds all that the JIT looks at to the key."""
    values: list = [*arguments]
    for place, argument in enumerate(arguments):
        kind = type(argument)
        if kind is torch.Tensor or kind is torch.nn.Parameter:  # no subclass: it could have a data_ptr of its own
            values[place] = pointer = argument.data_ptr()
            key += (argument.dtype, pointer & 15)
            if strided[place]:
                strides = argument.stride()
                key.append(strides)
                values[place] = (pointer, *strides[-2:])
        elif kind is int:
            key.append(_classes[argument])
        elif argument is None or kind is float:
            key.append(kind)
        elif isinstance(argument, tuple):
            key.append(len(argument))
            values[place] = _read(argument, _strided_fields[kind], key)
        else:
            raise _Unknown
    return values


def _within_2_gib(arguments: tuple) -> list[bool]:
    """For each tensor, in order, whether its storage is within 2 GiB."""
    found = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            found.append(argument.untyped_storage().size() < 1 << 31)
        elif isinstance(argument, tuple):
            found += _within_2_gib(argument)
    return found


def _as_written(arguments: tuple, strided: Sequence[bool]) -> list:
    """The arguments as the kernel is written for them, for the JIT and for the interpreter."""
    given: list = [*arguments]
    for place, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor) and strided[place]:
            given[place] = matrix(argument) if argument.dim() > 1 else vector(argument)
        elif isinstance(argument, tuple):
            parts = _as_written(argument, _strided_fields[type(argument)])
            given[place] = type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
    return given


class _StridedFields(dict[type, Sequence[bool]]):
    """The type of a tuple -> of each of its fields, whether a kernel takes it as a Matrix."""

    def __missing__(self, kind: type) -> Sequence[bool]:
        hints = typing.get_type_hints(kind) if hasattr(kind, "_fields") else {}
        self[kind] = found = [hint is Matrix for hint in hints.values()] or [False] * NUMBERS
        return found


class _Classes(dict[int, str]):
    """A number -> what the JIT sees of it: its type, and whether it is 1 or a multiple of 16."""

    def __missing__(self, number: int) -> str:
        if len(self) >= NUMBERS:
            self.clear()
        self[number] = found = str(jit.native_specialize_impl(jit.BaseBackend, number, False, True, True))
        return found


_strided_fields, _classes = _StridedFields(), _Classes()
