"""Measurements of the GPU at hand: the time that a layer takes each way, and the way to take for other shapes.

They are the part "ways" of tuned/<gpu>.json, a list of entries in microseconds, of half precision. Where nothing was
measured the cost model's choices stand.

    {"M": 8192, "N": 4096, "K": 4096, "R": 64,
     "forward": {"split": 463.0, "fused": 441.5},                       of training: y and what is kept
     "inference": {"split": 455.1, "fused": 440.2, "merged": 447.0},    y alone
     "backward": {"none": 472.8, "token sums": 451.3}}                  all gradients, by what runs beside dx

The rule, `fastest`: the entries of the N, K and R at hand speak for a shape, or, where there are none, all whose N and
K are within a factor of 2 of its own and whose R is within a factor of 4; a way is taken where it has won at all of
them by 1% over what is taken otherwise. Where the tokens count, it is taken from half of the tokens of an entry on, if
it has won there and at all with more (split, of which tokens repay nothing: up to twice, there and at all with fewer).
A way has not won where it was not measured: it may have been wrong there. Nor has fused for sizes of which our GEMM
cannot take the rows: they would be left to the GEMM library, in three passes.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from dora_kernels.planning import devices
from dora_kernels.planning.configs import object_at, tuned_part

# The share of the time that a way has to save: more than two timings of one way differ by in one interleaved run.
WIN = 0.01
# An entry speaks for sizes that are within these factors of its own.
NEAR, NEAR_RANK, NEAR_TOKENS = 2, 4, 2

# Elements of half precision in the 16 bytes that rows are multiples of where our GEMM takes them (hopper/launch.py).
_WHOLE = 8

# name -> the steps that run beside dx; those of the low-rank products read one another, and stay together
BESIDE: dict[str, tuple[str, ...]] = {
    "none": (),
    "low rank": ("project", "outer_product"),
    "token sums": ("token_sums",),
    "all": ("token_sums", "project", "outer_product"),
}
_FORWARD = ("split", "fused", "merged")
# what is measured -> its ways; the first one makes nothing that more tokens would repay
PARTS = {"forward": _FORWARD, "inference": _FORWARD, "backward": tuple(BESIDE)}


# microseconds of each way, in the order of PARTS; None where it was not measured. No dict, which Dynamo does not trace
Times = tuple[float | None, ...]


class Entry(NamedTuple):
    """The times at one shape."""

    M: int
    N: int
    K: int
    R: int
    forward: Times
    inference: Times
    backward: Times


class Table:
    """The entries of a GPU. Known by identity: the planner's caches look it up in 0.1 us."""

    def __init__(self, entries: tuple[Entry, ...]) -> None:
        self.entries = entries


NOTHING = Table(())


@functools.cache
def table_of(name: str) -> Table:
    """The entries of the GPU of that name; NOTHING, with a warning, if one of them is not an entry."""
    entries = tuned_part(name, "ways", _entries)
    return Table(entries) if entries else NOTHING


def table_on(device: torch.device, backend: str) -> Table:
    """The entries of `device`; NOTHING for PyTorch's steps, which are not what was measured. backend: as asked for."""
    return NOTHING if backend == "reference" else table_of(devices.device_facts(device).name)


def entries_on(device: torch.device, backend: str) -> tuple[Entry, ...]:
    """The entries of `table_on`: a constant to Dynamo, which cannot read files. None for a GPU that is not there."""
    # fake tensors are on any
    absent = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    return () if absent else table_on(device, backend).entries


