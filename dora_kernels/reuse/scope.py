"""frozen_adapters: a model's norms, made in one launch and reused while the caller promises that nothing changes."""

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dora_kernels import ops
from dora_kernels.functional.arguments import check_flag, check_model
from dora_kernels.functional.linear import operand_dtypes
from dora_kernels.functional.validate import check_adapter, check_row
from dora_kernels.planning.options import current_options
from dora_kernels.quant import origin_of
from dora_kernels.reuse import store
from dora_kernels.types import DoraWeight

# one thread at a time opens or closes a scope: each replaces the scopes that a layer is in
_opening = threading.Lock()


class Scope:
    """An open `frozen_adapters`.

    held: opened by `hold_adapters`. filled: the devices and operand dtypes for which the norms of its layers were made.
    """

    def __init__(self, layers: list[nn.Module], keep_merged: bool, held: bool) -> None:
        # weak: a scope that nobody closes must not hold its layers
        self._layers = [weakref.ref(layer) for layer in layers]
        self.keep_merged = keep_merged
        self.held = held
        self.first_step = store.optimizer_steps()
        self.filled: set[tuple[object, ...]] = set()
        self.filled_at = (-1, -1)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers that still exist."""
        return [layer for reference in self._layers if (layer := reference()) is not None]

    def close(self) -> None:
        """End the reuse; of layers in other open scopes, only drop merged weights none of them wants. Idempotent."""
        with _opening:
            store.begin_generation()
            for layer in self.layers:
                scopes = store.scopes.get(layer, ())
                if self in scopes:
                    self._leave(layer, tuple(scope for scope in scopes if scope is not self))

    def _leave(self, layer: nn.Module, others: tuple["Scope", ...]) -> None:
        constant = store.constants.get(layer)
        if constant is not None and constant.scope is self:
            del store.constants[layer]
        if not others:
            del store.scopes[layer]
            store.by_layer.pop(layer, None)
            return
        store.scopes[layer] = others
        kept = store.by_layer.get(layer)
        if kept is not None and kept.merged is not None and not any(scope.keep_merged for scope in others):
            store.by_layer[layer] = kept.without_merged()

    @torch.no_grad()
    def fill(self, x: Tensor) -> bool:
        """Make and keep all layers' norms and gains for calls with an x like this one; False if that was done before.

        Not done when the scope opens, as only a call knows its autocast. Layers on one device with the same dtypes
        share a launch; one that cannot (quantized, not contiguous, cast by autocast) is left to its own call.
        """
        generation = store.generation()
        if self.filled_at != (store.optimizer_steps(), generation):
            self.filled_at = store.optimizer_steps(), generation
            self.filled.clear()
        key = (x.device, operand_dtypes(x, x))
        if key in self.filled:
            return False
        self.filled.add(key)
        groups: dict[tuple[object, ...], list[tuple[nn.Module, DoraWeight, tuple[object, ...]]]] = {}
        for module in self.layers:
            # a layer that was disabled inside the scope is its own library's again
            layer = module.adapter_operands() if hasattr(module, "adapter_operands") else None
            if layer is None or not isinstance(layer.weight, Tensor) or layer.weight.device != x.device:
                continue
            if not _fits(layer):
                continue  # nobody has checked the tensors of a layer that is not being called; its own call will raise
            tensors, (base_dtype, dtype) = layer[:4], operand_dtypes(x, layer.lora_A)
            shareable = all(tensor.is_contiguous() for tensor in tensors) and layer.weight.dtype == base_dtype
            if not shareable or not store.can_keep(tensors, x.device):
                continue
            settings = (layer.scaling, origin_of(layer.weight)[1], (base_dtype, dtype))
            fingerprint = store.fingerprint_of(tensors, settings, x.device)
            if store.find(module, store.IN_SCOPE, tensors, fingerprint) is None:
                dtypes = (layer.weight.dtype, layer.lora_A.dtype, layer.magnitude.dtype, dtype)
                groups.setdefault(dtypes, []).append((module, layer, fingerprint))
        for (*_, dtype), members in groups.items():
            weights, *rest = (list(field) for field in zip(*(layer for _, layer, _ in members), strict=True))
            norms, gains = ops.grouped_norm(weights, *rest, dtype, current_options().backend)
            sizes = [weight.shape[0] for weight in weights]
            for member, norm, gain in zip(members, norms.split(sizes), gains.split(sizes), strict=True):
                module, layer, fingerprint = member
                store.keep(module, store.IN_SCOPE, store.Kept.of(layer[:4], fingerprint, norm, gain), generation)
        return True


def _fits(layer: DoraWeight) -> bool:
    """True if the tensors of a layer fit each other: the kernels read as far as the weight's sizes say."""
    try:
        check_adapter("frozen_adapters", *layer[:3], layer.scaling)
        check_row("frozen_adapters", "magnitude", layer.magnitude, layer.weight)
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def frozen_adapters(model: nn.Module, *, keep_merged: bool = False) -> Iterator[None]:
    """Compute norm and gain once, inside a `with` block in which the caller promises no unseen write to `model`.

    Around generate(), or whatever a server does between two changes of its adapters:

        with dora_kernels.frozen_adapters(model):
            model.generate(**inputs)

    Around the micro-batches of one optimizer step, or around any number of steps: in train mode as in eval mode.

        with dora_kernels.frozen_adapters(model):
            for batch in micro_batches:
                model(batch).loss.backward()
        optimizer.step()

    The first call of a linear layer makes the norms of all linear layers over dense, contiguous weights that autocast
    does not cast, in one launch for each device and dtypes. All others (quantized layers, convolutions, embeddings)
    make their own in their first call. On a GPU the last bit of a norm may differ from one made outside: the one launch
    does not split the sums over K, a layer's own may.

    Every visible change ends the reuse of what was made before it: an optimizer step (fused and 8-bit ones too),
    another adapter or scale, a load, a merge, a move. A write through .data, a detached alias or a NumPy view is
    invisible. It breaks the promise, unless `invalidate(model)` follows.

    Scopes nest, on the same model or a part of it, and may be closed in any order. Reuse ends with the last one.

    keep_merged: also keep the merged weight, from which the backward pass makes dx if the planner chooses so. It takes
    the memory of one more weight for each layer.

    Raises ValueError unless model is an nn.Module with a layer to reuse something for, and keep_merged a bool.
    """
    scope = _opened("frozen_adapters", model, keep_merged, held=False)
    try:
        yield
    finally:
        scope.close()


