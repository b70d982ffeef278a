"""What flows from room to room, by name."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Needs(NamedTuple):
    """Which gradients a backward pass has to compute."""

    x: bool
    x_dropped: bool
    lora_A: bool
    lora_B: bool
    magnitude: bool
    bias: bool
    low: bool = False
    """Where the forward pass was given low: dA falls out of dlow, elsewhere."""


class Steps(NamedTuple):
    """The steps that passes.py composes, defined in reference.py: `PYTORCH` in pytorch.py, `KERNELS` in kernels/."""

    dense: Callable[..., Tensor]
    norm: Callable[..., tuple[Tensor, Tensor | None]]
    grouped_norm: Callable[..., tuple[Tensor, Tensor]]
    merge: Callable[..., Tensor]
    project: Callable[..., Tensor]
    epilogue: Callable[..., Tensor]
    merged_forward: Callable[..., tuple[Tensor, Tensor | None, Tensor, Tensor | None]]
    token_sums: Callable[..., None]
    outer_product: Callable[..., Tensor]
    bank_epilogue: Callable[..., Tensor]
    low_rank_first: bool = False
    """Whether the GEMM of base may add its sums onto the low-rank product, where that pays (plan.low_rank_first)."""
