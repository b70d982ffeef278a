"""PEFT: dora_linear under the linear DoRA layers of a model, one layer at a time.

A layer is taken over by changing its class to a subclass of its own (DoraKernelsLinear for `lora.Linear`; those over
quantised weights are in peft_quantized.py) that differs in `forward`, and in `train` and `_apply` by what they forget.
Parameters, state dict, merging and adapter management stay PEFT's code, deepcopy and pickle work as before, and
giving a layer back is changing its class back.

Each call decides anew whether it is ours. A merged or disabled layer, a plain LoRA adapter, hooks on a
submodule we would bypass, and everything else that is not known to mean exactly what dora_linear computes
goes to PEFT's forward. The decision reads attributes only: it never waits for the device, and torch.compile
traces it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import MethodType
from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MINIMUM_VERSION = (0, 19)
"""The first release whose DoraLinearLayer.forward has the arguments below; older ones lack adapter_name."""

_version = tuple(int(part) for part in peft.__version__.split(".")[:2])
if _version < MINIMUM_VERSION:
    raise ImportError(f"enable: PEFT {peft.__version__} is installed; expected 0.19 or newer")

from peft.tuners.lora import dora  # noqa: E402
from peft.tuners.lora.layer import Linear as LoraLinear  # noqa: E402
from peft.tuners.lora.layer import LoraLayer  # noqa: E402
from peft.tuners.lora.variants import DoraLinearVariant  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from dora_kernels import launch, reuse  # noqa: E402
from dora_kernels.adapters import LayerReport  # noqa: E402
from dora_kernels.functional import operand_dtypes, weight_norm  # noqa: E402
from dora_kernels.quant import Weight  # noqa: E402
from dora_kernels.reference import gain_ref  # noqa: E402

KNOWN_ARGUMENTS = ("self", "x", "lora_A", "lora_B", "scaling", "base_layer", "base_result", "adapter_name")
"""DoraLinearLayer.forward's arguments. Where they differ its meaning may too, and PEFT keeps the layer."""

KNOWN_PARTS = (
    ("lora_A", (nn.Linear,)),
    ("lora_B", (nn.Linear,)),
    ("dropout", (nn.Identity, nn.Dropout)),
    ("magnitude", (dora.DoraLinearLayer,)),
)
"""What an adapter is made of: these classes and no subclass."""

QUANTIZED_LAYERS = ("peft.tuners.lora.bnb", "peft.tuners.lora.hqq", "peft.tuners.lora.torchao")
"""Where PEFT's layers over quantised weights are defined; some import their library."""

AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = (*AUTOCAST_DTYPES, torch.float64)


