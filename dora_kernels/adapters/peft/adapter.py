"""One DoRA adapter of a PEFT layer: its parts, and the reason, if any, why PEFT must compute it."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn

MINIMUM_VERSION = (0, 19)
"""The first release whose DoraLinearLayer.forward has the arguments below; older ones lack adapter_name."""

_version = tuple(int(part) for part in peft.__version__.split(".")[:2])
if _version < MINIMUM_VERSION:
    raise ImportError(f"enable: PEFT {peft.__version__} is installed; expected 0.19 or newer")

from peft.tuners.lora import dora, variants  # noqa: E402
from peft.tuners.lora.layer import LoraLayer  # noqa: E402

from dora_kernels.adapters.classes import PRODUCTS, class_name, why_not_product  # noqa: E402
from dora_kernels.adapters.reading import (  # noqa: E402
    DROPOUT_LAYERS,
    PLAIN,
    why_not_bypass,
    why_not_device,
    why_not_plain,
)
from dora_kernels.adapters.sharded import enable_first, gathered_weight, inner, is_unit, why_not_gathered  # noqa: E402
from dora_kernels.functional.validate import why_not_scaling  # noqa: E402
from dora_kernels.quant import Weight  # noqa: E402
from dora_kernels.types import DoraWeight  # noqa: E402

_ARGUMENTS = ("self", "x", "lora_A", "lora_B", "scaling", "base_layer", "base_result", "adapter_name")


class Family(NamedTuple):
    """The classes of an adapter's parts in one kind of layer. Subclasses do not count, but as factors that compute the
    same (classes.py)."""

    variant: type
    factors: tuple[type, ...]
    magnitude: type[nn.Module]
    arguments: tuple[str, ...] = _ARGUMENTS
    """Of the magnitude's forward. If a release has others its meaning may have changed, and PEFT keeps the layer."""
    holders: tuple[str, str] = ("lora_A", "lora_B")
    """The attributes of a layer that hold lora_A and lora_B by adapter name."""


LINEAR = Family(variants.DoraLinearVariant, (nn.Linear,), dora.DoraLinearLayer)
CONV1D = Family(variants.DoraConv1dVariant, (nn.Conv1d,), dora.DoraConv1dLayer)
CONV2D = Family(variants.DoraConv2dVariant, (nn.Conv2d,), dora.DoraConv2dLayer)
CONV3D = Family(variants.DoraConv3dVariant, (nn.Conv3d,), dora.DoraConv3dLayer)
EMBEDDING = Family(
    variants.DoraEmbeddingVariant,
    PLAIN,  # not a parameter from torch.func.functional_call
    dora.DoraEmbeddingLayer,
    tuple("embed_fn" if name == "base_result" else name for name in _ARGUMENTS),
    ("lora_embedding_A", "lora_embedding_B"),
)


class PeftAdapter(NamedTuple):
    """One adapter of a layer. Read at each call: set_scale, add_adapter and loading change it between calls."""

    variant: Any
    lora_A: nn.Module | nn.Parameter
    lora_B: nn.Module | nn.Parameter
    dropout: nn.Module
    magnitude: nn.Module | None
    scaling: float

    def factors(self) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B in PEFT's shapes, of a linear layer (R, K) and (N, R)."""
        return _tensor(self.lora_A), _tensor(self.lora_B)

    def over(self, weight: Weight) -> DoraWeight:
        """`weight` with this adapter, in PEFT's shapes."""
        return DoraWeight(weight, *self.factors(), self.magnitude.weight, self.scaling)

    def gathered(self) -> PeftAdapter:
        """This adapter with the weights of FSDP1 units in place of the units."""
        units = {
            part: getattr(self, part) for part in ("lora_A", "lora_B", "magnitude") if is_unit(getattr(self, part))
        }
        if not units:
            return self
        return self._replace(**{part: Gathered(gathered_weight(unit)) for part, unit in units.items()})


class Gathered(NamedTuple):
    """Stands for a module whose weight an engine has gathered for this call."""

    weight: Tensor


def _tensor(factor: nn.Module | nn.Parameter) -> Tensor:
    return factor if isinstance(factor, Tensor) else factor.weight


def read_adapter(layer: LoraLayer, name: str, family: Family) -> PeftAdapter:
    magnitudes = layer.lora_magnitude_vector
    lora_A, lora_B = (getattr(layer, holder)[name] for holder in family.holders)
    return PeftAdapter(
        layer.lora_variant.get(name),
        lora_A,
        lora_B,
        layer.lora_dropout[name],
        magnitudes[name] if name in magnitudes else None,
        layer.scaling[name],
    )


def why_not_family(family: Family) -> str | None:
    """The reason why this family's layers in the installed PEFT are not known."""
    if tuple(inspect.signature(family.magnitude.forward).parameters) != family.arguments:
        return f"the {family.magnitude.__name__}.forward of PEFT {peft.__version__} has unknown arguments"
    return None


def why_not_adapter(adapter: PeftAdapter, family: Family, device: torch.device | None = None) -> str | None:
    """The reason why PEFT must compute `adapter`; with a device, why it must for an x there."""
    if adapter.variant is None:
        return "the adapter is plain LoRA"
    if type(adapter.variant) is not family.variant:
        return f"the adapter is a {class_name(adapter.variant)}"
    if not isinstance(adapter.scaling, (int, float)):
        return "scaling is a tensor"  # by prepare_model_for_compiled_hotswap; its value is on the device
    reason = why_not_scaling(adapter.scaling, torch.float32)  # PEFT computes a larger one, over float64, too
    if reason is not None:
        return reason
    factors = family.factors
    known_parts = {"lora_A": factors, "lora_B": factors, "dropout": DROPOUT_LAYERS, "magnitude": (family.magnitude,)}
    for part, known in known_parts.items():
        module = inner(getattr(adapter, part))
        if type(module) not in known:
            product = PRODUCTS.get(known[0]) if known is factors else None
            reason = f"{part} is a {class_name(module)}"
            if product is not None:  # PEFT makes a convolution's lora_A and lora_B of the class of its base layer
                reason = why_not_product(part, module, product)
            if reason is not None:
                return reason
        if isinstance(module, nn.Module):
            reason = why_not_bypass(part, getattr(adapter, part)) or why_not_bypass(part, module)
            if reason is not None:
                return reason
    if any(getattr(inner(factor), "bias", None) is not None for factor in (adapter.lora_A, adapter.lora_B)):
        return "lora_A or lora_B has a bias"
    for factor in (adapter.lora_A, adapter.lora_B, adapter.magnitude):
        if is_unit(factor):
            continue  # has a weight, a plain tensor on the device of x, in its own call only
        tensor = _tensor(factor)
        reason = why_not_plain("a weight of the adapter", tensor)
        if reason is not None:
            return reason + enable_first(tensor)
        if device is None:
            continue
        reason = why_not_gathered(tensor) or why_not_device(device, "a weight of the adapter", tensor)
        if reason is not None:
            return reason
    return None
