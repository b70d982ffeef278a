"""What each tool computes of a file over the small image model: the outputs of every layer that the file adapts.

In float64. PEFT, diffusers and LyCORIS do it with their own code. Of the others the formula is restated:
ComfyUI: weight_decompose in comfy/weight_adapter/base.py, LoRAAdapter in comfy/weight_adapter/lora.py and the names in
    comfy/lora.py of https://github.com/Comfy-Org/ComfyUI/tree/a125cd84b054a57729b5eecab930ca9408719832
InvokeAI: invokeai/backend/patches/layers/dora_layer.py, since https://github.com/invoke-ai/InvokeAI/pull/9517
ai-toolkit: toolkit/models/DoRA.py and toolkit/network_mixins.py (forward) of
    https://github.com/ostris/ai-toolkit/tree/27a03a91f23eb1b757d5ec2e80ee3e129cfcc350
OneTrainer: DoRAModule in modules/module/LoRAModule.py of
    https://github.com/Nerogar/OneTrainer/tree/23df3832e8f213d64c337e39f9365ba46e99fed0
A tool that leaves a key of the file alone raises Unread here, also where it would go on without a word.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.image_files import (
    DOTTED,
    KOHYA,
    MODULES,
    NATIVE,
    Plain,
    call,
    diffusers_class,
    inputs,
    layer,
    name_in,
)

Outputs = dict[str, Tensor]
EPS = torch.finfo(torch.float64).eps
CLOSE = 1e-13
"""What `error` is below where two are the same in float64: gains are off by tenths else, and LyCORIS' eps is 2e-16."""


class Unread(Exception):
    """A file of which the tool takes nothing or not all."""


def error(actual: Outputs, exact: Outputs) -> float:
    """The largest difference of any output, beside the largest output of its layer."""
    assert actual.keys() == exact.keys() and actual
    return max(((actual[name] - exact[name]).abs().max() / exact[name].abs().max()).item() for name in exact)


def norms(weight: Tensor, axis: int) -> Tensor:
    """Of each row (0) or column (1), with as many dimensions as the weight has."""
    return weight.pow(2).sum([d for d in range(weight.ndim) if d != axis], keepdim=True).sqrt()


