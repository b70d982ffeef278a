"""The frozen layer's own product, for layers composed of a base and a low-rank part."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels.quant.formats import QuantizedWeight, Weight


def frozen_product(x: Tensor, weight: Weight) -> Tensor:
    """base: x (..., K) @ weight (N, K)^T -> (..., N), differentiable in x.

    A quantized weight is decoded to x's dtype for the forward product and again for the backward one, so that it is
    dense for no longer than a product takes.
    """
    return F.linear(x, weight) if isinstance(weight, Tensor) else _Product.apply(x, weight)


class _Product(torch.autograd.Function):
    """frozen_product of a quantized weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize(dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.weight.dequantize(dtype=dy.dtype), None
