"""Checkpoints as others write them: safetensors files, Hugging Face's folders, and PEFT's adapter_config.json.

Shared by `convert` and `analysis`. Every function takes the name with which its errors begin; safetensors is
imported when a file is opened.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_WEIGHTS, MODEL_INDEX = "model.safetensors", "model.safetensors.index.json"
PREFIX = "base_model.model."
"""The beginning of the keys of an adapter's tensors in PEFT."""

BASE_KEPT = (None, True, False, "gaussian", "eva", "orthogonal")
"""PEFT's init_lora_weights under which W stays what the base checkpoint holds; the others move a part of W to A and B,
and the adapter belongs to what is left."""


class TensorFiles:
    """The tensors of one or more safetensors files, by key: shapes and dtypes at once, data when it is asked for."""

    def __init__(self, function: str, path: Path, files: Iterable[Path]) -> None:
        """path: the name for all the files in messages. Raises ValueError where one cannot be read."""
        self.function, self.path = function, path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            with open_safetensors(function, file) as tensors:
                for key in tensors.keys():
                    entry = tensors.get_slice(key)
                    self._files[key], self.shapes[key] = file, tuple(entry.get_shape())
                    self.dtypes[key] = entry.get_dtype()

    def __getitem__(self, key: str) -> Tensor:
        with open_safetensors(self.function, self._files[key]) as tensors:
            return tensors.get_tensor(key)

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def __str__(self) -> str:
        return str(self.path)


def model_files(function: str, path: Path) -> list[Path]:
    """A safetensors file, or those of a Hugging Face folder. Raises ValueError where there are none."""
    if path.is_file():
        return [path]
    if (path / ADAPTER_CONFIG).exists():
        raise ValueError(f"{function}: {path} is an adapter; expected the checkpoint of a model")
    if (path / MODEL_WEIGHTS).exists():  # before the index, as transformers looks for them
        return [path / MODEL_WEIGHTS]
    if (path / MODEL_INDEX).exists():
        weight_map = read_json(function, path / MODEL_INDEX).get("weight_map", {})
        return [path / name for name in dict.fromkeys(weight_map.values())]
    raise ValueError(
        f"{function}: {path} is no checkpoint; expected a safetensors file, or a folder with {MODEL_WEIGHTS}, "
        f"{MODEL_INDEX} or {ADAPTER_CONFIG}"
    )


def open_safetensors(function: str, file: Path) -> Any:
    """safe_open, on the CPU. Raises ValueError where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{function}: {file} cannot be read: {error}; expected a safetensors file") from error


def read_json(function: str, file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError where there is none."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{function}: {file} cannot be read: {error}; expected JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"{function}: {file} holds a {type(content).__name__}; expected a JSON object")
    return content


def pattern_value(function: str, config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """The value of rank_pattern or alpha_pattern for one module. Each key is a regular expression for the end of its
    name, and the first that fits counts. Raises ValueError where that cannot be asked."""
    patterns = config.get(field) or {}
    try:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
    except (re.error, AttributeError) as error:
        raise ValueError(f"{function}: {field} is {patterns!r}: {error}; expected {{pattern: number}}") from error


def lora_scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    """alpha / R or, rank-stabilised, alpha / sqrt(R)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)
