"""Run kernels in Triton's interpreter with every tensor between two pages of memory that nobody may touch.

    python -m pytest -p tools.guard_pages tests/kernels                     # tensors end at a guard page
    python -m pytest -p tools.guard_pages --guard-pages=begin tests/kernels # they begin behind one

For a launch each tensor argument, and each tensor that `grouped_norm` hands over as an address, is copied to memory of
its own, its strides kept, and copied back afterwards. A read or a write one element past the end (or before the
beginning) ends the process: each test runs in a process of its own, and the signal is its failure, with the traceback.

What lies between the elements and in the rest of their pages, on the other side or in the gaps of a strided view, is
0xFF: NaN in every float, and a launch that writes there is an error. Nothing is known of what is not an argument of a
kernel, and nothing of tensors above MOST elements.
"""

import contextlib
import ctypes
import faulthandler
import functools
import importlib
import json
import mmap
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

SIDES = ("end", "begin")
# Larger ones are the reserved, uncommitted addresses of test_addresses.py
MOST = 1 << 24
_DENSE_BYTES = 1 << 28  # a view that spans more has its gaps left as they are: they would be committed
_PAGE = mmap.PAGESIZE
_READ_WRITE, _FLAGS = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # NORESERVE

# Tests that the copies disturb, by the end of their file's name and the start of their own.
DISTURBED = {("test_quantized.py", "test_one_dense_temporary_at_a_time"): "it counts the copies, too"}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def span(tensor: Tensor) -> tuple[int, int]:
    """The address of the first element, and that behind the last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def elements(address: int, tensor: Tensor):
    """The NumPy array of the bits of the tensor's elements, if it were at that address."""
    import numpy as np

    start, stop = span(tensor)
    bits = np.dtype(f"u{tensor.itemsize}")
    memory = np.frombuffer((ctypes.c_char * (stop - start)).from_address(address), bits)
    strides = [stride * tensor.itemsize for stride in tensor.stride()]
    return np.lib.stride_tricks.as_strided(memory, tuple(tensor.shape), strides)


class _Region:
    """Copies, in memory with a guard page on both sides, of tensors whose addresses overlap."""

    def __init__(self, tensors: list[Tensor], side: str) -> None:
        import numpy as np

        spans = [span(tensor) for tensor in tensors]
        start, size = min(spans)[0], max(stop for _, stop in spans) - min(spans)[0]
        inside = -(-size // _PAGE) * _PAGE
        self.whole = inside + 2 * _PAGE
        self.mapped = _libc.mmap(None, self.whole, 0, _FLAGS, -1, 0)
        if self.mapped in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap")
        if _libc.mprotect(self.mapped + _PAGE, inside, _READ_WRITE):
            raise OSError(ctypes.get_errno(), "mprotect")
        first = self.mapped + _PAGE + (inside - size if side == "end" else 0)
        self.bytes = None
        if inside <= _DENSE_BYTES:
            self.bytes = np.frombuffer((ctypes.c_char * inside).from_address(self.mapped + _PAGE), np.uint8)
            self.bytes[:] = 0xFF
        self.stop = first + size
        self.copies = [(first + at - start, tensor) for (at, _), tensor in zip(spans, tensors, strict=True)]
        for address, tensor in self.copies:
            elements(address, tensor)[...] = elements(tensor.data_ptr(), tensor)
        self.before = None if self.bytes is None else self.bytes.copy()

    def copy_back(self) -> bool:
        """Write what was written into the tensors; whether no other byte was."""
        written = [elements(address, tensor).copy() for address, tensor in self.copies]
        for (address, tensor), bits in zip(self.copies, written, strict=True):
            original = elements(tensor.data_ptr(), tensor)
            if (original != bits).any():  # else it may be read-only
                elements(address, tensor)[...] = original
        for (_, tensor), bits in zip(self.copies, written, strict=True):
            original = elements(tensor.data_ptr(), tensor)
            changed = original != bits
            if changed.any():
                original[changed] = bits[changed]
        return self.bytes is None or (self.bytes == self.before).all()

    def free(self) -> None:
        _libc.munmap(self.mapped, self.whole)


def _at(address: int, stop: int, tensor: Tensor) -> Tensor:
    """A tensor as the given one, at another address, whose storage reaches to `stop`, as that of its neighbours."""
    memory = torch.frombuffer((ctypes.c_char * (stop - address)).from_address(address), dtype=torch.uint8)
    memory = memory[: len(memory) // tensor.itemsize * tensor.itemsize]
    return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def _tensors(argument: object) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, (tuple, list)):
        for part in argument:
            yield from _tensors(part)


@contextlib.contextmanager
def guarded(arguments: list, side: str, what: str) -> Iterator[list]:
    """The arguments with every tensor copied between guard pages; at the end what was written is copied back.

    Raises AssertionError where something was written beside them.
    """
    tensors = [tensor for tensor in _tensors(arguments) if 0 < tensor.numel()]
    regions, together, stop = [], [], 0
    for tensor in sorted(tensors, key=span):
        if together and span(tensor)[0] >= stop:
            regions.append(together)
            together = []
        together.append(tensor)
        stop = max(stop, span(tensor)[1])
    regions = [group for group in (*regions, together) if group and max(t.numel() for t in group) <= MOST]
    regions = [_Region(group, side) for group in regions]
    copies = {id(tensor): _at(address, region.stop, tensor) for region in regions for address, tensor in region.copies}

    def replaced(argument):
        if isinstance(argument, Tensor):
            return copies.get(id(argument), argument)
        if isinstance(argument, list) or type(argument) is tuple:
            return type(argument)(map(replaced, argument))
        if isinstance(argument, tuple):  # Triton's, or a named one
            return type(argument)(*map(replaced, argument))
        return argument

    yield [replaced(argument) for argument in arguments]  # not given back after an error: its traceback shows them
    untouched = [region.copy_back() for region in regions]
    for region in regions:
        region.free()
    for region, ok in zip(regions, untouched, strict=True):
        shapes = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for _, tensor in region.copies)
        assert ok, f"{what} wrote beside {shapes}, but on the same page"