class TakenOver:
    """What a layer class of PEFT's becomes, as the first base class: its DoRA forward computed by dora_linear.

    Subclasses say what the base layer is. They are never constructed: see enable.
    """

    draws_in_adapter_dtype = True
    """Whether x is cast before its dropout under CUDA's autocast too: a mask depends on the dtype."""

    @staticmethod
    def read_base(layer: LoraLayer) -> tuple[Weight | None, str | None]:
        """The base layer's weight (N, K), and why the base layer is not ours to compute."""
        raise NotImplementedError

    @staticmethod
    def remarks(layer: LoraLayer) -> list[str]:
        """What the report says of a layer that is taken over."""
        return []

    def base_operands(self, x: Tensor, weight: Weight) -> tuple[Tensor, Weight, str | None]:
        """x and weight as dora_linear takes them, and why their dtypes are PEFT's affair."""
        reason = None
        if x.dtype != weight.dtype:
            dtypes = f"x is {x.dtype} and the base weight is {weight.dtype}"
            if not torch.is_autocast_enabled(x.device.type):
                reason = f"{dtypes}, without autocast"
            elif x.dtype not in AUTOCAST_DTYPES or weight.dtype not in AUTOCAST_DTYPES:
                reason = f"{dtypes}, which autocast leaves alone"
        return x, weight, reason

    def base_product(self, x: Tensor, weight: Weight) -> Tensor:
        """x @ weight.T in weight.dtype, differentiable in x."""
        return F.linear(x.to(weight.dtype), weight)

    def peft_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What PEFT computes for this layer."""
        return super().forward(x, *args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., K) -> (..., N), of the dtype that nn.Linear would return.

        Without dropout, adapters nest: y = g2 * (g1 * (x W^T + d1) + d2) + bias, d = scaling * x A^T B^T.
        An adapter with dropout adds (g - 1) * xd W^T + g * d(xd), xd = dropout(x), to the output so far.
        """
        if self.disable_adapters or self.merged:
            return self.peft_forward(x, *args, **kwargs)
        known = self.lora_A
        adapters = [_read(self, name) for name in self.active_adapters if name in known]
        if not adapters:
            return self.peft_forward(x, *args, **kwargs)
        weight, reason = self.read_base(self)
        reason = reason or _call_reason(self, x, weight, adapters, bool(args or kwargs))
        if reason is None:
            operand, weight, reason = self.base_operands(x, weight)
        if reason is not None:
            launch.log_once(f"dora_kernels: a call went to PEFT: {reason}")
            return self.peft_forward(x, *args, **kwargs)

        for adapter in adapters:
            if adapter.magnitude._dora_cache:
                adapter.magnitude._cache_clear()  # as each uncached forward of PEFT does: it may be stale by now
        bias = self.base_layer.bias
        first, *others = adapters
        # y's, as nn.Linear's
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = operand_dtypes(operand, first.lora_A.weight)[0] if autocast else x.dtype
        wide = torch.promote_types(dtype, first.magnitude.weight.dtype)
        if others and wide != dtype:
            # Between two adapters PEFT keeps the running result in their dtype. Rounded to half precision there, the
            # error with two adapters was 1.22 times PEFT's and with three 1.31 (geometric means over y and gradients).
            result, others = self.base_product(operand, weight).to(wide), adapters
            result = result if bias is None else result + bias
        else:
            x_dropped = _dropped(self, first, x) if _drops(self, first) else None
            result = reuse.dora_linear_reusing(self, operand, weight, *first.tensors(), bias, x_dropped=x_dropped)
        for adapter in others:
            # an nn.Dropout that does not drop now is PEFT's dropout case all the same, with its other base
            dropping = self.training and not isinstance(adapter.dropout, nn.Identity)
            x_dropped = _dropped(self, adapter, x) if dropping else None
            result = _nest(self, result, operand, weight, *adapter.tensors(), bias, x_dropped)
        return result.to(dtype)

    def train(self, mode: bool = True) -> TakenOver:
        """As nn.Module.train; in eval mode norm and gain are computed once and kept (see reuse.py)."""
        reuse.forget(self)
        return super().train(mode)

    def _apply(self, *arguments: Any, **keywords: Any) -> TakenOver:
        """What moves and casts go through."""
        reuse.forget(self)
        return super()._apply(*arguments, **keywords)


class DoraKernelsLinear(TakenOver, LoraLinear):
    """Over `lora.Linear`, whose base layer is nn.Linear or GPT-2's Conv1D."""

    @staticmethod
    def read_base(layer: LoraLinear) -> tuple[Tensor | None, str | None]:
        """As TakenOver.read_base."""
        base = layer.base_layer
        if type(base) is not (Conv1D if layer.fan_in_fan_out else nn.Linear):
            return None, f"the base layer is a {_class_name(base)}; expected nn.Linear, or Conv1D with fan_in_fan_out"
        weight = base.weight
        if type(weight) not in (nn.Parameter, Tensor):
            return None, f"the base weight is a {_class_name(weight)}, not a plain tensor"
        if weight.dtype not in DTYPES:
            return None, f"the base weight is {weight.dtype}"
        if weight.requires_grad:
            return None, "the base weight requires a gradient"
        return weight.T if layer.fan_in_fan_out else weight, bypass_reason("base_layer", base)


class Adapter(NamedTuple):
    """One adapter of a layer. Read at each call: set_scale, add_adapter and loading change it between calls."""

    variant: Any
    lora_A: nn.Module
    lora_B: nn.Module
    dropout: nn.Module
    magnitude: nn.Module | None
    scaling: float

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """lora_A (R, K), lora_B (N, R), magnitude (N,), scaling."""
        return self.lora_A.weight, self.lora_B.weight, self.magnitude.weight, self.scaling


