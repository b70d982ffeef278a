"""The shared forward of PEFT's layers that are taken over: it is decided at each call who computes it."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from peft.tuners.lora import dora
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from dora_kernels import reuse
from dora_kernels.adapters import reading
from dora_kernels.adapters.peft import known
from dora_kernels.adapters.peft.adapter import Family, PeftAdapter, read_adapter, why_not_adapter
from dora_kernels.adapters.peft.merging import Merging
from dora_kernels.adapters.reading import why_not_device, why_not_plain
from dora_kernels.adapters.sharded import enable_first, requires_grad, why_not_gathered
from dora_kernels.functional.linear import operand_dtypes
from dora_kernels.functional.validate import FLOATING
from dora_kernels.quant import Weight, flatten_weight, sources
from dora_kernels.types import DoraWeight


class CallParts(NamedTuple):
    """The parts of a call for `compute`. dora and bias: of a known layer with one adapter."""

    operand: Tensor
    weight: Weight
    adapters: list[PeftAdapter]
    dora: DoraWeight | None = None
    bias: Tensor | None = None


class TakenOverLayer(Merging):
    """A layer of PEFT's whose DoRA forward dora_kernels computes. Subclasses say over which base layer, and how."""

    library = "PEFT"
    family: Family
    base_kind: ClassVar[str] = "linear"
    """For known.py: "linear", "convolution" or "quantized"."""
    dora_attributes = ("dora_dropout", known.ATTRIBUTE)

    @classmethod
    def read_base(cls, layer: LoraLayer) -> tuple[Weight | None, str | None]:
        """The base layer's weight, (N, K) of a linear layer, and None; or the reason why PEFT must compute over it."""
        raise NotImplementedError

    @classmethod
    def remarks(cls, weight: Weight) -> list[str]:
        """Remarks in the report on a layer over `weight` that is taken over."""
        return []

    def operands(self, x: Tensor, weight: Weight) -> tuple[Tensor, Weight, str | None]:
        """x and weight as they meet, and the reason, if any, why PEFT must compute these dtypes or shapes."""
        raise NotImplementedError

    def dora_forward(self, x: Tensor, operand: Tensor, weight: Weight, adapters: list[PeftAdapter]) -> Tensor:
        """The output with at least one adapter, all of them DoRA; operand and weight are as `operands` gave them."""
        raise NotImplementedError

    def norms(self, weight: Weight, adapters: list[PeftAdapter]) -> Tensor:
        """norm (adapters, N), kept as reuse/ says. weight is of the base layer's own shape."""
        stored, *storage = flatten_weight(weight)
        factors = [factor for adapter in adapters for factor in adapter.factors()]
        settings = ([adapter.scaling for adapter in adapters], storage, operand_dtypes(weight, factors[0]))
        return reuse.norm_reusing(
            self,
            (*sources(stored), *factors),
            settings,
            lambda: torch.stack([self.norm(weight, adapter) for adapter in adapters]),
        )

    def reread_base(self, weight: Tensor | None) -> tuple[Weight | None, str | None]:
        """The results of `read_base` over a base layer that was judged in this state (known.py) and has this weight."""
        return weight, None

    def one_adapter(
        self, x: Tensor, operand: Tensor, adapter: PeftAdapter, dora: DoraWeight, bias: Tensor | None
    ) -> Tensor:
        """dora_forward with one adapter, whose tensors over the weight are `dora`; bias is the base layer's."""
        return self.dora_forward(x, operand, dora.weight, [adapter])

    def read_call(self, x: Tensor) -> tuple[CallParts | None, str | None]:
        """The parts and None, or the reason why PEFT must compute this call.

        It is judged once for each state of the layer. Under torch.compile at each call: it guards on all that is read.
        """
        if torch.compiler.is_compiling() or not isinstance(x, Tensor):
            return self._judge(x)
        reading = known.read(self, x.device, self.base_kind)
        if reading is None:
            return self._judge(x)
        state, stored, bias, lora_A, lora_B, magnitude = reading
        last = self.__dict__.get(known.ATTRIBUTE)
        if last is not None and last.state == state:
            weight, reason = self.reread_base(stored)
            if reason is None and (stored is not None or weight.device == x.device):
                operand, weight, reason = self.operands(x, weight)
                adapters = last.adapters
                if len(adapters) > 1:
                    return CallParts(operand, weight, adapters), reason
                dora = DoraWeight(weight, lora_A, lora_B, magnitude, adapters[0].scaling)
                return CallParts(operand, weight, adapters, dora, bias), reason
        parts, reason = self._judge(x)
        if reason is None:
            again = known.read(self, x.device, self.base_kind)  # another thread may have changed it meanwhile
            if again is not None and again[0] == state:
                self.__dict__[known.ATTRIBUTE] = known.Known(state, parts.adapters)
        return parts, reason

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's; what is known of the layer would hold the adapter's parts, whatever becomes of the layer."""
        super().delete_adapter(adapter_name)
        self.__dict__.pop(known.ATTRIBUTE, None)

    def is_known(self, device: torch.device) -> bool:
        """True if dora_kernels computes a call with an x on `device`, as long as the dtypes meet. False if unknown."""
        last = self.__dict__.get(known.ATTRIBUTE)
        reading = None if last is None else known.read(self, device, self.base_kind)
        return reading is not None and last.state == reading[0]

    def _judge(self, x: Tensor) -> tuple[CallParts | None, str | None]:
        """`read_call`, judged anew."""
        if self.disable_adapters or self.merged:
            return None, ""
        adapters = [read_adapter(self, name, self.family) for name in self._known(self.active_adapters)]
        if not adapters:
            return None, ""
        weight, reason = self.read_base(self)
        reason = reason or _why_not_call(self, x, weight, adapters)
        if reason is not None:
            return None, reason
        operand, weight, reason = self.operands(x, weight)
        return CallParts(operand, weight, adapters), reason

    def compute(self, x: Tensor, parts: CallParts) -> Tensor:
        operand, weight, adapters, dora, bias = parts
        for adapter in adapters:
            if adapter.magnitude._dora_cache:
                adapter.magnitude._cache_clear()  # as each uncached forward of PEFT does: it may be stale by now
        if dora is not None:
            return self.one_adapter(x, operand, adapters[0], dora, bias)
        return self.dora_forward(x, operand, weight, [adapter.gathered() for adapter in adapters])

    def drops_otherwise(self) -> bool:
        """True with enable(dropout="lora") and an active dropout, unless PEFT computes one of the adapters anyway."""
        if self.dora_dropout != "lora" or self.disable_adapters or self.merged:
            return False
        adapters = [read_adapter(self, name, self.family) for name in self._known(self.active_adapters)]
        all_dora = all(type(adapter.variant) is self.family.variant for adapter in adapters)
        return all_dora and any(dropout_is_active(self, adapter) for adapter in adapters)


def _why_not_call(layer: LoraLayer, x: Tensor, weight: Weight, adapters: list[PeftAdapter]) -> str | None:
    if dora.ENABLE_DORA_CACHING and not layer.training:
        return "PEFT's DoraCaching is on"
    reason = why_not_device(x.device, "the base weight", weight) or why_not_gathered(weight)
    if reason is not None:
        return reason
    if not layer.cast_input_dtype_enabled:
        return "casting of the input is disabled"
    for adapter in adapters:
        reason = why_not_adapter(adapter, layer.family, x.device)
        if reason is not None:
            return reason
        lora_A, lora_B = adapter.factors()
        if lora_A.dtype != lora_B.dtype:
            return "lora_A and lora_B differ in dtype"
    return None


def read_weight(base: nn.Module) -> tuple[Tensor | None, str | None]:
    """The weight of a dense base layer and None, or None and the reason why it cannot be read."""
    weight = base.weight
    reason = why_not_plain("the base weight", weight)
    if reason is not None:
        return None, reason + enable_first(weight)
    if weight.dtype not in FLOATING:
        return None, f"the base weight is {weight.dtype}"
    if weight.requires_grad:
        if requires_grad(base):
            return None, "the base weight requires a gradient"
        weight = weight.detach()  # a view into FSDP1's flat parameter
    return weight, None


def dropout_is_active(layer: LoraLayer, adapter: PeftAdapter) -> bool:
    """True if dropout(x) is not x."""
    return layer.training and reading.is_active(adapter.dropout)


def nests_apart(layer: LoraLayer, adapter: PeftAdapter) -> bool:
    """True if PEFT puts `adapter` on a base of its own and not on the output of the adapters before it.

    An nn.Dropout that does not drop now is PEFT's dropout case all the same.
    """
    return layer.training and not isinstance(adapter.dropout, nn.Identity)
