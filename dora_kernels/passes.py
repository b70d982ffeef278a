"""The forward and the backward pass, composed of steps; the steps are Triton kernels or PyTorch's (see `Steps`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dora_kernels.gemm import add_product, base_product
from dora_kernels.planning import costs, devices, measured, plan
from dora_kernels.reference import gain_of, over_norm
from dora_kernels.types import (
    Call,
    DoraWeight,
    Epilogue,
    EpilogueGradients,
    Forward,
    Gradients,
    How,
    Needs,
    Prepared,
    Saved,
    Steps,
)


def _device_model(tensor: Tensor) -> costs.Device:
    if tensor.device.type == "cpu":
        return costs.DEVICES["cpu"]
    return costs.device_model(devices.device_facts(tensor.device))


def forward(steps: Steps, call: Call) -> Forward:
    """y (M, N), norm (N,) and gain (N,) unless given, low (M, R) if save_low, and what dmagnitude will need.

    A dense weight (N, K) is in the dtype of the base GEMM, x's, to which a quantized one is decoded. It then stands
    dense for no longer than its products take, and never twice at a time.
    Nothing that is saved is y: fused RoPE and SwiGLU kernels overwrite a layer's output behind autograd's back.
    """
    x, x_dropped, layer, bias, given, how = call
    layer = _cast_adapter(layer, how.dtype)
    weight, lora_A, lora_B, magnitude, scaling = layer
    adapter_input = x if x_dropped is None else x_dropped
    _check_save("forward", how.save, needs_base=how.exact or x_dropped is not None)
    kind = how.save or _planned_intermediate(call)
    norm, low, gain = None, given.low, given.gain
    A, B = steps.factors(adapter_input, lora_A, lora_B)
    if gain is None and given.norm is not None:
        gain = gain_of(magnitude, given.norm)
    if kind == "z_merged":
        new_low = steps.project(adapter_input, A) if how.save_low and low is None else None
        save = how.save == "z_merged"
        y, norm, gain, z = steps.merged_forward(x, weight, A, B, magnitude, bias, gain, scaling, save)
        return Forward(y, norm, None if given.gain is not None else gain, new_low, z)

    if low is None:
        low = steps.project(adapter_input, A, as_factor=not how.save_low)
    new_low = low if how.save_low and given.low is None else None
    if kind == "z_gemm":
        if gain is None:  # whole: a GEMM does not finish it
            norm, gain = steps.norm(weight, A, B, scaling, magnitude)
        fused = steps.fused_forward(x, steps.dense(weight, x.dtype), low, B, gain, bias, scaling, bool(how.save))
        return Forward(fused[0], norm, None if given.gain is not None else gain, new_low, fused[1])
    unfinished = None
    if given.norm is None:
        norm, gain, unfinished = steps.start_norm(weight, A, B, scaling, magnitude)
    dense = steps.dense(weight, x.dtype)
    base = base_product(x if x_dropped is None else x_dropped.to(x.dtype), dense, how.exact)
    residual = None if x_dropped is None else base_product(x, dense, how.exact)
    del dense
    y = steps.epilogue(base, low, B, gain, bias, scaling, x.dtype, residual, unfinished)
    return Forward(y, norm, None if given.gain is not None else gain, new_low, base if how.save else None)


def _check_save(function: str, save: str, *, needs_base: bool) -> None:
    """Raise ValueError unless `save` names a tensor that this pass makes: dmagnitude is made by what it says."""
    expected = ("base",) if needs_base else plan.INTERMEDIATES
    if save and save not in expected:
        raise ValueError(f"{function}: keep is {save!r}; expected {' or '.join(map(repr, expected))}, or nothing")


def _cast_adapter(layer: DoraWeight, dtype: torch.dtype) -> DoraWeight:
    """`layer` with lora_A and lora_B in dtype, that of the low-rank operands of every step."""
    weight, lora_A, lora_B, magnitude, scaling = layer
    if lora_A.dtype == lora_B.dtype == dtype:
        return layer
    return DoraWeight(weight, lora_A.to(dtype), lora_B.to(dtype), magnitude, scaling)


def _planned_intermediate(call: Call) -> str:
    """The `plan.intermediate` that is chosen if nothing is saved."""
    x, how = call.x, call.how
    shape = costs.Shape.of(x, call.layer.weight, call.layer.lora_A)
    asks = plan.asks(how.exact, call.x_dropped is not None, how.dtype, x.dtype)
    table = measured.table_on(x.device, how.backend)
    way = plan.forward_way(how.way, call.given.norm is not None, shape, _device_model(x), table, **asks)
    return plan.intermediate(way, x.dtype, how.backend, x.device, **asks)


def backward(steps: Steps, dy: Tensor, saved: Saved, layer: DoraWeight, how: How, needs: Needs) -> Gradients:
    """dx, dx_dropped (M, K), dA (R, K), dB (N, R), dmagnitude (N,), dbias (N,), dlow (M, R); None where not needed.

    dB = scaling * gain * dy^T low        dA = scaling * P^T x,  P = dy @ (gain * lora_B)
    dmagnitude = sum_m dy * z / norm,  z = base + scaling * low @ lora_B^T        dbias = sum_m dy
    dx = dy @ (gain * (weight + scaling * lora_B @ lora_A)), through that matrix or through dz = gain * dy
    dlow = scaling * P
    """
    _check_save("backward", how.save, needs_base=how.dropped)
    x, norm, gain, low, intermediate, merged, magnitude_dtype, bias_dtype = saved
    A_dtype, B_dtype = layer.lora_A.dtype, layer.lora_B.dtype
    layer = _cast_adapter(layer, how.dtype)
    weight, lora_A, lora_B, _, scaling = layer
    through_norm = how.norm_grad and (needs.lora_A or needs.lora_B)
    if (needs.magnitude or through_norm) and (intermediate is None or not how.save):
        asked = f"backward: dmagnitude is wanted, and keep is {how.save!r}"
        raise ValueError(f"{asked}; expected what its forward pass has kept")
    dx_way = ""
    beside: tuple[str, ...] = ()
    if needs.x and not how.dropped:
        shape, device = costs.Shape.of(dy, weight, lora_A), _device_model(dy)
        dx_way = plan.dx_way(how.way, shape, device)
        if dx_way == "merged":
            table, wider = measured.table_on(dy.device, how.backend), how.dtype != dy.dtype
            beside = plan.beside(how.way, shape, device, table, adapters_are_wider=wider)

    # of what the gradient through the norm is added to
    dA_dtype, dB_dtype, dmagnitude_dtype = A_dtype, B_dtype, magnitude_dtype
    if through_norm:
        dA_dtype = dB_dtype = dmagnitude_dtype = gain.dtype
    dx = dx_dropped = dA = dB = dmagnitude = dbias = dlow = dz = side = None
    if needs.lora_B:
        dB = gain.new_empty(lora_B.shape, dtype=dB_dtype)
    if needs.magnitude or through_norm:
        dmagnitude = gain.new_empty(norm.shape, dtype=dmagnitude_dtype)
    if needs.bias:
        dbias = gain.new_empty(norm.shape, dtype=bias_dtype)
    if dx_way == "dz":
        dz = gain.new_empty(dy.shape, dtype=dy.dtype)
    lacks_low_rank = dmagnitude is not None and how.save == "base"
    wants_sums = dB is not None or dmagnitude is not None or dbias is not None or dz is not None
    wants_P = needs.lora_A or needs.low or dx_way == "dz"
    if beside:
        wanted = {"token_sums": wants_sums, "project": wants_P, "outer_product": needs.lora_A}
        beside = tuple(step for step in beside if wanted[step])
    A, B = lora_A, lora_B
    if (dx_way == "merged" and merged is None) or needs.x_dropped:
        A, B = steps.factors(dy, lora_A, lora_B)
    prepared = Prepared(
        scaled_B=torch.empty_like(B) if wants_P else None,
        factor=scaling if needs.low else 1.0,
        counters=steps.counters(dy, *weight.shape),
    )
    if dx_way == "merged":
        if merged is None:  # comes first, and prepares what the other steps need on its way
            merged = steps.merge(weight, A, B, gain, scaling, out_dtype=dy.dtype, prepared=prepared)
        elif wants_sums or wants_P:
            steps.prepare(prepared, B, gain)
        side = steps.fork(beside, dy, merged, low, intermediate, prepared.scaled_B, x)
    elif wants_sums or wants_P:
        steps.prepare(prepared, B, gain)
    of_sums, of_P, of_dA = (None, None, None) if prepared.counters is None else prepared.counters.unbind()
    try:
        if dx_way == "merged" and side is None:
            dx = steps.dx(dy, merged)
            del merged
        if wants_sums:
            steps.token_sums(
                dy,
                low if dB is not None or lacks_low_rank else None,
                scaling,
                dB=dB,
                gain=gain,
                saved=intermediate if dmagnitude is not None else None,
                norm=norm,
                lora_B=lora_B if lacks_low_rank else None,
                dmagnitude=dmagnitude,
                dbias=dbias,
                dz=dz,
                counters=of_sums,
                side=side if "token_sums" in beside else None,
            )
        low_rank_side = side if "project" in beside else None
        if prepared.scaled_B is not None:
            # a factor of dA alone, beside an x that is as wide as dy
            as_factor = needs.lora_A and dz is None and x is not None and x.dtype == dy.dtype
            factor = prepared.scaled_B.mT
            projected = steps.project(dy, factor, counters=of_P, as_factor=as_factor, side=low_rank_side)
            dlow = projected if needs.low else None
        if needs.lora_A:
            dA = steps.outer_product(projected, x, scaling, dA_dtype, counters=of_dA, side=low_rank_side)
        if side is not None:  # behind what runs beside it, which waits for all that was launched before
            dx = steps.dx(dy, merged, side)
            del merged
    finally:
        if side is not None:
            side.join()
    if through_norm:
        assert dmagnitude is not None  # for it was asked for above
        # c is d(loss)/dV over V = weight + scaling * B @ A; gain and dmagnitude are both 0 where norm is
        c = -gain * dmagnitude / torch.where(norm == 0, 1, norm)
        dA, dB = _add_norm_gradient(steps, dA, dB, c, layer)
        dA, dB = None if dA is None else dA.to(A_dtype), None if dB is None else dB.to(B_dtype)
        dmagnitude = dmagnitude.to(magnitude_dtype) if needs.magnitude else None

    if dz is not None:
        dx = dz @ steps.dense(weight, dz.dtype)
        add_product(dx, projected.to(dz.dtype), lora_A.to(dz.dtype), scaling if dlow is None else 1.0)
    elif needs.x and dx is None:
        dx = dy @ steps.dense(weight, dy.dtype)
    if needs.x_dropped:
        difference = steps.merge(weight, A, B, gain, scaling, subtract_weight=True, out_dtype=dy.dtype)
        dx_dropped = dy @ difference
    return Gradients(dx, dx_dropped, dA, dB, dmagnitude, dbias, dlow)


def shared_low(steps: Steps, x: Tensor, lora_As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """x (M, K) @ [lora_A; ...] (R + ..., K).T -> (M, R + ...) in dtype: low of several layers, side by side."""
    return steps.project(x, torch.cat([lora_A.to(dtype) for lora_A in lora_As]))


def shared_low_backward(steps: Steps, x: Tensor, dlows: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """dA (R, K) in dtype of each dlow (M, R): dlow^T x, one product for all."""
    ranks = [dlow.shape[1] for dlow in dlows]
    # gradients of different parameters: memory of their own
    return [dA.clone() for dA in steps.outer_product(torch.cat(list(dlows), 1), x, 1.0, dtype).split(ranks)]


def _add_norm_gradient(
    steps: Steps, dA: Tensor | None, dB: Tensor | None, c: Tensor, layer: DoraWeight
) -> tuple[Tensor | None, Tensor | None]:
    """dA and dB with the gradient through the norm added; nothing (N, K) is made but of a quantized weight.

    scaling is multiplied by twice, never its square: that of 2e19 is none of float32's.

    With d(loss)/dV = diag(c) V, V = weight + scaling * B A, U = weight A^T and G = A A^T:
        dB += scaling * c (U + scaling * B G)        dA += scaling * ((c B)^T weight + scaling * (c B)^T B A)
    """
    weight, lora_A, lora_B, _, scaling = layer
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


def norm_backward(
    steps: Steps, dnorm: Tensor, norm: Tensor, layer: DoraWeight, dtype: torch.dtype, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dA (R, K) and dB (N, R) of the row norms of weight + scaling * lora_B @ lora_A; 0 where norm is 0."""
    c = over_norm(dnorm, norm)
    cast = _cast_adapter(layer, dtype)
    factors = (layer.lora_A, layer.lora_B)
    dA, dB = (norm.new_zeros(factor.shape) if needed else None for factor, needed in zip(factors, needs, strict=True))
    dA, dB = _add_norm_gradient(steps, dA, dB, c, cast)
    return (
        None if dA is None else dA.to(layer.lora_A.dtype),
        None if dB is None else dB.to(layer.lora_B.dtype),
    )


