"""LyCORIS: dora_kernels under `LoConModule` with weight decomposition, over linear layers and convolutions.

With V = W + scaling * B A, the norm over all of V but one axis, and gradient through it:

    gain = multiplier * (dora_scale / (norm + eps) - 1) + 1        eps = finfo(dora_scale.dtype).eps
    y = op(x, gain * V) + bias                                     gain (N,), or (K,) with wd_on_out=False

op is the layer's own product or convolution. rank_dropout masks rows of B A, module_dropout the whole adapter, and
dropout nothing, as LyCORIS has it; the same random numbers are drawn. Merging stays LyCORIS' code.

A LoConModule is no layer of the model: it stands beside one, whose `forward` it replaces. So `enable` is called on the
network that holds the modules (`create_lycoris` returns it), after the apply_to() that makes them its own. A call goes
to LyCORIS' forward if the module is not known to mean exactly this.

On a GPU LyCORIS may use kernels of its own for the second half; where W is half precision and dora_scale float32, their
eps is that of half precision. dora_kernels has the one above everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.locon import LoConModule
from torch import Tensor, nn

from dora_kernels import reuse
from dora_kernels.adapters import calls
from dora_kernels.adapters.classes import PRODUCTS, class_name, why_not_product
from dora_kernels.adapters.reading import (
    forward_is_the_class_s,
    why_not_device,
    why_not_dtypes,
    why_not_plain,
)
from dora_kernels.adapters.taking import TakenOver, library_class
from dora_kernels.functional.linear import dora_linear_core, operand_dtypes
from dora_kernels.functional.rescale import rescale
from dora_kernels.functional.validate import FLOATING, why_not_scaling
from dora_kernels.functional.weight import weight_norm
from dora_kernels.reference import accumulate_dtype
from dora_kernels.types import DoraWeight, Given


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module of LyCORIS' in `model` that decomposes its weight."""
    for name, module in model.named_modules():
        if isinstance(module, LycorisBaseModule) and getattr(module, "wd", False):
            yield name, module


def held(layer: nn.Module) -> nn.Module:
    """The module that `layer` wraps, which a parent of that holds."""
    return layer.org_module[0]


def class_for(layer: nn.Module) -> tuple[type[TakenOver] | None, str]:
    """The class that takes `layer` over and "", or None and the reason."""
    if library_class(layer) is not LoConModule:
        return None, f"the module is a {class_name(layer)}, not LyCORIS' LoConModule"
    if not forward_is_the_class_s(layer):  # parametrize() does that
        return None, "the module's forward was replaced on the instance"
    reason = _why_not_layer(layer)
    return (DoraKernelsLoConModule, "") if reason is None else (None, reason)


def adapters(layer: nn.Module) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """(dora_scale, the factors, of whatever kind) of `layer`."""
    yield layer.dora_scale, [one for one in layer.parameters() if one is not layer.dora_scale]


