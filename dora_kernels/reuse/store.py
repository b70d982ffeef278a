"""The store of norms and gains: they are reused while nothing that they depend on can have changed.

Tensors can be written to in ways that nobody sees: through .data, a detached alias or a NumPy view, by a fused
optimizer or the replay of a CUDA graph. So by itself a layer keeps nothing from call to call, neither in eval mode nor
in training. Two kinds of calls reuse the results of an earlier call of the same layer:
    a call inside `frozen_adapters`, where the caller promises that there is no unseen write (`by_layer`);
    a call that a backward pass runs once more, which is activation checkpointing: it may take the results of its own
    forward pass, once, and so computes with the very same bits (`last_calls`). Its own is the call of the same region
    (regions.py), if that called the layer only once. If several regions call a layer, the last one may.

A result is valid only while its fingerprint is unchanged: the tensors with address, version, dtype and layout; scaling;
operand dtypes; the CUDA stream that computed it (another one would have to wait for it, and for its memory); and the
number of optimizer steps in this process. The version alone is not enough: fused and 8-bit optimizers do not change it.
Nor is the address: a parameter that is replaced leaves its address to the next one. So inside a scope every visible
change ends the reuse; after an invisible one, `invalidate(model)` does.

The store is not read or written while a graph of the running operators is made (tracing.py), nor while a CUDA graph is
captured: the graph would use a kept tensor for ever, whatever becomes of the weights and of the memory.

constants.py keeps what depends on frozen tensors alone, through training and its optimizer steps.

FSDP gathers a weight into the same tensor, often at the same address, and does not change its version: a load of the
shards in between would not be seen. A recomputation has the weights of its forward pass, and inside a scope the caller
promises the same; but for FSDP1's flat weights and those of ZeRO-3 nothing is ever kept.
"""

import itertools
import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from dora_kernels.functional.tracing import is_traced, is_transformed
from dora_kernels.reuse import regions

try:  # the modules that fully_shard manages: there is no public way to ask
    from torch.distributed._composable_state import _module_state_mapping as _managed_modules
except ImportError:
    _managed_modules = None


class Kept(NamedTuple):
    """A layer's norm (N,), gain (N,) and perhaps merged weight (N, K), and the tensors that they were computed from.

    Owners and storages are weak references, and both are needed: a new parameter may take over the storage of the one
    that it replaces, and through .data a parameter may get a new storage at the address of the old one.
    """

    owners: tuple[weakref.ref[Tensor], ...]
    storages: tuple[StorageWeakRef, ...]
    fingerprint: tuple[object, ...]
    norm: Tensor | None
    gain: Tensor | None
    merged: Tensor | None = None

    @classmethod
    def of(
        cls,
        tensors: tuple[Tensor, ...],
        fingerprint: tuple[object, ...],
        norm: Tensor | None = None,
        gain: Tensor | None = None,
    ) -> "Kept":
        owners = tuple(weakref.ref(_owner(tensor)) for tensor in tensors)
        storages = tuple(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)
        return cls(owners, storages, fingerprint, _for_every_mode(norm), _for_every_mode(gain))

    def is_of(self, tensors: tuple[Tensor, ...], fingerprint: tuple[object, ...]) -> bool:
        """True if these are the same tensors, unchanged."""
        if self.fingerprint != fingerprint:  # and with it perhaps the number of tensors
            return False
        return all(
            owner() is _owner(tensor) and storage.cdata == tensor.untyped_storage()._cdata
            for owner, storage, tensor in zip(self.owners, self.storages, tensors, strict=True)
        )


class CallState(NamedTuple):
    """The relation of a call to the store.

    in_scope: it is inside `frozen_adapters`. is_again: a backward pass runs it again, and the last call of its layer
    was the first run. region: the one that may run it again, or None.
    """

    in_scope: bool
    is_again: bool
    region: Any | None


class LastCall(NamedTuple):
    """The results of a layer's last call that may run again, and the region that may run it."""

    region: weakref.ref[Any]
    kept: Kept


# beside the layers and not in them: layers are copied, pickled and saved without these results
by_layer: weakref.WeakKeyDictionary[nn.Module, Kept] = weakref.WeakKeyDictionary()
last_calls: weakref.WeakKeyDictionary[nn.Module, LastCall] = weakref.WeakKeyDictionary()
# the ids of the layers that each region has called, to know whether it has called one twice
_called: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()
constants: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
# the layers inside `frozen_adapters`, each with its scopes, scope.Scope, in the order in which they were opened
scopes: weakref.WeakKeyDictionary[nn.Module, tuple[Any, ...]] = weakref.WeakKeyDictionary()
_optimizer_steps = 0
_counting = False
# a new number with every drop: a call that began before another thread dropped something must not keep it again
_generation = 0
_numbers = itertools.count(1)
# held where something is kept, so that it is before or after the drop of another thread; a finalizer may drop, too
_keeping = threading.RLock()


def generation() -> int:
    """The number of the last drop. Read it before a computation whose result is handed to `keep`."""
    return _generation


def begin_generation() -> None:
    """Let no call that has begun keep what it computes; what was kept is the caller's to drop, after this."""
    global _generation
    with _keeping:
        _generation = next(_numbers)


def optimizer_steps() -> int:
    """The number of optimizer steps in this process since the first call of this; fused ones count as well."""
    global _counting
    if not _counting:
        register_optimizer_step_post_hook(_count_one_step)
        _counting = True
    return _optimizer_steps


