"""The planner is a pure function: its choices and its predictions, without a device."""

import pytest
import torch

from dora_kernels.planning import devices, plan
from dora_kernels.planning.devices import DeviceFacts
from dora_kernels.planning.plan import Shape

H200, H100 = plan.DEVICES["NVIDIA H200"], plan.DEVICES["NVIDIA H100 80GB HBM3"]
CPU = plan.DEVICES["cpu"]


def forward_way(asked="auto", norm_given=False, shape=None, device=H200, needs_base=False, adapters_are_wider=False):
    shape = shape or Shape(8192, 4096, 4096, 64, 2)
    asks = {"needs_base": needs_base, "adapters_are_wider": adapters_are_wider}
    return plan.forward_way(asked, norm_given, shape, device, **asks)


def test_a_call_that_needs_base_is_split():
    assert forward_way(asked="merged", needs_base=True) == "split"


def test_wider_adapters_are_not_rounded_into_the_weight():
    shape = Shape(32768, 4096, 4096, 64, 2)
    assert forward_way(shape=shape, adapters_are_wider=True) == "split" and forward_way(shape=shape) == "merged"
    assert forward_way(asked="merged", adapters_are_wider=True) == "merged"


@pytest.mark.parametrize("way", ("split", "merged"))
def test_a_named_way_is_taken(way):
    assert forward_way(asked=way) == way
    assert plan.dx_way(way, Shape(8192, 4096, 4096, 64, 2), H200) == {"split": "dz", "merged": "merged"}[way]


def test_many_tokens_are_merged_and_few_are_split():
    ways = [forward_way(shape=Shape(M, 4096, 4096, 64, 2), norm_given=True) for M in (1, 16, 512, 32768)]
    assert ways == ["split", "split", "split", "merged"]
    dx_ways = [plan.dx_way("auto", Shape(M, 4096, 4096, 64, 2), H200) for M in (128, 512, 8192, 65536)]
    assert dx_ways == ["dz", "dz", "merged", "merged"]


def test_the_cpu_merges_in_float32_unless_the_norm_is_known():
    assert forward_way(device=CPU, shape=Shape(1, 4096, 4096, 8, 2)) == "split"
    assert forward_way(device=CPU, shape=Shape(1, 4096, 4096, 8, 4)) == "merged"
    assert forward_way(device=CPU, shape=Shape(1, 4096, 4096, 8, 4), norm_given=True) == "split"


def test_the_cpu_splits_in_half_precision():
    shape = Shape(32768, 1024, 1024, 8, 2)
    assert forward_way(device=CPU, shape=shape) == forward_way(device=CPU, shape=shape, norm_given=True) == "split"
    ways = [plan.dx_way("auto", Shape(M, 1024, 1024, 64, 2), CPU) for M in (1, 2048, 2049)]
    assert ways == ["dz", "dz", "merged"]


@pytest.mark.parametrize(
    ("dtype", "backend", "device", "needs_base", "adapters_are_wider", "expected"),
    [
        (torch.bfloat16, "auto", "cpu", False, False, "z_gemm"),
        (torch.bfloat16, "reference", "cpu", False, False, "z_gemm"),
        (torch.bfloat16, "triton", "cpu", False, False, "base"),
        (torch.bfloat16, "auto", "cuda", False, False, "base"),
        (torch.bfloat16, "reference", "cuda", False, False, "base"),
        (torch.float16, "auto", "cpu", False, False, "base"),
        (torch.bfloat16, "auto", "cpu", True, False, "base"),
        (torch.bfloat16, "auto", "cpu", False, True, "base"),
    ],
)
def test_pytorch_adds_base_onto_the_low_rank_term_on_a_cpu(
    dtype, backend, device, needs_base, adapters_are_wider, expected
):
    asks = {"needs_base": needs_base, "adapters_are_wider": adapters_are_wider}
    assert plan.intermediate("split", dtype, backend, torch.device(device), **asks) == expected
    assert plan.saved_tensor("split", dtype, backend, torch.device(device), **asks) == expected
    assert plan.intermediate("merged", dtype, backend, torch.device(device), **asks) == "z_merged"


