"""DVoRA in PEFT: the layers of a VeRA model, given a magnitude.

PEFT has VeRA and no DVoRA, so `enable` leaves a VeRA model alone, and no code of PEFT's computes what `to_dvora` makes:
`disable` does not undo it. Nor does anything else: once the magnitude is trained there is no VeRA of the same function.
Convert a copy to keep the model.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.tuners.vera.layer import Linear as VeraLinear
from peft.tuners.vera.layer import VeraLayer
from torch import Tensor, nn

from dora_kernels import quant, reuse
from dora_kernels.adapters.classes import LINEAR, why_not_product
from dora_kernels.adapters.peft.bitsandbytes_cpu import refuse_wrong_decoding, unpack
from dora_kernels.adapters.peft.linear import CONV1D
from dora_kernels.adapters.reading import DROPOUT_LAYERS, class_name, forward_is_the_class_s, is_active, why_not_bypass
from dora_kernels.adapters.taking import TakenOver, take_over
from dora_kernels.extras.dvora.function import dvora_linear_reusing, dvora_norm, dvora_update
from dora_kernels.functional.arguments import described
from dora_kernels.functional.weight import merge_weight_and_norm, unmerge_weight, weight_norm
from dora_kernels.quant import Weight
from dora_kernels.reference import gain_of
from dora_kernels.types import DoraWeight


def to_dvora(model: nn.Module, adapter: str = "default") -> nn.Module:
    """Make the VeRA adapter `adapter` of a PEFT model a DVoRA adapter, in place, and return the model.

    Every layer gains the parameter vera_magnitude_vector[adapter] (N,), the row norms of its weight with its update, so
    that the model computes what it did. It is trained, saved and loaded with the adapter by PEFT, which drops it when
    it loads into a VeRA model: convert first, then load. PEFT's shared vera_A and vera_B stay what they are.

    Raises ValueError, and changes nothing, unless every VeRA layer that has the adapter can be computed here: over
    nn.Linear, Conv1D, or a layer quantized by bitsandbytes, torchao or HQQ, unmerged, without hooks. ImportError where
    PEFT saves a VeRA layer's own parameters alone.
    """
    if not hasattr(tuners_utils, "_get_tuner_state_dict_key_prefixes"):
        raise ImportError(f"to_dvora: PEFT {peft.__version__} would not save the magnitude; expected 0.21 or newer")
    magnitudes: dict[VeraLinear, nn.Parameter] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, VeraLayer) or adapter not in layer.vera_lambda_d:
            continue
        reason = _why_not_dvora(layer, adapter)
        if reason is not None:
            raise ValueError(f"to_dvora: {name}: {reason}")
        lambda_d = layer.vera_lambda_d[adapter]
        with torch.no_grad():
            norm = dvora_norm(_read_base(layer)[0], *vera_factors(layer, adapter))
        magnitudes[layer] = nn.Parameter(norm.to(lambda_d.dtype), requires_grad=lambda_d.requires_grad)
    if not magnitudes:
        found = f"no VeRA layer has an adapter {described(adapter)}"
        raise ValueError(f"to_dvora: {found}; expected one of get_peft_model's")
    for layer, magnitude in magnitudes.items():
        if not isinstance(layer, DvoraVeraLinear):
            layer.vera_magnitude_vector = nn.ParameterDict()
            take_over(layer, DvoraVeraLinear)
        layer.vera_magnitude_vector[adapter] = magnitude
    return model


class DvoraVeraLinear(TakenOver, VeraLinear):
    """A `vera.Linear` of PEFT's of which some adapters have a magnitude. One such adapter is active alone or not at
    all; adapters without one stay PEFT's."""

    library = "PEFT"
    reversible = False
    adapter_layer_names = (*VeraLinear.adapter_layer_names, "vera_magnitude_vector")
    # norm and gain of the DVoRA adapter that is merged
    _dvora_merged: tuple[Tensor, Tensor] | None = None

    def read_call(self, x: Tensor) -> tuple[str | None, str | None]:
        """(the active DVoRA adapter, None), or (None, ""): PEFT computes all others."""
        name = self._active_dvora()
        if name is None:
            return None, ""
        return name, None

    def difference(self) -> str | None:
        return None if self._active_dvora() is None else "and PEFT computes no DVoRA; expected a call without that"

    def compute(self, x: Tensor, name: str) -> Tensor:
        """x (..., K) -> (..., N) in x's dtype, as PEFT's VeRA. Dropout is that of PEFT's DoRA (see dvora_linear)."""
        weight, bias = _read_base(self)
        dropout = self.vera_dropout[name]
        x_dropped = dropout(x) if self.training and is_active(dropout) else None
        adapter = (*vera_factors(self, name), self.vera_magnitude_vector[name])
        y = dvora_linear_reusing(self, x, weight, *adapter, bias, x_dropped=x_dropped, function="DvoraVeraLinear")
        return y.to(x.dtype)

    def norm_and_gain(self) -> tuple[Tensor, Tensor]:
        lora_A, lora_B, magnitude = self._factors("norm_and_gain")
        norm = weight_norm(_read_base(self)[0], lora_A, lora_B, 1.0)
        return norm, gain_of(magnitude.detach(), norm)

    def merged_weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = _read_base(self)
        merged, _, _ = merge_weight_and_norm(DoraWeight(weight, *self._factors("merged_weight_and_bias"), 1.0))
        merged = merged.T.contiguous() if self.fan_in_fan_out else merged
        return merged, None if bias is None else bias.detach().clone()

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's merge; a DVoRA adapter is merged alone. Raises ValueError otherwise, or if safe_merge meets a NaN."""
        names = check_adapters_to_merge(self, adapter_names)
        name = self._dvora_adapter("merge", names)
        if names and self.merged and (name is not None or self._dvora_merged is not None):
            raise ValueError(f"merge: {self.merged_adapters} are merged; expected a DVoRA adapter to be merged alone")
        if name is None:
            super().merge(safe_merge, adapter_names)
        else:
            weight, _ = _read_base(self)
            refuse_wrong_decoding("merge", weight)
            merged, norm, gain = merge_weight_and_norm(DoraWeight(weight, *self._factors("merge", names), 1.0))
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"merge: the merged weight of adapter {name!r} is not finite; expected no NaN or inf")
            self.set_base_weight(merged.T if self.fan_in_fan_out else merged)
            self._dvora_merged = norm, gain
            self.merged_adapters.append(name)
        reuse.invalidate(self)

    @torch.no_grad()
    def unmerge(self) -> None:
        """PEFT's unmerge. Raises ValueError where a gain has lost a row, as unmerge_weight says."""
        if self._dvora_merged is None:
            super().unmerge()
        else:
            (name,) = self.merged_adapters
            base = self.get_base_weight()
            merged = base.T if self.fan_in_fan_out else base
            norm, gain = (row.to(base.device) for row in self._dvora_merged)
            layer = DoraWeight(merged, *dvora_update(*vera_factors(self, name)), None, 1.0)
            weight = unmerge_weight("unmerge", layer, norm, gain)
            self.set_base_weight(weight.T if self.fan_in_fan_out else weight)
            self._dvora_merged = None
            self.merged_adapters.clear()
        reuse.invalidate(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: with a magnitude the update is no low-rank matrix."""
        return not self.vera_magnitude_vector and super().supports_lora_conversion(adapter_name)

    def _apply(self, *arguments: Any, **keywords: Any) -> DvoraVeraLinear:
        reuse.invalidate(self)
        return super()._apply(*arguments, **keywords)

    def _active_dvora(self) -> str | None:
        """The DVoRA adapter of an ordinary call."""
        unused = self.disable_adapters or self.merged
        return None if unused else self._dvora_adapter("forward", self.active_adapters)

    def _dvora_adapter(self, function: str, names: list[str]) -> str | None:
        """The adapter among names that has a magnitude. Raises ValueError where it is not alone."""
        known = [name for name in names if name in self.vera_lambda_d]
        dvora = [name for name in known if name in self.vera_magnitude_vector]
        if dvora and len(known) > 1:
            raise ValueError(f"{function}: adapters {known} at once; expected DVoRA adapter {dvora[0]!r} alone")
        return dvora[0] if dvora else None

    def _factors(self, function: str, names: list[str] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """lora_A (R, K), lora_B (N, R), magnitude (N,) of the one DVoRA adapter that is active, or among names."""
        names = self.active_adapters if names is None else names
        name = self._dvora_adapter(function, names)
        if name is None or self.merged:
            state = f"{self.merged_adapters} are merged" if self.merged else f"adapters {names}"
            raise ValueError(f"{function}: {state}; expected one unmerged DVoRA adapter")
        return *dvora_update(*vera_factors(self, name)), self.vera_magnitude_vector[name]


def vera_factors(layer: VeraLinear, adapter: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """vera_A (R, K), vera_B (N, R), lambda_d (R,), lambda_b (N,), on the device of the last two."""
    lambda_d, lambda_b = layer.vera_lambda_d[adapter], layer.vera_lambda_b[adapter]
    vera_A = layer.vera_A[adapter][:, : layer.in_features].to(lambda_d.device)
    vera_B = layer.vera_B[adapter][: layer.out_features].to(lambda_d.device)
    return vera_A, vera_B, lambda_d, lambda_b


def _read_base(layer: VeraLinear) -> tuple[Weight, Tensor | None]:
    """The base layer's weight (N, K) and its bias. Raises ValueError where it must be called by PEFT."""
    base = layer.base_layer
    reason = why_not_bypass("base_layer", base)
    if reason is None and not quant.is_quantized(base):
        reason = _why_not_product(layer)
    if reason is not None:
        raise ValueError(f"DvoraVeraLinear: {reason}; expected a base layer whose weight may be read")
    if quant.is_quantized(base):
        unpack(base)
        return quant.read(base), base.bias
    return base.weight.T if layer.fan_in_fan_out else base.weight, base.bias


def _why_not_product(layer: VeraLayer) -> str | None:
    """The reason why a base layer that is not quantized must be called by PEFT."""
    product = CONV1D if layer.fan_in_fan_out else LINEAR
    return why_not_product("the base layer", layer.base_layer, product, "nn.Linear, or Conv1D with fan_in_fan_out")


def _why_not_dvora(layer: VeraLayer, adapter: str) -> str | None:
    """The reason why to_dvora cannot convert this adapter of a layer."""
    if type(layer) not in (VeraLinear, DvoraVeraLinear):
        return f"the layer is a {class_name(layer)}; expected PEFT's vera.Linear"
    base, dropout = layer.base_layer, layer.vera_dropout[adapter]
    if isinstance(layer, DvoraVeraLinear) and adapter in layer.vera_magnitude_vector:
        return f"adapter {adapter!r} is DVoRA already"
    if layer.merged:
        return f"adapters {layer.merged_adapters} are merged; expected unmerge first"
    if not forward_is_the_class_s(layer):
        return "the layer's forward was replaced on the instance"
    if not quant.is_quantized(base):
        reason = _why_not_product(layer)
        if reason is not None:
            return reason
        if base.weight.requires_grad:
            return "the base weight requires a gradient"
    else:
        reason = quant.read_or_reason(base)[1]
        if reason is not None:
            return reason
    if type(dropout) not in DROPOUT_LAYERS:
        return f"dropout is a {class_name(dropout)}"
    return why_not_bypass("base_layer", base)
