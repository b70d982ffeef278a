"""PEFT: dora_kernels under the DoRA layers of a model, one layer at a time.

    adapter.py     the parts of one adapter of a layer
    layer.py       the forward that the layers below share: who computes a call
    known.py       what is known of a layer between two calls, and when it still holds
    merging.py     merging and unmerging
    linear.py      `lora.Linear`, over nn.Linear, GPT-2's Conv1D and what derives from them; over Falcon's linear layer
    conv.py        `lora.Conv1d`, `lora.Conv2d`, `lora.Conv3d`
    embedding.py   `lora.Embedding`
    siblings.py    the linear layers that read the same x
    quantized.py   PEFT's layers over quantized weights; imported only for a model that has such layers
    bitsandbytes_cpu.py   faults of bitsandbytes on a CPU, refused or undone

Adapter management stays PEFT's code, and so does merging into a quantized weight. It is decided at each call who
computes it: PEFT's forward gets a merged or disabled layer, a plain LoRA adapter, hooks on a submodule that would not
be called, and everything else that is not known to mean exactly what dora_kernels computes. The decision reads
attributes only: it never waits for the device, and torch.compile traces it.
"""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from dora_kernels.adapters.peft.adapter import read_adapter, why_not_adapter, why_not_family
from dora_kernels.adapters.peft.conv import DoraKernelsConv1d, DoraKernelsConv2d, DoraKernelsConv3d
from dora_kernels.adapters.peft.embedding import DoraKernelsEmbedding
from dora_kernels.adapters.peft.layer import TakenOverLayer
from dora_kernels.adapters.peft.linear import DoraKernelsLinear, DoraKernelsTwoSteps
from dora_kernels.adapters.peft.siblings import groups
from dora_kernels.adapters.reading import class_name, forward_is_the_class_s
from dora_kernels.adapters.taking import TakenOver, library_class
from dora_kernels.adapters.two_steps import is_two_steps

_DENSE = (DoraKernelsLinear, DoraKernelsConv1d, DoraKernelsConv2d, DoraKernelsConv3d, DoraKernelsEmbedding)
__all__ = ["CLASSES", "QUANTIZED_LAYERS", "adapters", "class_for", "groups", "layers"]

CLASSES: dict[type[nn.Module], type[TakenOverLayer]] = {cls.__bases__[-1]: cls for cls in _DENSE}
"""The class that takes over each of PEFT's over a dense weight."""

QUANTIZED_LAYERS = ("peft.tuners.lora.bnb", "peft.tuners.lora.hqq", "peft.tuners.lora.torchao")
"""The modules that define PEFT's layers over quantized weights; some import their library."""


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every DoRA layer of PEFT's in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and len(module.lora_magnitude_vector) > 0:
            yield name, module


def class_for(layer: nn.Module) -> tuple[type[TakenOver] | None, str]:
    """The class that takes `layer` over and a remark on adapters that PEFT still computes, or None and the reason."""
    cls = _class_over(library_class(layer), layer)
    if cls is None:
        return None, f"the layer is a {class_name(layer)}, not one of PEFT's that dora_kernels knows"
    reason = why_not_family(cls.family)
    if reason is None and not forward_is_the_class_s(layer):
        reason = "the layer's forward was replaced on the instance"
    if reason is None:
        weight, reason = cls.read_base(layer)
    if reason is not None:
        return None, reason
    adapters = {name: read_adapter(layer, name, cls.family) for name in layer.lora_magnitude_vector}
    reasons = {name: why_not_adapter(adapter, cls.family) for name, adapter in adapters.items()}
    against = [f"adapter {name!r}: {reason}" for name, reason in reasons.items() if reason is not None]
    return None if len(against) == len(reasons) else cls, "; ".join(against or cls.remarks(weight))


def adapters(layer: nn.Module) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """(magnitude, [lora_A, lora_B]) of each adapter of `layer`."""
    for name, magnitude in layer.lora_magnitude_vector.items():
        holders = (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B)
        # a part that somebody has put there may have no weight; a parameter has none
        factors = [holder[name] for holder in holders if name in holder]
        yield getattr(magnitude, "weight", magnitude), [getattr(factor, "weight", factor) for factor in factors]


def _class_over(cls: type[nn.Module], layer: nn.Module) -> type[TakenOverLayer] | None:
    """The class that takes over `layer`, one of PEFT's `cls`; None where there is none."""
    if cls.__module__ in QUANTIZED_LAYERS:
        from dora_kernels.adapters.peft import quantized

        return quantized.CLASSES.get(cls)
    taken_over = CLASSES.get(cls)
    return DoraKernelsTwoSteps if taken_over is DoraKernelsLinear and is_two_steps(layer.base_layer) else taken_over
