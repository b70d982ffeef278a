"""A NaN or an inf in one element of one input comes out where the definition says, and nowhere else.

Compared first: which elements of y and of every gradient are not finite. The definition in float64 says which, by the
arithmetic of IEEE 754 and the rule for zero rows: inf * 0 is NaN (a gain of 0 does not hide an inf), a row with an inf
has an infinite norm and so a gain of 0. The traps are a tile's padding (a masked load gives 0, and 0 * inf is
NaN in the sum beside it), products that a GEMM library skips for a factor of 0, and the rows of another token.

Then which of them are inf, -inf and NaN, where numbers at the edge of arithmetic meet: there the trap is a factor that
is taken out of a sum, since inf - inf and inf * 0 are NaN.
"""

import itertools
import math
import random

import pytest
import torch

import dora_kernels
from dora_kernels import options
from dora_kernels.functional.rescale import rescale
from tests.support.problem import BACKENDS, DEVICE, DTYPES, Problem

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
            with options(backend=backend):
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


def classes(tensor: torch.Tensor) -> torch.Tensor:
    """0 where finite, 1 where inf, -1 where -inf, 2 where NaN."""
    return torch.where(tensor.isnan(), 2, torch.where(tensor.isinf(), tensor.sign(), 0)).to(torch.int8)


def dora_linear_through_V(
    x, weight, lora_A, lora_B, magnitude, scaling, bias=None, *, x_dropped=None, norm=None, norm_grad=False, merged
):
    """The definition with weight + scaling * lora_B @ lora_A in one, and the gain in it (merged) or behind it."""
    V = weight + scaling * lora_B @ lora_A
    if norm is None:
        norm = torch.linalg.vector_norm(V, dim=1)
        norm = norm if norm_grad else norm.detach()
    gain = torch.where(norm == 0, 0, magnitude / torch.where(norm == 0, 1, norm))
    adapter_input = x if x_dropped is None else x_dropped
    y = adapter_input @ (gain[:, None] * V).T if merged else gain * (adapter_input @ V.T)
    y = y if x_dropped is None else y + (x @ weight.T - adapter_input @ weight.T)
    return y if bias is None else y + bias


