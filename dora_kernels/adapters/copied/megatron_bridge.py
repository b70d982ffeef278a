"""Megatron-Bridge: DoRALinear, a parallel linear layer in `to_wrap` and its adapter in `adapter`, known by structure.

    base, bias, xn = to_wrap(x)     xn = x, or what the layer norm in to_wrap made of it; bias is not added
    y = gain * (base + scaling * dropout(xn) A^T B^T) + (gain - 1) * to_wrap(dropout(xn) - xn)

The two dropouts are drawn separately. to_wrap and linear_in are called and may be of any class; dora_kernels computes
the norm, the product with B, the gain and the sum. Not with tensor parallelism: of a row-parallel layer the library
takes the norm of a shard of the columns. The norm is constant. Where a row of W + scaling * B A is zero, the library's
gain is NaN; dora_kernels' is 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_kernels.adapters.copied.structure import LayerParts, Structure, checked, class_names
from dora_kernels.adapters.reading import first_reason, is_active, why_not_bypass
from dora_kernels.functional.rescale import rescale
from dora_kernels.functional.weight import merge_weight_and_norm
from dora_kernels.reference import gain_of
from dora_kernels.types import DoraWeight


class MegatronBridgeLayer(Structure):
    """Over DoRALinear."""

    library = "Megatron-Bridge"
    formula = "gain * (base + scaling * dropout(x) A^T B^T) + (gain - 1) * (dropout(x) - x) W^T"
    opaque = ("to_wrap", "adapter.linear_in", "adapter.linear_out")

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """A DoRALinear with to_wrap and the parts of its adapter."""
        if "DoRALinear" not in class_names(module) or not isinstance(getattr(module, "to_wrap", None), nn.Module):
            return False
        parts = ("linear_in", "linear_out", "weight_magnitude", "alpha", "dim")
        adapter = getattr(module, "adapter", None)
        return hasattr(module, "base_linear_forward") and all(hasattr(adapter, part) for part in parts)

    @classmethod
    def read(cls, layer: nn.Module) -> tuple[LayerParts | None, str | None]:
        """The parts, or None and the reason. Sharded weights are found by their shapes, which do not fit each other."""
        adapter, to_wrap = layer.adapter, layer.to_wrap
        weights = {
            "to_wrap": getattr(to_wrap, "weight", None),
            "linear_in": getattr(adapter.linear_in, "weight", None),
            "linear_out": getattr(adapter.linear_out, "weight", None),
        }
        reasons = [f"{part} has no weight" for part, weight in weights.items() if not isinstance(weight, Tensor)]
        reasons += [_why_not_local(adapter), why_not_bypass("linear_out", adapter.linear_out)]
        reasons += [why_not_bypass("adapter", adapter)]
        for part in ("activation", "dropout"):
            module = getattr(adapter, part, None)
            reasons.append(why_not_bypass(part, module) if isinstance(module, nn.Module) else None)
        if any(getattr(part, "bias", None) is not None for part in (adapter.linear_in, adapter.linear_out)):
            reasons.append("linear_in or linear_out has a bias")
        if type(getattr(adapter, "activation", None)) not in (nn.Identity, type(None)):
            reasons.append(f"the adapter has an activation, {type(adapter.activation).__name__}")
        if type(adapter.dropout) not in (nn.Dropout, nn.Identity, type(None)):
            reasons.append(f"its dropout is a {type(adapter.dropout).__name__}")
        if adapter.dropout_position != "pre":
            reasons.append(f"dropout_position is {adapter.dropout_position!r}; expected 'pre'")
        reason = first_reason(reasons)
        if reason is not None:
            return None, reason
        scaling = adapter.alpha / adapter.dim
        if getattr(layer, "scaling", scaling) != scaling:
            return None, f"the norm has scaling {layer.scaling} and the adapter {scaling}"
        return checked(LayerParts(DoraWeight(*weights.values(), adapter.weight_magnitude, scaling)))

    @classmethod
    def stand_ins(cls, twin: nn.Module, small: LayerParts) -> None:
        if "_adapter_enabled" in vars(twin):
            twin._adapter_enabled = True
        twin.to_wrap = _Plain(small.dora.weight)
        twin.adapter.linear_in = _Plain(small.dora.lora_A)
        twin.adapter.linear_out = _Plain(small.dora.lora_B)

    def why_not_now(self) -> str | None:
        return None if getattr(self, "_adapter_enabled", True) else "its adapters are disabled"

    def why_not_x(self, x: Tensor, parts: LayerParts) -> str | None:
        return None if x.dim() == 3 else f"x has {x.dim()} dimensions; expected 3"

    def compute(self, x: Tensor, parts: LayerParts) -> tuple[Tensor, Tensor | None]:
        """(y, to_wrap's bias), as the library returns them."""
        base, bias, xn = self.base_linear_forward(x)
        dropout = self.adapter.dropout
        dropped = dropout(xn) if is_active(dropout) else xn
        low, _ = self.adapter.linear_in(dropped.contiguous())
        dora = parts.dora
        gain = gain_of(dora.magnitude, self.norm(dora))
        y = rescale(base, low, dora.lora_B, gain, dora.scaling)
        if self.training and isinstance(dropout, nn.Dropout) and self.dora_dropout != "lora":
            correction, *_ = self.base_linear_forward(dropout(xn) - xn)
            y = (y + (gain - 1) * correction).to(y.dtype)
        wide = torch.promote_types(dora.weight.dtype, dora.magnitude.dtype)
        return y.to(torch.promote_types(base.dtype, wide)), bias

    @torch.no_grad()
    def merged_weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias for to_wrap. The bias is scaled where to_wrap adds it, and not where it returns it."""
        weight, _, gain = merge_weight_and_norm(self._unmerged("merged_weight_and_bias").dora)
        bias = getattr(self.to_wrap, "bias", None)
        if bias is None or not bias.numel():
            return weight, None
        _, returned, _ = self.base_linear_forward(self.to_wrap.weight.new_zeros(1, 1, weight.shape[1]))
        if returned is not None:
            return weight, bias.detach().clone()
        return weight, (gain * bias).to(bias.dtype)

    def frozen_layer(self) -> nn.Module:
        """Raises ValueError: callers expect output and bias apart, and no frozen layer of torch's returns them so."""
        raise ValueError("frozen_layer: the layer returns its bias apart; expected Megatron-Bridge's own merge")


STRUCTURES = (MegatronBridgeLayer,)


def _why_not_local(adapter: nn.Module) -> str | None:
    """The reason why more is at work than the four tensors of `adapter`."""
    config = getattr(adapter, "config", None)
    size = getattr(getattr(adapter, "tp_group", None), "size", None)
    sizes = getattr(config, "tensor_model_parallel_size", 1), size() if callable(size) else size
    if any(size not in (1, None) for size in sizes):
        return "the layer is tensor-parallel"
    if getattr(config, "sequence_parallel", False) or not getattr(adapter, "disable_sequence_parallel_comm", True):
        return "the layer is sequence-parallel"
    if getattr(adapter, "is_expert", False):
        return "it is an expert's layer, whose tokens the library pads"
    if getattr(config, "cpu_offloading", False):
        return "activations are offloaded"
    if getattr(adapter, "_external_tp_reduce_scale", 1.0) != 1.0:
        return "the adapter's output is scaled for a sum over ranks"
    return None


class _Plain(nn.Module):
    """A stand-in for a parallel layer that is not sharded: the product, and no bias."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None
