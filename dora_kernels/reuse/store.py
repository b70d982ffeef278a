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
from torch.optim.optimizer import register_optimizer_step_post_hook

from dora_kernels.functional.arguments import check_model
from dora_kernels.functional.tracing import is_traced, is_transformed
from dora_kernels.reuse import regions
from dora_kernels.reuse.kept import Fingerprint, Kept, identity_of, owner_of

try:  # the modules that fully_shard manages: there is no public way to ask
    from torch.distributed._composable_state import _module_state_mapping as _managed_modules
except ImportError:
    _managed_modules = None


class CallState(NamedTuple):
    """The relation of a call to the store.

    in_scope: it is inside `frozen_adapters`. is_again: a backward pass runs it again, and the last call of its layer
    was the first run. region: the one that may run it again, or None.
    """

    in_scope: bool
    is_again: bool
    region: Any | None


IN_SCOPE = CallState(in_scope=True, is_again=False, region=None)
"""That of a call inside `frozen_adapters` and nothing else, as most of them are."""


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
_PLAIN = (Tensor, nn.Parameter)
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


def call_of(layer: nn.Module) -> CallState | None:
    """The relation of a call of `layer` to the store; None if there is none.

    If there is none, the results of the layer's last call are dropped, too: a backward pass must not find them.
    """
    if torch.compiler.is_compiling():
        return None
    last = last_calls.get(layer) if last_calls.data else None
    is_again = last is not None and regions.of_call_again(last.region())
    region = None if is_again else regions.of_first_call(layer.training)
    in_scope = bool(scopes.data) and scope_of(layer) is not None
    if is_again or region is not None:
        return CallState(in_scope, is_again, region)
    if not in_scope and last is not None:
        last_calls.pop(layer, None)
    return IN_SCOPE if in_scope else None


def may_keep(layer: nn.Module, tensors: tuple[Tensor, ...], device: torch.device) -> bool:
    """`can_keep` for a call of `layer` that has a relation to the store; if not, it has none after all (`call_of`)."""
    if can_keep(tensors, device):
        return True
    last_calls.pop(layer, None)
    return False


def scope_of(layer: nn.Module) -> Any | None:
    """The scope of `layer` that was opened first, or None. A held one (`hold_adapters`) does not count in eval mode: it
    may have been left open.
    """
    for scope in scopes.get(layer, ()):
        if layer.training or not scope.held:
            return scope
    return None


def find_unchanged(
    layer: nn.Module, call: CallState, tensors: tuple[Tensor, ...], settings: tuple[object, ...]
) -> Kept | None:
    """The results that `find` would find, where nothing has changed since it last found them; None says nothing.

    Asked first, for it needs neither `may_keep` nor `fingerprint_of`: 2 us, and with them 9.
    """
    kept = by_layer.get(layer) if call is IN_SCOPE else None
    if kept is None or not kept.is_unchanged(tensors, settings, _optimizer_steps) or is_traced() or is_transformed():
        return None
    return None if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing() else kept


def find(layer: nn.Module, call: CallState, tensors: tuple[Tensor, ...], fingerprint: Fingerprint) -> Kept | None:
    """The results kept for `layer`, if this call may use them, else None."""
    kept = by_layer.get(layer) if call.in_scope else None
    last = last_calls.pop(layer, None) if call.is_again else None
    # asked again, of the entry that was taken: another thread's region may have called the layer meanwhile
    first = last.kept if last is not None and regions.of_call_again(last.region()) else None
    if first is not None and first.is_of(tensors, fingerprint) and (kept is None or kept.norm is not first.norm):
        return first  # the very bits of the forward pass, whatever a scope has made since
    if kept is None or not kept.is_of(tensors, fingerprint):
        return None
    if call is IN_SCOPE:
        kept.see(tensors)
    return kept


def keep(layer: nn.Module, call: CallState, kept: Kept, generation_before: int) -> None:
    """Keep `kept` for `layer`, unless something was dropped meanwhile."""
    is_first = call.region is not None and _is_first_call(layer, call.region)
    with _keeping:
        if generation_before == _generation and call.in_scope:
            by_layer[layer] = kept
        if generation_before == _generation and is_first:
            # no merged weight: a region that is never run again would hold it
            last_calls[layer] = LastCall(weakref.ref(call.region), kept.without_merged())
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
    a NumPy view, which cannot be seen. A change that can be seen ends the reuse by itself. Raises ValueError unless
    model is an nn.Module.
    """
    check_model("invalidate", model)
    for module in model.modules():
        forget(module)
        constants.pop(module, None)


def fingerprint_of(tensors: tuple[Tensor, ...], settings: tuple[object, ...], device: torch.device) -> Fingerprint:
    return identity_of(tensors, device), settings, optimizer_steps()


def _has_identity(tensor: Tensor) -> bool:
    """True if address and version tell whether the numbers of `tensor` have changed.

    They do not for tensor subclasses, inference tensors, views into FSDP1's flat parameter, weights that ZeRO-3
    gathers, and memory that other processes write to.
    """
    if type(tensor) not in _PLAIN or tensor.is_inference():
        return False
    owner = owner_of(tensor)
    if getattr(owner, "_is_flat_param", False) or hasattr(owner, "ds_status"):
        return False
    return not (tensor.is_cpu and tensor.untyped_storage().is_shared())


def _count_one_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1
