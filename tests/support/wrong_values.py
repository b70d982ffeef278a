"""Kinds of arguments: values that one takes, and values that it refuses. public_functions.py says which is which."""

import enum
import fractions
import os
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from dora_kernels import DoraLinear
from tests.support.problem import DEVICE

M, N, K, R = 5, 8, 6, 2


@dataclass(frozen=True)
class Argument:
    """takes: values with which a call that is right otherwise is right; refuses: those with which it is a ValueError.

    called: what messages call the argument, where that is not its name alone; shown: words that stand for its value.
    """

    takes: list[Any] = field(default_factory=list)
    refuses: list[Any] = field(default_factory=list)
    called: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()


def optional(argument: Argument) -> Argument:
    """The same, or None."""
    refuses = [value for value in argument.refuses if value is not None]
    return replace(argument, takes=[None, *argument.takes], refuses=refuses)


def of_any_float(argument: Argument) -> Argument:
    """The same, or of float8."""
    narrow = torch.float8_e4m3fn
    refuses = [one for one in argument.refuses if one is not narrow and getattr(one, "dtype", None) is not narrow]
    return replace(argument, refuses=refuses)


def besides(argument: Argument, *refuses: Any, takes: tuple[Any, ...] = (), **words: tuple[str, ...]) -> Argument:
    """The same with more of both."""
    return replace(argument, takes=[*argument.takes, *takes], refuses=[*argument.refuses, *refuses], **words)


def zeros(*shape: int, **arguments: Any) -> torch.Tensor:
    return torch.zeros(shape, **{"device": DEVICE} | arguments)


class Count(enum.IntEnum):
    TWO = 2


class Word(str):
    pass


class Folder:
    """A path to os.fspath alone."""

    def __init__(self, path: str | bytes) -> None:
        self.path = path

    def __fspath__(self) -> str | bytes:
        return self.path


NOT_TENSORS = (
    None,
    3,
    2.5,
    "weight",
    [1.0],
    np.zeros((N, K), dtype=np.float32),
    nn.Linear(K, N),
    torch.float32,
    object,
)
Dict = type("dict", (), {})  # reprlib takes it for Python's
DTYPES = (torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn)
NOT_MODELS = (None, 3, True, "model", b"model", nn.Linear, type, object(), {}, len, zeros(N, K), np.zeros(2), os)
NOT_NUMBERS = (None, "2", b"2", 1j, True, [1.0], torch.tensor(1.0), np.ones(1), np.bool_(True), object(), Dict())
NOT_FINITE = (
    float("nan"),
    float("inf"),
    -float("inf"),
    np.float32("inf"),
    10**400,
    10**5000,
    fractions.Fraction(10**400),
)
NOT_SIZES = (
    None,
    "2",
    2.5,
    np.float64(2),
    True,
    -1,
    -(10**5000),
    float("nan"),
    [2],
    (2,),
    torch.tensor(2),
    torch.Size([2]),
)
NOT_DTYPES = (*DTYPES, "float32", 32, np.float32, np.dtype("float32"), torch.device("cpu"), float, [torch.float32])
NOT_TEXTS = (None, 3, True, b"auto", ["auto"], ("auto",), object(), torch.zeros(2), np.zeros(2), str, {"auto": 1})
NOT_PATHS = ("", 3, True, 2.5, b"file", ["file"], ("file",), object(), torch.zeros(2), open, Folder(b"file"), {"file"})
NOT_CALLABLES = (3, "function", [len], (), {}, zeros(2), object(), True)
NOT_LISTS = (None, 3, "list", b"list", {1}, object(), zeros(2), len, True)

MODEL = Argument([], [*NOT_MODELS, [nn.Linear(K, N)], (nn.Linear(K, N),), {"model": nn.Linear(K, N)}])
OURS = besides(MODEL, nn.Linear(K, N), nn.Sequential(), shown=("no DoRA layer",))
FLAG = Argument([True, False], [None, "no", "True", 1, 0, 0.0, torch.tensor(True), np.bool_(True), [], bool, object()])
SCALING = Argument(
    [2, 0, -1.5, np.float64(0.5), Count.TWO],
    [*NOT_NUMBERS, *NOT_FINITE, fractions.Fraction(1, 2), np.float32(1), np.int64(1)],
)
NUMBER = Argument([2, -1.5, np.float64(0.5), np.float32(0.5), np.int64(3), Count.TWO], [*NOT_NUMBERS, *NOT_FINITE])
PROBABILITY = Argument([0, 0.5, np.float32(0.5)], [*NOT_NUMBERS, *NOT_FINITE, -0.1, 1.0, 1, 2])
COUNT = Argument([np.int64(2), np.uint8(2), Count.TWO], [*NOT_SIZES, 2**63, 10**5000])
SIZE = besides(COUNT, 0)
SEED = Argument(
    [1, 2**63, np.int64(3), Count.TWO], [None, 1.5, "0", True, [0], torch.tensor(0), 2**64, -(2**63) - 1, 10**5000]
)
DTYPE = Argument([None, torch.bfloat16, torch.float64], list(NOT_DTYPES))
NOT_DEVICES = ("nowhere", "", 2.5, "cpu:x", [0], torch.float32, "hpu", "xla:7", "cuda:99", object())
PLACEMENT = {"device": Argument([None, torch.device("cpu"), Word("cpu")], [*NOT_DEVICES]), "dtype": DTYPE}
ROOM = Argument([0], [None, "2", 2.5, -1, N + 1, 10**5000, [2], torch.tensor(2)])
TEXT = Argument([Word("text")], list(NOT_TEXTS))
PATH = Argument([], [None, *NOT_PATHS])
FILE = besides(PATH, "no/such/folder/file", ".", "\0", "\ud800/file", "x" * 5000)
REAL = Argument([1, -float("inf")], [None, "2", 1j, [1.0], torch.tensor(1.0), np.ones(1)])
MAPPING = Argument([{}], [*NOT_LISTS, [("a", zeros(2))]])
CALLABLE = Argument([], [None, *NOT_CALLABLES])


