"""dora_linear on whatever hypothesis draws: shapes, strides, dtypes, and numbers at the edges of what they can hold.

The measure is that of testing.compare: the RMS error against float64 is at most twice that of the definition in the
same dtypes, plus 2 ulp. Two things that it cannot say on a few elements, or where PyTorch itself breaks, are said here:

The 2 ulp are of the terms that a result sums up and not of their sum (`size_of_terms`). Where a single dmagnitude of
many terms happens to be near 0, or W + s B A cancels, neither result has a correct digit and their ratio is noise.

Where the yardstick has overflowed and we have not, it is no yardstick: those elements are held to 8 ulp of the terms.
The other way round, overflowing where PyTorch does not, is a failure.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import dora_kernels
from dora_kernels import options
from dora_kernels.planning.options import WAYS
from dora_kernels.reference import dora_linear_ref
from dora_kernels.testing import WORST_RATIO
from dora_kernels.types import DoraWeight
from tests.support.problem import BACKENDS, DEVICE, DTYPES, Problem, Results

ALL_DTYPES = (*DTYPES, (torch.float64, torch.float64)) if DEVICE == "cpu" else DTYPES
TENSORS = ("x", "weight", "lora_A", "lora_B", "magnitude", "bias", "dy")
LAYOUTS = ("contiguous", "transposed", "every_other", "offset", "expanded", "reversed_strides")
# fixed, so that a push is not refused for what another one left; nightly looks further, at the same places every night
FAST = settings(
    derandomize=True, max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
SLOW = settings(FAST, max_examples=1000)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers in another layout; "expanded" repeats the first index of every axis but the last."""
    if layout == "transposed":
        return tensor.T.contiguous().T if tensor.dim() == 2 else tensor
    if layout == "every_other":
        wide = tensor.new_empty((*tensor.shape[:-1], 2 * tensor.shape[-1]))
        return wide[..., ::2].copy_(tensor)
    if layout == "offset":  # no pointer is aligned, no row begins where the last one ended
        buffer = tensor.new_empty([size + 3 for size in tensor.shape])
        return buffer[tuple(slice(1, size + 1) for size in tensor.shape)].copy_(tensor)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape) if tensor.numel() else tensor
    if layout == "reversed_strides" and tensor.dim() == 2:
        tall = tensor.new_empty((2 * tensor.shape[1], tensor.shape[0] + 5))
        return tall.T[: tensor.shape[0], ::2].copy_(tensor)
    return tensor.contiguous()


@dataclass(frozen=True)
class Case:
    """One call; `edge` names what is special about its numbers."""

    shape: tuple[int, int, int, int]
    dtypes: tuple[torch.dtype, torch.dtype]
    scaling: float
    bias: bool
    edge: str
    layouts: tuple[str, ...]
    backend: str
    way: str
    seed: int

    def problem(self) -> Problem:
        """Its tensors."""
        M, N, K, R = self.shape
        problem = Problem.random(M, N, K, R, *self.dtypes, bias=self.bias, seed=self.seed, scaling=self.scaling)
        getattr(self, "_" + self.edge)(problem)
        problem.magnitude = problem.magnitude.nan_to_num()  # the norm may be too large for float16
        for name, layout in zip(TENSORS, self.layouts, strict=True):
            if getattr(problem, name) is not None:
                setattr(problem, name, laid_out(getattr(problem, name), layout))
        return problem

    def _nothing(self, problem: Problem) -> None:
        pass

    def _zero_rows(self, problem: Problem) -> None:
        problem.weight[::2] = 0
        problem.lora_B[::2] = 0

    def _odd_magnitudes(self, problem: Problem) -> None:
        problem.magnitude[::2] *= -1
        problem.magnitude[::3] = 0

    def _gain_near_one(self, problem: Problem) -> None:
        direction = problem.weight.double() + problem.scaling * problem.lora_B.double() @ problem.lora_A.double()
        spread = 1 + 1e-3 * torch.linspace(-1, 1, len(problem.magnitude), dtype=torch.float64, device=DEVICE)
        problem.magnitude = (spread * direction.norm(dim=1)).to(problem.magnitude.dtype)

    def _cancellation(self, problem: Problem) -> None:
        """|W + s B A| = 1e-3 |W|, or what rounding the weight to its dtype leaves."""
        adapter = problem.scaling * problem.lora_B.double() @ problem.lora_A.double()
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(adapter.shape, dtype=torch.float64, generator=generator).to(DEVICE)
        problem.weight = (-adapter * (1 + 1e-3 * noise)).to(problem.weight.dtype)
        norm = torch.linalg.vector_norm(problem.weight.double() + adapter, dim=1)
        problem.magnitude = (1.25 * norm).to(problem.magnitude.dtype)

    def _large(self, problem: Problem) -> None:
        """Close to the largest float16, above it here and there."""
        problem.x *= 2e4
        problem.dy *= 500


