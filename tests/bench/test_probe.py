"""The probe's flow without a GPU: the gate before the times, the budget, the file after each row, and what it decides.

Launches of the Gluon kernel are stood in for by PyTorch; tests/kernels/test_hopper.py has the kernel.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.kernels import KernelOperands
from bench.lib.apart import Attempt
from bench.lib.problem import SCALING
from bench.lib.shapes import LayerCase
from bench.studies import beside, probe
from bench.studies.gluon import candidates
from bench.studies.gluon.candidates import Candidate, GemmInputs, check_variant, time_candidates
from bench.studies.gluon.gemm import VARIANTS
from bench.studies.probe import Probe, decisions
from dora_kernels.planning import devices
from dora_kernels.testing import rms_error

ROOT = Path(__file__).parents[2]
SMALL = LayerCase(40, 48, 56, 8, "bf16", "cpu")
FIRST = LayerCase(*probe.FIRST_SHAPE, "bf16", "cuda")
SIZES = {"M": 8192, "N": 4096, "K": 4096, "R": 64}


def stand_in(variant, x, weight, gain, bias, y, z=None, low=None, lora=None, programs=None, group_m=8, scaling=1.0):
    """bench.studies.gluon.gemm.launcher, computed by PyTorch with one rounding."""

    def launch():
        product = x.double() @ (weight if variant.nn else weight.T).double()
        if low is not None:
            product += scaling * low.double() @ (lora if variant.nn else lora.T).double()
        y.copy_(product if gain is None else gain * product + bias)
        if z is not None:
            z.copy_(product)

    return launch


def without_the_adapter(variant, x, weight, gain, bias, y, z=None, low=None, lora=None, *rest):
    return stand_in(variant, x, weight, gain, bias, y, z)


def with_a_row_unwritten(*arguments, **options):
    launch, y = stand_in(*arguments, **options), arguments[5]

    def unwritten():
        launch()
        y[-1] = float("nan")

    return unwritten


def as_programs_are(variant, *arguments):
    launch, y, programs = stand_in(variant, *arguments), arguments[4], arguments[8]

    def otherwise():
        launch()
        if programs:
            y[0, 0] = torch.nextafter(y[0, 0], y[0, 0] + 1)

    return otherwise


@pytest.mark.parametrize("variant", ["two outputs", "one output", "dx", "dx, two outputs"])
def test_a_kernel_that_is_right_passes_the_check(monkeypatch, variant):
    monkeypatch.setattr(candidates, "launcher", stand_in)
    (row,) = check_variant(variant, [SMALL])
    assert row["ok"] and row["same"], row
    assert 0 < row["error"] <= row["yardstick"]  # one rounding against two, or, without an adapter, one


@pytest.mark.parametrize("broken", [without_the_adapter, with_a_row_unwritten, as_programs_are])
def test_one_that_is_not_does_not(monkeypatch, broken):
    monkeypatch.setattr(candidates, "launcher", broken)
    for variant in ("two outputs", "dx, two outputs"):
        (row,) = check_variant(variant, [SMALL])
        assert not row["ok"], row


def test_the_inputs_of_dx_are_those_of_the_backward_pass():
    inputs = GemmInputs.random(SMALL, nn=True)
    assert inputs.x.shape == (40, 48) and inputs.weight.shape == (48, 56) and inputs.lora.shape == (8, 56)
    assert inputs.product().shape == (40, 56) == inputs.results(torch.float64)["y"].shape


def checked(*wrong: str) -> list[dict]:
    """The rows of a section right in which all but these variants are."""
    shapes = len(probe.CHECKED_SHAPES) + 1
    return [
        {"section": "right", "variant": name, "ok": name not in wrong or place > 0}
        for name in VARIANTS
        for place in range(shapes)
    ]


OWN = ["own GEMM, 128 programs", "own GEMM, green contexts"]
UNKNOWN = {"ok": False, "reason": "our dx was not checked in full"}
WRONG = {"left_out": "our dx is wrong"}


def test_only_what_is_right_everywhere_is_timed(monkeypatch):
    monkeypatch.setattr(probe, "why_not_gluon", lambda: None)
    rows = checked("two outputs, one consumer")
    partly = Probe(FIRST, (FIRST,), rows[:-1])  # the last check was not made
    names = set(VARIANTS) - {"two outputs, one consumer", "dx, two outputs"}
    (attempt,) = probe.percent(partly)
    assert {candidate.variant for candidate in attempt.run.args[1]} == names
    for section in (probe.percent, probe.grid, probe.other_shapes):
        assert section(Probe(FIRST, (FIRST,)))[0].run.args[1] == []
    for known, own in ((partly, None), (Probe(FIRST), UNKNOWN), (Probe(FIRST, rows=checked("dx")), WRONG)):
        attempts = probe.overlap(known)
        assert [attempt.name for attempt in attempts] == list(beside.MECHANISMS)
        rows = [row for attempt in attempts if attempt.run.func is iter for row in attempt.run()]
        assert rows == [{"mechanism": name, **own} for name in OWN if own]


def test_a_triton_without_gluon_is_a_row_with_the_reason(monkeypatch):
    monkeypatch.setattr(probe, "why_not_gluon", lambda: "no Gluon")
    (attempt,) = probe.right(Probe(FIRST))
    assert list(attempt.run()) == [{"left_out": "no Gluon"}]


def test_candidates_are_timed_in_turn_with_cublas(monkeypatch):
    monkeypatch.setattr(candidates, "launcher", stand_in)
    monkeypatch.setattr(candidates, "capture", lambda call, pool: (SimpleNamespace(replay=call), None))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(candidates, "SECONDS_EACH", 0.1)
    asked = [Candidate("two outputs"), Candidate("two outputs", group_m=4), Candidate("dx", 128)]
    rows = {row["candidate"]: row for row in time_candidates(SMALL, asked)}
    names = ["two outputs", "two outputs, groups of 4", "dx, 128 programs"]
    assert list(rows) == ["cuBLAS", "cuBLAS dx", "cuBLAS + epilogue", *names]
    assert rows["cuBLAS"]["percent"] == rows["cuBLAS dx"]["percent"] == 100
    dx = rows["dx, 128 programs"]
    assert (dx["variant"], dx["programs"]) == ("dx", 128)
    assert dx["percent"] == pytest.approx(100 * rows["cuBLAS dx"]["us"] / dx["us"])
    two = rows["two outputs"]
    assert two["percent"] == pytest.approx(100 * rows["cuBLAS"]["us"] / two["us"])
    assert two["teraflops"] == pytest.approx(2e-6 * 40 * 48 * 56 / two["us"])


# --- work beside a GEMM


needs_interpreter = pytest.mark.skipif(not devices.interpreting(), reason="the sums at sizes for the interpreter")
SUMMED = LayerCase(48, 64, 80, 8, "bf16", "cpu")
ALL = ("token_sums", "project", "outer_product")


@needs_interpreter
@pytest.mark.parametrize("by", (None, beside.Side), ids=("everywhere", "beside"))
def test_the_sums_are_those_of_a_backward_pass(by):
    operands = KernelOperands.random(SUMMED)
    o, side = operands.double(), by and by(torch.device("cpu"))
    found = beside.sums(operands, ALL, side)
    if side:
        side.join()
    P = o.dy @ (o.gain[:, None] * o.lora_B)
    exact = {
        "dB": SCALING * o.gain[:, None] * (o.dy.T @ o.low),
        "dmagnitude": (o.dy * o.base).sum(0) / o.norm,
        "dA": SCALING * P.T @ o.x,
    }
    assert found.keys() == exact.keys()
    assert all(rms_error(found[name], exact[name]) < 2**-7 for name in exact)
    assert beside.sums(operands, ("token_sums",)).keys() == {"dB", "dmagnitude"}


ALONE = """
import os
import torch