def product(up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    return (up.double().flatten(1) @ down.double().flatten(1)).view_as(weight)


def _own(module: torch.nn.Module, names) -> Outputs:
    with torch.no_grad():
        return {name: module.get_submodule(name)(inputs(name)) for name in names}


def _by_module(path: Path, *styles: tuple[str, str]) -> dict[str, dict[str, Tensor]]:
    """{module: {what follows it: tensor}} of the names that a tool knows. Raises Unread for any other."""
    tensors, found = load_file(path), {}
    for module in MODULES:
        for stem in (name_in(style, module) for style in styles):
            taken = [key for key in tensors if key.startswith(f"{stem}.")]
            if taken and module in found:
                raise Unread(f"{module} is there twice")
            if taken:
                found[module] = {key.removeprefix(f"{stem}."): tensors.pop(key) for key in taken}
    if tensors or not found:
        raise Unread(f"it knows nothing of {sorted(tensors)}")
    return found


def _part(parts: dict[str, Tensor], *names: str) -> Tensor | None:
    return next((parts.pop(name) for name in names if name in parts), None)


def _direction(weight: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """W + alpha / R B A, or W + B A without alpha, as ComfyUI and InvokeAI have it."""
    up, down = _part(parts, "lora_up.weight", "lora_B.weight"), _part(parts, "lora_down.weight", "lora_A.weight")
    alpha = _part(parts, "alpha")
    return weight + product(up, down, weight) * (1.0 if alpha is None else alpha.item() / down.shape[0])


def _only(parts: dict[str, Tensor]) -> None:
    if parts:
        raise Unread(f"it leaves {sorted(parts)} alone")


def peft(folder: Path) -> Outputs:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of keys that are missing, and of patterns that match nothing
        model = PeftModel.from_pretrained(Plain(), str(folder)).base_model.model
    return _own(model, [m for m in MODULES if hasattr(model.get_submodule(m), "lora_A")])


def diffusers(path: Path) -> Outputs:
    """By load_lora_adapter, as a pipeline does where every key begins with `transformer.`, and without one else."""
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    model, tensors = diffusers_class()(), load_file(path)
    before = set(model.state_dict())
    options = {"weight_name": path.name, "use_safetensors": True}
    if all(key.startswith("transformer.") for key in tensors):
        state, _, metadata = FluxLoraLoaderMixin.lora_state_dict(
            path.parent, return_alphas=True, return_lora_metadata=True, **options
        )
        model.load_lora_adapter(state, prefix="transformer", metadata=metadata)
    else:
        model.load_lora_adapter(path.parent, prefix=None, **options)
    added = [value for key, value in model.state_dict().items() if "lora_" in key]
    if not before or len(added) != len(tensors):
        raise Unread(f"it has {len(added)} tensors of the file's {len(tensors)}")
    for key, value in tensors.items():
        if not any(value.shape == other.shape and torch.equal(value.double(), other.double()) for other in added):
            raise Unread(f"it has not taken {key}")
    return _own(model, [m for m in MODULES if hasattr(model.get_submodule(m), "lora_A")])


def lycoris(path: Path) -> Outputs:
    """By make_module, as LyCORIS merges a file; a column's magnitude goes into the layer that it was trained in.

    make_module takes every magnitude for one of rows: that of columns does not fit, or is spread over all rows.
    """
    from lycoris.modules import get_module, make_module
    from lycoris.modules.locon import LoConModule

    tensors, model, results = load_file(path), Plain(), {}
    named = [(m, name_in(style, m)) for m in MODULES for style in (KOHYA, ("lycoris", "_"))]
    for module, name in named:
        kind, parameters = get_module(tensors, name)
        if kind is None:
            continue
        base, scale = model.get_submodule(module), tensors.get(f"{name}.dora_scale")
        if scale is not None and scale.shape[0] == 1:
            down, alpha = tensors[f"{name}.lora_down.weight"], float(tensors[f"{name}.alpha"])
            own = LoConModule(name, base, 1, down.shape[0], alpha, weight_decompose=True, wd_on_out=False)
            state = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            own.load_state_dict(state)
        else:
            own = make_module(kind, parameters, name, base)
        for key in [key for key in tensors if key.startswith(f"{name}.")]:
            tensors.pop(key)
        results[module] = own.double()(inputs(module)).detach()
    if tensors:
        raise Unread(f"it knows nothing of {sorted(tensors)}")
    return results


def comfyui(path: Path) -> Outputs:
    """Over rows, ComfyUI divides by the norm of the base weight: https://github.com/Comfy-Org/ComfyUI/pull/15458"""
    results = {}
    for module, parts in _by_module(path, NATIVE, KOHYA, DOTTED).items():
        weight, scale = layer(module).weight, _part(parts, "dora_scale")
        direction = _direction(weight, parts)
        _only(parts)
        if scale is not None:
            rows = scale.shape[0] == weight.shape[0]
            norm = norms(weight, 0) if rows else norms(direction, 1)
            direction = direction * (scale.double() / (norm + EPS))
        results[module] = call(module, direction)
    return results


def invokeai(path: Path) -> Outputs:
    """`dora_scale` is over columns to InvokeAI, whatever its shape, and the other names over rows."""
    results = {}
    for module, parts in _by_module(path, DOTTED, NATIVE, KOHYA).items():
        weight, columns = layer(module).weight, _part(parts, "dora_scale")
        rows = _part(parts, "magnitude", "lora_magnitude_vector.weight", "lora_magnitude_vector")
        direction = _direction(weight, parts)
        _only(parts)
        if rows is not None:
            direction = direction * (rows.double().view(-1, *(1,) * (weight.ndim - 1)) / norms(direction, 0))
        elif columns is not None:
            direction = direction * (columns.double() / norms(direction, 1))
        results[module] = call(module, direction)
    return results


def ai_toolkit(path: Path) -> Outputs:
    """Its layer in training: load_weights makes `$$` of the dots of each key, and has no place for a magnitude then."""
    results = {}
    for module, parts in _by_module(path, DOTTED, NATIVE).items():
        weight, x = layer(module).weight, inputs(module)
        up, down = _part(parts, "lora_B.weight"), _part(parts, "lora_A.weight")
        magnitude = _part(parts, "magnitude")
        _only(parts)
        if weight.ndim > 2:
            raise Unread("it has no convolutions")
        delta = product(up, down, weight)
        result = layer(module)(x) + x @ down.double().T @ up.double().T
        if magnitude is not None:
            norm = (weight + delta).pow(2).sum(1).sqrt()
            result = result + (magnitude.double() / norm - 1) * (x @ (weight + delta).T)
        results[module] = result
    return results


def one_trainer(path: Path) -> Outputs:
    results = {}
    for module, parts in _by_module(path, KOHYA, NATIVE).items():
        weight = layer(module).weight
        up, down = _part(parts, "lora_up.weight", "lora_B.weight"), _part(parts, "lora_down.weight", "lora_A.weight")
        alpha, scale = _part(parts, "alpha"), _part(parts, "dora_scale")
        _only(parts)
        new = weight + product(up, down, weight) * (alpha.item() / down.shape[0])
        if scale is not None:
            new = scale.double() * (new / (norms(new, 1 if scale.shape[0] == 1 else 0) + EPS))
        results[module] = call(module, new)
    return results


READERS: dict[str, Callable[[Path], Outputs]] = {
    "PEFT": peft,
    "diffusers": diffusers,
    "LyCORIS": lycoris,
    "ComfyUI": comfyui,
    "InvokeAI": invokeai,
    "ai-toolkit": ai_toolkit,
    "OneTrainer": one_trainer,
}
