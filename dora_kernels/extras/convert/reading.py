"""read_adapters: the adapters of a file or folder, of a format that is given or found by trying all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from torch import Tensor

from dora_kernels.extras.convert import files
from dora_kernels.extras.convert.adapter import DTYPES, DoraAdapter
from dora_kernels.extras.convert.coding import begins, decode, known_keys
from dora_kernels.extras.convert.formats import FORMATS, Checkpoint, Format
from dora_kernels.extras.convert.scaling import InMetadata, InTensor, Unstated, component
from dora_kernels.files.reading import shown
from dora_kernels.functional.arguments import check_choice, check_flag, check_number, check_path

_BENEATH = re.compile(r".+\.base_layer\.(weight|bias)")


def read_adapters(
    source: str | PathLike[str],
    source_format: str | None = None,
    *,
    alpha: float | None = None,
    allow_nonfinite: bool = False,
) -> tuple[str, list[DoraAdapter]]:
    """The name of the format and the adapters of `source`, by module name, as the file has them.

    source_format None: the one format that accounts for every key; where several do, they have to say the same. alpha:
    for a source that does not state it. Raises ValueError as `decode` does, where no format fits or several differ,
    and for NaN and infinite values unless allow_nonfinite.
    """
    return _read(source, source_format, alpha, allow_nonfinite, None)


def read_apart(
    source: str | PathLike[str], source_format: str | None, alpha: float | None, allow_nonfinite: bool
) -> tuple[str, list[DoraAdapter], dict[str, Tensor]]:
    """`read_adapters`, and by its key in the file what is the model's own, which that refuses.

    PEFT saves it beside the adapter of a head or an embedding (save_embedding_layers). Who asks for it has to compare
    it with the model, which may have been resized before it was trained.
    """
    beneath: dict[str, Tensor] = {}
    return (*_read(source, source_format, alpha, allow_nonfinite, beneath), beneath)


def _read(
    source: str | PathLike[str],
    source_format: str | None,
    alpha: float | None,
    allow_nonfinite: bool,
    beneath: dict[str, Tensor] | None,
) -> tuple[str, list[DoraAdapter]]:
    check_path("convert", "source", source)
    if source_format is not None:
        check_choice("convert", "source_format", source_format, tuple(FORMATS))
    alpha = None if alpha is None else check_number("convert", "alpha", alpha)
    check_flag("convert", "allow_nonfinite", allow_nonfinite)
    source = Path(source)
    if source_format is None:
        row, checkpoint, adapters = _found(source, alpha, beneath)
    else:
        row = FORMATS[source_format]
        checkpoint = _without(files.load(row, source), beneath)
        try:
            adapters = decode(row, checkpoint, alpha)
        except ValueError as error:
            raise _of(source, error) from error
    if not allow_nonfinite:
        check_finite(source, checkpoint.tensors)
    return row.name, adapters


def check_finite(source: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for the first tensor with a value that is NaN or infinite, and say how many it has."""
    for key in sorted(tensors):
        tensor = tensors[key]
        bad = int((~tensor.isfinite()).sum()) if tensor.dtype in DTYPES else 0
        if bad:
            raise ValueError(
                f"convert: {shown(source)}: {shown(key)} has {bad} of {tensor.numel()} values that are NaN or "
                "infinite; expected finite ones, or --allow-nonfinite"
            )


def _without(checkpoint: Checkpoint, beneath: dict[str, Tensor] | None) -> Checkpoint:
    """The checkpoint without the model's own tensors, which are put into `beneath`; all of it where that is None."""
    if beneath is None:
        return checkpoint
    beneath.update({key: tensor for key, tensor in checkpoint.tensors.items() if _BENEATH.fullmatch(key)})
    return replace(checkpoint, tensors={key: it for key, it in checkpoint.tensors.items() if key not in beneath})