EDGES = tuple(name[1:] for name in vars(Case) if name.startswith("_") and not name.startswith("__"))
sizes = st.sampled_from((1, 2, 3, 7, 13, 31, 33, 37, 64))


@st.composite
def cases(draw) -> Case:
    M = draw(st.sampled_from((0, 1, 2, 5, 17, 31, 37, 64)))
    R = draw(st.sampled_from((1, 2, 5, 16, 17, 41)))
    edge, dtypes = draw(st.sampled_from(EDGES)), draw(st.sampled_from(ALL_DTYPES))
    scalings = (0.75, -1.5) if edge == "cancellation" else (0.75, 0.0, -1.5, 1e-6, 1e-25, 1e4, -1e10)
    if dtypes[1] == torch.float16:
        # the gain of a norm of 1e10 is 1e-10, and dy @ (gain * B) is below float16 before scaling brings it back
        scalings = tuple(scaling for scaling in scalings if abs(scaling) <= 1e4)
    return Case(
        (M, draw(sizes), draw(sizes), R),
        dtypes,
        draw(st.sampled_from(scalings)),
        draw(st.booleans()),
        edge,
        tuple(draw(st.sampled_from(LAYOUTS)) for _ in TENSORS),
        draw(st.sampled_from(BACKENDS)),
        draw(st.sampled_from(WAYS)),
        draw(st.integers(0, 2**16)),
    )


def size_of_terms(problem: Problem) -> Results:
    """y and every gradient with each sum taken over the absolute values of its terms, in float64.

    The gain is as much larger as the terms of the norm are than the norm: so many ulp it loses.
    """
    double = problem.to(torch.float64)
    tensors = {name: value.abs() for name, value in vars(double).items() if isinstance(value, Tensor)}
    positive = Problem(**(vars(double) | tensors | {"scaling": abs(double.scaling)}))
    norm = torch.linalg.vector_norm(double.weight + double.scaling * double.lora_B @ double.lora_A, dim=1)
    terms = torch.linalg.vector_norm(positive.weight + positive.scaling * positive.lora_B @ positive.lora_A, dim=1)
    loss = torch.where(norm == 0, 1, terms / torch.where(norm == 0, 1, norm))
    positive.magnitude = positive.magnitude * loss
    results = positive.run(dora_linear_ref, norm=norm)
    return results | {"magnitude": loss * results["magnitude"]}


def rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item() if tensor.numel() else 0.0


def assert_as_exact(problem: Problem, actual: Results, case: Case) -> None:
    """Every tensor of `actual` within the bound that the docstring of this module gives."""
    exact, yardstick, terms = problem.exact(), problem.yardstick(), size_of_terms(problem)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert value.dtype == yardstick[name].dtype and value.shape == yardstick[name].shape, name
        # dmagnitude goes through base, and under a merged weight asked for by name everything through the weight
        coarse = name == "magnitude" or case.way == "merged"
        info = max((torch.finfo(t) for t in (value.dtype, problem.weight.dtype)[: 1 + coarse]), key=lambda i: i.eps)
        value, other = value.double(), yardstick[name].double()
        least = 2 * info.smallest_normal * info.eps  # a subnormal's last place
        fine = other.isfinite() & (exact[name].abs() < info.max)
        assert value[fine].isfinite().all(), (name, "not finite where PyTorch's is")
        ulps = 2 if info.bits < 64 else 8  # exact has the rounding errors of float64, and is the yardstick there
        limit = WORST_RATIO * rms((other - exact[name])[fine]) + ulps * info.eps * rms(terms[name][fine]) + least
        assert rms((value - exact[name])[fine]) <= limit, (name, rms((value - exact[name])[fine]), limit)
        alone = value.isfinite() & ~other.isfinite()
        limit = 8 * info.eps * rms(terms[name][alone]) + least
        assert rms((value - exact[name])[alone]) <= limit, (name, "where PyTorch overflows", limit)