def can_keep(tensors: tuple[Tensor, ...], device: torch.device) -> bool:
    """True if results computed from `tensors` may be kept: changes of them are seen, and no graph is being made."""
    if is_traced() or is_transformed():  # first: Dynamo cannot trace a question about the stream
        return False
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return all(map(_has_identity, tensors)) and not capturing


def call_of(layer: nn.Module, tensors: tuple[Tensor, ...], device: torch.device) -> CallState | None:
    """The relation of a call of `layer`, computed from `tensors`, to the store; None if there is none.

    If there is none, the results of the layer's last call are dropped, too: a backward pass must not find them.
    """
    if torch.compiler.is_compiling():
        return None
    last = last_calls.get(layer) if last_calls.data else None
    is_again = last is not None and regions.of_call_again(last.region())
    region = None if is_again else regions.of_first_call(layer.training)
    call = CallState(scope_of(layer) is not None, is_again, region)
    if (call.in_scope or is_again or region is not None) and can_keep(tensors, device):
        return call
    if last is not None:
        last_calls.pop(layer, None)
    return None


def scope_of(layer: nn.Module) -> Any | None:
    """The scope of `layer` that was opened first, or None. A held one (`hold_adapters`) does not count in eval mode: it
    may have been left open.
    """
    if not scopes.data:
        return None
    return next((scope for scope in scopes.get(layer, ()) if layer.training or not scope.held), None)


def find(
    layer: nn.Module, call: CallState, tensors: tuple[Tensor, ...], fingerprint: tuple[object, ...]
) -> Kept | None:
    """The results kept for `layer`, if this call may use them, else None."""
    kept = by_layer.get(layer) if call.in_scope else None
    last = last_calls.pop(layer, None) if call.is_again else None
    # asked again, of the entry that was taken: another thread's region may have called the layer meanwhile
    first = last.kept if last is not None and regions.of_call_again(last.region()) else None
    if first is not None and first.is_of(tensors, fingerprint) and (kept is None or kept.norm is not first.norm):
        return first  # the very bits of the forward pass, whatever a scope has made since
    if kept is None or not kept.is_of(tensors, fingerprint):
        return None
    return kept


def keep(layer: nn.Module, call: CallState, kept: Kept, generation_before: int) -> None:
    """Keep `kept` for `layer`, unless something was dropped meanwhile."""
    is_first = call.region is not None and _is_first_call(layer, call.region)
    with _keeping:
        if generation_before == _generation and call.in_scope:
            by_layer[layer] = kept
        if generation_before == _generation and is_first:
            # no merged weight: a region that is never run again would hold it
            last_calls[layer] = LastCall(weakref.ref(call.region), kept._replace(merged=None))
        if generation_before != _generation:  # before, or in this thread while it was kept
            by_layer.pop(layer, None)
    if (call.region is not None and not is_first) or generation_before != _generation:
        last_calls.pop(layer, None)


def _is_first_call(layer: nn.Module, region: Any) -> bool:
    """True if `region` has not called `layer` before: of two calls nobody can tell which one it runs again."""
    called = _called.setdefault(region, set())
    is_first = id(layer) not in called
    called.add(id(layer))
    return is_first


def weights_come_and_go() -> bool:
    """True if a weight may be gathered anew between two calls; in any process group if torch cannot be asked."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return _managed_modules is None or len(_managed_modules) > 0


def forget(layer: nn.Module) -> None:
    """Drop the results kept for one layer. enable(), disable(), moves, merges and changes of mode call this."""
    begin_generation()
    by_layer.pop(layer, None)
    last_calls.pop(layer, None)


def invalidate(model: nn.Module) -> None:
    """Drop all results kept for the layers of `model`.

    Needed only inside `frozen_adapters`, after a write that breaks the promise: one through .data, a detached alias or
    a NumPy view, which cannot be seen. A change that can be seen ends the reuse by itself.
    """
    for module in model.modules():
        forget(module)
        constants.pop(module, None)


def fingerprint_of(
    tensors: tuple[Tensor, ...], settings: tuple[object, ...], device: torch.device
) -> tuple[object, ...]:
    return identity_of(tensors, device), settings, optimizer_steps()


def identity_of(tensors: tuple[Tensor, ...], device: torch.device) -> tuple[object, ...]:
    """The tensors with address, version and layout, and the stream."""
    identity = tuple((t.data_ptr(), t._version, t.dtype, t.device, t.shape, t.stride()) for t in tensors)
    return identity, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _owner(tensor: Tensor) -> Tensor:
    """The tensor that lives as long as the layer: the parameter itself if `tensor` is a view of it.

    (A transposed weight is a new view in every call, and so are the bytes of a packed one.)
    """
    return tensor if tensor._base is None else tensor._base


def _has_identity(tensor: Tensor) -> bool:
    """True if address and version tell whether the numbers of `tensor` have changed.

    They do not for tensor subclasses, inference tensors, views into FSDP1's flat parameter, weights that ZeRO-3
    gathers, and memory that other processes write to.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
        return False
    owner = _owner(tensor)
    if getattr(owner, "_is_flat_param", False) or hasattr(owner, "ds_status"):
        return False
    return tensor.device.type != "cpu" or not tensor.untyped_storage().is_shared()


def _for_every_mode(row: Tensor | None) -> Tensor | None:
    """`row`, or a copy of one made in inference mode that autograd can save: serving and training share it."""
    if row is None or not row.is_inference():
        return row
    with torch.inference_mode(False):
        return row.clone()


def _count_one_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1
