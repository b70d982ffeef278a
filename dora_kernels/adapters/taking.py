"""Taking a layer of another library over by changing its class, and giving it back.

A layer that is taken over has a subclass of its own class: TakenOver and what computes it first among the bases, the
library's class last. Parameters, state dict and everything else stay the library's, deepcopy and pickle work as before,
and giving a layer back is changing its class back.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dora_kernels import reuse
from dora_kernels.adapters import calls
from dora_kernels.adapters.frozen import frozen_like
from dora_kernels.adapters.reading import is_bound_forward
from dora_kernels.planning import devices
from dora_kernels.reuse import sharing
from dora_kernels.types import DoraWeight

# the number of changes of a class, and the number of each layer's last one: calls in flight compare them
_switches = 0
_last_switch: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()
_switching = threading.Lock()


class TakenOver:
    """A layer that is taken over. Subclasses have `read_call` and `compute`, and may have merge and unmerge; they are
    never constructed.

    train, _apply and _load_from_state_dict are the library's, and also end the reuse of an earlier call's norm.
    """

    library: ClassVar[str]
    """The library's name in messages."""

    dora_dropout = "adapter"
    """enable's dropout: "adapter" is the library's meaning. take_over sets it on the layer."""

    dora_attributes: ClassVar[tuple[str, ...]] = ("dora_dropout",)
    """The attributes that are set on the layer until it is given back."""

    reversible = True
    """True if the library's class computes the same function, so that the layer can be given back."""

    @staticmethod
    def forward_sites(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """(module, attribute) wherever the bound forward of `layer` may be kept on an instance.

        accelerate's hooks keep it on the layer itself; a library that wraps other layers keeps it on those.
        """
        for name in ("forward", "_old_forward"):
            yield layer, name

    def read_call(self, x: Any) -> tuple[Any, str | None]:
        """(the second argument of `compute`, None), or (anything, the reason why this call goes to the library).

        The reason is "" where the layer's own state says so: it is disabled or merged. Asked at each call, as anything
        may change between two.
        """
        raise NotImplementedError

    def compute(self, x: Any, parts: Any) -> Any:
        """The output that the library's forward would give for x, computed from the parts that `read_call` returned."""
        raise NotImplementedError

    def library_forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The output of the library's own forward."""
        return super().forward(x, *args, **kwargs)

    def drops_otherwise(self) -> bool:
        """True if dropout is active now and is not the library's: enable(dropout="lora")."""
        return False

    def difference(self) -> str | None:
        """The reason why the library would compute another function now, and what is expected instead."""
        if not self.drops_otherwise():
            return None
        return 'whose dropout is another than enable(model, dropout="lora") asked for; expected eval mode, or "adapter"'

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The library's output: computed by dora_kernels if the call is known to mean what `compute` computes.

        Another thread may disable the layer meanwhile: then the library's forward has the call. If the layer is enabled
        again, the call starts anew. Raises ValueError if the call has to go to the library, and that would compute
        another function (`difference`).
        """
        if torch.compiler.is_compiling():  # Dynamo would guard on the number, and cannot resume inside a try
            return self._forward(x, *args, **kwargs)
        while isinstance(self, TakenOver):
            before = _switches
            try:
                return self._forward(x, *args, **kwargs)
            except (AttributeError, TypeError):
                # a layer that was given back meanwhile has no method of TakenOver, nor its super()
                if isinstance(self, TakenOver) and not _is_switched_since(self, before):
                    raise
        return library_class(self).forward(self, x, *args, **kwargs)

    def _forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        reason = calls.why_not_here(self, x) or self._why_not_hooks()
        if reason is None:
            parts, reason = self.read_call(x)
            if reason is None and not args and not kwargs:
                return self.compute(x, parts)
            reason = "the call has arguments beyond x" if reason is None else reason
        if reason:
            devices.log_once(f"dora_kernels: a call went to {self.library}: {reason}")
            difference = self.difference()
            if difference is not None:
                raise ValueError(f"forward: {reason}, so the call is {self.library}'s, {difference}")
        return self.library_forward(x, *args, **kwargs)

    def _why_not_hooks(self) -> str | None:
        """The global hook for which the library gets this call; None if that would compute another function."""
        reason = calls.why_not_hooks()
        if reason is None or self.difference() is None:
            return reason
        devices.log_once(
            f"dora_kernels: {reason}, which sees no parts of a layer that {self.library} would compute otherwise"
        )
        return None

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that a call reads beside x; one may stand in a parameter's place as a plain attribute."""
        yield from calls.tensors_of(self)

    def own_dropout(self) -> str | None:
        """The tensor whose dropout stays the library's under dropout="lora": it is of a third kind. None if none."""
        return None

    def adapter_operands(self) -> DoraWeight | None:
        """The weight with its adapter, for `frozen_adapters`; None unless the layer calls dora_linear_reusing now."""
        return None

    def norm_and_gain(self) -> tuple[Tensor, Tensor]:
        """norm and gain (N,) of the layer's adapter, constants. Raises ValueError where the layer has not just one."""
        raise NotImplementedError

    def merged_weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias, new tensors, of the frozen layer that computes what this one does in eval mode.

        In the base layer's shapes and dtype, dense over a quantized weight. Raises ValueError as norm_and_gain.
        """
        raise NotImplementedError

    def frozen_layer(self) -> nn.Module:
        """A layer without an adapter that computes what this one does in eval mode, to be put in its place.

        Its weight is new. Raises ValueError as merged_weight_and_bias, or where no such layer can stand there.
        """
        weight, bias = self.merged_weight_and_bias()
        return frozen_like(getattr(self, "base_layer", None), weight, bias)

    def train(self, mode: bool = True) -> TakenOver:
        """nn.Module.train; a change of mode ends the reuse inside `frozen_adapters`."""
        reuse.mode_set(self, mode)
        return super().train(mode)

    def _apply(self, *arguments: Any, **keywords: Any) -> TakenOver:
        """nn.Module._apply, with which moves and casts are made; they end the reuse."""
        reuse.forget(self)
        return super()._apply(*arguments, **keywords)

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        """nn.Module's; ends the reuse. A load of shards leaves no trace in what fully_shard gathers of them."""
        reuse.forget(self)
        super()._load_from_state_dict(*arguments, **keywords)


def library_class(layer: nn.Module) -> type[nn.Module]:
    """The class that the library gave `layer`."""
    cls = type(layer)
    while issubclass(cls, TakenOver):
        cls = cls.__bases__[-1]
    return cls


_made: weakref.WeakValueDictionary[tuple[type, type], type] = weakref.WeakValueDictionary()


def class_over(cls: type[nn.Module], computed_by: type[TakenOver]) -> type[nn.Module]:
    """`cls` computed by `computed_by`, for classes that are not known before a model has them."""
    made = _made.get((cls, computed_by))
    if made is None:
        members = {"__reduce_ex__": _reduce, "__module__": computed_by.__module__, "__doc__": computed_by.__doc__}
        made = _made[cls, computed_by] = type(f"DoraKernels{cls.__name__}", (computed_by, cls), members)
    return made


def _reduce(layer: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle by the two classes that can be imported."""
    computed_by, cls = type(layer).__bases__
    return _rebuild, (cls, computed_by), layer.__dict__


def _rebuild(cls: type[nn.Module], computed_by: type[TakenOver]) -> nn.Module:
    made = class_over(cls, computed_by)
    return made.__new__(made)


def take_over(layer: nn.Module, cls: type[nn.Module], dropout: str | None = None) -> None:
    """Make `layer` a `cls`, a subclass of its library's class, with this meaning of dropout; None: as it was."""
    if type(layer) is not cls:
        _set_class(layer, cls)
    if dropout is not None:
        layer.dora_dropout = dropout


def give_back(layer: nn.Module) -> None:
    """Make `layer` its library's again; nothing happens to one that is, or that its library could not compute."""
    if isinstance(layer, TakenOver) and layer.reversible:
        taken_over = type(layer)
        _set_class(layer, library_class(layer))
        sharing.leave(layer)
        for name in taken_over.dora_attributes:
            layer.__dict__.pop(name, None)


def _set_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Change a layer's class, and with it the bound forward that is kept on an instance."""
    taken_over = cls if issubclass(cls, TakenOver) else type(layer)
    sites = taken_over.forward_sites(layer)
    bound = [place for place in sites if is_bound_forward(layer, place[0].__dict__.get(place[1]))]
    outer = type(layer)
    if isinstance(layer, TakenOver) and issubclass(outer.__bases__[-1], TakenOver):
        # fully_shard(layer) has made a class over the taken-over one: what it added stays
        members = {name: value for name, value in vars(outer).items() if name not in ("__dict__", "__weakref__")}
        cls = type(outer)(outer.__name__, (*outer.__bases__[:-1], cls), members)
    global _switches
    seen_by = (layer, *sharing.siblings(layer))
    with _switching:
        _last_switch.update(dict.fromkeys(seen_by, math.inf))  # until it is over
        try:
            layer.__class__ = cls
        finally:
            _switches += 1
            _last_switch.update(dict.fromkeys(seen_by, _switches))
    reuse.forget(layer)
    for holder, name in bound:
        setattr(holder, name, MethodType(cls.forward, layer))


def _is_switched_since(layer: nn.Module, before: int) -> bool:
    """True if the class of `layer`, or of one that it shares with, was changed after the first `before` changes."""
    return _last_switch.get(layer, 0) > before
