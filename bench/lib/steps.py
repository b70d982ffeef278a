"""One layer step of every provider, measured; the gate keeps wrong layers from being timed."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.lib.measure import (
    Gate,
    Timing,
    capture,
    failure,
    host_microseconds,
    interleave,
    launches,
    peak_bytes,
    saved_bytes,
    stopwatch_of,
)
from bench.lib.problem import PASSES, TRAINING, LayerProblem, TimedLayer
from bench.lib.providers import COMPILED, Provider, providers_of
from bench.lib.shapes import LayerCase, layer_names
from bench.lib.siblings import BLOCKS, SharedCase, checked

# above it the device takes longer than the host, whose time nobody sees then
HOST_TOKENS = 2048


@dataclass
class StepRow:
    """One provider in one pass of one case, as it stands in the JSON. A row that is not ok has no time.

    ms: eager, wall time on the CPU and device time on a GPU (see CudaStopwatch); graph_ms: replay of a CUDA graph.
    errors: per tensor of a forward and backward pass, error and yardstick of dora_kernels.testing.
    peak_bytes: at the peak of the step (see measure.peak_bytes); saved_bytes: what forward keeps for backward, but for
    x, the weight and the parameters; host_us: the host's microseconds for a call, up to HOST_TOKENS; launches: what a
    call starts on the device. variant: LayerCase.variant.
    """

    provider: str
    computes: str | None
    step: str
    layers: list[str]
    M: int
    N: int
    K: int
    R: int
    precision: str
    ok: bool = True
    reason: str | None = None
    backend: str | None = None
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    ms: Timing | None = None
    graph_ms: Timing | None = None
    graph_reason: str | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    host_us: float | None = None
    launches: float | None = None
    variant: str = ""

    def fail(self, reason: str) -> None:
        """Take back every number."""
        self.ok, self.reason = False, reason
        self.ms = self.graph_ms = self.peak_bytes = self.saved_bytes = self.host_us = self.launches = None


Found = Callable[[list[StepRow], list[str]], None]


def measure_case(
    case: LayerCase,
    providers: dict[str, Provider] | None = None,
    steps: Iterable[str] = tuple(PASSES),
    seconds: float = 1.0,
    rounds: tuple[int, int] = (5, 100),
    host: bool | None = None,
    found: Found = lambda rows, missing: None,
) -> list[StepRow]:
    """One row per step and provider. What fails the gate, or raises, says so in its rows and is not timed.

    providers: default: providers_of(case). seconds: of interleaved timing, for each step (and again for the CUDA
    graphs). host: whether to measure host_us; None: where M is at most HOST_TOKENS. found(rows, missing): called with
    all rows so far after each step, which are whole, and with the steps and providers that are not among them yet.

    A compiled provider takes some ten seconds to build. Before each of these everything so far is measured, in a
    quarter of the time, and then again, with it: a row has the times of one interleaved measurement.
    """
    providers = providers_of(case) if providers is None else providers
    device = torch.device(case.device)
    problem, gate = _problem(case, providers)
    host = case.M <= HOST_TOKENS if host is None else host
    steps = _steps_of(case, steps)
    layers: dict[str, TimedLayer] = {}
    templates: dict[str, dict[str, Any]] = {}
    measured: dict[str, list[StepRow]] = {}
    waiting = list(providers)
    while waiting:
        group = [name for name in waiting if name not in COMPILED] or waiting[:1]
        waiting = [name for name in waiting if name not in group]
        _build(problem, gate, {name: providers[name] for name in group}, layers, templates)
        share = seconds / 4 if waiting else seconds
        for place, step in enumerate(steps):
            named = {
                name: StepRow(provider=name, step=step, **_sizes(case), **copy.deepcopy(record))
                for name, record in templates.items()
            }
            _measure_step(step, problem, gate, layers, named, device, share, rounds, host)
            measured[step] = list(named.values())
            unmeasured = [later for later in steps if later not in measured]
            behind = group if not unmeasured and place + 1 < len(steps) else []
            found([row for rows in measured.values() for row in rows], [*unmeasured, *behind, *waiting])
    return [row for rows in measured.values() for row in rows]


def _measure_step(
    step: str,
    problem: LayerProblem,
    gate: Gate,
    layers: dict[str, TimedLayer],
    named: dict[str, StepRow],
    device: torch.device,
    seconds: float,
    rounds: tuple[int, int],
    host: bool,
) -> None:
    """Everything about one step into the rows of the layers."""
    with contextlib.ExitStack() as scopes:
        calls = {}
        for name, layer in layers.items():
            layer.set_mode(step)
            scopes.enter_context(layer.scope(step))
            if step not in TRAINING:  # the gate of _build was one of training
                try:
                    reason = failure(gate.check(layer, step)[0])
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"
                if reason is not None:
                    named[name].fail(reason)
                    continue
            calls[name] = functools.partial(PASSES[step], layer, problem)

        def wrong(name: str, results: Results) -> str | None:
            return failure(gate.comparisons(layers[name].computes, results, step))

        held = {name: (problem.x, problem.weight, *layers[name].held()) for name in calls}
        _measure(calls, held, named, device, seconds, rounds, host)
        if device.type == "cuda":
            _time_graphs(calls, named, wrong, problem.seed, device, seconds, rounds)


def count_launches(
    case: LayerCase, providers: dict[str, Provider] | None = None, steps: Iterable[str] = tuple(PASSES)
) -> dict[tuple[str, str], float | None]:
    """(provider, step) -> what a call starts on the device. Not before everything is timed."""
    providers = providers_of(case) if providers is None else providers
    problem, gate = _problem(case, providers)
    layers: dict[str, TimedLayer] = {}
    _build(problem, gate, providers, layers, {}, check=False)
    counts = {}
    for step in _steps_of(case, steps):
        for name, layer in layers.items():
            layer.set_mode(step)
            with layer.scope(step):
                counts[name, step] = launches(functools.partial(PASSES[step], layer, problem), problem.x.device)
    return counts


def _finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())


Results = dict[str, torch.Tensor]
Calls = dict[str, Callable[[], Results]]


def _steps_of(case: LayerCase, steps: Iterable[str]) -> list[str]:
    """The steps to measure: with dropout only those of training, as inference is that of the ordinary case."""
    return [step for step in steps if not case.dropout or step in TRAINING]


def _sizes(case: LayerCase) -> dict[str, Any]:
    sizes = {name: getattr(case, name) for name in ("M", "N", "K", "R", "precision", "variant")}
    return sizes | {"layers": layer_names(case.N, case.K)}


def _problem(case: LayerCase, providers: Iterable[str]) -> tuple[LayerProblem, Gate]:
    """The case's tensors and their gate, for layers of these providers."""
    if any(name in COMPILED for name in providers):
        torch.compiler.reset()  # its cache is not for a grid of shapes
    problem = LayerProblem.random(case)
    return problem, Gate(problem)


