"""PEFT's `lora.Conv1d`, `Conv2d` and `Conv3d`: the vendor's convolutions, and the rescale in one pass.

base (B, N, ...) is the base layer's convolution of x, low (B, R, ...) that of lora_A, which PEFT builds without groups;
lora_B is a 1x1 convolution, so a product over the channels. Seen with the channels last, the rest is a linear layer's.
"""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, LoraLayer
from torch import Tensor, nn

from dora_kernels import reuse
from dora_kernels.adapters.classes import CONVOLUTIONS, class_name, why_not_product
from dora_kernels.adapters.peft.adapter import CONV1D, CONV2D, CONV3D, PeftAdapter
from dora_kernels.adapters.peft.layer import TakenOverLayer, dropout_is_active, nests_apart, read_weight
from dora_kernels.adapters.reading import why_not_bypass, why_not_dtypes
from dora_kernels.functional.rescale import rescale
from dora_kernels.reference import accumulate_dtype, gain_of
from dora_kernels.types import DoraWeight


class TakenOverConv(TakenOverLayer):
    """A convolution of PEFT's. Its norm runs over all but the first dimension of the weight."""

    base_class: type[nn.Module]
    base_kind = "convolution"

    @classmethod
    def read_base(cls, layer: LoraLayer) -> tuple[Tensor | None, str | None]:
        """The weight (N, C / groups, ...) and None, or the reason why PEFT must compute over this base layer."""
        base = layer.base_layer
        reason = why_not_product("the base layer", base, CONVOLUTIONS[cls.base_class])
        if reason is not None:
            return None, reason
        weight, reason = read_weight(base)
        if reason is None and base.padding != "same" and any(step != 1 for step in base.dilation):
            reason = "the base layer is dilated, and PEFT's lora_A is not: their outputs differ in size"
        if reason is None and type(base) is not cls.base_class:
            reason = _why_not_factors(layer, base)
        if reason is not None:
            return None, reason
        return weight, why_not_bypass("base_layer", base)

    def operands(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, str | None]:
        if x.dim() != weight.dim():
            return x, weight, f"x has {x.dim()} dimensions and the base weight {weight.dim()}"  # no batch, or an error
        return x, weight, why_not_dtypes(x, weight)

    def dora_forward(self, x: Tensor, operand: Tensor, weight: Tensor, adapters: list[PeftAdapter]) -> Tensor:
        """x: (B, C, ...) -> (B, N, ...), of the dtype and in the memory format of the base layer's output.

        Adapters nest, and dropout is, as in TakenOverLinear.dora_forward, with convolutions for the products with W
        and A. One adapter over a 1x1 convolution of a channels-last x is a linear layer over its pixels.
        """
        if len(adapters) == 1 and x.movedim(1, -1).is_contiguous() and self._is_linear():
            return self._as_linear(x, weight, adapters[0])
        bias = self.base_layer.bias
        base = self.base_layer._conv_forward(x, weight, None)
        is_contiguous, dtype = base.is_contiguous(), base.dtype
        result = base.movedim(1, -1)
        if len(adapters) > 1:  # not rounded in between, as PEFT's is not
            result = result.to(torch.promote_types(dtype, adapters[0].magnitude.weight.dtype))
        norms = self.norms(weight, adapters)
        last = len(adapters) - 1
        for i, adapter in enumerate(adapters):
            _, lora_A, lora_B, magnitude, scaling = adapter.over(weight)
            lora_x, residual = x.to(lora_A.dtype), None
            if dropout_is_active(self, adapter):
                lora_x = adapter.dropout(lora_x)
            if self._has_a_base_of_its_own(adapter, first=i == 0):
                # padded with zeros as in PEFT, for every padding_mode of the layer
                layer = self.base_layer
                settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
                product = self.conv_fn(lora_x.to(weight.dtype), weight, None, *settings)
                result, residual = product.movedim(1, -1).to(result.dtype), result
            low = adapter.lora_A(lora_x).movedim(1, -1)
            gain = gain_of(magnitude.flatten(), norms[i])
            arguments = (low, self._channel_product(lora_B), gain, scaling, bias if i == last else None)
            result = rescale(result, *arguments, residual=residual)
        result = result.to(dtype).movedim(-1, 1)
        # rescale reads and writes pixel by pixel: between NCHW images it costs a copy of base, of low and of y
        return result.contiguous() if is_contiguous else result

    def _has_a_base_of_its_own(self, adapter: PeftAdapter, first: bool) -> bool:
        """True if the adapter's base is not the output so far: its dropout is active, or PEFT convolves x again."""
        if self.dora_dropout == "lora" or not nests_apart(self, adapter):
            return False
        return dropout_is_active(self, adapter) or not first or self.base_layer.padding_mode != "zeros"

    def _is_linear(self) -> bool:
        """True if every pixel of the output is computed from that pixel of x alone."""
        base = self.base_layer
        padding = base.padding if isinstance(base.padding, str) else "" if any(base.padding) else "valid"
        return base.groups == 1 and bool(padding) and all(size == 1 for size in (*base.kernel_size, *base.stride))

    def _as_linear(self, x: Tensor, weight: Tensor, adapter: PeftAdapter) -> Tensor:
        """dora_forward through dora_linear: x (B, C, ...) is seen as (B, ..., C), which is how it lies in memory."""
        dora, x_dropped = self.as_matrices(weight, adapter), None
        if dropout_is_active(self, adapter):
            x_dropped = adapter.dropout(x.to(dora.lora_A.dtype)).movedim(1, -1)
        y = reuse.dora_linear_reusing(
            self,
            x.movedim(1, -1),
            dora,
            self.base_layer.bias,
            x_dropped=x_dropped,
            lora_dropout=self.dora_dropout == "lora",
        ).movedim(-1, 1)
        # the vendor's Conv1d knows no channels-last format
        return y.contiguous() if x.is_contiguous() or x.dim() == 3 else y

    def _channel_product(self, lora_B: Tensor) -> Tensor:
        """lora_B (N, R / groups, 1, ...) as (N, R), with zeros between the groups."""
        lora_B, groups = lora_B.flatten(1), self.base_layer.groups
        return lora_B if groups == 1 else torch.block_diag(*lora_B.unflatten(0, (groups, -1)))

    def norm(self, weight: Tensor, adapter: PeftAdapter) -> Tensor:
        """norm (N,), a constant. In groups PEFT defines it by the product of B and A as they are stored."""
        if self.base_layer.groups == 1:
            return super().norm(weight, adapter)
        lora_A, lora_B = adapter.factors()
        dtype, R = accumulate_dtype(weight.dtype), lora_A.shape[0]
        # a weight in groups is small, and so is this
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            left, right = lora_B.reshape(-1, R).to(dtype), lora_A.reshape(R, -1).to(dtype)
            direction = torch.addmm(weight.reshape(len(left), -1).to(dtype), left, right, alpha=adapter.scaling)
            return torch.linalg.vector_norm(direction.view(len(weight), -1), dim=1)

    def as_matrices(self, weight: Tensor, adapter: PeftAdapter) -> DoraWeight:
        """The tensors as matrices; K runs over the weight in its order in memory."""
        _, lora_A, lora_B, magnitude, scaling = adapter.over(weight)
        if not weight.is_contiguous():  # channels-last
            weight, lora_A = weight.movedim(1, -1), lora_A.movedim(1, -1)
        return DoraWeight(weight.flatten(1), lora_A.flatten(1), lora_B.flatten(1), magnitude.flatten(), scaling)

    def shaped(self, rows: Tensor) -> Tensor:
        weight = self.base_layer.weight
        if weight.is_contiguous():
            return rows.view(weight.shape)
        return rows.view(weight.movedim(1, -1).shape).movedim(-1, 1)

    def _why_not_merge(self, name: str, quantized: bool = False) -> str | None:
        if self.base_layer.groups > 1:
            return "PEFT does not merge a convolution in groups"
        base = self.base_layer
        if base.padding_mode != "zeros" or any(step != 1 for step in base.dilation):
            return "PEFT's lora_A pads with zeros and is not dilated, as the base layer is: no one weight computes both"
        return super()._why_not_merge(name, quantized)


