"""No kernel writes outside of what it was given: guards stand before and after every tensor that a pass allocates."""

import math

import pytest
import torch

from tests.support.problem import Problem

pytest.importorskip("triton")

from tests.support.launcher_operands import OPERANDS, launch, tensors_of  # noqa: E402

GUARD, UNTOUCHED = 1024, 77.0
# ragged in every axis, a rank of one chunk exactly, one of everything: a mask that lets one element more through
# writes behind the last row
SHAPES = ((33, 70, 90, 20), (7, 24, 10, 33), (5, 20, 80, 33), (5, 12, 40, 16), (1, 1, 1, 1))


@pytest.fixture
def guards(monkeypatch):
    """The guards of everything allocated since; in between, fresh memory is NaN."""
    made = []

    def allocate(shape, dtype, device):
        size = math.prod(shape)
        whole = torch.full((size + 2 * GUARD,), UNTOUCHED, dtype=dtype, device=device)
        made.extend((whole[:GUARD], whole[GUARD + size :]))
        return whole[GUARD : GUARD + size].fill_(math.nan if whole.is_floating_point() else 12345).view(shape)

    def new_empty(self, *shape, dtype=None, device=None, **_):
        shape = shape[0] if shape and not isinstance(shape[0], int) else shape
        return allocate(tuple(shape), dtype or self.dtype, device or self.device)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda tensor: allocate(tensor.shape, tensor.dtype, tensor.device))
    return made


@pytest.mark.parametrize("way", ("split", "merged"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "arguments", ({}, {"norm_grad": True}, {"dropout": 0.4}), ids=("plain", "norm_grad", "dropout")
)
def test_nothing_is_written_outside(arguments, shape, way, guards):
    problem = Problem.random(*shape, dropout=arguments.get("dropout", 0.0))
    results = problem.ours("triton", way, **({"norm_grad": True} if "norm_grad" in arguments else {}))
    assert len(guards) > 10 and all((guard == UNTOUCHED).all() for guard in guards)
    assert all(tensor.isfinite().all() for tensor in results.values())


def hemmed(tensor: torch.Tensor, contiguous: bool) -> torch.Tensor:
    """The same numbers with NaN all around them; with NaN before and behind them, where they must be contiguous."""
    hem = 64
    if contiguous:
        memory = torch.full((tensor.numel() + 2 * hem,), math.nan, dtype=tensor.dtype, device=tensor.device)
        return memory[hem:-hem].view(tensor.shape).copy_(tensor)
    memory = torch.full([size + 2 * hem for size in tensor.shape], math.nan, dtype=tensor.dtype, device=tensor.device)
    inner = memory[tuple(slice(hem, hem + size) for size in tensor.shape)]
    return inner.copy_(tensor)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("launcher", OPERANDS)
def test_nothing_is_read_outside(launcher, shape, monkeypatch):
    """What lies around an operand is NaN, and 0 * NaN would show, too."""
    monkeypatch.setattr("dora_kernels.planning.plan.project_by_kernel", lambda *arguments, **keywords: True)
    tensors = tensors_of(Problem.random(*shape))
    expected = [tensor.clone() for tensor in launch(launcher, tensors)]
    for operand in OPERANDS[launcher]:
        actual = launch(launcher, tensors | {operand: hemmed(tensors[operand], launcher == "grouped_norm")})
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)
