"""NVlabs/DoRA: the layers of its two trees that have one adapter, known by structure.

    LLM tree      Linear(nn.Linear, LoraLayer): lora_A, lora_B and weight_m_wdecomp, each an nn.Linear; dora_simple
                  holds the norm constant, and Wdecompose learns the magnitude alone
    VL-T5 tree    DoraLinear_simple (the norm is constant) and DoraLinear: weight_v, weight_m, lora_A, lora_B, bias

The third tree, LLaVA's, is in llava.py. Where a row of W + scaling * B A is zero, the library's gain is NaN,
dora_kernels' 0.
"""

from __future__ import annotations

from types import FunctionType

import torch
from torch import Tensor, nn

from dora_kernels import reuse
from dora_kernels.adapters.copied.structure import LayerParts, Structure, checked, class_names, why_not_linear
from dora_kernels.adapters.reading import first_reason, is_active, why_not_bypass
from dora_kernels.functional.linear import dora_linear_core
from dora_kernels.functional.weight import weight_norm
from dora_kernels.types import DoraWeight, Given


class NvlabsLayer(Structure):
    """Over the LLM tree's Linear, whose eval() merges. While it is merged, the library computes it."""

    library = "NVlabs/DoRA"
    formula = "x W^T + (gain - 1) * xd W^T + gain * scaling * xd A^T B^T + bias, xd = dropout(x),"

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """A Linear that is a LoraLayer and has one magnitude, an nn.Linear."""
        if not isinstance(module, nn.Linear) or not {"Linear", "LoraLayer"} <= class_names(module):
            return False
        return isinstance(getattr(module, "weight_m_wdecomp", None), nn.Linear) and hasattr(module, "Wdecompose")

    @classmethod
    def read(cls, layer: nn.Module) -> tuple[LayerParts | None, str | None]:
        """The parts, with an A and a B of zeros for a layer that learns the magnitude alone; or None and the reason."""
        if getattr(layer, "fan_in_fan_out", False):
            return None, "fan_in_fan_out is set, with which the library adds B A to the transposed weight"
        magnitude, weight, dropout = layer.weight_m_wdecomp, layer.weight, layer.lora_dropout
        N, _ = weight.shape
        reasons = [why_not_linear("weight_m_wdecomp", magnitude, (N, 1))]
        if type(dropout) not in (nn.Dropout, nn.Identity, FunctionType):
            reasons.append(f"lora_dropout is a {type(dropout).__name__}")
        elif isinstance(dropout, nn.Module):
            reasons.append(why_not_bypass("lora_dropout", dropout))
        if layer.Wdecompose:
            (lora_A, lora_B), scaling, norm_grad = _zeros(weight), 1.0, False
        elif not all(isinstance(getattr(layer, part, None), nn.Linear) for part in ("lora_A", "lora_B")):
            return None, "it has no lora_A and lora_B"
        else:
            reasons += [why_not_linear(part, getattr(layer, part)) for part in ("lora_A", "lora_B")]
            lora_A, lora_B, scaling = layer.lora_A.weight, layer.lora_B.weight, layer.scaling
            norm_grad = not layer.dora_simple
        reason = first_reason(reasons)
        if reason is not None:
            return None, reason
        dora = DoraWeight(weight, lora_A, lora_B, magnitude.weight.squeeze(1), scaling)
        return checked(LayerParts(dora, layer.bias, norm_grad))

    def adapter_operands(self) -> DoraWeight | None:
        """None for a layer that learns the magnitude alone: its norm never changes."""
        return None if self.Wdecompose else super().adapter_operands()

    def own_dropout(self) -> str | None:
        can_drop = isinstance(self.lora_dropout, nn.Dropout) and self.lora_dropout.p > 0
        return "the x of (gain - 1) * x W^T, as there is no low-rank product" if self.Wdecompose and can_drop else None

    def compute(self, x: Tensor, parts: LayerParts) -> Tensor:
        """y in the weight's dtype, under autocast too."""
        dropout = self.lora_dropout  # a function where there is no dropout
        x_dropped = dropout(x) if isinstance(dropout, FunctionType) or is_active(dropout) else None
        x_dropped = None if x_dropped is x else x_dropped
        if self.Wdecompose:
            dora = parts.dora
            # of the weight alone: scaling is 0
            arguments = (dora.weight, dora.lora_A, dora.lora_B, 0.0)
            norm = reuse.norm_reusing(self, (dora.weight,), (), lambda: weight_norm(*arguments))
            y = dora_linear_core(x, dora, parts.bias, x_dropped=x_dropped, given=Given(norm))[0]
        else:
            y = self.linear(x, parts, x_dropped)
        return y.to(self.weight.dtype)


def _zeros(weight: Tensor) -> tuple[Tensor, Tensor]:
    """An A (1, K) and a B (N, 1) for a layer without."""
    N, K = weight.shape
    return weight.new_zeros(1, K), weight.new_zeros(N, 1)


class NvlabsVisionLayer(Structure):
    """Over the VL-T5 tree's DoraLinear_simple and DoraLinear, which have no dropout, and whose bias is trained."""

    library = "NVlabs/DoRA"

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """A DoraLinear or DoraLinear_simple with its four parameters."""
        if not class_names(module) & {"DoraLinear", "DoraLinear_simple"}:
            return False
        parameters = (getattr(module, name, None) for name in ("weight_v", "weight_m", "lora_A", "lora_B"))
        return all(isinstance(parameter, nn.Parameter) for parameter in parameters)

    @classmethod
    def read(cls, layer: nn.Module) -> tuple[LayerParts | None, str | None]:
        if layer.weight_m.dim() != 2 or layer.weight_m.shape[1] != 1:
            return None, f"weight_m has shape {tuple(layer.weight_m.shape)}; expected (N, 1)"
        norm_grad = "DoraLinear_simple" not in class_names(layer)
        magnitude = layer.weight_m.squeeze(1)
        dora = DoraWeight(layer.weight_v, layer.lora_A, layer.lora_B, magnitude, layer.scaling)
        return checked(LayerParts(dora, layer.bias, norm_grad))

    def why_not_x(self, x: Tensor, parts: LayerParts) -> str | None:
        """The reason, for more than one dtype without autocast: the library multiplies with one dense weight."""
        dtypes = {parts.dora.weight.dtype, parts.dora.lora_A.dtype, parts.dora.magnitude.dtype}
        if len(dtypes) > 1 and not torch.is_autocast_enabled(x.device.type):
            return f"its parameters are {' and '.join(sorted(map(str, dtypes)))}, without autocast"
        return None

    def compute(self, x: Tensor, parts: LayerParts) -> Tensor:
        return self.linear(x, parts)


STRUCTURES = (NvlabsLayer, NvlabsVisionLayer)
