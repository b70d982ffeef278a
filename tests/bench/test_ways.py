"""The measurement of the ways where there is no GPU: real steps in the interpreter, our GEMM stood in for by PyTorch.

The gate before the times, what is left out and why, the table after each pass, and what a way that hangs costs.
"""

import contextlib
import json
import os
import re
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from bench.lib import measure as bench_measure
from bench.lib import tuned
from bench.lib.shapes import LayerCase
from bench.studies import one_layer, ways
from bench.studies.one_layer import WAYS, OneLayer
from bench.studies.ways import Study, told
from dora_kernels.kernels.hopper import launch
from dora_kernels.planning import devices, measured
from dora_kernels.planning.measured import BESIDE

SMALL = LayerCase(16, 48, 64, 8, "bf16", "cpu")
SIZES = {"M": 16, "N": 48, "K": 64, "R": 8}
needs_interpreter = pytest.mark.skipif(not devices.interpreting(), reason="at sizes for the interpreter")


def stand_in(config, nn, x, weight, low, lora, y, z, gain, bias, scaling, programs):
    """dora_kernels.kernels.hopper.launch.launch, computed by PyTorch with one rounding."""
    product = x.double() @ (weight if nn else weight.T).double()
    if low is not None:
        product += scaling * low.double() @ (lora if nn else lora.T).double()
    y.copy_(product if gain is None else gain * product)
    if z is not None:
        z.copy_(product)


@pytest.fixture
def with_gemm(monkeypatch):
    """with_gemm(launch) has a device that the GEMM can be launched on, by this function."""
    monkeypatch.setattr(ways, "SECONDS_EACH", 0.0)
    monkeypatch.setattr(ways, "ROUNDS", (1, 1))
    monkeypatch.setattr(bench_measure, "WARMUP_STEPS", 0)
    monkeypatch.setattr(ways, "make", in_this_process)
    monkeypatch.setattr(launch, "why_not_gluon", lambda: None)
    return lambda replacement: monkeypatch.setattr(launch, "launch", replacement)


def in_this_process(attempts, seconds, clock=None):
    return ((attempt, row) for attempt in attempts for row in attempt.run())


def measure(folder, cases=(SMALL,)):
    study = Study(list(cases))
    ways.run(study, folder / "ways.json", folder / "table.json", {"device": "a GPU"}, 60)
    return study, json.loads((folder / "ways.json").read_text()), tuned.read(folder / "table.json")


@pytest.fixture
def only(monkeypatch):
    """only(pass=ways, ...) has these alone measured: they tell what happens to the others."""

    def only(**named):
        for module in (ways, one_layer):
            monkeypatch.setattr(module, "WAYS", named)

    return only


def entered(table):
    (entry,) = table["ways"]
    return {name: list(entry[name]) for name in ways.WAYS}


@needs_interpreter
def test_every_way_is_held_to_float64_and_timed(with_gemm, only, tmp_path):
    with_gemm(stand_in)
    only(forward=WAYS["forward"], inference=("split", "fused"), backward=("none", "all"))
    study, content, table = measure(tmp_path)
    assert content["meta"] == {"device": "a GPU", "left_out": []}
    assert [(row["pass"], row["way"]) for row in content["rows"]] == [
        (name, way) for name, of in ways.WAYS.items() for way in of
    ]
    for row in content["rows"]:
        assert row["ok"] and row["timed"] and row["us"] == pytest.approx(1e3 * row["ms"]["median"], rel=1e-3), row
        names = {"x", "lora_A", "lora_B", "magnitude"} if row["pass"] == "backward" else {"y"}
        assert row["errors"].keys() == names and all(0 < e["error"] < 2**-7 for e in row["errors"].values())
    (entry,) = table["ways"]
    assert SIZES.items() <= entry.items() and entered(table) == {name: list(of) for name, of in ways.WAYS.items()}
    (known,) = measured._entries(table["ways"])  # as the package reads it
    assert {name: list(getattr(known, name)) for name in WAYS} == {
        name: list(map(entry[name].get, of)) for name, of in WAYS.items()
    }
    assert told(study)[0].startswith("16 x 48 x 64 R 8: forward ")