# what starts CUDA, or asks its driver, after which a fork cannot: told of in this process, done in its forks alone
used, parent = [], os.getpid()

def watched(name, function):
    def call(*arguments):
        if os.getpid() != parent:
            return function(*arguments)
        used.append(name)
        raise RuntimeError(name)
    return call

for owner in (torch.cuda, torch._C):
    for name in ("is_available", "device_count", "_lazy_init", "_cuda_init", "_cuda_getDeviceCount"):
        if hasattr(owner, name):
            setattr(owner, name, watched(name, getattr(owner, name)))

import tune
from bench.studies import beside, probe, ways
from bench.lib.shapes import LayerCase

case = LayerCase(*probe.FIRST_SHAPE, "bf16", "cuda")
for section in probe.SECTIONS.values():
    section(probe.Probe(case, (case,)))
assert probe.main([]) == ways.main([]) == 2
ways.Study([case]).attempts()
target = tune.precompile.TARGETS["sm_90"]
candidate = tune.precompile.candidates_of(["merge"], 2, target)[0]
assert tune.precompile.launched_by(candidate) and tune.main([]) == 2
assert not used, f"before its forks, CUDA was asked: {used}"
"""


def test_what_measures_leaves_cuda_to_its_forks():
    """One process for all: it starts in five seconds."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", ALONE], env=env | variables, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_what_running_at_once_saves():
    us = {"cublas": 400.0, "work": 50.0, "in_turn": 452.0, "gemm": 410.0, "beside": 300.0, "both": 422.0}
    found = beside.savings(us)
    assert found == {"saved_us": 30.0, "hidden": 0.6, "overlapped": pytest.approx(288 / 300)}


