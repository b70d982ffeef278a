"""A layer whose passes are made by a way that is named, whatever the planner would take: what ways.py measures."""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import dora_kernels
from bench.lib.measure import capture, capture_stream
from bench.lib.problem import SCALING, LayerProblem, forward_backward, reference
from bench.lib.shapes import LayerCase
from dora_kernels.kernels import side
from dora_kernels.kernels.hopper import launch
from dora_kernels.planning import measured, plan
from dora_kernels.planning.measured import BESIDE

# pass -> its ways, first the one that is taken where nothing was measured
WAYS = measured.PARTS
GRADIENTS = ("x", "lora_A", "lora_B", "magnitude")

Results = dict[str, Tensor]


class Ready(NamedTuple):
    """A pass that is ready to run: what is timed, and the same with its results, which it has written anew.

    launched: how often our GEMM ("gemm") and kernels beside it ("side") were, until it was ready.
    """

    call: Callable[[], object]
    results: Callable[[], Results]
    launched: collections.Counter


@contextlib.contextmanager
def planned(beside: tuple[str, ...]) -> Iterator[None]:
    """Inside, a backward pass makes dx through the merged weight, and runs these steps beside its GEMM."""
    with (
        mock.patch.object(plan, "dx_way", lambda *asked: "merged"),
        mock.patch.object(plan, "beside", lambda *asked, **named: beside),
    ):
        yield


@contextlib.contextmanager
def ours_launched() -> Iterator[collections.Counter]:
    """Inside, launches are counted as Ready says."""
    counts: collections.Counter = collections.Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **options)

        return call

    with (
        mock.patch.object(launch, "launch", counted("gemm", launch.launch)),
        mock.patch.object(side.Side, "launch", counted("side", side.Side.launch)),
    ):
        yield counts


class OneLayer:
    """A layer of one case, its passes as functions of nothing, and what they should give."""

    def __init__(self, case: LayerCase) -> None:
        self.problem, self.on_gpu = LayerProblem.random(case), case.device == "cuda"
        self.leaves = {name: getattr(self.problem, name).detach().requires_grad_() for name in GRADIENTS}
        self._pool = torch.cuda.graph_pool_handle() if self.on_gpu else None
        self._ready: dict[tuple[str, str], Ready] = {}
        self._kept: dict[str, Tensor] = {}

    @functools.cached_property
    def references(self) -> tuple[Results, Results]:
        """The results in float64, which are exact, and the yardstick: those of plain PyTorch in the case's dtypes."""
        exact, yardstick = (
            {name: tensor.detach() for name, tensor in forward_backward(reference(of, "dora"), of).items()}
            for of in (self.problem.double(), self.problem)
        )
        return exact, yardstick

    def step(self, name: str, way: str, kept: str) -> Callable[[], Results]:
        """A function that makes the pass; kept: the way of the forward pass whose results a backward pass takes."""
        if name != "backward":
            return functools.partial(self._forward if name == "forward" else self._inference, way)
        if kept not in self._kept:
            with self._on_capture_stream():  # autograd's backward pass is on the stream of the forward pass
                self._kept[kept] = self._forward(kept)["y"]
        return functools.partial(self._backward, self._kept[kept], BESIDE[way])

    def _on_capture_stream(self) -> contextlib.AbstractContextManager:
        """Inside, on a GPU, that stream is the current one, behind what draws the layer's tensors."""
        if not self.on_gpu:
            return contextlib.nullcontext()
        capture_stream().wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(capture_stream())

    def _forward(self, way: str) -> Results:
        x, lora_A, lora_B, magnitude = self.leaves.values()
        with dora_kernels.options(backend="triton", way=way):
            return {"y": dora_kernels.dora_linear(x, self.problem.weight, lora_A, lora_B, magnitude, SCALING)}

    def _inference(self, way: str) -> Results:
        with torch.no_grad():
            return self._forward(way)

    def _backward(self, y: Tensor, beside: tuple[str, ...]) -> Results:
        with planned(beside):
            gradients = torch.autograd.grad(y, list(self.leaves.values()), self.problem.dy, retain_graph=True)
        return dict(zip(self.leaves, gradients, strict=True))

    def ready(self, name: str, way: str, kept: str) -> Ready:
        """The pass, made once for each way: a CUDA graph on a GPU, else the step itself."""
        if (name, way) not in self._ready:
            step = self.step(name, way, kept)
            with ours_launched() as launched:
                call, results = self._captured(step) if self.on_gpu else (step, step)
                results()
            self._ready[name, way] = Ready(call, results, launched)
        return self._ready[name, way]

    def _captured(self, step: Callable[[], Results]) -> tuple[Callable[[], object], Callable[[], Results]]:
        graph, results = capture(step, self._pool)

        def replayed() -> Results:
            for tensor in results.values():
                tensor.fill_(torch.nan)
            graph.replay()
            return {name: tensor.clone() for name, tensor in results.items()}

        return graph.replay, replayed


def why_not_ours(layer: OneLayer, name: str, way: str, launched: collections.Counter) -> str | None:
    """The reason that what was launched is not what the name of the way says, or None."""
    beside = BESIDE[way] if name == "backward" else ()
    if bool(launched["gemm"]) == (way == "fused" or bool(beside)) and bool(launched["side"]) == bool(beside):
        return None
    problem = layer.problem
    operands = (problem.dy, problem.weight) if name == "backward" else (problem.x, problem.weight, problem.lora_B)
    reason = launch.why_not_gemm(*operands, nn=name == "backward")
    return f"it has launched {' and '.join(launched) or 'nothing'} of ours: {reason or 'the log may say why'}"
