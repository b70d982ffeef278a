"""The side stream of a backward pass: kernels that run beside the GEMM of dx, on multiprocessors that it leaves free.

Each of their programs takes more than half the shared memory of a multiprocessor, and one of the GEMM's nearly all of
it: every program has a multiprocessor of its own, in whatever order they are launched.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dora_kernels.kernels.hopper import launch as hopper
from dora_kernels.kernels.launches import LaunchPlan
from dora_kernels.planning.tiles import PROGRAMS_BESIDE

# Above the GEMM's stream. torch has a pool of 32 streams for each priority from 0 to -3 and gives them out in turn, so
# that a stream may be somebody else's, too (c10/cuda/CUDAStream.h): FSDP takes its own at -1, NCCL at 0 or -3.
PRIORITY = -2
# The main stream -> its side stream. One for each: two captures, or a capture and other work, may share none. A capture
# may be the first to ask: torch has made all streams of a device with the first of them, which it captures on.
_streams: dict[Any, Any] = {}


class Side:
    """The launches beside one GEMM, until they are joined. The main stream is the current one as the side is made.

    Memory is allocated and freed on the main stream alone. What is allocated there may be what was just freed, which
    kernels that are queued still read, and in deterministic mode torch fills it (torch.utils.deterministic): so each
    launch waits for what the main stream has been given by then, and the GEMM is launched behind those beside it. What
    a launch was given is held until the main stream waits for the side; from then on memory that is freed, resized (as
    FSDP does) or given out again meets work in the order of the main stream only. Tensor.record_stream would hold it
    longer, in a CUDA graph until all is captured.

    Streams wait for each other by events alone, which a CUDA graph captures as branches of its own
    (https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cross-stream-dependencies-and-events).
    """

    multiprocessors = PROGRAMS_BESIDE

    def __init__(self, device: torch.device) -> None:
        """device: the current one."""
        self._held: list[tuple] = []
        self._streams = torch.get_device_module(device)  # torch.cpu has streams, too, which do nothing
        self._main = self._streams.current_stream(device)
        self._side = _streams.get(self._main)
        if self._side is None:  # of several threads, the first has its way
            self._side = _streams.setdefault(self._main, self._streams.Stream(priority=PRIORITY))

    def launch(self, plan: LaunchPlan, grid: tuple[int, ...], arguments: tuple) -> None:
        """Launches by the plan, and holds the arguments. An operator in its place would allocate on the side stream."""
        self._held.append(arguments)
        self._side.wait_stream(self._main)
        with self._streams.stream(self._side):
            plan.launch(grid, *arguments)

    def join(self) -> None:
        """Let the main stream wait for all launches, and then go of what they were given."""
        if self._held:  # a capture may not wait for a stream that has launched nothing in it
            self._main.wait_stream(self._side)
            self._held.clear()

    def __del__(self) -> None:
        """An exception in `join` itself, a KeyboardInterrupt say, frees nothing before its time either."""
        self.join()


def fork(beside: Sequence[str], dy: Tensor, merged: Tensor, *read: Tensor | None) -> Side | None:
    """The side on which the steps named run; None where our GEMM cannot take dx, or our kernels what they read.

    As `reference.fork`.
    """
    if not beside or hopper.why_not_gemm(dy, merged, nn=True) is not None:
        return None
    tensors = (dy, *(tensor for tensor in read if tensor is not None))
    if any(tensor.dim() != 2 or tensor.dtype != dy.dtype for tensor in tensors):
        return None  # unrounded, or in parts: the tiles beside are those of half precision
    if not all(_in_vectors(tensor, merged.shape) for tensor in tensors):
        return None
    return Side(dy.device)


def _in_vectors(tensor: Tensor, widths: Sequence[int]) -> bool:
    """True if a tensor is loaded asynchronously, 16 bytes a thread, as Triton does where it knows multiples of 16.

    Else tiles as large as those beside do not fit into the registers, and take little shared memory: two of their
    programs would be on one multiprocessor. Tensors of none of the widths are of the rank, which is no matter.
    """
    size, (rows_apart, columns_apart) = tensor.shape[1], tensor.stride()
    if size not in widths:
        return True
    return columns_apart == 1 and size % 16 == rows_apart % 16 == tensor.data_ptr() % 16 == 0
