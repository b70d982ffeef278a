"""A frozen layer that stands in the place of one with an adapter, once that is merged."""

from __future__ import annotations

import copy
import functools
from types import MethodType

from torch import Tensor, nn

from dora_kernels.adapters.reading import forward_is_the_class_s


def frozen_like(base: nn.Module | None, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer of the kind of `base` with another weight and bias, frozen; nn.Linear where that is None or quantized.

    Over a dense `base` it also gets the hooks, buffers and submodules of `base`, in copies of their dicts. Raises
    ValueError where its forward is neither its class's nor that between device moves of accelerate.
    """
    if base is not None and not forward_is_the_class_s(base):
        raise ValueError(
            f"frozen_layer: the forward of {type(base).__name__} was replaced on the instance, or offloads its weight; "
            "expected the class's own"
        )
    stored = getattr(base, "weight", None)
    if isinstance(stored, nn.Parameter) and stored.shape == weight.shape and stored.is_floating_point():
        frozen = type(base).__new__(type(base))
        kept = {name: value for name, value in vars(base).items() if name not in ("forward", "_old_forward")}
        frozen.__dict__ = {name: copy.copy(v) if isinstance(v, (dict, set)) else v for name, v in kept.items()}
    else:
        frozen = nn.Linear(weight.shape[1], weight.shape[0], False, "meta")
    if "_hf_hook" in vars(base or frozen):
        _move_as(base, frozen)
    frozen.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        frozen.bias = nn.Parameter(bias, requires_grad=False)
    return frozen


def _move_as(base: nn.Module, frozen: nn.Module) -> None:
    """Give `frozen` the hook of accelerate that `base` has, bound to it.

    Not by add_hook_to_module, which may put a weight that it knows by its address in place of a new one there.
    """
    frozen._hf_hook, frozen._old_forward = base._hf_hook, MethodType(type(frozen).forward, frozen)
    frozen.forward = functools.update_wrapper(functools.partial(base.forward.func, frozen), frozen._old_forward)
