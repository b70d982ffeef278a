"""Live models: a PEFT model's adapters over the base weights beneath them, and a model against a pretrained one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dora_kernels import quant
from dora_kernels.extras.analysis.layers import Analysis, Layer, LeftOut, Track, measure
from dora_kernels.extras.analysis.measure import adapter_change, weight_change
from dora_kernels.extras.checkpoint_files import BASE_KEPT, PREFIX
from dora_kernels.functional.arguments import check_callable, check_model, check_type

CHECKPOINT = "model"
"""The checkpoint's name, where none is given."""


def analyze_model(
    model: nn.Module, pretrained: nn.Module | None = None, checkpoint: str = CHECKPOINT, track: Track = iter
) -> Analysis:
    """The change of every linear layer with an active LoRA or DoRA adapter of PEFT's, over the base weight beneath it.

    The base may be quantized. With `pretrained`, a model of the same modules: the change from its 2-D parameters to
    those of `model`. checkpoint: the name of the points. Adapter layers that cannot be analysed are named in
    the result.

    Raises ValueError where nothing can be analysed, or model or pretrained is no nn.Module.
    """
    check_model("analyze_model", model)
    if pretrained is not None:
        check_model("analyze_model", pretrained, "pretrained")
    check_type("analyze_model", "checkpoint", checkpoint, str, "a name")
    check_callable("analyze_model", "track", track)
    layers, left_out = _adapters(model, checkpoint) if pretrained is None else _pairs(pretrained, model, checkpoint)
    if not layers:
        reasons = "; ".join(dict.fromkeys(entry.reason for entry in left_out)) or "no such layer"
        expected = "PEFT LoRA layers" if pretrained is None else "2-D parameters that pretrained has too"
        raise ValueError(f"analyze_model: the model has nothing to compare ({reasons}); expected {expected}")
    return measure(layers, left_out, track)


def _pairs(pretrained: nn.Module, tuned: nn.Module, checkpoint: str) -> tuple[list[Layer], list[LeftOut]]:
    before, after = dict(pretrained.named_parameters()), dict(tuned.named_parameters())
    layers, left_out = [], []
    for key in dict.fromkeys([*after, *before]):
        name = key.removesuffix(".weight")
        if key not in before or key not in after:
            reason = "only in one of the models"
        elif before[key].shape != after[key].shape or before[key].dim() != 2:
            reason = f"shapes {tuple(before[key].shape)} and {tuple(after[key].shape)}; expected one shape (N, K)"
        elif not (before[key].is_floating_point() and after[key].is_floating_point()):
            reason = f"stored as {before[key].dtype} and {after[key].dtype}"
        else:
            transposed = _is_conv1d(tuned.get_submodule(key.rpartition(".")[0]))

            def change(w: Tensor = before[key], v: Tensor = after[key], transposed: bool = transposed) -> Any:
                return weight_change(*(x.T if transposed else x for x in (w.detach(), v.detach())))

            layers.append(Layer(name, checkpoint, "full", change))
            continue
        left_out.append(LeftOut(name, checkpoint, reason))
    return layers, left_out


def _adapters(model: nn.Module, checkpoint: str) -> tuple[list[Layer], list[LeftOut]]:
    from peft.tuners.lora.layer import LoraLayer

    layers, left_out = [], []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        name = name.removeprefix(PREFIX)
        reason = _why_not(layer, getattr(model, "peft_config", {}))
        if reason is not None:
            left_out.append(LeftOut(name, checkpoint, reason))
            continue

        (adapter,) = (key for key in layer.active_adapters if key in layer.lora_A)
        magnitudes = layer.lora_magnitude_vector
        magnitude = magnitudes[adapter].weight.detach() if adapter in magnitudes else None

        def change(layer: Any = layer, adapter: str = adapter, magnitude: Tensor | None = magnitude) -> Any:
            lora_A, lora_B = (part[adapter].weight.detach() for part in (layer.lora_A, layer.lora_B))
            return adapter_change(_base_weight(layer), lora_A, lora_B, layer.scaling[adapter], magnitude)

        layers.append(Layer(name, checkpoint, "LoRA" if magnitude is None else "DoRA", change))
    return layers, left_out


def _why_not(layer: Any, configs: dict[str, Any]) -> str | None:
    """The reason why a LoRA layer of PEFT's is not W + scaling * B A over a base weight W that can be read."""
    from peft.tuners.lora.variants import DoraLinearVariant

    adapters = [key for key in layer.active_adapters if key in layer.lora_A]
    if layer.merged:
        return "merged: the base weight is the tuned one; expected unmerge_adapter() first"
    if len(adapters) != 1:
        return f"{len(adapters)} active adapters of a linear layer; expected one"
    initial = getattr(configs.get(adapters[0]), "init_lora_weights", True)
    if initial not in BASE_KEPT:
        return f"init_lora_weights is {initial!r}: the base weight is not the pretrained one"
    variant = layer.lora_variant.get(adapters[0])
    if variant is not None and variant is not DoraLinearVariant and type(variant) is not DoraLinearVariant:
        return f"its variant is {getattr(variant, '__name__', type(variant).__name__)}; expected plain LoRA or DoRA"
    base = layer.get_base_layer()
    if quant.is_quantized(base):
        try:
            quant.read(base)
        except ValueError as error:
            return str(error)
        return None
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return f"the base layer is a {type(base).__name__}; expected a linear layer with a weight (N, K)"
    return None


def _base_weight(layer: Any) -> quant.Weight:
    base = layer.get_base_layer()
    if quant.is_quantized(base):
        return quant.read(base)
    return base.weight.detach().T if getattr(layer, "fan_in_fan_out", False) else base.weight.detach()


def _is_conv1d(module: nn.Module) -> bool:
    """True if the weight is (K, N): transformers' Conv1D, known by name so that nothing has to be imported."""
    return any(cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in type(module).__mro__)
