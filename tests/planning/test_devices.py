"""Which backend a device takes, with what said, and with which precision; test_fallback.py has whole calls."""

import logging
import subprocess
import sys

import pytest
import torch

from dora_kernels.planning import devices
from dora_kernels.planning.devices import DeviceFacts

CPU = torch.device("cpu")
H200 = DeviceFacts("NVIDIA H200", "sm_90", 132)


@pytest.fixture
def gpu(monkeypatch):
    """Every device answers as an H200."""
    monkeypatch.setattr(devices, "has_triton", lambda: True)
    monkeypatch.setattr(devices, "device_facts", lambda device: H200)
    return torch.device("cuda", 0)


def test_the_cpu_takes_the_reference_unless_asked():
    assert devices.backend_for("auto", CPU, torch.float32) == "reference"
    assert devices.backend_for("reference", CPU, torch.float32) == "reference"


def test_a_gpu_takes_the_kernels(gpu):
    assert devices.backend_for("auto", gpu, torch.bfloat16, torch.float32) == "triton"
    assert devices.backend_for("reference", gpu, torch.bfloat16) == "reference"


@pytest.mark.parametrize("missing", ("triton", "target", "dtype"))
def test_a_fallback_is_logged_once_and_a_named_backend_raises(missing, gpu, monkeypatch, caplog):
    dtype = torch.float64 if missing == "dtype" else torch.bfloat16
    if missing == "triton":
        monkeypatch.setattr(devices, "has_triton", lambda: False)
        reason = "triton is not installed"
    elif missing == "target":
        monkeypatch.setattr(devices, "device_facts", lambda device: DeviceFacts("Tesla T4", "", 40))
        reason = "no kernel configuration is known for Tesla T4"
    else:
        reason = "the kernels do not take torch.float64 on NVIDIA H200"
    monkeypatch.setattr(devices, "_logged", set())
    with caplog.at_level(logging.INFO, "dora_kernels"):
        assert devices.backend_for("auto", gpu, dtype) == "reference"
        assert devices.backend_for("auto", gpu, dtype) == "reference"
    assert [record.getMessage() for record in caplog.records] == [f"dora_kernels uses the reference: {reason}"]
    with pytest.raises(ValueError, match=reason):
        devices.backend_for("triton", gpu, dtype)


def test_without_triton_the_package_imports_and_computes():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import torch, dora_kernels\n"
        "layer = dora_kernels.DoraLinear(8, 6, 2, 4.0)\n"
        "layer(torch.ones(3, 8)).sum().backward()\n"
        "print(layer.lora_B.weight.grad.abs().sum() > 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "tensor(True)", result.stderr


@pytest.mark.parametrize(
    ("setting", "operand", "weight", "expected"),
    [
        ("highest", torch.float32, torch.float32, "ieee"),
        ("high", torch.float32, torch.float32, "tf32x3"),
        ("highest", torch.float32, torch.bfloat16, "bf16x6"),
        ("medium", torch.float32, torch.bfloat16, "bf16x3"),
        ("medium", torch.bfloat16, torch.bfloat16, "ieee"),
    ],
)
def test_the_precision_of_float32_dots_follows_torch(setting, operand, weight, expected):
    previous = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert devices.dot_precision(H200, operand, weight) == expected
        assert devices.dot_precision(DeviceFacts("MI300X", "gfx942", 304), operand, weight) == "ieee"
    finally:
        torch.set_float32_matmul_precision(previous)
