"""tools/pretended_gpu: what it refuses as a GPU does, what it answers, and who inherits it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
]

REFUSED = """
import pytest, torch
import dora_kernels
x, weight = torch.randn(5, 24, device="cuda"), torch.randn(20, 24)
with pytest.raises(RuntimeError, match="same device"):
    torch.nn.functional.linear(x, weight)
with pytest.raises(RuntimeError, match="same device"):
    torch.mm(x.half(), weight.T.half(), out_dtype=torch.float32)
from dora_kernels import kernels, reference
A, B = torch.randn(4, 24), torch.randn(20, 4, device="cuda")
with pytest.raises(ValueError, match="cannot be accessed from Triton"):
    kernels.norm(weight.cuda(), A, B, 1.0)
with dora_kernels.options(backend="triton"), pytest.raises(ValueError, match="the tensors are on the CPU"):
    dora_kernels.weight_norm(weight, A, B.cpu(), 1.0)
with dora_kernels.options(backend="triton"), pytest.raises(ValueError, match="do not take torch.float64"):
    dora_kernels.weight_norm(weight.cuda().double(), A.cuda().double(), B.double(), 1.0)
graph = torch.cuda.CUDAGraph()
for wait in (lambda: x.sum().item(), lambda: x.cpu(), torch.cuda.synchronize):
    with pytest.raises(RuntimeError, match="stream is capturing"), torch.cuda.graph(graph):
        x + 1, wait()
with pytest.raises(torch.OutOfMemoryError):
    torch.empty(90 << 30, dtype=torch.int8, device="cuda")
"""

ANSWERED = """
import torch
from dora_kernels.planning import devices
from dora_kernels import kernels, reference
from dora_kernels.testing import nan_filled_memory
facts = devices.device_facts(torch.device("cuda", 0))
assert facts.target == "sm_90" and facts.multiprocessors == 132 and facts.name.startswith("Pretended")
weight, A, B = (torch.randn(shape, device="cuda") for shape in ((40, 90), (6, 90), (40, 6)))
norm, _ = kernels.norm(weight, A, B, 0.75)
torch.testing.assert_close(norm, reference.norm(weight, A, B, 0.75)[0])
with nan_filled_memory():
    assert torch.empty(3, device="cuda").isnan().all()
def bf16(*shape):
    return torch.randn(shape, device="cuda").bfloat16()
def close(found, exact):
    torch.testing.assert_close(found, exact.bfloat16(), rtol=2**-6, atol=1e-2)
from dora_kernels.kernels.hopper import launch
left, right, low, lora, gain, bias = bf16(40, 320), bf16(64, 320), bf16(40, 8), bf16(64, 8), bf16(64).float(), bf16(64)
assert launch.why_not_gemm(left, right, low, lora, gain, bias) is None
y, z = launch.gemm(left, right, nn=False, low=low, lora=lora, scaling=0.5, gain=gain, bias=bias, both=True)
product = left.float() @ right.T.float()
exact = product + 0.5 * low.float() @ lora.T.float()
close(z, exact), close(y, gain * exact + bias)
dx, nothing = launch.gemm(left, right.T.contiguous(), nn=True)
close(dx, product)
assert nothing is None
with torch.autocast("cuda", dtype=torch.bfloat16):
    assert (weight @ weight.T).dtype == torch.bfloat16 and weight.norm().dtype == torch.float32
threads = set()
leaf = torch.ones(3, device="cuda", requires_grad=True)
leaf.register_hook(lambda grad: threads.add(__import__("threading").get_ident()))
leaf.sum().backward()
assert threads != {__import__("threading").get_ident()}
assert torch.ones(3).pin_memory().is_pinned() and not torch.ones(3).is_pinned()
torch.cuda.reset_peak_memory_stats()
before = torch.cuda.memory_allocated()
torch.empty(1 << 20, dtype=torch.int8, device="cuda")
assert torch.cuda.memory_allocated() == before and torch.cuda.max_memory_allocated() == before + (1 << 20)
"""

IDLE = """
import torch
left, right = (torch.randn(1 << 16, 1 << 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
product = (left @ right.T)[:, :100].contiguous()
assert product.shape == (1 << 16, 100) and product.stride() == (100, 1) and product[-1, -1].item() == 0
out = torch.empty(0, device="cuda", dtype=torch.bfloat16)
assert torch.mm(left[:7], right, out=out) is out and out.shape == (7, 1 << 16)
assert left.add_(1) is left
"""

INHERITED = """
import os, subprocess, sys
code = "import torch; print(torch.cuda.is_available())"
for visible, expected in (("0", "True"), ("", "False")):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)
    assert done.stdout.strip() == expected, done
"""


@pytest.mark.parametrize(
    ("script", "options"),
    ((REFUSED, ()), (ANSWERED, ()), (IDLE, ("--idle",)), (INHERITED, ())),
    ids=("refused", "answered", "idle", "inherited"),
)
def test_a_script(script, options, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(script)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tools.pretended_gpu", *options, str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
