"""Knowledge of a layer between two calls: that dora_kernels computes it, and the state from which that was judged.

Judging a call in full takes the host some 40 us; reading the state and comparing it with the last one 7. Equal states
have equal verdicts, so the state has whatever the judgement reads (`layer._why_not_call`, `why_not_adapter`,
`read_base`):

    in the state        classes of the layer and of each part, the methods that the classes of the base layer and of
                        lora_A are called by, the parts of the active adapters, their scaling and variants,
                        fan_in_fan_out, padding and dilation, the class, dtype and device of every weight, and the
                        device of x
    nothing is known    of a layer that is disabled, merged, or not to cast its input; while PEFT's DoraCaching is on;
                        with a hook or another forward on a part, a bias in lora_A or lora_B, an empty weight (ZeRO-3),
                        a dense base weight that requires a gradient (FSDP1's views do), or an attribute over a part.
                        Then the call is judged in full
    not judged          dropout's p and mode, the numbers, and requires_grad of the adapter: `compute` reads them
    not seen            what is put on the class of a part later, but for forward, __call__ and _conv_forward

The base layer and all weights are never kept: they are read at each call, past nn.Module.__getattr__, which takes .5
us. The adapters' parts are held until a call is judged that dora_kernels computes, or an adapter is deleted, so that
no new one can be taken for an old one.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import dora
from torch import Tensor, nn

from dora_kernels.adapters.peft.adapter import PeftAdapter

ATTRIBUTE = "dora_known"
"""The attribute with what is known of a layer: no parameter, buffer or module, so not in the state dict."""

HOLDERS = frozenset(("base_layer", "lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector"))


class Known:
    """A state, and the active adapters of a layer that dora_kernels computes in it. A copy knows nothing."""

    __slots__ = ("adapters", "state")

    def __init__(self, state: tuple[object, ...] | None = None, adapters: list[PeftAdapter] | None = None) -> None:
        self.state = state
        self.adapters = adapters

    def __reduce__(self) -> tuple[Any, ...]:
        return Known, ()


# state; weight, None of a quantized base, and bias of the base; lora_A, lora_B and magnitude of the last adapter
Reading = tuple[tuple[object, ...], Tensor | None, Tensor | None, Tensor, Tensor, Tensor]


def read(layer: nn.Module, device: torch.device, base_kind: str) -> Reading | None:
    """The state of `layer` as it is called with an x on `device`; None where the call must be judged in full.

    For layers whose lora_A and lora_B are modules. base_kind: "linear", "convolution" or "quantized".
    """
    own = layer.__dict__
    try:
        if own["_disable_adapters"] or own["merged_adapters"] or dora.ENABLE_DORA_CACHING:
            return None
        if not own["cast_input_dtype_enabled"] or not own.keys().isdisjoint(HOLDERS):
            return None
        modules = own["_modules"]
        base = modules["base_layer"]
        attributes = base.__dict__
        bias = attributes["bias"] if "bias" in attributes else attributes["_parameters"]["bias"]
        cls = type(base)
        if base_kind == "quantized":
            weight = None
            if _may_run_code(attributes):
                return None
            state = (type(layer), cls, cls.forward, cls.__call__, device)
        else:
            weight = _weight(base)
            if weight.requires_grad:
                return None
            if base_kind == "linear":
                settings = own["fan_in_fan_out"]
            elif "_conv_forward" in attributes:
                return None
            else:
                settings = (cls._conv_forward, attributes["padding"], attributes["dilation"])
            state = (
                type(layer),
                cls,
                cls.forward,
                cls.__call__,
                settings,
                device,
                type(weight),
                weight.dtype,
                weight.device,
            )
        lora_As, lora_Bs = modules["lora_A"], modules["lora_B"]
        dropouts, magnitudes = modules["lora_dropout"], modules["lora_magnitude_vector"]
        if not type(lora_As) is type(lora_Bs) is type(dropouts) is type(magnitudes) is nn.ModuleDict:
            return None
        active, lora_A, lora_B, magnitude = own["_active_adapter"], None, None, None
        for name in (active,) if isinstance(active, str) else active:
            if name not in lora_As._modules:
                continue
            module_A, module_B = lora_As._modules[name], lora_Bs._modules[name]
            dropout, module_m = dropouts._modules[name], magnitudes._modules[name]
            lora_A, lora_B, magnitude = _weight(module_A, True), _weight(module_B, True), _weight(module_m)
            if _may_run_code(dropout.__dict__):
                return None
            if base_kind == "convolution" and (
                "_conv_forward" in module_A.__dict__ or "_conv_forward" in module_B.__dict__
            ):
                return None
            variant, scaling, factor = own["lora_variant"][name], own["scaling"][name], type(module_A)
            state += (
                variant,
                type(variant),
                type(scaling),  # before scaling: a tensor is not compared with a number, which waits for its device
                scaling,
                module_A,
                factor,
                factor.forward,
                type(lora_A),
                lora_A.dtype,
                lora_A.device,
                module_B,
                type(module_B),
                type(lora_B),
                lora_B.dtype,
                lora_B.device,
                dropout,
                type(dropout),
                module_m,
                type(module_m),
                type(magnitude),
                magnitude.device,
            )
    except (AttributeError, KeyError, TypeError):  # a part is missing, or is not where PEFT puts it
        return None
    return None if lora_A is None else (state, weight, bias, lora_A, lora_B, magnitude)


def _may_run_code(attributes: dict[str, Any]) -> bool:
    """True of a module, by its attributes, with anything that `why_not_bypass` has to look at."""
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
    )


def _weight(module: nn.Module, alone: bool = False) -> Tensor:
    """The weight of a module that need not be called; with `alone`, of one that was built without a bias and is so
    still. Raises KeyError for any other, and for an empty weight."""
    attributes = module.__dict__
    parameters = attributes["_parameters"]
    weight = parameters["weight"]
    if (
        attributes["_forward_hooks"]  # _may_run_code, without the call
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
        or "weight" in attributes
        or (alone and ("bias" in attributes or parameters["bias"] is not None))
        or not weight.numel()
    ):
        raise KeyError("weight")
    return weight