@pytest.mark.parametrize("backend", ("auto", "reference", "triton"))
def test_the_planner_knows_whose_steps_a_cpu_s_tensors_take(backend, monkeypatch):
    """Only where those are PyTorch's is z saved in place of base: as the operators choose, without asking them."""
    monkeypatch.setattr(devices, "why_not_triton", lambda *_: None)
    asks = {"needs_base": False, "adapters_are_wider": False}
    saved = plan.saved_tensor("split", torch.bfloat16, backend, torch.device("cpu"), **asks)
    taken = devices.backend_for(backend, torch.device("cpu"), torch.bfloat16)
    assert saved == {"reference": "z_gemm", "triton": "base"}[taken]


@pytest.mark.parametrize(
    ("dtype", "asked", "needs_base", "adapters_are_wider", "expected"),
    [
        (torch.bfloat16, "auto", False, False, "base"),
        (torch.float32, "auto", False, False, "z_merged"),
        (torch.float16, "auto", False, True, "base"),
        (torch.bfloat16, "merged", False, True, "z_merged"),
        (torch.float32, "split", False, False, "base"),
        (torch.float32, "merged", True, False, "base"),
    ],
)
def test_what_a_training_step_saves(dtype, asked, needs_base, adapters_are_wider, expected):
    asks = {"needs_base": needs_base, "adapters_are_wider": adapters_are_wider}
    assert plan.saved_tensor(asked, dtype, "auto", torch.device("cuda"), **asks) == expected


@pytest.mark.parametrize(
    ("shape", "low", "high"),
    [
        # the floor of a split step, by hand: bytes at 4.3 TB/s and FLOPs at 790 TFLOP/s give 1.17 at the first shape;
        # every launch gap counted on top must stay below 1.30
        (Shape(8192, 4096, 4096, 64, 2), 1.17, 1.30),
        (Shape(8192, 8192, 8192, 64, 2), 1.08, 1.16),
        (Shape(8192, 14336, 4096, 384, 2), 1.15, 1.40),
    ],
)
def test_predicted_step_over_the_frozen_linear(shape, low, high):
    frozen = 2 * plan.gemm(shape.M, shape.N, shape.K).seconds(shape, H200)
    steps = plan.forward_costs(shape, "split") | plan.backward_costs(shape, "merged")
    assert low < plan.seconds(steps, shape, H200) / frozen < high


def test_a_step_is_bound_by_bytes_or_by_flops():
    shape = Shape(8192, 4096, 4096, 64, 2)
    base = plan.gemm(8192, 4096, 4096)
    assert base.seconds(shape, H200) == pytest.approx(2 * 8192 * 4096 * 4096 / 790e12 + 4e-6)
    norm = plan.forward_costs(shape, "split")["norm"]
    assert norm.seconds(shape, H200) == pytest.approx(2 * 4096 * 4096 / 4.3e12 + 8e-6)


@pytest.mark.parametrize(
    ("name", "target", "expected"),
    [
        ("NVIDIA H200", "sm_90", H200),
        ("NVIDIA H100 80GB HBM3", "sm_90", H100),
        ("NVIDIA H100 PCIe", "sm_90", plan.DEVICES["sm_90"]),
        ("NVIDIA A100-SXM4-80GB", "sm_80", plan.DEVICES["sm_80"]),
        ("Some GPU", "", H200),
        ("cpu", "interpreter", CPU),
        ("cpu", "", CPU),
    ],
)
def test_the_constants_of_a_card_by_its_name_then_by_its_target(name, target, expected):
    assert plan.device_model(DeviceFacts(name, target, 132)) is expected


def test_a_card_with_less_bandwidth_takes_longer_over_bytes_alone():
    shape = Shape(8192, 4096, 4096, 64, 2)
    step = plan.forward_costs(shape, "split")["epilogue"]
    bytes_alone = {device: step.seconds(shape, device) - device.launch for device in (H200, H100)}
    assert bytes_alone[H100] / bytes_alone[H200] == pytest.approx(4.3 / 3.0)
    gemm = plan.gemm(8192, 4096, 4096)
    assert gemm.seconds(shape, H100) == gemm.seconds(shape, H200)


def test_kernel_or_gemm_library():
    assert plan.project_by_kernel(8, scaled=True, same_dtype=True)
    assert not plan.project_by_kernel(8, scaled=False, same_dtype=True)
    assert not plan.project_by_kernel(384, scaled=True, same_dtype=True)
    assert plan.project_by_kernel(384, scaled=False, same_dtype=False)
    assert plan.outer_by_kernel(64, same_dtype=True) and not plan.outer_by_kernel(128, same_dtype=True)
