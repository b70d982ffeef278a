"""The base: its shards with the place of each tensor in them, its config, and the files beside."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_kernels.extras.checkpoint_files import ADAPTER_CONFIG, TensorFiles
from dora_kernels.extras.schema import ModelConfig, ModelIndex, read_json
from dora_kernels.files.reading import check_regular, shown, unreadable

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
"""transformers' and diffusers' names; an index has ".index.json" behind."""

_COPIES = re.compile(
    r"(.*\.safetensors(\.index\.json)?|(pytorch_model|diffusion_pytorch_model|consolidated|adapter_model)"
    r".*\.(bin|pth?|pkl)(\.index\.json)?|.*\.(gguf|ggml|onnx|onnx_data|h5|msgpack|ot|ckpt|tflite|nemo))"
)
"""Files of a checkpoint's folder that hold its weights once more, and would be those before the merge."""
_FOLDERS = {".git", ".cache", "original", "metal", "onnx", "openvino", "coreml"}
"""Folders of the same, and what says of each file where it was downloaded from."""

_COMPARED = 1 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor in a shard: its bytes are those from `start` to `end` of the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Source:
    """A file that is read: its path, and what it was when it was looked at."""

    path: Path
    state: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.state[2]

    @classmethod
    def of(cls, path: Path) -> Source:
        check_regular("merge", path)
        return cls(path, _state(os.stat(path)))

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Its descriptor. Raises ValueError where it is not, or at the end no longer, what was looked at."""
        try:
            number = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            raise unreadable("merge", self.path, error) from error
        try:
            self._check(number)
            yield number
            self._check(number)
        finally:
            os.close(number)

    def _check(self, number: int) -> None:
        if _state(os.fstat(number)) != self.state:
            raise ValueError(f"merge: {shown(self.path)} was changed during the merge; expected nobody to write to it")

    def read_into(self, number: int, view: memoryview, start: int) -> None:
        """Fill `view` with the bytes from `start` on. Raises ValueError where there are not so many."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(number, [view[done:]], start + done)
            except OSError as error:
                raise unreadable("merge", self.path, error) from error
            if not count:
                raise ValueError(f"merge: {shown(self.path)} ends before its byte {start + len(view)}; expected it")
            done += count


@dataclass(frozen=True)
class Shard(Source):
    """A safetensors file with its tensors, in the order of their bytes."""

    entries: tuple[Stored, ...] = ()


@dataclass(frozen=True)
class Base:
    """A checkpoint. entries: by key, with the shard of each. others: the files beside, by their names in the folder."""

    path: Path
    folder: bool
    shards: tuple[Shard, ...]
    entries: Mapping[str, tuple[Shard, Stored]]
    config: ModelConfig | None
    others: Mapping[str, Source] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(source.bytes for source in (*self.shards, *self.others.values()))


def open_base(path: Path) -> Base:
    """The checkpoint in a folder or a file. Raises ValueError for another, and for files that cannot be read."""
    if not os.path.isdir(path):
        if not os.path.lexists(path):
            raise ValueError(
                f"merge: {shown(path)} does not exist; expected a folder of a model, or a safetensors file"
            )
        shards, entries = _shards(path, [path], None)
        return Base(path, False, shards, entries, None)
    files, weight_map = _weights(path)
    shards, entries = _shards(path, files, weight_map)
    others, left_out = _others(path, {file.name for file in files})
    has_config = os.path.lexists(path / "config.json")
    config = read_json("merge", path / "config.json", ModelConfig) if has_config else None
    return Base(path, True, shards, entries, config, others, left_out)


def blocks_of(shard: Shard, entry: Stored) -> Iterator[Tensor]:
    """The numbers of a tensor of one of DTYPES, some at a time, in memory that the next ones are read into."""
    memory = memoryview(bytearray(min(_COMPARED, entry.end - entry.start)))
    with shard.opened() as number:
        for start in range(entry.start, entry.end, _COMPARED):
            view = memory[: entry.end - start]
            shard.read_into(number, view, start)
            yield torch.frombuffer(view, dtype=DTYPES[entry.dtype])


def same_bytes(one: tuple[Shard, Stored], other: tuple[Shard, Stored]) -> bool:
    """True for two tensors of one dtype and shape that are equal to the last bit."""
    if one == other or (one[1].dtype, one[1].shape) != (other[1].dtype, other[1].shape):
        return False
    size = one[1].end - one[1].start
    with one[0].opened() as first, other[0].opened() as second:
        for start in range(0, size, _COMPARED):
            parts = [bytearray(min(_COMPARED, size - start)) for _ in range(2)]
            one[0].read_into(first, memoryview(parts[0]), one[1].start + start)
            other[0].read_into(second, memoryview(parts[1]), other[1].start + start)
            if parts[0] != parts[1]:
                return False
    return True


