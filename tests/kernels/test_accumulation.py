"""Sums over half-precision tensors are float32 sums: rounded to half precision on the way they would lose bits."""

import pytest
import torch

from dora_kernels.planning import plan
from tests.support.problem import DEVICE, Problem

kernels = pytest.importorskip("dora_kernels.kernels")

# an element's rounding in bfloat16 is 4e-3, in float16 5e-4
TOLERANCE = {"rtol": 2e-5, "atol": 1e-5}
HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sums_over_the_tokens(dtype):
    """Positive numbers, so that a sum is larger than each and would be rounded coarsely."""
    problem = Problem.random(150, 40, 36, 6, dtype)
    dy, saved, low = problem.dy.abs(), (problem.dy + 1).abs(), (problem.x @ problem.lora_A.T).abs()
    gain, norm = torch.rand(40, device=DEVICE), 1 + torch.rand(40, device=DEVICE)
    sums = {
        "dB": torch.empty(40, 6, device=DEVICE),
        "dmagnitude": torch.empty(40, device=DEVICE),
        "dbias": torch.empty(40, device=DEVICE),
    }
    kernels.token_sums(dy, low, 0.75, gain=gain, saved=saved, norm=norm, **sums)
    dy, saved, low = dy.double(), saved.double(), low.double()
    expected = {
        "dB": 0.75 * gain[:, None] * (dy.T @ low),
        "dmagnitude": (dy * saved).sum(0) / norm,
        "dbias": dy.sum(0),
    }
    for name in sums:
        torch.testing.assert_close(sums[name].double(), expected[name].double(), **TOLERANCE, msg=name)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_norm(dtype):
    problem = Problem.random(1, 40, 150, 6, dtype)
    norm, _ = kernels.norm(problem.weight, problem.lora_A, problem.lora_B, 0.75)
    direction = problem.weight.double() + 0.75 * problem.lora_B.double() @ problem.lora_A.double()
    torch.testing.assert_close(norm.double(), direction.norm(dim=1), **TOLERANCE)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_projection(dtype, monkeypatch):
    """Into a float32 result, of whole blocks and of parts."""
    monkeypatch.setattr(plan, "project_by_kernel", lambda *sizes, **asked: True)
    problem = Problem.random(5, 40, 150, 6, dtype)
    for counters in (None, torch.zeros(1, dtype=torch.int32, device=DEVICE)):
        actual = kernels.project(problem.x, problem.lora_A, torch.float32, counters)
        expected = problem.x.double() @ problem.lora_A.double().T
        torch.testing.assert_close(actual.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_an_epilogue_is_rounded_once(dtype):
    """base cancels the low-rank product but for 2^-14 of it, which an intermediate rounding would swallow."""
    low, lora_B = torch.ones(5, 1, dtype=dtype, device=DEVICE), torch.ones(40, 1, dtype=dtype, device=DEVICE)
    base = torch.full((5, 40), -1.0, dtype=dtype, device=DEVICE)
    gain = torch.full((40,), 1000.0, device=DEVICE)
    scaling = 1 + 2**-14  # no number of half precision
    actual = kernels.epilogue(base, low, lora_B, gain, None, scaling, dtype)
    expected = torch.full((5, 40), 1000 * 2**-14, dtype=dtype, device=DEVICE)
    torch.testing.assert_close(actual, expected)