@needs_interpreter
def test_without_our_gemm_its_ways_are_left_out_with_the_reason(with_gemm, only, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "why_not_gluon", lambda: "no Gluon")
    only(forward=("split", "fused", "merged"), backward=("none", "token sums"))
    _, content, table = measure(tmp_path)
    out = {row["way"]: row["left_out"] for row in content["rows"] if not row["timed"]}
    assert out == dict.fromkeys(("fused", "token sums"), "it has launched nothing of ours: no Gluon")
    assert all(row["ok"] for row in content["rows"])
    assert entered(table) == {"forward": ["split", "merged"], "backward": []}


def with_a_row_unwritten(config, nn, x, weight, low, lora, y, *rest):
    stand_in(config, nn, x, weight, low, lora, y, *rest)
    y[-1] = float("nan")


def otherwise_each_time(config, nn, x, weight, low, lora, y, *rest):
    stand_in(config, nn, x, weight, low, lora, y, *rest)
    called.append(y)
    y[0, 0] += y[0, 0] * 2**-7 * (len(called) % 2)


called: list = []


@needs_interpreter
@pytest.mark.parametrize(
    ("broken", "reason"), ((with_a_row_unwritten, "error inf"), (otherwise_each_time, "not the same bits twice"))
)
def test_a_way_that_is_wrong_is_a_row_and_not_in_the_table(broken, reason, with_gemm, only, tmp_path):
    with_gemm(broken)
    only(forward=("split", "fused", "merged"))
    _, content, table = measure(tmp_path)
    (wrong,) = [row for row in content["rows"] if not row["ok"]]
    assert wrong["way"] == "fused" and reason in wrong["reason"] and not wrong["timed"]
    assert entered(table) == {"forward": ["split", "merged"]}


def with_an_error(*arguments):
    raise TypeError("no such argument")


@needs_interpreter
def test_a_way_that_raises_leaves_the_process_to_the_others(with_gemm, only, tmp_path):
    """Here nothing follows in a new one: an error that is not caught ends the run."""
    with_gemm(with_an_error)
    only(forward=("fused", "split", "merged"), inference=("split", "fused"))
    _, content, _ = measure(tmp_path)
    wrong = {(row["pass"], row["way"]): row["reason"] for row in content["rows"] if not row["ok"]}
    assert wrong == dict.fromkeys((("forward", "fused"), ("inference", "fused")), "TypeError: no such argument")
    assert all(row["us"] for row in content["rows"] if row["ok"])


@needs_interpreter
@pytest.mark.parametrize("said", ("CUDA error: unspecified launch failure", "Triton Error [CUDA]: invalid argument"))
def test_an_error_of_cuda_ends_the_process(said, with_gemm, only, tmp_path):
    with_gemm(lambda *arguments: fault(said))
    only(forward=("split", "fused"))
    with pytest.raises(RuntimeError, match=re.escape(said)):
        measure(tmp_path)


def test_what_a_backward_pass_follows_is_made_behind_the_layer(monkeypatch):
    """In a new process the backward pass may be the first that reads the tensors: they are drawn on another stream."""
    calls = []
    stream = SimpleNamespace(wait_stream=lambda other: calls.append(f"waits for {other}"))
    layer = OneLayer(SMALL)
    monkeypatch.setattr(layer, "on_gpu", True)
    monkeypatch.setattr(layer, "_forward", lambda way: calls.append(way) or {"y": None})
    monkeypatch.setattr(one_layer, "capture_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the first")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    layer.step("backward", "none", "split")
    assert calls == ["waits for the first", "split"]


# --- the run, of layers that take as long as they are told


class Told(Study):
    """A study in which `us` says what each way takes, or does in place of being checked."""

    us_of: dict = {}

    def check(self, key):
        case, name, way = key
        if reason := self._why_not_again(name, way):
            yield {"left_out": reason}
            return
        does = self.us_of.get((name, way), 1.0)
        if callable(does):
            does()
        yield {"errors": {}, "timed": True, "kept_by": self.kept(case), "process": os.getpid()}

    def times(self, case, name):
        timed = [way for way in WAYS[name] if self.rows.get((case, name, way), {}).get("timed")]
        yield {"by_way": {way: {"us": self.us_of.get((name, way), 1.0)} for way in timed}}


def told_study(us, cases=2):
    study = Told([LayerCase(8192, 4096 * (1 + place), 4096, 64, "bf16", "cuda") for place in range(cases)])
    study.us_of = us
    return study


def run(study, folder, seconds=60):
    ways.run(study, folder / "ways.json", folder / "table.json", {"device": "a GPU"}, seconds)
    return {(row["N"], row["pass"], row["way"]): row for row in study.rows.values()}


