"""Linear layers whose forward is x @ W.T, and then + bias: Falcon's in transformers, known by what the forward does.

The forward is run on names in place of x, weight and bias. A name knows the product, the transpose and the sum, and
nothing else: no shape, no dtype, no truth. The code may name nothing but these, no global, and may catch no error of a
name's, so that no branch of it depends on anything that is not known here but whether there is a bias. What comes out
then says what the forward computes.

It differs from nn.Linear's in roundings: the product is rounded to its dtype before the bias is added, and the sum has
the wider of the two dtypes. Under autocast that is float32 where the bias is.
"""

from __future__ import annotations

import dis
import weakref
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from dora_kernels.adapters.classes import class_name, why_not_attributes

NAMES = frozenset(("weight", "bias", "T", "mT", "t", "matmul"))
"""The attributes and methods that the code of such a forward may name."""


class Name:
    """x, weight or bias, or what was made of them."""

    __hash__ = None
    __eq__ = None
    __iadd__ = None  # the sum in the dtype of the product
    __imatmul__ = None

    def __init__(self, meaning: Any) -> None:
        self.meaning = meaning

    def __bool__(self) -> bool:
        raise TypeError("a name is neither true nor false")

    def __matmul__(self, other: Name) -> Name:
        return Name(("product", self.meaning, other.meaning))

    matmul = __matmul__

    def __add__(self, other: Name) -> Name:
        return Name(("sum", frozenset((self.meaning, other.meaning))))

    def t(self) -> Name:
        """The transpose."""
        return Name(("transpose", self.meaning))

    T = mT = property(t)


PRODUCT = ("product", "x", ("transpose", "weight"))
SUM = ("sum", frozenset((PRODUCT, "bias")))

_known: weakref.WeakKeyDictionary[FunctionType, bool] = weakref.WeakKeyDictionary()


def is_two_steps(module: nn.Module) -> bool:
    """True if the forward of the class of `module`, an nn.Linear of another kind, is x @ W.T, and then + bias."""
    return isinstance(module, nn.Linear) and multiplies_then_adds(type(module).forward)


def why_not_two_steps(part: str, module: nn.Module) -> str | None:
    """The reason why calling `module` is not x @ W.T, and then + bias, with its own weight and bias."""
    if not is_two_steps(module):
        return f"{part} is a {class_name(module)}; expected one that computes x @ W.T, and then + bias"
    return why_not_attributes(part, module)


def multiplies_then_adds(forward: Any) -> bool:
    """True of a method forward(self, x) that computes x @ self.weight.T, and then + self.bias unless that is None."""
    if type(forward) is not FunctionType:
        return False
    known = _known.get(forward)
    if known is None:
        known = _known[forward] = _names_no_more(forward) and all(
            _meaning(forward, bias) == meaning for bias, meaning in ((None, PRODUCT), (Name("bias"), SUM))
        )
    return known


# torch.compiler.assume_constant_result, which loads Dynamo: the function is not traced
multiplies_then_adds._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Holder(NamedTuple):
    """Stands for the layer, and can no more be changed than that."""

    weight: Name
    bias: Name | None


def _names_no_more(forward: FunctionType) -> bool:
    code = forward.__code__
    constants = all(value is None or type(value) is str for value in code.co_consts)
    arguments = code.co_argcount == 2 and not code.co_kwonlyargcount and not code.co_freevars
    if not (constants and arguments and set(code.co_names) <= NAMES):
        return False
    if getattr(code, "co_exceptiontable", b""):
        return False
    # a global of such a name may be any function; SETUP: of Python 3.10, which has no table of handlers
    return not any("GLOBAL" in one.opname or one.opname.startswith("SETUP") for one in dis.get_instructions(code))


def _meaning(forward: FunctionType, bias: Name | None) -> Any:
    try:
        return forward(Holder(Name("weight"), bias), Name("x")).meaning
    except Exception:  # whatever it wants of a name or of the layer, a name has not
        return None
