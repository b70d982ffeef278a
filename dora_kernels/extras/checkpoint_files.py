"""Checkpoints as others write them: safetensors files, Hugging Face's folders, and PEFT's adapter_config.json.

Shared by `convert` and `analysis`. Every function takes the name with which its errors begin; safetensors is
imported when a file is opened.
"""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_kernels.extras.schema import ModelIndex, read_json
from dora_kernels.files.reading import check_regular, shown, unreadable

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_WEIGHTS, MODEL_INDEX = "model.safetensors", "model.safetensors.index.json"
PREFIX = "base_model.model."
"""The beginning of the keys of an adapter's tensors in PEFT."""

BASE_KEPT = (None, True, False, "gaussian", "eva", "orthogonal")
"""PEFT's init_lora_weights under which W stays what the base checkpoint holds; the others move a part of W to A and B,
and the adapter belongs to what is left."""

MOST_LETTERS, MOST_DIMENSIONS = 1000, 8
"""Of a tensor's name and of its shape: more is no model's, and no message's."""

_CHECKPOINT = f"a safetensors file, or a folder with {MODEL_WEIGHTS}, {MODEL_INDEX} or {ADAPTER_CONFIG}"
_OPEN = 64
"""Files that are open at a time, of thousands that an index may name. Reading one more parses its header again: with 4,
8,000 tensors in 5 files, one after another in turn, took 16 s in place of 1.3."""


class TensorFiles:
    """The tensors of one or more safetensors files, by key: shapes and dtypes at once, data when it is asked for.

    Each file is opened once, and again where more than a few others were read since: opening parses its whole header.
    """

    def __init__(
        self, function: str, path: Path, files: Iterable[Path], weight_map: Mapping[str, str] | None = None
    ) -> None:
        """path: the name for all the files in messages. weight_map: the file that each key counts of, and no others do.

        Raises ValueError where a file cannot be read, or does not hold what weight_map says.
        """
        self.function, self.path = function, path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        self._opened: dict[Path, Any] = {}
        for file in files:
            tensors = self._open(file)
            self.metadata |= tensors.metadata() or {}
            for key in tensors.keys():
                if weight_map is not None and weight_map.get(key) != file.name:
                    continue
                entry = tensors.get_slice(key)
                shape = tuple(entry.get_shape())
                if len(key) > MOST_LETTERS or len(shape) > MOST_DIMENSIONS:
                    raise ValueError(
                        f"{function}: {shown(file)}: {shown(key)} has {len(key)} letters and {len(shape)} dimensions; "
                        f"expected at most {MOST_LETTERS} and {MOST_DIMENSIONS}"
                    )
                self._files[key], self.shapes[key], self.dtypes[key] = file, shape, entry.get_dtype()
        for key, name in (weight_map or {}).items():
            if key not in self.shapes:
                raise ValueError(
                    f"{function}: {shown(path)}: {shown(name)} has no {shown(key)}; expected it, as {MODEL_INDEX} says"
                )

    def _open(self, file: Path) -> Any:
        tensors = self._opened.pop(file, None) or open_safetensors(self.function, file)
        self._opened[file] = tensors  # the latest at the end
        if len(self._opened) > _OPEN:
            del self._opened[next(iter(self._opened))]
        return tensors

    def __getitem__(self, key: str) -> Tensor:
        file = self._files[key]
        try:
            return self._open(file).get_tensor(key)
        except Exception as error:  # safetensors has dtypes that torch lacks, and says so with several kinds of error
            raise ValueError(
                f"{self.function}: {shown(file)}: {shown(key)}, {self.dtypes[key]}, cannot be read: {shown(error)}; "
                "expected a dtype of torch's"
            ) from error

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def __str__(self) -> str:
        return shown(self.path)

    @cached_property
    def _backwards(self) -> list[str]:
        return sorted(key[::-1] for key in self.shapes)

    def ending_with(self, end: str) -> list[str]:
        """The keys that end so; two at the most. Takes as long for many keys as for few."""
        start = end[::-1]
        first = bisect.bisect_left(self._backwards, start)
        return [key[::-1] for key in self._backwards[first : first + 2] if key.startswith(start)]


def open_model(function: str, path: Path) -> TensorFiles:
    """A safetensors file, or those of a Hugging Face folder. Raises ValueError where there are none."""
    if not os.path.isdir(path):
        if not os.path.lexists(path):
            raise ValueError(f"{function}: {shown(path)} is no checkpoint; expected {_CHECKPOINT}")
        return TensorFiles(function, path, [path])
    if os.path.lexists(path / ADAPTER_CONFIG):
        raise ValueError(f"{function}: {shown(path)} is an adapter; expected the checkpoint of a model")
    if os.path.lexists(path / MODEL_WEIGHTS):  # before the index, as transformers looks for them
        return TensorFiles(function, path, [path / MODEL_WEIGHTS])
    if not os.path.lexists(path / MODEL_INDEX):
        raise ValueError(f"{function}: {shown(path)} is no checkpoint; expected {_CHECKPOINT}")
    weight_map = read_json(function, path / MODEL_INDEX, ModelIndex).weight_map
    return TensorFiles(function, path, [path / name for name in dict.fromkeys(weight_map.values())], weight_map)


def open_safetensors(function: str, file: Path) -> Any:
    """safe_open, on the CPU. Raises ValueError where it cannot be read."""
    from safetensors import safe_open

    check_regular(function, file)
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # SafetensorError is an Exception, and nothing nearer to OSError or ValueError
        raise unreadable(function, file, error, "a safetensors file") from error


def lora_scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    """alpha / R or, rank-stabilised, alpha / sqrt(R)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)
