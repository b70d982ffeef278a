"""Launches of kernels that are compiled already, without Triton's JIT.

A launcher finds its `LaunchPlan` first: what sizes, dtypes and strides decide, chosen once (`planned`). Which compiled
kernel a launch takes, the arguments decide: Triton's JIT works it out in 9 to 16 us. A plan keeps the kernel that it
found, under all that the JIT looks at (`_reader`), and calls it directly from then on, in 1.0 to 1.3 us.
"""

import functools
import importlib.metadata
import itertools
import typing
from collections.abc import Callable, Iterable, Sequence
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
PLANS, KEPT, NUMBERS = 4096, 64, 1 << 16

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
        # types of arguments -> the functions that read them, and for each what it reads -> the kernel that is launched
        self._kept: dict[tuple[type, ...], list[tuple[Callable[..., Any], dict[tuple, tuple]]]] = {}

    def launch(self, grid: tuple[int, ...], *arguments: Any, side: Any = None) -> None:
        """Launches the kernel, on the current stream or, by a Side (side.py), on that of the side. Of a tensor it gets
        the pointer where the parameter's name ends in _ptr, else a Matrix or a Vector; so does a field of a tuple that
        is a Matrix by its annotation.
        """
        if side is not None:
            side.launch(self, grid, arguments)  # comes back, on its stream
            return
        if _is_observed(self.kernel):
            self._launch_by_jit(grid, arguments)
            return
        for reader in self._kept.get(tuple(map(type, arguments)), ()):
            found = reader[0](*arguments)
            if found is not None:
                break
        else:
            reader = self._keep_reader(arguments)
            found = reader[0](*arguments)
            if found is None:
                self._launch_by_jit(grid, arguments)
                return
        (key, values), kernels = found, reader[1]
        active = triton.runtime.driver.active
        device = active.get_current_device()
        kept = kernels.get((active, device, key))
        if kept is None:
            self._keep(kernels, (active, device, key), self._launch_by_jit(grid, arguments))
            return
        run, function, metadata, constants = kept
        programs_1 = grid[1] if len(grid) > 1 else 1
        stream = active.get_current_stream(device)
        run(grid[0], programs_1, 1, stream, function, metadata, None, None, None, *values, *constants)

    def _launch_by_jit(self, grid: tuple[int, ...], arguments: tuple) -> Any:
        """The compiled kernel, launched; None from the interpreter, which has none."""
        return self.kernel[grid](*_as_written(arguments, self._strided), **self.constants)

    def _keep_reader(self, arguments: tuple) -> tuple[Callable[..., Any], dict[tuple, tuple]]:
        """A reader and its kernels, as in _kept, of arguments whose types are new, if only in their tuples."""
        read = _reader(arguments, self._strided)
        if read is None:
            return _NOTHING_KEPT
        types = tuple(map(type, arguments))
        others = self._kept.get(types, [])
        kept: tuple[Callable[..., Any], dict[tuple, tuple]] = (read, {})
        _put(self._kept, types, [*others[-KEPT + 1 :], kept])
        return kept

    def _keep(self, kernels: dict[tuple, tuple], key: tuple, compiled: Any) -> None:
        if type(compiled) is CompiledKernel:  # else a hook of Triton's has kept it from being compiled
            constants = tuple(self.constants[name] for name in self.kernel.arg_names if name in self.constants)
            _put(kernels, key, (compiled.run, compiled.function, compiled.packed_metadata, constants))


def _put(kept: dict, key: tuple, value: Any) -> None:
    if len(kept) >= KEPT and key not in kept:
        kept.clear()
    kept[key] = value


def _is_observed(kernel: Any) -> bool:
    """True where a launch is to go through Triton's JIT: somebody looks on there, or has it compile something else.

    What Triton reads from the environment while it compiles is as it was at the first launch, as for the JIT itself.
    """
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        type(kernel) is not jit.JITFunction  # the interpreter's
        or _version not in KNOWN_VERSIONS
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


def _reader(arguments: tuple, strided: Sequence[bool]) -> Callable[..., tuple[tuple, tuple] | None] | None:
    """A function of arguments of the types of these, or None where one is of a type that is not known here.

    It returns (key, values): all that the JIT specialises a kernel on, and the arguments as the compiled kernel takes
    them, pointers as numbers; or None where a tuple among them has others in it. It is written out, as the JIT's own
    is: a loop over the arguments takes twice as long.
    """
    lines: list[str] = []
    key: list[str] = []
    known: dict[str, Any] = {"classes": _classes}

    def read(name: str, argument: Any, with_strides: bool) -> str:
        """The value of an argument; adds what makes it, and what of it belongs to the key."""
        kind = type(argument)
        if kind is torch.Tensor or kind is torch.nn.Parameter:  # no subclass: it could have a data_ptr of its own
            lines.append(f"{name}_pointer = {name}.data_ptr()")
            # the device, too: Triton's launcher looks up where a tensor's memory is, but not a number's
            key.extend((f"{name}.dtype", f"{name}.device", f"{name}_pointer & 15"))
            if _ASKS_FOR_STORAGES:
                key.append(f"{name}.untyped_storage().size() < 1 << 31")
            if not with_strides:
                return f"{name}_pointer"
            lines.append(f"{name}_strides = {name}.stride()")
            key.append(f"{name}_strides")
            return f"({name}_pointer, *{name}_strides[-2:])"
        if kind is int:
            key.append(f"classes[{name}]")
        elif isinstance(argument, tuple):
            known[f"{name}_types"] = tuple(map(type, argument))
            lines.append(f"if tuple(map(type, {name})) != {name}_types: return None")
            names = [f"{name}_{place}" for place in range(len(argument))]
            lines.append(f"[{', '.join(names)}] = {name}")
            return _listed(map(read, names, argument, _strided_fields(kind)))
        elif argument is not None and kind is not float:
            raise TypeError
        return name

    names = [f"a{place}" for place in range(len(arguments))]
    try:
        values = _listed(map(read, names, arguments, strided))
    except TypeError:
        return None
    exec(f"def function({', '.join(names)}):\n  " + "\n  ".join([*lines, f"return {_listed(key)}, {values}"]), known)
    return known["function"]


def _listed(expressions: Iterable[str]) -> str:
    """The expression of a tuple."""
    return f"({''.join(f'{one}, ' for one in expressions)})"


_NOTHING_KEPT: tuple[Callable[..., None], dict] = (lambda *arguments: None, {})


def _as_written(arguments: tuple, strided: Iterable[bool]) -> list:
    """The arguments as the kernel is written for them, for the JIT and for the interpreter."""
    return list(map(_argument, arguments, strided))


def _argument(argument: Any, with_strides: bool) -> Any:
    if isinstance(argument, torch.Tensor) and with_strides:
        return matrix(argument) if argument.dim() > 1 else vector(argument)
    if isinstance(argument, tuple):
        parts = _as_written(argument, _strided_fields(type(argument)))
        return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
    return argument


@functools.cache
def _strided_fields(kind: type) -> Iterable[bool]:
    """For each field of a tuple, whether a kernel takes it as a Matrix."""
    if not hasattr(kind, "_fields"):
        return itertools.repeat(False)
    return [hint is Matrix for hint in typing.get_type_hints(kind).values()]


class _Classes(dict[int, str]):
    """A number -> what the JIT sees of it: its type, and whether it is 1 or a multiple of 16."""

    def __missing__(self, number: int) -> str:
        if len(self) >= NUMBERS:
            self.clear()
        self[number] = found = str(jit.native_specialize_impl(jit.BaseBackend, number, False, True, True))
        return found


_classes = _Classes()
