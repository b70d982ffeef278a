"""Layers that will not train as their owner thinks, whoever computes them: said in the report, and by the callback.

A magnitude is as large as a row's norm. In half precision an optimizer's step of 1e-4 rounds to nothing beside 1, and
no element ever moves (TRL's cast of QLoRA adapters: https://github.com/huggingface/trl/issues/7268). And what trains
the parameters with "lora" in their names, or an optimizer's groups, may leave it out
(https://github.com/pytorch/torchtune/issues/2250).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dora_kernels.adapters.libraries import dora_layers


def remarks(layer: nn.Module, adapters: Iterable[tuple[Tensor, Sequence[Tensor]]]) -> tuple[str, ...]:
    """Remarks for the owner of `layer` on its magnitudes.

    adapters: (magnitude, the adapter's other tensors). Of those that are no parameters nothing is said, as of FSDP1's
    views into a flat one.
    """
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    found = []
    for magnitude, factors in adapters:
        name = names.get(id(magnitude))
        if name is None:
            continue
        dtype = magnitude.dtype
        if magnitude.requires_grad and torch.finfo(dtype).bits < 32:
            lost = f"{name} is trained in {dtype}, where a step under 1/{_parts(dtype)} of a number is lost"
            found.append(f"{lost}; expected float32, or an optimizer that keeps float32 copies")
        trained = [names[id(factor)] for factor in factors if id(factor) in names and factor.requires_grad]
        if trained and not magnitude.requires_grad:
            found.append(f"{name} is frozen, while {' and '.join(trained)} are trained; expected it to be trained, too")
    return tuple(found)


def _parts(dtype: torch.dtype) -> int:
    """n such that x + x / n rounds to x for every x: half a unit in the last place of the largest mantissa."""
    return round(4 / torch.finfo(dtype).eps)


OURS = ("lora_magnitude_vector", "vera_magnitude_vector")
"""The magnitudes of DoraLinear, DvoraLinear and PEFT's DVoRA, by a part of their names."""


def trained_magnitudes(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of each magnitude of `model` that requires a gradient: of every library, and of our layers."""
    found = dora_layers(model)
    known = {id(magnitude) for _, layer, _, functions in found for magnitude, _ in functions.adapters(layer)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (id(parameter) in known or not {*OURS}.isdisjoint(name.split("."))):
            yield name, parameter
