"""Whole layers the fused way: planner, passes and launchers, and the kernel's source on a simulator of the hardware."""

import logging

import pytest
import torch

import dora_kernels
from dora_kernels import ops
from dora_kernels.planning import devices, measured, plan
from dora_kernels.testing import MEAN_RATIO, geometric_mean
from tests.support.gluon_gemm import SOURCE
from tests.support.problem import DEVICE, GRADIENTS, Problem
from tests.support.simulated_hopper import MULTIPROCESSORS, simulated_hopper

if DEVICE == "cuda":
    pytest.skip("a GPU runs the kernel itself (bench/studies/probe.py)", allow_module_level=True)

HALF = (torch.bfloat16, torch.float16)
# M, N, K, R; tiles of 16 x 32 and steps of 8. What runs beside dx wants N and K in whole vectors, the GEMM halves of
# them (in test_what_the_kernel_cannot_take_is_right_without_it).
SHAPES = (
    (33, 48, 80, 8),  # tails in M and N, one step of R
    (16, 96, 64, 24),  # a row of whole tiles, three steps of R
    (70, 48, 48, 16),  # more rows of tiles than programs, tails in M and N
)
BESIDE = tuple(measured.BESIDE)


def beside(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What runs beside dx is that of measured.BESIDE."""
    monkeypatch.setattr(plan, "beside", lambda *asked, **keywords: measured.BESIDE[name])


def fused(problem: Problem, **arguments) -> dict[str, torch.Tensor]:
    return problem.ours("triton", "fused", **arguments)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_as_exact_as_pytorch(dtype, monkeypatch):
    beside(monkeypatch, "all")
    ratios = []
    for seed, shape in enumerate(SHAPES):
        problem = Problem.random(*shape, dtype, bias=seed != 1, seed=seed)
        with simulated_hopper(seed) as kernel:
            needs = tuple(name for name in GRADIENTS if name != "bias" or problem.bias is not None)
            comparisons = problem.comparisons(fused(problem, needs=needs), needs=needs)
        assert all(comparison.ok for comparison in comparisons), (shape, comparisons)
        ratios += [comparison.ratio for comparison in comparisons]
        forward, dx = kernel.launches
        assert ("bias" in forward) == (problem.bias is not None)
        assert {"low", "lora", "y", "z", "gain"} <= forward.keys() and dx.keys() == {"x", "weight", "y", "programs"}
        assert forward["programs"] == min(MULTIPROCESSORS, -(-shape[0] // 16) * -(-shape[1] // 32))
        assert dx["programs"] == min(MULTIPROCESSORS - 4, -(-shape[0] // 16) * -(-shape[2] // 32))
    assert geometric_mean(ratios) <= MEAN_RATIO


@pytest.mark.parametrize("name", BESIDE)
def test_what_runs_beside_dx_changes_no_gradient_but_in_its_last_bits(name, monkeypatch):
    beside(monkeypatch, name)
    problem = Problem.random(33, 48, 80, 16, torch.bfloat16)
    with simulated_hopper() as kernel:
        comparisons = problem.comparisons(fused(problem))
    assert all(comparison.ok for comparison in comparisons), comparisons
    assert len(kernel.launches) == (1 if name == "none" else 2)


def test_the_same_call_gives_the_same_bits_in_another_order_of_events(monkeypatch):
    beside(monkeypatch, "all")
    problem = Problem.random(33, 48, 80, 16, torch.bfloat16)
    results = []
    for seed in (1, 2):
        with simulated_hopper(seed):
            results.append(fused(problem))
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_without_gradients_one_output_is_written():
    problem = Problem.random(*SHAPES[0], torch.bfloat16)
    with simulated_hopper() as kernel:
        comparisons = problem.comparisons(fused(problem, needs=()), needs=())
    assert [comparison.name for comparison in comparisons] == ["y"] and comparisons[0].ok, comparisons
    assert len(kernel.launches) == 1 and "z" not in kernel.launches[0]


def test_z_is_kept_and_is_what_the_backward_pass_reads(monkeypatch):
    made, forward = [], ops.run_forward
    monkeypatch.setattr(ops, "run_forward", lambda call: made.append(forward(call)) or made[-1])
    problem = Problem.random(*SHAPES[0], torch.bfloat16)
    with simulated_hopper() as kernel:
        fused(problem)
    for name, tensor in (("z", made[0].intermediate), ("y", made[0].y)):
        assert tensor.data_ptr() == kernel.launches[0][name].data_ptr(), name


@pytest.mark.parametrize("arguments", ({"norm_grad": True}, {"scaling": 0.0}, {"scaling": -3.0}), ids=str)
def test_through_the_norm_and_with_any_scaling(arguments):
    scaling = arguments.pop("scaling", 0.75)
    problem = Problem.random(33, 40, 72, 8, torch.bfloat16, scaling=scaling)
    with simulated_hopper() as kernel:
        comparisons = problem.comparisons(fused(problem, **arguments), **arguments)
    assert all(comparison.ok for comparison in comparisons), comparisons
    assert "z" in kernel.launches[0]


@pytest.mark.parametrize(
    "call",
    (
        {"dropout": 0.4},
        {"precision": "exact"},
        {"adapter_dtype": torch.float32},
        {"dtype": torch.float32},
        {"shape": (33, 40, 32, 8)},  # no step over K that gain and bias could come with
        {"shape": (33, 44, 72, 8)},  # rows of y that the copy engine cannot write
        {"shape": (33, 40, 76, 8)},
        {"shape": (33, 40, 72, 12)},
        {"offset": 1},  # x begins at no multiple of 16 bytes
    ),
    ids=str,
)
def test_what_the_kernel_cannot_take_is_right_without_it(call):
    shape, dtype = call.get("shape", (33, 40, 72, 8)), call.get("dtype", torch.bfloat16)
    problem = Problem.random(*shape, dtype, call.get("adapter_dtype"), dropout=call.get("dropout", 0.0))
    if "offset" in call:
        memory = torch.empty(problem.x.numel() + 8, dtype=dtype)[1:-7].view(problem.x.shape)
        problem.x = memory.copy_(problem.x)
        assert problem.x.data_ptr() % 16
    with simulated_hopper() as kernel:
        comparisons = problem.comparisons(fused(problem, precision=call.get("precision", "auto")))
    assert all(comparison.ok for comparison in comparisons), comparisons
    assert not [one for one in kernel.launches if "gain" in one]


@pytest.mark.parametrize("M", (0, 1))
def test_few_tokens_and_none(M, monkeypatch):
    beside(monkeypatch, "all")
    problem = Problem.random(M, 48, 80, 8, torch.bfloat16)
    with simulated_hopper() as kernel:
        results, exact = fused(problem), problem.exact()
    for name, tensor in results.items():
        assert tensor.shape == exact[name].shape and torch.isfinite(tensor).all()
        assert torch.allclose(tensor.double(), exact[name], rtol=0.05, atol=0.05), name
    assert len(kernel.launches) == (2 if M else 0)


def test_an_inf_comes_out_where_the_formula_says_and_nowhere_else():
    problem = Problem.random(33, 40, 72, 8, torch.bfloat16)
    problem.x[5, 3] = float("inf")
    with simulated_hopper() as kernel:
        y = fused(problem, needs=())["y"]
    exact = problem.exact(needs=())["y"]
    assert torch.equal(y.isfinite(), exact.isfinite()) and not y[5].isfinite().any() and kernel.launches


def test_under_autocast_with_float32_adapters():
    problem = Problem.random(33, 40, 72, 8, torch.bfloat16, torch.float32)
    with simulated_hopper() as kernel, torch.autocast("cpu", torch.bfloat16):
        results = fused(problem)
    exact = problem.exact()
    for name, tensor in results.items():
        assert (tensor.double() - exact[name]).norm() < 0.02 * exact[name].norm(), name
    assert results["lora_A"].dtype == torch.float32 and kernel.launches


@pytest.mark.filterwarnings("ignore")
def test_inside_torch_compile():
    problem = Problem.random(33, 40, 72, 8, torch.bfloat16)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return dora_kernels.dora_linear(x, *problem.layer, problem.bias)

    with simulated_hopper() as kernel, dora_kernels.options(backend="triton", way="fused"):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        x = problem.x.clone().requires_grad_()
        problem.lora_A.requires_grad_()
        problem.magnitude.requires_grad_()
        assert torch.equal(compiled(x), layer(x))
    assert len(kernel.launches) == 2 and all("z" in one for one in kernel.launches)


def test_the_reason_of_a_fall_to_the_library_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(devices, "_logged", set())
    problem = Problem.random(33, 40, 72, 12, torch.bfloat16)
    with simulated_hopper(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            fused(problem)
    (record,) = [record for record in caplog.records if "GEMM library" in record.message]
    assert "strides" in record.message


@pytest.mark.parametrize(
    "needs", [("x",), ("x", "lora_B"), ("magnitude",), ("lora_A", "bias"), ("lora_B",)], ids=", ".join
)
def test_some_of_the_gradients(needs, monkeypatch):
    beside(monkeypatch, "all")
    problem = Problem.random(33, 80, 48, 8, torch.bfloat16)
    with simulated_hopper() as kernel:
        comparisons = problem.comparisons(fused(problem, needs=needs), needs=needs)
    assert [comparison.name for comparison in comparisons] == ["y", *needs]
    assert all(comparison.ok for comparison in comparisons), comparisons
    assert len(kernel.launches) == (2 if needs == ("x", "lora_B") else 1)  # with x alone nothing runs beside its GEMM
    assert ("z" in kernel.launches[0]) == ("magnitude" in needs)


@pytest.mark.parametrize(
    "old, new", [("            acc *= scaling\n", ""), ("y_part += load_row(bias", "y_part += load_row(gain")]
)
def test_a_broken_kernel_is_seen_in_a_layer(old, new):
    assert old in SOURCE
    problem = Problem.random(50, 72, 88, 8, torch.bfloat16)
    with simulated_hopper(source=SOURCE.replace(old, new)):
        (comparison,) = problem.comparisons(fused(problem, needs=()), needs=())
    assert not comparison.ok
