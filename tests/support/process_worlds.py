"""Worlds of real processes on the CPU, so that a test of a distributed engine is a function of a rank and one call.

    def check(rank, size): ...             # runs on every rank, in one process group (gloo)
    results = world(2).run(check)          # what it returned, by rank; the first rank's error is raised here

The worlds of `world` live for the test session. Processes are forked from a server that has imported torch and PEFT,
so that they start in less than a second. After an error or a timeout a world is killed, and the next call starts
another.
"""

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

SECONDS = 120
"""How long a check may take."""
PRELOAD = ("torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "peft", "transformers", "dora_kernels")
_worlds: dict[int, "World"] = {}


class World:
    """`size` processes in one process group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._store = tempfile.TemporaryDirectory(prefix="dora-world-")
        with _environment():
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(list(PRELOAD))
            self._pipes, self.processes = [], []
            for rank in range(size):
                ours, theirs = context.Pipe()
                arguments = (rank, size, f"{self._store.name}/store", theirs)
                process = context.Process(target=_rank, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self.processes.append(process)

    def run(self, check: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> list[Any]:
        """check(rank, size, *arguments) of every rank. Raises AssertionError with a rank's traceback."""
        self.start(check, *arguments)
        return self.results(seconds)

    def start(self, check: Callable[..., Any], *arguments: Any) -> None:
        """Have every rank begin; `results` waits."""
        for pipe in self._pipes:
            pipe.send((check, arguments))

    def results(self, seconds: float = SECONDS) -> list[Any]:
        results, waiting = [None] * self.size, dict(zip(self._pipes, range(self.size), strict=True))
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), seconds)
            if not ready:
                self.kill()
                raise AssertionError(f"ranks {sorted(waiting.values())} did not answer within {seconds} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    error, results[rank] = pipe.recv()
                except EOFError:
                    error = "the process died"
                if error:
                    self.kill()
                    raise AssertionError(f"rank {rank} of {self.size}: {error}")
        return results

    def kill(self) -> None:
        """SIGKILL, to every rank."""
        if _worlds.get(self.size) is self:
            del _worlds[self.size]
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._store.cleanup()


def world(size: int) -> World:
    """The session's world of `size` ranks."""
    if size not in _worlds:
        _worlds[size] = World(size)
    return _worlds[size]


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What processes that are started meanwhile have: one thread each, no GPU, and Triton's interpreter."""
    ours = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _rank(rank: int, size: int, store: str, pipe: Any) -> None:
    """Serve checks until the pipe closes."""
    import torch
    from torch import distributed

    from dora_kernels.testing import nan_filled_memory

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS)
    )
    with contextlib.suppress(EOFError, KeyboardInterrupt), nan_filled_memory():
        while True:
            check, arguments = pipe.recv()
            try:
                answer = None, check(rank, size, *arguments)
            except BaseException:
                answer = traceback.format_exc(), None
            pipe.send(answer)
    os._exit(0)  # the others may be gone: no goodbyes in the group