def _found(
    source: Path, alpha: float | None, beneath: dict[str, Tensor] | None
) -> tuple[Format, Checkpoint, list[DoraAdapter]]:
    """The row and the adapters of the one format that `source` is in, and what they were made of."""
    fit: list[tuple[Format, Checkpoint, list[DoraAdapter]]] = []
    unstated: dict[str, ValueError] = {}
    refused: list[tuple[tuple[int, bool], str, ValueError]] = []
    for row, checkpoint in _candidates(source, beneath):
        try:
            fit.append((row, checkpoint, decode(row, checkpoint, alpha)))
        except Unstated as error:
            unstated[row.name] = error
        except ValueError as error:
            modules_named = row.name == "diffusers" and all(map(component, checkpoint.tensors))
            refused.append(((known_keys(row, checkpoint.tensors), modules_named), row.name, error))
    if unstated and alpha is None and all(_is_supposed(*found) for found in fit):
        if len(unstated) == 1 and not fit:
            raise _of(source, *unstated.values())
        supposed = f", or --from {fit[0][0].name}, which takes the rank for it" if fit else ""
        raise ValueError(
            f"convert: {shown(source)} may be {', '.join(unstated)}, and states no alpha; expected --alpha, the value "
            f"it was trained with{supposed}"
        )
    if fit:
        first, *others = fit
        for row, _, adapters in others:
            if len(adapters) != len(first[2]) or not all(a.same(b) for a, b in zip(first[2], adapters, strict=True)):
                raise ValueError(
                    f"convert: {shown(source)} may be {first[0].name} or {row.name}, which read it differently; "
                    "expected --from to say which"
                )
        _check_rows(source, *first)
        return first
    (most, _), name, error = max(refused, key=lambda reason: reason[0])
    if not most:
        raise ValueError(f"convert: {shown(source)} has no key of any format's; expected one of {', '.join(FORMATS)}")
    raise _of(source, error, f"as {name}, which is nearest: ") from error


def _check_rows(source: Path, row: Format, checkpoint: Checkpoint, adapters: Sequence[DoraAdapter]) -> None:
    """Raise ValueError for rows of `dora_scale` without an `alpha` beside, which no trainer writes that means the sum.

    LyCORIS and OneTrainer write both. What has alpha in lora_B was made for ComfyUI, and its rows may be as that reads
    them, over the norm of the base's weight.
    """
    for a in adapters if row.magnitude == "dora_scale" else ():
        if a.magnitude is not None and a.norm_axis == "out" and f"{a.module}.alpha" not in checkpoint.tensors:
            raise ValueError(
                f"convert: {shown(source)}: {shown(a.module)} has a norm over rows and no alpha, as files for ComfyUI "
                f"of which it is that of the base's weight alone; expected --from {row.name} where it is of the sum"
            )


def _is_supposed(row: Format, checkpoint: Checkpoint, adapters: Sequence[DoraAdapter]) -> bool:
    """True where nothing says alpha, and the format takes the rank for it."""
    modules = [adapter.module for adapter in adapters]
    supposes = isinstance(row.scaling, (InMetadata, InTensor)) and row.scaling.supposes
    return bool(supposes) and supposes(modules, checkpoint.tensors, checkpoint.header)


def _candidates(source: Path, beneath: dict[str, Tensor] | None) -> list[tuple[Format, Checkpoint]]:
    """The formats that may be asked: of those whose alpha is in a header or an adapter_config.json, if there is one."""
    checkpoints: dict[Path, Checkpoint] = {}
    loaded = []
    for row in FORMATS.values():
        path = files.weights_of(row, source)
        if path is not None:
            if path not in checkpoints:  # read once, with its config if any format has one beside a file of this name
                named = next((other for other in FORMATS.values() if path.name in other.files), row)
                checkpoints[path] = _without(files.load_weights(named, path), beneath)
            checkpoint = checkpoints[path]
            others = bool(checkpoint.config) and path.name not in row.files
            loaded.append((row, replace(checkpoint, config={}) if others else checkpoint))
    if not loaded:
        names = ", ".join(dict.fromkeys(name for row in FORMATS.values() for name in row.files))
        raise ValueError(f"convert: {shown(source)} holds none of {names}; expected a folder with one, or a file")
    prefixed = [pair for pair in loaded if begins(pair[0], pair[1].tensors)]
    loaded = prefixed or loaded
    configured = [pair for pair in loaded if pair[1].config and pair[0].folder]
    headed = [pair for pair in loaded if getattr(pair[0].scaling, "header", None) in pair[1].header]
    return configured or headed or loaded


def _of(source: Path, error: ValueError, said: str = "") -> ValueError:
    return ValueError(f"convert: {shown(source)}: {said}{str(error).removeprefix('convert: ')}")
