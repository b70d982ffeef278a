"""The parser and the types of arguments: what is wrong is said in one line, and torch is not needed for it."""

from __future__ import annotations

import argparse
import math
import re
import warnings
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError. It takes no abbreviations: one of today may stand for two options tomorrow."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, **keywords)

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(message)

    def print_help(self, file: Any = None) -> None:
        """Print what argparse does, which looks away where nothing can be printed."""
        print(self.format_help(), end="", file=file)


def integer(least: int, most: int) -> Callable[[str], int]:
    """The type of an argument from `least` to `most`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"is {text!r:.80}; expected an integer from {least} to {most}")
        return value

    return read


SEED = integer(0, 2**63 - 1)
"""Any that torch.manual_seed takes, and one more than it, but for negative ones, which mean others."""


def number(expected: str, fits: Callable[[float], bool] = math.isfinite) -> Callable[[str], float]:
    """The type of an argument that is a number and fits; `expected` says what does."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"is {text!r:.80}; expected {expected}")
        return value

    return read


def shape(text: str) -> tuple[int, ...]:
    """The type of an argument of four positive sizes, MxNxKxR."""
    # eighteen digits: what is beyond is no size in any memory
    if not re.fullmatch(r"[1-9][0-9]{0,17}(x[1-9][0-9]{0,17}){3}", text):
        raise argparse.ArgumentTypeError(
            f"is {text!r:.80}; expected tokens, out features, in features and rank as MxNxKxR"
        )
    return tuple(map(int, text.split("x")))


def device_name(text: str) -> str:
    """The type of an argument auto, cpu, cuda or cuda:N; commands/check.py sees whether there is such."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", text):
        raise argparse.ArgumentTypeError(f"is {text!r:.80}; expected auto, cpu, cuda or cuda:N")
    return text


def regular_expression(text: str) -> str:
    """The type of an argument that re.compile takes."""
    if error := why_no_substitution(text, ""):
        raise argparse.ArgumentTypeError(f"is {text!r:.80}: {error}; expected a regular expression")
    return text


def why_no_substitution(pattern: str, replacement: str) -> str | None:
    """The reason why re.sub does not take these; None if it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a set that may be another one day
        try:
            re.compile(pattern).sub(replacement, "")
        except RecursionError:
            return "it is nested too deeply"
        except (re.error, IndexError, OverflowError, MemoryError) as error:
            return str(error)
    return None
