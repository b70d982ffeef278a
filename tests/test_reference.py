"""The steps of the specification in several blocks of rows, which only large layers have, against their formulas."""

import pytest
import torch

from dora_kernels import reference
from dora_kernels.reference import dora_linear_ref
from tests.problem import EXACT_DTYPE, GRADIENTS, TOLERANCE, Problem

# three blocks of rows, the last of them ragged
ROWS = 600


@pytest.fixture
def problem(monkeypatch):
    monkeypatch.setattr(reference, "_BLOCK_BYTES", 1)  # blocks of 256 rows
    return Problem.random(ROWS, ROWS, 10, 3)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def direction(problem):
    return problem.weight + 0.75 * problem.lora_B @ problem.lora_A


def test_blocks_cover_every_row_once(problem):
    blocks = list(reference._row_blocks(ROWS, 10))
    assert len(blocks) == 3 and [row for block in blocks for row in range(ROWS)[block]] == list(range(ROWS))
    assert list(reference._row_blocks(0, 10)) == [] and list(reference._row_blocks(5, 0)) == [slice(0, 5)]


def test_norm_and_merge(problem):
    adapter = (problem.lora_A, problem.lora_B)
    norm = direction(problem).norm(dim=1)
    close(reference.norm_ref(problem.weight, *adapter, 0.75, problem.magnitude), (norm, problem.magnitude / norm))
    gain = problem.magnitude[:, None]
    for with_gain in (False, True):
        for subtract in (False, True):
            expected = (gain if with_gain else 1) * direction(problem) - subtract * problem.weight
            actual = reference.merge_ref(
                problem.weight, *adapter, problem.magnitude if with_gain else None, 0.75, subtract
            )
            close(actual, expected)


@pytest.mark.parametrize("with_residual", (False, True))
@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("with_low", (False, True))
def test_epilogue(problem, with_low, with_bias, with_residual):
    base, low = problem.x @ problem.weight.T, problem.x @ problem.lora_A.T
    expected = problem.magnitude * (base + with_low * 0.75 * low @ problem.lora_B.T) + with_bias * problem.bias
    expected = expected + with_residual * (problem.dy - base)
    actual = reference.epilogue_ref(
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
    actual = reference.merged_forward_ref(
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
    reference.token_sums_ref(
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
