"""The product of two tall matrices over the tokens: dA."""

import torch

from dora_kernels import gemm
from dora_kernels.kernels.side import Side
from dora_kernels.kernels.token_sums import token_sums
from dora_kernels.planning import plan
from dora_kernels.planning.devices import device_facts


def outer_product(
    left: torch.Tensor,
    right: torch.Tensor,
    scaling: float,
    out_dtype: torch.dtype,
    counters: torch.Tensor | None = None,
    side: Side | None = None,
) -> torch.Tensor:
    """scaling * left (M, R).T @ right (M, K) -> (R, K) in out_dtype; as `reference.outer_product`."""
    (M, R), K = left.shape[-2:], right.shape[1]
    facts, same = device_facts(right.device), left.dim() == 2 and right.dtype == left.dtype
    if side is None and not plan.outer_by_kernel(M, K, R, right.itemsize, facts, same_dtype=same, beside=False):
        return gemm.outer_product(left, right, scaling, out_dtype)
    result = right.new_empty(R, K, dtype=out_dtype)
    token_sums(right, left, scaling, dB=result.T, counters=counters, side=side)  # dA^T is to x what dB is to dy
    return result
