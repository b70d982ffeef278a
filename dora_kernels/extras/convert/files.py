"""Checkpoints on disk: read with safetensors or as torch.save's state dicts, written with safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dora_kernels.extras.checkpoint_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TensorFiles
from dora_kernels.extras.convert.formats import Checkpoint, Format
from dora_kernels.extras.convert.state_dicts import load_state_dict
from dora_kernels.extras.schema import read_config
from dora_kernels.files import writing
from dora_kernels.files.reading import shown

# what torch.save made; everything else is taken for safetensors
_PICKLES = (".bin", ".pt", ".pth")
PIPELINE = "model_index.json"


def weights_of(row: Format, source: Path) -> Path | None:
    """The file of the tensors: `source`, or in a folder the first of row.files, None where it has none of them."""
    if os.path.isdir(source):
        return next((source / name for name in row.files if os.path.lexists(source / name)), None)
    if not os.path.lexists(source):
        raise ValueError(f"convert: {shown(source)} does not exist; expected a {row.name} file or folder")
    return source


def load(row: Format, source: Path) -> Checkpoint:
    """The checkpoint in a folder, one of row.files and adapter_config.json, or in a file.

    A file by one of row.files' names brings the adapter_config.json beside it. Raises ValueError where there is none,
    or it cannot be read.
    """
    path = weights_of(row, source)
    if path is None:
        raise ValueError(f"convert: {shown(source)} holds none of {', '.join(row.files)}; expected a {row.name} folder")
    return load_weights(row, path)


def load_weights(row: Format, path: Path) -> Checkpoint:
    """The checkpoint of which `path` is the file of tensors, as `load` has it."""
    tensors, header = _tensors(path)
    config_path = path.parent / ADAPTER_CONFIG
    has_config = path.name in row.files and os.path.lexists(config_path)
    return Checkpoint(tensors, read_config("convert", config_path) if has_config else {}, header)


def save(row: Format, checkpoint: Checkpoint, out: Path) -> None:
    """Write a folder or one file, as the format needs, whole or not at all.

    Raises ValueError where `out` exists, also if it does by the end, and OSError where the disk refuses.
    """
    with writing.creating("convert", out) as made:
        if row.folder:
            made.mkdir()
            (made / ADAPTER_CONFIG).write_text(json.dumps(checkpoint.config, indent=2) + "\n", encoding="utf-8")
        weights, header = made / ADAPTER_WEIGHTS if row.folder else made, {"format": "pt", **checkpoint.header}
        try:
            save_file(_apart(checkpoint.tensors), weights, header)
        except SafetensorError as error:  # whatever the system said to it, in words
            raise OSError(f"convert: {out} cannot be written: {error}") from error


def check_out(out: Path) -> None:
    """Raise ValueError unless `out` can be made: nothing there, and a folder above it that may be written."""
    if os.path.lexists(out):
        raise ValueError(f"convert: {out} exists; expected a name that is free")
    writing.check_target("convert", "out", out)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: contiguous, each in memory of its own; only the others are copied."""
    result = {key: tensor.detach().resolve_neg().contiguous() for key, tensor in tensors.items()}
    end = 0
    for key, tensor in sorted(result.items(), key=lambda item: item[1].data_ptr()):
        start = tensor.data_ptr()
        if start < end:
            result[key] = tensor.clone()
        end = max(end, start + tensor.nbytes)
    return result


def keys_of(base: Path) -> Collection[str]:
    """The names of all tensors of a model: one .safetensors file, or a folder of them. Reads no tensor.

    Of a pipeline of diffusers', a folder with model_index.json, those of each model behind the name of its folder.
    """
    if os.path.lexists(base / PIPELINE):
        folders = sorted({path.parent for path in base.glob("*/*.safetensors")})
        keys = [f"{folder.name}.{key}" for folder in folders for key in keys_of(folder)]
        if keys:
            return keys
    paths = sorted(base.glob("*.safetensors")) if os.path.isdir(base) else [base]
    if not paths or not os.path.lexists(base):
        raise ValueError(f"convert: {shown(base)} holds no .safetensors; expected the model beneath the adapters")
    return TensorFiles("convert", base, paths).shapes.keys()


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix in _PICKLES:
        return load_state_dict("convert", path), {}
    file = TensorFiles("convert", path, [path])
    return {key: file[key] for key in file.shapes}, file.metadata
