"""The sums over the tokens: which of them the GEMM library takes, and how programs that share a block finish it.

test_steps.py has their numbers.
"""

import contextlib
import math
import random
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from dora_kernels import reference
from dora_kernels.planning import configs, devices, plan
from tests.support.problem import DEVICE, EXACT_DTYPE, Problem
from tests.support.step_problem import close

kernels = pytest.importorskip("dora_kernels.kernels")
from triton.runtime.interpreter import InterpretedFunction, interpreter_builder  # noqa: E402

module = sys.modules["dora_kernels.kernels.token_sums"]  # kernels.token_sums is the function
interpreted = pytest.mark.skipif(not devices.interpreting(), reason="a GPU chooses the order of programs by itself")

# M, N, K, R. The interpreter runs 8 programs at once, with tiles of 32 x 32 x 16.
CUT = {
    (150, 219, 40, 16): 2,  # 7 blocks of columns in 8 programs, as 112 in 132: each is in one or two of them
    (150, 90, 40, 16): 3,  # 3 in 7
    (150, 90, 40, 20): 2,  # 3 of columns and two of r each, in 8: a program begins in one and ends in another
    (330, 20, 40, 33): 4,  # one of columns and three of r: all 8 finish together
    (70, 300, 40, 3): 2,  # 10 in 8: a program has a whole block between two parts
}
parametrize_cut = pytest.mark.parametrize("shape", CUT, ids=str)


@pytest.mark.parametrize(
    ("R", "adapter", "expected"),
    [(64, torch.bfloat16, 0), (128, torch.bfloat16, 1), (128, torch.float32, 0)],
)
def test_a_high_rank_sums_its_product_in_the_gemm_library(R, adapter, expected, monkeypatch):
    problem, used = Problem.random(33, 24, 10, R, torch.bfloat16, adapter), []
    matmul, dB = module.matmul, torch.empty_like(problem.lora_B)
    monkeypatch.setattr(module, "matmul", lambda *arguments: used.append(arguments) or matmul(*arguments))
    low = problem.x.to(adapter) @ problem.lora_A.T
    kernels.token_sums(problem.dy, low, 0.75, dB=dB)
    assert len(used) == expected
    exact = 0.75 * problem.dy.double().T @ low.double()
    assert (dB - exact).norm() <= 4e-3 * exact.norm()


def sums_of(
    step: Callable, problem: Problem, counters: Tensor | None = None, infinite: int | None = None
) -> dict[str, Tensor]:
    """What token_sums makes of the problem's dy. infinite: a row whose gain is."""
    o = problem
    written = {"dB": o.lora_B, "dmagnitude": o.magnitude, "dbias": o.bias, "dz": o.dy}
    written = {name: torch.empty_like(like) for name, like in written.items()}
    gain, norm = o.magnitude.abs() + 0.5, o.magnitude.abs() + 1
    norm[-1] = 0
    if infinite is not None:
        gain[infinite] = math.inf
    base, low = o.x @ o.weight.T, o.x @ o.lora_A.T
    given = {"gain": gain, "saved": base, "norm": norm, "lora_B": o.lora_B, "counters": counters}
    step(o.dy, low, 0.75, **given, **written)
    return written


@contextlib.contextmanager
def programs_in(order: Callable[[int], list[int]]) -> Iterator[None]:
    """Inside, the interpreter runs the programs of a launch in this order of their number."""
    set_grid_idx = interpreter_builder.set_grid_idx

    def in_order(x: int, y: int, z: int) -> None:
        set_grid_idx(order(interpreter_builder.grid_dim[0])[x], y, z)

    with mock.patch.object(interpreter_builder, "set_grid_idx", in_order):
        yield


def shuffled(count: int) -> list[int]:
    return random.Random(1).sample(range(count), count)


