"""One low for layers that read the same x: q, k and v of an attention, gate and up of a gated MLP.

    [low_q, low_k, low_v] = x [A_q; A_k; A_v]^T        [dA_q; dA_k; dA_v] = [dlow_q, dlow_k, dlow_v]^T x

x is read once where each layer would read it, forward and for dA, and saved once where autocast or a cast would make a
copy for each. dx stays with the layers, and so does everything else.

In a training pass the first layer of a group that is called with an x makes low for all of them. Another member takes
its low if it is called with that very tensor, unchanged, in the same state of autograd, autocast, backend and stream,
with the lora_A that low was made from, and with no optimizer step and no invalidation in between. Every other call
recomputes the group's product: results never change, only the saving does (another order of calls; cross-attention,
whose k and v read another x). A low (M, R) that is not taken is held by the graph of the layer that made it, and by
nothing else. Nothing is shared without gradients, nor while a graph is made (tracing.py), which does not see that two
tensors are the same one.

A write to x or to a lora_A between two layers of a group that neither autograd nor an optimizer counts (through .data,
a detached alias, a NumPy view) is not seen: every layer would have to read what it need not read. After such a write,
call `invalidate(model)`.

One difference is visible: dA of a group is made in one node of autograd. After a backward pass through one member of
the group, one through another needs retain_graph=True, where separate layers do not.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from dora_kernels.functional.autograd import SharedLow, folded
from dora_kernels.functional.linear import operand_dtypes
from dora_kernels.functional.tracing import is_traced, is_transformed
from dora_kernels.planning.options import current_options
from dora_kernels.reuse import store
from dora_kernels.reuse.kept import stream_of

ATTRIBUTE = "dora_shared"
"""The attribute with a layer's Membership: no parameter, buffer or module, so not in the state dict."""


class Sharer(Protocol):
    """A layer that can be in a group."""

    def lora_A_to_share(self, device: torch.device) -> Tensor | None:
        """lora_A (R, K) if the layer, called now with an x on `device`, would take a low made elsewhere; else None."""


class Group:
    """Layers that share, and for each thread the lows of the last call. A copy is empty: see Membership."""

    def __init__(self) -> None:
        self.members: list[weakref.ref[Membership]] = []
        self.thread = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()


class Membership:
    """A layer's place in a group, held by the layer.

    Copied or pickled with its layer, it joins the copy of the group: the layers of a copied model share among
    themselves, and a copy of one layer shares with none.
    """

    def __init__(self, group: Group, layer: Sharer) -> None:
        self.group = group
        self.layer = weakref.ref(layer)
        group.members.append(weakref.ref(self))

    def __getstate__(self) -> dict[str, Any]:
        return {"group": self.group, "layer": self.layer()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


class Lows:
    """Products made by one call for its group and not taken yet: lora_A, its version and low (M, R) by member."""

    def __init__(self, x: Tensor, key: tuple[object, ...]) -> None:
        self.x = weakref.ref(x)
        self.key = key
        self.waiting: dict[Membership, tuple[Tensor, int, Tensor]] = {}

    def take(self, member: Membership, x: Tensor, key: tuple[object, ...], lora_A: Tensor) -> Tensor | None:
        """low (M, R) for a call of `member`, once; None unless it was made from this x and lora_A."""
        if self.x() is not x or self.key != key or member not in self.waiting:
            return None
        made_of, version, low = self.waiting.pop(member)
        return low if made_of is lora_A and version == lora_A._version else None

    def live_with(self, y: Tensor) -> None:
        """Let the graph of y, whose layer made these products, hold them if there is something left to take."""
        if self.waiting:
            y.grad_fn.metadata[ATTRIBUTE] = self


def join(layers: list[Sharer]) -> None:
    """Make the layers one group."""
    group = Group()
    for layer in layers:
        setattr(layer, ATTRIBUTE, Membership(group, layer))


def leave(layer: Any) -> None:
    """Take a layer out of its group, if it is in one."""
    vars(layer).pop(ATTRIBUTE, None)


def siblings(layer: Any) -> list[Sharer]:
    """The other layers of a layer's group."""
    member = vars(layer).get(ATTRIBUTE)
    members = [] if member is None else [reference() for reference in member.group.members]
    layers = [other.layer() for other in members if other is not None and other is not member]
    return [other for other in layers if other is not None]


def shared_low(layer: Sharer, x: Tensor, operand: Tensor, lora_A: Tensor) -> tuple[Tensor | None, Lows | None]:
    """(low (M, R), or None if `layer` does not share; the Lows to `live_with`, if this call made it for others).

    x (..., K): the tensor that the layer was called with; operand: x as it meets the weight. lora_A: the layer's only
    adapter in this call, without dropout.
    """
    member = vars(layer).get(ATTRIBUTE)
    if member is None or is_traced() or is_transformed() or not torch.is_grad_enabled():
        return None, None
    # a replica of DataParallel has the membership of the layer that it was copied from
    if member.layer() is not layer or not lora_A.requires_grad or operand.shape[-1] == 0:
        return None, None
    group, dtypes = member.group, operand_dtypes(operand, lora_A)
    key = _key(x, operand, dtypes)
    last = getattr(group.thread, "lows", None)
    lows = None if last is None else last()
    low = None if lows is None else lows.take(member, x, key, lora_A)
    if low is not None:
        return low, None

    members, lora_As = [member], [lora_A]
    for reference in group.members:
        other = reference()
        sibling = None if other is None or other is member else other.layer()
        factor = None if sibling is None else sibling.lora_A_to_share(x.device)
        if factor is not None and factor.dtype == lora_A.dtype and factor.shape[1] == lora_A.shape[1]:
            members.append(other)
            lora_As.append(factor)
    if len(members) == 1:
        return None, None
    lows = Lows(x, key)
    made = SharedLow.apply([folded(operand, dtypes[0])], dtypes[1], current_options().backend, lows, *lora_As)
    for one, factor, low in zip(members, lora_As, made, strict=True):
        lows.waiting[one] = factor, factor._version, low
    group.thread.lows = weakref.ref(lows)
    return lows.take(member, x, key, lora_A), lows


def _key(x: Tensor, operand: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[object, ...]:
    """Everything that must be equal in two calls with the same x; an optimizer may write without a new version."""
    on_cuda = x.is_cuda  # in a tenth of the time of x.device.type
    return (
        x._version,
        store.optimizer_steps(),
        store.generation(),
        operand.dtype,
        dtypes,
        current_options().backend,
        # a region of activation checkpointing must be able to recompute all that it saves
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        stream_of(x.device) if on_cuda else 0,
        on_cuda and torch.cuda.is_current_stream_capturing(),
    )
