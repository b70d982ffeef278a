"""The planner is a pure function: its choices, without a device."""

from dataclasses import replace

import pytest
import torch

from dora_kernels.planning import costs, devices, plan
from dora_kernels.planning.costs import Shape
from dora_kernels.planning.devices import DeviceFacts

H200, H100 = costs.DEVICES["NVIDIA H200"], costs.DEVICES["NVIDIA H100 80GB HBM3"]
CPU = costs.DEVICES["cpu"]
SIZES = 4096, 4096, 64


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


@pytest.mark.parametrize(("way", "dx"), (("split", "dz"), ("merged", "merged"), ("fused", "merged")))
@pytest.mark.parametrize("device", (H200, CPU))
def test_a_named_way_is_taken(device, way, dx):
    assert forward_way(asked=way, device=device) == way
    assert plan.dx_way(way, Shape(16, 4096, 4096, 64, 2), device) == dx


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
    assert plan.saved_tensor("split", dtype, backend, torch.device(device), SIZES, **asks) == expected
    assert plan.intermediate("merged", dtype, backend, torch.device(device), **asks) == "z_merged"


@pytest.mark.parametrize("backend", ("auto", "reference", "triton"))
def test_the_planner_knows_whose_steps_a_cpu_s_tensors_take(backend, monkeypatch):
    """Only where those are PyTorch's is z saved in place of base: as the operators choose, without asking them."""
    monkeypatch.setattr(devices, "why_not_triton", lambda *_: None)
    asks = {"needs_base": False, "adapters_are_wider": False}
    saved = plan.saved_tensor("split", torch.bfloat16, backend, torch.device("cpu"), SIZES, **asks)
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
        (torch.bfloat16, "fused", False, False, "z_gemm"),
        (torch.float32, "fused", False, False, "z_gemm"),
        (torch.bfloat16, "fused", False, True, "base"),
        (torch.bfloat16, "fused", True, False, "base"),
    ],
)
def test_what_a_training_step_saves(dtype, asked, needs_base, adapters_are_wider, expected):
    asks = {"needs_base": needs_base, "adapters_are_wider": adapters_are_wider}
    assert plan.saved_tensor(asked, dtype, "auto", torch.device("cuda"), SIZES, **asks) == expected


def by_kernel(R, *, M=8192, K=4096, itemsize=2, facts=H200.facts):
    """Who makes low, P, dB and dA: True for our kernel."""
    given = M, K, R, itemsize, facts
    return {
        "low": plan.project_by_kernel(*given, same_dtype=True, counted=False),
        "P": plan.project_by_kernel(*given, same_dtype=True, counted=True),
        "dB": plan.outer_by_kernel(*given, same_dtype=True, beside=True),
        "dA": plan.outer_by_kernel(*given, same_dtype=True, beside=False),
    }


@pytest.mark.parametrize("card", (H200, H100))
@pytest.mark.parametrize("R", (8, 16, 64))
def test_low_ranks_are_our_kernels(card, R):
    assert all(by_kernel(R, facts=card.facts).values())


@pytest.mark.parametrize(
    ("R", "P", "dB", "dA"),
    # dB leaves us where reading dy from the L2 cache for every 64 of R takes longer than reading it from memory again
    [(128, False, True, False), (256, False, True, False), (384, False, False, False), (1024, False, False, False)],
)
def test_high_ranks_are_the_library_s(R, P, dB, dA):
    assert by_kernel(R) == {"low": False, "P": P, "dB": dB, "dA": dA}


@pytest.mark.parametrize(
    ("M", "ours"), [(1, False), (512, False), (6272, False), (6336, True), (8192, True), (8512, False), (65536, True)]
)
def test_low_is_ours_where_whole_blocks_fill_the_device(M, ours):
    """Blocks of 64 rows on 132 multiprocessors: 98 are three quarters less one, 133 a second round of one."""
    found = by_kernel(64, M=M, facts=H100.facts)
    assert found == {"low": ours, "P": True, "dB": True, "dA": True}


def test_two_dtypes_are_our_kernel_s():
    given = 1, 4096, 1024, 2, H200.facts
    assert plan.project_by_kernel(*given, same_dtype=False, counted=False)
    assert plan.outer_by_kernel(*given, same_dtype=False, beside=False)
    assert not plan.project_by_kernel(*given, same_dtype=True, counted=False)
    assert not plan.outer_by_kernel(*given, same_dtype=True, beside=False)


def test_a_measurement_of_the_library_flips_the_choice(monkeypatch):
    """Device.skinny is where it is entered."""
    assert all(by_kernel(16).values())
    monkeypatch.setitem(costs.DEVICES, "NVIDIA H200", replace(H200, skinny=0.95))
    assert by_kernel(16) == {"low": False, "P": False, "dB": True, "dA": False}
    monkeypatch.undo()
    assert all(by_kernel(16).values())


def test_the_interpreter_takes_what_a_gpu_would():
    assert by_kernel(64, facts=DeviceFacts("cpu", "interpreter", 2)) == by_kernel(64)
    assert by_kernel(8, facts=DeviceFacts("cpu", "interpreter", 2), itemsize=8) == by_kernel(8)


def test_a_choice_is_worked_out_once(monkeypatch):
    """A step asks four to six times, on the host, and what it asks of is the same in every step."""
    questions = {
        "forward": lambda: plan.forward_way(
            "auto", False, Shape(77, 40, 36, 6, 2), H200, needs_base=False, adapters_are_wider=False
        ),
        "dx": lambda: plan.dx_way("auto", Shape(77, 40, 36, 6, 2), H200),
        "by kernel": lambda: by_kernel(6, M=77, K=36),
    }
    answers = {name: ask() for name, ask in questions.items()}
    monkeypatch.setattr(costs, "fastest", lambda *_: pytest.fail("worked out again"))
    assert {name: ask() for name, ask in questions.items()} == answers
    for known in (plan._faster_forward, plan._faster_dx, plan._faster_project, plan._faster_outer):
        assert known.cache_info().maxsize is not None, "M varies, and a long run must not fill the memory"