def wrong(problem: Problem, way: str, actual: dict, **arguments) -> list[str]:
    """The results with an element that is finite or not where it should not be, or inf where the definition has not.

    The definition in float64, or in the problem's own dtypes where a finite number gets too large for those. A merged
    weight is the definition of what it makes. NaN may stand for an infinity: see docs/correctness.md.
    """
    exact, yardstick = problem.exact(**arguments), problem.yardstick(**arguments)
    double = problem.to(torch.float64)
    others = [double.run(dora_linear_through_V, **arguments, merged=merged) for merged in (True, False)]
    names = []
    for name, value in actual.items():
        is_, of_exact, of_torch = classes(value), classes(exact[name]), classes(yardstick[name])
        of_others = [classes(other[name]) for other in others]
        right = is_ == of_exact
        right |= (is_ == of_torch) & (of_exact == 0)
        right |= (exact[name].abs() > torch.finfo(value.dtype).max / 2) & (is_ != 0)
        right |= (is_ == 2) & (of_exact != 0)
        if name in ("y", "x", "x_dropped", "magnitude") or "norm_grad" in arguments:
            right |= (is_ == of_others[0]) | (is_ == of_others[1])
        names += [] if right.all() else [f"{name} {way}"]
    return names


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
class TestEdges:
    @pytest.mark.parametrize(
        ("R", "dtypes"),
        [(1, MIXED), (20, FLOATS), (130, FLOATS)]  # 130: the GEMM library's product
        + [pytest.param(R, dtypes, marks=pytest.mark.nightly) for R in (1, 20, 130) for dtypes in DTYPES],
        ids=str,
    )
    @pytest.mark.parametrize("M", (0, 1, 3, 40))
    def test_the_gradient_of_lora_B_under_an_infinite_gain(self, R, M, dtypes):
        """NaN where tokens of both signs meet, or a zero; inf where all are of one sign. The other rows are as ever."""
        problem = Problem.random(M, 20, 7, R, *dtypes)
        clean = {way: problem.ours(backend, way) for way in WAYS for backend in BACKENDS}
        problem.magnitude[3], problem.magnitude[19] = math.inf, -math.inf
        if M == 3:
            problem.dy[1, 3] = 0
            problem.dy[:, 19] = 1
            problem.x[:] = problem.x[:1]
        expected = classes(problem.exact()["lora_B"])
        assert (expected[3] == (2 if M > 1 else 0 if M == 0 else expected[3])).all()
        assert M not in (1, 3) or (expected[19].abs() == 1).all()
        others = [n for n in range(20) if n not in (3, 19)]
        for backend, way in itertools.product(BACKENDS, WAYS):
            actual = problem.ours(backend, way)["lora_B"]
            wanted = expected.clone()
            if DEVICE == "cuda" and backend == "reference":
                wanted[[3, 19]] = 2  # it would have to wait
            assert torch.equal(classes(actual), wanted), (backend, way)
            if backend == BACKENDS[-1] and M != 3:
                assert torch.equal(actual[others], clean[way]["lora_B"][others])

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("name", ("gain", "lora_B"))
    def test_rescale(self, name, backend):
        """What convolutions, embeddings and DVoRA are made of: the gain is given, and lora_B's inf is not in it."""
        problem = Problem.random(9, 20, 7, 3, torch.float32)
        tensors = {"base": problem.x @ problem.weight.T, "low": problem.x @ problem.lora_A.T}
        tensors |= {"lora_B": problem.lora_B, "gain": problem.magnitude}
        tensors[name].view(20, -1)[3, 0] = math.inf

        def run(function, dtype):
            leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors.values()]
            y = function(*leaves)
            return [y, *torch.autograd.grad(y, leaves, problem.dy.to(dtype))]

        expected = run(lambda base, low, lora_B, gain: gain * (base + 0.75 * low @ lora_B.T), torch.float64)
        with options(backend=backend):
            actual = run(lambda *leaves: rescale(*leaves, 0.75), torch.float32)
        assert any((classes(value) == 2).any() for value in expected)
        for one, other in zip(actual, expected, strict=True):
            if not (DEVICE == "cuda" and backend == "reference"):
                assert torch.equal(classes(one), classes(other))

    @pytest.mark.parametrize("seed", (0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 40))))
    def test_one_and_two_at_a_time(self, seed):
        """Edge numbers at random places of one tensor or two."""
        draw = random.Random(seed)
        for case in range(5):
            dtypes = draw.choice((FLOATS, *DTYPES))
            variant = draw.choice(("plain", "norm_grad", "dropout", "norm"))
            shape = draw.choice(((1, 6, 7, 1), (3, 6, 7, 3), (2, 5, 4, 2), (9, 34, 35, 17)))
            problem = Problem.random(*shape, *dtypes, dropout=0.5 if variant == "dropout" else 0.0, seed=case)
            arguments = {"norm": torch.ones(shape[1], device=DEVICE)} if variant == "norm" else VARIANTS[variant]
            chosen = []
            for _ in range(draw.choice((1, 2, 2))):
                name = draw.choice((*INPUTS, "x_dropped") if variant == "dropout" else INPUTS)
                tensor = getattr(problem, name)
                position = tuple(draw.randrange(size) for size in tensor.shape)
                limits = torch.finfo(tensor.dtype)
                large = 3e4 if tensor.dtype == torch.float16 else 1e30
                tensor[position] = draw.choice((math.inf, -math.inf, math.nan, 0.0, limits.smallest_normal / 4, large))
                chosen.append((name, position, tensor[position].item()))
            for backend, way in itertools.product(BACKENDS, (*WAYS, "auto")):
                found = wrong(problem, way, problem.ours(backend, way, **arguments), **arguments)
                assert not found, (backend, found, dtypes, variant, shape, chosen)
