"""Descriptions of the tensors in a pickle of torch.save. Nothing is run: no opcode calls or imports what it names.

A pickle is a program. torch.load(weights_only=True) runs it over a list of functions that do no harm; but they take a
stranger's arguments, and a key that is a tuple of one tuple twice, and so on 60 deep, is hashed for ever. Here the
opcodes, which the standard library's pickletools reads, make numbers, names, and descriptions of tensors alone.
"""

from __future__ import annotations

import pickletools
from collections.abc import Mapping
from typing import IO, Any, NamedTuple

import torch

from dora_kernels.extras.checkpoint_files import MOST_LETTERS

MOST_OPCODES = 10_000_000
"""Of a pickle: 10^5 tensors have 3 * 10^6. So many took at most 8 s and 1 GB, of the kinds that take the most."""

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"} | {
    f"{short}{kind}" for short in ("", "SHORT_") for kind in ("BINUNICODE", "BINSTRING")
}
_STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
    }.items()
} | {"torch.storage.UntypedStorage": torch.uint8}  # fmt: skip
_PLAIN = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")


class Named(NamedTuple):
    """A name of a pickle's, or what it makes by calling that, of which no more is known."""

    name: str


class Storage(NamedTuple):
    """The numbers of one or more tensors."""

    key: str
    dtype: torch.dtype
    elements: int

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


class View(NamedTuple):
    """A dense tensor: what torch.Tensor.as_strided takes, and the storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    metadata: Mapping[str, Any]
    """{"neg": True}: its numbers are those of the storage with their sign turned; {"conj": True}: conjugated."""


def described(file: IO[bytes], storages: dict[str, Storage] | None = None) -> Any:
    """The object that the pickle at the place of `file` describes, up to its end; fills `storages`.

    Dicts, lists, tuples, numbers, strings, dtypes, Storage, View, and Named for all else. Raises ValueError for opcodes
    that torch.save has no use for, and whatever a damaged pickle leads to.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def cut(start: int) -> list[Any]:
        items = stack[start:]
        del stack[start:]
        return items

    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if count > MOST_OPCODES:
            raise ValueError(f"it has more than {MOST_OPCODES} opcodes")
        if name in ("PROTO", "FRAME"):
            continue
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"):
            stack.append({"TUPLE": (), "LIST": [], "DICT": {}}[name.removeprefix("EMPTY_")])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(cut(marks.pop())))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(cut(-int(name[-1]))))
        elif name in ("APPEND", "APPENDS"):
            items = cut(-1 if name == "APPEND" else marks.pop())
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = cut(-2 if name == "SETITEM" else marks.pop())
            for key, value in zip(items[::2], items[1::2], strict=True):
                stack[-1][_key(key)] = value
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_named(argument.replace(" ", ".") if name == "GLOBAL" else ".".join(cut(-2))))
        elif name == "BINPERSID":
            storage = _storage(*stack.pop())
            stack.append(storage)
            if storages is not None and isinstance(storage, Storage):
                storages[storage.key] = storage
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(_made(*cut(-2)))
        elif name == "BUILD":  # attributes, which are no part of a tensor's values
            stack.pop()
        elif name == "STOP":
            return stack.pop()
        else:
            raise ValueError(f"the opcode {name} is no part of a state dict")
    raise ValueError("its pickle has no end")


def _key(key: object) -> str:
    """`key`, if it is a name. Others are not hashed, which may take for ever, nor is their repr asked for."""
    if type(key) is str and len(key) <= MOST_LETTERS:
        key.encode()  # ValueError for half a letter, which no safetensors file holds
        return key
    found = f"{key!r:.80}" if type(key) in (str, int) else f"of type {type(key).__name__}"
    raise ValueError(f"a key is {found}; expected a name of at most {MOST_LETTERS} letters")


def _named(name: str) -> Any:
    # not by getattr, which imports torch.onnx and others of which there is the name alone
    dtype = vars(torch).get(name.removeprefix("torch.")) if name.startswith("torch.") else None
    return dtype if isinstance(dtype, torch.dtype) else _STORAGES.get(name, Named(name))


def _storage(kind: str, dtype: Any, key: str, location: str, elements: int, view: None = None) -> Storage | Named:
    """The storage of a persistent id; a Named where its dtype is none of ours, as a quantized tensor's."""
    # torch has written no view of a storage since its first releases
    if (kind, view, type(key), type(elements)) != ("storage", None, str, int):
        raise ValueError("it has a storage that is none of torch.save's")
    return Storage(key, dtype, elements) if isinstance(dtype, torch.dtype) else Named("a storage of another dtype")


def _made(by: Named, arguments: tuple[Any, ...]) -> Any:
    """The tensor that torch would make of the arguments. An object that we know nothing of is a Named."""
    match by.name.removeprefix("torch._utils."), arguments:
        case "collections.OrderedDict", ():
            return {}
        case "_rebuild_tensor_v2", (Storage() as storage, offset, size, stride, _, _, *metadata):
            return View(storage, offset, size, stride, storage.dtype, *metadata or [{}])
        case "_rebuild_tensor_v3", (
            Storage() as storage,
            offset,
            size,
            stride,
            _,
            _,
            torch.dtype() as dtype,
            *metadata,
        ):
            return View(storage, offset, size, stride, dtype, *metadata or [{}])
        case "_rebuild_parameter" | "_rebuild_parameter_with_state", (View() as data, *_):
            return data
        case "torch._tensor._rebuild_from_type_v2", (function, kind, values, _) if kind in map(Named, _PLAIN):
            return _made(function, values)
    return Named(by.name)
