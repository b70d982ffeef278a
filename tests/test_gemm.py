"""The products that are left to the GEMM library: what they are rounded to, and what a scaling of 0 must not hide."""

import itertools

import pytest
import torch

from dora_kernels import gemm
from tests.support.problem import DEVICE


@pytest.mark.parametrize("out_dtype", (None, torch.float32), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_a_product_on_a_cpu(dtype, out_dtype):
    """Rounded by the GEMM, but for float16, whose sums could overflow."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(40, 40, generator=generator).to(dtype) for _ in range(2))
    expected = (left @ right).to(out_dtype or dtype)
    if dtype == torch.float16 and out_dtype == torch.float32:
        expected = left.float() @ right.float()
    assert torch.equal(gemm.matmul(left, right, out_dtype or dtype), expected)


def test_a_product_on_a_gpu(monkeypatch):
    """torch.mm gives the accumulator out, where it is wanted and where it is half precision that would round it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    unrounded, mm = [], torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda *arguments, **keywords: unrounded.append(keywords) or mm(*arguments, **keywords)
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        for dtype, out_dtype in itertools.product((torch.bfloat16, torch.float16, torch.float32), repeat=2):
            left = torch.empty(4, 4, device="cuda", dtype=dtype)
            assert gemm.matmul(left, left, out_dtype).dtype == out_dtype
            half = dtype != torch.float32 and out_dtype == torch.float32
            assert unrounded == ([{"out_dtype": out_dtype}] if half else []), (dtype, out_dtype)
            unrounded.clear()
            base = gemm.base_product(left, left, exact=dtype == out_dtype)
            assert base.dtype == (torch.float32 if dtype == out_dtype else dtype)
            unrounded.clear()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_an_exact_base_is_rounded_to_float32_only(dtype):
    x, weight = torch.randn(5, 130, device=DEVICE).to(dtype), torch.randn(7, 130, device=DEVICE).to(dtype)
    base = gemm.base_product(x, weight, exact=True)
    torch.testing.assert_close(base.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rank", (0, 1, 16))
def test_the_product_onto_the_low_rank_term_is_rounded_as_base_is(rank):
    x, weight = torch.randn(65, 130, device=DEVICE).bfloat16(), torch.randn(70, 130, device=DEVICE).bfloat16()
    low, lora_B = torch.randn(65, rank, device=DEVICE).bfloat16(), torch.randn(70, rank, device=DEVICE).bfloat16()
    z = gemm.product_onto_low_rank(x, weight, low, lora_B, 0.25)
    base = x.double() @ weight.double().T
    exact = base + 0.25 * low.double() @ lora_B.double().T
    error, base_error = ((z - exact).norm() / exact.norm()), ((x @ weight.T - base).norm() / base.norm())
    assert error <= 1.1 * base_error


@pytest.mark.parametrize("operand", (0, 1), ids=("left", "right"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_scaling_of_0_does_not_hide_an_inf(dtype, operand):
    """0 * inf is NaN, and a GEMM that is given an alpha of 0 skips the product."""
    operands = torch.ones(5, 3, dtype=dtype, device=DEVICE), torch.ones(3, 7, dtype=dtype, device=DEVICE)
    operands[operand][1, 2] = torch.inf
    left, right = operands
    expected = 0 * (left.double() @ right.double()).to(dtype)
    assert 0 < expected.isnan().sum() < 35
    nothing = left.new_zeros(5, 7), left.new_zeros(5, 4), left.new_zeros(7, 4)
    for actual in (
        gemm.add_product(nothing[0], left, right, 0.0),
        gemm.product_onto_low_rank(*nothing[1:], left, right.T, 0.0),
        gemm.outer_product(left.T.contiguous(), right, 0.0, dtype),
    ):
        torch.testing.assert_close(actual, expected, equal_nan=True)