def _why_not_factors(layer: LoraLayer, base: nn.Module) -> str | None:
    """The reason why PEFT must compute over a base layer of a class that derives from torch's.

    PEFT calls that class to make lora_A and lora_B, and its constructor may make them otherwise than torch's.
    """
    ones, none = (1,) * len(base.kernel_size), (0,) * len(base.kernel_size)
    for name in layer.lora_A:
        lora_A, lora_B = layer.lora_A[name], layer.lora_B[name]
        if _settings(lora_A) != (base.kernel_size, base.stride, base.padding, ones, 1, "zeros"):
            return f"the constructor of {class_name(base)} makes another lora_A than that of torch's class"
        if _settings(lora_B) != (ones, ones, none, ones, base.groups, "zeros"):
            return f"the constructor of {class_name(base)} makes another lora_B than that of torch's class"
    return None


def _settings(convolution: nn.Module) -> tuple[object, ...]:
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return tuple(getattr(convolution, name, None) for name in names)


class DoraKernelsConv1d(TakenOverConv, Conv1d):
    """Over `lora.Conv1d`."""

    family, base_class = CONV1D, nn.Conv1d


class DoraKernelsConv2d(TakenOverConv, Conv2d):
    """Over `lora.Conv2d`."""

    family, base_class = CONV2D, nn.Conv2d


class DoraKernelsConv3d(TakenOverConv, Conv3d):
    """Over `lora.Conv3d`."""

    family, base_class = CONV3D, nn.Conv3d
