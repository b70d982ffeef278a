"""The norms of many layers in one launch, and what the compiler may be told of all of them."""

import pytest

from dora_kernels import reference
from tests.support.problem import Problem
from tests.support.step_problem import SHAPES, close

kernels = pytest.importorskip("dora_kernels.kernels")

from dora_kernels.kernels.launches import LaunchPlan  # noqa: E402


@pytest.mark.parametrize(
    "shapes",
    (SHAPES, ((1, 64, 32, 16), (1, 48, 64, 32)), ((1, 70, 80, 33), (1, 20, 48, 20)), ((1, 70, 32, 3),)),
    ids=str,
)
def test_grouped_norm(shapes):
    problems = [Problem.random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    names = ("weight", "lora_A", "lora_B", "magnitude")
    tensors = [[getattr(problem, name) for problem in problems] for name in names]
    tensors[0][0][3] = tensors[2][0][3] = 0  # a zero row
    scalings = [0.5 + seed for seed in range(len(problems))]
    for actual, expected in zip(
        kernels.grouped_norm(*tensors, scalings), reference.grouped_norm(*tensors, scalings), strict=True
    ):
        close(actual, expected)
        assert actual[3] == 0 and actual.shape == (sum(problem.weight.shape[0] for problem in problems),)


@pytest.mark.parametrize(
    ("change", "aligned", "rank_multiple"),
    (
        (lambda layer: layer, True, 16),
        (lambda layer: [*layer[:3], layer[3][1:]], True, 16),
        (lambda layer: [shifted(layer[0]), *layer[1:]], False, 16),
        (lambda layer: [layer[0], shifted(layer[1]), *layer[2:]], False, 16),
        (lambda layer: [*layer[:2], shifted(layer[2]), layer[3]], False, 16),
        (lambda layer: [layer[0][:, :40].contiguous(), layer[1][:, :40].contiguous(), *layer[2:]], False, 16),
        (lambda layer: [layer[0], layer[1][:24], layer[2][:, :24].contiguous(), layer[3]], True, 8),
    ),
    ids=("all", "magnitude", "weight", "lora_A", "lora_B", "K", "R"),
)
def test_grouped_norm_tells_the_compiler_what_holds_of_every_layer(change, aligned, rank_multiple, monkeypatch):
    """Of a hint that is false nothing shows but on a GPU, where the loads are in vectors."""
    problem = Problem.random(1, 7, 48, 32)
    layer = [problem.weight, problem.lora_A, problem.lora_B, problem.magnitude]
    told = []
    monkeypatch.setattr(LaunchPlan, "launch", lambda plan, *arguments: told.append(plan.constants))
    magnitude = problem.magnitude.new_ones(8)
    kernels.grouped_norm(*map(list, zip(layer, change([*layer[:3], magnitude]), strict=True)), [0.75, 0.75])
    assert (told[0]["ALIGNED"], told[0]["R_MULTIPLE"]) == (aligned, rank_multiple)


def shifted(tensor):
    """The same numbers, at an address that is no multiple of 16."""
    other = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    return other.copy_(tensor)
