"""Questions about the parts of another library's layer: may a weight be read, and its module not be called?"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from dora_kernels.adapters import calls
from dora_kernels.adapters.classes import class_name, why_replaced

AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes that autocast casts; it leaves float64 alone."""

PLAIN = (nn.Parameter, Tensor, FakeTensor)
"""torch's own tensors, and those of torch.export; any other subclass has a meaning of its own."""

DROPOUT_LAYERS = (nn.Identity, nn.Dropout)
"""The classes of dropout whose meaning is known."""


def why_not_bypass(part: str, module: nn.Module) -> str | None:
    """The reason why `module` must really be called: reading its weight instead would skip somebody's code."""
    registered = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if any(registered) and not all(calls.only_gathers(hook) for hooks in registered for hook in hooks.values()):
        return f"{part} has hooks"
    if not forward_is_the_class_s(module):
        return f"the forward of {part} was replaced on the instance"
    return why_replaced(part, module)


def forward_is_the_class_s(module: nn.Module) -> bool:
    """True if calling `module` runs its class's forward, perhaps between device moves of accelerate.

    A model dispatched with a device_map has an AlignDevicesHook on every module, which replaces `forward` on
    the instance and brings x to the module's device. Where x is on that device already it does nothing; where
    the weights are offloaded it moves them, and the module must be called.
    """
    if torch.compiler.is_compiling():  # Dynamo guards on this forward, and not on a name that a __dict__ has not yet
        forward = module.forward
        if isinstance(forward, MethodType) and forward.__func__ is type(module).forward:
            return True
    forward = module.__dict__.get("forward")
    if forward is None or is_bound_forward(module, forward):
        return True
    hook = module.__dict__.get("_hf_hook")
    return (
        type(hook).__name__ == "AlignDevicesHook"
        and not hook.offload
        and is_bound_forward(module, module.__dict__.get("_old_forward"))
    )


def why_not_dtypes(x: Tensor, weight: Tensor) -> str | None:
    """The reason why the library must compute these dtypes: they differ, and autocast does not make them one."""
    if x.dtype == weight.dtype:
        return None
    dtypes = f"x is {x.dtype} and the base weight is {weight.dtype}"
    if not torch.is_autocast_enabled(x.device.type):
        return f"{dtypes}, without autocast"
    if x.dtype not in AUTOCAST_DTYPES or weight.dtype not in AUTOCAST_DTYPES:
        return f"{dtypes}, which autocast leaves alone"
    return None


def is_active(dropout: object) -> bool:
    """True if `dropout` is an nn.Dropout that changes x now."""
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


def why_not_plain(name: str, tensor: Tensor) -> str | None:
    """The reason why the numbers of `tensor` may not be read: its class gives them a meaning of its own."""
    return None if type(tensor) in PLAIN else f"{name} is a {class_name(tensor)}, not a plain tensor"


def why_not_device(device: torch.device, name: str, tensor: Tensor) -> str | None:
    """The reason why `tensor` cannot meet an x on `device`: it is on another one, or nowhere."""
    if tensor.device == device and device.type != "meta":
        return None
    return f"x is on {device} and {name} is on {tensor.device}"


def is_bound_forward(module: nn.Module, method: Any) -> bool:
    forwards = [vars(cls).get("forward") for cls in type(module).__mro__]
    return isinstance(method, MethodType) and method.__self__ is module and method.__func__ in forwards


def first_reason(reasons: Iterable[str | None]) -> str | None:
    """The first that is not None."""
    return next((reason for reason in reasons if reason is not None), None)