def test_all_share_a_process_and_the_backward_pass_follows_the_fastest_forward(tmp_path):
    found = run(
        told_study({("forward", "split"): 3.0, ("forward", "fused"): 2.0, ("forward", "merged"): 4.0}), tmp_path
    )
    assert len(found) == 20 and len({row["process"] for row in found.values()}) == 1
    assert {row["kept_by"] for key, row in found.items() if key[1] == "backward"} == {"fused"}


def hang():
    time.sleep(60)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fault(said="CUDA error: an illegal memory access was encountered"):
    raise RuntimeError(said)


def fault_in_a_launch():
    fault("Triton Error [CUDA]: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("does", "reason"),
    (
        (hang, "killed: hangs after"),
        (die, "its process died"),
        (fault, "CUDA error: an illegal"),
        (fault_in_a_launch, "Triton Error [CUDA]: an illegal"),
    ),
)
def test_a_way_that_hangs_or_dies_costs_itself_alone(does, reason, tmp_path, monkeypatch):
    """And is not tried again at the next shape, by either forward pass, which have one kernel."""
    monkeypatch.setattr(ways, "SILENCE", (1, 1))
    found = run(told_study({("forward", "fused"): does, ("forward", "split"): 3.0}), tmp_path)
    assert reason in found[4096, "forward", "fused"]["reason"] and not found[4096, "forward", "fused"]["ok"]
    again = [(4096, "inference", "fused"), (8192, "forward", "fused"), (8192, "inference", "fused")]
    assert all(reason in found[key]["left_out"] and found[key]["ok"] for key in again)
    rest = [row for key, row in found.items() if key[2] != "fused"]
    assert all(row["us"] for row in rest) and len({row["process"] for row in rest}) == 2
    entries = tuned.read(tmp_path / "table.json")["ways"]
    assert [list(entry["forward"]) for entry in entries] == 2 * [["split", "merged"]]


def test_the_first_way_of_a_pass_is_tried_at_every_shape(tmp_path, monkeypatch):
    """Without it nothing can be said of the others, which are not in the table then."""
    found = run(told_study({("backward", "none"): die}), tmp_path)
    assert all("process died" in found[N, "backward", "none"]["reason"] for N in (4096, 8192))
    assert all(entry["backward"] == {} and entry["forward"] for entry in tuned.read(tmp_path / "table.json")["ways"])


def test_the_table_keeps_what_is_there_and_what_was_measured_is_replaced(tmp_path):
    best = {"2": {"norm": {"num_warps": 4}}}
    before = [{"M": 512, "N": 4096, "K": 4096, "R": 64}, {"M": 8192, "N": 4096, "K": 4096, "R": 64}]
    tuned.write(tmp_path / "table.json", {"configs": best, "measured": {}, "ways": before})
    run(told_study({}, cases=1), tmp_path)
    table = tuned.read(tmp_path / "table.json")
    assert table["configs"] == best and table["meta"] == {"device": "a GPU"}
    assert table["ways"][0] == before[0] and [entry["M"] for entry in table["ways"]] == [512, 8192]
    assert table["ways"][1]["backward"] == dict.fromkeys(BESIDE, 1.0)


def test_what_there_was_no_time_for_is_said(tmp_path):
    study = told_study({("forward", "merged"): lambda: time.sleep(2)}, cases=1)
    run(study, tmp_path, seconds=2.5)
    content = json.loads((tmp_path / "ways.json").read_text())
    assert content["meta"]["left_out"] == [f"{study.cases[0]}: {name}" for name in WAYS]
    assert not (tmp_path / "table.json").exists() and told(study) == ["nothing was measured"]


def test_what_won_is_told():
    us = {"forward": {"split": 400.0, "fused": 380.0, "merged": 420.0}, "inference": {"split": 390.0, "merged": 400.0}}
    us["backward"] = {"none": 500.0, "low rank": 490.0, "token sums": 470.0, "all": 455.0}
    study = told_study({}, cases=1)
    for name, of in us.items():
        for way, value in of.items():
            study.rows[study.cases[0], name, way] = {"us": value}
    assert told(study) == [
        "8192 x 4096 x 4096 R 64: forward fused -5.0% of 400 us, inference split (merged +2.6% of 390 us), "
        "backward all -9.0% of 500 us; training -65 us"
    ]


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ways.main([]) == 2
    assert capsys.readouterr().err == "bench.studies.ways: torch sees no GPU; expected one\n"
