"""The side stream of a backward pass: what runs beside dx."""

from collections.abc import Sequence

from torch import Tensor


class Side:
    """The kernels that run beside dx, until they are joined."""

    def join(self) -> None:
        """Let the current stream wait for them."""


def fork(beside: Sequence[str], dy: Tensor, merged: Tensor, *read: Tensor | None) -> Side | None:
    """None: nothing runs beside dx yet; as `reference.fork`."""
    return None
