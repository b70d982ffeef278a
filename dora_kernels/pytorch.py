"""The steps in PyTorch, tuned for CPUs: backend="reference". reference.py defines them.

Where a step would hold a whole matrix in float32 it goes through blocks of rows, and where it scales columns, or sums
those of half precision, it is a batch norm, which does so in one pass. A weight may be quantized (quant/): it is read
through weight[rows], a block of its rows in weight.dtype. The low-rank operands of a step have one dtype, that of
lora_A and lora_B: passes.py has cast them.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels.gemm import add_product, matmul, outer_product, product_onto_low_rank, project
from dora_kernels.reference import accumulate_dtype, counters, dense, factors, fork, gain_of, over_norm, prepare
from dora_kernels.types import Prepared, Steps, Unfinished

# A block of rows in float32. On a CPU it stays in the caches, and yet is worth waking the threads for: a training step
# in bf16 wakes them 30 times with 4 MiB and 54 times with 1 MiB (64 tokens, 3072 x 1280). Elsewhere it bounds memory.
_BLOCK_BYTES = {"cpu": 4 << 20}
_BLOCK_BYTES_ELSEWHERE = 256 << 20


def _row_blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Slices of the device's block: 256 rows at least, and a multiple of 64 (a GEMM of 819 took 1.4 times as long)."""
    rows_in_block = _BLOCK_BYTES.get(device.type, _BLOCK_BYTES_ELSEWHERE) // (4 * max(columns, 1))
    step = max(256, rows_in_block // 64 * 64)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _accumulate_blocks(matrix: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, matrix[rows] in dtype).

    The blocks share one buffer, which the caller may overwrite: each is good until the next is asked for.
    """
    buffer, (count, columns) = None, matrix.shape
    for rows in _row_blocks(count, columns, matrix.device):
        if buffer is None:
            buffer = matrix.new_empty((rows.stop, columns), dtype=dtype)
        yield rows, buffer[: rows.stop - rows.start].copy_(matrix[rows])


def _direction_blocks(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Iterator[tuple[slice, Tensor]]:
    """(rows, (weight + scaling * lora_B @ lora_A)[rows] in the accumulate dtype), as `_accumulate_blocks`."""
    accumulate = accumulate_dtype(weight.dtype)
    lora_A, lora_B = lora_A.to(accumulate), lora_B.to(accumulate)
    for rows, block in _accumulate_blocks(weight, accumulate):
        yield rows, add_product(block, lora_B[rows], lora_A, scaling)


def norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """norm (N,) = row norms of weight + scaling * lora_B @ lora_A and, with a magnitude, gain (N,)."""
    norm = weight.new_empty(weight.shape[0], dtype=accumulate_dtype(weight.dtype))
    for rows, direction in _direction_blocks(weight, lora_A, lora_B, scaling):
        norm[rows] = torch.linalg.vector_norm(direction, dim=1)
    return norm, None if magnitude is None else gain_of(magnitude, norm)


def start_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor
) -> tuple[Tensor, Tensor, Unfinished | None]:
    """norm (N,), gain (N,), and None: both are written."""
    norm_, gain = norm(weight, lora_A, lora_B, scaling, magnitude)
    assert gain is not None  # there is a magnitude
    return norm_, gain, None


def grouped_norm(
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    magnitudes: Sequence[Tensor],
    scalings: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """norm and gain of many layers, (sum of N,), one after the other."""
    layers = zip(weights, lora_As, lora_Bs, scalings, magnitudes, strict=True)
    norms, gains = zip(*(norm(*layer) for layer in layers), strict=True)
    return torch.cat(norms), torch.cat(gains)


def merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | None,
    scaling: float,
    subtract_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    *,
    unfinished: Unfinished | None = None,
    prepared: Prepared | None = None,
) -> Tensor:
    """gain * (weight + scaling * lora_B @ lora_A) [- weight], (N, K) in out_dtype or weight.dtype, rounded once."""
    merged = torch.empty(weight.shape, dtype=out_dtype or weight.dtype, device=weight.device)
    for rows, direction in _direction_blocks(weight, lora_A, lora_B, scaling):
        if gain is not None:
            direction.mul_(gain[rows, None])
        if subtract_weight:
            direction.sub_(weight[rows])
        merged[rows] = direction
    if prepared is not None and gain is not None:
        prepare(prepared, lora_B, gain)
    return merged


def epilogue(
    base: Tensor,
    low: Tensor | None,
    lora_B: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    scaling: float,
    out_dtype: torch.dtype,
    residual: Tensor | None = None,
    unfinished: Unfinished | None = None,
) -> Tensor:
    """gain * (base + scaling * low @ lora_B.T) + bias [+ residual - base], (M, N) in out_dtype, rounded once."""
    y = torch.empty(base.shape, dtype=out_dtype, device=base.device)
    if low is None and residual is None and base.dtype == out_dtype:
        return _scale_columns(base, gain, bias, y)
    if low is not None:
        low, factor = low.to(gain.dtype), lora_B.to(gain.dtype).T
    for rows, block in _accumulate_blocks(base, gain.dtype):
        if low is not None:
            add_product(block, low[rows], factor, scaling)
        block.mul_(gain)
        if bias is not None:
            block.add_(bias)
        if residual is not None:
            block.add_(residual[rows]).sub_(base[rows])
        y[rows] = block
    return y


def bank_epilogue(
    base: Tensor,
    low: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    scaling: Tensor,
    bias: Tensor | None,
    index: Tensor,
) -> Tensor:
    """The epilogue with an adapter for each row, (M, N) in base's dtype, rounded once; base + bias where index is -1.

    y_m = gain_e * (base_m + scaling_e * low_m,e @ lora_B_e^T) + bias, e = index_m
    low (M, E * R) has the low-rank products with every adapter; lora_B (E, N, R), gain (E, N), scaling (E,).
    """
    y = base.to(gain.dtype)
    R = lora_B.shape[2]
    for e in range(lora_B.shape[0]):
        product = low[:, e * R : (e + 1) * R].to(gain.dtype) @ lora_B[e].to(gain.dtype).T
        y = torch.where((index == e)[:, None], gain[e] * (y + scaling[e] * product), y)
    return (y if bias is None else y + bias).to(base.dtype)


def _scale_columns(matrix: Tensor, gain: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """gain * matrix (M, N) + bias into out, in gain's dtype, rounded once.

    On a CPU that is a batch norm of mean 0 and variance 1: one pass, in half the time of blocks that are converted,
    scaled and converted back. It would multiply its mean with a gain of inf.
    """
    if matrix.device.type == "cpu" and gain.isfinite().all():
        bias = None if bias is None else bias.to(gain.dtype)
        mean, variance = torch.zeros_like(gain), torch.ones_like(gain)
        statistics = gain.new_empty(0), gain.new_empty(0)
        torch.native_batch_norm(matrix, gain, bias, mean, variance, False, 0.0, 0.0, out=(out, *statistics))
        return out
    for rows, block in _accumulate_blocks(matrix, gain.dtype):
        block.mul_(gain)
        out[rows] = block if bias is None else block.add_(bias)
    return out


def _column_sums(dy: Tensor, saved: Tensor | None, plain: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(sum_m dy * saved unless saved is None, sum_m dy if plain), (N,) in dtype; what is not wanted is 0.

    On a CPU in half precision the backward pass of that batch norm: half the time of converted blocks. It adds token
    after token: over 32768 of them 3e-6 is lost, where torch.sum loses 2e-7, too much in float32 alone.
    """
    zero = dy.new_zeros(dy.shape[1], dtype=dtype)
    half = dy.dtype in (torch.bfloat16, torch.float16) and (saved is None or saved.dtype == dy.dtype)
    if half and dy.device.type == "cpu" and dy.numel() > 0:  # without elements it ends the process: SIGFPE
        dy, one = dy.contiguous(), torch.ones_like(zero)
        operands = dy, dy if saved is None else saved, one, zero, one  # dy, z, gain, mean, variance
        wanted = [False, True, True]  # both sums come of one pass
        _, dot, total = torch.ops.aten.native_batch_norm_backward(*operands, None, None, False, 0.0, wanted)
        return dot, total
    dot, total = zero, zero.clone()
    for rows, block in _accumulate_blocks(dy, dtype):
        if plain:
            total += block.sum(0)
        if saved is not None:
            dot += block.mul_(saved[rows]).sum(0)
    return dot, total


def _dB_of_dz(scale: Tensor, product: Tensor, dy: Tensor, low: Tensor) -> Tensor:
    """(scale * dy)^T low, (N, R), from product = dy^T low.

    An infinite scale may not leave the sum: that of inf and -inf is NaN, and so is inf * 0. Those rows are summed once
    more; on a GPU, which would have to be waited for to know of them, they are NaN throughout.
    """
    dB, infinite = scale[:, None] * product, scale.isinf()
    if scale.device.type != "cpu":
        dB.masked_fill_(infinite[:, None], torch.nan)
    elif infinite.any():
        dB[infinite] = (scale[infinite] * dy[:, infinite].to(scale.dtype)).T @ low.to(scale.dtype)
    return dB


def token_sums(
    dy: Tensor,
    low: Tensor | None,
    scaling: float,
    *,
    dB: Tensor | None = None,
    gain: Tensor | None = None,
    saved: Tensor | None = None,
    norm: Tensor | None = None,
    lora_B: Tensor | None = None,
    dmagnitude: Tensor | None = None,
    dbias: Tensor | None = None,
    dz: Tensor | None = None,
    counters: Tensor | None = None,
    side: object | None = None,
) -> None:
    """Sums over the tokens of dy (M, N), written into the tensors given.

    dB (N, R) = scaling * gain * dy^T low;  dbias (N,) = sum_m dy;  dz (M, N) = gain * dy;
    dmagnitude (N,) = (sum_m dy * saved + scaling * rowsum((dy^T low) * lora_B)) / norm, 0 where norm is 0,
    without the low-rank term where lora_B is None (saved then is gain-free z and not base).
    """
    accumulate = accumulate_dtype(dy.dtype)
    if dz is not None:
        _scale_columns(dy, gain, None, dz)
    if dB is not None and lora_B is None and dz is not None and dz.dtype == low.dtype:
        dB.copy_(outer_product(dz, low, scaling, dB.dtype))
    elif low is not None:
        product = matmul(dy.to(low.dtype).T, low, accumulate)
        if dB is not None:
            dB.copy_(scaling * product if gain is None else _dB_of_dz(scaling * gain, product, dy, low))
    if dmagnitude is not None or dbias is not None:
        dot, total = _column_sums(dy, None if dmagnitude is None else saved, dbias is not None, accumulate)
    if dmagnitude is not None:
        if lora_B is not None:
            # nor may an infinite lora_B leave the sum over the tokens: NaN, as its norm makes of it anyway
            dot += scaling * (product * torch.where(lora_B.isinf(), torch.nan, lora_B)).sum(1)
        dmagnitude.copy_(over_norm(dot, norm))
    if dbias is not None:
        dbias.copy_(total)


def fused_forward(
    x: Tensor,
    weight: Tensor,
    low: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    scaling: float,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """(y, z if save): the GEMM adds base onto the low-rank term, and y is z, rounded as it is saved, scaled."""
    z = product_onto_low_rank(x, weight, low, lora_B, scaling)
    return epilogue(z, None, lora_B, gain, bias, scaling, x.dtype), z if save else None


def merged_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    scaling: float,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """(y, norm unless the gain is given, gain, z if save) through the merged weight; z is y before gain and bias.

    Each block of rows of weight + scaling * B @ A is made once, for the norm and for the product alike.
    """
    y = x.new_empty((x.shape[0], weight.shape[0]))
    z = torch.empty_like(y) if save else None
    norm = None
    if gain is None:
        norm = magnitude.new_empty(magnitude.shape, dtype=accumulate_dtype(weight.dtype))
        gain = torch.empty_like(norm)
    for rows, direction in _direction_blocks(weight, lora_A, lora_B, scaling):
        if norm is not None:
            norm[rows] = torch.linalg.vector_norm(direction, dim=1)
            gain[rows] = gain_of(magnitude[rows], norm[rows])
        if z is None:
            block_bias = None if bias is None else bias[rows]
            y[:, rows] = F.linear(x, direction.mul_(gain[rows, None]).to(x.dtype), block_bias)
        else:
            z[:, rows] = F.linear(x, direction.to(x.dtype))
    if z is not None:
        _scale_columns(z, gain, bias, y)
    return y, norm, gain, z


def dx(dy: Tensor, merged: Tensor, side: object | None = None) -> Tensor:
    """dy (M, N) @ merged (N, K) -> (M, K)."""
    return dy @ merged


PYTORCH = Steps(
    dense=dense,
    factors=factors,
    norm=norm,
    start_norm=start_norm,
    grouped_norm=grouped_norm,
    merge=merge,
    counters=counters,
    prepare=prepare,
    project=project,
    epilogue=epilogue,
    fused_forward=fused_forward,
    merged_forward=merged_forward,
    token_sums=token_sums,
    outer_product=outer_product,
    dx=dx,
    fork=fork,
    bank_epilogue=bank_epilogue,
)
