"""The libraries whose DoRA layers are known, and their layers in a model.

A library's file, or CopiedLibrary for the copied ones, offers three functions:

    layers(model)       (name, layer) of every DoRA layer of the library's in a model
    class_for(layer)    the class that takes the layer over (a TakenOver: taking.py), or None; and a reason or a remark
    adapters(layer)     (magnitude, [the other tensors]) of each adapter of a layer, where they can be told

and may offer more: the first for `enable(model, fuse_shared_inputs=True)`, the second where a layer stands beside the
module that it wraps:

    groups(model)       (name, layer) of taken over layers that are called with the same x, a list for each x
    held(layer)         the module that the layer's parent holds for it
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from torch import nn

from dora_kernels.adapters.copied.library import CopiedLibrary

PACKAGES = ("peft", "torchtune", "lycoris")
"""Top-level packages whose DoRA layers are known; package p is handled by dora_kernels.adapters.p."""

COPIED = ("nvlabs", "llava", "fsdp_qlora", "megatron_bridge", "automodel")
"""Libraries whose DoRA layers are known by their attributes; library c is handled by dora_kernels.adapters.copied.c."""

Library = ModuleType | CopiedLibrary


class Found(NamedTuple):
    """A DoRA layer of a model: its name there, the library's name, and the library's functions."""

    name: str
    layer: nn.Module
    library: str
    functions: Library


def dora_layers(model: nn.Module) -> list[Found]:
    """Every DoRA layer, each found by one library, in the order of the model."""
    found: dict[nn.Module, Found] = {}
    for library, functions in libraries(model):
        for name, layer in functions.layers(model):
            found.setdefault(layer, Found(name, layer, library, functions))
    return [found[module] for module in model.modules() if module in found]


def libraries(model: nn.Module) -> Iterator[tuple[str, Library]]:
    """(name, its functions) of each package that defined the class, or a base class, of a module in `model`, and of
    each copied library."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    packages = {cls.__module__.partition(".")[0] for cls in classes}
    for name in PACKAGES:
        if name in packages:
            yield name, importlib.import_module(f"{__package__}.{name}")
    for name in COPIED:
        yield name, CopiedLibrary(importlib.import_module(f"{__package__}.copied.{name}").STRUCTURES)
