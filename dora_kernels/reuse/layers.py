"""The public functions as layers call them: with an earlier call's results where their reuse is safe."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from dora_kernels import ops
from dora_kernels.functional.linear import dora_linear_core, operand_dtypes
from dora_kernels.functional.rescale import dora_linear_lora_dropout
from dora_kernels.functional.validate import check_adapter, check_tracing
from dora_kernels.functional.weight import weight_norm
from dora_kernels.planning.options import current_options
from dora_kernels.quant import flatten_weight, origin_of
from dora_kernels.reuse import store
from dora_kernels.types import NOTHING_GIVEN, DoraWeight, Given


def dora_linear_reusing(
    module: nn.Module,
    x: Tensor,
    layer: DoraWeight,
    bias: Tensor | None,
    *,
    x_dropped: Tensor | None = None,
    lora_dropout: bool = False,
    low: Tensor | None = None,
    function: str = "dora_linear",
) -> Tensor:
    """y of `dora_linear_core` for `module`, with the norm and gain of an earlier call where that is safe (store.py).

    lora_dropout: dropout goes before the low-rank product alone, and the base layer sees x:
        y = gain * (x weight^T + scaling * (x_dropped lora_A^T) lora_B^T) + bias
    low: as in dora_linear_core's given. Other arguments and errors: those of dora_linear_core.
    """
    if lora_dropout and x_dropped is not None:
        return _with_lora_dropout(module, x, layer, bias, x_dropped, function)
    given, keep = NOTHING_GIVEN if low is None else Given(low=low), None
    call = store.call_of(module)
    if call is not None:
        if type(x) is not Tensor:
            check_tracing(function, x)
        tensors, settings = _read(x, layer)
        kept = store.find_unchanged(module, call, tensors, settings)
        if kept is None or (kept.merged is None and x.requires_grad and _wants_merged(module)):
            kept, keep = _find(module, call, x, layer, tensors, settings)
        if kept is not None:
            given = Given(kept.norm, kept.gain, low, kept.merged)
    y, norm, gain = dora_linear_core(x, layer, bias, x_dropped=x_dropped, given=given, function=function)
    if keep is not None:
        keep(norm, gain)
    return y


def _find(
    module: nn.Module,
    call: store.CallState,
    x: Tensor,
    layer: DoraWeight,
    tensors: tuple[Tensor, ...],
    settings: tuple[object, ...],
) -> tuple[store.Kept | None, Callable[[Tensor, Tensor], None] | None]:
    """(the results kept for this call, None), or (None, a function that keeps what it makes, None where it may not)."""
    if not store.may_keep(module, tensors, x.device):
        return None, None
    generation = store.generation()
    fingerprint = store.fingerprint_of(tensors, settings, x.device)
    kept = store.find(module, call, tensors, fingerprint)
    scopes = store.scopes.get(module, ()) if call.in_scope else ()
    if kept is None and any(scope.fill(x) for scope in scopes):
        kept = store.find(module, call, tensors, fingerprint)
    if kept is None:

        def keep(norm: Tensor, gain: Tensor) -> None:
            store.keep(module, call, store.Kept.of(tensors, fingerprint, norm, gain), generation)

        return None, keep
    found = kept
    if kept.merged is None and call.in_scope and _wants_merged(module):
        kept = _merge(kept, x, layer)
    if kept is not found or call.region is not None:
        store.keep(module, call, kept, generation)
    return kept, None


def _read(x: Tensor, layer: DoraWeight) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
    """The tensors that norm and gain are computed from, and what else they depend on."""
    weight, lora_A, lora_B, magnitude, scaling = layer
    stored, storage = origin_of(weight)
    return (*stored, lora_A, lora_B, magnitude), (scaling, storage, operand_dtypes(x, lora_A))


def _wants_merged(module: nn.Module) -> bool:
    """True if a scope of `module` was opened with keep_merged."""
    for scope in store.scopes.get(module, ()):  # a third of the time of any()
        if scope.keep_merged:
            return True
    return False


def _with_lora_dropout(
    module: nn.Module, x: Tensor, layer: DoraWeight, bias: Tensor | None, x_dropped: Tensor, function: str
) -> Tensor:
    """`dora_linear_lora_dropout` with the norm of an earlier call where that is safe."""
    weight, lora_A, lora_B, _, scaling = layer
    layer = layer._replace(scaling=check_adapter(function, weight, lora_A, lora_B, scaling))
    norm = weight_norm_reusing(module, layer)
    return dora_linear_lora_dropout(x, x_dropped, layer, bias, norm, function=function)


@torch.no_grad()
def _merge(kept: store.Kept, x: Tensor, layer: DoraWeight) -> store.Kept:
    """`kept` with the merged weight, if it has the dtype of the base product."""
    weight, lora_A, lora_B, _, scaling = layer
    base_dtype, dtype = operand_dtypes(x, lora_A)
    if weight.dtype != base_dtype or not x.requires_grad:
        return kept
    backend = current_options().backend
    merged = ops.merge(*flatten_weight(weight), lora_A, lora_B, kept.gain, scaling, dtype, backend)
    return replace(kept, merged=merged)


def weight_norm_reusing(module: nn.Module, layer: DoraWeight) -> Tensor:
    """`weight_norm` for `module`, of an earlier call where that is safe."""
    weight, lora_A, lora_B, _, scaling = layer
    stored, storage = origin_of(weight)
    settings = (scaling, storage, operand_dtypes(weight, lora_A))
    compute = functools.partial(weight_norm, weight, lora_A, lora_B, scaling)
    return norm_reusing(module, (*stored, lora_A, lora_B), settings, compute)


def norm_reusing(
    module: nn.Module, tensors: tuple[Tensor, ...], settings: tuple[object, ...], compute: Callable[[], Tensor]
) -> Tensor:
    """compute(), the norm of `module`, of an earlier call where that is safe.

    tensors, settings: all that the norm depends on. It must be a constant for autograd.
    """
    call = store.call_of(module)
    kept = None if call is None else store.find_unchanged(module, call, tensors, settings)
    if kept is not None:
        return kept.norm
    device = tensors[0].device
    if call is None or not store.may_keep(module, tensors, device):
        return compute()
    generation = store.generation()
    fingerprint = store.fingerprint_of(tensors, settings, device)
    kept = store.find(module, call, tensors, fingerprint)
    found = kept
    if kept is None:
        kept = store.Kept.of(tensors, fingerprint, compute())
    if kept is not found or call.region is not None:
        store.keep(module, call, kept, generation)
    return kept.norm
