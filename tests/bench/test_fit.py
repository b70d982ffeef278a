"""The fit of the planner's constants, on times made from constants that are known."""

import json
import random
from dataclasses import replace

import pytest

from bench.kernels import GPU_CASES, LIBRARY
from bench.lib.shapes import LayerCase
from bench.studies import fit
from dora_kernels.planning import costs, plan

H200 = costs.DEVICES["NVIDIA H200"]
TRUE = replace(H200, bandwidth=2e12, matmul=300e12, matmul_float32=20e12, launch=9e-6, l2=2e12, skinny=0.4)
WRONG = replace(TRUE, bandwidth=6e12, matmul=1500e12, launch=2e-6, l2=8e12, skinny=0.8)


def kernel_row(kernel, sizes, by, noise=1.0):
    row = dict(zip("MNKR", sizes, strict=True)) | {"kernel": kernel, "by": by, "precision": "bf16"}
    return row | {"ms": {"median": 1e3 * noise * fit.predicted_seconds(row, TRUE)}}


@pytest.fixture
def kernel_rows():
    """10% of noise; and rows that are no step of ours, or were not measured, which have to be left out."""
    draw = random.Random(0)
    rows = [
        kernel_row(kernel, sizes, by, draw.uniform(0.9, 1.1))
        for sizes in GPU_CASES
        for kernel in LIBRARY
        for by in ("kernel", "library")
        if (by == "library" if kernel in ("base", "dx") else by == "kernel" or kernel in fit.BY_LIBRARY)
    ]
    others = [kernel_row("norm", GPU_CASES[0], "library", noise=50), kernel_row("norm", GPU_CASES[1], "kernel")]
    others[1]["ms"] = None
    return rows + others


def layer_rows(way, times):
    """Inference at M tokens by `way`, in milliseconds."""
    shape = {"N": 4096, "K": 4096, "R": 64, "precision": "bf16"}
    given = {"provider": f"ours_{way}", "step": "inference", "ok": True, "graph_ms": None}
    return [shape | given | {"M": M, "ms": {"median": ms}} for M, ms in times.items()]


def test_the_constants_are_found_again(kernel_rows):
    fitted_to, judged_by = fit.halves(fit.measured_steps(kernel_rows))
    assert not set(map(fit.case_of, fitted_to)) & set(map(fit.case_of, judged_by))
    assert len(fitted_to) + len(judged_by) == len(GPU_CASES) * (len(LIBRARY) + 2)  # low and dA by both
    found = fit.fit(fitted_to, WRONG)
    for name in ("bandwidth", "matmul", "launch", "skinny"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=0.15), name
    assert found.l2 == pytest.approx(TRUE.l2, rel=0.25)  # few of these steps are bound by the L2 cache
    assert found.matmul_float32 == WRONG.matmul_float32  # nothing measured depends on it
    assert fit.share_within(judged_by, WRONG) < 0.5
    assert fit.share_within(judged_by, found) == 1


def test_the_way_that_is_faster_is_the_right_one():
    shape = costs.Shape(32768, 4096, 4096, 64, 2)
    assert plan.forward_way("auto", True, shape, TRUE, needs_base=False, adapters_are_wider=False) == "merged"
    # at 16 tokens split is picked: right, wrong, and too close to call
    for split, merged, right in ((1.0, 2.0, True), (2.0, 1.0, False), (1.02, 1.0, True)):
        rows = layer_rows("split", {16: split}) + layer_rows("merged", {16: merged})
        assert fit.choices(rows, TRUE) == [right]
    rows = layer_rows("split", {32768: 1.0, 16: 1.0}) + layer_rows("merged", {32768: 2.0})
    assert fit.choices(rows, TRUE) == [False]


def test_the_command(kernel_rows, tmp_path, capsys):
    assert fit.main(["card", "--results", str(tmp_path)]) == 2
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "kernels.json").write_text(json.dumps({"meta": {}, "rows": kernel_rows}))
    rows = [row for M in (16, 512, 8192) for way in ("split", "merged") for row in layer_rows(way, {M: 1.0})]
    (tmp_path / "card" / "layer.json").write_text(json.dumps({"meta": {}, "rows": rows}))
    assert fit.main(["card", "--results", str(tmp_path)]) == 0
    constants, in_use, fitted = capsys.readouterr().out.splitlines()
    assert type(eval(constants, {"replace": replace, "device": TRUE})) is costs.Device
    assert in_use.startswith("in use") and "1 of 1 ways right" in fitted
    judged = f"100% of {3 * (len(LIBRARY) + 2)} steps"  # every second of seven cases
    assert judged in fitted and judged not in in_use


def test_a_case_is_what_a_row_says():
    assert fit.case_of(kernel_row("norm", (1, 2, 3, 4), "kernel")) == LayerCase(1, 2, 3, 4, "bf16")
