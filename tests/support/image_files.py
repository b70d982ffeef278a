"""A small image model, adapters trained over it, and the files that each tool saves of them.

PEFT, diffusers and LyCORIS write their files here by their own code. Of the tools that are not installed the names,
shapes and dtypes are restated:
ai-toolkit: toolkit/models/DoRA.py, toolkit/network_mixins.py (get_state_dict) and toolkit/lora_special.py of
    https://github.com/ostris/ai-toolkit/tree/27a03a91f23eb1b757d5ec2e80ee3e129cfcc350
OneTrainer: LoRAModule.py, convert_lora_util.py and LoRASaverMixin.py under modules/ of
    https://github.com/Nerogar/OneTrainer/tree/23df3832e8f213d64c337e39f9365ba46e99fed0
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call


class Block(nn.Module):
    """A linear layer with a bias, one without, and convolutions; no two of them have the same shape, and one is square.

    A norm over the wrong axis raises of the others, and is silently another of the square one.
    """

    def __init__(self, width: int):
        super().__init__()
        self.attn = nn.Module()
        self.attn.to_q = nn.Linear(width, 6)
        self.ff_out = nn.Linear(7, 4, bias=False)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.mix = nn.Conv2d(5, 3, 1, bias=False)


def blocks() -> nn.ModuleList:
    """Two of them, the same numbers each time."""
    torch.manual_seed(0)
    return nn.ModuleList([Block(5), Block(6)]).double()


class Plain(nn.Module):
    """The model as a module of nobody's."""

    def __init__(self):
        super().__init__()
        self.blocks = blocks()


@functools.cache
def diffusers_class() -> type[nn.Module]:
    """The model as one of diffusers', which takes its adapters by itself; importing diffusers takes seconds."""
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.loaders.peft import PeftAdapterMixin
    from diffusers.models.modeling_utils import ModelMixin

    class Model(ModelMixin, ConfigMixin, PeftAdapterMixin):
        @register_to_config
        def __init__(self):
            super().__init__()
            self.blocks = blocks()

    return Model


