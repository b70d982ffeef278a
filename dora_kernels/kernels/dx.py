"""The gradient of x through the merged weight."""

from torch import Tensor

from dora_kernels.kernels.hopper.launch import gemm
from dora_kernels.kernels.side import Side
from dora_kernels.planning import devices


def dx(dy: Tensor, merged: Tensor, side: Side | None = None) -> Tensor:
    """dy (M, N) @ merged (N, K) -> (M, K); as `reference.dx`.

    Beside a side by our GEMM, on the multiprocessors that the side leaves. The GEMM library shares its tiles out among
    all of them in advance, and takes twice as long where a few are busy (github.com/pytorch/pytorch/issues/143988).
    """
    if side is None:
        return dy @ merged
    left = devices.device_facts(dy.device).multiprocessors - side.multiprocessors
    return gemm(dy, merged, nn=True, multiprocessors=max(1, left))[0]  # the interpreter has 2