class DoraKernelsLoConModule(TakenOver, LoConModule):
    """LyCORIS' LoConModule, its forward computed by dora_linear or rescale."""

    library = "LyCORIS"

    @staticmethod
    def forward_sites(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """Also on the wrapped layer, and on a wrapper that was put over this one."""
        yield from TakenOver.forward_sites(layer)
        (wrapped,) = layer.org_module
        yield from TakenOver.forward_sites(wrapped)
        for wrapper in wrapped.__dict__.get("_lycoris_wrappers", ()):
            yield wrapper, "org_forward"

    def tensors(self) -> Iterator[Tensor]:
        yield from super().tensors()
        yield from calls.tensors_of(self.org_module[0])

    def own_dropout(self) -> str | None:
        return "rows of B A, or the whole adapter" if self.rank_dropout or self.module_dropout else None

    def norm_and_gain(self) -> tuple[Tensor, Tensor]:
        """norm and gain (N,), constants. Raises ValueError, too, where they are (K,): with wd_on_out=False."""
        self._refuse_unknown("norm_and_gain")
        if not self.wd_on_out:
            raise ValueError("norm_and_gain: wd_on_out is False; expected one norm for each output")
        with torch.no_grad():
            norm = _norm(self, _direction(self, dropping=False))
            return norm, _gain(self, norm)

    @torch.no_grad()
    def merged_weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of the frozen layer, with the multiplier as it is now."""
        self._refuse_unknown("merged_weight_and_bias")
        (wrapped,) = self.org_module
        weight, bias = wrapped.weight, wrapped.bias
        direction = _direction(self, dropping=False)
        base, lora_A, lora_B, _, scaling = direction
        wide = accumulate_dtype(weight.dtype)
        rows = base.to(wide) + scaling * lora_B.to(wide) @ lora_A.to(wide)
        gain = _gain(self, _norm(self, direction)).view(self.dora_scale.shape)
        merged = gain * rows.view(weight.shape)
        return merged.to(weight.dtype), None if bias is None else bias.detach().clone()

    def frozen_layer(self) -> nn.Module:
        """Raises ValueError: the module stands beside the layer that it wraps. LyCORIS' merge_to merges it."""
        raise ValueError("frozen_layer: the module stands beside the layer it wraps; expected LyCORIS' own merge_to")

    def _refuse_unknown(self, function: str) -> None:
        reason = _why_not_layer(self)
        if reason is not None:
            raise ValueError(f"{function}: {reason}; expected a module that enable() takes over")

    def read_call(self, x: Tensor) -> tuple[None, str | None]:
        return None, _why_not_layer(self) or _why_not_call(self, x)

    def compute(self, x: Tensor, parts: None) -> Tensor:
        """x: (..., K) -> (..., N), or (batch, channels, ...) as the convolution takes it."""
        if self.module_dropout and self.training and torch.rand(1) < self.module_dropout:
            return self.org_forward(x)

        direction = _direction(self, dropping=self.training and self.rank_dropout)
        gain = _gain(self, _reused_norm(self, direction))
        if not self.wd_on_out:
            # gain * V, the gain along the inputs, is V of the x that the gain has multiplied
            x = (x * gain.view(self.dora_scale.shape)).to(x.dtype)
            gain = gain.new_ones(direction.weight.shape[0])
        return self._convolve(x, direction, gain) if self.isconv else self._multiply(x, direction, gain)

    def merge_to(self, *args: Any, **kwargs: Any) -> None:
        """LyCORIS' merge_to. It writes to the wrapped weight through .data, as the next two do."""
        super().merge_to(*args, **kwargs)
        reuse.forget(self)

    def onfly_merge(self, *args: Any, **kwargs: Any) -> None:
        super().onfly_merge(*args, **kwargs)
        reuse.forget(self)

    def onfly_restore(self) -> None:
        super().onfly_restore()
        reuse.forget(self)

    def _multiply(self, x: Tensor, direction: DoraWeight, gain: Tensor) -> Tensor:
        """gain * x V^T + bias. gain (N,) goes in as the magnitude over a norm of 1."""
        weight, lora_A, lora_B, _, scaling = direction
        dora, given = DoraWeight(weight, lora_A, lora_B, gain, scaling), Given(torch.ones_like(gain), gain.detach())
        return dora_linear_core(x, dora, self.org_module[0].bias, given=given)[0]

    def _convolve(self, x: Tensor, direction: DoraWeight, gain: Tensor) -> Tensor:
        """gain * conv(x, V) + bias, by a convolution with W, one with A, and rescale over their channels."""
        (wrapped,) = self.org_module
        lora_A = self.lora_down.weight
        _, dtype = operand_dtypes(x, lora_A)
        base = self.op(x, wrapped.weight, None, **self.kw_dict)
        low = self.op(x.to(dtype), lora_A.to(dtype), None, **self.kw_dict)
        y = rescale(base.movedim(1, -1), low.movedim(1, -1), direction.lora_B, gain, direction.scaling, wrapped.bias)
        return y.movedim(-1, 1)


def _direction(layer: LoConModule, dropping: bool) -> DoraWeight:
    """V with its kernel's dimensions flattened, without a magnitude, read at each call.

    scalar and the mask of rank_dropout multiply rows of B A, so those of B.
    """
    weight, lora_A, lora_B = (
        module.weight.flatten(1) for module in (layer.org_module[0], layer.lora_down, layer.lora_up)
    )
    if dropping:
        keep = (torch.rand(lora_B.shape[0], device=lora_B.device) > layer.rank_dropout).to(lora_B.dtype)
        if layer.rank_dropout_scale:
            keep /= keep.mean()
        lora_B = lora_B * keep[:, None]
    return DoraWeight(weight, lora_A, lora_B * layer.scalar, None, layer.scale)


def _norm(layer: LoConModule, direction: DoraWeight) -> Tensor:
    """The norm (N,) of V's rows; with wd_on_out=False that of its input features or channels, (K,).

    An input channel of a convolution is a group of columns of the flat V: one of each position in the kernel.
    """
    weight, lora_A, lora_B, _, scaling = direction
    if layer.wd_on_out:
        return weight_norm(weight, lora_A, lora_B, scaling, norm_grad=True)
    norm = weight_norm(weight.T, lora_B.T, lora_A.T, scaling, norm_grad=True)
    return torch.linalg.vector_norm(norm.view(layer.dora_scale.numel(), -1), dim=1) if layer.isconv else norm


def _reused_norm(layer: LoConModule, direction: DoraWeight) -> Tensor:
    """`_norm`, kept in eval mode inside `frozen_adapters`; never where it has a gradient."""
    if torch.is_grad_enabled() or layer.training:
        return _norm(layer, direction)
    parts = (layer.org_module[0].weight, layer.lora_down.weight, layer.lora_up.weight, layer.scalar)
    autocast = torch.is_autocast_enabled(direction.weight.device.type)
    settings = (direction.scaling, layer.wd_on_out, autocast and torch.get_autocast_dtype(direction.weight.device.type))
    return reuse.norm_reusing(layer, parts, settings, lambda: _norm(layer, direction))


def _gain(layer: LoConModule, norm: Tensor) -> Tensor:
    """The gain, in norm's dtype, by the formula at the head of this file."""
    gain = layer.dora_scale.flatten().to(norm.dtype) / (norm + torch.finfo(layer.dora_scale.dtype).eps)
    return gain if layer.multiplier == 1 else layer.multiplier * (gain - 1) + 1


def _why_not_layer(layer: LoConModule) -> str | None:
    """The reason why LyCORIS must compute the module."""
    (wrapped,) = layer.org_module
    if not layer.wd:
        return "the module is plain LoRA"
    if layer.bypass_mode:
        return "bypass_mode is on, which leaves the decomposition out"
    if layer.tucker:
        return "the module has a Tucker core (lora_mid)"
    product = next((known for cls, known in PRODUCTS.items() if isinstance(wrapped, cls)), None)
    if product is None:
        return f"the wrapped layer is a {class_name(wrapped)}; expected nn.Linear or nn.Conv1d, 2d, 3d"
    reason = why_not_product("the wrapped layer", wrapped, product)
    if reason is not None:
        return reason
    forward = layer.org_forward
    if getattr(forward, "__self__", None) is not wrapped or forward.__func__ is not type(wrapped).forward:
        return "there is another wrapper or hook under this one"
    if layer.isconv and (wrapped.groups != 1 or wrapped.padding_mode != "zeros"):
        return f"the convolution has groups={wrapped.groups} and padding_mode={wrapped.padding_mode!r}"
    if wrapped.weight.requires_grad:
        return "the base weight requires a gradient"
    if not isinstance(layer.multiplier, (int, float)) or not isinstance(layer.scale, (int, float)):
        return "multiplier or scale is a tensor"
    reason = why_not_scaling(layer.scale, wrapped.weight.dtype)
    if reason is not None:
        return reason
    for part in ("lora_up", "lora_down"):
        module = getattr(layer, part)
        if type(module) not in (product.cls, type(wrapped)):  # LyCORIS reads their weights, too
            return f"{part} is a {class_name(module)}"
    for name, tensor in _tensors(layer).items():
        reason = why_not_plain(name, tensor)
        if reason is not None:
            return reason
        if tensor.dtype not in FLOATING:
            return f"{name} is {tensor.dtype}"
    return None


def _why_not_call(layer: LoConModule, x: Tensor) -> str | None:
    for name, tensor in _tensors(layer).items():
        reason = why_not_device(x.device, name, tensor)
        if reason is not None:
            return reason
    weight, dora_scale = layer.org_module[0].weight, layer.dora_scale
    if x.dim() < 2 or (layer.isconv and x.dim() != weight.dim()):
        return f"x has {x.dim()} dimensions"
    if torch.is_autocast_enabled(x.device.type):
        return why_not_dtypes(x, weight)
    if x.dtype != weight.dtype or torch.promote_types(dora_scale.dtype, x.dtype) != x.dtype:
        return f"x is {x.dtype}, the base weight {weight.dtype} and dora_scale {dora_scale.dtype}, without autocast"
    return None


def _tensors(layer: LoConModule) -> dict[str, Tensor]:
    """The tensors that are read of the module and of the layer that it wraps, by name."""
    (wrapped,) = layer.org_module
    tensors = {
        "the base weight": wrapped.weight,
        "lora_down.weight": layer.lora_down.weight,
        "lora_up.weight": layer.lora_up.weight,
        "dora_scale": layer.dora_scale,
        "scalar": layer.scalar,
    }
    return tensors if wrapped.bias is None else tensors | {"the bias": wrapped.bias}
