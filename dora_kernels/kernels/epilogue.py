"""The epilogue of the forward pass: gain, low-rank product and bias over what the GEMM library made of x and weight."""

import dataclasses

import torch
import triton
import triton.language as tl

from dora_kernels.kernels.launches import LaunchPlan, planned
from dora_kernels.kernels.norm import finished_gain, unfinished_argument
from dora_kernels.kernels.parts import in_parts
from dora_kernels.kernels.shares import steps_of, steps_over, unit_range
from dora_kernels.kernels.tile import (
    Launch,
    Matrix,
    add_dot,
    block_offsets,
    known_multiple,
    known_rows,
    load,
    load_parts,
    load_vector,
    low_rank,
    rank_multiple,
    store,
    transposed,
)
from dora_kernels.planning import configs
from dora_kernels.planning.configs import ceil_div
from dora_kernels.planning.tiles import Config
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
    CHUNKS: tl.constexpr,
    DTYPES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y = gain * (base + scaling * low @ lora_B.T) + bias [+ residual - base].

    One program owns a range of steps of BLOCK_M rows, in blocks of BLOCK_N columns.
    """
    if low is not None:
        R, low, lora_B = known_multiple(R, R_MULTIPLE), known_rows(low, R_MULTIPLE), known_rows(lora_B, R_MULTIPLE)
    steps = steps_over(M, BLOCK_M)
    first, end = unit_range(tl.cdiv(N, BLOCK_N) * steps.to(tl.int64))
    for block in range(first // steps, tl.cdiv(end, steps)):
        offs_n = block_offsets(block, BLOCK_N)
        mask_n = offs_n < N
        start, stop = steps_of(block, steps, first, end)
        if unfinished is not None:
            gain = finished_gain(unfinished, N, offs_n, mask_n, start == 0)  # [BLOCK_N]
        else:
            gain = tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)
        if bias is not None:
            bias_tile = load_vector(bias, offs_n, mask_n).to(DTYPES.accumulate)  # [BLOCK_N]
        chunks = ()
        if low is not None:
            for chunk in tl.static_range(CHUNKS):
                offs_r = chunk * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
                chunks += (load_parts(transposed(lora_B), offs_r, offs_n, offs_r < R, mask_n, R, 0, DTYPES),)
        for step in tl.range(start.to(M.dtype), stop.to(M.dtype), num_stages=STAGES):
            # 32 bits, but for the product with a stride: in 64, two programs a multiprocessor would spill 48 bytes
            offs_m = (step * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
            mask_m = tl.arange(0, BLOCK_M) < M - step * BLOCK_M  # and no sum that could pass 2^31
            base_tile = load(base, offs_m, offs_n, mask_m, mask_n).to(DTYPES.accumulate)  # [BLOCK_M, BLOCK_N]
            y = base_tile
            if low is not None:
                if CHUNKS == 0:
                    y += scaling * low_rank(
                        low, transposed(lora_B), offs_m, offs_n, mask_m, mask_n, R, BLOCK_R, False, DTYPES
                    )
                for chunk in tl.static_range(CHUNKS):
                    offs_r = chunk * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
                    low_tiles = load_parts(low, offs_m, offs_r, mask_m, offs_r < R, R, 1, DTYPES)  # [BLOCK_M, BLOCK_R]
                    # each is added by itself: where one dot adds to another's, Triton shares out rows alone among the
                    # warps, and of 64 rows 8 warps would make each product twice, with 18 barriers instead of 2
                    product = add_dot(tl.zeros_like(y), low_tiles, chunks[chunk], DTYPES)
                    y += scaling * product
            y = gain[None, :] * y
            if bias is not None:
                y += bias_tile[None, :]
            if residual is not None:
                y += load(residual, offs_m, offs_n, mask_m, mask_n).to(DTYPES.accumulate) - base_tile
            store(Matrix(y_ptr, N, 1), offs_m, offs_n, mask_m, mask_n, y)


@planned
def _plan(
    launch: Launch,
    N: int,
    R: int,
    low: tuple[int, ...] | None,
    lora_B: tuple[int, ...],
    base: torch.dtype,
    residual: torch.dtype | None,
    out: torch.dtype,
    in_vectors: bool,
) -> LaunchPlan:
    """low, lora_B: their strides."""
    walked = 0 if low is None else R
    streamed_bytes = base.itemsize + (0 if residual is None else residual.itemsize)
    sizes = walked, launch.operand_bytes, streamed_bytes, out.itemsize, in_vectors and N % 16 == 0
    config, chunks = _config(launch.config("epilogue", walked), *sizes, launch.facts.target)
    return LaunchPlan(
        _epilogue_kernel,
        config,
        R_MULTIPLE=rank_multiple(R, low, lora_B),
        CHUNKS=chunks,
        STAGES=None if chunks == 0 and low is not None else config.num_stages,
        DTYPES=launch.dtypes,
        **config.tiles(R),
    )


def _config(
    config: Config, R: int, operand_bytes: int, streamed_bytes: int, out_bytes: int, in_vectors: bool, target: str
) -> tuple[Config, int]:
    """(config, CHUNKS): as configs.with_lora_B_resident, with blocks of half as many columns if lora_B then fits.

    Reading low twice as often is less than reading low and lora_B: at R = 512 144 KB for 64 x 128 of y instead of 208.
    """
    if not in_vectors:  # loads, and masks, for each element
        config = dataclasses.replace(config, waves=1, maxnreg=None)
    if streamed_bytes > operand_bytes:  # as many bytes in flight, and 100 bytes of a third step's addresses spill
        config = dataclasses.replace(config, num_stages=2)
    sizes = R, operand_bytes, streamed_bytes, out_bytes, target
    found = configs.with_lora_B_resident(config, *sizes)
    if found[1] == 0 < R:
        narrow = configs.with_lora_B_resident(dataclasses.replace(config, BLOCK_N=config.BLOCK_N // 2), *sizes)
        found = narrow if narrow[1] else found
    return found


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
    """y (M, N) in out_dtype from base in one read and one write; as `reference.epilogue`.

    Writes norm and gain, too, where they are unfinished.
    """
    M, N = base.shape
    R = lora_B.shape[-1]
    y = base.new_empty(M, N, dtype=out_dtype)
    if N == 0 or (M == 0 and unfinished is None):
        return y
    launch, _, low, lora_B = in_parts(Launch.of(base, lora_B.dtype), None, low, lora_B)
    plan = _plan(
        launch,
        N,
        R,
        None if low is None else low.stride(),
        lora_B.stride(),
        base.dtype,
        None if residual is None else residual.dtype,
        out_dtype,
        _in_vectors(base) and (residual is None or _in_vectors(residual)),
    )
    config = plan.config
    programs = launch.programs(ceil_div(N, config.BLOCK_N), ceil_div(M, config.BLOCK_M), config, sums=False)
    finish = unfinished_argument(unfinished)
    plan.launch((programs,), base, low, lora_B, gain, finish, bias, residual, y, M, N, R, scaling)
    return y


def _in_vectors(matrix: torch.Tensor) -> bool:
    """True if the compiler sees that the rows begin at multiples of 16 bytes."""
    stride_row, stride_column = matrix.stride()
    return stride_column == 1 and stride_row % 16 == 0 and matrix.data_ptr() % 16 == 0
