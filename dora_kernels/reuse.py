"""norm and gain of a layer, kept while nothing that they depend on can have changed, and used again.

Two calls reuse what an earlier call of the same layer computed:
    a call in eval mode, until train(), an optimizer step, a load of the state dict, a move or `invalidate`;
    a call inside a backward pass, which is activation checkpointing running the forward pass once more.

What is kept is good only while its fingerprint is: which tensors there are, with address, version, dtype and layout,
scaling, operand dtypes, the CUDA stream that computed it (another would have to wait for it, and for its memory), and
the number of optimizer steps taken in this process. The version alone would not do: fused
optimizers, 8-bit optimizers and writes through .data leave it alone. Nor would the address: a parameter that is
replaced leaves its address to the next one. Writes through .data outside an optimizer step (PEFT's hot swap is one)
cannot be seen; after one, call `invalidate(model)`.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from dora_kernels.functional import check_dtypes, dora_linear_core, operand_dtypes, weight_norm
from dora_kernels.quant import Weight, parts
from dora_kernels.reference import gain_ref
from dora_kernels.rescale import frozen_product, rescale
from dora_kernels.validate import check_adapter, check_call


class _Kept(NamedTuple):
    """A layer's norm (N,) and gain (N,), and what they were computed from: tensors, their storages, a fingerprint.

    Both references are weak, and both are needed: a new parameter may take over the storage of the one that it
    replaces, and a parameter may get a new storage, at the old one's address, through .data.
    """

    owners: tuple[weakref.ref[Tensor], ...]
    storages: tuple[StorageWeakRef, ...]
    fingerprint: tuple[object, ...]
    norm: Tensor
    gain: Tensor | None

    @classmethod
    def of(
        cls, tensors: tuple[Tensor, ...], fingerprint: tuple[object, ...], norm: Tensor, gain: Tensor | None
    ) -> "_Kept":
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


# beside the layers and not in them: a layer is copied, pickled and saved without what is kept for it
_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()
_optimizer_steps = 0
_counting = False
# how often something was dropped: what another thread drops must not come back from a call that had begun before
_drops = 0


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
    function: str = "dora_linear",
) -> Tensor:
    """y of `dora_linear_core` for `layer`, reusing the norm and gain of its last call where that is safe.

    lora_dropout: x_dropped goes through the low-rank product alone, and the base layer is multiplied with x only:
        y = gain * (x weight^T + scaling * (x_dropped lora_A^T) lora_B^T) + bias
    Other arguments and errors as dora_linear_core. Nothing is kept under torch.compile, whose graph cannot see what
    changed, nor in a CUDA graph, which computes something else at every replay.
    """
    arguments = (x, weight, lora_A, lora_B, magnitude, scaling, bias)
    if lora_dropout and x_dropped is not None:
        return _with_lora_dropout(layer, *arguments, x_dropped, function)
    stored, *storage = parts(weight)
    tensors = (*stored, lora_A, lora_B, magnitude)
    if not _can_keep(tensors, x.device):
        return dora_linear_core(*arguments, x_dropped=x_dropped, function=function)[0]

    drops = _drops
    fingerprint = _fingerprint(tensors, (scaling, storage, operand_dtypes(x, lora_A)), x.device)
    kept = _find(layer, tensors, fingerprint)
    if kept is not None:
        given = {"norm": kept.norm, "gain": kept.gain}
        return dora_linear_core(*arguments, x_dropped=x_dropped, **given, function=function)[0]
    y, norm, gain = dora_linear_core(*arguments, x_dropped=x_dropped, function=function)
    if drops == _drops:
        _kept[layer] = _Kept.of(tensors, fingerprint, norm, gain)
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
    """One product with the base weight where dora_linear_core under dropout needs two."""
    scaling = check_adapter(function, weight, lora_A, lora_B, scaling)
    check_call(function, x, weight, magnitude, bias, x_dropped, None)
    check_dtypes(function, x, weight)
    base_dtype, dtype = operand_dtypes(x, lora_A)
    stored, *storage = parts(weight)
    norm = norm_reusing(
        layer,
        (*stored, lora_A, lora_B),
        (scaling, storage, dtype),
        lambda: weight_norm(weight, lora_A, lora_B, scaling),
    )
    base = frozen_product(x.to(base_dtype), weight)
    low = F.linear(x_dropped.to(dtype), lora_A.to(dtype))
    return rescale(base, low, lora_B, gain_ref(magnitude, norm), scaling, bias)


def norm_reusing(
    layer: nn.Module, tensors: tuple[Tensor, ...], settings: tuple[object, ...], compute: Callable[[], Tensor]
) -> Tensor:
    """compute(), the norm of `layer`, or what its last call gave where that is safe.

    tensors, settings: all that the norm is computed from. It must be a constant for autograd.
    """
    device = tensors[0].device
    if not _can_keep(tensors, device):
        return compute()
    drops = _drops
    fingerprint = _fingerprint(tensors, settings, device)
    kept = _find(layer, tensors, fingerprint)
    if kept is not None:
        return kept.norm
    norm = compute()
    if drops == _drops:
        _kept[layer] = _Kept.of(tensors, fingerprint, norm, None)
    return norm


def _can_keep(tensors: tuple[Tensor, ...], device: torch.device) -> bool:
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return not torch.compiler.is_compiling() and all(map(_has_identity, tensors)) and not capturing


def _find(layer: nn.Module, tensors: tuple[Tensor, ...], fingerprint: tuple[object, ...]) -> _Kept | None:
    """What is kept for `layer`, if this call may use it."""
    kept = _kept.get(layer)
    in_backward = torch._C._current_graph_task_id() != -1
    if kept is not None and (in_backward or not layer.training) and kept.is_of(tensors, fingerprint):
        return kept
    return None


def forget(layer: nn.Module) -> None:
    """Drop what is kept for one layer: its train() calls this, and enable() and disable() do."""
    global _drops
    _drops += 1
    _kept.pop(layer, None)


def invalidate(model: nn.Module) -> None:
    """Drop the norms and gains kept for the layers of `model`: needed after writes through .data, and only then."""
    for module in model.modules():
        forget(module)


def _fingerprint(tensors: tuple[Tensor, ...], settings: tuple[object, ...], device: torch.device) -> tuple[object, ...]:
    _count_optimizer_steps()
    identity = tuple((t.data_ptr(), t._version, t.dtype, t.device, t.shape, t.stride()) for t in tensors)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    # what inference mode computes cannot be saved for a backward pass
    inference = torch.is_inference_mode_enabled()
    return identity, settings, stream, _optimizer_steps, inference


def _owner(tensor: Tensor) -> Tensor:
    """The tensor that lives as long as the layer has it: the parameter itself, where a view of it is passed.

    (A transposed weight is a new view at every call, and so are the bytes of a packed one.)
    """
    return tensor if tensor._base is None else tensor._base


def _has_identity(tensor: Tensor) -> bool:
    """Whether address and version say which numbers these are: not of a tensor subclass, nor of an inference tensor,
    nor in memory that other processes write to.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
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
