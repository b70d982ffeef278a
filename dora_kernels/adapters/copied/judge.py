"""The class that takes over a layer known by its structure, or why none does: it is read, then probed."""

from __future__ import annotations

from torch import nn

from dora_kernels.adapters.copied import probe
from dora_kernels.adapters.copied.structure import Structure
from dora_kernels.adapters.taking import TakenOver, class_over, forward_is_the_class_s, library_class


def judge(layer: nn.Module, computed_by: type[Structure]) -> tuple[type[nn.Module] | None, str]:
    """As adapters/__init__.py says of each library's."""
    try:
        adapter, reason = computed_by.read(layer)
    except (AttributeError, KeyError, TypeError) as error:  # somebody's code may lack anything
        return None, f"it is not built as the library builds it: {error}"
    if reason is None and not forward_is_the_class_s(layer):
        reason = "the layer's forward was replaced on the instance"
    if reason is None:
        reason = _name_reason(layer, computed_by)
    if reason is None:
        reason = probe.reason(layer, adapter, computed_by)
    return (class_over(library_class(layer), computed_by), "") if reason is None else (None, reason)


def _name_reason(layer: nn.Module, computed_by: type[Structure]) -> str | None:
    """Why the class that takes `layer` over would hide a part of it from the library's own code."""
    ours = {name for cls in computed_by.__mro__ if issubclass(cls, TakenOver) for name in vars(cls)}
    theirs = {*dir(library_class(layer)), *vars(layer), *layer._modules, *layer._parameters, *layer._buffers}
    if isinstance(layer, TakenOver):
        theirs.discard("dora_dropout")  # set by take_over
    hidden = sorted(name for name in ours & theirs - set(dir(nn.Module)) if not name.startswith("__"))
    return f"it has an attribute that would be hidden: {', '.join(hidden)}" if hidden else None
