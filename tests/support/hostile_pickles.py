"""Files of torch.save as a stranger may make them: in both of its formats, with other pickles and other records."""

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.peft_meaning import K, N, R

NAMES = ("lora_a.weight", "lora_b.weight", "magnitude")


def state_dict(module: str = "a") -> dict[str, Tensor]:
    """One adapter by torchtune's names."""
    random = torch.Generator().manual_seed(0)
    shapes = (R, K), (N, R), (N,)
    return {
        f"{module}.{name}": torch.randn(*shape, generator=random) for name, shape in zip(NAMES, shapes, strict=True)
    }


def saved(content: object, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def rezipped(
    archive: bytes, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED
) -> bytes:
    """An archive with every record through `change`, which is given its name; None leaves it out."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as before, zipfile.ZipFile(made, "w", compression) as after:
        for name in before.namelist():
            content = change(name, before.read(name))
            if content is not None:
                after.writestr(name, content)
    return made.getvalue()


def with_pickle(archive: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """An archive with another pickle."""
    return rezipped(archive, lambda name, content: change(content) if name.endswith("data.pkl") else content)


NUMBERS = (0, 1, 3, 255, 2**16 - 1, 2**31 - 1)
GLOBALS = ("os system", "builtins eval", "torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch HalfStorage")
GLOBALS += ("torch float32", "torch _dynamo", "torch.serialization load", "collections OrderedDict", "torch.nn Linear")
GLOBALS += ("torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor", "torch QInt8Storage", "torch Size")
OPCODES = tuple(opcode for opcode in pickletools.opcodes if opcode.arg is None)


@st.composite
def mutated_pickle(draw: st.DrawFn, program: bytes) -> bytes:
    """The program with one to three of its instructions gone, twice, elsewhere, or with another argument."""
    for _ in range(draw(st.integers(1, 3))):
        places = [place for _, _, place in pickletools.genops(program)] + [len(program)]
        steps = [program[begin:end] for begin, end in zip(places, places[1:], strict=False)]
        which, kind = draw(st.integers(0, len(steps) - 1)), draw(st.integers(0, 6))
        if kind == 0:
            del steps[which]
        elif kind == 1:
            steps.insert(which, steps[which])
        elif kind == 2:
            other = draw(st.integers(0, len(steps) - 1))
            steps[which], steps[other] = steps[other], steps[which]
        elif kind == 3:
            steps.insert(which, draw(st.sampled_from(OPCODES)).code.encode("latin-1"))
        elif kind == 4:
            steps[which] = b"J" + struct.pack("<i", draw(st.sampled_from((*NUMBERS, -1, -(2**31)))))
        elif kind == 5:
            steps[which] = f"c{draw(st.sampled_from(GLOBALS)).replace(' ', chr(10))}\n".encode()
        else:
            steps[which] = b"\x8a\x09" + (2**64 - 1).to_bytes(9, "little")
        program = b"".join(steps)
        try:
            list(pickletools.genops(program))
        except Exception:  # no longer one that can be taken apart
            break
    return program


# An odd tensor in the place of lora_a (R, K), and what is right: True where it has to be taken, with its numbers.
ODD: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "every other column": (lambda t: torch.cat((t, t), 1)[:, ::2], True),
    "transposed": (lambda t: t.T.contiguous().T, True),
    "expanded": (lambda t: t[:1].expand(R, K), True),
    "one number": (lambda t: torch.ones(1).expand(R, K), True),
    "overlapping": (lambda t: t.flatten().as_strided((R, K), (1, 1)), True),
    "part of a large one": (lambda t: torch.cat([t] * 1000)[:R], True),
    "a parameter": (nn.Parameter, True),
    "with a gradient": (lambda t: t.clone().requires_grad_(), True),
    "with an attribute": (lambda t: setattr(t, "note", "x") or t, True),
    "negative bit": (lambda t: torch.complex(t, t).conj().imag, True),
    "half": (lambda t: t.half(), True),
    "bfloat16": (lambda t: t.bfloat16(), True),
    "float64": (lambda t: t.double(), True),
    "not finite": (lambda t: t * float("nan"), False),
    "complex": (lambda t: torch.complex(t, t), False),
    "conjugated": (lambda t: torch.complex(t, t).conj(), False),
    "int8": (lambda t: t.to(torch.int8), False),
    "bool": (lambda t: t > 0, False),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), False),
    "uint16": (lambda t: t.to(torch.uint16), False),
    "sparse": (lambda t: t.to_sparse(), False),
    "CSR": (lambda t: t.to_sparse_csr(), False),
    "BSR": (lambda t: t[:, :4].contiguous().to_sparse_bsr((2, 2)), False),
    "nested": (lambda t: torch.nested.nested_tensor([t, t]), False),
    "jagged": (lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged), False),
    "meta": (lambda t: t.to("meta"), False),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), False),
    "channels quantized": (
        lambda t: torch.quantize_per_channel(t, torch.ones(R), torch.zeros(R), 0, torch.qint8),
        False,
    ),
    "0-d": (lambda t: t.sum(), False),
    "six axes": (lambda t: t[None, None, None, None], False),
    "nothing in it": (lambda t: t[:, :0], False),
    "16 TB": (lambda t: torch.ones(1).expand(R, 10**12), False),
    "40 GB": (lambda t: torch.ones(1).expand(R, 10**10 // R), False),
    "a number": (lambda t: 3, False),
    "none": (lambda t: None, False),
    "a list": (lambda t: t.tolist(), False),
    "a storage": (lambda t: t.untyped_storage(), False),
    "a dict": (lambda t: {"weight": t}, False),
    "a size": (lambda t: t.size(), False),
    "a layer": (lambda t: nn.Linear(2, 2), False),
    "a buffer": (nn.Buffer, True),
}

# What a state dict may be instead of one, and keys that are no names.
OTHERS: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: torch.ones(3),
    "a list": lambda: list(state_dict().values()),
    "nothing": lambda: None,
    "a dict of state dicts": lambda: {"state_dict": state_dict()},
    "integer keys": lambda: dict(enumerate(state_dict().values())),
    "one integer key": lambda: state_dict() | {3: torch.ones(1)},
    "bytes": lambda: state_dict() | {b"a": torch.ones(1)},
    "a tuple": lambda: state_dict() | {("a", "b"): torch.ones(1)},
    "none as a key": lambda: state_dict() | {None: torch.ones(1)},
    "a key of 10^5 letters": lambda: state_dict() | {"a" * 10**5: torch.ones(1)},
    "no keys": dict,
    "2,000 views of one storage": lambda: {f"a{i}.lora_a.weight": VIEW for i in range(2000)},
    "2,000 views of 4 MB": lambda: {f"a{i}.lora_a.weight": torch.ones(1).expand(1000, 1000) for i in range(2000)},
}
VIEW = torch.ones(R, K)


class Storage:
    """Stands for a storage in a pickle made by `described`."""

    def __init__(self, key: object, elements: object, kind: type = torch.FloatStorage) -> None:
        self.id = ("storage", kind, key, "cpu", elements)


class View:
    """Stands for a tensor: whatever storage, offset, size and strides are said."""

    def __init__(self, storage: object, offset: object, size: object, stride: object) -> None:
        self.arguments = (storage, offset, size, stride, False, {})

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    more: tuple[Any, ...] = ()

    def persistent_id(self, value: object) -> Any:
        return value.id + self.more if isinstance(value, Storage) else None


def dumped(value: object, more: tuple[Any, ...] = ()) -> bytes:
    """A pickle. more: of what stands for a storage."""
    file = io.BytesIO()
    pickler = _Pickler(file, protocol=2)
    pickler.more = more
    pickler.dump(value)
    return file.getvalue()


def archive(value: object, records: dict[str, bytes]) -> bytes:
    """A zip file as torch.save makes it of Views and Storages, with these records."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("x/data.pkl", dumped(value))
        file.writestr("x/byteorder", b"little")
        for key, content in records.items():
            file.writestr(f"x/data/{key}", content)
        file.writestr("x/version", b"3\n")
    return made.getvalue()


def legacy(value: object, keys: object, records: list[tuple[int, bytes]]) -> bytes:
    """The format from before torch 1.6: `keys` says which storages follow, each with its number of elements."""
    # None: the storage is no part of another one
    head = [dumped(part, (None,)) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, value, keys)]
    return b"".join(head) + b"".join(struct.pack("<q", count) + content for count, content in records)


