"""A base in shards, adapters of its layers in a file, and the merge in float64 by the definition."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_kernels.extras.convert import FORMATS, DoraAdapter, encode
from dora_kernels.extras.convert.files import save

INDEX = "model.safetensors.index.json"


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def adapter_of(module: str, weight: Tensor, R: int = 4, scaling: float = 1.75, seed: int = 1, **settings: Any):
    """An adapter of a weight (N, K, *kernel): no number is that of another, gains are from 0.5 to 1.5 and negative."""
    N, K, *kernel = weight.shape
    axis, dtype = settings.get("axis", "out"), settings.get("dtype", torch.float32)
    lora_A = random(R, K, *kernel, seed=seed, dtype=dtype)
    lora_B = random(N, R, *(1 for _ in kernel), seed=seed + 1, dtype=dtype, scale=0.3)
    direction = direction_of(weight, lora_A, lora_B, scaling)
    length = norms(direction, axis)
    spread = 0.5 + torch.rand(len(length), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spread[::5] *= -1
    return DoraAdapter(module, lora_A, lora_B, (spread * length).float(), scaling, axis)


def direction_of(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    product = lora_B.double().flatten(1) @ lora_A.double().flatten(1)
    return weight.double() + scaling * product.view(weight.shape)


def norms(matrix: Tensor, axis: str) -> Tensor:
    return (matrix if axis == "out" else matrix.transpose(0, 1)).flatten(1).double().square().sum(1).sqrt()


def exact_merge(weight: Tensor, adapter: DoraAdapter) -> Tensor:
    """W' of a weight (N, K, *kernel) in float64: a row or a column at a time, as the definition has it."""
    direction = direction_of(weight, adapter.lora_A, adapter.lora_B, adapter.scaling)
    if adapter.magnitude is None:
        return direction
    lines = direction if adapter.norm_axis == "out" else direction.transpose(0, 1)
    merged = torch.stack(
        [
            magnitude / line.norm() * line if line.any() else line
            for line, magnitude in zip(lines, adapter.magnitude.double(), strict=True)
        ]
    )
    return merged if adapter.norm_axis == "out" else merged.transpose(0, 1)


def write_base(folder: Path, *shards: dict[str, Tensor], **config: Any) -> Path:
    """A folder as transformers writes it: one file, or shards with an index; config.json, a tokenizer, a subfolder."""
    folder.mkdir(parents=True)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": size, "total_parameters": 7}}
        index["weight_map"] = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, {"format": "pt", "written": "for a test"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False, **config}))
    (folder / "tokenizer.json").write_bytes(bytes(range(256)) * 3)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def write_adapter(path: Path, adapters: list[DoraAdapter], format: str = "dora_kernels") -> Path:
    save(FORMATS[format], encode(FORMATS[format], adapters), path)
    return path


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors in the files of a folder, or in a file."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def merge_arguments(folder: Path) -> dict[str, Any]:
    """What merge_checkpoint succeeds with."""
    weight = random(6, 10, seed=0)
    write_base(folder / "base", {"layers.0.weight": weight})
    write_adapter(folder / "adapter", [adapter_of("layers.0", weight)])
    return {"base": folder / "base", "adapter": folder / "adapter", "out": folder / "out"}
