"""enable(model) and disable(model): put our kernels under the DoRA layers that another library has built.

One file (or folder) per library. `import dora_kernels` imports none of them: a library's file is imported when a model
holds a module of that library. Each offers two functions:

    layers(model)    (name, layer) of every DoRA layer of the library's in a model
    judge(layer)     the class that takes the layer over (a TakenOver: taking.py), or None; and a reason or a remark

A library's file may offer more: the first for `enable(model, fuse_shared_inputs=True)`, the second where a layer stands
beside the module that it wraps:

    groups(model)    (name, layer) of taken over layers that are called with the same x, a list for each x
    held(layer)      the module that the layer's parent holds for it

Libraries whose layers live in their users' code are known by structure, and their files import nothing of them.
A further library is one more file, and one more name in PACKAGES or STRUCTURES.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

from torch import nn

from dora_kernels.adapters import parents
from dora_kernels.adapters.taking import give_back, take_over
from dora_kernels.functional.validate import DROPOUTS
from dora_kernels.reuse import sharing

PACKAGES = ("peft", "torchtune", "lycoris")
"""Top-level packages whose DoRA layers we know; package p is handled by dora_kernels.adapters.p."""

STRUCTURES: tuple[str, ...] = ("nvlabs", "llava", "fsdp_qlora", "megatron_bridge", "automodel")
"""Libraries whose DoRA layers we know by their attributes, whatever module defines them."""

NAMES_SHOWN = 3
"""How many layer names a line of str(Report) shows before it abbreviates."""


@dataclass(frozen=True)
class LayerReport:
    """One DoRA layer of a model: its name in the model, and who computes it from now on."""

    name: str
    library: str
    taken_over: bool
    reason: str = ""
    """Why the layer was left alone; for one taken over, what its own library still computes, if anything. Of both, who
    reads its weight past it (parents.py)."""
    shares_with: tuple[str, ...] = ()
    """The layers that are called with the same x, with which it shares the product of x and lora_A."""


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
        sharing_groups = {frozenset({layer.name, *layer.shares_with}) for layer in self.layers if layer.shares_with}
        if sharing_groups:
            count = sum(map(len, sharing_groups))
            lines.append(f"  {count} share the product of x and lora_A, in {len(sharing_groups)} groups")
        return "\n".join(lines)


def enable(model: nn.Module, *, dropout: str | None = None, fuse_shared_inputs: bool = False) -> Report:
    """Compute the DoRA layers of `model` with dora_kernels, in place, and report every DoRA layer found.

    dropout: what it falls on in training, with d = dropout(x), as DoraLinear's dropout_on:
        "adapter"   what the layer's library means. For PEFT that is all that the adapter adds:
                    x W^T + (gain - 1) * d W^T + gain * scaling * (d A^T) B^T + bias, two products with the base weight
        "lora"      the low-rank product alone, and there is one product with the base weight:
                    gain * (x W^T + scaling * (d A^T) B^T) + bias
        None        what it fell on before in a layer that is enabled already, in any other as "adapter"
    Over the masks both have the output of eval mode as their mean; the first varies more, by (gain - 1) * d W^T.
    A library that means something else (dropout of rows of B A, say) keeps its own meaning, and the report says so.

    fuse_shared_inputs: in training, layers that are called with the same x (q, k and v of an attention, gate and up of
    an MLP; PEFT's alone, known by their names) make x lora_A^T and dlora_A together (reuse/sharing.py).
    Calls in which an adapter drops, or several are active, share nothing. The same function to rounding.

    Parameters, buffers and the state dict stay as they are; no class of the other library is patched. A layer
    that cannot be taken over is left alone and named in the report with the reason. Calling it again is
    harmless, and needed after add_adapter: a layer that becomes a DoRA layer later is not known now.

    Raises ValueError unless dropout and fuse_shared_inputs are one of these, ImportError if the model's layers come
    from a library too old to be known (PEFT before 0.19).
    """
    if dropout is not None and dropout not in DROPOUTS:
        raise ValueError(f"enable: dropout is {dropout!r}; expected None or one of {', '.join(DROPOUTS)}")
    if not isinstance(fuse_shared_inputs, bool):
        raise ValueError(f"enable: fuse_shared_inputs is {fuse_shared_inputs!r}; expected True or False")
    reports = []
    found = _dora_layers(model)
    held = [(adapter.held(layer) if hasattr(adapter, "held") else layer, layer) for _, layer, _, adapter in found]
    past = parents.remarks(model, held)
    for name, layer, library, adapter in found:
        cls, reason = adapter.judge(layer)
        if cls is None:
            give_back(layer)  # taken over before, perhaps, and changed since
        else:
            take_over(layer, cls, dropout)
            own = layer.own_dropout() if layer.dora_dropout == "lora" else None
            if own is not None:
                reason = "; ".join(filter(None, (reason, f"dropout stays the library's, of {own}")))
        sharing.leave(layer)
        reason = "; ".join(filter(None, (reason, past.get(layer))))
        reports.append(LayerReport(name, library, cls is not None, reason))
    shares_with = _share(model) if fuse_shared_inputs else {}
    return Report(tuple(replace(report, shares_with=shares_with.get(report.name, ())) for report in reports))


def _share(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Make groups of the layers that are called with the same x; the names of each one's siblings by its name."""
    shares_with = {}
    for _, adapter in _adapters(model):
        for group in adapter.groups(model) if hasattr(adapter, "groups") else ():
            names, layers = zip(*group, strict=True)
            sharing.join(layers)
            shares_with |= {name: tuple(other for other in names if other != name) for name in names}
    return shares_with


def disable(model: nn.Module) -> Report:
    """Undo enable(model): every layer is computed by its own library again, and the report says so.

    Other threads may be in forward passes: a layer's call that has begun is computed by either, and right.
    """
    for layer in model.modules():
        give_back(layer)
    reports = []
    for name, layer, library, adapter in _dora_layers(model):
        cls, reason = adapter.judge(layer)
        reports.append(LayerReport(name, library, False, reason if cls is None else "disable(model) was called"))
    return Report(tuple(reports))


def _dora_layers(model: nn.Module) -> list[tuple[str, nn.Module, str, ModuleType]]:
    """(name, layer, library, its adapter) of every DoRA layer, each found by one library, in the order of the model."""
    found: dict[nn.Module, tuple[str, nn.Module, str, ModuleType]] = {}
    for library, adapter in _adapters(model):
        for name, layer in adapter.layers(model):
            found.setdefault(layer, (name, layer, library, adapter))
    return [found[module] for module in model.modules() if module in found]


def _adapters(model: nn.Module) -> Iterator[tuple[str, ModuleType]]:
    """The adapter of each package that defined the class, or a base class, of a module in `model`, and of each
    structure."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    packages = {cls.__module__.partition(".")[0] for cls in classes}
    for library in PACKAGES:
        if library in packages:
            yield library, importlib.import_module(f"{__name__}.{library}")
    for library in STRUCTURES:
        yield library, importlib.import_module(f"{__name__}.copied.{library}")
