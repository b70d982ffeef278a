"""What a layer calls in place of the functions themselves: results of its last call are used where that is safe."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from dora_kernels import launch, ops
from dora_kernels.functional import dora_linear_core, operand_dtypes, weight_norm
from dora_kernels.quant import Weight, parts
from dora_kernels.rescale import dora_linear_lora_dropout
from dora_kernels.reuse import store
from dora_kernels.validate import check_adapter, check_transforms

Value = TypeVar("Value")


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
    """y of `dora_linear_core` for `layer`, reusing the norm and gain of its last call where that is safe.

    lora_dropout: x_dropped goes through the low-rank product alone, and the base layer is multiplied with x only:
        y = gain * (x weight^T + scaling * (x_dropped lora_A^T) lora_B^T) + bias
    low: as dora_linear_core's. Other arguments and errors as dora_linear_core. Nothing is kept under torch.compile,
    whose graph cannot see what changed, nor in a CUDA graph, which computes something else at every replay.
    """
    check_transforms(function, x, lora_A, lora_B, magnitude)  # before anything is asked of their storage
    arguments = (x, weight, lora_A, lora_B, magnitude, scaling, bias)
    if lora_dropout and x_dropped is not None:
        return _with_lora_dropout(layer, *arguments, x_dropped, function)
    stored, *storage = parts(weight)
    tensors = (*stored, lora_A, lora_B, magnitude)
    if not store.can_keep(tensors, x.device):
        return dora_linear_core(*arguments, x_dropped=x_dropped, low=low, function=function)[0]

    drops = store.drops()
    fingerprint = store.fingerprint_of(tensors, (scaling, storage, operand_dtypes(x, lora_A)), x.device)
    kept = store.find(layer, tensors, fingerprint)
    scope = store.scopes.get(layer)
    if kept is None and scope is not None and scope.fill(x):
        kept = store.find(layer, tensors, fingerprint)
    if kept is not None:
        if scope is not None and scope.keep_merged and kept.merged is None:
            kept = _merge(layer, kept, x, weight, lora_A, lora_B, scaling)
        given = {"norm": kept.norm, "gain": kept.gain, "merged": kept.merged}
        return dora_linear_core(*arguments, x_dropped=x_dropped, low=low, **given, function=function)[0]
    y, norm, gain = dora_linear_core(*arguments, x_dropped=x_dropped, low=low, function=function)
    store.keep(layer, store.Kept.of(tensors, fingerprint, norm, gain), drops)
    return y


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
    """`dora_linear_lora_dropout` with the norm of the layer's last call where that is safe."""
    scaling = check_adapter(function, weight, lora_A, lora_B, scaling)
    norm = weight_norm_reusing(layer, weight, lora_A, lora_B, scaling)
    arguments = (x, x_dropped, weight, lora_A, lora_B, magnitude, scaling, bias)
    return dora_linear_lora_dropout(*arguments, norm, function=function)


@torch.no_grad()
def _merge(
    layer: nn.Module, kept: store.Kept, x: Tensor, weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> store.Kept:
    """`kept` with the merged weight, if it has the dtype of the base product."""
    drops = store.drops()
    base_dtype, dtype = operand_dtypes(x, lora_A)
    if weight.dtype != base_dtype or not x.requires_grad:
        return kept
    backend = launch.current_options().backend
    merged = ops.merge(*parts(weight), lora_A, lora_B, kept.gain, scaling, dtype, backend)
    kept = kept._replace(merged=merged)
    store.keep(layer, kept, drops)
    return kept


def weight_norm_reusing(layer: nn.Module, weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`weight_norm` for `layer`, or what its last call gave where that is safe."""
    stored, *storage = parts(weight)
    settings = (scaling, storage, operand_dtypes(weight, lora_A))
    compute = functools.partial(weight_norm, weight, lora_A, lora_B, scaling)
    return norm_reusing(layer, (*stored, lora_A, lora_B), settings, compute)


def norm_reusing(
    layer: nn.Module, tensors: tuple[Tensor, ...], settings: tuple[object, ...], compute: Callable[[], Tensor]
) -> Tensor:
    """compute(), the norm of `layer`, or what its last call gave where that is safe.

    tensors, settings: all that the norm is computed from. It must be a constant for autograd. Nothing is reused under a
    TorchDispatchMode: selective checkpointing is one, and takes the n-th call of an operator for the n-th it has saved.
    """
    device = tensors[0].device
    if not store.can_keep(tensors, device) or store.in_dispatch_mode():
        return compute()
    drops = store.drops()
    fingerprint = store.fingerprint_of(tensors, settings, device)
    kept = store.find(layer, tensors, fingerprint)
    if kept is not None:
        return kept.norm
    norm = compute()
    store.keep(layer, store.Kept.of(tensors, fingerprint, norm), drops)
    return norm


def constant_reusing(layer: nn.Module, tensors: tuple[Tensor, ...], compute: Callable[[], Value]) -> Value | None:
    """compute(), of frozen tensors alone, from the first call on and while they stay as they are.

    None where nothing can be kept: under torch.compile, in a CUDA graph, of tensor subclasses, while fully_shard
    manages a module; and under a TorchDispatchMode, as for norm_reusing. None, too, in a backward pass that finds other
    tensors than its forward pass, and from then on where the second call does: such a weight (offloaded, gathered)
    moves, and would pay at every call for what is used once. `invalidate` begins anew.
    """
    device = tensors[0].device
    if not store.can_keep(tensors, device) or store.weights_come_and_go() or store.in_dispatch_mode():
        return None
    drops = store.drops()
    fingerprint = store.identity_of(tensors, device)
    constant = store.constants.get(layer)
    if constant is not None and (constant.value is None or constant.kept.is_of(tensors, fingerprint)):
        constant.served = True
        return constant.value
    if store.in_backward():
        return None
    value = None
    if constant is None or constant.served:
        # what inference mode computes cannot be saved for a backward pass
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
    if drops == store.drops():
        store.constants[layer] = store.Constant(store.Kept.of(tensors, fingerprint), value)
    return value