class Streams:
    """Those of a green context's split, as far as they are asked: each call with the stream that it was made on."""

    def __init__(self, monkeypatch):
        self.current, self.calls, self.sides = "before", [], {}
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda *device: SimpleNamespace(wait_stream=self.calls.append)
        )
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        monkeypatch.setattr(beside, "Side", self._side)
        monkeypatch.setattr(beside.side, "_streams", self.sides)

    @contextlib.contextmanager
    def _on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def _side(self, device):
        self.calls.append(("fork", self.current, dict(self.sides)))
        return SimpleNamespace(join=lambda: self.calls.append(("join", self.current)))


class Main(SimpleNamespace):
    __hash__ = object.__hash__


def test_a_mechanism_is_measured(monkeypatch):
    """The sums are launched first, on the side of the GEMM's stream, and joined there."""
    streams = Streams(monkeypatch)
    calls, main = streams.calls, Main(wait_stream=lambda other: streams.calls.append("main waits"))
    mechanism = beside.Mechanism(lambda: calls.append("gemm"), streams=(main, "few"))
    monkeypatch.setattr(beside, "interleave", lambda steps, *more: {name: _once(step) for name, step in steps.items()})

    def _once(step):
        step()
        return SimpleNamespace(median=0.001 * len(calls))

    work = functools.partial(results_of, calls)
    row = beside.measure(mechanism, lambda: calls.append("cublas"), work, torch.device("cpu"), 0.05)
    assert set(row["us"]) == {"cublas", "work", "in_turn", "gemm", "beside", "both"}
    assert row["saved_us"] == row["us"]["in_turn"] - row["us"]["both"]
    fork, join = ("fork", main, {main: "few"}), ("join", main)
    alone = ["main waits", fork, "beside", join, main]
    both = ["main waits", fork, "beside", "gemm", join, main]
    everywhere = ["cublas", "everywhere", "cublas", "everywhere", "main waits", "gemm", main]
    assert calls == [*alone, *both, *everywhere, *alone, *both] and streams.sides == {}


def results_of(calls, side):
    calls.append("beside" if side else "everywhere")
    return {"dA": torch.zeros(2)}


def test_sums_that_a_gemm_disturbs_are_not_timed(monkeypatch):
    found = iter((1.0, 2.0))
    mechanism = beside.Mechanism(lambda: None)
    row = beside.measure(
        mechanism, lambda: None, lambda side: {"dA": torch.tensor(next(found))}, torch.device("cpu"), 0.05
    )
    assert row == {"ok": False, "reason": "the sums are not the same beside the GEMM"}


