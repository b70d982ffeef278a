"""Checks of arguments that are no tensors: ValueError with function, argument, its value and what was expected.

Sizes and numbers of constructors may be NumPy's, which become Python's: a rank from a sweep. A bool is no number.
`scaling`, which every call of a layer checks, is a Python number: validate.py has that, and the tensors.
"""

import os
import reprlib
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # not in its stub

from dora_kernels.files.reading import printable
from dora_kernels.quant.parts import FLOATING

DTYPE_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
DROPOUTS = ("adapter", "lora")
"""The targets of dropout: all that an adapter adds, or its low-rank product alone."""
LARGEST = {dtype: torch.finfo(dtype).max for dtype in FLOATING}
"""The largest finite number of each dtype."""
_MOST_ELEMENTS = 2**60
"""Of a matrix: of more, torch cannot say how many bytes they are."""
_short = reprlib.Repr()
_short.maxstring = _short.maxlong = _short.maxother = 80


def described(value: object) -> str:
    """`value` in one line of a message: a class, the dtype and shape of a tensor, the type of a module, else its repr,
    of about 80 characters."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    try:
        if isinstance(value, Tensor):
            return f"a {type(value).__name__} of {value.dtype}"
        return printable(" ".join(_short.repr(value).split()))
    except Exception:  # an int of more than 4,300 digits; a class of another's that is named dict, too
        return f"a {type(value).__name__} that has no short repr"


def check_model(function: str, model: object, name: str = "model") -> None:
    """Raise ValueError unless `model` is an nn.Module, and not the class of one."""
    check_type(function, name, model, nn.Module, "a torch.nn.Module")


def check_type(function: str, name: str, value: object, cls: Any, expected: str) -> None:
    """Raise ValueError unless `value` is an instance of `cls`, which messages call `expected`."""
    if not isinstance(value, cls):
        raise ValueError(f"{function}: {name} is {described(value)}; expected {expected}")


def check_callable(function: str, name: str, value: object) -> None:
    """Raise ValueError unless `value` can be called."""
    check_type(function, name, value, Callable, "a function")


def check_dense(function: str, name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a tensor whose elements lie one by one in memory, or would on meta."""
    check_type(function, name, value, Tensor, "a torch.Tensor")
    if isinstance(value, UninitializedTensorMixin):  # torch.compile traces no is_lazy
        raise ValueError(f"{function}: {name} is {described(value)}; expected one that has a shape")
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise ValueError(f"{function}: {name} is {layout}; expected a dense tensor (torch.strided)")


def check_floats(function: str, name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a dense tensor of floating-point numbers, which are there to be read."""
    check_dense(function, name, value)
    if not value.is_floating_point() or value.is_meta:
        raise ValueError(f"{function}: {name} is {value.dtype} on {value.device}; expected floating point numbers")


def check_items(function: str, name: str, values: Any, cls: Any, expected: str) -> None:
    """Raise ValueError unless `values` is a list or a tuple of instances of `cls`, of which each is `expected`."""
    check_type(function, name, values, (list, tuple), f"a list, each {expected}")
    for index, value in enumerate(values):
        check_type(function, f"{name}[{index}]", value, cls, expected)


def check_choice(function: str, name: str, value: object, choices: Sequence[str | None]) -> None:
    """Raise ValueError unless `value` is a str, or None, among `choices`."""
    if not isinstance(value, (str, type(None))) or value not in choices:
        expected = ", ".join(map(str, choices))
        raise ValueError(f"{function}: {name} is {described(value)}; expected one of {expected}")


def check_path(function: str, name: str, value: object) -> None:
    """Raise ValueError unless `value` is a path: a str or an os.PathLike of one. An empty one is none: pathlib takes it
    for the current folder."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str) or not os.fspath(value):
        raise ValueError(f"{function}: {name} is {described(value)}; expected a path, a str or an os.PathLike")


def check_flag(function: str, name: str, value: object) -> None:
    """Raise ValueError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{function}: {name} is {described(value)}; expected True or False")


def is_number(value: object) -> TypeGuard[float]:
    """True for Python's ints and floats."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_number(function: str, name: str, value: Any, dtype: torch.dtype = torch.float64) -> float:
    """`value` as Python's int or float. Raise ValueError unless it is a number that is finite in dtype."""
    number = _number(value)
    if number is None or not -LARGEST[dtype] <= number <= LARGEST[dtype]:
        raise ValueError(
            f"{function}: {name} is {described(value)}; expected a finite Python number, finite in {dtype}"
        )
    return number


def check_probability(function: str, name: str, value: Any) -> float:
    """`value` as a float. Raise ValueError unless it is a probability below 1, as dropout's is."""
    number = _number(value)
    if number is None or not 0 <= number < 1:
        raise ValueError(f"{function}: {name} is {described(value)}; expected a probability in [0, 1)")
    return float(number)


def _number(value: object) -> int | float | None:
    """`value` as Python's int or float; None where it is no number, or one that a float cannot hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return int(value) if isinstance(value, Integral) else float(value)
    except OverflowError:
        return None


def check_size(function: str, name: str, value: Any, least: int = 0) -> int:
    """`value` as an int. Raise ValueError unless it is one, from `least` on."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        expected = "a positive int" if least else "an int of at least 0"
        raise ValueError(f"{function}: {name} is {described(value)}; expected {expected}")
    return int(value)


def check_seed(function: str, seed: Any) -> int:
    """`seed` as an int. Raise ValueError unless it is one that torch's generators take."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not -(2**63) <= int(seed) < 2**64:
        raise ValueError(f"{function}: seed is {described(seed)}; expected an int of 64 bits")
    return int(seed)


def check_elements(function: str, **sizes: int) -> None:
    """Raise ValueError unless torch can say how large a matrix of the two sizes is. Memory is the caller's to have."""
    rows, columns = sizes.values()
    if max(rows, columns, rows * columns) > _MOST_ELEMENTS:
        raise ValueError(
            f"{function}: a matrix would be {' x '.join(sizes)}, {described(rows)} x {described(columns)}; "
            "expected at most 2^60 elements"
        )


def check_placement(function: str, device: Any, **dtypes: object) -> None:
    """Raise ValueError unless device is None or one where tensors can be made here, and the dtypes are floating-point
    or None."""
    for name, value in dtypes.items():
        if value is not None and (not isinstance(value, torch.dtype) or value not in FLOATING):
            raise ValueError(f"{function}: {name} is {described(value)}; expected one of {DTYPE_NAMES}")
    if device is not None:
        try:
            torch.empty(0, device=device)
        except Exception as error:  # what a backend raises that is not there is its own: AssertionError of CUDA's
            reason = str(error).partition("\n")[0][:100]
            raise ValueError(
                f"{function}: device is {described(device)}; expected one of torch's devices that is here: {reason}"
            ) from error
