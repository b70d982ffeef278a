"""enable(model) and disable(model): put dora_linear under the DoRA layers another library has built.

One file per library, imported only when the model holds a module of that library: `import dora_kernels`
imports none of them. Each file offers the same two functions, and leaves other libraries' layers alone:

    enable(model) -> list[LayerReport]     take over what can be taken over, and report every DoRA layer
    disable(model) -> list[LayerReport]    give every layer back

A further library is one more file, and one more name in LIBRARIES.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from torch import nn

LIBRARIES = ("peft",)
"""Top-level packages whose DoRA layers we know; package p is handled by dora_kernels.adapters.p."""

NAMES_SHOWN = 3
"""How many layer names a line of str(Report) shows before it abbreviates."""


@dataclass(frozen=True)
class LayerReport:
    """One DoRA layer of a model: its name in the model, and who computes it from now on."""

    name: str
    library: str
    taken_over: bool
    reason: str = ""
    """Why the layer was left alone; for one taken over, what its own library still computes, if anything."""


@dataclass(frozen=True)
class Report:
    """Every DoRA layer found in a model, in the order of model.named_modules()."""

    layers: tuple[LayerReport, ...] = ()

    @property
    def taken_over(self) -> list[LayerReport]:
        """The layers whose forward is now dora_linear."""
        return [layer for layer in self.layers if layer.taken_over]

    @property
    def left_alone(self) -> list[LayerReport]:
        """The layers their own library computes, each with the reason."""
        return [layer for layer in self.layers if not layer.taken_over]

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        if not self.layers:
            return "no DoRA layer found"
        lines = [f"taken over {len(self.taken_over)} of {len(self.layers)} DoRA layers"]
        groups: dict[tuple[bool, str, str], list[str]] = {}
        for layer in self.layers:
            if layer.reason:
                groups.setdefault((layer.taken_over, layer.library, layer.reason), []).append(layer.name)
        for (taken_over, library, reason), names in groups.items():
            shown = ", ".join(names[:NAMES_SHOWN])
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            verb = "taken over but for" if taken_over else f"left to {library}"
            lines.append(f"  {len(names)} {verb}: {reason} ({shown}{more})")
        return "\n".join(lines)


def enable(model: nn.Module) -> Report:
    """Compute the DoRA layers of `model` with dora_kernels, in place, and report every DoRA layer found.

    Parameters, buffers and the state dict stay as they are; no class of the other library is patched. A layer
    that cannot be taken over is left alone and named in the report with the reason. Calling it again is
    harmless, and needed after add_adapter: a layer that becomes a DoRA layer later is not known now.

    Raises ImportError if the model's layers come from a library too old to be known (PEFT before 0.19).
    """
    return _report(adapter.enable(model) for adapter in _adapters(model))


def disable(model: nn.Module) -> Report:
    """Undo enable(model): every layer is computed by its own library again, and the report says so."""
    return _report(adapter.disable(model) for adapter in _adapters(model))


def _report(found: Iterator[list[LayerReport]]) -> Report:
    return Report(tuple(layer for layers in found for layer in layers))


def _adapters(model: nn.Module) -> Iterator[ModuleType]:
    """The adapter of each known library that defined the class, or a base class, of a module in `model`."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    packages = {cls.__module__.partition(".")[0] for cls in classes}
    for library in LIBRARIES:
        if library in packages:
            yield importlib.import_module(f"{__name__}.{library}")