def _build(
    problem: LayerProblem,
    gate: Gate,
    providers: dict[str, Provider],
    layers: dict[str, TimedLayer],
    records: dict[str, dict[str, Any]],
    check: bool = True,
) -> None:
    """Into layers those that pass the gate, and into records what the rows of every provider have in common."""
    for name, provider in providers.items():
        records[name] = record = {"computes": None, "ok": False, "reason": None}
        try:
            layer = provider(problem)
            record["computes"] = layer.computes
            if check:
                comparisons, record["backend"] = gate.check(layer)
                record["errors"] = {c.name: {"error": c.error, "yardstick": c.yardstick} for c in comparisons}
                record["reason"] = failure(comparisons)
        except Exception as error:  # a provider that cannot do a case is a result of the benchmark, not its end
            record["reason"] = f"{type(error).__name__}: {error}"
        if record["reason"] is None:
            record["ok"] = True
            layers[name] = layer


def _measure(
    calls: Calls,
    held: dict[str, tuple[torch.Tensor, ...]],
    rows: dict[str, StepRow],
    device: torch.device,
    seconds: float,
    rounds: tuple[int, int],
    host: bool,
) -> None:
    """Memory, the host's part and eager times into the rows. held: of each call what is there before it and after."""
    for name in list(calls):
        row, call = rows[name], calls[name]
        try:
            row.peak_bytes = peak_bytes(call, device)
            row.saved_bytes = saved_bytes(call, *held[name])
            row.host_us = host_microseconds(call, device) if host else None
        except torch.OutOfMemoryError as error:
            row.fail(f"OutOfMemoryError: {error}")
            del calls[name]
    for name, timing in interleave(calls, stopwatch_of(device), seconds, rounds).items():
        rows[name].ms = timing


def _time_graphs(
    calls: Calls,
    rows: dict[str, StepRow],
    wrong: Callable[[str, Results], str | None],
    seed: Callable[[], None],
    device: torch.device,
    seconds: float,
    rounds: tuple[int, int],
) -> None:
    """Times of CUDA graph replays into the rows, or the reason that a step could not be captured.

    wrong: what the gate holds against results. seed: called before the replay that the gate sees.
    """
    pool = torch.cuda.graph_pool_handle()
    graphs = {}
    for name, call in calls.items():
        try:
            graph, results = capture(call, pool)
            for result in results.values():
                result.fill_(torch.nan)
            seed()
            graph.replay()
            rows[name].graph_reason = wrong(name, results)
            del results
        except Exception as error:  # not every provider can be captured
            rows[name].graph_reason = f"{type(error).__name__}: {error}"
            pool = torch.cuda.graph_pool_handle()  # the others go on without what the failed one has left
            torch.cuda.synchronize(device)
        if rows[name].graph_reason is None:
            graphs[name] = graph.replay
    for name, timing in interleave(graphs, stopwatch_of(device), seconds, rounds).items():
        rows[name].graph_ms = timing


def measure_shared(
    case: SharedCase, device: torch.device, seconds: float, rounds: tuple[int, int] = (5, 100)
) -> list[StepRow]:
    """A row each for the frozen layers, stock PEFT, ours apart and ours sharing the low-rank product: a training step.

    Raises RuntimeError as siblings.checked.
    """
    problem, models, comparisons = checked(case, device)
    models = {"frozen": problem.frozen(), "peft_dora": problem.model, "ours": models["apart"]} | {
        "ours_shared": models["shared"]
    }
    features, widths = BLOCKS[case.block]
    sizes = {"M": case.M, "N": sum(widths.values()), "K": features, "R": case.R, "precision": case.precision}
    rows, calls, held = {}, {}, {}
    for name, model in models.items():
        rows[name] = StepRow(name, None, "forward+backward", [], **sizes, variant=case.block)
        calls[name] = functools.partial(problem.step, model)
        held[name] = (problem.x, *model.parameters())
    _measure(calls, held, rows, device, seconds, rounds, host=case.M <= HOST_TOKENS)
    if device.type == "cuda":

        def wrong(name: str, results: Results) -> str | None:
            if name == "frozen":  # whose results have no reference here
                return None if all(map(_finite, results.values())) else "its graph does not write its results"
            return failure(comparisons(results))

        _time_graphs(calls, rows, wrong, lambda: None, device, seconds, rounds)
    return list(rows.values())
