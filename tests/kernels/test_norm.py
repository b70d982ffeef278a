"""The norm in parts, finished by whoever reads it, and what a backward pass begins with; test_steps.py has more."""

import pytest
import torch

from dora_kernels import reference
from dora_kernels.types import Prepared
from tests.support.problem import DEVICE, Problem
from tests.support.step_problem import close, tiles

kernels = pytest.importorskip("dora_kernels.kernels")

from dora_kernels.kernels.merge import merge_and_start_norm  # noqa: E402

SCALING = 0.75
# N, K, R and the parts of the block that has most, in the interpreter: one block in several parts, whole blocks, blocks
# that are cut and others that are not, in chunks of R that stay (20) and that are walked (40); nothing to sum
SHAPES = ((20, 400, 20, 6), (250, 64, 3, 1), (70, 304, 20, 4), (70, 304, 40, 2), (100, 96, 5, 2), (33, 0, 4, 1))


def made(N: int, K: int, R: int) -> tuple[torch.Tensor, ...]:
    """weight with a row of zeros, lora_A, lora_B, magnitude."""
    problem = Problem.random(1, N, K, R)
    problem.weight[1] = problem.lora_B[1] = 0
    return problem.weight, problem.lora_A, problem.lora_B, problem.magnitude


@pytest.mark.parametrize(("N", "K", "R", "most"), SHAPES)
def test_the_parts_of_a_norm(N, K, R, most):
    """Parts that a block does not have are zeros, and the same call gives the same bits."""
    *adapter, magnitude = made(N, K, R)
    expected, _ = reference.norm(*adapter, SCALING)
    _, _, unfinished = kernels.start_norm(*adapter, SCALING, magnitude)
    assert unfinished.squares.shape == (most if DEVICE == "cpu" else len(unfinished.squares), N)
    assert (unfinished.squares >= 0).all()
    close(unfinished.squares.sum(0).sqrt(), expected)
    again = kernels.start_norm(*adapter, SCALING, magnitude)[2].squares
    assert torch.equal(again, unfinished.squares)


@pytest.mark.parametrize(("N", "K", "R", "most"), SHAPES)
def test_whoever_reads_the_gain_first_writes_it(N, K, R, most):
    """norm and gain of each row, whichever programs share its block; the merged weight is made with that gain."""
    *adapter, magnitude = made(N, K, R)
    norm, gain, unfinished = kernels.start_norm(*adapter, SCALING, magnitude)
    merged = kernels.merge(*adapter, gain, SCALING, unfinished=unfinished)
    expected_norm, expected_gain = reference.norm(*adapter, SCALING, magnitude)
    close(norm, expected_norm)
    close(gain, expected_gain)
    close(merged, reference.merge(*adapter, gain, SCALING))
    assert norm[1] == gain[1] == 0


@pytest.mark.parametrize(("N", "K", "R", "most"), SHAPES)
def test_a_weight_is_merged_and_its_norm_started_in_one_pass(N, K, R, most):
    """Each by itself has the same bits, where as many programs share the work, and the same call has them again."""
    *adapter, magnitude = made(N, K, R)
    with tiles("merge", {"waves": 4}):  # in the interpreter as many as the norm's
        merged, norm, gain, unfinished = merge_and_start_norm(*adapter, SCALING, magnitude, adapter[0].dtype)
        again = merge_and_start_norm(*adapter, SCALING, magnitude, adapter[0].dtype)
    assert torch.equal(again[0], merged) and torch.equal(again[3].squares, unfinished.squares)
    assert torch.equal(merged, kernels.merge(*adapter, None, SCALING))
    assert unfinished.norm is norm and unfinished.gain is gain and unfinished.magnitude is magnitude
    expected, _ = reference.norm(*adapter, SCALING)
    close(unfinished.squares.sum(0).sqrt(), expected)
    if DEVICE == "cpu":
        assert len(unfinished.squares) == most
        assert torch.equal(unfinished.squares, kernels.start_norm(*adapter, SCALING, magnitude)[2].squares)


def test_the_norm_is_that_of_what_is_not_rounded():
    """1 + 2^-11 is 1 in half precision: 2048 of them have the norm sqrt(2048) (1 + 2^-11)."""
    weight, magnitude = torch.ones(3, 2048, dtype=torch.bfloat16, device=DEVICE), torch.ones(3, device=DEVICE)
    lora_A, lora_B = weight[:1].clone(), torch.ones(3, 1, dtype=torch.bfloat16, device=DEVICE)
    merged, *_, unfinished = merge_and_start_norm(weight, lora_A, lora_B, 2.0**-11, magnitude, torch.bfloat16)
    assert torch.equal(merged, weight)
    expected = torch.full((3,), 2048 * (1 + 2**-11) ** 2, device=DEVICE)
    torch.testing.assert_close(unfinished.squares.sum(0), expected, rtol=1e-6, atol=0)


def test_a_finished_norm_is_rounded_to_nearest():
    """As in the norm of whole rows: in float32 the sum of squares is a number that can be said."""
    weight, zeros = torch.zeros(7, 40, device=DEVICE), torch.zeros(7, 1, device=DEVICE)
    weight[:, 3] = torch.arange(7, device=DEVICE)
    weight[:, 39] = 1  # in another step
    magnitude = torch.full((7,), 3.0, device=DEVICE)
    norm, gain, unfinished = kernels.start_norm(weight, zeros[:1].expand(1, 40).contiguous(), zeros, 1.0, magnitude)
    kernels.merge(weight, weight[:1], zeros, gain, 1.0, unfinished=unfinished)
    exact = (torch.arange(7, device=DEVICE, dtype=torch.float64) ** 2 + 1).sqrt()
    assert torch.equal(norm, exact.float()) and torch.equal(gain, (magnitude.double() / norm.double()).float())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("by_merge", (False, True))
def test_what_a_backward_pass_begins_with(by_merge, dtype):
    """scaled_B is rounded once from float32, and every counter is zeroed, of which there are more than programs."""
    problem = Problem.random(1, 33, 20, 20, dtype)
    gain = 0.5 + torch.rand(33, device=DEVICE)
    counters = torch.full((3, 1000), 7, dtype=torch.int32, device=DEVICE)
    prepared = Prepared(torch.empty_like(problem.lora_B), 0.3, counters)
    if by_merge:
        kernels.merge(problem.weight, problem.lora_A, problem.lora_B, gain, SCALING, prepared=prepared)
    else:
        kernels.prepare(prepared, problem.lora_B, gain)
    assert torch.equal(prepared.scaled_B, ((0.3 * gain)[:, None] * problem.lora_B.float()).to(dtype))
    assert not counters.any()


@pytest.mark.parametrize(("N", "K"), ((0, 5), (5, 0), (0, 0)))
def test_an_empty_layer_begins_a_backward_pass_too(N, K):
    *adapter, magnitude = (torch.zeros(shape, device=DEVICE) for shape in ((N, K), (3, K), (N, 3), (N,)))
    for by_merge in (False, True):
        prepared = Prepared(adapter[2].clone().fill_(9), 1.0, torch.ones(40, dtype=torch.int32, device=DEVICE))
        if by_merge:
            norm, gain, unfinished = kernels.start_norm(*adapter, SCALING, magnitude + 1)
            kernels.merge(*adapter, gain, SCALING, unfinished=unfinished, prepared=prepared)
            assert not norm.any() and not gain.any()
        else:
            kernels.prepare(prepared, adapter[2], magnitude)
        assert not prepared.counters.any() and not prepared.scaled_B.any()
