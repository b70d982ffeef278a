"""float32 matrices in bfloat16 parts: what they sum to, at the edges of float32 too, and products of them."""

import math

import pytest
import torch

from tests.support.problem import DEVICE, Problem

kernels = pytest.importorskip("dora_kernels.kernels")
parts_module = pytest.importorskip("dora_kernels.kernels.parts")

from dora_kernels.kernels.launches import LaunchPlan  # noqa: E402

LARGEST = torch.finfo(torch.float32).max


def total(parts: torch.Tensor) -> torch.Tensor:
    """The sum of the parts (count, rows, columns), in float64."""
    assert parts.dtype == torch.bfloat16
    return parts.double().sum(0)


def random_matrix(*shape: int, least: int, most: int) -> torch.Tensor:
    """Numbers of all 24 bits and both signs, from 2^least to 2^most."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(least, most, shape, generator=generator)
    mantissas = 1 + torch.randint(0, 1 << 23, shape, generator=generator) / (1 << 23)
    signs = 1 - 2 * torch.randint(0, 2, shape, generator=generator)
    return torch.ldexp(signs * mantissas, exponents).to(DEVICE)


def test_three_parts_are_the_matrix_itself():
    matrix = random_matrix(50, 70, least=-110, most=128)
    (parts,) = parts_module.parts(3, matrix)
    assert parts.shape == (3, 50, 70) and torch.equal(total(parts), matrix.double())
    # a product of the first parts alone is one of bfloat16s rounded to nearest
    assert torch.equal(parts[0][matrix.abs() < 1e38], matrix.bfloat16()[matrix.abs() < 1e38])


def test_two_parts_are_the_matrix_to_16_bits():
    matrix = random_matrix(50, 70, least=-110, most=128).double()
    (parts,) = parts_module.parts(2, matrix.float())
    error = (total(parts) / matrix - 1).abs().max()
    assert 2**-18 < error <= 2**-16


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("count", (1, 2, 3))
def test_the_edges_of_float32(count):
    """What bfloat16 would round to inf; subnormals, of which the last bits are lost; zeros; inf and NaN."""
    large = torch.tensor([[LARGEST, -LARGEST, 3.4e38, 3.396e38, 3.39e38, -3.389e38]], device=DEVICE)
    (parts,) = parts_module.parts(count, large)
    assert parts.isfinite().all()
    assert ((total(parts) / large.double() - 1).abs() <= (0 if count == 3 else 2.0 ** (-8 * count + 1))).all()
    small = random_matrix(20, 20, least=-149, most=-110)
    (parts,) = parts_module.parts(count, small)
    assert (total(parts) - small).abs().max() <= max(2**-134, 2.0**-110 * 2.0 ** (-8 * count + 1))
    special = torch.tensor([[0.0, math.inf, -math.inf, math.nan]], device=DEVICE)
    (parts,) = parts_module.parts(count, special)
    assert torch.equal(parts[0, :, :3], special[:, :3].bfloat16()) and parts[0, 0, 3].isnan()
    assert not parts[1:].any()


def test_several_matrices_in_one_launch(monkeypatch):
    """Of unlike sizes, none, transposed, and with rows apart."""
    matrices = [random_matrix(*shape, least=-20, most=20) for shape in ((33, 70), (0, 5), (1, 1), (3, 1024), (70, 33))]
    matrices += [matrices[0].T, matrices[0][:, 3:50]]
    launched, launch = [], LaunchPlan.launch
    monkeypatch.setattr(
        LaunchPlan, "launch", lambda plan, grid, *given: launched.append(grid) or launch(plan, grid, *given)
    )
    results = parts_module.parts(3, *matrices)
    assert launched == [(3 + 1 + 3 + 3 + 3 + 2,)]
    for matrix, parts in zip(matrices, results, strict=True):
        assert torch.equal(total(parts), matrix.double())
        assert parts.stride(0) == matrix.shape[1] * parts.stride(2)  # side by side along the rank
    assert results[-2].mT.is_contiguous()
    assert parts_module.parts(3, matrices[1])[0].shape == (3, 0, 5)


@pytest.fixture
def half_weight() -> Problem:
    """float32 adapters over a bfloat16 weight: what kernels multiply in parts."""
    return Problem.random(33, 40, 70, 20, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("setting", "count"), [("highest", 3), ("high", 2)])
def test_the_products_of_parts(half_weight, setting, count):
    """Six are as exact as float32, three have 4e-6: torch.set_float32_matmul_precision chooses."""
    x, A, B = half_weight.x, half_weight.lora_A, half_weight.lora_B
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        assert [factor.dim() for factor in kernels.factors(x.half(), A, B)] == [2, 2]
        assert [factor.dim() for factor in kernels.factors(x.float(), A, B)] == [2, 2]
        factors = kernels.factors(x, A, B)
        assert [factor.shape for factor in factors] == [(count, *A.shape), (count, *B.shape)]
        low = kernels.project(x, A)
        update = kernels.merge(torch.zeros_like(half_weight.weight), A, B, None, 1.0, out_dtype=torch.float32)
        for product, exact in ((low, x.double() @ A.double().T), (update, B.double() @ A.double())):
            error = ((product - exact).square().mean() / exact.square().mean()).sqrt()
            assert (error < 1.5e-7) if count == 3 else (5e-7 < error < 1e-5)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("value", (math.inf, -math.inf, math.nan))
def test_inf_in_one_factor(half_weight, value):
    """inf times a number is inf, whatever the signs of the number's parts, of which some are 0."""
    x, A, B = half_weight.x, half_weight.lora_A, half_weight.lora_B
    A[3, 5], B[7, 3], x[2, 5] = 0.0, value, value
    A[:, 7] = torch.tensor([1.0, -3.0] * 10)  # whose lower parts are zeros
    low, expected = kernels.project(x, A), x.double() @ A.double().T
    assert torch.equal(low.isnan(), expected.isnan()) and torch.equal(low.isinf(), expected.isinf())
    merged = kernels.merge(half_weight.weight, A, B, None, 1.0)
    expected = half_weight.weight.double() + B.double() @ A.double()
    assert torch.equal(merged.isnan(), expected.isnan()) and torch.equal(merged.isinf(), expected.isinf())
    assert merged.isnan()[7].sum() == (70 if math.isnan(value) else 1)
    y = kernels.epilogue(expected[:33, :40].bfloat16(), low, B[:40], half_weight.magnitude, None, 1.0, torch.float32)
    assert y.shape == (33, 40) and not y[2].isfinite().any() and not y[:, 7].isfinite().any()


def test_largest_numbers():
    """A number that bfloat16 rounds to inf is one in a product, too."""
    large = torch.full((5, 3), LARGEST, device=DEVICE)
    ones = torch.full((3, 4), 0.25, device=DEVICE)
    product = kernels.merge(torch.zeros(5, 4, dtype=torch.bfloat16, device=DEVICE), ones, large, None, 1.0,
                            out_dtype=torch.float32)  # fmt: skip
    torch.testing.assert_close(product, large @ ones, rtol=1e-6, atol=0)
