"""The GEMM for Hopper from the host's side: what it refuses, what is launched, and into what it compiles."""

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from dora_kernels.kernels import dx, fused_forward  # noqa: E402
from dora_kernels.kernels.hopper import launch  # noqa: E402
from dora_kernels.kernels.hopper.launch import gemm, why_not_gemm  # noqa: E402
from dora_kernels.planning import devices  # noqa: E402
from dora_kernels.planning.devices import DeviceFacts  # noqa: E402
from dora_kernels.testing import rms_error  # noqa: E402
from tests.support.problem import DEVICE  # noqa: E402

ROOT = Path(__file__).parents[2]
has_gluon = importlib.util.find_spec("triton.experimental.gluon") is not None
needs_gluon = pytest.mark.skipif(not has_gluon, reason="this Triton has no Gluon")
M, N, K, R = 1000, 1032, 520, 8


def half(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def operands(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """All that a fused forward pass has, in the order in which why_not_gemm takes it."""
    shapes = {"left": (M, K), "right": (N, K), "low": (M, R), "lora": (N, R), "gain": (N,), "bias": (N,)}
    made = {name: half(*shape, dtype=dtype) for name, shape in shapes.items()}
    return made | {"gain": torch.zeros(N)}


@pytest.fixture
def on_hopper(monkeypatch):
    """The tensors of this process are taken to be on a card of sm_90, and this Triton to have Gluon."""
    monkeypatch.setattr(launch, "why_not_gluon", lambda: None)
    monkeypatch.setattr(devices, "device_facts", lambda device: DeviceFacts("pretended", "sm_90", 132))


class Recorder:
    """A kernel that keeps what it is launched with."""

    arg_names = "x weight low lora y z gain bias M N K R scaling group_m".split()

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid: tuple[int, ...]):
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *arguments, **constants):
        given = dict(zip(self.arg_names, arguments, strict=True))
        self.launches.append(SimpleNamespace(grid=grid, constants=constants, **given))


class Described:
    """A descriptor; it is another's equal if both are of one tensor."""

    def __init__(self, tensor: torch.Tensor, block: Sequence[int]):
        self.tensor, self.block = tensor, tuple(block)

    def __eq__(self, other):
        return self.tensor is other.tensor and self.block == other.block


@pytest.fixture
def launches(monkeypatch, on_hopper):
    """The launches of the kernel, of which none is made."""
    recorder = Recorder()
    monkeypatch.setattr(launch, "kernel", lambda: recorder)
    monkeypatch.setattr(launch, "descriptor", Described)
    return recorder.launches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_the_gemm_takes(on_hopper, dtype):
    given = operands(dtype)
    assert why_not_gemm(*given.values()) is None
    assert why_not_gemm(given["left"], given["right"], None, None, None, None) is None
    given["left"] = half(M, K + 8, dtype=dtype)[:, 8:]
    given["bias"] = half(N, dtype=torch.float32)
    assert why_not_gemm(*given.values()) is None


