"""THE SPEC: every op in plain PyTorch, any dtype up to float64. It is also the CPU path, so it wastes nothing.

`dora_linear_ref` is the definition, in one screen, differentiable by autograd. Each of the other `..._ref` functions
defines one step, and has the arguments of the kernel launcher of the same name in dora_kernels/kernels/; passes.py
composes either into the forward and the backward pass.

The low-rank operands of a step have one dtype, that of lora_A and lora_B: passes.py has settled it.

A weight may be quantised (quant/): it is read through weight[rows], a block of its rows in weight.dtype.

Letters: M tokens, N out features, K in features, R rank. norm and gain are float32 (float64 for float64 inputs).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# A block of rows in float32. On a CPU it stays in the caches, and yet is worth waking the threads for: a training step
# in bf16 wakes them 30 times with 4 MiB and 54 times with 1 MiB (64 tokens, 3072 x 1280). Elsewhere it bounds memory.
_BLOCK_BYTES = {"cpu": 4 << 20}
_BLOCK_BYTES_ELSEWHERE = 256 << 20


def dora_linear_ref(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    x_dropped: Tensor | None = None,
    norm: Tensor | None = None,
    norm_grad: bool = False,
) -> Tensor:
    """The definition (DoRA, arXiv 2402.09353, equation 5; the norm is a constant unless norm_grad, section 4.3).

    x, x_dropped (..., K), weight (N, K), lora_A (R, K), lora_B (N, R), magnitude, bias, norm (N,) -> (..., N):
        gain = magnitude / norm;  norm_n = ||(weight + scaling * lora_B @ lora_A)_n||_2, gain 0 where norm is 0
        y = gain * (x weight^T + scaling * x lora_A^T lora_B^T) + bias
    With dropout, where x_dropped = dropout(x):
        y = x weight^T + (gain - 1) * x_dropped weight^T + gain * scaling * x_dropped lora_A^T lora_B^T + bias
    """
    if norm is None:
        norm = row_norms(weight + scaling * lora_B @ lora_A)
        norm = norm if norm_grad else norm.detach()
    gain = torch.where(norm == 0, 0, magnitude / torch.where(norm == 0, 1, norm))
    adapter_input = x if x_dropped is None else x_dropped
    base = F.linear(adapter_input, weight)
    low = F.linear(adapter_input.to(lora_A.dtype), lora_A)
    y = gain * (base + scaling * F.linear(low, lora_B))
    if x_dropped is not None:
        y = y + F.linear(x, weight) - base
    return (y if bias is None else y + bias).to(x.dtype)


def row_norms(matrix: Tensor) -> Tensor:
    """norm (N,) of the rows of matrix (N, K); every derivative is 0 where the norm is, and torch's second one NaN."""
    zero = torch.linalg.vector_norm(matrix.detach(), dim=1) == 0
    return torch.where(zero, 0, torch.linalg.vector_norm(torch.where(zero[:, None], 1, matrix), dim=1))


class Needs(NamedTuple):
    """Which gradients a backward pass has to compute."""

    x: bool
    x_dropped: bool
    lora_A: bool
    lora_B: bool
    magnitude: bool
    bias: bool
    low: bool = False
    """Where the forward pass was given low: dA falls out of dlow, elsewhere."""


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norm, gain and every sum: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    buffer = None
    for rows in _row_blocks(*matrix.shape, matrix.device):
        if buffer is None:
            buffer = matrix.new_empty((rows.stop, matrix.shape[1]), dtype=dtype)
        yield rows, buffer[: rows.stop - rows.start].copy_(matrix[rows])


