"""Several adapters in one batch: the epilogue with the adapter of each row."""

import torch
import triton
import triton.language as tl

from dora_kernels.kernels.launches import LaunchPlan, planned
from dora_kernels.kernels.tile import (
    Launch,
    Matrix,
    block_offsets,
    known_multiple,
    known_rows,
    load,
    load_vector,
    low_rank,
    rank_multiple,
    transposed,
)
from dora_kernels.planning import configs
from dora_kernels.planning.configs import ceil_div


@triton.jit(do_not_specialize=["M", "E"])
def _bank_epilogue_kernel(
    base,  # (M, N)
    low,  # (M, E * R)
    lora_B_ptr,  # (E, N, R), contiguous
    gain_ptr,  # (E, N) in DTYPES.accumulate, contiguous
    scaling_ptr,  # (E,) in DTYPES.accumulate, contiguous
    bias,  # (N,) or None
    index_ptr,  # (M,) int64, contiguous
    y_ptr,  # (M, N), contiguous
    M,
    N,
    R,
    E,
    R_MULTIPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    DTYPES: tl.constexpr,
):
    """y[m] = gain[e] * (base[m] + scaling[e] * low[m, e * R :] @ lora_B[e].T) + bias, e = index[m]; base + bias for -1.

    One program owns a [BLOCK_M, BLOCK_N] tile, and walks the adapters that its rows have.
    """
    R, low = known_multiple(R, R_MULTIPLE), known_rows(low, R_MULTIPLE)
    offs_m = block_offsets(tl.program_id(0), BLOCK_M)
    offs_n = block_offsets(tl.program_id(1), BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    index = tl.load(index_ptr + offs_m, mask=mask_m, other=-1)
    adapter = tl.where((index >= 0) & (index < E), index, E).to(tl.int32)  # [BLOCK_M]
    y = load(base, offs_m, offs_n, mask_m, mask_n).to(DTYPES.accumulate)  # [BLOCK_M, BLOCK_N]
    next_adapter = tl.min(adapter, axis=0)
    while next_adapter < E:
        mine = adapter == next_adapter
        e = next_adapter.to(tl.int64)
        low_e = Matrix(low.ptr + e * R * low.stride_1, low.stride_0, low.stride_1)  # (M, R)
        lora_B_e = Matrix(lora_B_ptr + e * N * R, R, 1)  # (N, R)
        product = low_rank(low_e, transposed(lora_B_e), offs_m, offs_n, mine, mask_n, R, BLOCK_R, ONE_CHUNK, DTYPES)
        gain = tl.load(gain_ptr + e * N + offs_n, mask=mask_n, other=0.0)  # [BLOCK_N]
        # not a sum for all rows: 0 * inf of another row's adapter is NaN
        y = tl.where(mine[:, None], gain[None, :] * (y + tl.load(scaling_ptr + e) * product), y)
        next_adapter = tl.min(tl.where(adapter > next_adapter, adapter, E), axis=0)
    if bias is not None:
        y += load_vector(bias, offs_n, mask_n).to(DTYPES.accumulate)[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def bank_epilogue(
    base: torch.Tensor,
    low: torch.Tensor,
    lora_B: torch.Tensor,
    gain: torch.Tensor,
    scaling: torch.Tensor,
    bias: torch.Tensor | None,
    index: torch.Tensor,
) -> torch.Tensor:
    """y (M, N) of rows with an adapter each; as `reference.bank_epilogue`."""
    M, N = base.shape
    E, _, R = lora_B.shape
    plan = _plan(Launch.of(base, lora_B.dtype), N, R, low.stride())
    y = base.new_empty(M, N)
    if y.numel() > 0:
        grid = ceil_div(M, plan.config.BLOCK_M), ceil_div(N, plan.config.BLOCK_N)
        plan.launch(grid, base, low, lora_B, gain, scaling, bias, index, y, M, N, R, E)
    return y


@planned
def _plan(launch: Launch, N: int, R: int, low: tuple[int, ...]) -> LaunchPlan:
    """low: its strides."""
    config = launch.config("bank_epilogue")
    if N % 16:  # each element has an address: up to 376 bytes a thread otherwise, of 128 registers
        config = configs.unlimited(config)
    tiles = config.tiles(R)
    return LaunchPlan(
        _bank_epilogue_kernel,
        config,
        R_MULTIPLE=rank_multiple(R, low),
        ONE_CHUNK=R <= tiles["BLOCK_R"],
        DTYPES=launch.dtypes,
        **tiles,
    )
