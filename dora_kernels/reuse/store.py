"""norm and gain of a layer, kept while nothing that they depend on can have changed, and used again.

Three calls reuse what an earlier call of the same layer computed:
    a call in eval mode, until train(), an optimizer step, a load of the state dict, a move or `invalidate`;
    a call inside a backward pass, which is activation checkpointing running the forward pass once more;
    a call inside `frozen_adapters`, where the caller says that no adapter changes: between two optimizer steps.

What is kept is good only while its fingerprint is: which tensors there are, with address, version, dtype and layout,
scaling, operand dtypes, the CUDA stream that computed it (another would have to wait for it, and for its memory), and
the number of optimizer steps taken in this process. The version alone would not do: fused optimizers, 8-bit optimizers
and writes through .data leave it alone. Nor would the address: a parameter that is replaced leaves its address to the
next one. Writes through .data outside an optimizer step (PEFT's hot swap is one) cannot be seen; after one, call
`invalidate(model)`.

What is computed of frozen tensors alone is kept by `constant_reusing`, through training and its optimizer steps.

FSDP gathers a weight into the same tensor, at what is often the same address, and leaves its version alone: a load of
the shards in between would not be seen. So while a module of this process is sharded by fully_shard, nothing is kept
from one call in eval mode to the next, nor by `constant_reusing`, and of FSDP1's weights nothing ever. (What a backward
pass recomputes had the same weights in its forward pass: that is used again under fully_shard too.) Nor is anything of
ZeRO-3's weights.
"""

import dataclasses
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

try:  # the modules that fully_shard manages: there is no public way to ask
    from torch.distributed._composable_state import _module_state_mapping as _managed_modules
except ImportError:
    _managed_modules = None


class Kept(NamedTuple):
    """A layer's norm (N,), gain (N,) and perhaps merged weight (N, K), with what they were computed from: tensors,
    their storages, a fingerprint.

    Both references are weak, and both are needed: a new parameter may take over the storage of the one that it
    replaces, and a parameter may get a new storage, at the old one's address, through .data.
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
        return cls(owners, storages, fingerprint, norm, gain)

    def is_of(self, tensors: tuple[Tensor, ...], fingerprint: tuple[object, ...]) -> bool:
        """Whether the same tensors, unchanged, would be used again."""
        if self.fingerprint != fingerprint:  # and with it perhaps the number of tensors
            return False
        return all(
            owner() is _owner(tensor) and storage.cdata == tensor.untyped_storage()._cdata
            for owner, storage, tensor in zip(self.owners, self.storages, tensors, strict=True)
        )


@dataclasses.dataclass
class Constant:
    """What `constant_reusing` made of which tensors, None if it has given up, and whether a second call has used it."""

    kept: Kept
    value: Any
    served: bool = False


# beside the layers and not in them: a layer is copied, pickled and saved without what is kept for it
by_layer: weakref.WeakKeyDictionary[nn.Module, Kept] = weakref.WeakKeyDictionary()
constants: weakref.WeakKeyDictionary[nn.Module, Constant] = weakref.WeakKeyDictionary()
# the layers inside `frozen_adapters`, each with its scope.Scope
scopes: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_optimizer_steps = 0
_counting = False
# how often something was dropped: what another thread drops must not come back from a call that had begun before
_drops = 0


def drops() -> int:
    """How often something was dropped so far: to be read before a computation whose result `keep` is given."""
    return _drops


def keep(layer: nn.Module, kept: Kept, drops_before: int) -> None:
    """Keep `kept` for `layer`, unless something was dropped meanwhile."""
    if drops_before == _drops:
        by_layer[layer] = kept


def optimizer_steps() -> int:
    """How many optimizer steps this process has taken since the first norm was kept."""
    return _optimizer_steps


def can_keep(tensors: tuple[Tensor, ...], device: torch.device) -> bool:
    """Whether what is computed from `tensors` may be kept: their changes are seen, and no graph is being made."""
    if torch.compiler.is_compiling():  # asked first: Dynamo cannot trace a question about the stream
        return False
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return all(map(_has_identity, tensors)) and not capturing


def find(layer: nn.Module, tensors: tuple[Tensor, ...], fingerprint: tuple[object, ...]) -> Kept | None:
    """What is kept for `layer`, if this call may use it."""
    kept = by_layer.get(layer)
    in_eval = not layer.training and not weights_come_and_go()
    reusing = in_backward() or in_eval or layer in scopes
    if kept is not None and reusing and kept.is_of(tensors, fingerprint):
        return kept
    return None


def in_backward() -> bool:
    """Whether autograd is running a backward pass, in which checkpointing runs forward passes once more."""
    return torch._C._current_graph_task_id() != -1


def in_dispatch_mode() -> bool:
    """Whether a TorchDispatchMode counts operators: selective checkpointing's does."""
    return torch._C._len_torch_dispatch_stack() > 0


def weights_come_and_go() -> bool:
    """Whether a weight may be gathered anew between two calls; where torch cannot be asked, it may in any group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return _managed_modules is None or len(_managed_modules) > 0


def forget(layer: nn.Module) -> None:
    """Drop what is kept for one layer: enable() and disable() call this, and moves do."""
    global _drops
    _drops += 1
    by_layer.pop(layer, None)


def invalidate(model: nn.Module) -> None:
    """Drop all that is kept for the layers of `model`: needed after writes through .data, and only then."""
    for module in model.modules():
        forget(module)
        constants.pop(module, None)


def fingerprint_of(
    tensors: tuple[Tensor, ...], settings: tuple[object, ...], device: torch.device
) -> tuple[object, ...]:
    _count_optimizer_steps()
    # what inference mode computes cannot be saved for a backward pass
    inference = torch.is_inference_mode_enabled()
    return identity_of(tensors, device), settings, _optimizer_steps, inference


def identity_of(tensors: tuple[Tensor, ...], device: torch.device) -> tuple[object, ...]:
    """Of which tensors, and computed on which stream."""
    identity = tuple((t.data_ptr(), t._version, t.dtype, t.device, t.shape, t.stride()) for t in tensors)
    return identity, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _owner(tensor: Tensor) -> Tensor:
    """The tensor that lives as long as the layer has it: the parameter itself, where a view of it is passed.

    (A transposed weight is a new view at every call, and so are the bytes of a packed one.)
    """
    return tensor if tensor._base is None else tensor._base


def _has_identity(tensor: Tensor) -> bool:
    """Whether address and version say which numbers these are: not of a tensor subclass, nor of an inference tensor,
    nor of a view into FSDP1's flat parameter, nor of a weight that ZeRO-3 gathers, nor in memory that other processes
    write to.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
        return False
    owner = _owner(tensor)
    if getattr(owner, "_is_flat_param", False) or hasattr(owner, "ds_status"):
        return False
    return tensor.device.type != "cpu" or not tensor.untyped_storage().is_shared()


def _count_optimizer_steps() -> None:
    """From the first call on, before a norm is made, count the steps of every optimizer: the hook fires for fused ones
    too.
    """
    global _counting
    if not _counting:
        register_optimizer_step_post_hook(_count_one_step)
        _counting = True


def _count_one_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1
