"""The steps of the specification in several blocks of rows, which only large layers have, against their formulas;
and what the CPU path does beyond them: a batch norm's one pass in place of conversions."""

import pytest
import torch

from dora_kernels import gemm, pytorch, reference
from dora_kernels.reference import dora_linear_ref
from tests.support.problem import DEVICE, EXACT_DTYPE, GRADIENTS, TOLERANCE, Problem

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "contiguous": lambda M, N: torch.randn(M, N),
    "transposed": lambda M, N: torch.randn(N, M).T,
    "expanded": lambda M, N: torch.randn(N).expand(M, N),  # what y.sum().backward() sends
}
# three blocks of rows, the last of them ragged
ROWS = 600


@pytest.fixture
def problem(monkeypatch):
    monkeypatch.setattr(pytorch, "_BLOCK_BYTES", {"cpu": 1})  # blocks of 256 rows
    monkeypatch.setattr(pytorch, "_BLOCK_BYTES_ELSEWHERE", 1)
    return Problem.random(ROWS, ROWS, 10, 3)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def direction(problem):
    return problem.weight + 0.75 * problem.lora_B @ problem.lora_A


def test_norm_and_merge(problem):
    adapter = (problem.lora_A, problem.lora_B)
    norm = direction(problem).norm(dim=1)
    close(pytorch.norm(problem.weight, *adapter, 0.75, problem.magnitude), (norm, problem.magnitude / norm))
    gain = problem.magnitude[:, None]
    for with_gain in (False, True):
        for subtract in (False, True):
            expected = (gain if with_gain else 1) * direction(problem) - subtract * problem.weight
            actual = pytorch.merge(problem.weight, *adapter, problem.magnitude if with_gain else None, 0.75, subtract)
            close(actual, expected)


@pytest.mark.parametrize("with_residual", (False, True))
@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("with_low", (False, True))
def test_epilogue(problem, with_low, with_bias, with_residual):
    base, low = problem.x @ problem.weight.T, problem.x @ problem.lora_A.T
    expected = problem.magnitude * (base + with_low * 0.75 * low @ problem.lora_B.T) + with_bias * problem.bias
    expected = expected + with_residual * (problem.dy - base)
    actual = pytorch.epilogue(
        base, low if with_low else None, problem.lora_B, problem.magnitude, problem.bias if with_bias else None,
        0.75, EXACT_DTYPE, problem.dy if with_residual else None,
    )  # fmt: skip
    close(actual, expected)


@pytest.mark.parametrize("keep", (False, True))
@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("gain_given", (False, True))
def test_merged_forward(problem, gain_given, with_bias, keep):
    norm = direction(problem).norm(dim=1)
    gain = 2 * problem.magnitude if gain_given else problem.magnitude / norm
    z = problem.x @ direction(problem).T
    actual = pytorch.merged_forward(
        problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.magnitude,
        problem.bias if with_bias else None, gain if gain_given else None, 0.75, keep,
    )  # fmt: skip
    expected = (gain * z + with_bias * problem.bias, None if gain_given else norm, gain, z if keep else None)
    for one, other in zip(actual, expected, strict=True):
        assert one is other is None or torch.allclose(one, other, rtol=TOLERANCE["rtol"], atol=TOLERANCE["atol"])


def test_token_sums(problem):
    low, base = problem.x @ problem.lora_A.T, problem.x @ problem.weight.T
    norm = problem.magnitude + 1
    norm[3] = 0
    outputs = {
        "outer": torch.empty_like(problem.lora_B),
        "dmagnitude": torch.empty_like(norm),
        "dbias": torch.empty_like(norm),
        "scaled": torch.empty_like(problem.dy),
    }
    pytorch.token_sums(
        problem.dy, low, 0.75, gain=problem.magnitude, kept=base, norm=norm, lora_B=problem.lora_B, **outputs
    )
    product = problem.dy.T @ low
    dot = (problem.dy * (base + 0.75 * low @ problem.lora_B.T)).sum(0)
    expected = {
        "outer": 0.75 * problem.magnitude[:, None] * product,
        "dmagnitude": torch.where(norm == 0, 0, dot / norm),
        "dbias": problem.dy.sum(0),
        "scaled": problem.magnitude * problem.dy,
    }
    close(outputs, expected)


