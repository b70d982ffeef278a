"""The layers of bench.host, their steps and measurements. Import it after the driver is loaded."""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import itertools
import pathlib
import pstats
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

import dora_kernels
from bench.lib import host_driver, providers
from bench.lib.machine import meta
from bench.lib.measure import Step, interleave
from bench.lib.problem import SCALING, LayerProblem, TimedLayer
from bench.lib.report import aligned, write
from bench.lib.shapes import LayerCase
from dora_kernels import kernels, ops
from dora_kernels.planning import costs
from dora_kernels.types import Steps

# N = 256 is four steps of the kernel of P, so that two programs make its sum as at real sizes; K = 64 keeps PEFT's
# product with an identity matrix of K x K small
M, N, K, R = 16, 256, 64, 16
CALLS = 20  # in a reading: 1 to 15 ms
ROUNDS = (5, 400)  # the fewest and the most
PROFILED = 40  # functions
IN_SCOPE = " in frozen_adapters"
STEPS = {
    "training": ("forward", "forward+backward"),
    "inference": ("inference", f"inference{IN_SCOPE}"),
}
PLANNED = {"training": costs.Shape(8192, 4096, 4096, R, 2), "inference": costs.Shape(16, 4096, 4096, R, 2)}
"""The sizes that the planner is told; --tokens sets another M for training."""
PRECISIONS = ("bf16", "bf16-autocast")
OURS = ("dora_linear", "DoraLinear", "enabled PEFT layer")
NOTE = """Over a driver that launches nothing, with the CPU's dispatch in CUDA's place: compare ratios, and add about
2.5 us per launch, Triton's and the library's."""


def problem_of(precision: str) -> LayerProblem:
    """The tiny tensors that every layer gets."""
    return LayerProblem.random(LayerCase(M, N, K, R, precision))


def function(problem: LayerProblem) -> TimedLayer:
    """ours, as the function dora_linear."""
    trained = {name: getattr(problem, name).clone().requires_grad_() for name in ("lora_A", "lora_B", "magnitude")}

    def forward(x: Tensor) -> Tensor:
        return dora_kernels.dora_linear(x, problem.weight, *trained.values(), SCALING)

    return TimedLayer(forward, trained, "dora", ours=True)


def module(problem: LayerProblem) -> TimedLayer:
    """ours, as DoraLinear."""
    layer = dora_kernels.DoraLinear.from_linear(providers.frozen(problem).forward, R, SCALING * R)
    if problem.precision.adapter_dtype == problem.precision.dtype:
        layer.to(problem.precision.dtype)  # else the adapters are in float32, the default, over the weight
    trained = {
        "lora_A": layer.lora_A.weight,
        "lora_B": layer.lora_B.weight,
        "magnitude": layer.lora_magnitude_vector,
    }
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(getattr(problem, name))
    return TimedLayer(layer, trained, "dora", ours=True, module=layer)


PROVIDERS: dict[str, providers.Provider] = {
    "nn.Linear": providers.frozen,
    "PEFT LoRA": providers.peft_lora,
    "PEFT DoRA": providers.peft_dora,
    "dora_linear": function,
    "DoraLinear": module,
    "enabled PEFT layer": providers.ours,
}


def step_of(layer: TimedLayer, problem: LayerProblem, name: str) -> Step:
    """One call of the layer: `name` is of STEPS. Under autocast each call enters it, as a trainer's forward pass does.

    What bench.lib.problem.PASSES do, but no autocast at all where it is off: entering it costs 4 us.
    """
    autocast = problem.autocast if problem.precision.autocast else contextlib.nullcontext
    x, leaves, call = problem.x, [problem.x, *layer.trained.values()], layer.forward
    layer.set_mode(name)

    def forward() -> Tensor:
        with autocast():
            return call(x)

    def inference() -> Tensor:
        with torch.no_grad(), autocast():
            return call(x)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), leaves, problem.dy)

    return {"forward": forward, "forward+backward": forward_backward}.get(name, inference)


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


def stopwatch(step: Step) -> Callable[[], float]:
    """The process time of a call, in milliseconds, over CALLS calls."""
    start = time.process_time()
    for _ in range(CALLS):
        step()
    elapsed = 1e3 * (time.process_time() - start) / CALLS
    return lambda: elapsed


Key = tuple[str, str]
"""The names of a provider and of a step."""


@contextlib.contextmanager
def prepared(precision: str, kind: str, names: Sequence[str], planned: costs.Shape) -> Iterator[dict[Key, Step]]:
    """Inside, the steps of one kind (of STEPS), called before, on the pretended GPU."""
    problem = problem_of(precision)
    with contextlib.ExitStack() as stack:
        steps: dict[Key, Step] = {}
        for name, step in itertools.product(names, STEPS[kind]):
            layer = PROVIDERS[name](problem)  # before there is a GPU: enable() tries a layer in float64
            if step.endswith(IN_SCOPE):
                if not layer.ours or layer.module is None:
                    continue
                stack.enter_context(dora_kernels.frozen_adapters(layer.module))
            steps[name, step] = step_of(layer, problem, step)
        stack.enter_context(host_driver.pretended_gpu(planned))
        for step in steps.values():
            step()  # compiles, and fills what is reused
        yield steps


