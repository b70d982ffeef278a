"""rank_pattern and alpha_pattern of adapter_config.json: for each module the value of the first pattern that fits.

A pattern is a stranger's regular expression, which may take years: `regex` matches it, which has a time limit, and
what it would read in another way than `re`, with which PEFT matches, is refused.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import regex

from dora_kernels.files.reading import shown

SECONDS = 10.0
"""For all modules and patterns of a field. 10^4 modules and 100 patterns take 2 s."""

_LETTERS = 1000
_REPEATS = 10_000
"""The most that the counts of a pattern may multiply to: `regex` writes repetitions out, (a{65535}){65535} in 10 GB."""

# What the two libraries do not share: fuzzy counts, sets of POSIX, and groups that are more than a group.
_UNSHARED = re.compile(r"\{(?!\d+(,\d*)?\}|,\d+\})|\[:|\(\?(?![:=!]|<[=!]|P[<=])")

_Value = TypeVar("_Value")


def pattern_values(
    function: str, field: str, patterns: Mapping[str, _Value] | None, modules: Iterable[str], default: _Value
) -> dict[str, _Value]:
    """module -> the value of the first pattern that is the module's name, or the end of it after a dot; else `default`.

    Raises ValueError for a pattern that cannot be asked, and where all of them take more than SECONDS.
    """
    patterns = patterns or {}
    deadline = time.monotonic() + SECONDS
    wholes: dict[str, int] = {}  # names, of which no pattern needs to be asked, and their places
    others: list[tuple[int, str, Any]] = []
    found, key = {}, ""
    try:
        for place, key in enumerate(patterns):
            name = _whole_name(key)
            if name is not None:
                wholes.setdefault(name, place)
            elif _left(deadline):
                others.append((place, key, _compiled(function, field, key)))
        keys = list(patterns)
        for module in modules:
            # $ is before a newline at the end, too
            place = min(wholes.get(name, len(keys)) for name in (module, module.removesuffix("\n")))
            for earlier, key, pattern in others:  # noqa: B007 (the message below has it)
                if earlier >= place or pattern.match(module, timeout=_left(deadline)):
                    place = min(place, earlier)
                    break
            found[module] = patterns[keys[place]] if place < len(keys) else default
    except (TimeoutError, MemoryError) as error:
        raise ValueError(
            f"{function}: {field} has {len(patterns)} patterns, and was not done with {shown(key)} in time; expected "
            f"less than {SECONDS:g} s for all of them"
        ) from error
    return found


def _left(deadline: float) -> float:
    """The seconds until then. Raises TimeoutError where there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def whole(module: str) -> str:
    """The pattern of one module: PEFT reads a key as one for the end of a name, and ^ makes it the whole."""
    return "^" + re.escape(module)


def _whole_name(key: str) -> str | None:
    """The module of which `key` is the pattern, if it is one that `whole` makes."""
    name = re.sub(r"\\(.)", r"\1", key[1:], flags=re.DOTALL)
    return name if key == whole(name) else None


def _compiled(function: str, field: str, key: str) -> Any:
    """The pattern as PEFT reads it."""
    wrapped = rf"(.*\.)?({key})$"
    counts = (max(map(int, re.findall(r"\d+", count))) for count in re.findall(r"\{(\d[\d,]*|,\d+)\}", key))
    try:
        if len(key) > _LETTERS or math.prod(max(1, count) for count in counts) > _REPEATS:
            raise ValueError("it is too long, or repeats too often")
        if _UNSHARED.search(re.sub(r"\\.", "", key)):
            raise ValueError("not all regular expressions read it in the same way")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets in sets, which both read as letters
            re.compile(key), re.compile(wrapped)
            return regex.compile(wrapped)
    except (re.error, regex.error, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise ValueError(
            f"{function}: {field} is {{{shown(key)}: ...}}: {shown(error)}; expected {{pattern: number}}, patterns of "
            f"re, of at most {_LETTERS} letters"
        ) from error
