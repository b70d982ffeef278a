"""Options, the choice of a backend, and the tile configurations."""

import logging
import subprocess
import sys

import pytest
import torch

from dora_kernels.planning import configs, devices
from dora_kernels.planning.configs import Config
from dora_kernels.planning.devices import DeviceFacts
from dora_kernels.planning.options import Options, current_options, options

CPU = torch.device("cpu")
H200 = DeviceFacts("NVIDIA H200", "sm_90", 132)


def test_options_nest_and_are_restored():
    assert current_options() == Options()
    with options(backend="reference", way="split"):
        with options(way="merged"), pytest.raises(KeyError):
            assert current_options() == Options("reference", "merged", "auto")
            raise KeyError
        assert current_options() == Options("reference", "split", "auto")
    assert current_options() == Options()


@pytest.mark.parametrize("name", ("backend", "way", "precision"))
def test_an_unknown_option_is_named(name):
    with pytest.raises(ValueError, match=f"options: {name} is 'fast'; expected one of auto, "):
        with options(**{name: "fast"}):
            pass
    assert current_options() == Options()


@pytest.mark.parametrize(("value", "expected"), (("reference", "reference"), (None, "auto"), ("", "auto")))
def test_the_environment_switch(value, expected, monkeypatch):
    if value is None:
        monkeypatch.delenv("DORA_KERNELS_BACKEND", raising=False)
    else:
        monkeypatch.setenv("DORA_KERNELS_BACKEND", value)
    code = "from dora_kernels.planning.options import current_options; print(current_options().backend)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == expected


def test_a_wrong_environment_switch_is_an_error(monkeypatch):
    monkeypatch.setenv("DORA_KERNELS_BACKEND", "fast")
    result = subprocess.run([sys.executable, "-c", "import dora_kernels"], capture_output=True, text=True)
    assert result.returncode != 0 and "DORA_KERNELS_BACKEND is 'fast'" in result.stderr


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(devices, "has_triton", lambda: False)


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


def test_every_target_has_every_kernel():
    names = set(configs.CONFIGS["sm_90", 2])
    for (target, itemsize), table in configs.CONFIGS.items():
        assert set(table) == names, (target, itemsize)
        # which of the two a call has depends on the number of tokens: the order of a row's sum must not
        assert table["epilogue"].BLOCK_R == table["epilogue_high_rank"].BLOCK_R, (target, itemsize)
    families = set(devices._CUDA_FAMILIES.values()) | set(devices._HIP_FAMILIES.values())
    for target in families:
        assert (target, 2) in configs.CONFIGS and (target, 4) in configs.CONFIGS


def test_block_r_shrinks_to_a_small_rank():
    config = Config(BLOCK_N=64, BLOCK_R=64)
    assert [config.tiles(R)["BLOCK_R"] for R in (0, 1, 8, 16, 17, 33, 64, 384)] == [16, 16, 16, 16, 32, 64, 64, 64]
    assert "BLOCK_M" not in config.tiles() and config.tiles()["num_warps"] == 4


def test_a_sum_that_fits_is_split_into_one_round_and_none_into_empty_parts():
    config = Config(waves=1)
    assert configs.splits(32, 100, H200, config) == 4  # 32 tiles on 132 multiprocessors
    assert configs.splits(32, 3, H200, config) == 3  # no more parts than steps
    assert configs.splits(500, 100, H200, config) == 1
    assert configs.splits(0, 100, H200, config) == 100
    assert configs.splits(32, 0, H200, config) == 1


@pytest.mark.parametrize(
    ("N", "waves", "rows", "steps", "parts", "full"),
    [
        # what divides well is split once, as far as the device is filled
        (1024, 1, 128, 128, 16, 0.97),
        (4096, 1, 128, 128, 4, 0.97),
        (8192, 1, 128, 128, 2, 0.97),
        (4096, 2, 64, 32, 4, 0.97),
        # one part of 112 tiles would leave 20 of 132 multiprocessors idle, of 86 tiles 46, of 148 tiles 116 in the end
        (14336, 1, 128, 128, 7, 0.99),
        (11008, 1, 128, 128, 3, 0.98),
        (18944, 1, 128, 128, 5, 0.93),
        (28672, 1, 128, 128, 4, 0.97),
        # 32 steps in seven parts are 35, and each part costs some beside: better 85% full than that
        (14336, 1, 128, 32, 1, 0.85),
        (14336, 2, 64, 32, 1, 0.85),
    ],
)
def test_a_sum_is_split_where_the_last_round_would_leave_multiprocessors_idle(N, waves, rows, steps, parts, full):
    config, blocks = Config(waves=waves), configs.ceil_div(N, rows)
    assert configs.splits(blocks, steps, H200, config) == parts
    rounds = configs.ceil_div(blocks * parts, 132 * waves)
    assert round(blocks * parts / (rounds * 132 * waves), 2) == full


def test_what_a_sum_is_split_into_is_worked_out_once():
    known = configs._fastest_split
    known.cache_clear()
    parts = [configs.splits(112, steps, H200, Config()) for steps in (128, 128, 32, 128)]
    assert parts == [7, 7, 1, 7] and known.cache_info().misses == 2
    assert known.cache_info().maxsize is not None, "M varies, and the results of a long run must not fill the memory"


@pytest.mark.parametrize("steps", (1, 7, 32, 128, 2048))
@pytest.mark.parametrize("waves", (1, 2))
def test_no_number_of_parts_within_the_bound_would_take_less_time(steps, waves):
    def time(blocks, parts):
        per_part = -(-steps // parts) + configs.PART_STEPS
        return -(-blocks * parts // at_once) * per_part

    at_once = 132 * waves
    for blocks in range(1, 1200):
        parts = configs.splits(blocks, steps, H200, Config(waves=waves))
        within = [n for n in range(1, steps + 1) if blocks * n <= configs.MOST_ROUNDS * at_once] or [1]
        assert parts == 1 or parts in within
        assert time(blocks, parts) == min(time(blocks, n) for n in (1, *within))


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
