"""The three functions of a library whose layers are known by structure. A layer is claimed, then read, then probed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from dora_kernels.adapters.copied import probe
from dora_kernels.adapters.copied.structure import Structure
from dora_kernels.adapters.reading import forward_is_the_class_s
from dora_kernels.adapters.taking import TakenOver, class_over, library_class


class CopiedLibrary:
    """`layers`, `class_for` and `adapters` (see adapters/libraries.py) for a library with these structures."""

    def __init__(self, structures: tuple[type[Structure], ...]) -> None:
        self.structures = structures

    def layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """(name, layer) of every DoRA layer of the library in `model`."""
        for name, module in model.named_modules():
            if self._structure_of(module) is not None:
                yield name, module

    def class_for(self, layer: nn.Module) -> tuple[type[nn.Module] | None, str]:
        """The class that takes `layer` over and "", or None and the reason."""
        structure = self._structure_of(layer)
        try:
            parts, reason = structure.read(layer)
        except (AttributeError, KeyError, TypeError) as error:  # somebody's code may lack anything
            return None, f"it is not built as the library builds it: {error}"
        if reason is None and not forward_is_the_class_s(layer):
            reason = "the layer's forward was replaced on the instance"
        if reason is None:
            reason = _why_not_hidden(layer, structure)
        if reason is None:
            reason = probe.why_not_same(layer, parts, structure)
        return (class_over(library_class(layer), structure), "") if reason is None else (None, reason)

    def adapters(self, layer: nn.Module) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """(magnitude, [lora_A, lora_B]) of `layer`; nothing where it cannot be read."""
        try:
            parts, _ = self._structure_of(layer).read(layer)
        except (AttributeError, KeyError, TypeError):
            parts = None
        if parts is not None:
            _, lora_A, lora_B, magnitude, _ = parts.dora
            yield probe.owner(magnitude), [probe.owner(lora_A), probe.owner(lora_B)]

    def _structure_of(self, module: nn.Module) -> type[Structure] | None:
        return next((structure for structure in self.structures if structure.claims(module)), None)


def _why_not_hidden(layer: nn.Module, structure: type[Structure]) -> str | None:
    """The reason why a class by `structure` would hide a part of `layer` from the library's own code."""
    added = {name for cls in structure.__mro__ if issubclass(cls, TakenOver) for name in vars(cls)}
    own = {*dir(library_class(layer)), *vars(layer), *layer._modules, *layer._parameters, *layer._buffers}
    if isinstance(layer, TakenOver):
        own.discard("dora_dropout")  # set by take_over
    hidden = sorted(name for name in added & own - set(dir(nn.Module)) if not name.startswith("__"))
    return f"it has an attribute that would be hidden: {', '.join(hidden)}" if hidden else None
