"""Other people's formulas for one DoRA layer, written from their descriptions in plain PyTorch.

Both are outside PEFT, so that they can be compared with it: x (M, K), weight (N, K), lora_A (R, K), lora_B (N, R),
magnitude (N,) -> y (M, N), differentiable in x, lora_A, lora_B and magnitude, with the norm held constant. The
products run in x's dtype; norm and gain are kept in float32, which is kinder than their authors' bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# columns of weight that are taken to float32 at a time
CHUNK = 1024


def factored_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Row norms (N,) of weight + scaling * lora_B @ lora_A, without that product (arXiv 2603.22276).

    norm^2 = |W|^2 + 2 s <W, B A> + s^2 <B A, B A>, with <W, B A> = rowsum(B * (W A^T)) and <B A, B A> =
    rowsum(B * (B A A^T)), all in float32 (float64 for float64) over chunks of W's columns.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    squares = weight.new_zeros(weight.shape[0], dtype=dtype)
    product = torch.zeros_like(B)  # W A^T
    for start in range(0, weight.shape[1], CHUNK):
        columns = slice(start, start + CHUNK)
        block = weight[:, columns].to(dtype)
        squares += block.square().sum(1)
        product += block @ A[:, columns].T
    cross = (B * product).sum(1)
    update = (B * (B @ (A @ A.T))).sum(1)
    return (squares + 2 * scaling * cross + scaling**2 * update).clamp(min=0).sqrt()


def factored_compose(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float
) -> Tensor:
    """y = gain * (base + scaling * lora), composed elementwise after the two products; the factored norm."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        norm = factored_norm(weight, lora_A.to(x.dtype), lora_B.to(x.dtype), scaling)
    gain = magnitude / norm
    base = x @ weight.T
    lora = (x @ lora_A.to(x.dtype).T) @ lora_B.to(x.dtype).T
    return (gain * (base + scaling * lora)).to(x.dtype)


class RescaledLora(torch.autograd.Function):
    """LoRA's products, an eager rescale, and a backward pass written by hand: the way Axolotl's LoRA kernels go.

    Theirs has the row norm in a kernel of its own; here it is one GEMM that adds to weight and one pass over the
    result, which takes less time than a loop over R without tensor cores. Adapters only without dropout: theirs means
    something else under it than PEFT's does.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
            norm = torch.linalg.vector_norm(torch.addmm(weight, B, A, alpha=scaling), dim=1, dtype=dtype)
            gain = magnitude.to(dtype) / norm
            combined = torch.addmm(x @ weight.T, x @ A.T, B.T, alpha=scaling)
            y = (combined * gain).to(x.dtype)
        ctx.save_for_backward(x, weight, lora_A, lora_B, norm, gain, combined)
        ctx.scaling, ctx.magnitude_dtype = scaling, magnitude.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, norm, gain, combined = ctx.saved_tensors
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        dmagnitude = (dy * combined).sum(0, dtype=norm.dtype) / norm
        dz = (dy * gain).to(dy.dtype)
        projected = dz @ B
        dA = ctx.scaling * (projected.T @ x)
        dB = ctx.scaling * (dz.T @ (x @ A.T))
        dx = torch.addmm(dz @ weight, projected, A, alpha=ctx.scaling)
        return dx, None, dA.to(lora_A.dtype), dB.to(lora_B.dtype), dmagnitude.to(ctx.magnitude_dtype), None
