"""norm and gain of a layer, kept while nothing that they depend on can have changed, and used again.

Three calls reuse what an earlier call of the same layer computed:
    a call in eval mode, until train(), an optimizer step, a load of the state dict, a move or `invalidate`;
    a call inside a backward pass, which is activation checkpointing running the forward pass once more;
    a call inside `frozen_adapters`, where the caller says that no adapter changes: between two optimizer steps.

What is kept is good only while its fingerprint is: which tensors there are, with address, version, dtype and layout,
scaling, operand dtypes, the CUDA stream that computed it (another would have to wait for it, and for its memory), and
the number of optimizer steps taken in this process. The version alone would not do: fused
optimizers, 8-bit optimizers and writes through .data leave it alone. Nor would the address: a parameter that is
replaced leaves its address to the next one. Writes through .data outside an optimizer step (PEFT's hot swap is one)
cannot be seen; after one, call `invalidate(model)`.

What is computed of frozen tensors alone is kept by `constant_reusing`, through training and its optimizer steps.

FSDP gathers a weight into the same tensor, at what is often the same address, and leaves its version alone: a load of
the shards in between would not be seen. So while a module of this process is sharded by fully_shard, nothing is kept
from one call in eval mode to the next, and of FSDP1's weights nothing ever. (What a backward pass recomputes had the
same weights in its forward pass: that is used again under fully_shard too.) Nor is anything of ZeRO-3's weights.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from dora_kernels import launch, ops
from dora_kernels.functional import check_dtypes, dora_linear_core, operand_dtypes, weight_norm
from dora_kernels.quant import Weight, frozen_product, parts
from dora_kernels.reference import gain_ref
from dora_kernels.rescale import rescale
from dora_kernels.validate import check_adapter, check_call

Value = TypeVar("Value")

try:  # the modules that fully_shard manages: there is no public way to ask
    from torch.distributed._composable_state import _module_state_mapping as _managed_modules
except ImportError:
    _managed_modules = None


class _Kept(NamedTuple):
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
# what constant_reusing made, None before its second call, and what it was made of
_constants: weakref.WeakKeyDictionary[nn.Module, tuple[_Kept, object]] = weakref.WeakKeyDictionary()
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
    scope = _scopes.get(layer)
    if kept is None and scope is not None and scope.fill(x):
        kept = _find(layer, tensors, fingerprint)
    if kept is not None:
        if scope is not None and scope.keep_merged and kept.merged is None:
            kept = _merge(layer, kept, x, weight, lora_A, lora_B, scaling)
        given = {"norm": kept.norm, "gain": kept.gain, "merged": kept.merged}
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

    tensors, settings: all that the norm is computed from. It must be a constant for autograd. Nothing is reused under a
    TorchDispatchMode: selective checkpointing is one, and takes the n-th call of an operator for the n-th it has saved.
    """
    device = tensors[0].device
    if not _can_keep(tensors, device) or torch._C._len_torch_dispatch_stack() > 0:
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


def constant_reusing(layer: nn.Module, tensors: tuple[Tensor, ...], compute: Callable[[], Value]) -> Value | None:
    """compute(), of frozen tensors alone, from the second call on that sees the same ones unchanged; None before.

    So a weight that moves at every call (offloaded, gathered) never pays for what would be used once. None, too, where
    nothing can be kept: under torch.compile, in a CUDA graph, of tensor subclasses.
    """
    device = tensors[0].device
    if not _can_keep(tensors, device):
        return None
    drops = _drops
    fingerprint = _identity(tensors, device)
    kept, value = _constants.get(layer, (None, None))
    if kept is None or not kept.is_of(tensors, fingerprint):
        kept, value = _Kept.of(tensors, fingerprint), None
    elif value is None:
        # what inference mode computes cannot be saved for a backward pass
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
    if drops == _drops:
        _constants[layer] = kept, value
    return value


def _can_keep(tensors: tuple[Tensor, ...], device: torch.device) -> bool:
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return not torch.compiler.is_compiling() and all(map(_has_identity, tensors)) and not capturing


def _find(layer: nn.Module, tensors: tuple[Tensor, ...], fingerprint: tuple[object, ...]) -> _Kept | None:
    """What is kept for `layer`, if this call may use it."""
    kept = _kept.get(layer)
    in_backward = torch._C._current_graph_task_id() != -1
    in_eval = not layer.training and not _weights_come_and_go()
    reusing = in_backward or in_eval or layer in _scopes
    if kept is not None and reusing and kept.is_of(tensors, fingerprint):
        return kept
    return None


class Operands(NamedTuple):
    """What the norm of a layer is computed from. A layer that `frozen_adapters` knows has `adapter_operands()`."""

    weight: Weight
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    scaling: float