def _weights(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files of a folder's weights, and the index of them if there is one."""
    found = [name for first in WEIGHTS for name in (first, f"{first}.index.json") if os.path.lexists(folder / name)]
    if os.path.lexists(folder / ADAPTER_CONFIG):
        raise ValueError(f"merge: {shown(folder)} is an adapter; expected the folder of a model")
    if len(found) != 1:
        pickled = any(name.startswith("pytorch_model") for name in os.listdir(folder))
        held = f"holds {' and '.join(found)}" if found else "holds no model.safetensors and no index of one"
        saved = ", which save_pretrained writes" if pickled and not found else ""
        if os.path.isdir(folder / "snapshots"):  # of huggingface_hub's cache
            saved = f", which a folder in {shown(folder / 'snapshots')} has"
        raise ValueError(f"merge: {shown(folder)} {held}; expected one of {', '.join(WEIGHTS)} or its index{saved}")
    if not found[0].endswith(".json"):
        return [folder / found[0]], None
    weight_map = read_json("merge", folder / found[0], ModelIndex).weight_map
    return [folder / name for name in dict.fromkeys(weight_map.values())], weight_map


def _shards(
    path: Path, files: list[Path], weight_map: dict[str, str] | None
) -> tuple[tuple[Shard, ...], dict[str, tuple[Shard, Stored]]]:
    sources = [Source.of(file) for file in files]
    tensors = TensorFiles("merge", path, files, weight_map)  # it also holds the headers against the files' sizes
    shards, entries = [], {}
    for source in sources:
        shard = Shard(source.path, source.state, _entries(source))
        shards.append(shard)
        for entry in shard.entries:
            if weight_map is not None and weight_map.get(entry.key) != source.path.name:
                continue
            if (tensors.dtypes.get(entry.key), tensors.shapes.get(entry.key)) != (entry.dtype, entry.shape):
                raise ValueError(f"merge: {shown(source.path)} was changed during the merge; expected it to stay")
            entries[entry.key] = shard, entry
    return tuple(shards), entries


def _entries(source: Source) -> tuple[Stored, ...]:
    """The tensors of a file that TensorFiles has taken, in the order of their bytes.

    8 bytes hold the length of the header, a JSON object {key: {dtype, shape, data_offsets}, "__metadata__": {...}}, and
    offsets count from its end (https://github.com/huggingface/safetensors#format).
    """
    with source.opened() as number:
        length = bytearray(8)
        source.read_into(number, memoryview(length), 0)
        (size,) = struct.unpack("<Q", length)
        if size > source.bytes - 8:
            raise ValueError(f"merge: {shown(source.path)} was changed during the merge; expected it to stay")
        header = bytearray(size)
        source.read_into(number, memoryview(header), 8)
    found: dict[str, Any] = json.loads(header)
    found.pop("__metadata__", None)
    entries = []
    for key, value in found.items():
        start, end = (8 + size + offset for offset in value["data_offsets"])
        entries.append(Stored(key, value["dtype"], tuple(value["shape"]), start, end))
    return tuple(sorted(entries, key=lambda entry: (entry.start, entry.end)))


def _others(folder: Path, weights: set[str]) -> tuple[dict[str, Source], tuple[str, ...]]:
    """The files beside the weights by their names in the folder, behind links, and the names of what is left out."""

    def raises(error: OSError) -> None:
        raise unreadable("merge", error.filename or folder, error, "a folder") from error

    found: dict[str, Source] = {}
    left_out = []
    for root, folders, files in os.walk(folder, onerror=raises):
        here = Path(root).relative_to(folder)
        for name in sorted(folders):
            if here == Path() and name in _FOLDERS:
                left_out.append(f"{name}/")
                folders.remove(name)
            elif os.path.islink(Path(root) / name):
                raise ValueError(f"merge: {shown(Path(root) / name)} is a link to a folder; expected files and folders")
        folders.sort()
        for name in sorted(files):
            if here == Path() and name in weights:
                continue
            if here == Path() and _COPIES.fullmatch(name) and name not in {f"{first}.index.json" for first in WEIGHTS}:
                left_out.append(name)
                continue
            found[str(here / name)] = Source.of(Path(root) / name)
    return found, tuple(left_out)


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
