"""Whose a call is by what surrounds it, whatever the layer: the one place where that is decided.

What torch.func transforms, forward-mode AD, torch.jit.trace and torch.fx.symbolic_trace make of a call, no kernel and
no operator of ours has a rule for, and the library's own forward has. torch.compile, torch.export and make_fx do know
our operators.

Global module hooks are called for the parts of a layer (base_layer, lora_A, dropout, ...) where the library calls
those, so it has the call; but not one of which it would compute another function: that stays ours, and no hook is
called for its parts. FlopCounterMode and CommDebugMode have such hooks, and count what the library does: inside our
operators they would see nothing.
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
"""The modules that DeepSpeed's hooks say they are of: the second is where it wraps them to be profiled."""


def why_not_here(layer: Any, x: Any) -> str | None:
    """Why this call of `layer` is its library's, by what surrounds it: 0.1 us to ask, and Dynamo can trace it."""
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
    """Why a call is better its library's, if that computes the same: 0.1 us."""
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
    hook = next((hook for hook in registered if not only_gathers(hook)), None)
    if hook is None:
        return None
    # no more than getattr: Dynamo of torch 2.11 cannot ask a class for its names
    return f"there is a global module hook, {getattr(hook, '__module__', '')}.{getattr(hook, '__qualname__', '')}"


def only_gathers(hook: Any) -> bool:
    """Whether a hook is one of DeepSpeed ZeRO's: they gather a weight, and inside a forward reading it does so too."""
    return getattr(hook, "__module__", "").startswith(ZERO_HOOKS)