def rescale_backward(
    steps: Steps, dy: Tensor, operands: Epilogue, residual: bool, needs: Sequence[bool], bias_dtype: torch.dtype
) -> EpilogueGradients:
    """dbase (M, N), dlow (M, R), dB (N, R), dgain (N,), dbias (N,) of the epilogue; None where not needed.

    y = gain * (base + scaling * low @ lora_B^T) + bias [+ residual - base], where base and low are whatever they are:
        dbase = gain * dy [- dy]        dlow = scaling * dy @ (gain * lora_B)        dB = scaling * gain * dy^T low
        dgain = sum_m dy * (base + scaling * low @ lora_B^T)                  dbias = sum_m dy
    """
    base, low, lora_B, gain, scaling = operands
    B = lora_B.to(low.dtype)
    needs_base, needs_low, needs_B, needs_gain, needs_bias = needs
    dbase = dlow = dB = dgain = dbias = None
    if needs_base:
        dbase = gain.new_empty(dy.shape, dtype=dy.dtype)
    if needs_B:
        dB = gain.new_empty(lora_B.shape, dtype=lora_B.dtype)
    if needs_gain:
        dgain = torch.empty_like(gain)
    if needs_bias:
        dbias = gain.new_empty(gain.shape, dtype=bias_dtype)
    scaled_B = torch.empty_like(B) if needs_low else None
    prepared = Prepared(scaled_B, 1.0, steps.counters(dy, len(B), 0))
    steps.prepare(prepared, B, gain)
    counters = (None, None) if prepared.counters is None else prepared.counters
    if any((needs_base, needs_B, needs_gain, needs_bias)):
        steps.token_sums(
            dy,
            low if needs_B or needs_gain else None,
            scaling,
            dB=dB,
            gain=gain,
            saved=base if needs_gain else None,
            norm=torch.ones_like(gain) if needs_gain else None,
            lora_B=B if needs_gain else None,
            dmagnitude=dgain,
            dbias=dbias,
            dz=None if residual else dbase,
            counters=counters[0],
        )
    if needs_base and residual:
        torch.mul(dy, gain - 1, out=dbase)  # not rounded before dy is taken off
    if scaled_B is not None:
        dlow = steps.project(dy, scaled_B.T, counters=counters[1]).mul_(scaling)
    return EpilogueGradients(dbase, dlow, dB, dgain, dbias)
