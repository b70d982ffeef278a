"""A NaN or an inf in one element of one input comes out where the definition says, and nowhere else.

What is compared is which elements of y and of every gradient are not finite. The definition in float64 says which,
by the arithmetic of IEEE 754 and the rule for zero rows: inf * 0 is NaN (a gain of 0 does not hide an inf), a row with
an inf has an infinite norm and so a gain of 0. The traps are a tile's padding (a masked load gives 0, and 0 * inf is
NaN in the sum beside it), products that a GEMM library skips for a factor of 0, and the rows of another token.
"""

import itertools
import math

import pytest
import torch

import dora_kernels
from dora_kernels import launch
from tests.problem import BACKENDS, DTYPES, Problem

WAYS = ("split", "merged")
VALUES = (math.nan, math.inf, -math.inf)
INPUTS = ("x", "weight", "lora_A", "lora_B", "magnitude", "bias", "dy")
FLOATS, MIXED = DTYPES[0], DTYPES[3]
# several tiles of the interpreter and ragged edges; everything in one tile, mostly padding
SHAPES = ((5, 6, 7, 3), (33, 34, 35, 17), (1, 6, 7, 3))
VARIANTS = {"plain": {}, "norm_grad": {"norm_grad": True}, "dropout": {}}


def problem_for(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], variant: str, zeros: bool) -> Problem:
    """zeros: a zero row, a magnitude of 0, a token of zeros, and zeros for an inf to be multiplied with."""
    problem = Problem.random(*shape, *dtypes, dropout=0.5 if variant == "dropout" else 0.0)
    if zeros:
        problem.weight[2] = problem.lora_B[2] = 0
        problem.magnitude[4] = 0
        problem.x[-1] = problem.dy[0] = 0
        problem.lora_B[1, 0] = problem.lora_A[0, 1] = 0
    return problem


def positions(tensor: torch.Tensor) -> list[tuple[int, ...]]:
    """An element of the first tile, beside the zeros of `problem_for`, and the last element of the last."""
    return [tuple(min(size - 1, index) for size, index in zip(tensor.shape, (1, 3), strict=False)),
            tuple(size - 1 for size in tensor.shape)]  # fmt: skip


def not_finite(results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: ~tensor.isfinite() for name, tensor in results.items()}


def check(problem: Problem, name: str, value: float, position: tuple[int, ...], **arguments) -> None:
    """`value` at `position` of the input `name`: on both backends, both ways."""
    tensor = getattr(problem, name)
    before = tensor[position].clone()
    tensor[position] = value
    expected = not_finite(problem.exact(**arguments))
    assert any(mask.any() for mask in expected.values()) and not all(mask.all() for mask in expected.values())
    for backend, way in itertools.product(BACKENDS, WAYS):
        actual = not_finite(problem.ours(backend, way, **arguments))
        for result in expected:
            assert torch.equal(actual[result], expected[result]), (name, value, position, backend, way, result)
    tensor[position] = before


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, in the interpreter
class TestOneElement:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("name", INPUTS)
    def test_small(self, name, variant):
        problem = problem_for(SHAPES[0], FLOATS, variant, True)
        first, last = positions(getattr(problem, name))
        check(problem, name, math.inf, first, **VARIANTS[variant])
        if variant == "plain":
            check(problem, name, math.nan, first)
            check(problem, name, -math.inf, last)

    def test_dropped_x(self):
        problem = problem_for(SHAPES[0], FLOATS, "dropout", True)
        check(problem, "x_dropped", math.inf, (1, 3))

    @pytest.mark.parametrize("name", INPUTS)
    def test_many_tiles(self, name):
        problem = problem_for(SHAPES[1], MIXED, "plain", True)
        check(problem, name, math.inf, positions(getattr(problem, name))[1])

    @pytest.mark.nightly
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("zeros", (False, True))
    @pytest.mark.parametrize("dtypes", (*DTYPES, (torch.float64, torch.float64)), ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_everything(self, shape, dtypes, zeros, variant):
        problem = problem_for(shape, dtypes, variant, zeros)
        for name in (*INPUTS, "x_dropped") if variant == "dropout" else INPUTS:
            for value in VALUES:
                for position in positions(getattr(problem, name)):
                    check(problem, name, value, position, **VARIANTS[variant])

    @pytest.mark.parametrize("name", ("x", "lora_A", "lora_B"))
    @pytest.mark.parametrize(("scaling", "dtypes"), [(0.0, dtypes) for dtypes in DTYPES] + [(-1e30, FLOATS)], ids=str)
    def test_scaling_does_not_hide_it(self, scaling, dtypes, name):
        """0 * inf is NaN: a scaling of 0 keeps an inf of the adapter visible."""
        problem = problem_for(SHAPES[0], dtypes, "plain", False)
        problem.scaling = scaling
        check(problem, name, math.inf, (1, 2))
        # where the norm is given it does not go through the gain
        check(problem, name, math.inf, (1, 2), norm=torch.ones_like(problem.magnitude, dtype=torch.float32))
        if scaling == 0:
            check(problem, name, math.inf, (1, 2), norm_grad=True)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaling", (0.75, 0.0))
@pytest.mark.parametrize("name", ("weight", "lora_A", "lora_B", "magnitude"))
def test_weight_norm_and_merge_weight(name, scaling, backend):
    """NaN and inf apart here: an infinite norm is inf."""
    for value in VALUES:
        for position in positions(getattr(Problem.random(5, 6, 7, 3), name)):
            problem = problem_for((5, 6, 7, 3), FLOATS, "plain", True)
            getattr(problem, name)[position] = value
            double = problem.to(torch.float64)
            direction = double.weight + scaling * double.lora_B @ double.lora_A
            norm = torch.linalg.vector_norm(direction, dim=1)
            gain = torch.where(norm == 0, 0, double.magnitude / torch.where(norm == 0, 1, norm))
            expected = {"norm": norm, "merged": gain[:, None] * direction}
            with launch.options(backend=backend):
                adapter = (problem.weight, problem.lora_A, problem.lora_B)
                actual = {
                    "norm": dora_kernels.weight_norm(*adapter, scaling),
                    "merged": dora_kernels.merge_weight(*adapter, problem.magnitude, scaling),
                }
            for result in expected:
                assert torch.equal(actual[result].isnan(), expected[result].isnan()), (value, position, result)
                assert torch.equal(actual[result].isinf(), expected[result].isinf()), (value, position, result)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_another_token_is_left_alone(way, backend):
    """A poisoned token, in float32 and bitwise: the y and dx of the others are what they are without it."""
    problem = Problem.random(35, 40, 70, 17, torch.float32)
    clean = problem.ours(backend, way)
    problem.x[3] = math.nan
    problem.dy[5] = math.inf
    poisoned = problem.ours(backend, way)
    rows = torch.arange(35, device=problem.x.device)
    assert torch.equal(poisoned["y"][rows != 3], clean["y"][rows != 3])
    assert torch.equal(poisoned["x"][rows != 5], clean["x"][rows != 5])
    assert poisoned["y"][3].isnan().all() and not poisoned["x"][5].isfinite().any()
