"""torchtune: dora_kernels under the `DoRALinear` layers of a model.

    y = gain * (x W^T + scaling * dropout(x) A^T B^T + bias)        over a dense weight or a torchao NF4Tensor

The bias is multiplied by the gain, and dropout is before the adapter alone. The norm is a constant for autograd. Each
call goes to torchtune's forward if the layer is not known to mean exactly this. Where a row's norm is 0, torchtune
divides by it; dora_kernels has gain 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules.peft.dora import DoRALinear, linear_nf4

from dora_kernels import quant, reuse
from dora_kernels.adapters.reading import (
    DROPOUT_LAYERS,
    class_name,
    first_reason,
    forward_is_the_class_s,
    is_active,
    why_not_bypass,
    why_not_device,
    why_not_plain,
)
from dora_kernels.adapters.taking import TakenOver, library_class
from dora_kernels.functional.linear import dora_linear_core
from dora_kernels.functional.rescale import rescale
from dora_kernels.functional.validate import FLOATING, why_not_scaling
from dora_kernels.functional.weight import merge_weight_and_norm, weight_norm
from dora_kernels.quant import Weight
from dora_kernels.reference import gain_of
from dora_kernels.types import DoraWeight, Given


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every DoRA layer of torchtune's in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, DoRALinear):
            yield name, module


def class_for(layer: nn.Module) -> tuple[type[TakenOver] | None, str]:
    """The class that takes `layer` over and "", or None and the reason."""
    if library_class(layer) is not DoRALinear:
        return None, f"the layer is a {class_name(layer)}, not torchtune's DoRALinear"
    if not forward_is_the_class_s(layer):
        return None, "the layer's forward was replaced on the instance"
    reason = _why_not_layer(layer) or _read_weight(layer)[1]
    return (DoraKernelsDoRALinear, "") if reason is None else (None, reason)


def adapters(layer: nn.Module) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """(magnitude, [lora_a, lora_b]) of `layer`."""
    yield layer.magnitude, [getattr(part, "weight", part) for part in (layer.lora_a, layer.lora_b)]


class DoraKernelsDoRALinear(TakenOver, DoRALinear):
    """torchtune's DoRALinear, its forward computed by dora_linear."""

    library = "torchtune"

    def norm_and_gain(self) -> tuple[Tensor, Tensor]:
        dora = _adapted(self, self._known_weight("norm_and_gain"))
        norm = weight_norm(dora.weight, dora.lora_A, dora.lora_B, dora.scaling)
        return norm, gain_of(dora.magnitude.detach(), norm)

    def merged_weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of the frozen layer; that bias is the library's times the gain."""
        weight, _, gain = merge_weight_and_norm(_adapted(self, self._known_weight("merged_weight_and_bias")))
        bias = self.bias
        return weight, None if bias is None else (gain * bias.detach()).to(bias.dtype)

    def _known_weight(self, function: str) -> Weight:
        weight, reason = _read_weight(self)
        reason = _why_not_layer(self) or reason
        if self.disabled:
            reason = "the adapter is disabled"
        if reason is not None:
            raise ValueError(f"{function}: {reason}; expected a layer that enable() takes over")
        return weight

    def read_call(self, x: Tensor) -> tuple[Weight | None, str | None]:
        """The weight (N, K) and None, or the reason why torchtune must compute this call."""
        if self.disabled:
            return None, ""
        weight, reason = _read_weight(self)
        return weight, reason or _why_not_layer(self) or _why_not_call(self, x, weight)

    def compute(self, x: Tensor, weight: Weight) -> Tensor:
        """x: (..., K) -> (..., N)."""
        dora, bias, dropout = _adapted(self, weight), self.bias, self.dropout
        if bias is None and not is_active(dropout):
            return reuse.dora_linear_reusing(self, x, dora, None)
        norm = reuse.weight_norm_reusing(self, dora)
        gain = gain_of(dora.magnitude, norm)
        bias = None if bias is None else gain * bias
        if not is_active(dropout):
            return dora_linear_core(x, dora, bias, given=Given(norm))[0]
        base = linear_nf4(input=x, weight=self.weight) if self._quantize_base else F.linear(x, weight)
        return rescale(base, F.linear(dropout(x), dora.lora_A), dora.lora_B, gain, dora.scaling, bias)


def _adapted(layer: DoRALinear, weight: Weight) -> DoraWeight:
    """`weight` (N, K) with the adapter of `layer`, read at each call."""
    return DoraWeight(weight, layer.lora_a.weight, layer.lora_b.weight, layer.magnitude, layer.scaling)


def _read_weight(layer: DoRALinear) -> tuple[Weight | None, str | None]:
    """The frozen weight (N, K) and None, or the reason why torchtune must compute with it."""
    weight = layer.weight
    if weight.requires_grad:
        return None, "the base weight requires a gradient"
    if weight.dtype not in FLOATING:
        return None, f"the base weight is {weight.dtype}"
    if not layer._quantize_base:
        return weight, why_not_plain("the base weight", weight)
    if not quant.is_quantized(weight):
        return None, f"the base weight is a {class_name(weight)}; expected an NF4Tensor with quantize_base"
    return quant.read_or_reason(weight)


def _why_not_layer(layer: DoRALinear) -> str | None:
    """The reason why torchtune must compute a layer whose weight is known."""
    known_parts = {"lora_a": (nn.Linear,), "lora_b": (nn.Linear,), "dropout": DROPOUT_LAYERS}
    for part, known in known_parts.items():
        module = getattr(layer, part)
        if type(module) not in known:
            return f"{part} is a {class_name(module)}"
        reason = why_not_bypass(part, module)
        if reason is not None:
            return reason
    if layer.lora_a.bias is not None or layer.lora_b.bias is not None:
        return "lora_a or lora_b has a bias"
    if layer.use_bias is not (layer.bias is not None):
        return f"use_bias is {layer.use_bias}, which the bias does not agree with"
    if not isinstance(layer.scaling, (int, float)):
        return "scaling is a tensor"
    reason = why_not_scaling(layer.scaling, layer.weight.dtype)
    if reason is not None:
        return reason
    if isinstance(layer.dropout, nn.Dropout) and layer.dropout.inplace:
        return "the dropout works in place"
    return first_reason(why_not_plain(name, tensor) for name, tensor in _tensors(layer).items())


def _why_not_call(layer: DoRALinear, x: Tensor, weight: Weight) -> str | None:
    if x.dim() < 2:
        return "x has fewer than two dimensions"  # torchtune gives (1, N) for a vector
    for name, tensor in (("the base weight", weight), *_tensors(layer).items()):
        reason = why_not_device(x.device, name, tensor)
        if reason is not None:
            return reason
        if tensor.dtype != x.dtype:
            return f"x is {x.dtype} and {name} is {tensor.dtype}"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"  # torchtune's output is then wider than that of nn.Linear
    return None


def _tensors(layer: DoRALinear) -> dict[str, Tensor]:
    """The tensors that are read of the layer beside its weight, by name."""
    tensors = {"lora_a.weight": layer.lora_a.weight, "lora_b.weight": layer.lora_b.weight, "magnitude": layer.magnitude}
    return tensors if layer.bias is None else tensors | {"bias": layer.bias}
