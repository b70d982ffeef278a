"""The adapter: any that convert reads, by the names and with the rows of the base."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from dora_kernels.extras.checkpoint_files import ADAPTER_CONFIG, PREFIX
from dora_kernels.extras.convert import FORMATS, DoraAdapter
from dora_kernels.extras.convert.checkpoint import with_names, with_rows
from dora_kernels.extras.convert.reading import read_apart
from dora_kernels.extras.schema import read_config
from dora_kernels.files.reading import shown


@dataclass(frozen=True)
class AdapterFile:
    """The format's name, the adapters, what adapter_config.json says of fan_in_fan_out (None: nothing), and the base's
    own tensors that are saved beside: {(module, "weight" or "bias"): tensor}.
    """

    format: str
    layers: list[DoraAdapter]
    fan_in_fan_out: bool | None = None
    beneath: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)


def read(
    source: Path,
    source_format: str | None,
    alpha: float | None,
    rename: Sequence[tuple[str, str]],
    heads: tuple[int, int] | None,
    same_rows: bool,
    allow_nonfinite: bool,
) -> AdapterFile:
    """The adapters of a file or folder. Raises ValueError as `convert` does, but not for the base's own tensors."""
    try:
        name, adapters, own = read_apart(source, source_format, alpha, allow_nonfinite)
        beneath = _by_module(own, adapters, rename)
        adapters = with_names(adapters, rename)
        if name == "torchtune":
            adapters = with_rows(adapters, to_torchtune=False, heads=heads, same_rows=same_rows)
        elif heads is not None:
            raise ValueError(f"convert: heads is {heads}; expected None, for {name} keeps the rows as the model does")
        return AdapterFile(name, adapters, _fan_in_fan_out(source), beneath)
    except ValueError as error:
        raise ValueError(f"merge: {str(error).removeprefix('convert: ')}") from error


def _by_module(
    own: Mapping[str, Tensor], adapters: Sequence[DoraAdapter], rename: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Tensor]:
    """The base's own tensors by the adapter's module, as it is called after `rename`."""
    modules = {adapter.module: adapter for adapter in adapters}
    found = {}
    for key, tensor in own.items():
        name, _, part = key.rpartition(".")
        module = name.removesuffix(".base_layer")
        adapter = modules.get(module) or modules.get(module.removeprefix(PREFIX))
        if adapter is None:
            raise ValueError(f"convert: {shown(key)} is beneath no adapter of the file; expected one, or no such key")
        found[with_names([adapter], rename)[0].module, part] = tensor
    return found


def _fan_in_fan_out(source: Path) -> bool | None:
    path = source / ADAPTER_CONFIG if os.path.isdir(source) else source.parent / ADAPTER_CONFIG
    known = os.path.isdir(source) or any(source.name in row.files for row in FORMATS.values())
    return read_config("convert", path).get("fan_in_fan_out") if known and os.path.lexists(path) else None
