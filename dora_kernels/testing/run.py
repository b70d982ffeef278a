"""Run a function forward and backward so that mistakes show: NaN in fresh memory, one dropout mask for all."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

OfInputs = Callable[[dict[str, Any]], Tensor]


@contextlib.contextmanager
def nan_filled_memory() -> Iterator[None]:
    """Fill fresh memory (torch.empty and its kin) with NaN, so that an element that nobody writes shows.

    This is torch's own deterministic mode, with warnings where an operator has no deterministic implementation.
    """
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=not enabled or warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextlib.contextmanager
def shared_dropout(seed: int) -> Iterator[None]:
    """Let the n-th call of F.dropout draw the n-th mask of `seed`, whatever the dtype and device of its input."""
    generator = torch.Generator().manual_seed(seed)

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return input
        keep = (torch.rand(input.shape, generator=generator) >= p).to(input.device)
        return torch.where(keep, input / (1 - p), 0)

    with mock.patch.object(F, "dropout", dropout):
        yield


@dataclass(frozen=True)
class Outcome:
    """The outcome of one forward and backward pass: y, gradients by input name or None, inputs that changed."""

    y: Tensor
    gradients: dict[str, Tensor | None]
    mutated: tuple[str, ...]

    def tensors(self) -> dict[str, Tensor | None]:
        """y and the gradients, a gradient named d<input>."""
        return {"y": self.y} | {f"d{name}": gradient for name, gradient in self.gradients.items()}


def run(call: OfInputs, inputs: Mapping[str, Any], seed: int, dy: Tensor | None = None) -> Outcome:
    """One forward and backward pass of call(inputs), differentiated in every input that requires a gradient.

    The inputs are not copied, so that the function sees their strides. dy: shaped like y, random by default.
    """
    leaves = {
        name: value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    before = {name: value.clone() for name, value in leaves.items() if isinstance(value, Tensor)}
    with nan_filled_memory(), shared_dropout(seed):
        y = call(leaves)
        if not isinstance(y, Tensor):
            raise ValueError(f"check_gradients: the function returned {type(y).__name__}; expected one torch.Tensor")
        if dy is not None and (dy.shape != y.shape or dy.device != y.device):
            raise ValueError(
                f"check_gradients: dy is on {dy.device} of shape {tuple(dy.shape)} but the output is on {y.device} of "
                f"shape {tuple(y.shape)}; expected the same"
            )
        dy = random_like(y, seed) if dy is None else dy.to(y.dtype)
        wanted = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
        gradients = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True) if wanted else ()
    mutated = tuple(name for name, copy in before.items() if not same(copy, leaves[name]))
    return Outcome(y.detach(), dict(zip(wanted, gradients, strict=True)), mutated)


def random_like(tensor: Tensor, seed: int) -> Tensor:
    """Normal numbers of tensor's shape, dtype and device; up to rounding the same ones in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, dtype=torch.float64, generator=generator).to(tensor)


def same(one: Tensor, other: Tensor) -> bool:
    """True if two tensors hold the same numbers; NaN equals NaN."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