def test_a_mechanism_that_is_not_there_is_a_row_with_the_reason(monkeypatch):
    def missing(inputs, mm):
        raise AttributeError("no such function")

    monkeypatch.setitem(beside.MECHANISMS, "cuBLAS, SM target 128", missing)
    (row,) = beside.measure_mechanism("cuBLAS, SM target 128", SMALL)
    assert row == {"mechanism": "cuBLAS, SM target 128", "left_out": "AttributeError: no such function"}


def test_no_profiler_runs_before_the_last_mechanism_is_timed(monkeypatch):
    profiled = []
    monkeypatch.setattr(beside, "kernels_of", lambda step: profiled.append(step) or [])
    monkeypatch.setattr(beside, "WORK", ("all",))
    monkeypatch.setattr(beside, "measure", lambda *arguments: {"hidden": 0.5})
    monkeypatch.setitem(beside.MECHANISMS, "cuBLAS, SM target 128", lambda inputs, mm: beside.Mechanism(mm))
    (row,) = beside.measure_mechanism("cuBLAS, SM target 128", SMALL)
    assert "hidden" in row and not profiled
    rows = [{"section": "overlap", "ok": True} | row, {"section": "overlap", "ok": False, "mechanism": "hung"}]
    (attempt,) = probe.launched(Probe(SMALL, rows=rows))  # what failed is not tried again
    assert attempt.name == "cuBLAS, SM target 128" and next(iter(attempt.run()))["kernels"] == [] and len(profiled) == 1
    assert list(probe.SECTIONS)[-1] == "launched"  # in a process that nothing is timed in
    assert not any("launched" in names for names in probe.TOGETHER)


def test_the_kernels_of_a_trace():
    kernel = {"cat": "kernel", "args": {"grid": [132, 1, 1], "block": [384, 1, 1], "stream": 7}}
    events = [kernel | {"name": "second", "ts": 9.0}, {"cat": "cpu_op", "name": "aten::mm", "ts": 1.0}]
    found = beside.kernels_in({"traceEvents": [*events, kernel | {"name": "first", "ts": 2.0}]})
    assert [one["name"] for one in found] == ["first", "second"]
    assert found[0] == {"name": "first", "grid": [132, 1, 1], "block": [384, 1, 1]}


# --- the run


def some_rows(*found):
    return functools.partial(iter, found)


def hang():
    yield {"n": 1}
    time.sleep(60)


def test_the_file_is_whole_after_every_row_and_the_time_is_kept(tmp_path, monkeypatch):
    written = []
    write = probe.write
    monkeypatch.setattr(probe, "write", lambda *arguments: (write(*arguments), written.append(arguments[2][-1])))
    sections = {
        "two": lambda found: [Attempt("a", some_rows({"n": 1}, {"n": 2}))],
        "hangs": lambda found: [Attempt("b", hang, silence=1), Attempt("c", some_rows({"n": len(found.rows)}))],
        "late": lambda found: [Attempt("d", some_rows({"n": 4}), needs=30)],
    }
    found, out = Probe(FIRST), tmp_path / "probe.json"
    probe.run(found, out, {"device": "a GPU"}, 20, sections)
    content = json.loads(out.read_text())
    assert content["meta"] == {"device": "a GPU", "left_out": ["late"]}
    assert content["rows"] == found.rows
    assert [(row["section"], row["attempt"], row["ok"], row.get("n")) for row in content["rows"]] == [
        ("two", "a", True, 1),
        ("two", "a", True, 2),
        ("hangs", "b", True, 1),
        ("hangs", "b", False, None),
        ("hangs", "c", True, 2),  # what was known when the section began
    ]
    assert len(written) == 5


def process():
    yield {"process": os.getpid()}


