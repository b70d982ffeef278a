"""What the passes tell the planner, and what they make for whom: choices that leave the numbers alone."""

import pytest
import torch

from dora_kernels import passes, plan
from tests.problem import DEVICE, Problem


@pytest.fixture
def asked(monkeypatch):
    """(function, arguments, keywords) of every question to the planner."""
    questions = []

    def recording(name):
        function = getattr(plan, name)

        def recorded(*arguments, **keywords):
            questions.append((name, arguments, keywords))
            return function(*arguments, **keywords)

        monkeypatch.setattr(plan, name, recorded)

    for name in ("forward_way", "dx_way", "kept_tensor"):
        recording(name)
    return questions


def test_the_planner_is_told_the_sizes_of_the_call(asked):
    problem = Problem.random(3, 40, 36, 6, torch.bfloat16)
    problem.ours("reference")
    shape = plan.Shape(M=3, N=40, K=36, R=6, itemsize=2)
    questions = {name: (arguments, keywords) for name, arguments, keywords in asked}
    assert questions["forward_way"][0][:4] == ("auto", "base", False, shape)
    assert questions["dx_way"][0][:2] == ("auto", shape)


@pytest.mark.parametrize(
    ("dtypes", "arguments", "expected"),
    (
        ((torch.float32,), {}, {"must_split": False, "wide": False}),
        ((torch.bfloat16, torch.float32), {}, {"must_split": False, "wide": True}),
        ((torch.float32,), {"precision": "exact"}, {"must_split": True, "wide": False}),
        ((torch.float32,), {"dropout": 0.4}, {"must_split": True, "wide": False}),
    ),
    ids=("plain", "wide", "exact", "dropout"),
)
def test_the_planner_is_told_what_must_split(dtypes, arguments, expected, asked):
    problem = Problem.random(3, 40, 36, 6, *dtypes, dropout=arguments.get("dropout", 0.0))
    problem.ours("reference", precision=arguments.get("precision", "auto"))
    answers = [keywords for name, _, keywords in asked if name != "dx_way"]
    assert len(answers) == 2 and all(keywords == expected for keywords in answers)


def test_a_device_that_is_no_cpu_is_not_planned_for_as_one():
    assert passes._device_model(torch.empty(0, device="meta")) is plan.device_model("")
    if DEVICE == "cpu":
        assert passes._device_model(torch.empty(0)) is plan.DEVICES["cpu"]


def test_dx_is_not_planned_where_it_is_not_wanted(asked):
    Problem.random(3, 40, 36, 6, torch.float32).ours("reference", needs=("lora_B",))
    assert [name for name, *_ in asked] == ["forward_way"]
