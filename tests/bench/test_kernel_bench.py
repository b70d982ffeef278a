"""The benchmarks of single kernels: the formula table by hand-computed numbers, the check of results, and the decisive
measurements, whose code runs here at small sizes.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import kernels
from bench.kernels import KernelOperands
from bench.lib import report, roof
from bench.lib.measure import Timing
from bench.lib.roof import Roof, Work, work
from bench.lib.shapes import LayerCase
from bench.studies import decisive
from dora_kernels.kernels import KERNELS
from dora_kernels.kernels.launches import LaunchPlan
from dora_kernels.planning import costs, devices, plan
from dora_kernels.pytorch import PYTORCH

ROOT = Path(__file__).parents[2]
H200 = Roof(4e12, {"bf16": 800e12, "fp16": 800e12, "fp32": 50e12})
CASE = LayerCase(8192, 4096, 2048, 64, "bf16")
SMALL = LayerCase(40, 48, 56, 8, "bf16")


def small(precision: str) -> LayerCase:
    return replace(SMALL, precision=precision)


# main tensors by hand: W 2^23 elements, x 2^24, dy or base or y 2^25; low-rank operands: A 2^17, B 2^18, low or P 2^19
@pytest.mark.parametrize(
    ("kernel", "elements", "flops"),
    [
        ("norm", 2**23 + 2**17 + 2**18, 2 * 2**23 * 64),
        ("merge", 2 * 2**23 + 2**17 + 2**18, 2 * 2**23 * 64),
        ("low", 2**24 + 2**17 + 2**19, 2 * 2**24 * 64),
        ("project", 2**25 + 2**18 + 2**19, 2 * 2**25 * 64),
        ("epilogue", 2 * 2**25 + 2**18 + 2**19, 2 * 2**25 * 64),
        ("token_sums", 2 * 2**25 + 2**18 + 2**19, 2 * 2**25 * 64),
        ("column_sums", 2 * 2**25, 0),
        ("dB", 2**25 + 2**18 + 2**19, 2 * 2**25 * 64),
        ("outer_product", 2**24 + 2**17 + 2**19, 2 * 2**24 * 64),
        ("base", 2**24 + 2**23 + 2**25, 2 * 2**36),
        ("dx", 2**24 + 2**23 + 2**25, 2 * 2**36),
    ],
)
def test_work(kernel, elements, flops):
    assert work(kernel, CASE) == Work(2 * elements, flops)


def test_work_of_wider_operands():
    assert work("norm", replace(CASE, precision="bf16-fp32")).bytes == 2 * 2**23 + 4 * (2**17 + 2**18)
    assert work("norm", replace(CASE, precision="fp32")).bytes == 4 * (2**23 + 2**17 + 2**18)


def test_what_fills_counters_is_planned_with_a_launch_for_it(monkeypatch):
    o, filled, zeros = KernelOperands.random(SMALL), [], torch.zeros

    def spy(*shape, dtype=None, **named):
        filled.append(dtype)
        return zeros(*shape, dtype=dtype, **named)

    monkeypatch.setattr(torch, "zeros", spy)
    for name in kernels.CALLS.keys() - {"low"}:  # of so few tokens in parts, at any size of a layer in whole blocks
        filled.clear()
        with kernels.every_call_by_kernel():
            kernels.TIMED[name](o, KERNELS)
        assert 1 + filled.count(torch.int32) == roof.planned_cost(name, CASE).launches, name


def test_the_sums_include_the_product_at_any_rank():
    wide = replace(CASE, R=384)
    # in the package it is the library's, in bench.kernels not
    assert "dB" in costs.backward_costs(roof.shape_of(wide), "merged", costs.DEVICES["NVIDIA H200"])
    assert work("token_sums", wide) == Work(2 * (2 * 2**25 + 384 * (8192 + 4096)), 2 * 2**25 * 384)


def test_the_library_is_charged_for_what_it_reads():
    rows = kernels.measure_case(SMALL, H200, ("token_sums", "column_sums"), seconds=0, rounds=(1, 1))
    counted = {(row["kernel"], row["by"]): (row["bytes"], row["flops"]) for row in rows}
    M, N, R = SMALL.M, SMALL.N, SMALL.R
    assert counted["token_sums", "kernel"] == (2 * (2 * M * N + R * (M + N)), 2 * M * N * R)
    assert counted["token_sums", "library"] == (2 * (M * N + R * (M + N)), 2 * M * N * R)
    assert counted["column_sums", "kernel"] == counted["column_sums", "library"] == (4 * M * N, 0)


def test_the_sums_without_the_product_are_what_the_package_launches_at_high_ranks(monkeypatch):
    """The kernel sums the same tensors; where the package calls it, it finishes the library's product, too."""
    launched = []
    monkeypatch.setattr(LaunchPlan, "launch", lambda self, grid, *given, side: launched.append((self.kernel.fn, given)))
    monkeypatch.setattr(plan, "outer_by_kernel", lambda *given, **named: False)
    o = KernelOperands.random(SMALL)
    for call in ("token_sums", "column_sums"):
        kernels.CALLS[call](o, KERNELS)
    for kernel, (dy, low, saved, *_) in launched:
        assert kernel.__name__ == "_token_sums_kernel" and dy is o.dy and low is None and saved is o.base
    assert len(launched) == 2


