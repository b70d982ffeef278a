"""A walk: operations on both twins with a comparison after each; and the shortest walk that still fails."""

from __future__ import annotations

import copy
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

import dora_kernels
from dora_kernels.testing.run import shared_dropout
from soaking import steps
from soaking.changes import OPERATIONS, Operation, finish
from soaking.comparing import LEAST_ULP, Difference, differing, judged, moved
from soaking.models import Kind
from soaking.twins import Records, Twin, described, follow, numbers

Step = tuple[str, int]
"""The name of an operation and the seed that it draws from."""

REFUSALS = (ValueError, RuntimeError, NotImplementedError, KeyError)
"""Errors with which PEFT and torch refuse; any other of stock's is a fault of the soak's own."""

LOST = "their weights cannot be recovered"
"""In our refusal to unmerge rows whose gain was 0 in the dtype of the weight; stock's are another weight afterwards."""

LARGEST_PARAMETER = 30.0
"""New ones are below 2, so a model with one that is larger has gone astray; its walk ends."""

FINISH = Operation("finish", finish)
PROBE = Operation("probe", steps.probe)


@dataclass
class Walk:
    """The twins, the operations done so far, and the first difference. lost: nothing is left to compare."""

    kind: Kind
    done: list[Step] = field(default_factory=list)
    difference: Difference | None = None
    lost: bool = False
    refused: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, of fan_in_fan_out
            self.stock = Twin(self.kind.build(), self.kind)
        self.ours = Twin(copy.deepcopy(self.stock.model), self.kind, ours=True)
        dora_kernels.enable(self.ours.model, fuse_shared_inputs=self.kind.seed % 2 == 0)

    def step(self, name: str, seed: int) -> bool:
        """Do one operation and compare; False if it is not possible now, or there is a difference."""
        operation = FINISH if name == "finish" else OPERATIONS[name]
        if not operation.possible(self.ours):
            return False
        self.done.append((name, seed))
        self.difference = self._apart(operation, seed)
        if self.difference is None and not self.lost:
            self.difference = self._apart(PROBE, seed)
        return self.difference is None

    def _apart(self, operation: Operation, seed: int) -> Difference | None:
        """The difference that an operation makes; without one stock has the numbers of ours afterwards."""
        before = self.stock.copied()
        errors = [attempt(operation, twin, seed) for twin in (self.stock, self.ours)]
        if errors[0] is not None:
            if not isinstance(errors[0], REFUSALS):
                raise errors[0]
            self.refused[f"{operation.name}: {type(errors[0]).__name__}: {str(errors[0]):.60}"] += 1
        if errors[0] is None and LOST in str(errors[1]):
            self.lost = True
            self.refused[f"{operation.name}, by ours alone: {str(errors[1]):.60}"] += 1
            return None
        if not same_error(*errors):
            return Difference(operation.name, f"ours raised {errors[1]!r:.300}, stock {errors[0]!r:.300}")
        stock, ours = self.stock.model, self.ours.model
        apart = differing(described(ours), described(stock))
        if apart is not None:
            return apart

        def rerun(twin: Twin) -> Records:
            attempt(operation, twin, seed)
            return all_of(twin)

        ulp = max(LEAST_ULP, *(torch.finfo(dtype).eps for twin in (before, self.stock) for dtype in dtypes_of(twin)))
        tries = iter(range(1000))
        apart = judged(
            all_of(self.ours), all_of(self.stock), ulp,
            exact=lambda: rerun(before.copied(exact=True)),
            again=lambda: rerun(moved(before, next(tries), ulp)),
        )  # fmt: skip
        if apart is None:
            follow(stock, ours)
        return apart

    def is_comparable(self) -> bool:
        """False where the model is past comparing: a gradient through a softmax of 100s is rounding alone."""
        sane = all(bool((p.abs() < LARGEST_PARAMETER).all()) for p in self.ours.model.parameters())
        return sane and not self.lost


def attempt(operation: Operation, twin: Twin, seed: int) -> Exception | None:
    """Do an operation; the exception that it raised."""
    twin.records, twin.dtypes = {}, []
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings(), shared_dropout(seed), twin.backend():
            warnings.simplefilter("ignore")
            operation.run(twin, random.Random(seed))
    except Exception as error:
        return error
    return None


def same_error(stock: Exception | None, ours: Exception | None) -> bool:
    """True if ours refuses what stock refuses, with an error of the same class or one more special."""
    if stock is None or ours is None:
        return stock is ours
    return isinstance(ours, type(stock))


def all_of(twin: Twin) -> Records:
    """The numbers that an operation computed, and those of the model after it."""
    return {f"{name} (computed)": value for name, value in twin.records.items()} | numbers(twin.model)


def dtypes_of(twin: Twin) -> set[torch.dtype]:
    """The dtypes that rounding may come from."""
    values = [value.dtype for value in all_of(twin).values() if value is not None]
    return {dtype for dtype in [*values, *twin.dtypes] if dtype.is_floating_point}


def walk(kind: Kind, count: int, kinds: Sequence[str] = (), until: Callable[[], bool] = lambda: False) -> Walk:
    """A walk of `count` operations drawn from `kinds`, shorter where there is a difference or until() says so."""
    made, draw = Walk(kind), random.Random(kind.seed)
    names = [name for name, one in OPERATIONS.items() if not kinds or name in kinds for _ in range(one.weight)]
    try:
        while len(made.done) < count and made.difference is None and not until() and made.is_comparable():
            made.step(draw.choice(names), draw.randrange(10**6))
        if made.difference is None and made.is_comparable() and not until():
            made.step("finish", draw.randrange(10**6))
    finally:
        made.ours.close()
    return made


def replay(kind: Kind, done: Sequence[Step]) -> Walk:
    """The walk of these operations."""
    made = Walk(kind)
    try:
        for name, seed in done:
            made.step(name, seed)
            if made.difference is not None or made.lost:
                break
    finally:
        made.ours.close()
    return made


def shrunk(kind: Kind, done: Sequence[Step], seconds: float = 60) -> list[Step]:
    """The shortest list found in this time that still fails: of halves, quarters, single operations left out."""
    done, size, end = list(done), max(1, len(done) // 2), time.monotonic() + seconds
    while size:
        i = 0
        while i < len(done) and time.monotonic() < end:
            shorter = done[:i] + done[i + size :]
            if shorter and replay(kind, shorter).difference is not None:
                done = shorter
            else:
                i += size
        size //= 2
    return done
