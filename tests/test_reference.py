"""The definition itself, against formulas written out; test_steps.py holds the steps to it."""

import ast
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dora_kernels import reference
from dora_kernels.reference import dora_linear_ref
from tests.support.problem import GRADIENTS, TOLERANCE, Problem


def test_the_definition_is_the_papers():
    """The formula written out with the merged weight, and nn.Linear for B = 0."""
    problem = Problem.random(5, 8, 6, 2)
    direction = problem.weight + 0.75 * problem.lora_B @ problem.lora_A
    merged = problem.magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(problem.exact()["y"], F.linear(problem.x, merged, problem.bias), **TOLERANCE)
    untrained = dora_linear_ref(
        problem.x, problem.weight, problem.lora_A, 0 * problem.lora_B, problem.weight.norm(dim=1), 0.75, problem.bias
    )
    torch.testing.assert_close(untrained, F.linear(problem.x, problem.weight, problem.bias))


def test_under_dropout_the_base_sees_x_and_its_difference_what_is_left_of_it():
    problem = Problem.random(5, 8, 6, 2, dropout=0.5)
    direction = problem.weight + 0.75 * problem.lora_B @ problem.lora_A
    merged = problem.magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    expected = F.linear(problem.x, problem.weight, problem.bias) + F.linear(problem.x_dropped, merged - problem.weight)
    torch.testing.assert_close(problem.exact()["y"], expected, **TOLERANCE)


def test_the_norm_is_a_constant_unless_norm_grad():
    problem = Problem.random(5, 8, 6, 2)
    norm = reference.norm(problem.weight, problem.lora_A, problem.lora_B, problem.scaling)[0]
    constant = problem.exact(norm=norm)

    def written_out(x, weight, lora_A, lora_B, magnitude, scaling, bias):
        direction = weight + scaling * lora_B @ lora_A
        return F.linear(x, magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True), bias)

    through = problem.run(written_out)
    for name in ("y", *GRADIENTS):
        torch.testing.assert_close(problem.exact()[name], constant[name], **TOLERANCE)
        torch.testing.assert_close(problem.exact(norm_grad=True)[name], through[name], **TOLERANCE)
    assert not torch.allclose(constant["lora_B"].double(), through["lora_B"].double())


def test_the_gain_has_the_dtype_of_the_norm_and_is_0_where_that_is():
    magnitude, norm = torch.tensor([3.0, 5.0], dtype=torch.float64), torch.tensor([4.0, 0.0])
    torch.testing.assert_close(reference.gain_of(magnitude, norm), torch.tensor([0.75, 0.0]))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_every_derivative_of_a_zero_rows_norm_is_0():
    """The second one of torch's own norm is NaN there."""
    matrix = torch.tensor([[0.0, 0, 0], [1, 2, 2]], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([3.0, 5, 7], dtype=torch.float64)
    with torch.autograd.detect_anomaly():  # an error where any function on the way makes NaN
        norm = reference.row_norms(matrix)
        (first,) = torch.autograd.grad(norm.sum(), matrix, create_graph=True)
        (second,) = torch.autograd.grad((first * weights).sum(), matrix)
    unit = matrix[1].detach() / 3
    torch.testing.assert_close(norm.tolist(), [0.0, 3.0])
    torch.testing.assert_close(first.detach(), torch.stack((torch.zeros_like(unit), unit)))
    torch.testing.assert_close(second, torch.stack((torch.zeros_like(unit), (weights - unit * (unit @ weights)) / 3)))


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
