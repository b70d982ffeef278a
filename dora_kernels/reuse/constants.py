"""What is computed of a layer's frozen tensors alone: kept through training and its optimizer steps."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dora_kernels.reuse import store

Value = TypeVar("Value")

_BLOCK_ROWS = 128
"""Of a matrix that is widened at once, in the cache."""


class Constant(NamedTuple):
    """What was made, and what has to be the same where it is used again: numbers, or what says that they are."""

    value: Any
    dtypes: list[torch.dtype]
    numbers: list[Tensor] | None
    kept: store.Kept | None
    scope: Any


def constant_reusing(layer: nn.Module, tensors: tuple[Tensor, ...], compute: Callable[[], Value]) -> Value | None:
    """compute(), of frozen tensors alone, from the first call on and while their numbers stay as they are.

    On a CPU matrices are read at each call, so a write in any way is seen: less than 1% of a training step, of which
    the terms of DVoRA's norm save 4% to 14% (2048 x 2048, R = 256, float32, M 2048 to 512). Where that cannot be done,
    only inside `frozen_adapters`, on the caller's promise, and there from the first optimizer step on: before it the
    norms themselves are kept.

    None where nothing can be kept: elsewhere, where a graph is made, of tensor subclasses, while fully_shard manages a
    module.
    """
    device = tensors[0].device
    if not store.can_keep(tensors, device) or store.weights_come_and_go():
        return None
    drops = store.drops()
    numbers = kept = scope = None
    if device.type == "cpu" and all(tensor.dim() == 2 and tensor.is_floating_point() for tensor in tensors):
        numbers = [_read(tensor) for tensor in tensors]
    else:
        scope = store.scope_of(layer)
        if scope is None or scope.first_step == store.optimizer_steps():
            return None
        kept = store.Kept.of(tensors, store.identity_of(tensors, device))
    constant = store.constants.get(layer)
    if constant is not None and _is_of(constant, tensors, numbers, kept, scope):
        return constant.value
    # what inference mode computes cannot be saved for a backward pass
    with torch.inference_mode(False), torch.no_grad():
        value = compute()
    if drops == store.drops():
        store.constants[layer] = Constant(value, [tensor.dtype for tensor in tensors], numbers, kept, scope)
    return value


def _is_of(
    constant: Constant, tensors: tuple[Tensor, ...], numbers: list[Tensor] | None, kept: store.Kept | None, scope: Any
) -> bool:
    """Whether `constant` was made of these numbers, or in this scope of these tensors."""
    if numbers is None:
        return constant.scope is scope and constant.kept.is_of(tensors, kept.fingerprint)
    return (
        constant.numbers is not None
        and constant.dtypes == [tensor.dtype for tensor in tensors]
        and all(map(torch.equal, constant.numbers, numbers))
    )


@torch.no_grad()
def _read(matrix: Tensor) -> Tensor:
    """matrix (N, K) times a vector without meaning, (N,) in float64: other numbers after any change of a row that is
    not 2^-53 of its sum. Not in float32, where a BLAS may round the factors to bfloat16.
    """
    vector = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.cat([rows.double() @ vector for rows in matrix.split(_BLOCK_ROWS)])
