"""Taking a layer of another library over by changing its class, and giving it back.

A layer that is taken over has a subclass of its own class: TakenOver and what computes it first among the bases, the
library's class last. Parameters, state dict and everything else stay the library's, deepcopy and pickle work as before,
and giving a layer back is changing its class back.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

from torch import Tensor, nn

from dora_kernels import reuse

ZERO_HOOKS = ("deepspeed.runtime.zero.", "deepspeed.utils.nvtx")
"""The modules that DeepSpeed's hooks say they are of: the second is where it wraps them to be profiled."""


class TakenOver:
    """The mark of a layer that is taken over. Subclasses have the `forward`; they are never constructed.

    Beside it `train` and `_apply` differ from the library's, by what they forget.
    """

    def norm_and_gain(self) -> tuple[Tensor, Tensor]:
        """norm and gain (N,) of the layer's adapter, constants. Raises ValueError where the layer has not just one."""
        raise NotImplementedError

    def merged_weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias, new tensors, of the frozen layer that computes what this one does in eval mode.

        In the base layer's shapes and dtype, dense over a quantised weight. Raises ValueError as norm_and_gain.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> TakenOver:
        """As nn.Module.train; in eval mode norm and gain are computed once and kept (see reuse.py)."""
        reuse.forget(self)
        return super().train(mode)

    def _apply(self, *arguments: Any, **keywords: Any) -> TakenOver:
        """What moves and casts go through."""
        reuse.forget(self)
        return super()._apply(*arguments, **keywords)


def library_class(layer: nn.Module) -> type[nn.Module]:
    """The class that the library gave `layer`."""
    cls = type(layer)
    while issubclass(cls, TakenOver):
        cls = cls.__bases__[-1]
    return cls


@functools.cache
def class_over(cls: type[nn.Module], computed_by: type[TakenOver]) -> type[nn.Module]:
    """`cls` computed by `computed_by`, for classes that are not known before a model has them."""
    members = {"__reduce_ex__": _reduce, "__module__": computed_by.__module__, "__doc__": computed_by.__doc__}
    return type(f"DoraKernels{cls.__name__}", (computed_by, cls), members)


def _reduce(layer: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle by the two classes that can be imported."""
    computed_by, cls = type(layer).__bases__
    return _rebuild, (cls, computed_by), layer.__dict__


def _rebuild(cls: type[nn.Module], computed_by: type[TakenOver]) -> nn.Module:
    made = class_over(cls, computed_by)
    return made.__new__(made)


def take_over(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Make `layer` a `cls`, a subclass of its library's class."""
    if type(layer) is not cls:
        _set_class(layer, cls)


def give_back(layer: nn.Module) -> None:
    """Make `layer` its library's again; nothing happens to one that is."""
    if isinstance(layer, TakenOver):
        _set_class(layer, library_class(layer))


def _set_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Change a layer's class, and with it the bound forward that accelerate's hooks keep on the instance."""
    bound = [name for name in ("forward", "_old_forward") if _is_bound_forward(layer, layer.__dict__.get(name))]
    outer = type(layer)
    if isinstance(layer, TakenOver) and issubclass(outer.__bases__[-1], TakenOver):
        # fully_shard(layer) has made a class over ours: what it added stays
        members = {name: value for name, value in vars(outer).items() if name not in ("__dict__", "__weakref__")}
        cls = type(outer)(outer.__name__, (*outer.__bases__[:-1], cls), members)
    layer.__class__ = cls
    reuse.forget(layer)
    for name in bound:
        setattr(layer, name, MethodType(cls.forward, layer))


def bypass_reason(part: str, module: nn.Module) -> str | None:
    """Why `module` must really be called: reading its weight instead would skip somebody's code."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        registered = (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        if not all(_only_gathers(hook) for hooks in registered for hook in hooks.values()):
            return f"{part} has hooks"
    if not forward_is_the_class_s(module):
        return f"the forward of {part} was replaced on the instance"
    return None


def _only_gathers(hook: Any) -> bool:
    """Whether a hook is one of DeepSpeed ZeRO's: they gather a weight, and inside a forward reading it does so too."""
    return getattr(hook, "__module__", "").startswith(ZERO_HOOKS)


def forward_is_the_class_s(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward, perhaps between device moves of accelerate.

    A model dispatched with a device_map has an AlignDevicesHook on every module, which replaces `forward` on
    the instance and brings x to the module's device. Where x is on that device already it does nothing; where
    the weights are offloaded it moves them, and the module must be called.
    """
    forward = module.__dict__.get("forward")
    if forward is None or _is_bound_forward(module, forward):
        return True
    hook = module.__dict__.get("_hf_hook")
    return (
        type(hook).__name__ == "AlignDevicesHook"
        and not hook.offload
        and _is_bound_forward(module, module.__dict__.get("_old_forward"))
    )


def _is_bound_forward(module: nn.Module, method: Any) -> bool:
    forwards = [vars(cls).get("forward") for cls in type(module).__mro__]
    return isinstance(method, MethodType) and method.__self__ is module and method.__func__ in forwards


def class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
