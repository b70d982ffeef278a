"""NVlabs/DoRA, LLaVA's tree: Linear(nn.Linear, LoraLayer) with its adapters by name, known by structure.

lora_A, lora_B, lora_dropout and weight_m_wdecomp are ModuleDicts, r and scaling dicts, and one adapter is active. The
norm is constant. Where a row of W + scaling * B A is zero, the library's gain is NaN; dora_kernels' is 0.
"""

from __future__ import annotations

from torch import Tensor, nn

from dora_kernels.adapters.copied.structure import LayerParts, Structure, checked, class_names, why_not_linear
from dora_kernels.adapters.reading import first_reason, is_active, why_not_bypass
from dora_kernels.types import DoraWeight


class LlavaLayer(Structure):
    """Over LLaVA's Linear."""

    library = "NVlabs/DoRA (LLaVA)"
    formula = "x W^T + (gain - 1) * xd W^T + gain * scaling * xd A^T B^T + bias, xd = dropout(x),"

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """A Linear that is a LoraLayer and has magnitudes by adapter name."""
        if not isinstance(module, nn.Linear) or not {"Linear", "LoraLayer"} <= class_names(module):
            return False
        magnitudes = getattr(module, "weight_m_wdecomp", None)
        return isinstance(magnitudes, nn.ModuleDict) and len(magnitudes) > 0 and hasattr(module, "active_adapter")

    @classmethod
    def read(cls, layer: nn.Module) -> tuple[LayerParts | None, str | None]:
        """The parts of the active adapter, or None and the reason."""
        name, N = layer.active_adapter, layer.weight.shape[0]
        if getattr(layer, "fan_in_fan_out", False):
            return None, "fan_in_fan_out is set, with which the library adds B A to the transposed weight"
        if layer.Wdecompose:
            return None, "Wdecompose is set, with which the library's forward is the base layer's"
        parts = ("lora_A", "lora_B", "lora_dropout", "weight_m_wdecomp", "scaling")
        missing = [part for part in parts if name not in getattr(layer, part)]
        if missing:
            return None, f"the active adapter {name!r} has no {missing[0]}"
        lora_A, lora_B, dropout, magnitude, scaling = (getattr(layer, part)[name] for part in parts)
        reasons = [
            why_not_linear("weight_m_wdecomp", magnitude, (N, 1)),
            why_not_linear("lora_A", lora_A),
            why_not_linear("lora_B", lora_B),
        ]
        if type(dropout) not in (nn.Dropout, nn.Identity):
            reasons.append(f"lora_dropout is a {type(dropout).__name__}")
        else:
            reasons.append(why_not_bypass("lora_dropout", dropout))
        reason = first_reason(reasons)
        if reason is not None:
            return None, reason
        dora = DoraWeight(layer.weight, lora_A.weight, lora_B.weight, magnitude.weight.squeeze(1), scaling)
        return checked(LayerParts(dora, layer.bias))

    def compute(self, x: Tensor, parts: LayerParts) -> Tensor:
        """y in x's dtype, under autocast too."""
        dropout = self.lora_dropout[self.active_adapter]
        return self.linear(x, parts, dropout(x) if is_active(dropout) else None).to(x.dtype)


STRUCTURES = (LlavaLayer,)
