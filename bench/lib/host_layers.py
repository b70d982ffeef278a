"""The layers of bench.host by case, and their steps. Import it after the driver is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import dora_kernels
from bench.lib import host_driver, providers
from bench.lib.host_tables import IN_SCOPE
from bench.lib.measure import Step
from bench.lib.problem import SCALING, LayerProblem, TimedLayer
from bench.lib.shapes import LayerCase, Precision
from dora_kernels.planning import costs

# N = 256 is four steps of the kernel of P, so that two programs make its sum as at real sizes; K = 64 keeps PEFT's
# product with an identity matrix of K x K small
M, N, K, R = 16, 256, 64, 16
DROPOUT = 0.05  # as many recipes have it
CALLS = 20  # of one layer in a reading: 1 to 15 ms
STEPS = {
    "training": ("forward", "forward+backward"),
    "inference": ("inference", f"inference{IN_SCOPE}"),
}
PLANNED = {"training": costs.Shape(8192, 4096, 4096, R, 2), "inference": costs.Shape(16, 4096, 4096, R, 2)}
"""The sizes that the planner is told; --tokens sets another M for training."""


def planned(kind: str, tokens: int) -> costs.Shape:
    """The sizes that the planner is told of a kind of step (of STEPS), with so many tokens in training."""
    return PLANNED[kind]._replace(M=tokens) if kind == "training" else PLANNED[kind]


def problem_of(precision: str, bias: bool = False, dropout: float = 0.0) -> LayerProblem:
    """The tiny tensors that every layer of a case gets."""
    problem = LayerProblem.random(LayerCase(M, N, K, R, precision, dropout=dropout))
    return dataclasses.replace(problem, bias=torch.ones_like(problem.dy[0])) if bias else problem


def float32_adapters() -> LayerProblem:
    """Adapters in float32 over a bf16 weight, outside autocast."""
    precision = Precision("bf16-fp32", torch.bfloat16, torch.float32)
    return dataclasses.replace(problem_of("bf16-autocast"), precision=precision)


def function(problem: LayerProblem) -> TimedLayer:
    """ours, as the function dora_linear."""
    trained = {name: getattr(problem, name).clone().requires_grad_() for name in ("lora_A", "lora_B", "magnitude")}

    def forward(x: Tensor) -> Tensor:
        return dora_kernels.dora_linear(x, problem.weight, *trained.values(), SCALING, problem.bias)

    return TimedLayer(forward, trained, "dora", ours=True)


def module(problem: LayerProblem, dropout_on: str = "adapter") -> TimedLayer:
    """ours, as DoraLinear."""
    linear = providers.frozen(problem).forward
    layer = dora_kernels.DoraLinear.from_linear(linear, R, SCALING * R, problem.dropout, dropout_on)
    trained = {"lora_A": layer.lora_A.weight, "lora_B": layer.lora_B.weight, "magnitude": layer.lora_magnitude_vector}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.data = getattr(problem, name).clone()  # in its dtype: float32, the default, or the weight's
    return TimedLayer(layer, trained, "dora", ours=True, module=layer)


PROVIDERS: dict[str, providers.Provider] = {
    "nn.Linear": providers.frozen,
    "PEFT LoRA": providers.peft_lora,
    "PEFT DoRA": providers.peft_dora,
    "dora_linear": function,
    "DoraLinear": module,
    "enabled PEFT layer": providers.ours,
}
OURS = ("dora_linear", "DoraLinear", "enabled PEFT layer")
MODULES = {name: provider for name, provider in PROVIDERS.items() if name != "dora_linear"}
"""Those that are modules: dora_linear has no dropout, and takes a dense weight."""
DROPS_LOW_RANK = MODULES | {
    "DoraLinear": functools.partial(module, dropout_on="lora"),
    "enabled PEFT layer": providers.ours_lora_dropout,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of layer: its tensors, who has it, and what is done with it.

    checkpointed: torch.utils.checkpoint calls the layer, and the backward pass calls it once more.
    calls: in a reading.
    context: what its steps run in.
    """

    problem: Callable[[], LayerProblem]
    providers: dict[str, providers.Provider]
    kinds: tuple[str, ...] = ("training", "inference")
    checkpointed: bool = False
    calls: int = CALLS
    context: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


def step_of(layer: TimedLayer, problem: LayerProblem, name: str, checkpointed: bool = False) -> Step:
    """One call of the layer: `name` is of STEPS. Under autocast each call enters it, as a trainer's forward pass does.

    What bench.lib.problem.PASSES do, but no autocast at all where it is off: entering it costs 4 us.
    """
    autocast = problem.autocast if problem.precision.autocast else contextlib.nullcontext
    x, leaves, call = problem.x, [problem.x, *layer.trained.values()], layer.forward
    if checkpointed:
        call = functools.partial(checkpoint, call, use_reentrant=False)
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


Key = tuple[str, str]
"""The names of a provider and of a step."""


@contextlib.contextmanager
def prepared(case: Case, kind: str, names: Sequence[str], shape: costs.Shape) -> Iterator[dict[Key, Step]]:
    """Inside, the steps of one kind (of STEPS) by those of `names` that the case has, called before, on the pretended
    GPU that is told of this shape.
    """
    problem = case.problem()
    with contextlib.ExitStack() as stack:
        steps: dict[Key, Step] = {}
        for name, step in itertools.product(filter(case.providers.__contains__, names), STEPS[kind]):
            layer = case.providers[name](problem)  # before there is a GPU: enable() tries a layer in float64
            if step.endswith(IN_SCOPE):
                if not layer.ours or layer.module is None:
                    continue
                stack.enter_context(dora_kernels.frozen_adapters(layer.module))
            steps[name, step] = step_of(layer, problem, step, case.checkpointed)
        stack.enter_context(host_driver.pretended_gpu(shape))
        stack.enter_context(case.context())
        for step in steps.values():
            step()  # compiles, and fills what is reused
        yield steps