def hold_adapters(model: nn.Module, *, keep_merged: bool = False) -> Scope:
    """`frozen_adapters` from here to the returned scope's close(), for callers whose beginning and end are events.

    An exception in the caller may leave such a scope open. So it keeps nothing in eval mode, and the next held scope
    closes it. Raises ValueError as frozen_adapters.
    """
    return _opened("hold_adapters", model, keep_merged, held=True)


def _opened(function: str, model: nn.Module, keep_merged: bool, held: bool) -> Scope:
    check_model(function, model)
    check_flag(function, "keep_merged", keep_merged)
    layers = [module for module in model.modules() if hasattr(module, "adapter_operands")]
    if not layers:
        raise ValueError(f"{function}: model has no DoRA layer of ours; expected enable(model) first, or DoraLinear")
    if held:
        for other in {other for layer in layers for other in store.scopes.get(layer, ()) if other.held}:
            other.close()
    scope = Scope(layers, keep_merged, held)
    with _opening:
        store.begin_generation()
        for layer in layers:
            others = store.scopes.get(layer, ())
            if all(other.held for other in others):
                store.by_layer.pop(layer, None)  # kept by a scope left open, which this caller has not promised
            store.scopes[layer] = (*others, scope)
    return scope


def mode_set(layer: nn.Module, mode: bool) -> None:
    """Forget what is kept for a layer whose train(mode) changes its mode: some libraries merge and unmerge in it.

    Trainers call train() before every micro-batch, which changes nothing.
    """
    if mode != layer.training:
        store.forget(layer)
