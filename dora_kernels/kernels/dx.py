"""The gradient of x through the merged weight."""

from torch import Tensor

from dora_kernels.kernels.side import Side


def dx(dy: Tensor, merged: Tensor, side: Side | None = None) -> Tensor:
    """dy (M, N) @ merged (N, K) -> (M, K); as `reference.dx`."""
    return dy @ merged
