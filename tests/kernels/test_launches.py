"""Launch plans: a kernel that is kept is what Triton's JIT would launch, and whoever looks on sees every launch."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.problem import DEVICE

kernels = pytest.importorskip("dora_kernels.kernels")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from dora_kernels.kernels.launches import LaunchPlan, forget, planned  # noqa: E402
from dora_kernels.planning.tiles import Config  # noqa: E402

ROOT = Path(__file__).parents[2]
# checks of tests/support/jit_launches.py: it is not imported here, where Triton interprets
TREE = ast.parse((ROOT / "tests/support/jit_launches.py").read_text())
CHECKS = [one.name.removeprefix("check_") for one in TREE.body if getattr(one, "name", "").startswith("check_")]


@pytest.fixture(scope="module")
def outcomes():
    """Target -> check -> what was wrong."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "tests.support.jit_launches"]
    runs = {
        target: subprocess.Popen(
            [*command, target], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for target in ("cuda", "hip")
    }
    found = {}
    for target, process in runs.items():
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-2000:]
        found[target] = json.loads(out.splitlines()[-1])
    return found


@pytest.mark.parametrize("target", ("cuda", "hip"))
@pytest.mark.parametrize("check", CHECKS)
def test_launches(check, target, outcomes):
    assert outcomes[target][check] == ""


@triton.jit
def _add_kernel(out, values, more_ptr, number, BLOCK: tl.constexpr):
    """out = values + more + number, with the strides of out and values."""
    offs = tl.arange(0, BLOCK)
    total = tl.load(values.ptr + offs * values.stride) + tl.load(more_ptr + offs) + number
    tl.store(out.ptr + offs * out.stride, total)


def test_a_plan_launches_what_the_interpreter_runs():
    values, more = torch.arange(32.0, device=DEVICE)[::2], torch.ones(16, device=DEVICE)
    out = torch.zeros(48, device=DEVICE)[::3]
    plan = LaunchPlan(_add_kernel, Config(), BLOCK=16)
    for number in (1, 2, 3):
        plan.launch((1,), out, values, more, number)
        assert torch.equal(out, values + 1 + number)
    assert not plan._kept or DEVICE != "cpu"


def test_a_choice_is_made_once_for_the_same_arguments_until_it_is_forgotten():
    made = []
    choose = planned(lambda *sizes: made.append(sizes) or len(made))
    assert [choose(1, 2), choose(1, 2), choose(2, 1)] == [1, 1, 2]
    forget()
    assert choose(1, 2) == 3