def choice(*words: str) -> Argument:
    return Argument([*words, Word(words[0])], [*NOT_TEXTS, "", "other", "x" * 5000, words[0].upper(), f"{words[0]} "])


def one_of(cls: type, *refuses: Any) -> Argument:
    """An instance of `cls`, and no class, name or parts of one."""
    return Argument([], [None, 3, "instance", cls, object(), [], {}, zeros(2), *refuses])


def list_of(*refuses: Any) -> Argument:
    """A list of what the caller knows; no other thing, and no list of other things."""
    return Argument([], [*NOT_LISTS, [None], ["text"], [[]], [object()], [zeros(2)], (nn.Linear,), *refuses])


def tensor(*shape: int, free: tuple[int, ...] = (), dtypes: tuple[torch.dtype, ...] = ()) -> Argument:
    """A dense tensor of floating-point numbers of this shape, but for the axes in `free`; not of one of `dtypes`."""
    wrong: list[Any] = [*NOT_TENSORS, *(zeros(*shape).to(dtype) for dtype in DTYPES), zeros(*shape, device="meta")]
    wrong += [nn.UninitializedParameter(device=DEVICE), nn.UninitializedBuffer(device=DEVICE)]
    wrong += [zeros(*shape).to_sparse(), zeros(*shape, dtype=torch.bfloat16).to_sparse()]
    if DEVICE == "cpu":
        wrong += [zeros(*shape).to_mkldnn()]
    if len(shape) == 2:
        wrong += [torch.nested.nested_tensor([zeros(3), zeros(4)]), zeros(*shape).to_sparse_csr()]
    for axis, size in enumerate(shape):
        if axis not in free:
            wrong += [zeros(*shape[:axis], other, *shape[axis + 1 :]) for other in (0, size - 1, size + 1)]
    wrong += [zeros(), zeros(*shape, 1), *(zeros(*shape, dtype=dtype) for dtype in dtypes)]
    wrong += [] if free else [zeros(1, *shape), zeros(*shape).flatten()[:-1]]
    return Argument([], wrong)


WIDE = (torch.float64, torch.bfloat16)
X, ROW, ARRAY = tensor(M, K, free=(0,), dtypes=WIDE), tensor(N), of_any_float(tensor(N, R))
WEIGHT = besides(tensor(N, K), zeros(N, K).requires_grad_(), nn.Parameter(zeros(N, K)), zeros(N, K).T)
ADAPTER = {
    "weight": WEIGHT,
    "lora_A": besides(tensor(R, K, dtypes=WIDE), zeros(R, K).T),
    "lora_B": besides(tensor(N, R, dtypes=WIDE), zeros(N, R).T),
    "scaling": SCALING,
}
BIAS, X_DROPPED, NORM = optional(ROW), optional(tensor(M, K)), optional(ROW)
LAYER = {"x": X, **ADAPTER, "magnitude": ROW}
VERA = {
    "weight": WEIGHT,
    "vera_A": besides(tensor(R, K), zeros(R, K).requires_grad_()),
    "vera_B": besides(tensor(N, R), zeros(N, R).requires_grad_()),
    "lambda_d": tensor(R),
    "lambda_b": ROW,
}
LIKE = besides(of_any_float(tensor(N)), called=("exact",))
LINEAR = Argument(
    [nn.Linear(K, N, device=DEVICE), nn.Linear(K, N, False, device=DEVICE)],
    [
        *NOT_MODELS,
        nn.Conv1d(K, N, 1),
        nn.Bilinear(K, K, N),
        nn.Linear(K, N, dtype=torch.complex64),
        nn.LazyLinear(N),
        DoraLinear(K, N, R, 1.0),
        nn.modules.linear.NonDynamicallyQuantizableLinear(K, N),
    ],
    ("weight",),
    ("UninitializedParameter", "complex64"),
)
