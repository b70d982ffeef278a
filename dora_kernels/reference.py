"""THE SPECIFICATION: the layer and each of its steps in plain PyTorch, for any dtype up to float64.

`dora_linear_ref` is the layer, differentiable by autograd; then come the steps of its forward and backward pass.
pytorch.py (tuned for CPUs) and kernels/ (Triton) have the same steps with the same names and parameters, and
tests/kernels/test_steps.py holds both to these. A step computes in `accumulate_dtype` and rounds each result once.

Letters: M tokens, N out features, K in features, R rank.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
    gain = over_norm(magnitude, norm)
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


def over_norm(dividend: Tensor, norm: Tensor) -> Tensor:
    """dividend / norm, 0 where norm is 0: a zero row stays zero, and autograd meets no division by 0."""
    return torch.where(norm == 0, 0, dividend / torch.where(norm == 0, 1, norm))


def gain_of(magnitude: Tensor, norm: Tensor) -> Tensor:
    """gain (N,) = magnitude / norm in norm's dtype; 0 where norm is 0."""
    return over_norm(magnitude.to(norm.dtype), norm)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norm, gain and every sum: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight (N, K) itself or, of a quantized one (quant/), a dense copy in dtype."""
    return weight if isinstance(weight, Tensor) else weight.dequantize(dtype=dtype)


def direction(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """weight + scaling * lora_B @ lora_A, (N, K) in the accumulate dtype: what norm, merge and merged_forward share."""
    accumulate = accumulate_dtype(weight.dtype)
    return dense(weight, weight.dtype) + scaling * lora_B.to(accumulate) @ lora_A.to(accumulate)


def factors(beside: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B as the steps of a pass over `beside`, x or dy, multiply them; each step takes either form."""
    return lora_A, lora_B


def norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """norm (N,) = row norms of weight + scaling * lora_B @ lora_A and, with a magnitude, gain (N,)."""
    norm = row_norms(direction(weight, lora_A, lora_B, scaling))
    return norm, None if magnitude is None else gain_of(magnitude, norm)


def start_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor
) -> tuple[Tensor, Tensor, tuple[object, ...] | None]:
    """norm (N,), gain (N,) and types.Unfinished where the step that reads gain first has to write them: None here."""
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
    unfinished: tuple[object, ...] | None = None,
    prepared: tuple[Tensor | None, float, Tensor | None] | None = None,
) -> Tensor:
    """gain * (weight + scaling * lora_B @ lora_A) [- weight], (N, K) in out_dtype or weight.dtype."""
    merged = direction(weight, lora_A, lora_B, scaling)
    if gain is not None:
        merged = gain[:, None] * merged
    if subtract_weight:
        merged = merged - dense(weight, weight.dtype)
    if prepared is not None and gain is not None:
        prepare(prepared, lora_B, gain)
    return merged.to(out_dtype or weight.dtype)


def counters(dy: Tensor, N: int, K: int) -> Tensor | None:
    """Memory for what the steps of a backward pass count in, which `prepare` zeroes; None where they do not count."""
    return None


def prepare(prepared: tuple[Tensor | None, float, Tensor | None], lora_B: Tensor, gain: Tensor) -> None:
    """Writes types.Prepared: scaled_B (N, R) = factor * gain * lora_B, and counters = 0."""
    scaled_B, factor, counters = prepared
    if scaled_B is not None:
        scaled_B.copy_((factor * gain)[:, None] * lora_B)
    if counters is not None:
        counters.zero_()


def project(
    rows: Tensor,
    factor: Tensor,
    out_dtype: torch.dtype | None = None,
    counters: Tensor | None = None,
    as_factor: bool = False,
    side: object | None = None,
) -> Tensor:
    """rows (M, K) @ factor (R, K).T -> (M, R) in out_dtype or factor.dtype: x @ A.T, dy @ (gain * B).

    as_factor: it may come as the steps multiply it, as in `factors`. side: as `fork` has made it.
    """
    accumulate = accumulate_dtype(factor.dtype)
    return (rows.to(accumulate) @ factor.to(accumulate).T).to(out_dtype or factor.dtype)


