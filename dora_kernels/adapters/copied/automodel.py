"""NeMo Automodel: LinearLoRA(use_dora=True), a Linear that has its adapter on itself, known by structure.

Dropout before the adapter ("pre") is of x, and the base product sees it with gain - 1; after it ("post") it is of
x A^T B^T. The norm is constant. Where a row of W + scaling * B A is zero, the library's gain is NaN, dora_kernels' 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_kernels.adapters.copied.probe import DROPOUT
from dora_kernels.adapters.copied.structure import LayerParts, Structure, checked, class_names, why_not_linear
from dora_kernels.adapters.reading import first_reason
from dora_kernels.reference import gain_of
from dora_kernels.types import DoraWeight


class AutomodelLayer(Structure):
    """Over LinearLoRA."""

    library = "Automodel"
    formula = "gain * (x W^T + scaling * dropout(x A^T B^T)) + bias, or with dropout of x"

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """A LinearLoRA with use_dora and the parts of its adapter."""
        if not isinstance(module, nn.Linear) or "LinearLoRA" not in class_names(module):
            return False
        parts = ("lora_A", "lora_B", "scale", "lora_magnitude")
        return bool(getattr(module, "use_dora", False)) and all(hasattr(module, part) for part in parts)

    @classmethod
    def read(cls, layer: nn.Module) -> tuple[LayerParts | None, str | None]:
        if getattr(layer, "super_fwd", None) is not None:
            return None, "super_fwd is set: the base product is another class's"
        reasons = [why_not_linear(part, getattr(layer, part)) for part in ("lora_A", "lora_B")]
        if layer.dropout_position not in ("pre", "post") or not isinstance(layer.dropout_p, (int, float)):
            reasons.append(f"dropout_position is {layer.dropout_position!r} and dropout_p {layer.dropout_p!r}")
        if layer.lora_magnitude is None:
            reasons.append("lora_magnitude was not initialised")
        reason = first_reason(reasons)
        if reason is not None:
            return None, reason
        bias = layer.bias if layer.bias is not None and layer.bias.numel() else None
        weights = (layer.weight, layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude)
        return checked(LayerParts(DoraWeight(*weights, layer.scale), bias))

    @classmethod
    def stand_ins(cls, twin: nn.Module, small: LayerParts) -> None:
        super().stand_ins(twin, small)
        twin.dropout_p = DROPOUT

    def has_dropout(self) -> bool:
        return self.dropout_p > 0

    def own_dropout(self) -> str | None:
        return "x A^T B^T" if self.dropout_position == "post" and self.dropout_p > 0 else None

    def why_not_x(self, x: Tensor, parts: LayerParts) -> str | None:
        if x.dtype != parts.dora.lora_A.dtype and not torch.is_autocast_enabled(x.device.type):
            return f"x is {x.dtype} and lora_A is {parts.dora.lora_A.dtype}, without autocast"
        return None

    def compute(self, x: Tensor, parts: LayerParts) -> Tensor:
        """y in a dtype as wide as x's, under autocast too."""
        if not (self.training and self.dropout_p > 0):
            y = self.linear(x, parts)
        elif self.dropout_position == "pre":
            y = self.linear(x, parts, F.dropout(x, self.dropout_p))
        else:  # dropout of (..., N) stands between B and the gain, so the two cannot be fused
            dora, bias, _ = parts
            base = F.linear(x, dora.weight)
            low_rank = F.dropout(F.linear(F.linear(x, dora.lora_A), dora.lora_B), self.dropout_p)
            y = gain_of(dora.magnitude, self.norm(dora)) * (base + dora.scaling * low_rank)
            y = (y if bias is None else y + bias).to(base.dtype)
        return y.to(torch.promote_types(y.dtype, x.dtype))


STRUCTURES = (AutomodelLayer,)
