"""Products that are left to the vendor's GEMM library, under either backend: it makes them best.

`project` and `outer_product` are the steps of those names as the library takes them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels.reference import accumulate_dtype


def base_product(x: Tensor, weight: Tensor, exact: bool) -> Tensor:
    """base (M, N) = x @ weight.T in x.dtype, or rounded to float32 only if `exact` (the GEMM's accumulator)."""
    if not exact or x.dtype not in (torch.bfloat16, torch.float16):
        return F.linear(x, weight)
    if x.device.type == "cpu":
        return F.linear(x.float(), weight.float())
    return matmul(x, weight.T, torch.float32)


def product_onto_low_rank(x: Tensor, weight: Tensor, low: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """z (M, N) = x @ weight.T + scaling * low @ lora_B.T, all of x.dtype: the GEMM adds its sums onto the second term.

    z is rounded once, as base is; the second term, too, on its way, which is of no account where it is the smaller.
    """
    if scaling == 0:  # as in `add_product`
        low, scaling = scaling * low, 1.0
    z = torch.addmm(x.new_zeros(1), low, lora_B.T, beta=0, alpha=scaling)
    return z.addmm_(x, weight.T)


def add_product(block: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """block += scaling * left @ right, in place."""
    if scaling == 0:  # a GEMM would skip the product, and 0 * inf is NaN
        return block.addmm_(scaling * left, right)
    return block.addmm_(left, right, alpha=scaling)


def project(
    rows: Tensor,
    factor: Tensor,
    out_dtype: torch.dtype | None = None,
    counters: Tensor | None = None,
    as_factor: bool = False,
    side: object | None = None,
) -> Tensor:
    """rows (M, K) @ factor (R, K).T -> (M, R): low = x @ A.T and P = dy @ (gain * B).

    In factor's dtype, which out_dtype may widen. Nothing is counted, no factor has a form of its own, no side is made.
    """
    dtype = factor.dtype
    return matmul(rows if rows.dtype == dtype else rows.to(dtype), factor.T, out_dtype or dtype)


def outer_product(
    left: Tensor,
    right: Tensor,
    scaling: float,
    out_dtype: torch.dtype,
    counters: Tensor | None = None,
    side: object | None = None,
) -> Tensor:
    """scaling * left (M, R).T @ right (M, K) -> (R, K) in out_dtype: dA. In left's dtype."""
    # the GEMM scales what it has summed, and then rounds; a scaling of 0 as in `add_product`
    if left.dtype == out_dtype != torch.float16 and scaling != 0:
        return torch.addmm(left.new_empty(1), left.T, right.to(left.dtype), beta=0, alpha=scaling)
    product = matmul(left.T, right.to(left.dtype), accumulate_dtype(left.dtype))
    return product.mul_(scaling).to(out_dtype)


def matmul(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    """left @ right in out_dtype, without rounding to half precision on the way where the GEMM library can."""
    half = left.dtype in (torch.bfloat16, torch.float16)
    if left.device.type == "cuda" and half and out_dtype == torch.float32:
        return torch.mm(left, right, out_dtype=out_dtype)
    if left.dtype == torch.float16 and out_dtype == torch.float32:
        return left.float() @ right.float()  # a sum over the tokens overflows float16 before scaling brings it back
    product = left @ right
    return product if product.dtype == out_dtype else product.to(out_dtype)  # which takes 0.6 us to do nothing