def test_percent_and_grid_share_a_process_and_work_beside_a_gemm_has_its_own(tmp_path):
    sections = {name: lambda found: [Attempt("a", process)] for name in probe.SECTIONS}
    found = Probe(FIRST)
    probe.run(found, tmp_path / "probe.json", {}, 60, sections)
    processes = {row["section"]: row["process"] for row in found.rows}
    assert list(processes) == list(probe.SECTIONS)
    assert processes["percent"] == processes["grid"] and len(set(processes.values())) == len(processes) - 1


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert probe.main([]) == 2
    assert capsys.readouterr().err == "bench.studies.probe: torch sees no GPU; expected one\n"


# --- the decisions


def timed(section: str, candidate: Candidate | str, us: float, percent: float = 100.0) -> dict:
    named = vars(candidate) | {"candidate": candidate.name} if isinstance(candidate, Candidate) else {}
    return {"section": section, "ok": True, "candidate": candidate, **named, **SIZES, "us": us, "percent": percent}


def measured(percent: float, fewer: float, hidden: float) -> Probe:
    """All rows of a run in which these came out."""
    dx = Candidate("dx")
    fused = [one for one in probe.FUSED if one.variant.startswith("two outputs")]
    rows = checked() + [
        timed("percent", "cuBLAS", 400.0),
        timed("percent", "cuBLAS + epilogue", 445.0),
        *(timed("percent", one, 440.0, percent - 1) for one in fused if one.group_m != 4),
        timed("percent", Candidate("two outputs", group_m=4), 430.0, percent),
        timed("percent", Candidate("one output"), 410.0, 97.5),
        timed("percent", Candidate("dx, two outputs"), 410.0, 99.9),
        timed("percent", dx, 405.0, 98.7),
        timed("grid", Candidate("one output"), 400.0),
        timed("grid", Candidate("one output", 128), 480.0),
        timed("grid", dx, 400.0),
        timed("grid", Candidate("dx", 128), 400.0 * fewer),
        timed("grid", "cuBLAS dx", 400.0),
    ]
    kernel = {"name": "nvjet_128x256", "grid": [132, 1, 1], "block": [384, 1, 1]}
    rows.append({"section": "grid", "ok": True, "call": "cuBLAS", **SIZES, "kernels": [kernel]})
    shares = dict.fromkeys(beside.MECHANISMS, hidden - 0.3) | {"cuBLAS, SM target 128": hidden + 0.05, OWN[0]: hidden}
    for name, share in shares.items():
        for what in beside.WORK:
            row = {"section": "overlap", "ok": True, "mechanism": name, **SIZES, "beside": what}
            rows.append(row | {"hidden": share, "overlapped": 0.95, "saved_us": 40 * share})
    return Probe(FIRST, rows=rows)


def test_the_decisions_where_all_goes_well():
    assert decisions("NVIDIA H200", measured(93.0, 1.009, 0.61)) == [
        "right: 35 of 35 checks; wrong: -",
        "two outputs, groups of 4: 93.0% of cuBLAS with its one; FUSED FORWARD: yes, the rule is 93.0%, 6 of 6 timed",
        "one kernel 430.0 us, cuBLAS + epilogue 445.0 us, saved 15.0 us",
        "of cuBLAS: one output 97.5%, dx 98.7%",
        "time on 128 programs: one output +20.0%, dx +0.9%; WITHIN 1%: yes",
        "grids: cuBLAS [132, 1, 1] nvjet_128x256",
        'cuBLAS, SM target 128: +26.4 us, 66% of "low rank" hidden, 95% overlapped; '
        "WORK BESIDE A GEMM: yes, the rule is above 60%, 6 of 6",
        'own GEMM, 128 programs: +24.4 us, 61% of "low rank" hidden, 95% overlapped; '
        "OUR GEMM FOR IT: yes, the rule is above 60%, 2 of 2",
    ]