def _read(layer: LoraLayer, name: str) -> Adapter:
    magnitudes = layer.lora_magnitude_vector
    return Adapter(
        layer.lora_variant.get(name),
        layer.lora_A[name],
        layer.lora_B[name],
        layer.lora_dropout[name],
        magnitudes[name] if name in magnitudes else None,
        layer.scaling[name],
    )


def _class_over(layer: nn.Module) -> type[TakenOver] | None:
    """The class that takes over `layer`, or has; None where there is none."""
    if isinstance(layer, TakenOver):
        return type(layer)
    if type(layer) is LoraLinear:
        return DoraKernelsLinear
    if type(layer).__module__ in QUANTIZED_LAYERS:
        from dora_kernels.adapters import peft_quantized

        return peft_quantized.class_over(type(layer))
    return None


def _peft_class(layer: TakenOver) -> type[LoraLayer]:
    """PEFT's class of a layer that is taken over."""
    return type(layer).__bases__[-1]


def enable(model: nn.Module) -> list[LayerReport]:
    """Take over the linear DoRA layers of `model`; report every DoRA layer of PEFT's in it."""
    reports = []
    for name, layer in _dora_layers(model):
        taken_over, reason = _judge(layer)
        if taken_over and not isinstance(layer, TakenOver):
            _set_class(layer, _class_over(layer))
        elif not taken_over and isinstance(layer, TakenOver):
            _set_class(layer, _peft_class(layer))  # taken over before and changed since: PEFT's again
        reports.append(LayerReport(name, "peft", taken_over, reason))
    return reports


def disable(model: nn.Module) -> list[LayerReport]:
    """Give every layer of `model` back to PEFT; report every DoRA layer of PEFT's in it."""
    for layer in model.modules():
        if isinstance(layer, TakenOver):
            _set_class(layer, _peft_class(layer))
    reports = []
    for name, layer in _dora_layers(model):
        can_be_taken_over, reason = _judge(layer)
        reason = "disable(model) was called" if can_be_taken_over else reason
        reports.append(LayerReport(name, "peft", isinstance(layer, TakenOver), reason))
    return reports


def _dora_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and len(module.lora_magnitude_vector) > 0:
            yield name, module