def check(case: Case) -> None:
    """Results, dtypes, shapes; inputs as they were; the same bits a second time."""
    problem = case.problem()
    before = {name: value.clone() for name, value in vars(problem).items() if isinstance(value, Tensor)}
    versions = {name: getattr(problem, name)._version for name in before}
    actual = problem.ours(case.backend, case.way)
    for name, value in before.items():
        assert torch.equal(getattr(problem, name), value) and getattr(problem, name)._version == versions[name], name
    again = problem.ours(case.backend, case.way)
    for name, value in actual.items():
        assert value.numel() == 0 or torch.equal(value.nan_to_num(7.0), again[name].nan_to_num(7.0)), name
    assert_as_exact(problem, actual, case)


def check_norm_and_gain(case: Case) -> None:
    """float32 whatever the inputs' dtypes, to a few ulp of |W| + |s B A|: no cancellation costs more than that."""
    problem = case.problem()
    double = problem.to(torch.float64)
    adapter = double.scaling * double.lora_B @ double.lora_A
    exact = torch.linalg.vector_norm(double.weight + adapter, dim=1)
    terms = double.weight.norm(dim=1) + (abs(double.scaling) * double.lora_B.abs() @ double.lora_A.abs()).norm(dim=1)
    with options(backend=case.backend, way=case.way):
        norm = dora_kernels.weight_norm(problem.weight, problem.lora_A, problem.lora_B, problem.scaling)
        merged = dora_kernels.merge_weight(
            problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, problem.scaling
        )
        layer = DoraWeight(problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, problem.scaling)
        _, core_norm, gain = dora_kernels.functional.linear.dora_linear_core(problem.x, layer, problem.bias)
    assert norm.dtype == (torch.float64 if problem.weight.dtype == torch.float64 else torch.float32)
    assert torch.equal(norm, core_norm)
    eps = torch.finfo(norm.dtype).eps
    assert ((norm.double() - exact).abs() <= 8 * eps * terms).all()
    assert torch.equal(norm == 0, exact == 0)
    expected = torch.where(exact == 0, 0, double.magnitude / torch.where(exact == 0, 1, exact))
    relative = 2 * eps + 8 * eps * terms / torch.where(exact == 0, 1, exact)
    assert ((gain.double() - expected).abs() <= relative * expected.abs()).all()
    exact_merged = expected[:, None] * (double.weight + adapter)
    merged_terms = expected[:, None].abs() * (double.weight.abs() + adapter.abs())
    bound = (2 * relative)[:, None] * merged_terms.norm(dim=1, keepdim=True) + 2 * torch.finfo(merged.dtype).eps * (
        exact_merged.abs() + torch.finfo(merged.dtype).smallest_normal
    )
    representable = exact_merged.abs() < 0.99 * torch.finfo(merged.dtype).max
    assert ((merged.double() - exact_merged).abs() <= bound)[representable].all()


@FAST
@given(cases())
def test_any_call(case):
    check(case)


@FAST
@given(cases())
def test_any_norm_and_gain(case):
    check_norm_and_gain(case)


@pytest.mark.nightly
@SLOW
@given(cases())
def test_any_call_at_length(case):
    check(case)


@pytest.mark.nightly
@SLOW
@given(cases())
def test_any_norm_and_gain_at_length(case):
    check_norm_and_gain(case)
