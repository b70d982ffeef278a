"""Second and third derivatives on the routes by which they are asked for, and how far two sets of them are apart."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Found = dict[str, list[Tensor]]


def weights(y: Tensor) -> Tensor:
    """A constant dy, another number for each element."""
    return torch.cos(torch.arange(y.numel(), device=y.device, dtype=torch.float64)).view(y.shape).to(y.dtype)


def grad(of: Tensor, leaves: Sequence[Tensor], **keywords: bool) -> list[Tensor]:
    """The gradients of a scalar; zeros where there is none."""
    if not of.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(of, leaves, allow_unused=True, **keywords)
    return [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, found, strict=True)]


def squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of their squares, each in proportion to its size, which may differ by orders of magnitude."""
    return sum(one.double().square().sum() / (1 + one.detach().double().square().mean()) for one in tensors)


def derivatives(call: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Found:
    """What depends on second derivatives of y = call() in `leaves`, and on third ones."""
    for leaf in leaves:
        leaf.grad = None
    y = call()
    first = grad((y * weights(y)).sum(), leaves, create_graph=True)
    (squares(first) + call().double().square().mean()).backward()
    found = {"penalty": [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]}
    first = grad(call().double().sin().sum(), leaves, create_graph=True)
    found["first"] = [one.detach() for one in first]
    second = grad(squares(first), leaves, create_graph=True)
    found["second"] = [one.detach() for one in second]
    found["third"] = grad(squares(second), leaves)
    return found


def assert_equal(ours: Found, exact: Found, limit: float = 1e-9) -> None:
    """Each tensor within `limit` of the exact one, in the RMS over its elements; zeros would have an error of 1."""
    assert limit < 0.3 and ours.keys() == exact.keys()
    for route, tensors in exact.items():
        assert any(one.any() for one in tensors), route
        for index, (one, other) in enumerate(zip(ours[route], tensors, strict=True)):
            assert one.shape == other.shape and one.isfinite().all(), (route, index)
            scale = other.double().square().mean().sqrt() if other.numel() else 0
            error = (one.double() - other.double()).square().mean().sqrt() if other.numel() else 0
            assert error <= limit * scale, (route, index, tuple(one.shape), float(error), float(scale))