def test_every_kernel_has_a_formula_and_a_library_call():
    assert set(kernels.CALLS) < set(kernels.LIBRARY)
    for kernel in kernels.LIBRARY:
        assert work(kernel, CASE).bytes > 0


def test_the_roof_is_the_larger_of_bytes_and_flops():
    # 16 MiB of W and 0.75 MiB of A and B at 4 TB/s; 1.07 GFLOP at 800 TFLOP/s would be 1.3 us
    seconds, bound = roof.floor_seconds("norm", CASE, H200)
    assert bound == "bytes" and seconds == pytest.approx(4.39e-6, rel=1e-2)
    seconds, bound = roof.floor_seconds("base", CASE, H200)
    assert bound == "flops" and seconds == pytest.approx(2 * 2**36 / 800e12)
    wide = replace(CASE, R=384, precision="bf16-fp32")
    floors = {p: roof.floor_seconds("norm", wide, H200, p)[0] for p in ("bf16x3", "bf16x6", "ieee")}
    flops = 2 * 2**23 * 384
    assert floors == pytest.approx({"bf16x3": flops * 3 / 8e14, "bf16x6": flops * 6 / 8e14, "ieee": flops / 5e13})


def test_the_figures_of_a_row():
    timing = Timing(median=0.01, p20=0.01, p80=0.01, minimum=0.01, runs=3)
    row = kernels.figures("norm", CASE, timing, H200)
    done = work("norm", CASE)
    assert row["gigabytes_per_second"] == pytest.approx(done.bytes / 1e4)
    assert row["teraflops"] == pytest.approx(done.flops / 1e7)
    assert row["percent_of_roof"] == pytest.approx(100 * done.bytes / 4e12 / 1e-5)


@pytest.mark.parametrize("precision", kernels.DTYPES)
def test_the_reference_passes_its_own_check(precision):
    checker = kernels.Checker(KernelOperands.random(small(precision)))
    for kernel in kernels.CALLS:
        assert kernels.failure(checker.comparisons(kernel, PYTORCH)) is None, kernel


STEP = {"norm": "norm", "merge": "merge", "low": "project", "project": "project", "epilogue": "epilogue"}


@pytest.mark.parametrize("precision", ("bf16", "fp32"))
@pytest.mark.parametrize("wrong", (0.0, 0.99, float("nan")))
@pytest.mark.parametrize("kernel", STEP)
def test_a_wrong_kernel_is_found(kernel, wrong, precision):
    def step(*arguments, **keywords):
        results = getattr(PYTORCH, STEP[kernel])(*arguments, **keywords)
        return tuple(wrong * t for t in results) if isinstance(results, tuple) else wrong * results

    checker = kernels.Checker(KernelOperands.random(small(precision)))
    reason = kernels.failure(checker.comparisons(kernel, PYTORCH._replace(**{STEP[kernel]: step})))
    assert reason and "error" in reason


@pytest.mark.parametrize("part", ("dB", "dmagnitude", "dbias"))
def test_sums_over_the_tokens_that_are_left_unwritten_are_found(part):
    def step(*arguments, **keywords):
        keywords.pop(part)
        PYTORCH.token_sums(*arguments, **keywords)

    checker = kernels.Checker(KernelOperands.random(SMALL))
    reason = kernels.failure(checker.comparisons("token_sums", PYTORCH._replace(token_sums=step)))
    assert reason == f"{part}: error inf, yardstick {reason.split()[-1]}"


def test_an_update_that_is_lost_is_found():
    operands = KernelOperands.random(SMALL)
    checker = kernels.Checker(operands)
    for kernel in ("norm", "merge", "epilogue"):
        without = replace(operands, lora_B=torch.zeros_like(operands.lora_B))
        checker.comparisons(kernel, PYTORCH)  # of the right operands
        checker.operands = without
        assert kernels.failure(checker.comparisons(kernel, PYTORCH)), kernel
        checker.operands = operands


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    monkeypatch.setattr(kernels, "steps_for", lambda case: (PYTORCH._replace(norm=lambda *a: 1 / 0), "triton"))
    monkeypatch.setattr(kernels, "SUMMATION", -1.0)  # nothing is good enough
    rows = kernels.measure_case(SMALL, H200, ("norm", "merge"), seconds=0, rounds=(1, 1))
    by_key = {(row["kernel"], row["by"]): row for row in rows}
    assert by_key["norm", "kernel"]["reason"] == "ZeroDivisionError: division by zero"
    assert by_key["merge", "kernel"]["reason"].startswith("merged: error")
    for name in ("norm", "merge"):
        assert not by_key[name, "kernel"]["ok"] and by_key[name, "kernel"]["ms"] is None
        assert by_key[name, "library"]["ok"] and by_key[name, "library"]["ms"]["runs"] == 1


