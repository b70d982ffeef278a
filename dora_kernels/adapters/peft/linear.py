"""PEFT's `lora.Linear`: its DoRA forward through dora_linear. quantized.py has the same over quantized weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dora_kernels import reuse
from dora_kernels.adapters.classes import LINEAR as TORCH_LINEAR
from dora_kernels.adapters.classes import product_of, why_not_product
from dora_kernels.adapters.peft.adapter import LINEAR, PeftAdapter, read_adapter, why_not_adapter
from dora_kernels.adapters.peft.layer import TakenOverLayer, dropout_is_active, nests_apart, read_weight
from dora_kernels.adapters.reading import why_not_bypass, why_not_dtypes
from dora_kernels.adapters.two_steps import why_not_two_steps
from dora_kernels.functional.linear import dora_linear_core, operand_dtypes
from dora_kernels.quant import Weight, frozen_product
from dora_kernels.reference import gain_of
from dora_kernels.reuse import sharing
from dora_kernels.types import DoraWeight, Given

CONV1D = product_of(Conv1D, "forward")


class TakenOverLinear(TakenOverLayer):
    """A linear layer of PEFT's whose DoRA forward is dora_linear. Subclasses name the base layer."""

    family = LINEAR

    draws_in_adapter_dtype = True
    """True if x is cast before its dropout under CUDA's autocast, too: the mask depends on the dtype."""

    def operands(self, x: Tensor, weight: Weight) -> tuple[Tensor, Weight, str | None]:
        if x.dim() < 2:
            return x, weight, "x has fewer than two dimensions"  # PEFT gives (1, N) for a vector
        return self.base_operands(x, weight)

    def base_operands(self, x: Tensor, weight: Weight) -> tuple[Tensor, Weight, str | None]:
        """x and weight as dora_linear takes them, and the reason, if any, why PEFT must compute these dtypes."""
        return x, weight, why_not_dtypes(x, weight)

    def adapter_operands(self) -> DoraWeight | None:
        """The weight with its one active adapter; None if several nest, whose norms `norms` keeps."""
        names = self._known(self.active_adapters)
        weight, reason = self.read_base(self)
        if self.disable_adapters or self.merged or len(names) != 1 or reason is not None:
            return None
        adapter = read_adapter(self, names[0], self.family)
        return None if why_not_adapter(adapter, self.family) else adapter.over(weight)

    def lora_A_to_share(self, device: torch.device) -> Tensor | None:
        """lora_A of the one active adapter, if it is trained, its dropout is not active and it is an nn.Linear."""
        if self.disable_adapters or self.merged:
            return None
        names = self._known(self.active_adapters)
        adapter = read_adapter(self, names[0], self.family) if len(names) == 1 else None
        if adapter is None or type(adapter.lora_A) is not nn.Linear or dropout_is_active(self, adapter):
            return None
        lora_A = adapter.lora_A.weight
        if not lora_A.requires_grad:
            return None
        is_ours = self.is_known(device) or why_not_adapter(adapter, self.family, device) is None
        return lora_A if is_ours else None

    def dora_forward(self, x: Tensor, operand: Tensor, weight: Weight, adapters: list[PeftAdapter]) -> Tensor:
        """x: (..., K) -> (..., N), of the dtype that nn.Linear would return.

        Without dropout, adapters nest: y = g2 * (g1 * (x W^T + d1) + d2) + bias, d = scaling * x A^T B^T.
        An adapter with dropout adds (g - 1) * xd W^T + g * d(xd), xd = dropout(x), to the output so far; or, where the
        layer was enabled with dropout="lora", nests as those without, with d(xd).
        """
        bias = self.base_layer.bias
        if len(adapters) == 1:
            return self.one_adapter(x, operand, adapters[0], adapters[0].over(weight), bias)
        return self.several_adapters(x, operand, weight, adapters, bias)

    def several_adapters(
        self, x: Tensor, operand: Tensor, weight: Weight, adapters: list[PeftAdapter], bias: Tensor | None
    ) -> Tensor:
        (first, *others), lora_dropout = adapters, self.dora_dropout == "lora"
        norms = self.norms(weight.T if self.fan_in_fan_out else weight, adapters)
        product_dtype = _output_dtype(x, operand, first.lora_A.weight)
        dtype = self.sum_dtype(product_dtype, bias)
        wide = torch.promote_types(dtype, first.magnitude.weight.dtype)
        if wide != product_dtype or (lora_dropout and dropout_is_active(self, first)):
            # Between two adapters PEFT keeps the running result in their dtype. Rounded to half precision there, the
            # error with two adapters was 1.22 times PEFT's and with three 1.31 (geometric means over y and gradients).
            result, nested = frozen_product(operand.to(weight.dtype), weight).to(wide), adapters
            result = result if bias is None else result + bias
        else:
            x_dropped, nested = self._dropped(first, x) if dropout_is_active(self, first) else None, others
            given = Given(norms[0])
            result, *_ = dora_linear_core(operand, first.over(weight), bias, x_dropped=x_dropped, given=given)
        for i, adapter in enumerate(nested, start=len(adapters) - len(nested)):
            apart = nests_apart(self, adapter) and not lora_dropout
            x_dropped = self._dropped(adapter, x) if apart or dropout_is_active(self, adapter) else None
            result = _nest(result, operand, adapter.over(weight), norms[i], bias, x_dropped, apart)
        return result.to(dtype)

    def sum_dtype(self, dtype: torch.dtype, bias: Tensor | None) -> torch.dtype:
        """The dtype of the base layer's output, whose product is of this dtype."""
        return dtype

    def one_adapter(
        self, x: Tensor, operand: Tensor, adapter: PeftAdapter, dora: DoraWeight, bias: Tensor | None
    ) -> Tensor:
        low = lows = x_dropped = None
        if dropout_is_active(self, adapter):
            x_dropped = self._dropped(adapter, x)
        elif type(adapter.lora_A) is nn.Linear:  # as in lora_A_to_share
            low, lows = sharing.shared_low(self, x, operand, dora.lora_A)
        lora_dropout = self.dora_dropout == "lora"
        result = reuse.dora_linear_reusing(
            self, operand, dora, bias, x_dropped=x_dropped, lora_dropout=lora_dropout, low=low
        )
        if lows is not None:
            lows.live_with(result)
        return result if operand is x else result.to(_output_dtype(x, operand, dora.lora_A))

    def _dropped(self, adapter: PeftAdapter, x: Tensor) -> Tensor:
        """dropout(x) with PEFT's mask for the same seed: drawn in the dtype in which PEFT draws it."""
        if self.draws_in_adapter_dtype or not torch.is_autocast_enabled():
            x = x.to(adapter.lora_A.weight.dtype)
        return adapter.dropout(x)


