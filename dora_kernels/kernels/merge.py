"""The merged weight: gain * (weight + scaling * lora_B @ lora_A).

lora_B @ lora_A is formed in registers and never stands in device memory.
"""

import torch
import triton
import triton.language as tl

from dora_kernels.kernels.stored_weight import (
    direction_tile,
    known_rank,
    update_argument,
    weight_arguments,
    weight_config,
)
from dora_kernels.kernels.tile import Launch, block_offsets, rank_multiple
from dora_kernels.planning.configs import ceil_div
from dora_kernels.quant import Weight
from dora_kernels.reference import prepare
from dora_kernels.types import Prepared, Unfinished


@triton.jit
def _merge_kernel(
    weight,  # (N, K) as stored
    gain_ptr,  # (N,) in DTYPES.accumulate, contiguous, or None
    merged_ptr,  # (N, K), contiguous
    N,
    K,
    update,  # (N, K) or None
    FORMAT: tl.constexpr,
    SUBTRACT_WEIGHT: tl.constexpr,
    R_MULTIPLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    DTYPES: tl.constexpr,
):
    """merged = gain * (weight + scaling * lora_B @ lora_A) [- weight]. One program owns a [BLOCK_N, BLOCK_K] tile."""
    if update is not None:
        update = known_rank(update, R_MULTIPLE)
    offs_n = block_offsets(tl.program_id(0), BLOCK_N)
    k = tl.program_id(1).to(tl.int64) * BLOCK_K
    mask_n = offs_n < N
    w, merged = direction_tile(
        weight, update, offs_n, mask_n, k, K, FORMAT, BLOCK_N, BLOCK_K, BLOCK_R, ONE_CHUNK, DTYPES
    )  # [BLOCK_N, BLOCK_K], both
    if gain_ptr is not None:
        merged = tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)[:, None] * merged
    if SUBTRACT_WEIGHT:
        merged -= w
    offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
    pointers = merged_ptr + offs_n[:, None] * K + offs_k[None, :]
    tl.store(pointers, merged.to(merged_ptr.dtype.element_ty), mask=mask_n[:, None] & (offs_k < K)[None, :])


def merge(
    weight: Weight,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    gain: torch.Tensor | None,
    scaling: float,
    subtract_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    *,
    unfinished: Unfinished | None = None,
    prepared: Prepared | None = None,
) -> torch.Tensor:
    """The merged weight (N, K); as `reference.merge`, and without an adapter weight itself."""
    N, K = weight.shape
    R = 0 if lora_A is None else lora_A.shape[0]
    launch = Launch.of(weight, weight.dtype if lora_A is None else lora_A.dtype)
    config = weight_config(launch, "merge", weight, R)
    tiles = config.tiles(R)
    stored, weight_format = weight_arguments(weight, config.BLOCK_K)
    merged = weight.new_empty((N, K), dtype=out_dtype or weight.dtype)
    if merged.numel() == 0:
        return merged
    _merge_kernel[ceil_div(N, config.BLOCK_N), ceil_div(K, config.BLOCK_K)](
        stored,
        gain,
        merged,
        N,
        K,
        update_argument(lora_A, lora_B, scaling),
        FORMAT=weight_format,
        SUBTRACT_WEIGHT=subtract_weight,
        R_MULTIPLE=rank_multiple(R, lora_B),
        ONE_CHUNK=R <= tiles["BLOCK_R"],
        DTYPES=launch.dtypes,
        **tiles,
    )
    if prepared is not None:
        prepare(prepared, lora_B, gain)
    return merged


def dense(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """weight (N, K) itself or, of a quantized one, a dense copy in dtype; as `reference.dense`."""
    return weight if isinstance(weight, torch.Tensor) else merge(weight, None, None, None, 0.0, out_dtype=dtype)
