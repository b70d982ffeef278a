"""PEFT's adapters on disk, and what they mean, in PEFT's and the paper's words: nothing of it is the package's code."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.hostile_files import render

MODULES = ("layers.0.mlp.w1", "layers.1.mlp.w1", "layers.10.mlp.up")
N, K, R = 6, 5, 4
CONFIG = {"peft_type": "LORA", "use_dora": True, "r": R, "lora_alpha": 8, "use_rslora": False}
CONFIG |= {"rank_pattern": {}, "alpha_pattern": {"mlp.up": 4.5}, "target_modules": ["w1", "up"]}
CONFIG |= {"init_lora_weights": True, "bias": "none", "fan_in_fan_out": False, "lora_dropout": 0.0}
INDEX = {
    "metadata": {"total_size": 1},
    "weight_map": {f"{module}.weight": "one.safetensors" for module in MODULES},
}


def adapter_tensors(modules: Iterable[str] = MODULES, rank: int = R) -> dict[str, Tensor]:
    """A random DoRA adapter's by PEFT's names, with norms far from its magnitudes."""
    random, tensors = torch.Generator().manual_seed(1), {}
    for module in modules:
        stem = f"base_model.model.{module}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, K, generator=random)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(N, rank, generator=random)
        tensors[f"{stem}.lora_magnitude_vector"] = torch.rand(N, generator=random) + 1
    return tensors


def write_adapter(folder: Path, config: object = None, tensors: dict[str, Tensor] | None = None) -> Path:
    """PEFT's folder. config: bytes, or what is rendered; CONFIG where it is None."""
    folder.mkdir()
    text = config if isinstance(config, bytes) else render(CONFIG if config is None else config).encode()
    (folder / "adapter_config.json").write_bytes(text)
    save_file(adapter_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def write_model(path: Path, modules: Iterable[str] = MODULES, seed: int = 0) -> Path:
    """A safetensors file of dense weights."""
    random = torch.Generator().manual_seed(seed)
    save_file({f"{module}.weight": torch.randn(N, K, generator=random) for module in modules}, path)
    return path


def scaling_of(config: Mapping[str, Any], module: str) -> tuple[Any, float]:
    """r and scaling of one layer as PEFT computes them, in its own words. The numbers are those of JSON."""

    def of(patterns: Any, otherwise: Any) -> Any:
        fits = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module))
        return next(fits, otherwise)

    r = of(config.get("rank_pattern"), config.get("r", 8))
    alpha = of(config.get("alpha_pattern"), config.get("lora_alpha", 8))
    assert type(r) is int and type(alpha) in (int, float), f"r {r!r} or alpha {alpha!r} is no number"
    return r, alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def change(weight: Tensor, tuned: Tensor) -> tuple[float, float]:
    """The paper's delta M and delta D of the rows of two weights, in as many words."""
    w, v = weight.double(), tuned.double()
    cosine = torch.nn.functional.cosine_similarity(w, v, dim=1)
    return (v.norm(dim=1) - w.norm(dim=1)).abs().mean().item(), (1 - cosine).mean().item()


def tuned_weight(weight: Tensor, tensors: Mapping[str, Tensor], module: str, scaling: float) -> Tensor:
    """magnitude * (W + scaling B A) / its norm, in float64."""
    stem = f"base_model.model.{module}"
    lora_A, lora_B = (tensors[f"{stem}.lora_{part}.weight"].double() for part in "AB")
    v = weight.double() + scaling * lora_B @ lora_A
    return v / v.norm(dim=1, keepdim=True) * tensors[f"{stem}.lora_magnitude_vector"].double().reshape(-1, 1)