class TakenOverDense(TakenOverLinear):
    """TakenOverLinear with a dense weight."""

    @classmethod
    def why_not_base(cls, layer: LoraLinear) -> str | None:
        """The reason why the base layer has to be called."""
        raise NotImplementedError

    @classmethod
    def read_base(cls, layer: LoraLinear) -> tuple[Tensor | None, str | None]:
        base = layer.base_layer
        reason = cls.why_not_base(layer)
        if reason is not None:
            return None, reason
        weight, reason = read_weight(base)
        if reason is not None:
            return None, reason
        return weight.T if layer.fan_in_fan_out else weight, why_not_bypass("base_layer", base)

    def reread_base(self, weight: Tensor) -> tuple[Tensor, None]:
        return weight.T if self.fan_in_fan_out else weight, None

    def operands(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, str | None]:
        if x.dtype == weight.dtype and x.dim() > 1:  # the ordinary call, without three more functions
            return x, weight, None
        return super().operands(x, weight)

    def as_matrices(self, weight: Tensor, adapter: PeftAdapter) -> DoraWeight:
        return adapter.over(weight.T if self.fan_in_fan_out else weight)

    def shaped(self, rows: Tensor) -> Tensor:
        return rows.T.contiguous() if self.fan_in_fan_out else rows


class DoraKernelsLinear(TakenOverDense, LoraLinear):
    """Over `lora.Linear`, whose base layer is nn.Linear or GPT-2's Conv1D, or one that derives from these."""

    @classmethod
    def why_not_base(cls, layer: LoraLinear) -> str | None:
        product = CONV1D if layer.fan_in_fan_out else TORCH_LINEAR
        expected = "nn.Linear, or Conv1D with fan_in_fan_out"
        return why_not_product("the base layer", layer.base_layer, product, expected)


class DoraKernelsTwoSteps(TakenOverDense, LoraLinear):
    """Over `lora.Linear`, whose base layer is Falcon's, x @ W.T and then + bias, or another that computes so."""

    @classmethod
    def why_not_base(cls, layer: LoraLinear) -> str | None:
        if layer.fan_in_fan_out:
            return "fan_in_fan_out is set over an nn.Linear"
        return why_not_two_steps("the base layer", layer.base_layer)

    def sum_dtype(self, dtype: torch.dtype, bias: Tensor | None) -> torch.dtype:
        return dtype if bias is None else torch.promote_types(dtype, bias.dtype)

    def one_adapter(
        self, x: Tensor, operand: Tensor, adapter: PeftAdapter, dora: DoraWeight, bias: Tensor | None
    ) -> Tensor:
        """A bias of another dtype than the product's is added to y, which then has the wider of the two."""
        if bias is None or bias.dtype == _output_dtype(x, operand, dora.lora_A):
            return super().one_adapter(x, operand, adapter, dora, bias)
        return super().one_adapter(x, operand, adapter, dora, None) + bias


def _output_dtype(x: Tensor, operand: Tensor, lora_A: Tensor) -> torch.dtype:
    """The dtype of y: nn.Linear's."""
    return operand_dtypes(operand, lora_A)[0] if torch.is_autocast_enabled(x.device.type) else x.dtype


def _nest(
    result: Tensor,
    x: Tensor,
    dora: DoraWeight,
    norm: Tensor,
    bias: Tensor | None,
    x_dropped: Tensor | None,
    apart: bool,
) -> Tensor:
    """One more adapter over `result` (..., N), the output with the adapters before it, as dora_forward says."""
    gain = gain_of(dora.magnitude, norm)
    lora_x = x if x_dropped is None else x_dropped
    lora = F.linear(F.linear(lora_x.to(dora.lora_A.dtype), dora.lora_A), dora.lora_B) * dora.scaling
    if apart:
        base = frozen_product(x_dropped.to(dora.weight.dtype), dora.weight)
    else:
        base = result if bias is None else result - bias
    return result + (gain - 1) * base + gain * lora