@pytest.mark.parametrize("norm_given", (False, True))
def test_the_definition_of_a_zero_row_has_gradients(norm_given):
    """0, where plain PEFT has NaN; that of the bias is the sum of dy."""
    problem = Problem.random(9, 40, 36, 6)
    problem.weight[3] = 0
    problem.lora_B[3] = 0
    norm = direction(problem).norm(dim=1) if norm_given else None
    results = problem.run(dora_linear_ref, norm=norm)
    assert all(results[name].isfinite().all() for name in ("y", *GRADIENTS))
    assert results["magnitude"][3] == 0 and (results["lora_B"][3] == 0).all()
    close(results["y"][:, 3], problem.bias[3].expand(9))
    close(results["bias"], problem.dy.sum(0))


@pytest.mark.parametrize("columns", (1, 1000, 1280, 4096, 50_000))
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
    columns = LAYOUTS[layout](*shape).to(DEVICE, dtype)
    accumulate = reference.accumulate_dtype(dtype)
    kept = torch.randn(shape, device=DEVICE).to(accumulate if wider else dtype)
    dot, total = pytorch._column_sums(columns, kept, True, accumulate)
    assert dot.dtype == total.dtype == accumulate
    torch.testing.assert_close(dot.double(), (columns.double() * kept.double()).sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total.double(), columns.double().sum(0), rtol=1e-4, atol=1e-4)
    alone = pytorch._column_sums(columns, None, True, accumulate)[1]
    torch.testing.assert_close(alone, total, rtol=1e-4, atol=1e-4)


def test_many_tokens_in_float32_are_summed_as_exactly_as_by_torch():
    columns, kept = torch.randn(2, 30_000, 8, device=DEVICE)
    dot, _ = pytorch._column_sums(columns, kept, False, torch.float32)
    exact = (columns.double() * kept.double()).sum(0)
    assert (dot - exact).norm() <= 2 * ((columns * kept).sum(0) - exact).norm() + 1e-7 * exact.norm()


@pytest.mark.parametrize("rank", (0, 1, 16))
def test_the_product_onto_the_low_rank_term_is_rounded_as_base_is(rank):
    x, weight = torch.randn(65, 130, device=DEVICE).bfloat16(), torch.randn(70, 130, device=DEVICE).bfloat16()
    low, lora_B = torch.randn(65, rank, device=DEVICE).bfloat16(), torch.randn(70, rank, device=DEVICE).bfloat16()
    z = gemm.product_onto_low_rank(x, weight, low, lora_B, 0.25)
    base = x.double() @ weight.double().T
    exact = base + 0.25 * low.double() @ lora_B.double().T
    error, base_error = ((z - exact).norm() / exact.norm()), ((x @ weight.T - base).norm() / base.norm())
    assert error <= 1.1 * base_error


def test_an_outer_product_without_a_gain():
    """What dA is made of: the sum over the tokens, scaled."""
    problem = Problem.random(9, 40, 36, 6)
    low, outer = problem.x @ problem.lora_A.T, torch.empty_like(problem.lora_B)
    pytorch.token_sums(problem.dy, low, 0.75, outer=outer)
    close(outer, 0.75 * problem.dy.T @ low)
    close(gemm.outer_product(low, problem.dy, 0.75, EXACT_DTYPE), outer.T)


def test_a_low_that_is_wider_than_the_columns_is_not_rounded_to_them():
    problem = Problem.random(64, 40, 36, 6, torch.bfloat16, torch.float32)
    low, gain = problem.x.float() @ problem.lora_A.T, torch.rand(40, device=DEVICE)
    outer, scaled = torch.empty_like(problem.lora_B), torch.empty_like(problem.dy)
    pytorch.token_sums(problem.dy, low, 0.75, outer=outer, gain=gain, scaled=scaled)
    exact = 0.75 * gain[:, None] * (problem.dy.double().T @ low.double())
    assert (outer - exact).norm() < 1e-6 * exact.norm()


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


@pytest.mark.parametrize("bias", (False, True))
def test_the_definition_has_the_dtype_of_x(bias):
    """Also beside float32 adapters: it is what the error of ours is measured by."""
    problem = Problem.random(9, 40, 36, 6, torch.bfloat16, torch.float32, bias=bias)
    assert problem.yardstick()["y"].dtype == torch.bfloat16