LINEAR = tuple(f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.to_q", "ff_out"))
CONV = tuple(f"blocks.{i}.{name}" for i in (0, 1) for name in ("conv", "mix"))
MODULES = LINEAR + CONV
SCALING = 2.0


@dataclass(frozen=True)
class Trained:
    """One layer's adapter: magnitude (N,), or (K,) with axis "in"; None is a plain LoRA."""

    A: Tensor
    B: Tensor
    magnitude: Tensor | None
    scaling: float
    axis: str

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the magnitude, with as many dimensions as the weight has."""
        ones = (1,) * (self.A.ndim - 2)
        return (-1, 1, *ones) if self.axis == "out" else (1, -1, *ones)

    @property
    def peft_shape(self) -> tuple[int, ...]:
        return (-1,) if self.A.ndim == 2 else (1, -1, *(1,) * (self.A.ndim - 2))


def trained(
    modules: Iterable[str] = MODULES,
    *,
    scaling: float = SCALING,
    axis: str = "out",
    plain: Iterable[str] = (),
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Trained]:
    """Random adapters of these modules, `plain` ones among them; ranks 2 and 3, gains far from 1."""
    random, adapters = torch.Generator().manual_seed(1), {}
    for module in modules:
        N, K, *kernel = layer(module).weight.shape
        R = rank or (3 if "to_q" in module else 2)

        def normal(*shape):
            return torch.randn(*shape, generator=random).to(dtype)

        A, B = normal(R, K, *kernel), normal(N, R, *(1 for _ in kernel))
        magnitude = None if module in plain else normal(N if axis == "out" else K).abs() + 1
        adapters[module] = Trained(A, B, magnitude, scaling, axis)
    return adapters


@functools.cache
def layer(module: str) -> nn.Module:
    """The layer beneath, which nobody changes."""
    return Plain().get_submodule(module).requires_grad_(False)


def call(module: str, weight: Tensor) -> Tensor:
    """What the layer puts out with this weight in place of its own."""
    return functional_call(layer(module), {"weight": weight}, inputs(module))


@functools.cache
def inputs(module: str) -> Tensor:
    K = layer(module).weight.shape[1]
    random = torch.Generator().manual_seed(len(module))
    shape = (3, K) if module in LINEAR else (2, K, 5, 4)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def merged(weight: Tensor, a: Trained) -> Tensor:
    """gain * (W + scaling * B A) by the definition, in float64."""
    direction = weight + a.scaling * (a.B.double().flatten(1) @ a.A.double().flatten(1)).view_as(weight)
    if a.magnitude is None:
        return direction
    rows = direction if a.axis == "out" else direction.transpose(0, 1)
    norm = rows.flatten(1).pow(2).sum(1).sqrt()
    return direction * (a.magnitude.double() / norm).view(a.shape)


def definition(adapters: Mapping[str, Trained]) -> dict[str, Tensor]:
    """The outputs of every layer that has an adapter."""
    return {name: call(name, merged(layer(name).weight, a)) for name, a in adapters.items()}


# --- the files ---

KOHYA = ("lora_unet", "_")  # what stands before a module's name, and in place of its dots
LYCORIS = ("lycoris", "_")
DOTTED = ("transformer", ".")
NATIVE = ("diffusion_model", ".")


def name_in(style: tuple[str, str], module: str) -> str:
    return style[1].join([style[0], *module.split(".")])


def _peft_layers(model: nn.Module, adapters: Mapping[str, Trained]) -> None:
    """Give the layers of a model that PEFT has made its own the values of `adapters`."""
    for module, a in adapters.items():
        adapted = model.get_submodule(module)
        adapted.lora_A["default"].weight.data = a.A.clone()
        adapted.lora_B["default"].weight.data = a.B.clone()
        if a.magnitude is not None:
            adapted.lora_magnitude_vector["default"].weight.data = a.magnitude.reshape(a.peft_shape).clone()


def _peft_config(adapters: Mapping[str, Trained]):
    from peft import LoraConfig

    patterns = {module: a.rank for module, a in adapters.items()}
    alphas = {module: a.scaling * a.rank for module, a in adapters.items()}
    return LoraConfig(
        use_dora=True, r=3, lora_alpha=6.0, rank_pattern=patterns, alpha_pattern=alphas, target_modules=list(adapters)
    )


def save_peft(path: Path, adapters: Mapping[str, Trained]) -> None:
    """PEFT's save_pretrained: a folder."""
    peft_model(adapters).save_pretrained(path)


def peft_model(adapters: Mapping[str, Trained]):
    from peft import get_peft_model

    model = get_peft_model(Plain(), _peft_config(adapters), autocast_adapter_dtype=False)
    _peft_layers(model.base_model.model, adapters)
    return model


def save_peft_state(path: Path, adapters: Mapping[str, Trained]) -> None:
    """What a training loop of one's own saves: the adapter's part of state_dict(), by torch.save, and no alpha."""
    torch.save({key: value for key, value in peft_model(adapters).state_dict().items() if "lora_" in key}, path)


def save_peft_file(path: Path, adapters: Mapping[str, Trained]) -> None:
    """get_peft_model_state_dict in one safetensors file, and no alpha."""
    from peft import get_peft_model_state_dict

    save_file(get_peft_model_state_dict(peft_model(adapters)), path)


def _diffusers_model(adapters: Mapping[str, Trained]):
    model = diffusers_class()()
    model.add_adapter(_peft_config(adapters))
    _peft_layers(model, adapters)
    return model


def save_diffusers_model(path: Path, adapters: Mapping[str, Trained]) -> None:
    """A diffusers model's save_lora_adapter: no prefix, and the config of PEFT in the header."""
    _diffusers_model(adapters).save_lora_adapter(path.parent, weight_name=path.name)


def save_diffusers_pipeline(path: Path, adapters: Mapping[str, Trained]) -> None:
    """A diffusers pipeline's save_lora_weights: `transformer.` before every key, in the header too."""
    _save_pipeline(path, _diffusers_model(adapters))


def _save_pipeline(path: Path, model: nn.Module) -> None:
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
    from peft import get_peft_model_state_dict

    FluxLoraLoaderMixin.save_lora_weights(
        path.parent,
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        weight_name=path.name,
    )


def save_random(path: Path, config: Mapping[str, Any], pipeline: bool) -> tuple[Path, dict[str, Tensor]]:
    """(path, outputs of the layers in it) of what diffusers saves of random adapters by a config of PEFT's."""
    from peft import LoraConfig

    model = diffusers_class()()
    model.add_adapter(LoraConfig(use_dora=True, **config))
    random = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=random) + 2 * ("magnitude" in name)
            parameter.data = values.to(parameter.dtype)
    if pipeline:
        _save_pipeline(path, model)
    else:
        model.save_lora_adapter(path.parent, weight_name=path.name)
    with torch.no_grad():
        adapted = [m for m in MODULES if hasattr(model.get_submodule(m), "lora_A")]
        return path, {m: model.get_submodule(m)(inputs(m)) for m in adapted}