REFUSED = {
    "four steps": ("left", half(M, 256), "sums are of 256; expected more than 4 steps of 64"),
    "float32": ("left", half(M, K, dtype=torch.float32), "operands are torch.float32"),
    "another dtype": ("lora", half(N, R, dtype=torch.float16), "torch.float16 beside torch.bfloat16"),
    "a gain of float64": ("gain", half(N, dtype=torch.float64), "torch.float64 beside"),
    "three dimensions": ("low", half(2, M, R), "3 dimensions"),
    "columns that are apart": ("right", half(K, N).T, "strides of (1, 1032)"),
    "rows of 8 bytes": ("low", half(M, 4), "strides of (4, 1)"),
    "every other element": ("bias", half(2 * N)[::2], "strides of (2,)"),
    "one row, expanded": ("left", half(1, K).expand(M, K), "strides of (0, 1)"),
    "rows that overlap": ("left", half(8 * M + K).unfold(0, K, 8)[:M], "strides of (8, 1)"),
    "an address between": ("bias", half(N + 1)[1:], "address that is no multiple of 16"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_gemm_does_not_take(on_hopper, what):
    name, tensor, reason = REFUSED[what]
    assert reason in (why_not_gemm(*(operands() | {name: tensor}).values()) or "")


def test_the_gemm_counts_in_32_bits(on_hopper):
    """To the end of the last block, and of the next one that a program has."""
    rows, given = 2**31 - 2**10, operands()
    given["left"] = torch.empty(rows, K, dtype=torch.bfloat16, device="meta")
    assert why_not_gemm(*given.values()) is None
    given["left"] = torch.empty(rows + 1, K, dtype=torch.bfloat16, device="meta")
    assert (
        why_not_gemm(*given.values())
        == f"an operand has 2 dimensions of up to {rows + 1}; expected two of up to {rows}"
    )


def test_rows_of_y_that_the_copy_engine_could_not_write(on_hopper):
    """Its strides are its own, whatever those of the right operand are."""
    assert "rows of 1030" in why_not_gemm(half(M, K), half(1030, K))
    assert "rows of 1030" in why_not_gemm(half(M, K), half(K, N)[:, :1030], nn=True)
    assert why_not_gemm(half(M, K), half(K, N)[:, :1024], nn=True) is None


def test_no_other_card_has_it(monkeypatch, on_hopper):
    monkeypatch.setattr(devices, "device_facts", lambda device: DeviceFacts("a B200", "sm_100", 148))
    assert why_not_gemm(*operands().values()) == "no such kernel is built for a B200"


def test_the_interpreter_has_a_reason(monkeypatch):
    monkeypatch.setattr(devices, "interpreting", lambda: True)
    assert launch.why_not_gluon.__wrapped__() == "Triton's interpreter runs no Gluon"


def test_a_sum_too_short_is_not_launched(launches):
    """gain and bias come with a step that it does not have: y would be whatever the shared memory held."""
    with pytest.raises(ValueError, match="sums are of 256; expected more than 4 steps of 64"):
        gemm(half(M, 256), half(N, 256), nn=False)
    assert not launches


def test_a_fused_forward_pass_is_one_launch(launches):
    x, weight, low, lora, gain, bias = operands().values()
    for save in (True, False):
        y, z = fused_forward(x, weight, low, lora, gain, bias, 2, save)
        one = launches.pop()
        assert not launches and one.grid == (8 * 5,)
        assert one.constants["NN"] is False and one.constants["num_warps"] == 4
        assert (one.M, one.N, one.K, one.R, one.group_m) == (M, N, K, R, 8)
        assert one.scaling == 2 and type(one.scaling) is float  # an int would be another binary
        assert one.x == Described(x, (128, 64)) and one.weight == Described(weight, (256, 64))
        assert one.low == Described(low, (128, 64)) and one.lora == Described(lora, (256, 64))
        assert one.gain == Described(gain, (256,)) and one.bias == Described(bias, (256,))
        assert one.y == Described(y, (64, 64)) and y.shape == (M, N) and y.dtype == torch.bfloat16
        if save:
            assert one.z == Described(z, (64, 64)) and z.shape == (M, N)
        else:
            assert one.z is z is None


def test_dx_leaves_the_side_its_multiprocessors(launches):
    dy, merged = half(8192, N), half(N, 1024)
    result = dx(dy, merged, SimpleNamespace(multiprocessors=4))
    (one,) = launches
    assert one.grid == (128,) and one.constants["NN"] is True
    assert (one.M, one.N, one.K, one.R) == (8192, 1024, N, 0)
    assert one.x == Described(dy, (128, 64)) and one.weight == Described(merged, (64, 256))
    assert one.y == Described(result, (64, 64)) and result.shape == (8192, 1024)
    assert [one.low, one.lora, one.z, one.gain, one.bias, one.scaling] == 5 * [None] + [1]


def test_dx_without_a_side_is_the_library_s(launches):
    dy, merged = torch.randn(2, 3), torch.randn(3, 4)
    assert torch.equal(dx(dy, merged), dy @ merged) and not launches


@pytest.mark.parametrize("rows, columns", [(0, N), (M, 0)])
def test_nothing_is_launched_for_an_empty_result(launches, rows, columns):
    y, z = gemm(half(rows, K), half(columns, K), nn=False, both=True)
    assert y.shape == z.shape == (rows, columns)
    assert gemm(half(rows, K), half(K, columns), nn=True)[0].shape == (rows, columns)
    assert not launches


def test_what_the_gemm_refuses_the_library_computes(monkeypatch, caplog):
    monkeypatch.setattr(devices, "_logged", set())
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    x, weight, low, lora, gain, bias = normal(33, 70), normal(40, 70), normal(33, 4), normal(40, 4), *normal(2, 40)
    y, z = fused_forward(x, weight, low, lora, gain, bias, 0.7, True)
    assert fused_forward(x, weight, low, lora, gain, bias, 0.7, False)[1] is None
    exact = x.double() @ weight.double().T + 0.7 * low.double() @ lora.double().T
    assert rms_error(z, exact) < 1e-6 and rms_error(y, gain.double() * exact + bias.double()) < 1e-6
    message = "dora_kernels leaves a fused forward pass to the GEMM library: "
    assert [record.message.startswith(message) for record in caplog.records] == [True]


def in_a_process(code: str) -> str:
    """What Python prints in a process where Triton compiles; in this one it may be interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tools")))
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_triton_without_gluon_has_a_reason_and_all_other_kernels():
    code = """
import sys, types
import triton
for name in [name for name in sys.modules if name.startswith("triton.experimental")]:
    del sys.modules[name]
sys.modules["triton.experimental"] = None
import dora_kernels.kernels
from dora_kernels.kernels.hopper import launch
assert "dora_kernels.kernels.hopper.gemm" not in sys.modules, "imported before it is asked for"
print(launch.why_not_gluon())
"""
    reason = in_a_process(code)
    assert reason.startswith("Triton ") and "ModuleNotFoundError" in reason


@needs_gluon
def test_a_gluon_whose_names_have_changed_is_a_reason():
    code = """
from triton.experimental.gluon.language.nvidia.hopper import tma
for name in ("async_copy_global_to_shared", "async_load"):
    vars(tma).pop(name, None)
from dora_kernels.kernels.hopper import launch
print(launch.why_not_gluon())
"""
    assert "AttributeError" in in_a_process(code)


# A driver that knows its device and no more: the JIT binds the arguments and compiles, and would launch next.
LAUNCHED = """
import re
import torch, triton
from triton.backends.compiler import GPUTarget
from dora_kernels.kernels.hopper import launch
from dora_kernels.planning import devices
from dora_kernels.planning.configs import SHARED
from resources import of_cubin

class Driver:
    get_current_device = get_current_stream = lambda *arguments: 0
    get_current_target = lambda *arguments: GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
devices.device_facts = lambda device: devices.DeviceFacts("pretended", "sm_90", 132)
compiled, run = [], launch.kernel().run
launch.kernel().run = lambda *arguments, warmup, **options: compiled.append(run(*arguments, warmup=True, **options))

M, N, K, R = 1000, 1032, 520, 8
for dtype in (torch.bfloat16, torch.float16):
    def half(*shape):
        return torch.zeros(shape, dtype=dtype)

    for m, n in ((M, N), (1, 8)):  # one binary for all sizes
        given = {"low": half(m, R), "lora": half(n, R), "gain": torch.zeros(n), "scaling": 0.5}
        assert launch.why_not_gemm(half(m, K), half(n, K), *list(given.values())[:3], half(n)) is None
        launch.gemm(half(m, K), half(n, K), nn=False, bias=half(n), both=True, **given)
        launch.gemm(half(m, K), half(n, K), nn=False, **given)
        launch.gemm(half(m, K), half(K, n), nn=True)
binaries = {id(kernel): kernel for kernel in compiled}.values()
assert len(compiled) == 12 and len(binaries) == 6
for kernel in binaries:
    usage = of_cubin(kernel, triton.knobs.nvidia.cuobjdump.path, "-res-usage")
    print(re.search(r"REG:168 STACK:0", usage)[0])
    assert 200_000 < kernel.metadata.shared <= SHARED["sm_90"]
"""


@needs_gluon
def test_what_is_launched_fits_a_multiprocessor():
    assert len(in_a_process(LAUNCHED).splitlines()) == 6
