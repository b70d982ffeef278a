"""frozen_adapters: the norms of a model made in one launch, and used for every micro-batch of an optimizer step."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dora_kernels import launch, ops
from dora_kernels.functional import operand_dtypes
from dora_kernels.quant import Weight, parts
from dora_kernels.reuse import store


class Operands(NamedTuple):
    """What the norm of a layer is computed from. A layer that `frozen_adapters` knows has `adapter_operands()`."""

    weight: Weight
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    scaling: float


class Scope:
    """An open `frozen_adapters`: its layers, whether `hold_adapters` has opened it, and for which operand dtypes their
    norms have been made together.
    """

    def __init__(self, layers: list[nn.Module], keep_merged: bool, held: bool) -> None:
        # weak: the layers of a scope that nobody closes are not held by it
        self._layers = [weakref.ref(layer) for layer in layers]
        self.keep_merged = keep_merged
        self.held = held
        self.filled: set[tuple[object, ...]] = set()
        self.step = -1

    @property
    def layers(self) -> list[nn.Module]:
        """Those that are still there."""
        return [layer for reference in self._layers if (layer := reference()) is not None]

    def close(self) -> None:
        """End the reuse. Does nothing to layers that are in another scope by now."""
        for layer in self.layers:
            if store.scopes.get(layer) is self:
                del store.scopes[layer]
                store.forget(layer)

    @torch.no_grad()
    def fill(self, x: Tensor) -> bool:
        """Make and keep the norms and gains of the layers for calls with an x like this one; False if that was done.

        Not when the scope opens: only a call knows its autocast. Layers of one device and the same dtypes share a
        launch; one that cannot share it (quantised, not contiguous, cast by autocast) is left to its own call.
        """
        if self.step != store.optimizer_steps():
            self.step = store.optimizer_steps()
            self.filled.clear()
        key = (x.device, operand_dtypes(x, x), torch.is_inference_mode_enabled())
        if key in self.filled:
            return False
        self.filled.add(key)
        drops = store.drops()
        groups: dict[tuple[object, ...], list[tuple[nn.Module, Operands, tuple[object, ...]]]] = {}
        for layer in self.layers:
            operands = layer.adapter_operands()
            if operands is None or not isinstance(operands.weight, Tensor) or operands.weight.device != x.device:
                continue
            tensors, (base_dtype, dtype) = operands[:4], operand_dtypes(x, operands.lora_A)
            shareable = all(tensor.is_contiguous() for tensor in tensors) and operands.weight.dtype == base_dtype
            if not shareable or not store.can_keep(tensors, x.device):
                continue
            _, *storage = parts(operands.weight)
            fingerprint = store.fingerprint_of(tensors, (operands.scaling, storage, (base_dtype, dtype)), x.device)
            if store.find(layer, tensors, fingerprint) is None:
                dtypes = (operands.weight.dtype, operands.lora_A.dtype, operands.magnitude.dtype, dtype)
                groups.setdefault(dtypes, []).append((layer, operands, fingerprint))
        for (*_, dtype), members in groups.items():
            weights, lora_As, lora_Bs, magnitudes, scalings = zip(
                *(operands for _, operands, _ in members), strict=True
            )
            tensors = map(list, (weights, lora_As, lora_Bs, magnitudes, scalings))
            norms, gains = ops.grouped_norm(*tensors, dtype, launch.current_options().backend)
            sizes = [weight.shape[0] for weight in weights]
            for member, norm, gain in zip(members, norms.split(sizes), gains.split(sizes), strict=True):
                layer, operands, fingerprint = member
                store.keep(layer, store.Kept.of(operands[:4], fingerprint, norm, gain), drops)
        return True


@contextlib.contextmanager
def frozen_adapters(model: nn.Module, *, keep_merged: bool = False) -> Iterator[None]:
    """Inside, no adapter of `model` changes, says the caller: norm and gain of each layer are computed once.

    Around the micro-batches of one optimizer step, in train mode as in eval mode:

        with dora_kernels.frozen_adapters(model):
            for batch in micro_batches:
                model(batch).loss.backward()
        optimizer.step()

    The first call of a linear layer makes the norms of all of them in one launch for each device and dtypes: those over
    dense, contiguous weights that autocast does not cast. The others (quantised ones, convolutions, embeddings) make
    their own at their first call. On a GPU the last bit of a norm may be another than outside: the sums over K of the
    one launch are not split, those of a layer's own may be.

    An optimizer step inside the scope, fused and 8-bit ones too, ends the reuse of what was made before it; a write
    through .data does not: the promise is broken.

    keep_merged: keep the merged weight, too, from which the backward pass makes dx where the planner has it do so; that
    is one more weight in memory for each layer.

    Raises ValueError where the model has no layer to reuse anything for, and where one of them is in such a scope.
    """
    scope = _opened(model, keep_merged, held=False)
    try:
        yield
    finally:
        scope.close()


def hold_adapters(model: nn.Module, *, keep_merged: bool = False) -> Scope:
    """`frozen_adapters` from here to close() of what is returned, for callers that see beginning and end as events.

    Such a scope may be left open by a caller that an exception has ended: the next one held closes it.
    """
    return _opened(model, keep_merged, held=True)


def _opened(model: nn.Module, keep_merged: bool, held: bool) -> Scope:
    layers = [module for module in model.modules() if hasattr(module, "adapter_operands")]
    if not layers:
        raise ValueError(
            "frozen_adapters: model has no DoRA layer of ours; expected enable(model) first, or DoraLinear"
        )
    others = {scope for layer in layers if (scope := store.scopes.get(layer)) is not None}
    if not all(held and scope.held for scope in others):
        inside = sum(layer in store.scopes for layer in layers)
        raise ValueError(f"frozen_adapters: {inside} of {len(layers)} layers are in another scope; expected none")
    for other in others:
        other.close()
    scope = Scope(layers, keep_merged, held)
    for layer in layers:
        store.forget(layer)
        store.scopes[layer] = scope
    return scope


def mode_set(layer: nn.Module, mode: bool) -> None:
    """To be called by a layer's train(mode). Trainers call it before every micro-batch: that is no change."""
    if layer not in store.scopes or mode != layer.training:
        store.forget(layer)
