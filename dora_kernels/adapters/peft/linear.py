"""PEFT's `lora.Linear`: its DoRA forward through dora_linear. quantized.py has the same over quantised weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import dora
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dora_kernels import launch, reuse
from dora_kernels.adapters.peft.adapter import LINEAR, Adapter, adapter_reason, read_adapter
from dora_kernels.adapters.sharded import enable_first, partition_reason, requires_grad
from dora_kernels.adapters.taking import TakenOver, bypass_reason, class_name
from dora_kernels.functional import operand_dtypes, weight_norm
from dora_kernels.quant import Weight
from dora_kernels.reference import gain_ref

AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = (*AUTOCAST_DTYPES, torch.float64)


class TakenOverLinear(TakenOver):
    """A linear layer of PEFT's, its DoRA forward computed by dora_linear. Subclasses say what the base layer is."""

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
        adapters = [read_adapter(self, name) for name in self.active_adapters if name in known]
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
        adapters = [adapter.gathered() for adapter in adapters]
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


class DoraKernelsLinear(TakenOverLinear, LoraLinear):
    """Over `lora.Linear`, whose base layer is nn.Linear or GPT-2's Conv1D."""

    @staticmethod
    def read_base(layer: LoraLinear) -> tuple[Tensor | None, str | None]:
        """As TakenOverLinear.read_base."""
        base = layer.base_layer
        if type(base) is not (Conv1D if layer.fan_in_fan_out else nn.Linear):
            return None, f"the base layer is a {class_name(base)}; expected nn.Linear, or Conv1D with fan_in_fan_out"
        weight = base.weight
        if type(weight) not in (nn.Parameter, Tensor):
            return None, f"the base weight is a {class_name(weight)}, not a plain tensor{enable_first(weight)}"
        if weight.dtype not in DTYPES:
            return None, f"the base weight is {weight.dtype}"
        if weight.requires_grad:
            if requires_grad(base):
                return None, "the base weight requires a gradient"
            weight = weight.detach()
        return weight.T if layer.fan_in_fan_out else weight, bypass_reason("base_layer", base)


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
    reason = partition_reason(weight)
    if reason is not None:
        return reason
    if not layer.cast_input_dtype_enabled:
        return "casting of the input is disabled"
    for adapter in adapters:
        reason = adapter_reason(adapter, LINEAR, device)
        if reason is not None:
            return reason
        if adapter.lora_A.weight.dtype != adapter.lora_B.weight.dtype:
            return "lora_A and lora_B differ in dtype"
    return None


def _drops(layer: TakenOverLinear, adapter: Adapter) -> bool:
    """Whether dropout(x) is not x."""
    dropout = adapter.dropout
    return layer.training and dropout.training and not isinstance(dropout, nn.Identity) and dropout.p > 0


def _dropped(layer: TakenOverLinear, adapter: Adapter, x: Tensor) -> Tensor:
    """dropout(x) with PEFT's mask for the same seed, so drawn in the dtype it draws in."""
    if layer.draws_in_adapter_dtype or not torch.is_autocast_enabled():
        x = x.to(adapter.lora_A.weight.dtype)
    return adapter.dropout(x)


def _nest(
    layer: TakenOverLinear,
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
