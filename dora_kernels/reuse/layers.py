"""The public functions as layers call them: with an earlier call's results where their reuse is safe."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dora_kernels import ops
from dora_kernels.functional.linear import dora_linear_core, operand_dtypes
from dora_kernels.functional.rescale import dora_linear_lora_dropout
from dora_kernels.functional.validate import check_adapter
from dora_kernels.functional.weight import weight_norm
from dora_kernels.planning.options import current_options
from dora_kernels.quant import Weight, parts, sources
from dora_kernels.reuse import store


def dora_linear_reusing(
    layer: nn.Module,
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None,
    *,
    x_dropped: Tensor | None = None,
    lora_dropout: bool = False,
    low: Tensor | None = None,
    function: str = "dora_linear",
) -> Tensor:
    """y of `dora_linear_core` for `layer`, with the norm and gain of an earlier call where that is safe (store.py).

    lora_dropout: dropout goes before the low-rank product alone, and the base layer sees x:
        y = gain * (x weight^T + scaling * (x_dropped lora_A^T) lora_B^T) + bias
    Other arguments and errors: those of dora_linear_core.
    """
    arguments = (x, weight, lora_A, lora_B, magnitude, scaling, bias)
    if lora_dropout and x_dropped is not None:
        return _with_lora_dropout(layer, *arguments, x_dropped, function)
    stored, *storage = parts(weight)
    tensors = (*sources(stored), lora_A, lora_B, magnitude)
    call = store.call_of(layer, tensors, x.device)
    if call is None:
        return dora_linear_core(*arguments, x_dropped=x_dropped, low=low, function=function)[0]

    generation = store.generation()
    fingerprint = store.fingerprint_of(tensors, (scaling, storage, operand_dtypes(x, lora_A)), x.device)
    kept = store.find(layer, call, tensors, fingerprint)
    scopes = store.scopes.get(layer, ()) if call.in_scope else ()
    if kept is None and any(scope.fill(x) for scope in scopes):
        kept = store.find(layer, call, tensors, fingerprint)
    if kept is None:
        y, norm, gain = dora_linear_core(*arguments, x_dropped=x_dropped, low=low, function=function)
        store.keep(layer, call, store.Kept.of(tensors, fingerprint, norm, gain), generation)
        return y
    found = kept
    if kept.merged is None and any(scope.keep_merged for scope in scopes):
        kept = _merge(kept, x, weight, lora_A, lora_B, scaling)
    if kept is not found or call.region is not None:
        store.keep(layer, call, kept, generation)
    given = {"norm": kept.norm, "gain": kept.gain, "merged": kept.merged}
    return dora_linear_core(*arguments, x_dropped=x_dropped, low=low, **given, function=function)[0]


def _with_lora_dropout(
    layer: nn.Module,
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None,
    x_dropped: Tensor,
    function: str,
) -> Tensor:
    """`dora_linear_lora_dropout` with the norm of an earlier call where that is safe."""
    scaling = check_adapter(function, weight, lora_A, lora_B, scaling)
    norm = weight_norm_reusing(layer, weight, lora_A, lora_B, scaling)
    arguments = (x, x_dropped, weight, lora_A, lora_B, magnitude, scaling, bias)
    return dora_linear_lora_dropout(*arguments, norm, function=function)


@torch.no_grad()
def _merge(kept: store.Kept, x: Tensor, weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> store.Kept:
    """`kept` with the merged weight, if it has the dtype of the base product."""
    base_dtype, dtype = operand_dtypes(x, lora_A)
    if weight.dtype != base_dtype or not x.requires_grad:
        return kept
    backend = current_options().backend
    return kept._replace(merged=ops.merge(*parts(weight), lora_A, lora_B, kept.gain, scaling, dtype, backend))


def weight_norm_reusing(layer: nn.Module, weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`weight_norm` for `layer`, of an earlier call where that is safe."""
    stored, *storage = parts(weight)
    settings = (scaling, storage, operand_dtypes(weight, lora_A))
    compute = functools.partial(weight_norm, weight, lora_A, lora_B, scaling)
    return norm_reusing(layer, (*sources(stored), lora_A, lora_B), settings, compute)


def norm_reusing(
    layer: nn.Module, tensors: tuple[Tensor, ...], settings: tuple[object, ...], compute: Callable[[], Tensor]
) -> Tensor:
    """compute(), the norm of `layer`, of an earlier call where that is safe.

    tensors, settings: all that the norm depends on. It must be a constant for autograd.
    """
    device = tensors[0].device
    call = store.call_of(layer, tensors, device)
    if call is None:
        return compute()
    generation = store.generation()
    fingerprint = store.fingerprint_of(tensors, settings, device)
    kept = store.find(layer, call, tensors, fingerprint)
    found = kept
    if kept is None:
        kept = store.Kept.of(tensors, fingerprint, compute())
    if kept is not found or call.region is not None:
        store.keep(layer, call, kept, generation)
    return kept.norm
