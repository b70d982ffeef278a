"""Structure: the base class of layers that live in their users' code and are known by their attributes.

The file of a library has a `Structure` for each kind of layer, and lists them in STRUCTURES. A Structure claims a layer
by its names, reads its parts and says what its forward means. Anybody may have edited a copy, so a shrunk twin of each
kind of layer is also run, by the library's forward and by dora_kernels (probe.py).
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dora_kernels import reuse
from dora_kernels.adapters.reading import class_name, why_not_bypass, why_not_device, why_not_dtypes, why_not_plain
from dora_kernels.adapters.taking import TakenOver, library_class
from dora_kernels.functional.linear import dora_linear_core
from dora_kernels.functional.rescale import dora_linear_lora_dropout
from dora_kernels.functional.validate import FLOATING, why_not_scaling
from dora_kernels.functional.weight import merge_weight_and_norm, weight_norm
from dora_kernels.quant import QuantizedWeight
from dora_kernels.reference import gain_of
from dora_kernels.types import DoraWeight


class LayerParts(NamedTuple):
    """The parts of a layer. Read at each call: parameters and scaling may be replaced between calls."""

    dora: DoraWeight
    bias: Tensor | None = None
    norm_grad: bool = False


class Structure(TakenOver):
    """A layer known by its structure. Subclasses claim and read it, and say what it computes where not `linear`."""

    formula: ClassVar[str] = "gain * (x W^T + scaling * x A^T B^T) + bias"
    """The formula that the report names where a layer turns out to compute another one."""
    opaque: ClassVar[tuple[str, ...]] = ()
    """Submodules that may be of any class, with parameters of their own. The probe replaces them by plain ones."""
    bias_is_scaled: ClassVar[bool] = False

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """True of a module that has the names and the parts of the library's own layer."""
        raise NotImplementedError

    @classmethod
    def read(cls, layer: nn.Module) -> tuple[LayerParts | None, str | None]:
        """The parts of `layer` and None; or None and the reason why it cannot be taken over."""
        raise NotImplementedError

    @classmethod
    def stand_ins(cls, twin: nn.Module, small: LayerParts) -> None:
        """Finish a shrunk twin of a layer (probe.py): enable its adapter and dropout, replace opaque submodules."""
        for name in ("merged", "disable_adapters"):
            if name in vars(twin):
                setattr(twin, name, False)

    def why_not_now(self) -> str | None:
        """The reason why a layer that is taken over must be computed by its library in its present state."""
        if getattr(self, "merged", False):
            return "the layer is merged"
        return "its adapters are disabled" if getattr(self, "disable_adapters", False) else None

    def why_not_x(self, x: Tensor, parts: LayerParts) -> str | None:
        """The reason why the library must compute this x."""
        return None

    def read_call(self, x: Tensor) -> tuple[LayerParts | None, str | None]:
        parts, reason = self.read(self)
        reason = reason or self.why_not_now() or _why_not_call(x, parts)
        return parts, reason or self.why_not_x(x, parts)

    def drops_otherwise(self) -> bool:
        as_asked = self.dora_dropout == "lora" and self.own_dropout() is None and self.why_not_now() is None
        return as_asked and self.training and self.has_dropout()

    def has_dropout(self) -> bool:
        """True if the layer has a dropout that drops something in train mode."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())

    def linear(self, x: Tensor, parts: LayerParts, x_dropped: Tensor | None = None) -> Tensor:
        """dora_linear of x (..., K), with norm and gain of an earlier call where reuse/ says.

        x_dropped takes the place of x in all that the adapter adds; with enable(dropout="lora") in the low-rank product
        alone.
        """
        dora, bias, norm_grad = parts
        lora_dropout = self.dora_dropout == "lora"
        if norm_grad and torch.is_grad_enabled() and (dora.lora_A.requires_grad or dora.lora_B.requires_grad):
            if lora_dropout and x_dropped is not None:
                norm = weight_norm(dora.weight, dora.lora_A, dora.lora_B, dora.scaling, norm_grad=True)
                return dora_linear_lora_dropout(x, x_dropped, dora, bias, norm)
            return dora_linear_core(x, dora, bias, x_dropped=x_dropped, norm_grad=True)[0]
        return reuse.dora_linear_reusing(self, x, dora, bias, x_dropped=x_dropped, lora_dropout=lora_dropout)

    def adapter_operands(self) -> DoraWeight | None:
        parts, reason = self.read(self)
        if reason is not None or self.why_not_now() is not None or parts.norm_grad:
            return None
        return parts.dora

    def norm(self, dora: DoraWeight) -> Tensor:
        """norm (N,), a constant, reused as in `linear`."""
        return reuse.weight_norm_reusing(self, dora)

    @torch.no_grad()
    def norm_and_gain(self) -> tuple[Tensor, Tensor]:
        dora = self._unmerged("norm_and_gain").dora
        norm = weight_norm(dora.weight, dora.lora_A, dora.lora_B, dora.scaling)
        return norm, gain_of(dora.magnitude, norm)

    @torch.no_grad()
    def merged_weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        dora, bias, _ = self._unmerged("merged_weight_and_bias")
        weight, _, gain = merge_weight_and_norm(dora)
        if bias is None:
            return weight, None
        if self.bias_is_scaled:
            return weight, (gain * bias).to(bias.dtype)
        return weight, bias.detach().clone()

    def _unmerged(self, function: str) -> LayerParts:
        parts, reason = self.read(self)
        reason = reason or self.why_not_now()
        if reason is not None:
            raise ValueError(f"{function}: the {library_class(self).__name__} has no adapter to read: {reason}")
        return parts


def class_names(layer: nn.Module) -> set[str]:
    """The names of the class of `layer` and of its bases."""
    return {cls.__name__ for cls in type(layer).__mro__}


def why_not_linear(part: str, module: object, shape: tuple[int, ...] | None = None) -> str | None:
    """The reason why `module` is not an nn.Linear without a bias whose weight, of this shape, can be read instead."""
    if type(module) is not nn.Linear:
        return f"{part} is a {class_name(module)}; expected nn.Linear"
    if module.bias is not None:
        return f"{part} has a bias"
    if shape is not None and tuple(module.weight.shape) != shape:
        return f"{part} has shape {tuple(module.weight.shape)}; expected {shape}"
    return why_not_bypass(part, module)


def checked(parts: LayerParts) -> tuple[LayerParts | None, str | None]:
    """(`parts`, None), or (None, the reason why its tensors cannot be read or do not fit each other)."""
    weight, lora_A, lora_B, magnitude, scaling = parts.dora
    bias = parts.bias
    named = {"lora_A": lora_A, "lora_B": lora_B, "magnitude": magnitude}
    if not isinstance(weight, QuantizedWeight):
        named["weight"] = weight
    if bias is not None:
        named["bias"] = bias
    for name, tensor in named.items():
        reason = why_not_plain(name, tensor)
        if reason is not None:
            return None, reason
        if tensor.dtype not in FLOATING:
            return None, f"{name} is {tensor.dtype}"
    if weight.dim() != 2 or lora_A.dim() != 2:
        return None, f"weight and lora_A have {weight.dim()} and {lora_A.dim()} dimensions; expected 2"
    (N, K), R = weight.shape, lora_A.shape[0]
    expected = {"lora_A": (R, K), "lora_B": (N, R), "magnitude": (N,), "bias": (N,)}
    for name, tensor in named.items():
        if tuple(tensor.shape) != expected.get(name, (N, K)):
            return None, f"{name} has shape {tuple(tensor.shape)}; expected {expected[name]}"
    if not isinstance(scaling, (int, float)) or isinstance(scaling, bool):
        return None, f"scaling is a {class_name(scaling)}"
    reason = why_not_scaling(scaling, weight.dtype)
    if reason is not None:
        return None, reason
    if weight.requires_grad:
        return None, "the base weight requires a gradient"
    if lora_A.dtype != lora_B.dtype:
        return None, f"lora_A is {lora_A.dtype} and lora_B is {lora_B.dtype}"
    return parts, None


def _why_not_call(x: object, parts: LayerParts) -> str | None:
    """The reason why the library must compute this call, whichever library that is."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        return "x has fewer than two dimensions"
    weight, lora_A, lora_B, magnitude, _ = parts.dora
    for tensor in (weight, lora_A, lora_B, magnitude, parts.bias):
        reason = None if tensor is None else why_not_device(x.device, "a weight of the layer", tensor)
        if reason is not None:
            return reason
    return None if isinstance(weight, QuantizedWeight) else why_not_dtypes(x, weight)
