"""Calls that are left to the library because of what surrounds them, whatever the layer.

Transforms and tracers: the operators of dora_kernels have no rule for torch.func, forward-mode AD, torch.jit.trace and
torch.fx.symbolic_trace; the library's own forward has. torch.compile, torch.export and make_fx know the operators.

Global module hooks: they are meant to be called for the parts of a layer (base_layer, lora_A, dropout, ...), which the
library's forward calls and dora_kernels reads. So the library gets the call, unless it would compute another function.
Those with which torch itself keeps track of the module that runs (FlopCounterMode, CommDebugMode, ModTracker) do not
count: they tell whose an operator is, and a table of the library's operators would be of a run that nobody makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import module as modules

from dora_kernels.functional import tracing

ZERO_HOOKS = ("deepspeed.runtime.zero.", "deepspeed.utils.nvtx")
"""The beginnings of the __module__ of DeepSpeed's hooks. The second is the wrapper with which it profiles them."""

TRACKERS = (
    "torch.utils.module_tracker",
    "torch.distributed._tools.mod_tracker",
    "torch.distributed.tensor.debug._comm_mode",
)
"""The __module__ of the hooks of ModuleTracker, ModTracker and what CommDebugMode makes of that."""


def why_not_here(layer: Any, x: Any) -> str | None:
    """The transform or tracer for which the library must compute this call. Takes 0.1 us; Dynamo can trace it."""
    if tracing.is_transformed() and tracing.may_carry_tangents(x, layer.tensors):
        return "a transform of torch.func or forward-mode AD is at work"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is recording"
    if isinstance(x, Proxy):  # make_fx has tensors; its tracer sets the same flag, so that cannot be asked
        return "torch.fx.symbolic_trace is recording"
    return None


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """The parameters, buffers and other tensors of a module and its submodules."""
    for part in module.modules():
        for held in (part._parameters, part._buffers, vars(part)):
            yield from (value for value in held.values() if isinstance(value, Tensor))


def why_not_hooks() -> str | None:
    """The global hook for which a call is left to its library, if that computes the same function. Takes 0.1 us."""
    if (
        modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    ):
        return _why_not_global_hooks()
    return None


def _why_not_global_hooks() -> str | None:
    registered = (
        *modules._global_forward_hooks.values(),
        *modules._global_forward_pre_hooks.values(),
        *modules._global_backward_hooks.values(),
        *modules._global_backward_pre_hooks.values(),
    )
    hook = next((hook for hook in registered if not (only_gathers(hook) or only_tracks(hook))), None)
    if hook is None:
        return None
    # no more than getattr: Dynamo of torch 2.11 cannot ask a class for its names
    return f"there is a global module hook, {getattr(hook, '__module__', '')}.{getattr(hook, '__qualname__', '')}"


def only_gathers(hook: Any) -> bool:
    """True of DeepSpeed ZeRO's hooks: they gather a weight, which reading it inside a forward does, too."""
    return getattr(hook, "__module__", "").startswith(ZERO_HOOKS)


def only_tracks(hook: Any) -> bool:
    """True of the hooks of torch's own trackers of modules, which change nothing."""
    return getattr(hook, "__module__", "") in TRACKERS