class _Scope:
    """An open `frozen_adapters`: its layers, and for which operand dtypes their norms have been made together."""

    def __init__(self, layers: list[nn.Module], keep_merged: bool) -> None:
        self.layers = layers
        self.keep_merged = keep_merged
        self.filled: set[tuple[object, ...]] = set()

    @torch.no_grad()
    def fill(self, x: Tensor) -> bool:
        """Make and keep the norms and gains of all layers for calls with an x like this one; False if that was done.

        Not when the scope opens: only a call knows its autocast. Layers of one device and the same dtypes share a
        launch; one that cannot share it (quantised, not contiguous, cast by autocast) is left to its own call.
        """
        key = (x.device, operand_dtypes(x, x), torch.is_inference_mode_enabled(), _optimizer_steps)
        if key in self.filled:
            return False
        self.filled.add(key)
        groups: dict[tuple[object, ...], list[tuple[nn.Module, Operands, tuple[object, ...]]]] = {}
        for layer in self.layers:
            operands = layer.adapter_operands()
            if operands is None or not isinstance(operands.weight, Tensor) or operands.weight.device != x.device:
                continue
            tensors, (base_dtype, dtype) = operands[:4], operand_dtypes(x, operands.lora_A)
            shareable = all(tensor.is_contiguous() for tensor in tensors) and operands.weight.dtype == base_dtype
            if not shareable or not _can_keep(tensors, x.device):
                continue
            _, *storage = parts(operands.weight)
            fingerprint = _fingerprint(tensors, (operands.scaling, storage, (base_dtype, dtype)), x.device)
            if _find(layer, tensors, fingerprint) is None:
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
                _kept[layer] = _Kept.of(operands[:4], fingerprint, norm, gain)
        return True


_scopes: weakref.WeakKeyDictionary[nn.Module, _Scope] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def frozen_adapters(model: nn.Module, *, keep_merged: bool = False) -> Iterator[None]:
    """Inside, no adapter of `model` changes, says the caller: norm and gain of each layer are computed once.

    Around the micro-batches of one optimizer step, in train mode as in eval mode:

        with dora_kernels.frozen_adapters(model):
            for batch in micro_batches:
                model(batch).loss.backward()
        optimizer.step()

    The first call of a layer makes the norms of all layers in one launch. An optimizer step inside the scope, fused and
    8-bit ones too, ends the reuse of what was made before it; a write through .data does not: the promise is broken.

    keep_merged: keep the merged weight, too, from which the backward pass makes dx where the planner has it do so; that
    is one more weight in memory for each layer.

    Raises ValueError where the model has no layer to reuse anything for, and where one of them is in such a scope.
    """
    layers = [module for module in model.modules() if hasattr(module, "adapter_operands")]
    if not layers:
        raise ValueError(
            "frozen_adapters: model has no DoRA layer of ours; expected enable(model) first, or DoraLinear"
        )
    inside = [layer for layer in layers if layer in _scopes]
    if inside:
        raise ValueError(f"frozen_adapters: {len(inside)} of {len(layers)} layers are in another scope; expected none")
    scope = _Scope(layers, keep_merged)
    for layer in layers:
        forget(layer)
        _scopes[layer] = scope
    try:
        yield
    finally:
        for layer in layers:
            _scopes.pop(layer, None)
            forget(layer)


@torch.no_grad()
def _merge(
    layer: nn.Module, kept: _Kept, x: Tensor, weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> _Kept:
    """`kept` with the merged weight, if it has the dtype of the base product."""
    base_dtype, dtype = operand_dtypes(x, lora_A)
    if weight.dtype != base_dtype or not x.requires_grad:
        return kept
    backend = launch.current_options().backend
    merged = ops.merge(*parts(weight), lora_A, lora_B, kept.gain, scaling, dtype, backend)
    _kept[layer] = kept._replace(merged=merged)
    return _kept[layer]


def mode_set(layer: nn.Module, mode: bool) -> None:
    """To be called by a layer's train(mode). Trainers call it before every micro-batch: that is no change."""
    if layer not in _scopes or mode != layer.training:
        forget(layer)


def _weights_come_and_go() -> bool:
    """Whether a weight may be gathered anew between two calls; where torch cannot be asked, it may in any group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return _managed_modules is None or len(_managed_modules) > 0


def forget(layer: nn.Module) -> None:
    """Drop what is kept for one layer: enable() and disable() call this, and moves do."""
    global _drops
    _drops += 1
    _kept.pop(layer, None)


def invalidate(model: nn.Module) -> None:
    """Drop all that is kept for the layers of `model`: needed after writes through .data, and only then."""
    for module in model.modules():
        forget(module)
        _constants.pop(module, None)


def _fingerprint(tensors: tuple[Tensor, ...], settings: tuple[object, ...], device: torch.device) -> tuple[object, ...]:
    _count_optimizer_steps()
    # what inference mode computes cannot be saved for a backward pass
    inference = torch.is_inference_mode_enabled()
    return _identity(tensors, device), settings, _optimizer_steps, inference


def _identity(tensors: tuple[Tensor, ...], device: torch.device) -> tuple[object, ...]:
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
