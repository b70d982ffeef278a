"""The second half of a DoRA layer alone, for a base and a low that are no plain products with x.

A convolution, an embedding, an adapter with a dropout of its own, and VeRA's scaled projection make base and low in
their own ways; what follows is the same for all of them, and one pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels import decompositions
from dora_kernels.functional import derivatives
from dora_kernels.functional.autograd import folded, in_dtype
from dora_kernels.functional.linear import checked, unfolded
from dora_kernels.functional.signature import run
from dora_kernels.functional.validate import check_rescale
from dora_kernels.planning.options import current_options
from dora_kernels.quant import frozen_product
from dora_kernels.reference import accumulate_dtype, gain_of
from dora_kernels.types import DoraWeight, Epilogue, Given


def rescale(
    base: Tensor,
    low: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """gain * (base + scaling * low lora_B^T) + bias [+ residual - base], differentiable in every tensor.

    Shapes: base (..., N), low (..., R), lora_B (N, R), gain (N,), bias (N,), residual as base -> (..., N) in
    base.dtype, rounded once. The product is taken in low's dtype, everything else in float32 (float64 for float64).
    residual is the base of x itself where base and low are those of dropout(x) (PEFT's meaning of dropout).
    Raises ValueError, naming the argument, where shapes, dtypes or devices do not fit; NotImplementedError (but for
    torch.jit.trace, which replays it) and higher derivatives as dora_linear.
    """
    scaling = check_rescale("rescale", base, low, lora_B, gain, scaling, bias, residual)
    return _rescaled(base, low, lora_B, gain, scaling, bias, residual)


def _rescaled(
    base: Tensor,
    low: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    scaling: float,
    bias: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """`rescale` of what fits each other."""
    gain = in_dtype(gain, accumulate_dtype(base.dtype)).contiguous()
    backend = current_options().backend
    if decompositions.is_traced_for_onnx():
        return decompositions.rescale(base, low, lora_B, gain, bias, residual, scaling, backend)
    base_rows, low_rows = folded(base, base.dtype), folded(low, low.dtype)
    residual = None if residual is None else folded(residual, residual.dtype)
    y = _Rescale.apply(base_rows, low_rows, lora_B, gain, bias, residual, scaling, backend)
    return unfolded(y, base.shape[:-1])


def dora_linear_lora_dropout(
    x: Tensor, x_dropped: Tensor, layer: DoraWeight, bias: Tensor | None, norm: Tensor, *, function: str = "dora_linear"
) -> Tensor:
    """gain * (x weight^T + scaling * (x_dropped lora_A^T) lora_B^T) + bias, gain = magnitude / norm.

    Dropout on the low-rank product alone: one product with the base weight, where dora_linear_core, whose dropout is
    on all that the adapter adds, needs two. x_dropped is of x's shape, norm (N,) is used as it is; dtypes, other
    arguments and errors as dora_linear_core.
    """
    scaling, how, _ = checked(function, x, layer, bias, x_dropped, Given(norm), False)
    weight, lora_A, lora_B, magnitude, _ = layer
    base = frozen_product(in_dtype(x, how.base_dtype), weight)
    low = F.linear(in_dtype(x_dropped, how.dtype), in_dtype(lora_A, how.dtype))
    return _rescaled(base, low, lora_B, gain_of(magnitude, norm), scaling, bias)


class _Rescale(torch.autograd.Function):
    """The operators of ops.py over base (M, N) and low (M, R)."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        low: Tensor,
        lora_B: Tensor,
        gain: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        scaling: float,
        backend: str,
    ) -> Tensor:
        y: Tensor = run("rescale", base, low, lora_B, gain, bias, residual, scaling, backend)
        needs_gain = ctx.needs_input_grad[3]
        ctx.save_for_backward(base if needs_gain else None, low, lora_B, gain)
        ctx.settings = scaling, None if bias is None else bias.dtype, residual is not None, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        base, low, lora_B, gain = ctx.saved_tensors
        scaling, bias_dtype, residual, backend = ctx.settings
        needs = list(ctx.needs_input_grad[:5])
        bias_dtype = bias_dtype or gain.dtype
        made: Sequence[Tensor | None]
        if derivatives.wanted(dy):
            operands = Epilogue(base, low, lora_B, gain, scaling)
            made = _gradients_of_the_definition(dy, operands, residual, needs, bias_dtype)
        else:
            arguments = (scaling, residual, needs, bias_dtype, backend)
            made = run("rescale_backward", dy, base, low, lora_B, gain, *arguments)
        gradients = (gradient if needed else None for gradient, needed in zip(made, needs, strict=True))
        return *gradients, dy if ctx.needs_input_grad[5] else None, None, None


def _gradients_of_the_definition(
    dy: Tensor, operands: Epilogue, residual: bool, needs: list[bool], bias_dtype: torch.dtype
) -> list[Tensor | None]:
    """The gradients of _Rescale for dy (M, N), None where not needed, that can be differentiated again."""
    base, low, lora_B, gain, scaling = operands
    if base is None:  # gain is not trained, and nothing else has a gradient that depends on base
        base = derivatives.absent(gain, dy.shape)

    def definition(base: Tensor, low: Tensor, lora_B: Tensor, gain: Tensor) -> Tensor:
        base, low, lora_B = (one.to(gain.dtype) for one in (base, low, lora_B))
        y = gain * (base + scaling * F.linear(low, lora_B))
        return y - base if residual else y

    *needs_definition, needs_bias = needs
    gradients = derivatives.gradients(definition, (base, low, lora_B, gain), needs_definition, dy)
    return [*gradients, dy.to(gain.dtype).sum(0).to(bias_dtype) if needs_bias else None]