def add_product(block: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """block += scaling * left @ right, in place."""
    if scaling == 0:  # a GEMM would skip the product, and 0 * inf is NaN
        return block.addmm_(scaling * left, right)
    return block.addmm_(left, right, alpha=scaling)


def _direction_blocks(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Iterator[tuple[slice, Tensor]]:
    """(rows, (weight + scaling * lora_B @ lora_A)[rows] in the accumulate dtype), as `_accumulate_blocks`."""
    accumulate = accumulate_dtype(weight.dtype)
    lora_A, lora_B = lora_A.to(accumulate), lora_B.to(accumulate)
    for rows, block in _accumulate_blocks(weight, accumulate):
        yield rows, add_product(block, lora_B[rows], lora_A, scaling)


def gain_ref(magnitude: Tensor, norm: Tensor) -> Tensor:
    """gain (N,) = magnitude / norm in norm's dtype; 0 where norm is 0 (a zero row stays zero)."""
    return torch.where(norm == 0, 0, magnitude.to(norm.dtype) / torch.where(norm == 0, 1, norm))


def dense_ref(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight (N, K) itself or, of a quantised one, a dense copy in dtype."""
    return weight if isinstance(weight, Tensor) else weight.dequantize(dtype=dtype)


def norm_ref(
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
    return norm, None if magnitude is None else gain_ref(magnitude, norm)


def grouped_norm_ref(
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    magnitudes: Sequence[Tensor],
    scalings: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """norm and gain of many layers, (sum of N,), one after the other."""
    layers = zip(weights, lora_As, lora_Bs, scalings, magnitudes, strict=True)
    norms, gains = zip(*(norm_ref(*layer) for layer in layers), strict=True)
    return torch.cat(norms), torch.cat(gains)


def merge_ref(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | None,
    scaling: float,
    subtract_weight: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """gain * (weight + scaling * lora_B @ lora_A) [- weight], (N, K) in out_dtype or weight.dtype, rounded once."""
    merged = torch.empty(weight.shape, dtype=out_dtype or weight.dtype, device=weight.device)
    for rows, direction in _direction_blocks(weight, lora_A, lora_B, scaling):
        if gain is not None:
            direction.mul_(gain[rows, None])
        if subtract_weight:
            direction.sub_(weight[rows])
        merged[rows] = direction
    return merged


def project_ref(
    rows: Tensor, factor: Tensor, scale: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """rows (M, K) @ (factor (R, K) * scale (K,)).T -> (M, R): low = x @ A.T and P = dy @ (gain * B).

    In factor's dtype, which out_dtype may widen.
    """
    dtype = factor.dtype
    if scale is not None:
        factor = (factor * scale).to(dtype)
    return matmul(rows.to(dtype), factor.T, out_dtype or dtype)


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


def matmul(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    """left @ right in out_dtype, without rounding to half precision on the way where the GEMM library can."""
    half = left.dtype in (torch.bfloat16, torch.float16)
    if left.device.type == "cuda" and half and out_dtype == torch.float32:
        return torch.mm(left, right, out_dtype=out_dtype)
    if left.dtype == torch.float16 and out_dtype == torch.float32:
        return left.float() @ right.float()  # a sum over the tokens overflows float16 before scaling brings it back
    return (left @ right).to(out_dtype)


def epilogue_ref(
    base: Tensor,
    low: Tensor | None,
    lora_B: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    scaling: float,
    out_dtype: torch.dtype,
    residual: Tensor | None = None,
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


def bank_epilogue_ref(
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


def _column_sums(columns: Tensor, kept: Tensor | None, plain: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(sum_m columns * kept unless kept is None, sum_m columns if plain), (N,) in dtype; what is not wanted is 0.

    On a CPU in half precision the backward pass of that batch norm: half the time of converted blocks. It adds token
    after token: over 32768 of them 3e-6 is lost, where torch.sum loses 2e-7, too much in float32 alone.
    """
    zero = columns.new_zeros(columns.shape[1], dtype=dtype)
    half = columns.dtype in (torch.bfloat16, torch.float16) and (kept is None or kept.dtype == columns.dtype)
    if half and columns.device.type == "cpu" and columns.numel() > 0:  # without elements it ends the process: SIGFPE
        columns, one = columns.contiguous(), torch.ones_like(zero)
        operands = columns, columns if kept is None else kept, one, zero, one  # dy, z, gain, mean, variance
        wanted = [False, True, True]  # both sums come of one pass
        return torch.ops.aten.native_batch_norm_backward(*operands, None, None, False, 0.0, wanted)[1:]
    dot, total = zero, zero.clone()
    for rows, block in _accumulate_blocks(columns, dtype):
        if plain:
            total += block.sum(0)
        if kept is not None:
            dot += block.mul_(kept[rows]).sum(0)
    return dot, total


def _outer_of_scaled(scale: Tensor, product: Tensor, columns: Tensor, low: Tensor) -> Tensor:
    """(scale * columns)^T low, (N, R), from product = columns^T low.

    An infinite scale may not leave the sum: that of inf and -inf is NaN, and so is inf * 0. Those rows are summed once
    more; on a GPU, which would have to be waited for to know of them, they are NaN throughout.
    """
    outer, infinite = scale[:, None] * product, scale.isinf()
    if scale.device.type != "cpu":
        outer.masked_fill_(infinite[:, None], torch.nan)
    elif infinite.any():
        outer[infinite] = (scale[infinite] * columns[:, infinite].to(scale.dtype)).T @ low.to(scale.dtype)
    return outer


def token_sums_ref(
    columns: Tensor,
    low: Tensor | None,
    scaling: float,
    *,
    outer: Tensor | None = None,
    gain: Tensor | None = None,
    kept: Tensor | None = None,
    norm: Tensor | None = None,
    lora_B: Tensor | None = None,
    dmagnitude: Tensor | None = None,
    dbias: Tensor | None = None,
    scaled: Tensor | None = None,
) -> None:
    """Sums over the tokens of columns (M, N), written into the tensors given.

    outer (N, R) = scaling * gain * columns^T low;  dbias (N,) = sum_m columns;  scaled (M, N) = gain * columns;
    dmagnitude (N,) = (sum_m columns * kept + scaling * rowsum((columns^T low) * lora_B)) / norm, 0 where norm is 0,
    without the low-rank term where lora_B is None (kept then is gain-free z and not base).
    """
    accumulate = accumulate_dtype(columns.dtype)
    if scaled is not None:
        _scale_columns(columns, gain, None, scaled)
    if outer is not None and lora_B is None and scaled is not None and scaled.dtype == low.dtype:
        outer.copy_(outer_product_ref(scaled, low, scaling, outer.dtype))
    elif low is not None:
        product = matmul(columns.to(low.dtype).T, low, accumulate)
        if outer is not None:
            outer.copy_(scaling * product if gain is None else _outer_of_scaled(scaling * gain, product, columns, low))
    if dmagnitude is not None or dbias is not None:
        dot, total = _column_sums(columns, None if dmagnitude is None else kept, dbias is not None, accumulate)
    if dmagnitude is not None:
        if lora_B is not None:
            # nor may an infinite lora_B leave the sum over the tokens: NaN, as its norm makes of it anyway
            dot += scaling * (product * torch.where(lora_B.isinf(), torch.nan, lora_B)).sum(1)
        dmagnitude.copy_(torch.where(norm == 0, 0, dot / torch.where(norm == 0, 1, norm)))
    if dbias is not None:
        dbias.copy_(total)


def outer_product_ref(left: Tensor, right: Tensor, scaling: float, out_dtype: torch.dtype) -> Tensor:
    """scaling * left (M, R).T @ right (M, K) -> (R, K) in out_dtype: dA. In left's dtype."""
    # the GEMM scales what it has summed, and then rounds; a scaling of 0 as in `add_product`
    if left.dtype == out_dtype != torch.float16 and scaling != 0:
        return torch.addmm(left.new_empty(1), left.T, right.to(left.dtype), beta=0, alpha=scaling)
    product = matmul(left.T, right.to(left.dtype), accumulate_dtype(left.dtype))
    return product.mul_(scaling).to(out_dtype)


def merged_forward_ref(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    given_gain: Tensor | None,
    scaling: float,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """(y, norm unless the gain is given, gain, z if keep) through the merged weight; z is y before gain and bias.

    Each block of rows of weight + scaling * B @ A is made once, for the norm and for the product alike.
    """
    y = x.new_empty((x.shape[0], weight.shape[0]))
    z = torch.empty_like(y) if keep else None
    norm, gain = None, given_gain
    if gain is None:
        norm = magnitude.new_empty(magnitude.shape, dtype=accumulate_dtype(weight.dtype))
        gain = torch.empty_like(norm)
    for rows, direction in _direction_blocks(weight, lora_A, lora_B, scaling):
        if norm is not None:
            norm[rows] = torch.linalg.vector_norm(direction, dim=1)
            gain[rows] = gain_ref(magnitude[rows], norm[rows])
        if z is None:
            block_bias = None if bias is None else bias[rows]
            y[:, rows] = F.linear(x, direction.mul_(gain[rows, None]).to(x.dtype), block_bias)
        else:
            z[:, rows] = F.linear(x, direction.to(x.dtype))
    if z is not None:
        _scale_columns(z, gain, bias, y)
    return y, norm, gain, z


class Steps(NamedTuple):
    """The steps that passes.py composes; `REFERENCE` here, `KERNELS` in dora_kernels/kernels/."""

    dense: Callable[..., Tensor]
    norm: Callable[..., tuple[Tensor, Tensor | None]]
    grouped_norm: Callable[..., tuple[Tensor, Tensor]]
    merge: Callable[..., Tensor]
    project: Callable[..., Tensor]
    epilogue: Callable[..., Tensor]
    merged_forward: Callable[..., tuple[Tensor, Tensor | None, Tensor, Tensor | None]]
    token_sums: Callable[..., None]
    outer_product: Callable[..., Tensor]
    bank_epilogue: Callable[..., Tensor]


REFERENCE = Steps(
    dense=dense_ref,
    norm=norm_ref,
    grouped_norm=grouped_norm_ref,
    merge=merge_ref,
    project=project_ref,
    epilogue=epilogue_ref,
    merged_forward=merged_forward_ref,
    token_sums=token_sums_ref,
    outer_product=outer_product_ref,
    bank_epilogue=bank_epilogue_ref,
)