def measure(steps: dict[Key, Step], driver: host_driver.Driver, seconds: float) -> list[dict[str, Any]]:
    """A row for each step: its launches, and its time in interleaved rounds."""
    rows = {
        key: {"provider": key[0], "step": key[1], "triton": driver.launches(step), "library": library_launches(step)}
        for key, step in steps.items()
    }
    for key, timing in interleave(steps, stopwatch, seconds, ROUNDS).items():
        rows[key] |= {"us": 1e3 * timing.median, "least_us": 1e3 * timing.minimum, "readings": timing.runs}
    return list(rows.values())


def measure_launchers(step: Step, driver: host_driver.Driver, seconds: float) -> list[dict[str, Any]]:
    """A row for each of our launchers in `step`: its own time, that of Triton's JIT in it, and that of the compiled
    kernels without the JIT.
    """
    rows, calls, launchers = [], {}, _launchers(step)
    with torch.no_grad():  # as in our operators
        for place, (name, launcher) in enumerate(launchers):
            jit, compiled = _launches(launcher)
            rows.append({"launcher": name, "launches": driver.launches(launcher)})
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
    """The launches of a launcher's call without the launcher: through Triton's JIT, and of the compiled kernels."""
    runs: list[Step] = []
    compiled: list[Step] = []
    run = JITFunction.run

    def record(self, *args, **kwargs):
        kernel = run(self, *args, **kwargs)
        runs.append(functools.partial(run, self, *args, **kwargs))
        constants = {name: value for name, value in kwargs.items() if name in self.arg_names}
        bound = self.signature.bind(*args, **constants).arguments.values()
        compiled.append(functools.partial(kernel[(*kwargs["grid"], 1, 1)[:3]], *bound))
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


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each row, with its time over that of PEFT's DoRA layer in the same step."""
    stock = {_compared(row): row["us"] for row in rows if row["provider"] == "PEFT DoRA"}
    lines = [("precision", "step", "planned M", "provider", "us", "least", "over PEFT DoRA", "Triton", "library")]
    for row in rows:
        over = f"{row['us'] / stock[_compared(row)]:.2f}" if _compared(row) in stock else "-"
        where = (row["precision"], row["step"], str(row["planned"]["M"]), row["provider"])
        numbers = (f"{row['us']:.0f}", f"{row['least_us']:.0f}", over, f"{row['triton']}")
        lines.append((*where, *numbers, str(len(row["library"]))))
    return "\n".join(aligned(lines))


def _compared(row: dict[str, Any]) -> tuple[str, str]:
    """The key that a row shares with the row it is compared with: in a scope PEFT's own layer reuses nothing."""
    return row["precision"], row["step"].removesuffix(IN_SCOPE)


def launcher_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each of our launchers in a training step, and one for all of them."""
    lines = [("precision", "launcher in a step", "launches", "us", "of these Triton's JIT", "compiled kernels")]
    for precision in dict.fromkeys(row["precision"] for row in rows):
        group = [row for row in rows if row["precision"] == precision]
        total = {name: sum(row[name] for row in group) for name in ("launches", "us", "jit_us", "kernel_us")}
        for row in (*group, {"launcher": "all"} | total):
            times = [f"{row[name]:.1f}" for name in ("us", "jit_us", "kernel_us")]
            lines.append((precision, row["launcher"], str(row["launches"]), *times))
    return "\n".join(aligned(lines))


def run(arguments: argparse.Namespace, driver: host_driver.Driver) -> None:
    """Measure, write and print."""
    torch.set_num_threads(1)
    rows, launchers, profiles = [], [], []
    share = arguments.seconds / len(arguments.precision)
    for precision, (kind, part) in itertools.product(arguments.precision, (("training", 0.5), ("inference", 0.3))):
        planned = PLANNED[kind]
        if kind == "training":
            planned = planned._replace(M=arguments.tokens)
        with prepared(precision, kind, arguments.provider, planned) as steps:
            of = {"precision": precision, "planned": planned._asdict()}
            rows += [of | row for row in measure(steps, driver, part * share)]
            ours = {name: call for (name, step), call in steps.items() if name in OURS and step == "forward+backward"}
            if "dora_linear" in ours:
                launchers += [of | row for row in measure_launchers(ours["dora_linear"], driver, 0.2 * share)]
            if arguments.profile:
                profiles += [f"{precision}, {name}, forward+backward:\n{profile(call)}" for name, call in ours.items()]
    information = meta(torch.device("cpu")) | {"launchers": launchers}
    write(arguments.out, information, rows)
    print(*profiles, table(rows), launcher_table(launchers), NOTE, f"-> {arguments.out}", sep="\n\n")
