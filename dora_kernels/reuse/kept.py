"""Kept: results of a layer's call, and whether the tensors that they were computed from are still what they were.

Every call inside a scope asks that. So it is asked twice: `is_unchanged` compares with the last call that found them
unchanged, in 1 us for four tensors; where it does not say yes, `is_of` has the last word, in 4 us with its fingerprint.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dora_kernels.quant import layout_check

Fingerprint = tuple[tuple[tuple[tuple[object, ...], ...], int], tuple[object, ...], int]
"""`identity_of` the tensors, the settings of the call, and the number of optimizer steps."""


class Look(NamedTuple):
    """A fingerprint as it was last seen, taken apart into what is cheap to compare."""

    settings: tuple[object, ...]
    steps: int
    stream: int
    # owner, address, version and storage of each tensor
    places: list[tuple[weakref.ref[Tensor], object, object, int]]
    # all the rest, and more, on which no norm depends: requires_grad, autocast, inference mode
    has_layout: Callable[..., bool]


@dataclass(eq=False, slots=True)
class Kept:
    """A layer's norm (N,), gain (N,) and perhaps merged weight (N, K), and the tensors that they were computed from.

    Owners and storages are weak references, and both are needed: a new parameter may take over the storage of the one
    that it replaces, and through .data a parameter may get a new storage at the address of the old one.

    look: of the last call in a scope that found the tensors unchanged.
    """

    owners: list[weakref.ref[Tensor]]
    storages: list[StorageWeakRef]
    fingerprint: Fingerprint
    norm: Tensor | None
    gain: Tensor | None
    merged: Tensor | None = None
    look: Look | None = None

    @classmethod
    def of(
        cls,
        tensors: tuple[Tensor, ...],
        fingerprint: Fingerprint,
        norm: Tensor | None = None,
        gain: Tensor | None = None,
    ) -> "Kept":
        owners = [weakref.ref(owner_of(tensor)) for tensor in tensors]
        storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        return cls(owners, storages, fingerprint, _for_every_mode(norm), _for_every_mode(gain))

    def is_of(self, tensors: tuple[Tensor, ...], fingerprint: Fingerprint) -> bool:
        """True if these are the same tensors, unchanged."""
        if self.fingerprint != fingerprint:  # and with it perhaps the number of tensors
            return False
        return all(
            owner() is owner_of(tensor) and storage.cdata == tensor.untyped_storage()._cdata
            for owner, storage, tensor in zip(self.owners, self.storages, tensors, strict=True)
        )

    def without_merged(self) -> "Kept":
        """These results, and no merged weight."""
        return self if self.merged is None else replace(self, merged=None)

    def see(self, tensors: tuple[Tensor, ...]) -> None:
        """Take the look of the tensors, after `is_of` has said that they are the ones."""
        has_layout = layout_check(tensors)
        (identities, stream), settings, steps = self.fingerprint
        read = zip(self.owners, identities, self.storages, strict=True)
        places = [(owner, *identity[:2], storage.cdata) for owner, identity, storage in read]
        # read again: another thread may have changed a layout before it was taken
        unchanged = _identities(tensors) == identities
        self.look = Look(settings, steps, stream, places, has_layout) if unchanged else None

    def is_unchanged(self, tensors: tuple[Tensor, ...], settings: tuple[object, ...], steps: int) -> bool:
        """True if `is_of` and `store.can_keep` would say of these tensors what they said when they were last seen.

        False says nothing. What makes writes to a tensor invisible brings it a new storage or address (ZeRO-3, FSDP1,
        sharing with other processes) or takes a dispatch key from it (inference mode).
        """
        if self.look is None:
            return False
        seen_settings, seen_steps, stream, places, has_layout = self.look
        if seen_settings != settings or seen_steps != steps or len(places) != len(tensors):
            return False
        if not has_layout(*tensors):  # first: not every tensor has an address and a version
            return False
        for tensor, (owner, address, version, storage) in zip(tensors, places, strict=True):
            if tensor.data_ptr() != address or tensor._version != version:
                return False
            alive = owner()
            if alive is not tensor and (alive is None or alive is not tensor._base):
                return False
            if tensor.untyped_storage()._cdata != storage:
                return False
        return not tensor.is_cuda or stream_of(tensor.device) == stream


def identity_of(tensors: tuple[Tensor, ...], device: torch.device) -> tuple[tuple[tuple[object, ...], ...], int]:
    """The tensors with address, version and layout, and the stream."""
    return _identities(tensors), stream_of(device) if device.type == "cuda" else 0


def _identities(tensors: tuple[Tensor, ...]) -> tuple[tuple[object, ...], ...]:
    return tuple([(t.data_ptr(), t._version, t.dtype, t.device, t.shape, t.stride()) for t in tensors])


def stream_of(device: torch.device) -> int:
    """The current stream of a CUDA device: torch.cuda.current_stream(device).cuda_stream, without an object of it."""
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)
    return stream


def owner_of(tensor: Tensor) -> Tensor:
    """The tensor that lives as long as the layer: the parameter itself if `tensor` is a view of it.

    (A transposed weight is a new view in every call, and so are the bytes of a packed one.)
    """
    return tensor if tensor._base is None else tensor._base


def _for_every_mode(row: Tensor | None) -> Tensor | None:
    """`row`, or a copy of one made in inference mode that autograd can save: serving and training share it."""
    if row is None or not row.is_inference():
        return row
    with torch.inference_mode(False):
        return row.clone()