def _set_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Change a layer's class, and with it the bound forward that accelerate's hooks keep on the instance."""
    layer.__class__ = cls
    reuse.forget(layer)
    for attribute in ("forward", "_old_forward"):
        if _is_bound_forward(layer, layer.__dict__.get(attribute)):
            setattr(layer, attribute, MethodType(cls.forward, layer))


# Which layers, and which of their calls, are ours. Each _reason function returns None, or the reason against.


def _judge(layer: nn.Module) -> tuple[bool, str]:
    """Whether `layer` is taken over, and why not, or else which of its adapters PEFT goes on computing."""
    cls = _class_over(layer)
    if cls is None:
        return False, f"the layer is a {_class_name(layer)}, not one of PEFT's linear layers"
    if tuple(inspect.signature(dora.DoraLinearLayer.forward).parameters) != KNOWN_ARGUMENTS:
        return False, f"the DoraLinearLayer.forward of PEFT {peft.__version__} has unknown arguments"
    if not _forward_is_the_class_s(layer):
        return False, "the layer's forward was replaced on the instance"
    _, base_reason = cls.read_base(layer)
    if base_reason is not None:
        return False, base_reason
    reasons = {name: _adapter_reason(_read(layer, name)) for name in layer.lora_magnitude_vector}
    against = [f"adapter {name!r}: {reason}" for name, reason in reasons.items() if reason is not None]
    return len(against) < len(reasons), "; ".join(against or cls.remarks(layer))


def _adapter_reason(adapter: Adapter, device: torch.device | None = None) -> str | None:
    if adapter.variant is None:
        return "the adapter is plain LoRA"
    if type(adapter.variant) is not DoraLinearVariant:
        return f"the adapter is a {_class_name(adapter.variant)}"
    if not isinstance(adapter.scaling, (int, float)):
        return "scaling is a tensor"  # by prepare_model_for_compiled_hotswap; its value is on the device
    for part, known in KNOWN_PARTS:
        module = getattr(adapter, part)
        if type(module) not in known:  # e.g. wrapped by FSDP1: no storage outside its own forward
            return f"{part} is a {_class_name(module)}"
        reason = bypass_reason(part, module)
        if reason is not None:
            return reason
    if adapter.lora_A.bias is not None or adapter.lora_B.bias is not None:
        return "lora_A or lora_B has a bias"
    for tensor in adapter.tensors()[:3]:
        if type(tensor) not in (nn.Parameter, Tensor):
            return f"a weight of the adapter is a {_class_name(tensor)}, not a plain tensor"
        if device is not None and tensor.device != device:
            return f"x is on {device} and a weight of the adapter is on {tensor.device}"
    return None


def _call_reason(layer: LoraLayer, x: Tensor, weight: Weight, adapters: list[Adapter], has_more: bool) -> str | None:
    if has_more:
        return "the call has arguments beyond x"
    if dora.ENABLE_DORA_CACHING and not layer.training:
        return "PEFT's DoraCaching is on"
    device = x.device
    if x.dim() < 2:
        return "x has fewer than two dimensions"  # PEFT gives (1, N) for a vector
    if weight.device.type == "meta" or weight.device != device:
        return f"x is on {device} and the base weight is on {weight.device}"
    if not layer.cast_input_dtype_enabled:
        return "casting of the input is disabled"
    for adapter in adapters:
        reason = _adapter_reason(adapter, device)
        if reason is not None:
            return reason
        if adapter.lora_A.weight.dtype != adapter.lora_B.weight.dtype:
            return "lora_A and lora_B differ in dtype"
    return None


def bypass_reason(part: str, module: nn.Module) -> str | None:
    """Why `module` must really be called: reading its weight instead would skip somebody's code."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{part} has hooks"
    if not _forward_is_the_class_s(module):
        return f"the forward of {part} was replaced on the instance"
    return None


def _forward_is_the_class_s(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward, perhaps between device moves of accelerate.

    A model dispatched with a device_map has an AlignDevicesHook on every module, which replaces `forward` on
    the instance and brings x to the module's device. Where x is on that device already it does nothing; where
    the weights are offloaded it moves them, and the module must be called.
    """
    forward = module.__dict__.get("forward")
    if forward is None or _is_bound_forward(module, forward):
        return True
    hook = module.__dict__.get("_hf_hook")
    return (
        type(hook).__name__ == "AlignDevicesHook"
        and not hook.offload
        and _is_bound_forward(module, module.__dict__.get("_old_forward"))
    )


def _is_bound_forward(module: nn.Module, method: Any) -> bool:
    forwards = [vars(cls).get("forward") for cls in (TakenOver, *type(module).__mro__)]
    return isinstance(method, MethodType) and method.__self__ is module and method.__func__ in forwards


def _class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


# The computation.


def _drops(layer: TakenOver, adapter: Adapter) -> bool:
    """Whether dropout(x) is not x."""
    dropout = adapter.dropout
    return layer.training and dropout.training and not isinstance(dropout, nn.Identity) and dropout.p > 0


def _dropped(layer: TakenOver, adapter: Adapter, x: Tensor) -> Tensor:
    """dropout(x) with PEFT's mask for the same seed, so drawn in the dtype it draws in."""
    if layer.draws_in_adapter_dtype or not torch.is_autocast_enabled():
        x = x.to(adapter.lora_A.weight.dtype)
    return adapter.dropout(x)


def _nest(
    layer: TakenOver,
    result: Tensor,
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None,
    x_dropped: Tensor | None,
) -> Tensor:
    """One more adapter over `result` (..., N), the output with the adapters before it, as forward says."""
    gain = gain_ref(magnitude, weight_norm(weight, lora_A, lora_B, scaling))
    lora_x = x if x_dropped is None else x_dropped
    lora = F.linear(F.linear(lora_x.to(lora_A.dtype), lora_A), lora_B) * scaling
    if x_dropped is not None:
        base = layer.base_product(x_dropped, weight)
    else:
        base = result if bias is None else result - bias
    return result + (gain - 1) * base + gain * lora
