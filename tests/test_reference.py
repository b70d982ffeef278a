"""The definition itself: what it says of a zero row, and of dtypes. test_steps.py holds the steps to it."""

import ast
from pathlib import Path

import pytest
import torch

from dora_kernels import reference
from dora_kernels.reference import dora_linear_ref
from tests.support.problem import GRADIENTS, TOLERANCE, Problem


@pytest.mark.parametrize("norm_given", (False, True))
def test_the_definition_of_a_zero_row_has_gradients(norm_given):
    """0, where plain PEFT has NaN; that of the bias is the sum of dy."""
    problem = Problem.random(9, 40, 36, 6)
    problem.weight[3] = 0
    problem.lora_B[3] = 0
    given = (problem.weight, problem.lora_A, problem.lora_B, problem.scaling)
    norm = reference.norm(*given)[0] if norm_given else None
    results = problem.run(dora_linear_ref, norm=norm)
    assert all(results[name].isfinite().all() for name in ("y", *GRADIENTS))
    assert results["magnitude"][3] == 0 and (results["lora_B"][3] == 0).all()
    torch.testing.assert_close(results["y"][:, 3], problem.bias[3].expand(9), **TOLERANCE)
    torch.testing.assert_close(results["bias"], problem.dy.sum(0), **TOLERANCE)


@pytest.mark.parametrize("bias", (False, True))
def test_the_definition_has_the_dtype_of_x(bias):
    """Also beside float32 adapters: it is what the error of ours is measured by."""
    problem = Problem.random(9, 40, 36, 6, torch.bfloat16, torch.float32, bias=bias)
    assert problem.yardstick()["y"].dtype == torch.bfloat16


def test_the_definition_needs_torch_and_nothing_else():
    """Neither Triton nor another file: it is read, and run, alone."""
    nodes = list(ast.walk(ast.parse(Path(reference.__file__).read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert names == {"torch", "torch.nn.functional", "collections.abc"}
