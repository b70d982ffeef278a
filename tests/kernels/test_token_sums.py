"""Which sums over the tokens the GEMM library takes; test_steps.py has their numbers."""

import sys

import pytest
import torch

from tests.support.problem import Problem

kernels = pytest.importorskip("dora_kernels.kernels")


@pytest.mark.parametrize(
    ("R", "adapter", "expected"),
    [(64, torch.bfloat16, 0), (128, torch.bfloat16, 1), (128, torch.float32, 0)],
)
def test_a_high_rank_sums_its_product_in_the_gemm_library(R, adapter, expected, monkeypatch):
    problem, used = Problem.random(33, 24, 10, R, torch.bfloat16, adapter), []
    module = sys.modules["dora_kernels.kernels.token_sums"]  # kernels.token_sums is the function
    matmul, dB = module.matmul, torch.empty_like(problem.lora_B)
    monkeypatch.setattr(module, "matmul", lambda *arguments: used.append(arguments) or matmul(*arguments))
    low = problem.x.to(adapter) @ problem.lora_A.T
    kernels.token_sums(problem.dy, low, 0.75, dB=dB)
    assert len(used) == expected
    exact = 0.75 * problem.dy.double().T @ low.double()
    assert (dB - exact).norm() <= 4e-3 * exact.norm()
