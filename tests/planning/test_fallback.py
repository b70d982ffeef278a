"""Which backend a call takes: what is not named may fall back, and says why once; what is named never does."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import dora_kernels
from dora_kernels import ops, options
from dora_kernels.planning import devices
from dora_kernels.planning.devices import DeviceFacts
from tests.support.problem import BACKENDS, DEVICE, TOLERANCE, Problem, core

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    """Forgets facts and messages of other tests, before and after."""
    monkeypatch.setattr(devices, "_logged", set())
    devices.device_facts.cache_clear()
    yield
    devices.device_facts.cache_clear()


@pytest.fixture
def messages(caplog):
    """What the package has logged so far."""
    caplog.set_level(logging.WARNING, "dora_kernels")
    return lambda: [record.getMessage() for record in caplog.records]


def install_gpu(monkeypatch, name="NVIDIA H200", capability=(9, 0), arch=None):
    """torch answers as if this GPU were cuda:0."""
    major, minor = capability
    properties = SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=40, gcnArchName=arch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", "6.4" if arch else None)
    monkeypatch.setattr(devices, "has_triton", lambda: True)
    return CUDA


@pytest.mark.parametrize(
    ("capability", "target"),
    (
        ((7, 0), ""), ((7, 5), ""), ((8, 7), ""), ((11, 0), ""), ((13, 0), ""),
        ((8, 0), "sm_80"), ((8, 6), "sm_120"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((12, 1), "sm_120"),
    ),
)  # fmt: skip
def test_a_compute_capability_that_is_not_listed_has_no_target(capability, target, monkeypatch):
    """None is guessed: a config of another family may want more shared memory than there is."""
    device = install_gpu(monkeypatch, "Some GPU", capability)
    assert devices.device_facts(device) == DeviceFacts("Some GPU", target, 40)


@pytest.mark.parametrize(
    ("arch", "target"), (("gfx942:sramecc+:xnack-", "gfx942"), ("gfx950", "gfx942"), ("gfx90a:xnack-", ""))
)
def test_an_amd_gpu_goes_by_its_architecture(arch, target, monkeypatch):
    # its capability reads as that of a known NVIDIA GPU
    assert devices.device_facts(install_gpu(monkeypatch, "AMD GPU", (9, 0), arch)).target == target


@pytest.mark.parametrize("device", ("xpu:0", "mps", "meta"))
def test_a_kind_of_device_without_kernels_has_no_target(device, messages):
    device = torch.device(device)
    assert devices.backend_for("auto", device, torch.bfloat16) == "reference"
    assert messages() == [f"dora_kernels uses the reference: no kernel configuration is known for {device}"]
    with pytest.raises(ValueError, match="no kernel configuration is known"):
        devices.backend_for("triton", device, torch.bfloat16)


@pytest.fixture
def on_that_gpu(monkeypatch):
    """Tensors count as being on cuda:0, where the choice of a backend looks."""
    backend_for = devices.backend_for
    monkeypatch.setattr(
        devices, "backend_for", lambda requested, device, *dtypes: backend_for(requested, CUDA, *dtypes)
    )


def delta(before: dict) -> dict:
    """The calls of operators since then."""
    return {key: count - before.get(key, 0) for key, count in ops.calls.items() if count != before.get(key, 0)}


def test_training_on_an_unknown_gpu_is_right_and_says_why_once(monkeypatch, on_that_gpu, messages):
    install_gpu(monkeypatch, "Tesla T4", (7, 5))
    problem, before = Problem.random(5, 12, 10, 3, torch.float32), dict(ops.calls)
    for _ in range(2):
        assert all(comparison.ok for comparison in problem.comparisons(problem.ours("auto")))
    assert delta(before) == {("forward", "reference"): 2, ("backward", "reference"): 2}
    assert messages() == ["dora_kernels uses the reference: no kernel configuration is known for Tesla T4"]


def test_kernels_that_are_named_on_an_unknown_gpu_are_an_error(monkeypatch, on_that_gpu, messages):
    install_gpu(monkeypatch, "Tesla T4", (7, 5))
    problem, before = Problem.random(5, 12, 10, 3, torch.float32), dict(ops.calls)
    calls = (
        lambda: problem.ours("triton"),
        lambda: dora_kernels.weight_norm(problem.weight, problem.lora_A, problem.lora_B, 0.75),
        lambda: dora_kernels.merge_weight(problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, 0.75),
    )
    for call in calls:
        expected = r'options\(backend="triton"\): no kernel configuration is known for Tesla T4; expected a GPU that'
        with options(backend="triton"), pytest.raises(ValueError, match=expected):
            call()
    assert delta(before) == {} and messages() == []


def test_each_reason_is_logged_once(monkeypatch, messages):
    device = install_gpu(monkeypatch)
    for _ in range(3):
        assert devices.backend_for("auto", device, torch.float64) == "reference"
        assert devices.backend_for("auto", device, torch.bfloat16, torch.complex64) == "reference"
        assert devices.backend_for("auto", device, torch.bfloat16) == "triton"
    assert messages() == [
        f"dora_kernels uses the reference: the kernels do not take {dtype} on NVIDIA H200"
        for dtype in (torch.float64, torch.complex64)
    ]


def test_float64_beside_another_dtype_is_refused_in_the_interpreter_too():
    if DEVICE == "cuda":
        pytest.skip("a GPU's kernels take no float64 at all")
    cpu = torch.device("cpu")
    assert devices.backend_for("triton", cpu, torch.float64, torch.float64) == "triton"
    with pytest.raises(ValueError, match="the kernels do not take torch.float64 on cpu"):
        devices.backend_for("triton", cpu, torch.float32, torch.float64)
    problem = Problem.random(5, 12, 10, 3, torch.float64, torch.float32)
    with pytest.raises(ValueError, match="the kernels do not take torch.float64 on cpu"):
        problem.ours("triton")
    exact, actual = problem.exact(), problem.ours("auto")
    for name in actual:
        torch.testing.assert_close(actual[name], exact[name], check_dtype=False, rtol=1e-5, atol=1e-5)


def test_the_cpu_takes_the_reference_without_a_word(messages):
    """Nobody who has no GPU asked for the kernels."""
    if DEVICE == "cuda":
        pytest.skip("the kernels take this device")
    before = dict(ops.calls)
    Problem.random(5, 12, 10, 3, torch.float32).ours("auto")
    assert delta(before) == {("forward", "reference"): 1, ("backward", "reference"): 1} and messages() == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_named_backend_computes_everything(backend, messages):
    """Forward, backward (outside the block, as in training), norm and merge."""
    problem, before = Problem.random(5, 12, 10, 3), dict(ops.calls)
    x = problem.x.clone().requires_grad_()
    arguments = (problem.weight, problem.lora_A, problem.lora_B)
    with options(backend=backend):
        y = core(x, *arguments, problem.magnitude, 0.75)
        dora_kernels.weight_norm(*arguments, 0.75)
        dora_kernels.merge_weight(*arguments, problem.magnitude, 0.75)
    y.sum().backward()
    counts = {"forward": 1, "backward": 1, "norm": 2, "merge": 1}
    assert delta(before) == {(operator, backend): count for operator, count in counts.items()} and messages() == []


@pytest.mark.parametrize("step", ("start_norm", "token_sums"), ids=("forward", "backward"))
def test_a_kernel_that_fails_is_not_replaced_by_the_reference(step, monkeypatch):
    """A launch that the driver refuses, say: the error comes out, and the next call is right."""
    kernels = pytest.importorskip("dora_kernels.kernels")
    problem = Problem.random(5, 12, 10, 3)

    def refused(*arguments, **keywords):
        raise RuntimeError("CUDA error: too many resources requested for launch")

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "KERNELS", kernels.KERNELS._replace(**{step: refused}))
        with pytest.raises(RuntimeError, match="too many resources"):
            problem.ours("triton", "split")
    exact, actual = problem.exact(), problem.ours("triton", "split")
    for name in actual:
        torch.testing.assert_close(actual[name], exact[name], **TOLERANCE)


CALL = """
import torch, dora_kernels
try:
    print(tuple(dora_kernels.DoraLinear(8, 6, 2, 4.0)(torch.ones(3, 8)).shape))
except ValueError as error:
    print("ValueError:", error)
"""


@pytest.mark.parametrize(
    ("switch", "said"),
    (
        ("reference", "(3, 6)"),
        (
            "triton",
            'ValueError: options(backend="triton"): the tensors are on the CPU and Triton\'s interpreter is off',
        ),
    ),
)
def test_a_backend_named_in_the_environment_never_falls_back_either(switch, said):
    """On a CPU, with Triton and without its interpreter."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"DORA_KERNELS_BACKEND": switch, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith(said), done.stdout + done.stderr
