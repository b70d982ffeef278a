"""Weights that an engine holds in pieces, and how a layer reads them inside its forward.

fully_shard (FSDP2)     inside the forward of its unit a weight is a plain parameter; outside, a DTensor
FSDP1                   use_orig_params=True: a view into the unit's flat parameter, which requires a gradient if any
                        parameter of the unit does. A unit of its own (PEFT's fsdp_auto_wrap_policy makes one of each
                        lora_A, lora_B and magnitude) has its weight only inside its own call
DeepSpeed ZeRO-3        empty outside a forward; inside one, reading the attribute gathers it, and has DeepSpeed gather
                        it for the layer's backward pass too
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

try:
    from torch.distributed.fsdp import FullyShardedDataParallel
except ImportError:  # a torch without distributed
    FullyShardedDataParallel = None


def is_unit(module: nn.Module | None) -> bool:
    """True if `module` is an FSDP1 unit: a wrapper around another module."""
    return FullyShardedDataParallel is not None and type(module) is FullyShardedDataParallel


def inner(module: nn.Module | None) -> nn.Module | None:
    """`module`, or what an FSDP1 unit wraps."""
    return module.module if is_unit(module) else module


def gathered_weight(module: nn.Module) -> Tensor:
    """module.weight; of an FSDP1 unit a differentiable copy, which the unit's own call returns while it has the weight.

    The call is what makes FSDP gather the weight now and reduce its gradient in the backward pass.
    """
    if not is_unit(module):
        return module.weight
    wrapped = module.module
    wrapped.forward = MethodType(_copy_of_weight, wrapped)
    try:
        return module()
    finally:
        del wrapped.forward


def _copy_of_weight(module: nn.Module) -> Tensor:
    return module.weight.clone()


def enable_first(weight: Any) -> str:
    """An advice for an error that names a DTensor; "" for any other weight."""
    return ": enable before fully_shard" if type(weight).__name__ == "DTensor" else ""


def why_not_gathered(weight: Any) -> str | None:
    """The reason why a weight that was read inside a forward is empty."""
    empty = hasattr(weight, "ds_status") and weight.numel() == 0
    return "DeepSpeed ZeRO-3 has not gathered a weight" if empty else None


def requires_grad(module: nn.Module) -> bool:
    """True if module.weight is trained. A view into FSDP1's flat parameter counts as what it stands for."""
    weight = module.weight
    flat = weight._base
    if not weight.requires_grad or not getattr(flat, "_is_flat_param", False) or flat._params is None:
        return weight.requires_grad
    infos = zip(flat._param_infos, flat._params, strict=True)
    parameters = [parameter for (name, owner, _), parameter in infos if owner is module and name == "weight"]
    return len(parameters) != 1 or parameters[0].requires_grad