def _grouped_norm(launcher: Callable, side: str) -> Callable:
    @functools.wraps(launcher)
    def wrapped(*arguments):
        with guarded(list(arguments), side, launcher.__name__) as inside:
            return launcher(*inside)

    return wrapped


@contextlib.contextmanager
def guard_pages(side: str) -> Iterator[None]:
    """Inside, every launch in the interpreter has its tensors end at a guard page, or begin behind one."""
    from triton.runtime.interpreter import GridExecutor

    from dora_kernels import kernels

    call, steps, grouped_norm = GridExecutor.__call__, kernels.KERNELS, kernels.grouped_norm

    def guarded_call(self, *arguments, **keywords):
        names = list(keywords)
        with guarded([*arguments, *keywords.values()], side, self.fn.__name__) as inside:
            return call(self, *inside[: len(arguments)], **dict(zip(names, inside[len(arguments) :], strict=True)))

    GridExecutor.__call__ = guarded_call
    kernels.grouped_norm = _grouped_norm(grouped_norm, side)
    kernels.KERNELS = steps._replace(grouped_norm=kernels.grouped_norm)
    try:
        yield
    finally:
        GridExecutor.__call__, kernels.grouped_norm, kernels.KERNELS = call, grouped_norm, steps


def in_child(function: Callable[[], object]) -> tuple[object, str]:
    """(what function returns, "") through JSON, out of a forked process; (None, why and where) if that died.

    Threads do not survive a fork, so torch computes on one there.
    """
    reading, writing = os.pipe()
    with tempfile.TemporaryFile("w+") as trace:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                faulthandler.enable(trace)
                torch.set_num_threads(1)
                with os.fdopen(writing, "w") as pipe:
                    json.dump(function(), pipe)
                status = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=trace, flush=True)
            finally:
                os._exit(status)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        if status == 0:
            return json.loads(answer), ""
        trace.seek(0)
        died = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "an exception"
        return None, f"died of {died}\n{trace.read()}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--guard-pages", choices=SIDES, default="end", help="which end of a tensor is at the guard page")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the processes that are forked from this one inherit no others


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from dora_kernels.planning.devices import interpreting

    if not interpreting():
        raise pytest.UsageError("guard pages: kernels are compiled for a GPU here; expected Triton's interpreter")
    for name in ("torch._dynamo", "triton.runtime.interpreter", "dora_kernels.kernels", "dora_kernels.testing"):
        importlib.import_module(name)  # once, and not in every test's process
    for item in items:
        for (file, test), reason in DISTURBED.items():
            if item.path.name == file and item.name.startswith(test):
                item.add_marker(pytest.mark.skip(reason=f"guard pages: {reason}"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Each test in a process of its own."""
    from _pytest.runner import runtestprotocol

    hook = item.config.hook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)

    def run() -> list[dict]:
        with guard_pages(item.config.getoption("--guard-pages")):
            reports = runtestprotocol(item, nextitem=None, log=False)
        return [hook.pytest_report_to_serializable(config=item.config, report=report) for report in reports]

    sys.stdout.flush()
    answers, why = in_child(run)
    if why:
        reports = [pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call")]
    else:
        reports = [hook.pytest_report_from_serializable(config=item.config, data=answer) for answer in answers]
    for report in reports:
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
