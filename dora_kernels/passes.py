"""The forward and the backward pass, composed of steps; the steps are Triton kernels or PyTorch's (see `Steps`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dora_kernels.gemm import add_product, base_product, product_onto_low_rank
from dora_kernels.planning import devices, plan
from dora_kernels.quant import Weight
from dora_kernels.reference import gain_of, over_norm
from dora_kernels.types import Needs, Steps


def _device_model(tensor: Tensor) -> plan.Device:
    if tensor.device.type == "cpu":
        return plan.DEVICES["cpu"]
    return plan.device_model(devices.device_facts(tensor.device))


def _low_rank_first(steps: Steps, base: torch.dtype, low_rank: torch.dtype, tensor: Tensor, must_split: bool) -> bool:
    """Whether a split pass makes z, and keeps it, where otherwise it makes and keeps base."""
    device = _device_model(tensor)
    return steps.low_rank_first and plan.low_rank_first(base, device, must_split=must_split, wide=low_rank != base)


def forward(
    steps: Steps,
    x: Tensor,
    x_dropped: Tensor | None,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    given_norm: Tensor | None,
    given_gain: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    way: str,
    keep: str,
    keep_low: bool,
    exact: bool,
    given_low: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """y (M, N), norm (N,), gain (N,) and low (M, R) unless given, low if keep_low, and what dmagnitude will need.

    x (M, K) and a dense weight (N, K) in the dtype of the base GEMM, to which a quantised one is decoded; `dtype` is
    that of the low-rank operands and of x_dropped.
    keep: "base" keeps x @ weight.T (z where `_low_rank_first`), "z" keeps base + scaling * low @ lora_B.T, "" keeps
    nothing (plan.py chooses).
    A quantised weight stands dense for no longer than its products take, and never twice at a time.
    Nothing that is kept is y: fused RoPE and SwiGLU kernels overwrite a layer's output behind autograd's back.
    """
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    shape = plan.Shape.of(x, weight, lora_A)
    norm_given = given_norm is not None
    must_split, wide = exact or x_dropped is not None, dtype != x.dtype
    way = plan.forward_way(way, keep, norm_given, shape, _device_model(x), must_split=must_split, wide=wide)
    adapter_input = x if x_dropped is None else x_dropped
    low = given_low
    if low is None and (way == "split" or keep_low):
        low = steps.project(adapter_input, lora_A)
    new_low = low if keep_low and given_low is None else None
    norm = gain = None
    if norm_given:
        gain = gain_of(magnitude, given_norm) if given_gain is None else given_gain
    if way == "merged":
        y, norm, gain, z = steps.merged_forward(x, weight, lora_A, lora_B, magnitude, bias, gain, scaling, keep == "z")
        return y, norm, None if given_gain is not None else gain, new_low, z

    if not norm_given:
        norm, gain = steps.norm(weight, lora_A, lora_B, scaling, magnitude)
    dense = steps.dense(weight, x.dtype)
    if _low_rank_first(steps, x.dtype, dtype, x, must_split):
        base, low_term = product_onto_low_rank(x, dense, low, lora_B, scaling), None
    else:
        base, low_term = base_product(adapter_input.to(x.dtype), dense, exact), low
    residual = None if x_dropped is None else base_product(x, dense, exact)
    del dense
    y = steps.epilogue(base, low_term, lora_B, gain, bias, scaling, x.dtype, residual)
    return y, norm, None if given_gain is not None else gain, new_low, base if keep else None


def backward(
    steps: Steps,
    dy: Tensor,
    x: Tensor | None,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    norm: Tensor,
    gain: Tensor,
    low: Tensor | None,
    kept: Tensor | None,
    merged: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    way: str,
    keep: str,
    dropped: bool,
    norm_grad: bool,
    needs: Sequence[bool],
    magnitude_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """dx, dx_dropped (M, K), dA (R, K), dB (N, R), dmagnitude (N,), dbias (N,), dlow (M, R); None where not needed.

    x is what the adapter saw (x_dropped under dropout); low and kept are what `forward` kept; merged is the merged
    weight (N, K) in dy's dtype, if there is one already.
        dB = scaling * gain * dy^T low        dA = scaling * P^T x,  P = dy @ (gain * lora_B)
        dmagnitude = sum_m dy * (base + scaling * low @ lora_B^T) / norm        dbias = sum_m dy
        dx = dy @ (gain * (weight + scaling * lora_B @ lora_A)), through that matrix or through dz = gain * dy
        dlow = scaling * P
    """
    needs = Needs(*needs)
    accumulate = gain.dtype
    A_dtype, B_dtype = lora_A.dtype, lora_B.dtype
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    through_norm = norm_grad and (needs.lora_A or needs.lora_B)
    shape = plan.Shape.of(dy, weight, lora_A)
    dx_way = plan.dx_way(way, shape, _device_model(dy)) if needs.x and not dropped else ""

    def grad_dtype(dtype: torch.dtype) -> torch.dtype:
        return accumulate if through_norm else dtype

    dx = dx_dropped = dA = dB = dmagnitude = dbias = dlow = dz = None
    if needs.lora_B:
        dB = gain.new_empty(lora_B.shape, dtype=grad_dtype(B_dtype))
    if needs.magnitude or through_norm:
        dmagnitude = gain.new_empty(norm.shape, dtype=grad_dtype(magnitude_dtype))
    if needs.bias:
        dbias = gain.new_empty(norm.shape, dtype=bias_dtype)
    if dx_way == "dz":
        dz = gain.new_empty(dy.shape, dtype=dy.dtype)
    must_split = dropped or (kept is not None and kept.dtype != dy.dtype)  # the latter: base unrounded
    holds_low_rank = keep == "z" or _low_rank_first(steps, dy.dtype, dtype, dy, must_split)
    lacks_low_rank = dmagnitude is not None and not holds_low_rank
    if dB is not None or dmagnitude is not None or dbias is not None or dz is not None:
        steps.token_sums(
            dy,
            low if dB is not None or lacks_low_rank else None,
            scaling,
            outer=dB,
            gain=gain,
            kept=kept if dmagnitude is not None else None,
            norm=norm,
            lora_B=lora_B if lacks_low_rank else None,
            dmagnitude=dmagnitude,
            dbias=dbias,
            scaled=dz,
        )
    if needs.low:
        dlow = steps.project(dy, lora_B.T, scale=gain * scaling)
    elif needs.lora_A or dx_way == "dz":
        projected = steps.project(dy, lora_B.T, scale=gain)
    if needs.lora_A:
        dA = steps.outer_product(projected, x, scaling, grad_dtype(A_dtype))
    if through_norm:
        # c is d(loss)/dV over V = weight + scaling * B @ A; gain and dmagnitude are both 0 where norm is
        c = -gain * dmagnitude / torch.where(norm == 0, 1, norm)
        dA, dB = _add_norm_gradient(steps, dA, dB, c, weight, lora_A, lora_B, scaling)
        dA, dB = None if dA is None else dA.to(A_dtype), None if dB is None else dB.to(B_dtype)
        dmagnitude = dmagnitude.to(magnitude_dtype) if needs.magnitude else None

    if dx_way == "dz":
        dx = dz @ steps.dense(weight, dz.dtype)
        low_part, factor = (projected, scaling) if dlow is None else (dlow, 1.0)
        add_product(dx, low_part.to(dz.dtype), lora_A.to(dz.dtype), factor)
    elif dx_way == "merged":
        if merged is None:
            merged = steps.merge(weight, lora_A, lora_B, gain, scaling, out_dtype=dy.dtype)
        dx = dy @ merged
    elif needs.x:
        dx = dy @ steps.dense(weight, dy.dtype)
    if needs.x_dropped:
        difference = steps.merge(weight, lora_A, lora_B, gain, scaling, subtract_weight=True, out_dtype=dy.dtype)
        dx_dropped = dy @ difference
    return dx, dx_dropped, dA, dB, dmagnitude, dbias, dlow


def shared_low(steps: Steps, x: Tensor, lora_As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """x (M, K) @ [lora_A; ...] (R + ..., K).T -> (M, R + ...) in dtype: low of several layers, side by side."""
    return steps.project(x, torch.cat([lora_A.to(dtype) for lora_A in lora_As]))


def shared_low_backward(steps: Steps, x: Tensor, dlows: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """dA (R, K) in dtype of each dlow (M, R): dlow^T x, one product for all."""
    ranks = [dlow.shape[1] for dlow in dlows]
    # gradients of different parameters: memory of their own
    return [dA.clone() for dA in steps.outer_product(torch.cat(list(dlows), 1), x, 1.0, dtype).split(ranks)]


def _add_norm_gradient(
    steps: Steps,
    dA: Tensor | None,
    dB: Tensor | None,
    c: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> tuple[Tensor | None, Tensor | None]:
    """dA and dB with the gradient through the norm added; nothing (N, K) is made but of a quantised weight.

    scaling is multiplied by twice, never its square: that of 2e19 is none of float32's.

    With d(loss)/dV = diag(c) V, V = weight + scaling * B A, U = weight A^T and G = A A^T:
        dB += scaling * c (U + scaling * B G)        dA += scaling * ((c B)^T weight + scaling * (c B)^T B A)
    """
    weight = steps.dense(weight, lora_A.dtype)
    A, B = lora_A.to(c.dtype), lora_B.to(c.dtype)
    weighted_B = c[:, None] * B
    if dB is not None:
        product = steps.project(weight, lora_A, out_dtype=c.dtype)  # U
        product = torch.addmm(product, B, A @ A.T, alpha=scaling)
        # an infinite c may not leave the sum over K, where it meets both signs and zeros: NaN
        scale = torch.nan_to_num(scaling * c, nan=torch.nan, posinf=torch.nan, neginf=torch.nan)
        dB = dB + scale[:, None] * product
    if dA is not None:
        dA = dA + steps.outer_product(weighted_B.to(lora_A.dtype), weight, scaling, c.dtype)
        dA = torch.addmm(dA, (scaling * weighted_B).T @ B, A, alpha=scaling)
    return dA, dB


def rescale_backward(
    steps: Steps,
    dy: Tensor,
    base: Tensor | None,
    low: Tensor | None,
    lora_B: Tensor,
    gain: Tensor,
    scaling: float,
    residual: bool,
    needs: Sequence[bool],
    B_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """dbase (M, N), dlow (M, R), dB (N, R), dgain (N,), dbias (N,) of the epilogue; None where not needed.

    y = gain * (base + scaling * low @ lora_B^T) + bias [+ residual - base], where base and low are whatever they are:
        dbase = gain * dy [- dy]        dlow = scaling * dy @ (gain * lora_B)        dB = scaling * gain * dy^T low
        dgain = sum_m dy * (base + scaling * low @ lora_B^T)                  dbias = sum_m dy
    """
    needs_base, needs_low, needs_B, needs_gain, needs_bias = needs
    dbase = dlow = dB = dgain = dbias = None
    if needs_base:
        dbase = gain.new_empty(dy.shape, dtype=dy.dtype)
    if needs_B:
        dB = gain.new_empty(lora_B.shape, dtype=B_dtype)
    if needs_gain:
        dgain = torch.empty_like(gain)
    if needs_bias:
        dbias = gain.new_empty(gain.shape, dtype=bias_dtype)
    if any((needs_base, needs_B, needs_gain, needs_bias)):
        steps.token_sums(
            dy,
            low if needs_B or needs_gain else None,
            scaling,
            outer=dB,
            gain=gain,
            kept=base if needs_gain else None,
            norm=torch.ones_like(gain) if needs_gain else None,
            lora_B=lora_B if needs_gain else None,
            dmagnitude=dgain,
            dbias=dbias,
            scaled=None if residual else dbase,
        )
    if needs_base and residual:
        torch.mul(dy, gain - 1, out=dbase)  # not rounded before dy is taken off
    if needs_low:
        dlow = steps.project(dy, lora_B.T, scale=gain).mul_(scaling)
    return dbase, dlow, dB, dgain, dbias


def norm_backward(
    steps: Steps,
    dnorm: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    norm: Tensor,
    scaling: float,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """dA (R, K) and dB (N, R) of the row norms of weight + scaling * lora_B @ lora_A; 0 where norm is 0."""
    c = over_norm(dnorm, norm)
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    dA, dB = (norm.new_zeros(tensor.shape) if needed else None for tensor, needed in zip((A, B), needs, strict=True))
    dA, dB = _add_norm_gradient(steps, dA, dB, c, weight, A, B, scaling)
    return None if dA is None else dA.to(lora_A.dtype), None if dB is None else dB.to(lora_B.dtype)
