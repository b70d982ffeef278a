"""norm and gain of many layers in one launch: a model's worth takes as many launches as one layer.

A sum over K is one program's, as in `norm`: there are blocks of rows enough. Of `start_norm`, which shares it out, the
last bit may be another.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from dora_kernels.kernels.launches import LaunchPlan, planned
from dora_kernels.kernels.norm import gain_of, root, row_squares
from dora_kernels.kernels.shares import steps_over
from dora_kernels.kernels.stored_weight import (
    Layout,
    StoredWeight,
    Update,
    walk_config,
    weight_argument,
    weight_config,
    weight_format,
)
from dora_kernels.kernels.tile import TL_DTYPE, Launch, Matrix, block_offsets, known_multiple
from dora_kernels.planning import configs
from dora_kernels.planning.configs import ceil_div


@triton.jit
def _grouped_norm_kernel(
    layers_ptr,  # (layers, 8) int64: addresses of weight, lora_A, lora_B and magnitude, N, K, R, offset in norm
    scaling_ptr,  # (layers,) in DTYPES.accumulate
    tiles_ptr,  # (tiles, 2) int64: layer, block of its rows
    norm_ptr,  # (sum of N,) in DTYPES.accumulate
    gain_ptr,  # (sum of N,) as norm
    FORMAT: tl.constexpr,
    ADAPTER_DTYPE: tl.constexpr,
    MAGNITUDE_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    R_MULTIPLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    DTYPES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """norm = row norms of weight + scaling * lora_B @ lora_A, gain = magnitude / norm, of every layer.

    One program owns BLOCK_N rows of one layer. The tensors are contiguous, at addresses read from the table.
    """
    tile = tl.program_id(0).to(tl.int64)
    layer = tl.load(tiles_ptr + 2 * tile)
    row = layers_ptr + 8 * layer
    weight_ptr = tl.load(row).to(tl.pointer_type(FORMAT.dtype))
    lora_A_ptr = tl.load(row + 1).to(tl.pointer_type(ADAPTER_DTYPE))
    lora_B_ptr = tl.load(row + 2).to(tl.pointer_type(ADAPTER_DTYPE))
    magnitude_ptr = tl.load(row + 3).to(tl.pointer_type(MAGNITUDE_DTYPE))
    N = tl.load(row + 4)
    K = tl.load(row + 5)
    R = tl.load(row + 6)
    if ALIGNED:  # what the JIT finds out of arguments; without it loads are of one element each
        weight_ptr, lora_A_ptr = tl.multiple_of(weight_ptr, 16), tl.multiple_of(lora_A_ptr, 16)
        lora_B_ptr = tl.multiple_of(lora_B_ptr, 16)
        K = tl.multiple_of(K, 16)
    R = known_multiple(R, R_MULTIPLE)
    offs_n = block_offsets(tl.load(tiles_ptr + 2 * tile + 1), BLOCK_N)
    mask_n = offs_n < N
    scaling = tl.load(scaling_ptr + layer)
    weight = StoredWeight((weight_ptr,), (K, 1))
    update = Update(Matrix(lora_A_ptr, K, 1), Matrix(lora_B_ptr, R, 1), R, scaling)
    steps = steps_over(K, BLOCK_K)
    squares = row_squares(
        weight, update, offs_n, mask_n, 0, steps, K, FORMAT, BLOCK_N, BLOCK_K, BLOCK_R, CHUNKS, DTYPES, STAGES
    )
    magnitude = tl.load(magnitude_ptr + offs_n, mask=mask_n, other=0.0).to(DTYPES.accumulate)
    norm = root(squares)
    out = tl.load(row + 7) + offs_n
    tl.store(norm_ptr + out, norm, mask=mask_n)
    tl.store(gain_ptr + out, gain_of(magnitude, norm), mask=mask_n)


def grouped_norm(
    weights: Sequence[torch.Tensor],
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    magnitudes: Sequence[torch.Tensor],
    scalings: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """norm and gain of the layers, one after the other; as `reference.grouped_norm`."""
    launch = Launch.of(weights[0], lora_As[0].dtype)
    numbers = [
        (*(tensor.data_ptr() for tensor in layer), *layer[0].shape, layer[1].shape[0])
        for layer in zip(weights, lora_As, lora_Bs, magnitudes, strict=True)
    ]
    aligned = all(number % 16 == 0 for row in numbers for number in (*row[:3], row[5]))
    ranks = [row[6] for row in numbers]
    least_aligned = max(weights, key=lambda weight: weight.shape[1] % 16)
    plan = _plan(
        launch,
        weight_argument(least_aligned)[1],
        max(ranks),
        math.gcd(16, *ranks),
        lora_As[0].dtype,
        magnitudes[0].dtype,
        aligned,
    )
    layers, blocks, total = [], [], 0
    for layer, (*row, N, K, R) in enumerate(numbers):
        layers.append([*row, N, K, R, total])
        blocks += [(layer, block) for block in range(ceil_div(N, plan.config.BLOCK_N))]
        total += N
    norm = weights[0].new_empty(total, dtype=launch.accumulate)
    gain = torch.empty_like(norm)
    if blocks:
        tables = (
            _to_device(layers, torch.int64, norm.device),
            _to_device(list(scalings), launch.accumulate, norm.device),
            _to_device(blocks, torch.int64, norm.device),
        )
        plan.launch((len(blocks),), *tables, norm, gain)
    return norm, gain


@planned
def _plan(
    launch: Launch,
    least_aligned: Layout,
    most_R: int,
    R_multiple: int,
    adapter: torch.dtype,
    magnitude: torch.dtype,
    aligned: bool,
) -> LaunchPlan:
    config = weight_config(launch, "norm", least_aligned, most_R)
    if least_aligned.K % 16:  # of addresses nothing is known then, either: 592 bytes a thread otherwise
        config = configs.of_rows(config, max(16, config.BLOCK_N // 2))
    config, chunks = walk_config(launch, config, least_aligned, most_R)
    return LaunchPlan(
        _grouped_norm_kernel,
        config,
        FORMAT=weight_format(least_aligned, config.BLOCK_K),
        ADAPTER_DTYPE=TL_DTYPE[adapter],
        MAGNITUDE_DTYPE=TL_DTYPE[magnitude],
        ALIGNED=aligned,
        R_MULTIPLE=R_multiple,
        STAGES=config.num_stages if aligned else None,
        CHUNKS=chunks,
        DTYPES=launch.dtypes,
        **config.tiles(most_R),
    )


def _to_device(numbers: list, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`numbers` on the device, without waiting for it: from pinned memory, which the allocator keeps until then."""
    tensor = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)
