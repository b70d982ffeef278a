"""Measurements of a step in bench.host: launches, process time, our launchers one by one, and a profile."""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import pathlib
import pstats
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from bench.lib import host_instructions
from bench.lib.host_cases import CASES, parts
from bench.lib.host_driver import Driver
from bench.lib.host_layers import CALLS, OURS, Key, planned, prepared
from bench.lib.host_tables import launcher_table, table
from bench.lib.machine import meta
from bench.lib.measure import Step, interleave
from bench.lib.report import aligned, write
from dora_kernels import kernels, ops
from dora_kernels.types import Steps

ROUNDS = (5, 400)  # the fewest and the most
PROFILED = 40  # functions
LAUNCHERS_OF = ("bf16", "bf16-autocast")
"""The cases whose launchers are measured one by one."""
NOTE = """Over a driver that launches nothing, with the CPU's dispatch in CUDA's place: compare ratios, and add about
2.5 us per launch, Triton's and the library's."""


class _Operators(TorchDispatchMode):
    """Counts torch's operators that would start a kernel on a GPU: all but views and allocations."""

    FREE = ("detach", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name, result = operator._schema.name.removeprefix("aten::"), operator(*args, **(kwargs or {}))
        results = result if isinstance(result, (list, tuple)) else (result,)
        writes = any(isinstance(tensor, Tensor) for tensor in results)  # promote_types, say, does not
        if writes and not operator.is_view and name not in self.FREE:
            self.names.append(name)
        return result


def library_launches(step: Step) -> list[str]:
    """The names of torch's operators in a call of `step` that would start a kernel on a GPU."""
    with contextlib.ExitStack() as stack:
        # our operators are opaque to torch; their code is not
        for name in ops.OPERATORS:
            stack.enter_context(mock.patch.object(ops, name, ops.OPERATORS[name]))
        operators = stack.enter_context(_Operators())
        step()
    return operators.names


def stopwatch(step: Step, calls: int = CALLS) -> Callable[[], float]:
    """The process time of a call, in milliseconds, over so many calls."""
    start = time.process_time()
    for _ in range(calls):
        step()
    elapsed = 1e3 * (time.process_time() - start) / calls
    return lambda: elapsed


def measure(steps: dict[Key, Step], driver: Driver, seconds: float, calls: int = CALLS) -> list[dict[str, Any]]:
    """A row for each step: its launches, and its time in interleaved rounds, so many calls in a reading."""
    rows = {
        key: {"provider": key[0], "step": key[1], "triton": driver.launches(step), "library": library_launches(step)}
        for key, step in steps.items()
    }
    for key, timing in interleave(steps, functools.partial(stopwatch, calls=calls), seconds, ROUNDS).items():
        rows[key] |= {"us": 1e3 * timing.median, "least_us": 1e3 * timing.minimum, "readings": timing.runs}
    return list(rows.values())


def measure_launchers(step: Step, driver: Driver, seconds: float) -> list[dict[str, Any]]:
    """A row for each of our launchers in `step`: its own time, and for comparison that of the same launches by Triton's
    JIT, and of their compiled kernels alone.
    """
    rows, calls, launchers = [], {}, _launchers(step)
    with torch.no_grad():  # as in our operators
        for place, (name, launcher) in enumerate(launchers):
            jit, compiled = _launches(launcher)
            rows.append({"launcher": name, "launches": driver.launches(launcher)})
            if {driver.launches(jit), driver.launches(compiled)} != {rows[place]["launches"]}:
                raise RuntimeError(
                    f"bench.host: {name} launched kernels that were not seen; expected all by Triton's JIT"
                )
            calls |= {(place, "us"): launcher, (place, "jit_us"): jit, (place, "kernel_us"): compiled}
        for (place, what), timing in interleave(calls, stopwatch, seconds, ROUNDS).items():
            rows[place][what] = 1e3 * timing.median
    return [row for row in rows if row["launches"]]


def _launchers(step: Step) -> list[tuple[str, Step]]:
    """The calls of our launchers in `step`, to be repeated."""
    calls: list[tuple[str, Step]] = []

    def recorded(name: str, launcher: Callable) -> Callable:
        def call(*args, **kwargs):
            calls.append((name, functools.partial(launcher, *args, **kwargs)))
            return launcher(*args, **kwargs)

        return call

    steps = Steps(**{name: recorded(name, launcher) for name, launcher in kernels.KERNELS._asdict().items()})
    with mock.patch.object(kernels, "KERNELS", steps):
        step()
    return calls


def _launches(launcher: Step) -> tuple[Step, Step]:
    """The launches of a launcher's call without the launcher: through Triton's JIT, and of the compiled kernels.

    Launches that otherwise go past the JIT are made by it while its `run` is another one (kernels/launches.py).
    """
    runs: list[Step] = []
    compiled: list[Step] = []
    run = JITFunction.run

    def record(self, *args, **kwargs):
        kernel = run(self, *args, **kwargs)
        runs.append(functools.partial(run, self, *args, **kwargs))
        constants = {name: value for name, value in kwargs.items() if name in self.arg_names}
        bound = self.signature.bind(*args, **constants).arguments.values()
        grid, stream, hooks = (*kwargs["grid"], 1, 1)[:3], 0, (None, None, None)
        known = (kernel.function, kernel.packed_metadata)
        compiled.append(functools.partial(kernel.run, *grid, stream, *known, *hooks, *bound))
        return kernel

    with mock.patch.object(JITFunction, "run", record):
        launcher()
    return lambda: [call() for call in runs], lambda: [call() for call in compiled]


def profile(step: Step, calls: int = 300) -> str:
    """The functions that take most of a step's time, callees included, a line each.

    The profiler's own time is included; functions that make many small calls have more of it.
    """
    profiler = cProfile.Profile()
    with profiler:
        for _ in range(calls):
            step()
    stats = pstats.Stats(profiler).stats.items()
    lines = [("us", "without callees", "times called", "function")]
    for (path, line, name), (_, times, own, total, _) in sorted(stats, key=lambda item: -item[1][3])[:PROFILED]:
        where = f"{name} ({'/'.join(pathlib.Path(path).parts[-2:])}:{line})" if line else name
        lines.append((f"{1e6 * total / calls:.0f}", f"{1e6 * own / calls:.1f}", f"{times / calls:g}", where))
    width = max(len(where) for *_, where in lines)
    return "\n".join(aligned([(*numbers, where.ljust(width)) for *numbers, where in lines]))


def run(arguments: argparse.Namespace, driver: Driver) -> None:
    """Measure, write and print."""
    torch.set_num_threads(1)
    rows, launchers, profiles = [], [], []
    share = arguments.seconds / (len(parts(arguments.case)) + len(set(LAUNCHERS_OF) & set(arguments.case)))
    for name, kind in parts(arguments.case):
        case, shape = CASES[name], planned(kind, arguments.tokens)
        with prepared(case, kind, arguments.provider, shape) as steps:
            of = {"case": name, "planned": shape._asdict()}
            rows += [of | row for row in measure(steps, driver, share, case.calls)]
            ours = {who: call for (who, step), call in steps.items() if who in OURS and step == "forward+backward"}
            if name in LAUNCHERS_OF and "dora_linear" in ours:
                launchers += [of | row for row in measure_launchers(ours["dora_linear"], driver, share)]
            if arguments.profile:
                profiles += [f"{name}, {who}, forward+backward:\n{profile(call)}" for who, call in ours.items()]
    notes = [NOTE]
    if arguments.instructions:
        notes.append(host_instructions.why_not())
        counts = {} if notes[-1] else host_instructions.count(arguments.case, arguments.provider, arguments.tokens)
        for row in rows:
            row["instructions"] = counts.get((row["case"], row["provider"], row["step"]))
    write(arguments.out, meta(torch.device("cpu")) | {"launchers": launchers}, rows)
    printed = [*profiles, table(rows), launcher_table(launchers), *notes, f"-> {arguments.out}"]
    print(*filter(None, printed), sep="\n\n")
