"""How PyTorch's steps do what test_steps.py holds to their definition: blocks of rows, and a batch norm's one pass in
place of conversions."""

import pytest
import torch

from dora_kernels import pytorch, reference
from tests.support.problem import DEVICE, Problem

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "contiguous": lambda M, N: torch.randn(M, N),
    "transposed": lambda M, N: torch.randn(N, M).T,
    "expanded": lambda M, N: torch.randn(N).expand(M, N),  # what y.sum().backward() sends
}


@pytest.mark.parametrize("columns", (0, 1, 1000, 1280, 4096, 50_000))
@pytest.mark.parametrize("rows", (0, 1, 300, 3072))
def test_blocks_cover_the_rows_once(rows, columns):
    for device in ("cpu", "cuda"):
        blocks = list(pytorch._row_blocks(rows, columns, torch.device(device)))
        assert [row for block in blocks for row in range(rows)[block]] == list(range(rows))


def test_the_size_of_a_block_is_the_device_s():
    def first(columns, device):
        return next(pytorch._row_blocks(1 << 20, columns, torch.device(device))).stop

    assert first(1280, "cpu") == 768  # 819 rows are 4 MiB: rounded down to whole tiles of a GEMM
    assert first(8192, "cpu") == 256  # at least
    assert first(8192, "cuda") == first(8192, "xpu") == 8192  # 256 MiB: few launches
    assert first(1 << 16, "cuda") == 1024


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((0, 5), (1, 1), (5, 3), (64, 70)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_columns_are_exact_and_rounded_once(dtype, shape, layout):
    matrix = LAYOUTS[layout](*shape).to(DEVICE, dtype)
    gain, bias = torch.randn(2, shape[1], device=DEVICE, dtype=reference.accumulate_dtype(dtype))
    for added in (None, bias, bias.to(dtype)):
        out = torch.empty(shape, dtype=dtype, device=DEVICE)
        pytorch._scale_columns(matrix, gain, added, out)
        expected = matrix.double() * gain.double() + (0 if added is None else added.double())
        # one ulp of the dtype, or of float32 before it: a sum that cancels
        torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((0, 5), (1, 1), (5, 3), (600, 70)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wider", (False, True), ids=("same", "wider"))
def test_column_sums(wider, dtype, shape, layout):
    dy = LAYOUTS[layout](*shape).to(DEVICE, dtype)
    accumulate = reference.accumulate_dtype(dtype)
    saved = torch.randn(shape, device=DEVICE).to(accumulate if wider else dtype)
    dot, total = pytorch._column_sums(dy, saved, True, accumulate)
    assert dot.dtype == total.dtype == accumulate
    torch.testing.assert_close(dot.double(), (dy.double() * saved.double()).sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total.double(), dy.double().sum(0), rtol=1e-4, atol=1e-4)
    alone = pytorch._column_sums(dy, None, True, accumulate)[1]
    torch.testing.assert_close(alone, total, rtol=1e-4, atol=1e-4)


def test_many_tokens_in_float32_are_summed_as_exactly_as_by_torch():
    dy, saved = torch.randn(2, 30_000, 8, device=DEVICE)
    dot, _ = pytorch._column_sums(dy, saved, False, torch.float32)
    exact = (dy.double() * saved.double()).sum(0)
    assert (dot - exact).norm() <= 2 * ((dy * saved).sum(0) - exact).norm() + 1e-7 * exact.norm()


def test_a_low_that_is_wider_than_the_columns_is_not_rounded_to_them():
    problem = Problem.random(64, 40, 36, 6, torch.bfloat16, torch.float32)
    low, gain = problem.x.float() @ problem.lora_A.T, torch.rand(40, device=DEVICE)
    dB, dz = torch.empty_like(problem.lora_B), torch.empty_like(problem.dy)
    pytorch.token_sums(problem.dy, low, 0.75, dB=dB, gain=gain, dz=dz)
    exact = 0.75 * gain[:, None] * (problem.dy.double().T @ low.double())
    assert (dB - exact).norm() < 1e-6 * exact.norm()