# as torch.compiler.assume_constant_result would, which imports Dynamo to do so: that takes a second or two
entries_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fastest(
    entries: tuple[Entry, ...], part: str, sizes: tuple[int, int, int], otherwise: str, M: int | None = None
) -> str:
    """The way of `part` that is taken for sizes (N, K, R): the fastest of those that have won, else `otherwise`.

    M: the tokens; None where the choice may not depend on them. Dynamo traces this.
    """
    speaking = [entry for entry in entries if (entry.N, entry.K, entry.R) == sizes]
    if not speaking:
        speaking = [entry for entry in entries if _is_near(entry, *sizes)]
    chosen, least, before = otherwise, 1.0, PARTS[part].index(otherwise)
    for place, way in enumerate(PARTS[part]):
        judges = speaking if M is None else _judges(speaking, M, with_fewer=place == 0)
        shares = [_share(getattr(entry, part), place, before) for entry in judges]
        has_won = shares and max(shares) <= 1 - WIN and sum(shares) / len(shares) < least
        if has_won and (way != "fused" or _is_taken(speaking, *sizes)):  # asked last, for Dynamo compiles by the answer
            chosen, least = way, sum(shares) / len(shares)
    return chosen


def _is_taken(speaking: list[Entry], N: int, K: int, R: int) -> bool:
    """True for sizes that were measured, and for those whose rows our GEMM can take; else the library would have to."""
    measured = (speaking[0].N, speaking[0].K, speaking[0].R)
    return measured == (N, K, R) or N % _WHOLE == K % _WHOLE == R % _WHOLE == 0


def _is_near(entry: Entry, N: int, K: int, R: int) -> bool:
    return _within(NEAR, N, entry.N) and _within(NEAR, K, entry.K) and _within(NEAR_RANK, R, entry.R)


def _within(factor: int, size: int, measured: int) -> bool:
    return size <= factor * measured and measured <= factor * size


def _judges(speaking: list[Entry], M: int, with_fewer: bool) -> list[Entry]:
    """The entries at which a way has to have won to be taken for M tokens; none where it cannot be.

    What has won goes on winning with more tokens (`with_fewer`: with fewer), which is true of the result as well.
    """
    if with_fewer:
        bounds = [entry.M for entry in speaking if M <= NEAR_TOKENS * entry.M]
        return [entry for entry in speaking if bounds and entry.M <= min(bounds)]
    bounds = [entry.M for entry in speaking if entry.M <= NEAR_TOKENS * M]
    return [entry for entry in speaking if bounds and entry.M >= max(bounds)]


def _share(times: Times, place: int, before: int) -> float:
    """The time at `place` over the one `before`; infinite where either was not measured."""
    time, other = times[place], times[before]
    return math.inf if time is None or other is None else time / other


def _entries(found: object) -> tuple[Entry, ...]:
    """The value of "ways". Raises ValueError where it is no list of entries."""
    if not isinstance(found, list):
        raise ValueError(f"ways is {found!r:.80}; expected a list")
    return tuple(_entry(object_at(entry, f"ways[{place}]"), f"ways[{place}]") for place, entry in enumerate(found))


def _entry(found: dict[str, Any], key: str) -> Entry:
    sizes = [name for name in Entry._fields if name not in PARTS]
    _check_names(found, key, Entry._fields)
    for name in sizes:
        value = found.get(name)
        if type(value) is not int or not 0 < value < 2**31:
            raise ValueError(f"{key}.{name} is {value!r:.80}; expected a size of at least 1")
    times = {part: object_at(found.get(part, {}), f"{key}.{part}") for part in PARTS}
    for part, ways in times.items():
        _check_names(ways, f"{key}.{part}", PARTS[part])
        for way, value in ways.items():
            if type(value) not in (int, float) or not 0 < value < 1e9:
                raise ValueError(f"{key}.{part}.{way} is {value!r:.80}; expected microseconds, more than 0")
    return Entry(*(found[name] for name in sizes), *(tuple(map(times[part].get, PARTS[part])) for part in PARTS))


def _check_names(found: dict[str, Any], key: str, expected: Iterable[str]) -> None:
    unknown = [name for name in found if name not in expected]
    if unknown:
        raise ValueError(f"{key}.{unknown[0]:.80} is unknown; expected {', '.join(expected)}")
