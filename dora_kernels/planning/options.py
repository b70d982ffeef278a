"""The user's choices, backend, way and precision, and who has made which: the environment, a block, a thread."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from dora_kernels.planning.choices import BACKENDS, PRECISIONS, WAYS, backend_of_environment


@dataclass(frozen=True)
class Options:
    """The user's choices; see `options`."""

    backend: str = "auto"
    way: str = "auto"
    precision: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (("backend", BACKENDS), ("way", WAYS), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                found = f"{value!r:.80}" if isinstance(value, str) else f"a {type(value).__name__}"
                raise ValueError(f"options: {name} is {found}; expected one of {', '.join(allowed)}")


# A module global and neither thread-local nor a ContextVar: torch.compile guards on a global, silently ignores
# changes of a thread-local and refuses a ContextVar (torch 2.13).
_default = Options(backend=backend_of_environment())
_current = _default
# what each open `options` block asked for, in the order in which the blocks were entered
_asked: list[dict[str, str]] = []
_asking = threading.Lock()
_own = threading.local()


def current_options() -> Options:
    """The options in force: this thread's own if it has any, else those of the process."""
    return _current if torch.compiler.is_compiling() else getattr(_own, "options", _current)


@contextlib.contextmanager
def own_options(**named: str) -> Iterator[None]:
    """Set options for this thread alone, inside a `with` block; torch.compile does not see them.

    For enable(), which computes while other threads may be in forward passes of their own.
    """
    before = vars(_own).copy()
    _own.options = replace(current_options(), **named)
    try:
        yield
    finally:
        vars(_own).clear()
        vars(_own).update(before)


@contextlib.contextmanager
def options(backend: str | None = None, way: str | None = None, precision: str | None = None) -> Iterator[Options]:
    """Set options inside a `with` block, for the whole process; what is not named stays as it is.

    backend: "triton" (never falls back: a call that the kernels cannot take is a ValueError), "reference"
        (plain PyTorch), or "auto" (Triton on a GPU that the kernels are built for, else the reference).
    way: "split", "merged", "fused" or "auto" (the planner chooses); see plan.py. One that a call cannot go, as with
        dropout, precision="exact" or, fused, adapters wider than x, is split; on a GPU whose GEMM is not ours, fused
        takes the GEMM library's.
    precision: "exact" keeps x @ weight.T in float32 until the single rounding of the output.

    A backward pass uses the options that were in force in its forward pass.
    """
    named = {"backend": backend, "way": way, "precision": precision}
    asked = {name: value for name, value in named.items() if value is not None}
    replace(_current, **asked)  # raises ValueError before anything is changed
    with _locked():
        _asked.append(asked)
        _recompute()
    try:
        yield _current
    finally:
        # not simply the options of before: threads may leave their blocks in another order than they entered them
        with _locked():
            _asked[:] = [other for other in _asked if other is not asked]
            _recompute()


def _recompute() -> None:
    """Set the options in force to what the open blocks asked for; the block entered last has the last word."""
    global _current
    current = _default
    for asked in _asked:
        current = replace(current, **asked)
    _current = current


def _locked() -> contextlib.AbstractContextManager[object]:
    """The lock, for one thread at a time; nothing under torch.compile, which cannot trace a lock and traces alone."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _asking
