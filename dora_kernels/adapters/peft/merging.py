"""merge and unmerge of PEFT's layers by dora_kernels, in PEFT's calls and with its bookkeeping.

Nothing of the size of B A is made. As in the forward pass, the norm is that of the unmerged weight, also for an adapter
that is merged over others. PEFT itself merges a quantized base, an adapter with a bias or of plain LoRA and a
convolution in groups. The norms are kept where PEFT keeps them, so that either can undo the other's merge.
"""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from dora_kernels import reuse
from dora_kernels.adapters.peft.adapter import PeftAdapter, read_adapter, why_not_adapter
from dora_kernels.adapters.taking import TakenOver
from dora_kernels.functional.weight import merge_weight_and_norm, unmerge_weight, weight_norm
from dora_kernels.quant import QuantizedWeight, Weight
from dora_kernels.reference import accumulate_dtype, gain_of
from dora_kernels.types import DoraWeight


class Merging(TakenOver):
    """merge, unmerge, and what whole-model merging asks of a layer. Subclasses say which matrices its tensors are."""

    def as_matrices(self, weight: Weight, adapter: PeftAdapter) -> DoraWeight:
        """weight, of the base layer's shape, with the adapter: (N, K), (R, K), (N, R) and (N,)."""
        return adapter.over(weight)

    def shaped(self, rows: Tensor) -> Tensor:
        """rows (N, K) in the shape and the strides of the base layer's weight: the weight of `as_matrices`, undone."""
        return rows

    def norm(self, weight: Weight, adapter: PeftAdapter) -> Tensor:
        """norm (N,) of the adapter over weight, a constant."""
        dora = self.as_matrices(weight, adapter)
        return weight_norm(dora.weight, dora.lora_A, dora.lora_B, dora.scaling)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the named adapters, or else the active ones, into the base weight, as PEFT's merge does.

        A row whose norm is 0 becomes 0, not NaN. Raises ValueError, and merges none of them, if safe_merge and a merged
        weight is not finite, or if adapters are merged already from which `unmerge` cannot get the weight back.
        """
        try:
            self._merge(safe_merge, adapter_names)
        finally:  # PEFT writes through .data
            reuse.forget(self)

    def _merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        names = adapter_names
        if names is None:
            names = self.active_adapters
        if isinstance(names, str) or any(map(self._why_not_merge, self._known([*self.merged_adapters, *names]))):
            return super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        names = self._known(check_adapters_to_merge(self, adapter_names))
        if names:
            weight, norms = self._merged(names, safe_merge)
            self.base_layer.weight.data = weight
            for name, norm in norms.items():
                magnitude = self.lora_magnitude_vector[name].weight
                self._cache_store(_norm_key(name), norm.view(magnitude.shape))
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take every merged adapter out of the base weight, to within one rounding of its dtype for each.

        Raises ValueError, and unmerges nothing, where a gain of 0, or one too small for the dtype, has lost a row.
        """
        try:
            self._unmerge()
        finally:
            reuse.forget(self)

    def _unmerge(self) -> None:
        names = self._known(self.merged_adapters)
        if not names or any(map(self._why_not_merge, names)):
            return super().unmerge()
        self.base_layer.weight.data = self._unmerged("unmerge")
        for name in names:
            self._cache_pop(_norm_key(name))
        self.merged_adapters.clear()

    def norm_and_gain(self) -> tuple[Tensor, Tensor]:
        names = self._active("norm_and_gain")
        if self.merged or len(names) != 1:
            state = f"{self.merged_adapters} are merged" if self.merged else f"{len(names)} adapters are active"
            raise ValueError(f"norm_and_gain: {state}; expected one active adapter, not merged")
        adapter = read_adapter(self, names[0], self.family)
        norm = self.norm(self._base_weight(), adapter)
        return norm, gain_of(adapter.magnitude.weight.detach().flatten(), norm)

    def merged_weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of the frozen layer. Several active adapters nest, as in the forward pass.

        Raises ValueError where adapters are disabled, none is active, or PEFT must merge one.
        """
        names = self._active("merged_weight_and_bias")
        bias = getattr(self.base_layer, "bias", None)
        bias = None if bias is None else bias.detach().clone()
        if self.merged and not isinstance(weight := self._base_weight(), QuantizedWeight):
            return weight.clone(), bias
        reasons = [self._why_not_merge(name, quantized=True) for name in names]
        if self.merged or not names or any(reasons):
            reason = next(filter(None, reasons), "no adapter is active")
            reason = "the layer is merged" if self.merged else reason
            raise ValueError(f"merged_weight_and_bias: {reason}; expected active DoRA adapters that can be merged")
        return self._merged(names)[0], bias

    def _active(self, function: str) -> list[str]:
        if self.disable_adapters:
            raise ValueError(f"{function}: the adapters are disabled; expected one that is active")
        return self._known(self.active_adapters)

    def _known(self, names: list[str]) -> list[str]:
        """Those of the adapters that this layer has."""
        return [name for name in names if name in getattr(self, self.family.holders[0])]

    def _base_weight(self) -> Weight:
        """The base layer's weight in its own shape, as it is now, merged or not."""
        weight, _ = self.read_base(self)
        return weight if isinstance(weight, QuantizedWeight) else self.base_layer.weight.detach()

    def _why_not_merge(self, name: str, quantized: bool = False) -> str | None:
        weight, reason = self.read_base(self)
        if reason is None and isinstance(weight, QuantizedWeight) and not quantized:
            reason = "the base weight is quantized"
        if reason is not None:
            return reason
        adapter = read_adapter(self, name, self.family)
        reason = "it is on meta" if weight.device.type == "meta" else None
        reason = reason or why_not_adapter(adapter, self.family, weight.device)
        if reason is None and len({factor.dtype for factor in adapter.factors()}) > 1:
            reason = "lora_A and lora_B differ in dtype"
        return None if reason is None else f"adapter {name!r}: {reason}"

    def _merged(self, names: list[str], safe_merge: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """The weight with the adapters merged in this order over what is merged already, and the norm of each."""
        weight, norms = self._base_weight(), {}
        # while PEFT merges again what it had to unmerge, it keeps the unmerged weight here
        base = self._caches.get("unmerged_base_weight")
        base = self._unmerged("merge") if base is None else base
        # the merged weight does not depend on what surrounds the call
        with torch.autocast(weight.device.type, enabled=False):
            for name in names:
                adapter = read_adapter(self, name, self.family)
                norm = self.norm(base, adapter)
                rows, norms[name], _ = merge_weight_and_norm(self.as_matrices(weight, adapter), norm)
                if safe_merge and not rows.isfinite().all():
                    raise ValueError(
                        f"merge: NaNs detected in the merged weights. The adapter {name} seems to be broken: "
                        f"{int((~rows.isfinite()).any(dim=1).sum())} of {len(rows)} rows are not finite; expected none"
                    )
                weight = self.shaped(rows)
        return weight, norms

    def _unmerged(self, function: str) -> Weight:
        """The base weight without the adapters merged into it; itself where there is none."""
        weight = self._base_weight()
        for name in reversed(self._known(self.merged_adapters)):
            adapter = read_adapter(self, name, self.family)
            norm = self._caches[_norm_key(name)].to(weight.device, accumulate_dtype(weight.dtype)).flatten()
            gain = gain_of(adapter.magnitude.weight.detach().flatten(), norm)
            weight = self.shaped(unmerge_weight(function, self.as_matrices(weight, adapter), norm, gain))
        return weight


def _norm_key(name: str) -> str:
    """The key under which PEFT keeps the norm that an adapter was merged with."""
    return f"{name}-weight_norm"