@interpreted
@parametrize_cut
def test_who_comes_last_changes_no_bit(shape):
    problem = Problem.random(*shape, torch.float32)
    expected = sums_of(kernels.token_sums, problem)
    for order in (lambda count: list(range(count))[::-1], shuffled):
        with programs_in(order):
            for name, actual in sums_of(kernels.token_sums, problem).items():
                assert torch.equal(actual, expected[name]), name


@pytest.mark.parametrize("by_kernel", (True, False), ids=("kernel", "library"))
@parametrize_cut
def test_blocks_that_programs_share(shape, by_kernel, monkeypatch):
    """The definition, from one launch; a row's gain is infinite where several programs have its columns."""
    launched, run, parts = [], InterpretedFunction.run, []
    most_parts = configs.most_parts
    monkeypatch.setattr(InterpretedFunction, "run", lambda *given, **named: launched.append(1) or run(*given, **named))
    monkeypatch.setattr(configs, "most_parts", lambda *given: parts.append(most_parts(*given)) or parts[-1])
    monkeypatch.setattr(plan, "outer_by_kernel", lambda *ranks, **keywords: by_kernel)
    problem = Problem.random(*shape, EXACT_DTYPE)
    actual = sums_of(kernels.token_sums, problem, infinite=shape[1] - 2)
    if devices.interpreting():
        assert len(launched) == 1
        assert parts == [CUT[shape]] or not by_kernel
    for name, expected in sums_of(reference.token_sums, problem, infinite=shape[1] - 2).items():
        close(actual[name].nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))


def test_counters_belong_to_a_call():
    problem = Problem.random(150, 219, 40, 16, torch.float32)
    expected = sums_of(kernels.token_sums, problem)
    counters = torch.zeros(2, 20, dtype=torch.int32, device=DEVICE)
    for own in counters:
        for name, actual in sums_of(kernels.token_sums, problem, own).items():
            assert torch.equal(actual, expected[name]), name
    assert torch.equal(*counters) and counters[0].any()
    # nobody is the last one of a count that goes on from another call's
    stale = sums_of(kernels.token_sums, problem, counters[0])
    assert stale["dB"].isnan().all() and stale["dbias"].isnan().all() and torch.equal(stale["dz"], expected["dz"])


def test_too_few_counters_are_left_alone():
    problem = Problem.random(150, 219, 40, 16, torch.float32)
    counters = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    expected, actual = (sums_of(kernels.token_sums, problem, given) for given in (None, counters))
    assert all(torch.equal(actual[name], expected[name]) for name in expected) and not counters.any()


def test_columns_stay_whole_where_programs_cannot_count(monkeypatch):
    """On AMD's GPUs, where the barrier before the count waits for nobody's stores."""
    shared, part_of_each, problem = [], configs.most_parts, Problem.random(150, 90, 40, 20, EXACT_DTYPE)
    monkeypatch.setattr(module.Launch, "counts", False)
    monkeypatch.setattr(configs, "most_parts", lambda *given: shared.append(given) or part_of_each(*given))
    actual = sums_of(kernels.token_sums, problem)
    blocks, _, programs = shared[0]
    assert programs == configs.ceil_div(90, module.Launch.of(problem.dy, EXACT_DTYPE).config("token_sums").BLOCK_N)
    assert blocks % programs == 0
    for name, expected in sums_of(reference.token_sums, problem).items():
        close(actual[name], expected)


@interpreted
def test_an_outer_product_is_one_launch(monkeypatch):
    launched, run = [], InterpretedFunction.run
    monkeypatch.setattr(InterpretedFunction, "run", lambda *given, **named: launched.append(1) or run(*given, **named))
    problem = Problem.random(150, 90, 40, 20, EXACT_DTYPE)
    low, counters = problem.x @ problem.lora_A.T, torch.zeros(20, dtype=torch.int32)
    actual = kernels.outer_product(low, problem.dy, 0.75, EXACT_DTYPE, counters)
    close(actual, 0.75 * low.T @ problem.dy)
    assert len(launched) == 1 and counters.any()
