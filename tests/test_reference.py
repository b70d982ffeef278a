"""What the reference does beyond the definition: blocks, and a batch norm's one pass in place of conversions."""

import pytest
import torch

from dora_kernels import reference
from tests.problem import DEVICE

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "contiguous": lambda M, N: torch.randn(M, N),
    "transposed": lambda M, N: torch.randn(N, M).T,
    "expanded": lambda M, N: torch.randn(N).expand(M, N),  # what y.sum().backward() sends
}


@pytest.mark.parametrize("columns", (1, 1000, 1280, 4096, 50_000))
@pytest.mark.parametrize("rows", (0, 1, 300, 3072))
def test_blocks_cover_the_rows_once(rows, columns):
    for device in ("cpu", "cuda"):
        blocks = list(reference._row_blocks(rows, columns, torch.device(device)))
        assert [row for block in blocks for row in range(rows)[block]] == list(range(rows))


def test_the_size_of_a_block_is_the_device_s():
    def first(columns, device):
        return next(reference._row_blocks(1 << 20, columns, torch.device(device))).stop

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
        reference._scale_columns(matrix, gain, added, out)
        expected = matrix.double() * gain.double() + (0 if added is None else added.double())
        # one ulp of the dtype, or of float32 before it: a sum that cancels
        torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((0, 5), (1, 1), (5, 3), (600, 70)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wider", (False, True), ids=("same", "wider"))
def test_column_sums(wider, dtype, shape, layout):
    columns = LAYOUTS[layout](*shape).to(DEVICE, dtype)
    accumulate = reference.accumulate_dtype(dtype)
    kept = torch.randn(shape, device=DEVICE).to(accumulate if wider else dtype)
    dot, total = reference._column_sums(columns, kept, True, accumulate)
    assert dot.dtype == total.dtype == accumulate
    torch.testing.assert_close(dot.double(), (columns.double() * kept.double()).sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total.double(), columns.double().sum(0), rtol=1e-4, atol=1e-4)
    alone = reference._column_sums(columns, None, True, accumulate)[1]
    torch.testing.assert_close(alone, total, rtol=1e-4, atol=1e-4)


def test_many_tokens_in_float32_are_summed_as_exactly_as_by_torch():
    columns, kept = torch.randn(2, 30_000, 8, device=DEVICE)
    dot, _ = reference._column_sums(columns, kept, False, torch.float32)
    exact = (columns.double() * kept.double()).sum(0)
    assert (dot - exact).norm() <= 2 * ((columns * kept).sum(0) - exact).norm() + 1e-7 * exact.norm()


@pytest.mark.parametrize("rank", (0, 1, 16))
def test_the_product_onto_the_low_rank_term_is_rounded_as_base_is(rank):
    x, weight = torch.randn(65, 130, device=DEVICE).bfloat16(), torch.randn(70, 130, device=DEVICE).bfloat16()
    low, lora_B = torch.randn(65, rank, device=DEVICE).bfloat16(), torch.randn(70, rank, device=DEVICE).bfloat16()
    z = reference.product_onto_low_rank(x, weight, low, lora_B, 0.25)
    base = x.double() @ weight.double().T
    exact = base + 0.25 * low.double() @ lora_B.double().T
    error, base_error = ((z - exact).norm() / exact.norm()), ((x @ weight.T - base).norm() / base.norm())
    assert error <= 1.1 * base_error
