"""The adapter: any that convert reads, by the names and with the rows of the base."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dora_kernels.extras.checkpoint_files import ADAPTER_CONFIG
from dora_kernels.extras.convert import FORMATS, DoraAdapter, read_adapters
from dora_kernels.extras.convert.checkpoint import _check_rename, _checked_heads, _renamed, _reordered
from dora_kernels.extras.schema import read_config


def read(
    source: Path,
    source_format: str | None,
    alpha: float | None,
    rename: Sequence[tuple[str, str]],
    heads: tuple[int, int] | None,
    same_rows: bool,
    allow_nonfinite: bool,
) -> tuple[str, list[DoraAdapter], bool | None]:
    """The format's name, the adapters, and what adapter_config.json says of fan_in_fan_out, None where nothing."""
    try:
        name, adapters = read_adapters(source, source_format, alpha=alpha, allow_nonfinite=allow_nonfinite)
        adapters = _renamed(adapters, rename)
        if name == "torchtune":
            adapters = _reordered(adapters, to_torchtune=False, heads=heads, same_rows=same_rows)
        elif heads is not None:
            raise ValueError(f"convert: heads is {heads}; expected None, for {name} keeps the rows as the model does")
        return name, adapters, _fan_in_fan_out(source)
    except ValueError as error:
        raise ValueError(f"merge: {str(error).removeprefix('convert: ')}") from error


def checked_heads(
    rename: Sequence[tuple[str, str]], heads: tuple[int, int] | None, same_rows: bool
) -> tuple[int, int] | None:
    """`heads` as ints. Raises ValueError unless they and `rename` are what `convert` takes."""
    try:
        _check_rename(rename)
        heads = None if heads is None else _checked_heads(heads)
    except ValueError as error:
        raise ValueError(f"merge: {str(error).removeprefix('convert: ')}") from error
    if heads is not None and same_rows:
        raise ValueError("merge: heads and same_rows are both given; expected one of them")
    return heads


def _fan_in_fan_out(source: Path) -> bool | None:
    path = source / ADAPTER_CONFIG if os.path.isdir(source) else source.parent / ADAPTER_CONFIG
    known = os.path.isdir(source) or any(source.name in row.files for row in FORMATS.values())
    return read_config("convert", path).get("fan_in_fan_out") if known and os.path.lexists(path) else None
