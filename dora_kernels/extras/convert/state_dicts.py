"""State dicts in the files of torch.save, held against the bytes that a file has before any of them is taken.

Not by torch.load(weights_only=True): where a file in the format from before torch 1.6 forgets a storage, that gives
memory as it was found (seen with 2.11 and 2.13), and some pickles of 500 bytes keep it for ever (pickles.py).
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dora_kernels.extras.checkpoint_files import MOST_DIMENSIONS
from dora_kernels.extras.convert.pickles import Named, Storage, View, described
from dora_kernels.files.reading import check_regular, shown, unreadable

# of files from before torch 1.6, and of _use_new_zipfile_serialization=False
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001

FLOOR, TIMES = 64 << 20, 4
"""All tensors together may have so many bytes, or so many times those of the file, once they are contiguous. Two may
have the same storage; and one that was expanded, of any size, has a storage of one number."""

Content = Mapping[str, bytearray]


def load_state_dict(function: str, path: Path) -> dict[str, Tensor]:
    """The tensors in a file of torch.save, as the views that were saved. Raises ValueError for whatever else it has."""
    size = check_regular(function, path)
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\3\4"
            file.seek(0)
            found, content = _from_zip(file, size) if is_zip else _from_pickles(file, size)
        if not isinstance(found, dict):
            raise ValueError("it does not hold tensors by name")
        for key, value in found.items():
            _check(key, value, content)
        needed = sum(math.prod(view.size) * view.dtype.itemsize for view in found.values())
        if needed > max(FLOOR, TIMES * size):
            raise ValueError(f"its {size} bytes ask for {needed}, more than {TIMES} times as many")
        return {key: _tensor(view, content) for key, view in found.items()}
    except Exception as error:  # of which damaged bytes may raise any
        raise unreadable(function, path, error, "a state dict of dense tensors and nothing else") from error


def _check(key: str, view: Any, content: Content) -> None:
    """Raise ValueError unless `view` is a tensor of numbers that are there."""
    if not isinstance(view, View):
        found = f"made by {view.name}" if isinstance(view, Named) else f"of type {type(view).__name__}"
        raise ValueError(f"{shown(key)} is {shown(found)}")
    shape = (*view.size, *view.stride, view.offset)
    if len(view.size) != len(view.stride) or len(view.size) > MOST_DIMENSIONS:
        raise ValueError(f"{shown(key)} has {len(view.size)} sizes and {len(view.stride)} strides")
    if not all(type(number) is int and 0 <= number < 2**63 for number in shape):  # not shown, as in _key of pickles.py
        raise ValueError(f"{shown(key)} has a size, a stride or an offset that is no integer, or none of a tensor's")
    last = view.offset + sum((size - 1) * stride for size, stride in zip(view.size, view.stride, strict=True))
    storage, there = view.storage, len(content.get(view.storage.key, b""))
    if there != storage.bytes or (0 not in view.size and (last + 1) * view.dtype.itemsize > there):
        raise ValueError(f"{shown(key)} has a storage of {there} bytes; expected {storage.bytes}, and its last number")


def _tensor(view: View, content: Content) -> Tensor:
    numbers = content[view.storage.key]
    flat = torch.frombuffer(numbers, dtype=view.dtype) if numbers else torch.empty(0, dtype=view.dtype)
    tensor = flat.as_strided(view.size, view.stride, view.offset)
    if view.metadata.get("neg"):
        tensor = torch._neg_view(tensor)
    return tensor.conj() if view.metadata.get("conj") else tensor


def _from_zip(file: IO[bytes], size: int) -> tuple[Any, Content]:
    """The object and its storages in an archive: data.pkl, and a record for each storage.

    torch compresses none, and no two of its records overlap: so the file bounds what comes out of it.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("a record is compressed")
        if sum(record.file_size for record in records) > size:
            raise ValueError("its records are larger than the file")
        for record in records:
            record.CRC = record.CRC or None  # torch.serialization.set_crc32_options(False) writes 0: none was computed
        named = {record.filename: record for record in records}
        (root,) = (name.removesuffix("data.pkl") for name in named if name.endswith("/data.pkl"))
        order = named.get(f"{root}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise ValueError("its numbers are big-endian")
        found = described(io.BytesIO(archive.read(named[f"{root}data.pkl"])))
        folder = f"{root}data/"
        content = {
            name.removeprefix(folder): bytearray(archive.read(record))
            for name, record in named.items()
            if name.startswith(folder)
        }
    return found, content


def _from_pickles(file: IO[bytes], size: int) -> tuple[Any, Content]:
    """The object and its storages in a file from before torch 1.6.

    It is one pickle after another: two numbers that say what it is, the machine, the object, the keys of its storages;
    and then these, each with the number of its elements before it.
    """
    if (described(file), described(file)) != (_MAGIC, _VERSION):
        raise ValueError("it is no file of torch.save")
    described(file)
    storages: dict[str, Storage] = {}
    found = described(file, storages)
    content = {}
    for key in described(file):
        if type(key) is not str or key not in storages:  # of a tensor that is refused: a quantized one's
            break
        (elements,) = struct.unpack("<q", file.read(8))
        if elements != storages[key].elements or not 0 <= storages[key].bytes <= size:
            raise ValueError(f"storage {shown(key)} has {elements} elements; expected {storages[key].elements}")
        content[key] = bytearray(file.read(storages[key].bytes))
    return found, content