@pytest.mark.parametrize(
    "device, percent, fewer, hidden, expected",
    [
        ("NVIDIA H200", 92.9, 1.0, 0.7, ("FUSED FORWARD: no", "1%: yes", "A GEMM: yes", "FOR IT: yes")),
        ("NVIDIA H100 80GB HBM3", 91.5, 1.0, 0.58, ("FUSED FORWARD: yes", "1%: yes", "A GEMM: yes", "FOR IT: no")),
        ("NVIDIA H100 80GB HBM3", 91.4, 1.02, 0.54, ("FUSED FORWARD: no", "1%: no", "A GEMM: no", "FOR IT: no")),
        ("NVIDIA B200", 99.0, 0.98, 0.7, ("no rule for this card", "1%: yes", "A GEMM: yes", "FOR IT: yes")),
    ],
)
def test_the_stop_rules(device, percent, fewer, hidden, expected):
    lines = "\n".join(decisions(device, measured(percent, fewer, hidden)))
    for verdict in expected:
        assert verdict in lines, lines


def without(found: Probe, **columns) -> Probe:
    """The probe without the rows that have these."""
    return Probe(found.case, rows=[row for row in found.rows if not columns.items() <= row.items()])


def test_what_was_not_measured_leaves_a_no_undecided():
    def verdict(found, what):
        return next(line for line in decisions("NVIDIA H200", found) if what in line).partition(f"{what}: ")[2]

    low, high = measured(90.0, 1.0, 0.5), measured(95.0, 1.0, 0.7)
    beside_it, fused, own = "WORK BESIDE A GEMM", "FUSED FORWARD", "OUR GEMM FOR IT"
    assert verdict(low, beside_it) == "no, the rule is above 60%, 6 of 6"
    missing = {"section": "overlap", "mechanism": "cuBLAS, green contexts"}
    assert verdict(without(low, **missing), beside_it) == "undecided, the rule is above 60%, 5 of 6"
    assert verdict(without(low, **missing, beside="all"), beside_it) == "undecided, the rule is above 60%, 5 of 6"
    assert verdict(without(high, **missing), beside_it) == "yes, the rule is above 60%, 5 of 6"
    assert verdict(without(low, **missing), own) == "no, the rule is above 60%, 2 of 2"
    settled = without(low, **missing)
    settled.rows.append(missing | {"ok": True, "left_out": "ImportError: no cuda-bindings"})
    assert verdict(settled, beside_it) == "no, the rule is above 60%, 5 of 6, 1 cannot be had"
    settled.rows[-1] = missing | {"ok": False, "reason": "killed: hangs after 15 s"}
    assert verdict(settled, beside_it) == "undecided, the rule is above 60%, 5 of 6"

    assert verdict(low, fused) == "no, the rule is 93.0%, 6 of 6 timed"
    name = "two outputs, one consumer"
    cut = without(low, section="percent", variant=name)
    assert verdict(cut, fused) == "undecided, the rule is 93.0%, 5 of 6 timed"
    assert verdict(without(high, section="percent", variant=name), fused) == "yes, the rule is 93.0%, 5 of 6 timed"
    cut.rows.append({"section": "right", "variant": name, "ok": False})
    assert verdict(cut, fused) == "no, the rule is 93.0%, 5 of 6 timed"


def test_decisions_of_what_is_there():
    assert decisions("NVIDIA H200", Probe(FIRST)) == ["right: 0 of 0 checks; wrong: -"]
    assert decisions("NVIDIA H200", Probe(FIRST, rows=checked("dx"))) == ["right: 34 of 35 checks; wrong: dx"]
    killed = {"section": "right", "attempt": "one output", "ok": False, "reason": "killed: hangs after 15 s"}
    rows = [row for row in checked() if row["variant"] != "one output"] + [killed]
    assert decisions("NVIDIA H200", Probe(FIRST, rows=rows)) == ["right: 30 of 30 checks; wrong: one output"]


def test_the_rule_holds_at_its_own_shape_only():
    elsewhere = measured(99.0, 1.0, 0.7)
    elsewhere.case = LayerCase(8192, 8192, 8192, 64, "bf16", "cuda")
    for row in elsewhere.rows:
        row |= {"N": 8192, "K": 8192} if "N" in row else {}
    assert "no rule for this card and shape" in "\n".join(decisions("NVIDIA H200", elsewhere))
