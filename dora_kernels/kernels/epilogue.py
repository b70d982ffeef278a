"""The epilogue of the forward pass: gain, low-rank product and bias over what the GEMM library made of x and weight."""

import torch
import triton
import triton.language as tl

from dora_kernels.kernels.norm import finished_gain, unfinished_argument
from dora_kernels.kernels.tile import (
    Launch,
    block_offsets,
    known_multiple,
    known_rows,
    load,
    load_vector,
    low_rank,
    matrix,
    rank_multiple,
    transposed,
    vector,
)
from dora_kernels.planning.configs import HIGH_RANK, Config, ceil_div
from dora_kernels.types import Unfinished


@triton.jit(do_not_specialize=["M"])
def _epilogue_kernel(
    base,  # (M, N)
    low,  # (M, R) or None
    lora_B,  # (N, R)
    gain_ptr,  # (N,) in DTYPES.accumulate, contiguous; not read if unfinished
    unfinished,  # what gain is made of, or None
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
    if unfinished is not None:
        gain = finished_gain(unfinished, N, offs_n, mask_n, tl.program_id(0) == 0)  # [BLOCK_N]
    else:
        gain = tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)
    y = base_tile
    if low is not None:
        product = low_rank(low, transposed(lora_B), offs_m, offs_n, mask_m, mask_n, R, BLOCK_R, ONE_CHUNK, DTYPES)
        y += scaling * product
    y = gain[None, :] * y
    if bias is not None:
        y += load_vector(bias, offs_n, mask_n).to(DTYPES.accumulate)[None, :]
    if residual is not None:
        y += load(residual, offs_m, offs_n, mask_m, mask_n).to(DTYPES.accumulate) - base_tile
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def _epilogue_config(
    launch: Launch,
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
        large = launch.config("epilogue", R)
        fills = ceil_div(M, large.BLOCK_M) * ceil_div(N, large.BLOCK_N) >= launch.facts.multiprocessors
        # 16 is what the JIT sees by itself, 8 what rank_multiple tells it
        if fills and _in_vectors(base, 16) and _in_vectors(low, 8) and _in_vectors(lora_B, 8):
            return large
    return launch.config("epilogue")


def _in_vectors(matrix: torch.Tensor, multiple: int) -> bool:
    """True if every row of the matrix begins and ends at a multiple of so many elements, and of 16 bytes."""
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
    unfinished: Unfinished | None = None,
) -> torch.Tensor:
    """y (M, N) in out_dtype from base in one read and one write; as `reference.epilogue`."""
    M, N = base.shape
    R = lora_B.shape[1]
    launch = Launch.of(base, lora_B.dtype)
    config = _epilogue_config(launch, base, low, lora_B, residual)
    tiles = config.tiles(R)
    y = base.new_empty((M, N), dtype=out_dtype)
    if N == 0 or (M == 0 and unfinished is None):
        return y
    _epilogue_kernel[max(1, ceil_div(M, config.BLOCK_M)), ceil_div(N, config.BLOCK_N)](
        matrix(base),
        matrix(low),
        matrix(lora_B),
        gain,
        unfinished_argument(unfinished),
        vector(bias),
        matrix(residual),
        y,
        M,
        N,
        R,
        scaling,
        R_MULTIPLE=rank_multiple(R, low, lora_B),
        ONE_CHUNK=R <= tiles["BLOCK_R"],
        DTYPES=launch.dtypes,
        **tiles,
    )
    return y
