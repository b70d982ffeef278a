"""The gradient of x through the merged weight."""

from torch import Tensor

from dora_kernels.kernels.hopper.launch import gemm
from dora_kernels.kernels.side import Side
from dora_kernels.planning import devices


def dx(dy: Tensor, merged: Tensor, side: Side | None = None) -> Tensor:
    """dy (M, N) @ merged (N, K) -> (M, K); as `reference.dx`.

    Beside a side, by our GEMM, which has a program for each multiprocessor that the side leaves: the GEMM library has
    one for every tile or for all of them, and takes twice as long where a few are taken.
    """
    if side is None:
        return dy @ merged
    left = devices.device_facts(dy.device).multiprocessors - side.multiprocessors
    return gemm(dy, merged, nn=True, multiprocessors=left)[0]