def epilogue(
    base: Tensor,
    low: Tensor | None,
    lora_B: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    scaling: float,
    out_dtype: torch.dtype,
    residual: Tensor | None = None,
    unfinished: tuple[object, ...] | None = None,
) -> Tensor:
    """gain * (base + scaling * low @ lora_B.T) + bias [+ residual - base], (M, N) in out_dtype."""
    z = base if low is None else base + scaling * low.to(gain.dtype) @ lora_B.to(gain.dtype).T
    y = gain * z if bias is None else gain * z + bias
    return (y if residual is None else y + residual - base).to(out_dtype)


def bank_epilogue(
    base: Tensor, low: Tensor, lora_B: Tensor, gain: Tensor, scaling: Tensor, bias: Tensor | None, index: Tensor
) -> Tensor:
    """The epilogue with an adapter for each row, (M, N) in base's dtype; base + bias where index (M,) is -1.

    y_m = gain_e * (base_m + scaling_e * low_m,e @ lora_B_e^T) + bias, e = index_m
    low (M, E * R) has the low-rank products with every adapter; lora_B (E, N, R), gain (E, N), scaling (E,).
    """
    y = base
    for e, low_of_e in enumerate(low.split(lora_B.shape[2], dim=1)):
        product = low_of_e.to(gain.dtype) @ lora_B[e].to(gain.dtype).T
        y = torch.where((index == e)[:, None], gain[e] * (y + scaling[e] * product), y)
    return (y if bias is None else y + bias).to(base.dtype)


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
    """(gain * z + bias, z if save) of z (M, N) = x @ weight.T + scaling * low @ lora_B.T, by one product for both."""
    base = x.to(gain.dtype) @ weight.to(gain.dtype).T
    z = base + scaling * low.to(gain.dtype) @ lora_B.to(gain.dtype).T
    return epilogue(z, None, lora_B, gain, bias, scaling, x.dtype), z.to(x.dtype) if save else None


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
    """(y, norm unless the gain is given, gain, z if save) through the merged weight; z is y before gain and bias."""
    norm, merged = None, direction(weight, lora_A, lora_B, scaling)
    if gain is None:
        norm = row_norms(merged)
        gain = gain_of(magnitude, norm)
    z = x.to(merged.dtype) @ merged.T
    y = gain * z if bias is None else gain * z + bias
    return y.to(x.dtype), norm, gain, z.to(x.dtype) if save else None


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
    dy = dy.to(accumulate_dtype(dy.dtype))
    gained = dy if gain is None else gain * dy
    if dB is not None:
        dB.copy_(scaling * gained.T @ low.to(dy.dtype))
    if dz is not None:
        dz.copy_(gained)
    if dbias is not None:
        dbias.copy_(dy.sum(0))
    if dmagnitude is not None:
        z = saved if lora_B is None else saved + scaling * low.to(dy.dtype) @ lora_B.to(dy.dtype).T
        dmagnitude.copy_(over_norm((dy * z).sum(0), norm))


def outer_product(
    left: Tensor,
    right: Tensor,
    scaling: float,
    out_dtype: torch.dtype,
    counters: Tensor | None = None,
    side: object | None = None,
) -> Tensor:
    """scaling * left (M, R).T @ right (M, K) -> (R, K) in out_dtype: dA."""
    accumulate = accumulate_dtype(left.dtype)
    return (scaling * left.to(accumulate).T @ right.to(accumulate)).to(out_dtype)


def fork(beside: Sequence[str], dy: Tensor, merged: Tensor, *read: Tensor | None) -> object | None:
    """The side on which the steps named run beside dx, to be joined; None where they do not, and here.

    read: what they read beside dy.
    """
    return None


def dx(dy: Tensor, merged: Tensor, side: object | None = None) -> Tensor:
    """dy (M, N) @ merged (N, K) -> (M, K) in dy.dtype, leaving room for what runs on the side."""
    accumulate = accumulate_dtype(dy.dtype)
    return (dy.to(accumulate) @ merged.to(accumulate)).to(dy.dtype)