def doubled(depth: int = 60) -> tuple[Any, ...]:
    """A tuple of the same tuple twice, and so on: 2^60 parts to whoever looks at each."""
    made: tuple[Any, ...] = ()
    for _ in range(depth):
        made = (made, made)
    return made


def deep(depth: int) -> bytes:
    """A pickle of a tuple in a tuple, and so on."""
    return b"\x80\x02)" + b"\x85" * depth + b"."


def running(command: str) -> list[bytes]:
    """Pickles that run a command where they are loaded without care."""
    text = command.encode()
    binunicode = b"X" + struct.pack("<I", len(text)) + text
    return [
        b"\x80\x02cos\nsystem\n" + binunicode + b"\x85R.",
        b"cposix\nsystem\n(V" + text + b"\ntR.",
        b"(V" + text + b"\nios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93" + binunicode + b"\x85R.",
        b"\x80\x02}X\x01\x00\x00\x00acos\nsystem\n" + binunicode + b"\x85Rs.",
        b"\x80\x02ctorch.serialization\nload\n" + binunicode + b"\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\ncos\nsystem\n" + binunicode + b"\x85R\x85R.",
        b"\x80\x02cbuiltins\neval\n" + binunicode.replace(text, text) + b"\x85R.",
    ]


def files_around(program: bytes) -> list[bytes]:
    """The program as a file, in torch.save's archive, and in its format from before 1.6."""
    head = b"".join(dumped(part) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    made = with_pickle(saved(state_dict()), lambda content: program)
    return [program, made, head + program + dumped([]), b"\x80\x02" + program, head[:40] + program]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
