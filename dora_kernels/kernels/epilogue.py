"""Steps of the forward pass: the low-rank projection, the fused epilogue, and the product with a merged weight."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from dora_kernels import gemm
from dora_kernels.kernels.norm import norm
from dora_kernels.kernels.tile import (
    TL_DTYPE,
    Launch,
    block_offsets,
    known_multiple,
    known_rows,
    load,
    load_tile,
    load_vector,
    low_rank,
    matrix,
    rank_multiple,
    transposed,
    vector,
)
from dora_kernels.kernels.weight import merge
from dora_kernels.planning import plan
from dora_kernels.planning.configs import HIGH_RANK, Config, ceil_div
from dora_kernels.quant import Weight


@triton.jit(do_not_specialize=["M"])
def _project_kernel(
    rows_ptr,  # (M, K)
    factor_ptr,  # (R, K) through its strides
    scale_ptr,  # (K,) in ACC_DTYPE
    partial_ptr,  # (splits, M, R), contiguous
    M,
    K,
    R,
    stride_rm,
    stride_rk,
    stride_fr,
    stride_fk,
    columns_per_split,
    HAS_SCALE: tl.constexpr,
    R_MULTIPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OPERAND_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    """partial[split, m, r] = sum over the split's k of rows[m, k] * scale[k] * factor[r, k].

    One program owns a [BLOCK_M, BLOCK_R] tile of one split; those that read the same rows start one after the other.
    """
    R, stride_fk = known_multiple(R, R_MULTIPLE), known_multiple(stride_fk, R_MULTIPLE)
    blocks_r = tl.cdiv(R, BLOCK_R)
    offs_r = block_offsets(tl.program_id(0) % blocks_r, BLOCK_R)
    # not on an axis of its own: CUDA's second and third end at 65535 programs
    offs_m = block_offsets(tl.program_id(0) // blocks_r, BLOCK_M)
    split = tl.program_id(1).to(tl.int64)
    mask_m = offs_m < M
    mask_r = offs_r < R
    start = split * columns_per_split
    end = tl.minimum(start + columns_per_split, K)
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC_DTYPE)
    for k in range(start, end, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = offs_k < end
        rows = load_tile(rows_ptr, offs_m, offs_k, mask_m, mask_k, stride_rm, stride_rk)  # [BLOCK_M, BLOCK_K]
        factor = load_tile(factor_ptr, offs_k, offs_r, mask_k, mask_r, stride_fk, stride_fr)  # [BLOCK_K, BLOCK_R]
        if HAS_SCALE:
            scale = tl.load(scale_ptr + offs_k, mask=mask_k, other=0.0)
            factor = scale[:, None] * factor.to(ACC_DTYPE)
        acc = tl.dot(
            rows.to(OPERAND_DTYPE),
            factor.to(OPERAND_DTYPE),
            acc,
            input_precision=DOT_PRECISION,
            out_dtype=ACC_DTYPE,
        )
    pointers = partial_ptr + (split * M + offs_m)[:, None] * R + offs_r[None, :]
    tl.store(pointers, acc.to(partial_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["size", "splits"])
def _finish_project_kernel(
    partial_ptr,  # (splits, size)
    result_ptr,  # (size,)
    size,
    splits,
    ACC_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """result = sum of the partial products, in a fixed order. One program owns BLOCK_M elements."""
    offsets = block_offsets(tl.program_id(0), BLOCK_M)
    mask = offsets < size
    acc = tl.zeros([BLOCK_M], dtype=ACC_DTYPE)
    for split in range(0, splits):
        # no int64 needed: there are several splits only where the output is small (configs.splits)
        acc += tl.load(partial_ptr + split * size + offsets, mask=mask, other=0.0)
    tl.store(result_ptr + offsets, acc.to(result_ptr.dtype.element_ty), mask=mask)


def project(
    rows: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """rows (M, K) @ (factor (R, K) * scale (K,)).T -> (M, R); as `reference.project_ref`."""
    dtype = factor.dtype
    out_dtype = out_dtype or dtype
    M, K = rows.shape
    R = factor.shape[0]
    if not plan.project_by_kernel(R, scaled=scale is not None, same_dtype=rows.dtype == dtype):
        return gemm.project(rows, factor, scale, out_dtype)
    how = Launch.of(rows, dtype)
    config = how.config("project")
    tiles = config.tiles(R)
    blocks = ceil_div(R, tiles["BLOCK_R"]) * ceil_div(M, config.BLOCK_M)
    columns_per_split, splits = how.split(blocks, K, config.BLOCK_K, config)
    result = rows.new_empty((M, R), dtype=out_dtype)
    if M == 0:
        return result
    partial = result if splits == 1 else rows.new_empty((splits, M, R), dtype=how.accumulate)
    _project_kernel[blocks, splits](
        rows,
        factor,
        scale,
        partial,
        M,
        K,
        R,
        *rows.stride(),
        *factor.stride(),
        columns_per_split,
        HAS_SCALE=scale is not None,
        R_MULTIPLE=rank_multiple(R, factor.T),
        **how.dtypes(),
        **tiles,
    )
    if splits > 1:
        finish = how.config("finish_project")
        _finish_project_kernel[ceil_div(M * R, finish.BLOCK_M),](
            partial, result, M * R, splits, ACC_DTYPE=TL_DTYPE[how.accumulate], **finish.tiles()
        )
    return result


@triton.jit(do_not_specialize=["M"])
def _epilogue_kernel(
    base,  # (M, N)
    low,  # (M, R) or None
    lora_B,  # (N, R)
    gain_ptr,  # (N,) in DTYPES.accumulate, contiguous
    bias,  # (N,) or None
    residual,  # (M, N) or None
    y_ptr,  # (M, N), contiguous
    M,
    N,
    R,
    scaling,
    R_MULTIPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    DTYPES: tl.constexpr,
):
    """y = gain * (base + scaling * low @ lora_B.T) + bias [+ residual - base].

    One program owns a [BLOCK_M, BLOCK_N] tile.
    """
    if low is not None:
        R, low, lora_B = known_multiple(R, R_MULTIPLE), known_rows(low, R_MULTIPLE), known_rows(lora_B, R_MULTIPLE)
    offs_m = block_offsets(tl.program_id(0), BLOCK_M)
    offs_n = block_offsets(tl.program_id(1), BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    base_tile = load(base, offs_m, offs_n, mask_m, mask_n).to(DTYPES.accumulate)  # [BLOCK_M, BLOCK_N]
    gain = tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)  # [BLOCK_N]
    y = base_tile
    if low is not None:
        product = low_rank(
            low, transposed(lora_B), offs_m, offs_n, mask_m, mask_n, R, BLOCK_R, ONE_CHUNK, DTYPES
        )  # fmt: skip
        y += scaling * product
    y = gain[None, :] * y
    if bias is not None:
        y += load_vector(bias, offs_n, mask_n).to(DTYPES.accumulate)[None, :]
    if residual is not None:
        y += load(residual, offs_m, offs_n, mask_m, mask_n).to(DTYPES.accumulate) - base_tile
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def _epilogue_config(
    how: Launch,
    base: torch.Tensor,
    low: torch.Tensor | None,
    lora_B: torch.Tensor,
    residual: torch.Tensor | None,
) -> Config:
    """The configuration of the epilogue: a high rank's large tile where it spills nothing and fills the device.

    It has no register to spare: 128 x 256 spills 190 to 1700 bytes a thread beside a residual, with a base in another
    dtype, and where base, low or lora_B is not loaded in whole vectors of 16 bytes.
    """
    M, N = base.shape
    R = lora_B.shape[1]
    if R > HIGH_RANK and low is not None and residual is None and base.dtype == low.dtype:
        large = how.config("epilogue", R)
        fills = ceil_div(M, large.BLOCK_M) * ceil_div(N, large.BLOCK_N) >= how.facts.multiprocessors
        # 16 is what the JIT sees by itself, 8 what rank_multiple tells it
        if fills and _in_vectors(base, 16) and _in_vectors(low, 8) and _in_vectors(lora_B, 8):
            return large
    return how.config("epilogue")


def _in_vectors(matrix: torch.Tensor, multiple: int) -> bool:
    """Whether every row of the matrix begins and ends at a multiple of so many elements, and of 16 bytes."""
    stride_row, stride_column = matrix.stride()
    multiples = matrix.shape[1] % multiple == 0 and stride_row % multiple == 0
    return stride_column == 1 and multiples and matrix.data_ptr() % 16 == 0


def epilogue(
    base: torch.Tensor,
    low: torch.Tensor | None,
    lora_B: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    out_dtype: torch.dtype,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y (M, N) in out_dtype from base in one read and one write; as `reference.epilogue_ref`."""
    M, N = base.shape
    R = lora_B.shape[1]
    how = Launch.of(base, lora_B.dtype)
    config = _epilogue_config(how, base, low, lora_B, residual)
    tiles = config.tiles(R)
    y = base.new_empty((M, N), dtype=out_dtype)
    if y.numel() == 0:
        return y
    _epilogue_kernel[ceil_div(M, config.BLOCK_M), ceil_div(N, config.BLOCK_N)](
        matrix(base),
        matrix(low),
        matrix(lora_B),
        gain,
        vector(bias),
        matrix(residual),
        y,
        M,
        N,
        R,
        scaling,
        R_MULTIPLE=rank_multiple(R, low, lora_B),
        ONE_CHUNK=R <= tiles["BLOCK_R"],
        DTYPES=how.tl_dtypes,
        **tiles,
    )
    return y


def merged_forward(
    x: torch.Tensor,
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    given_gain: torch.Tensor | None,
    scaling: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """(y, norm unless the gain is given, gain, z if keep) through a merged weight; as `merged_forward_ref`."""
    row_norm, gain = None, given_gain
    if gain is None:
        row_norm, gain = norm(weight, lora_A, lora_B, scaling, magnitude)
    if not keep:
        merged = merge(weight, lora_A, lora_B, gain, scaling, out_dtype=x.dtype)
        return F.linear(x, merged, bias), row_norm, gain, None
    z = F.linear(x, merge(weight, lora_A, lora_B, None, scaling, out_dtype=x.dtype))
    return epilogue(z, None, lora_B, gain, bias, scaling, x.dtype), row_norm, gain, z
