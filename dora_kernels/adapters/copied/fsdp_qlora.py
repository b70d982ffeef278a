"""fsdp_qlora: DORA (BNBDORA and HQQDORA before), over bitsandbytes 4-bit, HQQ or nn.Linear, known by structure.

    y = gain * (base_layer(x) + x A^T B^T)        base_layer's bias is in it; no alpha, no dropout, the norm is constant

The weight is read as it is stored and never decoded whole. Where a row of W + B A is zero, the library's gain is NaN;
dora_kernels' is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dora_kernels import quant
from dora_kernels.adapters.classes import LINEAR, why_not_product
from dora_kernels.adapters.copied.structure import LayerParts, Structure, checked, class_names, why_not_linear
from dora_kernels.adapters.reading import first_reason, why_not_bypass
from dora_kernels.functional.linear import dora_linear_core
from dora_kernels.quant import QuantizedWeight
from dora_kernels.reference import gain_of
from dora_kernels.types import DoraWeight, Given

CLASSES = {"DORA", "BNBDORA", "HQQDORA"}


class FsdpQloraLayer(Structure):
    """Over DORA."""

    library = "fsdp_qlora"
    formula = "gain * (x W^T + bias + x A^T B^T)"
    opaque = ("base_layer",)
    bias_is_scaled = True

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """One of CLASSES with the parts of its adapter."""
        parts = (getattr(module, part, None) for part in ("base_layer", "magnitude_layer", "dora_layer"))
        if not class_names(module) & CLASSES or not all(isinstance(part, nn.Module) for part in parts):
            return False
        dora, magnitude = module.dora_layer, module.magnitude_layer
        return hasattr(dora, "lora_A") and hasattr(dora, "lora_B") and hasattr(magnitude, "magnitude")

    @classmethod
    def read(cls, layer: nn.Module) -> tuple[LayerParts | None, str | None]:
        base, dora = layer.base_layer, layer.dora_layer
        reasons = [why_not_linear(part, getattr(dora, part)) for part in ("lora_A", "lora_B")]
        modules = {"base_layer": base, "dora_layer": dora, "magnitude_layer": layer.magnitude_layer}
        reasons += [why_not_bypass(part, module) for part, module in modules.items()]
        # FSDP wraps them, and outside of its own forward such a module has no storage
        reasons += [
            f"{part} is wrapped" for part, module in modules.items() if "_fsdp_wrapped_module" in module._modules
        ]
        weight = getattr(base, "weight", None)
        if quant.is_quantized(base):
            weight, reason = quant.read_or_reason(base)
            reasons.append(reason)
        else:
            reasons.append(why_not_product("base_layer", base, LINEAR, "nn.Linear or a quantized one"))
        reason = first_reason(reasons)
        if reason is not None:
            return None, reason
        magnitude = layer.magnitude_layer.magnitude
        adapted = DoraWeight(weight, dora.lora_A.weight, dora.lora_B.weight, magnitude, 1.0)
        return checked(LayerParts(adapted, base.bias))

    @classmethod
    def stand_ins(cls, twin: nn.Module, small: LayerParts) -> None:
        twin.base_layer = nn.Linear(1, 1, bias=False, device="cpu")
        twin.base_layer.weight = small.dora.weight
        twin.base_layer.bias = small.bias

    def why_not_x(self, x: Tensor, parts: LayerParts) -> str | None:
        """The reason, also for more than one dtype: the library's output then depends on the base layer."""
        if x.dim() != 3:
            return f"x has {x.dim()} dimensions; expected 3"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on, in which the library returns float32"
        compute_dtype = getattr(self.base_layer, "compute_dtype", None) or x.dtype
        weight, lora_A, _, magnitude, _ = parts.dora
        dtypes = {x.dtype, compute_dtype, lora_A.dtype, magnitude.dtype}
        if isinstance(weight, QuantizedWeight) and weight.format == "nf4_torchao":
            dtypes.add(weight.dtype)
        if len(dtypes) > 1:
            return f"x, base_layer and the adapter are {' and '.join(sorted(map(str, dtypes)))}; expected one dtype"
        return None

    def compute(self, x: Tensor, parts: LayerParts) -> Tensor:
        dora, bias, _ = parts
        if isinstance(dora.weight, QuantizedWeight):
            dora = dora._replace(weight=dora.weight.rounded_to(x.dtype))
        if bias is None:
            return self.linear(x, LayerParts(dora))
        norm = self.norm(dora)
        bias = (gain_of(dora.magnitude, norm) * bias).to(x.dtype)
        return dora_linear_core(x, dora, bias, given=Given(norm))[0]


STRUCTURES = (FsdpQloraLayer,)