def test_every_call_is_by_kernel_inside():
    before = plan.project_by_kernel, plan.outer_by_kernel
    with kernels.every_call_by_kernel():
        given = 8192, 4096, 384, 2, costs.DEVICES["NVIDIA H200"].facts
        assert plan.project_by_kernel(*given, same_dtype=True, counted=False)
        assert plan.outer_by_kernel(*given, same_dtype=True, beside=True)
    assert (plan.project_by_kernel, plan.outer_by_kernel) == before


def test_poison_is_gone_afterwards():
    torch.use_deterministic_algorithms(False)  # every test starts with it on (conftest.py)
    with kernels._poisoned():
        assert torch.empty(5).isnan().all() and torch.ones(1, dtype=torch.bfloat16).new_empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(not devices.interpreting(), reason="the real kernels at sizes for the interpreter")
def test_the_real_kernels_are_measured(monkeypatch):
    rows = kernels.measure_case(SMALL, H200, ("norm", "outer_product"), ("kernel",), seconds=0, rounds=(1, 1))
    assert [(row["kernel"], row["backend"], row["ok"]) for row in rows] == [
        ("norm", "triton", True),
        ("outer_product", "triton", True),
    ]


def run(*command: str, **variables: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, text=True, capture_output=True)


@pytest.mark.nightly
def test_the_command_writes_its_rows(tmp_path):
    out = tmp_path / "a" / "kernels.json"
    arguments = ("--device", "cpu", "--case", "16x32x48x8", "--kernel", "norm", "--out", str(out), "--commit", "c")
    done = run("-m", "bench.kernels", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    assert [row["by"] for row in content["rows"]] == ["kernel", "library"] and content["meta"]["left_out"] == []
    assert content["meta"]["roof"]["bandwidth"] > 0 and set(content["meta"]["roof"]["matmul"]) == {
        "bf16",
        "fp16",
        "fp32",
    }


def test_the_roofs_are_rows_of_a_file_that_others_read(tmp_path, monkeypatch, capsys):
    measured = roof.measure_roof(torch.device("cpu"), 1 << 16, 16, 3, {"fp32": torch.float32})
    assert measured.bandwidth > 0 and measured.matmul["fp32"] > 0
    rows = roof.rows_of(H200)
    assert [(row["what"], row["dtype"], row["value"]) for row in rows[:2]] == [
        ("copy", None, 4e12),
        ("matmul", "bf16", 800e12),
    ]
    path, cpu = tmp_path / "roofline.json", torch.device("cpu")
    report.write(path, {}, rows)
    assert roof.read_roof(path) == roof.roof_for(cpu, path) == H200
    monkeypatch.setattr(roof, "measure_roof", lambda *arguments: arguments)
    assert roof.roof_for(cpu, None, (1, 2, 3)) == (cpu, 1, 2, 3) and roof.roof_for(cpu, None) == (cpu,)
    for text in ("{", '{"rows": []}', "[]", '{"rows": [{"what": "copy", "dtype": null, "value": null}]}'):
        path.write_text(text)
        assert roof.roof_for(cpu, path) == (cpu,)
        assert "expected what tools/roofline.py writes; measured again" in capsys.readouterr().out


def test_a_case_with_a_precision_of_its_own_is_not_repeated():
    asked = [kernels._case("1x2x3x4"), kernels._case("5x6x7x8:fp32"), kernels._case("2x2x2x2")]
    shown = [str(case) for case in kernels.cases_of(asked, ["bf16", "bf16-fp32"], "cpu")]
    assert shown == [
        "M=1 N=2 K=3 R=4 bf16",
        "M=2 N=2 K=2 R=2 bf16",
        "M=1 N=2 K=3 R=4 bf16-fp32",
        "M=2 N=2 K=2 R=2 bf16-fp32",
        "M=5 N=6 K=7 R=8 fp32",
    ]
    with pytest.raises(ValueError):
        kernels._case("1x2x3x4:fp8")


def test_a_section_that_raises_is_a_row_and_not_the_end(tmp_path):
    def broken(bench):
        raise RuntimeError("out of luck")

    sections = {"a": broken, "b": lambda bench: [{"us": 1.0}, {"ok": False}], "c": broken}
    # the start, then per section: before it, at its start and its end
    ticks = iter((0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 5.0, 5.0))
    out = tmp_path / "decisive.json"
    rows = decisive.run(decisive.Bench(torch.device("cpu"), H200), out, {}, 5, sections, lambda: next(ticks))
    assert rows == [
        {"section": "a", "ok": False, "reason": "RuntimeError: out of luck"},
        {"section": "b", "ok": True, "us": 1.0},
        {"section": "b", "ok": False},
    ]
    assert json.loads(out.read_text())["meta"] == {"conditions": {}, "left_out": ["c"]}


def test_the_sections_run(tmp_path):
    done = run("-m", "bench.studies.decisive", "--small", "--out", str(tmp_path / "d.json"), CUDA_VISIBLE_DEVICES="")
    rows = json.loads((tmp_path / "d.json").read_text())["rows"]
    assert done.returncode == 0, [row for row in rows if not row["ok"]]
    assert {row["section"] for row in rows} == set(decisive.SECTIONS)
