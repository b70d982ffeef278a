"""The values that flow between the rooms: a layer's weight, what is given, how a call is computed, its results.

NamedTuples without state, which torch.compile traces.

Letters: M tokens, N out features, K in features, R rank.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_kernels.quant import Weight


class DoraWeight(NamedTuple):
    """A frozen weight and the DoRA adapter over it. Its direction is weight + scaling * lora_B @ lora_A."""

    weight: Weight  # (N, K)
    lora_A: Tensor  # (R, K)
    lora_B: Tensor  # (N, R)
    magnitude: Tensor  # (N,); None where the direction alone is meant, as in the backward pass: nothing reads it there
    scaling: float


class Given(NamedTuple):
    """Results made before a call and handed in; the call makes its own of those that are None."""

    norm: Tensor | None = None  # (N,), the row norms of the direction
    gain: Tensor | None = None  # (N,) = magnitude / norm, given with norm or not at all
    low: Tensor | None = None  # (M, R) = x @ lora_A.T
    merged: Tensor | None = None  # (N, K) = gain * direction, for the backward pass


NOTHING_GIVEN = Given()


class How(NamedTuple):
    """The choices made before a call. None of them depends on the number of tokens."""

    base_dtype: torch.dtype  # in which x meets the weight
    dtype: torch.dtype  # in which x meets the adapter
    way: str  # options(way=...)
    save: str  # the tensor that the forward pass saves for dmagnitude, one of plan.INTERMEDIATES; "" for none
    backend: str  # options(backend=...)
    # for the forward pass alone
    save_low: bool = False  # whether it saves low
    exact: bool = False  # options(precision="exact"): base is not rounded
    # for the backward pass alone
    dropped: bool = False  # whether the adapter has seen dropout(x)
    norm_grad: bool = False  # whether gradients go through the norm


class Call(NamedTuple):
    """One forward pass: x and x_dropped (M, K)."""

    x: Tensor  # in how.base_dtype
    x_dropped: Tensor | None  # in how.dtype
    layer: DoraWeight
    bias: Tensor | None  # (N,)
    given: Given
    how: How


class Forward(NamedTuple):
    """The results of a forward pass; norm and gain are None where given, low and intermediate where not asked for."""

    y: Tensor  # (M, N)
    norm: Tensor | None  # (N,)
    gain: Tensor | None  # (N,)
    low: Tensor | None  # (M, R)
    intermediate: Tensor | None  # (M, N), as how.save says


class Saved(NamedTuple):
    """The tensors that a forward pass leaves for its backward pass."""

    x: Tensor | None  # (M, K), what the adapter saw
    norm: Tensor  # (N,)
    gain: Tensor  # (N,)
    low: Tensor | None  # (M, R)
    intermediate: Tensor | None  # (M, N), as how.save says
    merged: Tensor | None  # (N, K), as in Given
    magnitude_dtype: torch.dtype
    bias_dtype: torch.dtype


class Needs(NamedTuple):
    """The gradients that a backward pass has to compute."""

    x: bool
    x_dropped: bool
    lora_A: bool
    lora_B: bool
    magnitude: bool
    bias: bool
    low: bool = False
    """True if the forward pass was given low: dA is then made from dlow, elsewhere."""


class Gradients(NamedTuple):
    """The results of a backward pass, with the fields of Needs; None where not needed."""

    x: Tensor | None  # (M, K)
    x_dropped: Tensor | None  # (M, K)
    lora_A: Tensor | None  # (R, K)
    lora_B: Tensor | None  # (N, R)
    magnitude: Tensor | None  # (N,)
    bias: Tensor | None  # (N,)
    low: Tensor | None  # (M, R)


class Unfinished(NamedTuple):
    """norm and gain that the step which reads gain first is to write: `start_norm` has left the sums they come from."""

    squares: Tensor  # (parts, N); the sum over the parts is norm^2
    magnitude: Tensor  # (N,)
    norm: Tensor  # (N,), to be written
    gain: Tensor  # (N,), to be written


class Prepared(NamedTuple):
    """The tensors that the first step of a backward pass, `merge` or `prepare`, writes for the steps after it."""

    # (N, R) = factor * gain * lora_B, rounded once, and in the form of lora_B; None where no product is made with it
    scaled_B: Tensor | None
    factor: float
    counters: Tensor | None  # (3, ...), int32: see `counters`; None where no step counts


class Epilogue(NamedTuple):
    """The operands of the last step, gain * (base + scaling * low @ lora_B.T), whatever base and low are."""

    base: Tensor | None  # (M, N); None where no gradient asks for it
    low: Tensor  # (M, R)
    lora_B: Tensor  # (N, R)
    gain: Tensor  # (N,)
    scaling: float


class EpilogueGradients(NamedTuple):
    """The gradients of an Epilogue and its bias; None where not needed."""

    base: Tensor | None  # (M, N)
    low: Tensor | None  # (M, R)
    lora_B: Tensor | None  # (N, R)
    gain: Tensor | None  # (N,)
    bias: Tensor | None  # (N,)


class Steps(NamedTuple):
    """The steps that passes.py composes, defined in reference.py: `PYTORCH` in pytorch.py, `KERNELS` in kernels/."""

    dense: Callable[..., Tensor]
    factors: Callable[..., tuple[Tensor, ...]]
    norm: Callable[..., tuple[Tensor, Tensor | None]]
    start_norm: Callable[..., tuple[Tensor, Tensor, Unfinished | None]]
    grouped_norm: Callable[..., tuple[Tensor, Tensor]]
    merge: Callable[..., Tensor]
    counters: Callable[..., Tensor | None]
    prepare: Callable[..., None]
    project: Callable[..., Tensor]
    epilogue: Callable[..., Tensor]
    fused_forward: Callable[..., tuple[Tensor, Tensor | None]]
    merged_forward: Callable[..., tuple[Tensor, Tensor | None, Tensor, Tensor | None]]
    token_sums: Callable[..., None]
    outer_product: Callable[..., Tensor]
    dx: Callable[..., Tensor]
    fork: Callable[..., Any]
    bank_epilogue: Callable[..., Tensor]