def save_ai_toolkit(path: Path, adapters: Mapping[str, Trained]) -> None:
    """ai-toolkit of a transformer: no alpha, for it is the rank; one dtype for everything."""
    tensors = {}
    for module, a in adapters.items():
        stem = name_in(DOTTED, module)
        tensors[f"{stem}.lora_A.weight"] = a.A.bfloat16()
        tensors[f"{stem}.lora_B.weight"] = a.B.bfloat16()
        if a.magnitude is not None:
            tensors[f"{stem}.magnitude"] = a.magnitude.bfloat16()
    save_file(
        tensors, path, {"format": "pt", "software": '{"name": "ai-toolkit", "repo": "https://github.com/ostris"}'}
    )


def save_lycoris(path: Path, adapters: Mapping[str, Trained], style: tuple[str, str] = KOHYA) -> None:
    """A network of LyCORIS', by the names that kohya's scripts give it."""
    from lycoris.modules.locon import LoConModule

    model, tensors = Plain().float(), {}
    for module, a in adapters.items():
        own = LoConModule(
            module,
            model.get_submodule(module),
            lora_dim=a.rank,
            alpha=a.scaling * a.rank,
            weight_decompose=a.magnitude is not None,
            wd_on_out=a.axis == "out",
        )
        with torch.no_grad():
            own.lora_down.weight.copy_(a.A)
            own.lora_up.weight.copy_(a.B)
            if a.magnitude is not None:
                own.dora_scale.copy_(a.magnitude.view(a.shape))
        for key, value in own.state_dict().items():
            tensors[f"{name_in(style, module)}.{key}"] = value.detach().clone()
    save_file(tensors, path)


def _one_trainer(adapters: Mapping[str, Trained], style: tuple[str, str], down: str, up: str) -> dict[str, Tensor]:
    tensors = {}
    for module, a in adapters.items():
        stem = name_in(style, module)
        tensors |= {f"{stem}.{down}.weight": a.A, f"{stem}.{up}.weight": a.B}
        tensors[f"{stem}.alpha"] = torch.tensor(a.scaling * a.rank)
        if a.magnitude is not None:
            tensors[f"{stem}.dora_scale"] = a.magnitude.view(a.shape).clone()
    return tensors


def save_one_trainer_kohya(path: Path, adapters: Mapping[str, Trained]) -> None:
    """OneTrainer's format for kohya's scripts, and its older ones for Stable Diffusion."""
    save_file(_one_trainer(adapters, KOHYA, "lora_down", "lora_up"), path)


def save_one_trainer_comfy(path: Path, adapters: Mapping[str, Trained]) -> None:
    """OneTrainer's format for ComfyUI: PEFT's names beside LyCORIS'."""
    save_file(_one_trainer(adapters, NATIVE, "lora_A", "lora_B"), path)


def save_one_trainer_diffusers(path: Path, adapters: Mapping[str, Trained]) -> None:
    """Alpha within lora_B, the magnitude with `.weight`, and no header."""
    tensors = {}
    for module, a in adapters.items():
        stem = name_in(DOTTED, module)
        tensors |= {f"{stem}.lora_A.weight": a.A, f"{stem}.lora_B.weight": a.B * a.scaling}
        if a.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector.weight"] = a.magnitude.reshape(a.peft_shape).clone()
    save_file(tensors, path)


SAVES = {
    "PEFT": save_peft,
    "PEFT, one file": save_peft_file,
    "PEFT, a state dict": save_peft_state,
    "diffusers model": save_diffusers_model,
    "diffusers pipeline": save_diffusers_pipeline,
    "ai-toolkit": save_ai_toolkit,
    "LyCORIS": save_lycoris,
    "OneTrainer, kohya's names": save_one_trainer_kohya,
    "OneTrainer, ComfyUI's names": save_one_trainer_comfy,
    "OneTrainer, diffusers' names": save_one_trainer_diffusers,
}
NAMES = {"PEFT": "folder", "PEFT, a state dict": "file.pt"}


def saved(folder: Path, tool: str, **options: Any) -> tuple[Path, dict[str, Trained]]:
    """The path of what the tool saves under this folder, and the adapters in it; options of `trained`."""
    if tool == "ai-toolkit":  # which has linear layers alone, alpha = rank, and one dtype
        options = {"modules": LINEAR, "scaling": 1.0, "dtype": torch.bfloat16} | options
    adapters = trained(**options)
    path = folder / "saved" / NAMES.get(tool, "file.safetensors")
    path.parent.mkdir()
    SAVES[tool](path, adapters)
    return path, adapters


def renames(style: tuple[str, str] | None) -> list[tuple[str, str]]:
    """Pairs for `rename`: whatever stands before a module's name goes, and its dots are the style's."""
    pairs = []
    for module in MODULES:
        pattern = "[._]".join(map(re.escape, module.split(".")))
        pairs.append((rf"^(.+[._])?{pattern}$", module if style is None else name_in(style, module)))
    return pairs
