"""The instrument: its gate lets right providers through and wrong ones not, and its results have one form."""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import layer
from bench.lib import machine, measure, peers, report, shapes, steps
from bench.lib.measure import Gate, GateError, Timing, failure, interleave
from bench.lib.problem import FROZEN_INFERENCE, PASSES, LayerProblem, TimedLayer, forward_backward, reference
from bench.lib.providers import COMPILED, PROVIDERS, default_providers, ours, peft_dora, providers_of
from bench.lib.shapes import PRECISIONS, QUANTIZED, LayerCase
from bench.lib.siblings import BLOCKS, LLAMA, SharedCase
from dora_kernels import ops
from dora_kernels.testing import rms_error

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(precision: str = "fp32", M: int = 48) -> LayerCase:
    return LayerCase(M, 96, 160, 8, precision, DEVICE)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_provider_passes_the_gate(precision):
    problem = LayerProblem.random(case(precision))
    gate = Gate(problem)
    for name in default_providers("cpu"):
        built = PROVIDERS[name](problem)
        comparisons, backend = gate.check(built)
        assert failure(comparisons) is None, name
        assert {"frozen": 2, "lora": 4, "dora": 5}[built.computes] == len(comparisons), name
        assert (backend is not None) == name.startswith("ours"), name

        comparisons, backend = gate.check(built, "inference")
        assert failure(comparisons) is None and len(comparisons) == 1, name
        assert (backend is not None) == name.startswith("ours"), name
        assert built.module is None or not built.module.training


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_dropout_in_both_meanings(precision):
    dropping = dataclasses.replace(case(precision), dropout=0.3)
    problem = LayerProblem.random(dropping)
    gate, results = Gate(problem), {}
    providers = providers_of(dropping, ["peft_lora", "ours", "peft_dora", "frozen", "axolotl"])
    assert list(providers) == ["peft_lora", "ours", "peft_dora", "frozen", "ours_lora_dropout"]
    for name, provider in providers.items():
        built = provider(problem)
        comparisons, backend = gate.check(built)
        assert failure(comparisons) is None and (backend is not None) == name.startswith("ours"), name
        if built.computes != "frozen":
            results[built.computes] = forward_backward(built, problem)  # with another mask
            assert failure(gate.comparisons(built.computes, results[built.computes])), name
    built = providers["ours"](problem)
    problem.seed()
    other = forward_backward(built, problem)
    assert failure(gate.comparisons("dora", other)) is None and failure(gate.comparisons("dora_lora_dropout", other))
    rows = steps.measure_case(dropping, {"ours": providers["ours"]}, ("forward+backward", "inference"), 0, (1, 1))
    assert [(row.step, row.variant, row.ok) for row in rows] == [("forward+backward", "dropout 0.3", True)]


def test_inference_inside_frozen_adapters_is_inside():
    problem = LayerProblem.random(case())
    built = ours(problem)
    built.set_mode(FROZEN_INFERENCE)
    inside = PASSES[FROZEN_INFERENCE]
    with built.scope(FROZEN_INFERENCE):
        before = ops.calls.copy()
        inside(built, problem), inside(built, problem)
        ran = {name: count for (name, _), count in (ops.calls - before).items()}
        assert ran == {"grouped_norm": 1, "forward": 2}
    for layer_, step in ((built, "inference"), (built, "forward+backward"), (peft_dora(problem), FROZEN_INFERENCE)):
        assert isinstance(layer_.scope(step), contextlib.nullcontext)


def test_siblings_of_one_x_are_rows(monkeypatch):
    monkeypatch.setitem(BLOCKS, "q, k", (24, {"q_proj": 16, "k_proj": 8}))
    rows = steps.measure_shared(SharedCase("q, k", "fp32", 5, 3), torch.device(DEVICE), 0.0, (1, 1))
    assert [row.provider for row in rows] == ["frozen", "peft_dora", "ours", "ours_shared"]
    assert all((row.N, row.K, row.variant, row.ok) == (24, 24, "q, k", True) and row.ms.runs == 1 for row in rows)


@pytest.mark.parametrize("precision", QUANTIZED)
def test_every_provider_over_a_4_bit_base(precision):
    """QLoRA, QDoRA and ours of the same packed weight, each layer with a copy of its own; and what they need."""
    pytest.importorskip("bitsandbytes")
    problem = LayerProblem.random(LayerCase(16, 1024, 1024, 8, precision, DEVICE))
    gate, peaks = Gate(problem), {}
    for name in default_providers(DEVICE, quantized=True):
        built = PROVIDERS[name](problem)
        comparisons, backend = gate.check(built)
        assert failure(comparisons) is None and (backend is not None) == (name == "ours"), name
        step = functools.partial(forward_backward, built, problem)
        peaks[name] = measure.peak_bytes(step, problem.x.device)
        if name == "ours":
            assert measure.saved_bytes(step, problem.x, *built.held()) < problem.weight.nbytes // 8
    assert problem.weight.nbytes < peaks["ours"] < peaks["peft_dora"]


def test_peak_on_a_cpu():
    """Of what is alive at once, and not of what was allocated in all."""

    def step():
        for _ in range(3):
            torch.empty(1 << 20, dtype=torch.uint8).add(1)

    assert 2 << 20 <= measure.peak_bytes(step, torch.device("cpu")) < 3 << 20


@pytest.mark.parametrize("name", PROVIDERS)
def test_every_formula_is_exact_in_float64(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # without a compiler
    monkeypatch.setattr(peers, "CHUNK", 64)  # three chunks of 160 columns, one of them ragged
    problem = LayerProblem.random(case()).double()
    if name == "ours_exact" and DEVICE == "cuda":
        pytest.skip("float64 has no kernels")
    built = PROVIDERS[name](problem)
    exact = forward_backward(reference(problem, built.computes), problem)
    for tensor, result in forward_backward(built, problem).items():
        assert rms_error(result, exact[tensor]) < 1e-13, tensor


def test_compiled_providers_really_compile(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled.append(dynamic) or function)
    for name in COMPILED:
        PROVIDERS[name](LayerProblem.random(case()))
    assert compiled == [False, False]
    assert default_providers("cuda") == list(PROVIDERS) and not set(COMPILED) & set(default_providers("cpu"))


def test_saved_bytes():
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)

    def step():
        hidden = (x @ weight.T).exp()  # exp keeps its result, 8 x 4
        return hidden.T * hidden.T.sigmoid()  # both factors: hidden again, and the sigmoid, which keeps itself too

    assert measure.saved_bytes(step, x, weight) == 2 * 8 * 4 * 4
    assert measure.saved_bytes(step) == 2 * 8 * 4 * 4 + x.nbytes + weight.nbytes
    with torch.no_grad():
        assert measure.saved_bytes(step) == 0


def test_saved_bytes_of_a_layer():
    M, N, R = 48, 96, 8
    rows = steps.measure_case(
        case("bf16"), {name: PROVIDERS[name] for name in ("frozen", "ours", "peft_dora")}, rounds=(1, 1)
    )
    saved = {(row.provider, row.step): row.saved_bytes for row in rows}
    assert saved["frozen", "forward"] == 0
    assert {size for (_, step), size in saved.items() if step.startswith("inference")} == {0}
    # base and low in bf16, norm and gain in float32
    assert saved["ours", "forward"] == saved["ours", "forward+backward"] == 2 * M * N + 2 * M * R + 2 * 4 * N
    assert saved["peft_dora", "forward"] > saved["ours", "forward"]


def broken(problem: LayerProblem, **changes) -> TimedLayer:
    """PEFT's DoRA layer with changed values in its trained tensors."""
    built = peft_dora(problem)
    with torch.no_grad():
        for name, factor in changes.items():
            built.trained[name].mul_(factor)
    return built


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("changes", ({"magnitude": 1.01}, {"magnitude": 0.99}, {"lora_B": 0}, {"lora_A": 0.8}), ids=str)
def test_the_gate_rejects_a_wrong_layer(precision, changes):
    problem = LayerProblem.random(case(precision))
    comparisons, _ = Gate(problem).check(broken(problem, **changes))
    assert "y: error" in failure(comparisons)


@pytest.mark.parametrize("name", ("y", "x", "lora_A", "lora_B", "magnitude"))
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_gate_rejects_each_wrong_tensor(precision, name):
    problem = LayerProblem.random(case(precision))
    gate = Gate(problem)
    right = forward_backward(ours(problem), problem)
    assert failure(gate.comparisons("dora", right)) is None
    for wrong in (torch.zeros_like(right[name]), right[name] * 1.01, right[name] * torch.nan):
        reason = failure(gate.comparisons("dora", right | {name: wrong}))
        assert reason.startswith(f"{name}: error") and ";" not in reason


def test_the_gate_wants_every_tensor_in_its_dtype():
    problem = LayerProblem.random(case("bf16"))
    gate = Gate(problem)
    results = forward_backward(ours(problem), problem)
    with pytest.raises(GateError, match="y is torch.float32 .* expected torch.bfloat16"):
        gate.comparisons("dora", results | {"y": results["y"].float()})
    del results["magnitude"]
    with pytest.raises(GateError, match="results are y, x, lora_A, lora_B; expected y, x, lora_A, lora_B, magnitude"):
        gate.comparisons("dora", results)


def test_a_layer_of_ours_that_peft_computed_is_no_measurement():
    problem = LayerProblem.random(case())
    with pytest.raises(GateError, match="operators called"):
        Gate(problem).check(dataclasses.replace(peft_dora(problem), ours=True))


def test_the_problem_hides_nothing():
    problem = LayerProblem.random(LayerCase(8, 64, 32, 4, "fp32", DEVICE))
    y = reference(problem, "dora").forward(problem.x)
    for computes in ("lora", "frozen"):  # the update and the gain are both large beside any rounding
        assert measure.compare("y", reference(problem, computes).forward(problem.x), y, y).error > 0.02
    assert problem.dy.stride() == (64, 1) and problem.dy.count_nonzero() == problem.dy.numel()


def zeros(problem: LayerProblem) -> TimedLayer:
    """A very fast layer."""
    built = peft_dora(problem)
    return dataclasses.replace(built, forward=lambda x: built.forward(x) * 0)


def raising(problem: LayerProblem) -> TimedLayer:
    raise RuntimeError("no such kernel")


FIELDS = {field.name for field in dataclasses.fields(steps.StepRow)}


def test_rows_and_json(tmp_path, capsys):
    providers = {name: PROVIDERS[name] for name in ("frozen", "peft_dora", "ours")}
    providers |= {"zeros": zeros, "raising": raising}
    path = tmp_path / "deep" / "layer.json"

    def measured(case, found):
        return steps.measure_case(case, providers, seconds=0.0, rounds=(2, 2), found=found)

    layer.run([case(), case("bf16")], path, measured, 60, {"commit": "c0ffee"})
    content = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert content["meta"] == {"commit": "c0ffee", "left_out": []}
    rows = content["rows"]
    assert len(rows) == 2 * len(PASSES) * len(providers)
    for row in rows:
        assert row.keys() == FIELDS
        assert (row["M"], row["N"], row["K"], row["R"]) == (48, 96, 160, 8)
        wrong = row["provider"] in ("zeros", "raising")
        assert row["ok"] != wrong and (row["ms"] is None) == wrong and (row["reason"] is not None) == wrong
        if not wrong:
            assert row["ms"].keys() == {field.name for field in dataclasses.fields(Timing)}
            assert 0 < row["ms"]["minimum"] <= row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
            assert row["ms"]["runs"] == 2 and row["errors"]["y"]["error"] < 0.01
    reasons = {row["provider"]: row["reason"] for row in rows if row["precision"] == "fp32"}
    assert reasons["raising"] == "RuntimeError: no such kernel"
    assert reasons["zeros"].startswith("y: error 1.00e+00")

    text = report.table(rows)
    assert len(text.splitlines()) == 1 + 2 * len(PASSES) + 2  # a header, two cases of each step, two means
    assert "geometric mean of ours/frozen" in text
    assert len(report.problems(rows)) == 4


def test_what_has_no_time_is_a_dash_in_the_table():
    common = {"precision": "fp32", "step": "forward", "M": 1, "N": 2, "K": 3, "R": 4, "graph_ms": None}
    times = {"frozen": 2.0, "peft_dora": 8.0, "ours": 4.0, "zeros": None}
    rows = [common | {"provider": name, "ms": ms and {"median": ms}} for name, ms in times.items()]
    header, line, over_frozen, over_peft = (text.split() for text in report.table(rows).splitlines())
    shown = dict(zip(header[-4:], line[-4:], strict=True))
    assert shown == {"peft_dora": "4.00", "ours": "2.00", "zeros": "-", "ours/peft_dora": "0.50"}
    assert (over_frozen[-1], over_peft[-1]) == ("2.00", "0.50")
    rows[0]["graph_ms"] = {"median": 1.0}  # of one clock alone: nothing to compare with
    assert report.table(rows).splitlines()[1].split() == line
    for row, ms in zip(rows, (1.0, 3.0, 2.0), strict=False):
        row["graph_ms"] = {"median": ms}
    assert report.table(rows).splitlines()[1].split()[-4:] == ["3.00", "2.00", "-", "0.67"]


def test_inference_is_shown_by_both_clocks():
    common = {"precision": "bf16", "M": 1, "N": 2, "K": 3, "R": 4, "variant": ""}
    times = {"frozen": (2.0, 1.0), "peft_dora": (8.0, 3.0), "ours": (2.4, 1.5)}
    rows = [
        common | {"provider": name, "step": step, "ms": {"median": ms}, "graph_ms": {"median": graph}}
        for step in ("forward", "inference", FROZEN_INFERENCE)
        for name, (ms, graph) in times.items()
    ]
    _, *lines, over_frozen, over_peft = (text.split() for text in report.table(rows).splitlines())
    graph, eager = ["graph", "1.000", "3.00", "1.50", "0.50"], ["eager", "2.000", "4.00", "1.20", "0.30"]
    assert [line[1:2] + line[-5:] for line in lines] == [
        ["forward", *graph],
        ["inference", *graph],
        ["inference", *eager],
        [FROZEN_INFERENCE, *graph],
        [FROZEN_INFERENCE, *eager],
    ]
    assert (over_frozen[-1], over_peft[-1]) == ("1.50", "0.50")  # of the clock that comes first


def test_memory_table():
    rows = [{"precision": "nf4-bf16", "step": "forward", "M": 1, "N": 2, "K": 3, "R": 4}] * 3
    peaks = {"frozen": None, "peft_dora": 3 << 20, "ours": 5 << 19}
    rows = [row | {"provider": name, "peak_bytes": peak} for row, (name, peak) in zip(rows, peaks.items(), strict=True)]
    header, line = (text.split() for text in report.memory(rows).splitlines())
    assert dict(zip(header[-3:], line[-3:], strict=True)) == {"frozen": "-", "peft_dora": "3.0", "ours": "2.5"}


def test_a_run_out_of_time_leaves_what_it_has(tmp_path, capsys):
    clock = FakeClock()

    def measured(case, found):
        clock.now += 10
        return []

    cases = [case(M=M) for M in (1, 2, 3, 4)]
    layer.run(cases, tmp_path / "layer.json", measured, 15, {}, clock)
    left_out = json.loads((tmp_path / "layer.json").read_text())["meta"]["left_out"]
    assert left_out == [str(case) for case in cases[2:]]
    assert f"left out: {cases[2]}; {cases[3]}" in capsys.readouterr().out


def test_launches_are_counted_after_all_timing_while_there_is_time(tmp_path):
    clock, order = FakeClock(), []

    def measured(case, found):
        order.append(("time", case.M))
        clock.now += 10
        return [
            steps.StepRow("ours", "dora", "forward", [], case.M, 1, 1, 1, "fp32"),
            steps.StepRow("broken", "dora", "forward", [], case.M, 1, 1, 1, "fp32", ok=False),
        ]

    def count(case):
        order.append(("count", case.M))
        clock.now += 10
        return {("ours", "forward"): 9.0, ("broken", "forward"): 7.0}

    def conditions():
        return {"clock_mhz": len(order)}

    path = tmp_path / "layer.json"
    cases = [case(M=1), SharedCase("q, k, v", "bf16", 2, 1), case(M=3), case(M=4)]
    rows = layer.run(cases, path, measured, 55, {}, clock, count, conditions)
    assert order == [("time", 1), ("time", 2), ("time", 3), ("time", 4), ("count", 1), ("count", 3)]
    assert [row["launches"] for row in rows] == [9.0, None, None, None, 9.0, None, None, None]
    content = json.loads(path.read_text())
    assert content["rows"] == rows
    found = {str(case): {"clock_mhz": at} for at, case in enumerate(cases, 1)}
    assert content["meta"] == {"conditions": found, "left_out": []}


def test_launches_have_a_part_of_the_time_and_the_most_different_cases_come_first(tmp_path):
    clock, timed, counted = FakeClock(), [], []
    start = clock.now

    def measured(case, found):
        timed.append(case)
        clock.now += 2.9
        return [steps.StepRow("ours", "dora", "forward", [], case.M, 1, 1, 1, "fp32")]

    def count(case):
        counted.append((case, len(timed)))
        clock.now += 1.4
        return {("ours", "forward"): 9.0}

    core = shapes.core_grid("cuda")
    cases = [*core[:3], shapes.dropout_case(), LLAMA, *core[3:]]
    rows = layer.run(cases, tmp_path / "layer.json", measured, 45, {}, clock, count)
    # 1 and 3, dropout, one token, 512
    assert [case for case, _ in counted][:3] == [core[0], core[2], cases[3]] and len(counted) >= 3
    assert {at for _, at in counted} == {len(timed)} and 12 <= len(timed) < len(cases)
    assert layer._telling(case for case in cases if case != LLAMA)[3:5] == [core[3], core[5]]
    assert [row["launches"] for row in rows].count(9.0) == len(counted)
    assert clock.now - start < 45 + 2.9
    timed.clear()
    layer.run(cases[:1], tmp_path / "layer.json", measured, 1, {}, clock, count)  # a short run is one all the same
    assert len(timed) == 1


def test_launches_that_cannot_be_counted_cost_only_themselves(tmp_path, capsys):
    def measured(case, found):
        return [steps.StepRow("ours", "dora", "forward", [], case.M, 1, 1, 1, case.precision)]

    def count(case):
        if case.M == 1:
            raise torch.OutOfMemoryError("too large")
        return {("ours", "forward"): 9.0}

    rows = layer.run([case(M=1), case("bf16")], tmp_path / "layer.json", measured, 60, {}, count=count)
    assert [row["launches"] for row in rows] == [None, 9.0]
    assert "OutOfMemoryError: too large" in capsys.readouterr().out


def test_an_interrupted_case_leaves_its_whole_steps_and_says_what_is_missing(tmp_path):
    def measured(case, found):
        rows = [steps.StepRow(name, "dora", "forward", [], case.M, 1, 1, 1, "fp32") for name in ("ours", "frozen")]
        if case.M == 2:
            found(rows, ["inference", "peft_dora_compiled"])
            raise KeyboardInterrupt
        found(rows, [])
        return rows

    path, cases = tmp_path / "layer.json", [case(M=M) for M in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        layer.run(cases, path, measured, 60, {})
    content = json.loads(path.read_text())
    assert [(row["M"], row["provider"]) for row in content["rows"]] == [
        (M, name) for M in (1, 2) for name in ("ours", "frozen")
    ]
    assert content["meta"]["left_out"] == [f"{cases[1]}: inference, peft_dora_compiled", str(cases[2])]


def test_what_is_compiled_is_built_when_the_others_are_measured(monkeypatch):
    order = []

    def late(name):
        def build(problem):
            order.append(name)
            return PROVIDERS["frozen"](problem)

        return build

    def found(rows, missing):
        assert all(row.ms.runs == 2 for row in rows)
        order.append(([f"{row.provider} {row.step}" for row in rows], missing))

    monkeypatch.setattr(steps, "COMPILED", ("late", "later"))
    providers = {"late": late("late"), "frozen": PROVIDERS["frozen"], "later": late("later"), "ours": ours}
    measured = steps.measure_case(case(), providers, ("forward", "inference"), 0, (2, 2), found=found)
    two, three = ["frozen", "ours"], ["frozen", "ours", "late"]
    four = [*three, "later"]

    def named(names, step):
        return [f"{name} {step}" for name in names]

    assert order == [
        (named(two, "forward"), ["inference", "late", "later"]),
        (named(two, "forward") + named(two, "inference"), ["late", "later"]),
        "late",
        (named(three, "forward") + named(two, "inference"), ["late", "later"]),
        (named(three, "forward") + named(three, "inference"), ["later"]),
        "later",
        (named(four, "forward") + named(three, "inference"), ["later"]),
        (named(four, "forward") + named(four, "inference"), []),
    ]
    assert [f"{row.provider} {row.step}" for row in measured] == order[-1][0]


def test_a_case_that_raises_is_left_out_and_not_the_end(tmp_path, capsys):
    def measured(case, found):
        if case.M == 2:
            raise torch.OutOfMemoryError("too large")
        return [steps.StepRow("ours", "dora", "forward", [], case.M, 1, 1, 1, "fp32")]

    path, cases = tmp_path / "layer.json", [case(M=M) for M in (1, 2, 3)]
    assert [row["M"] for row in layer.run(cases, path, measured, 60, {})] == [1, 3]
    assert json.loads(path.read_text())["meta"]["left_out"] == [str(cases[1])]
    assert f"{cases[1]}: OutOfMemoryError: too large" in capsys.readouterr().out


def test_the_conditions_of_a_device():
    found = machine.conditions(torch.device("cpu"))
    assert found == {"clock_mhz": None, "power_w": None, "celsius": None}


def test_inf_and_nan_are_null(tmp_path):
    report.write(tmp_path / "a.json", {}, [{"a": float("inf"), "b": [float("nan"), 1.23456]}])
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == [{"a": None, "b": [None, 1.235]}]


class FakeClock:
    """Moves only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_interleaved_timing():
    clock = FakeClock()
    ran: list[str] = []
    costs = {"a": 1.0, "b": 3.0, "c": 2.0}

    def step(name):
        def run():
            ran.append(name)
            clock.now += costs[name]

        return run

    def stopwatch(step):
        start = clock()
        step()
        elapsed = clock() - start
        return lambda: elapsed

    timings = interleave({name: step(name) for name in costs}, stopwatch, seconds=20, rounds=(2, 50), clock=clock)
    warmup = 3 * measure.WARMUP_STEPS
    rounds = [ran[start : start + 3] for start in range(warmup, len(ran), 3)]
    assert len(rounds) == 4  # 6 s each: the fourth begins at 18 s
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds) and len(set(map(tuple, rounds))) > 1
    assert {name: timing.median for name, timing in timings.items()} == costs
    timings = interleave({"a": step("a")}, stopwatch, seconds=0, rounds=(2, 50), clock=clock)
    assert timings["a"].runs == 2


def test_a_host_that_runs_ahead_stops_in_time():
    """Steps that the host starts at once and the device takes a second for."""
    clock = FakeClock()
    device = [clock.now]

    def stopwatch(step):
        end = device[0] = max(device[0], clock.now) + 1

        def reading():
            clock.now = max(clock.now, end)
            return 1000.0

        return reading

    timings = interleave({"a": lambda: None}, stopwatch, seconds=20, rounds=(2, 500), clock=clock)
    assert 20 <= timings["a"].runs <= 22 and clock.now <= 1022


def test_the_flush_ends_with_a_read_of_what_it_has_not_written():
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
            called.append((operator, arguments[0].untyped_storage().data_ptr(), arguments[0].nbytes))
            return operator(*arguments, **(keywords or {}))

    called = []
    flush = measure.Flush(torch.device(DEVICE), 4096)
    with Recorder():
        flush()
    (write, written, bytes_written), (read, other, bytes_read) = called
    assert write == torch.ops.aten.zero_.default and "sum" in str(read) and written != other
    assert bytes_written == bytes_read == 4096


@pytest.mark.parametrize("end_raises", (False, True))
def test_a_capture_that_fails_gives_the_stream_back(end_raises, monkeypatch):
    inside = []

    class Graph:
        def capture_begin(self, pool):
            inside.append("begin")

        def capture_end(self):
            inside.append("end")
            if end_raises:
                raise RuntimeError("the capture was invalidated")

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def stream(one):
        inside.append("in")
        try:
            yield
        finally:
            inside.append("out")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(measure, "capture_stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    calls = iter([{}] * measure.WARMUP_STEPS)
    with pytest.raises(StopIteration):  # what went wrong first, and not that the capture has no end
        measure.capture(lambda: next(calls), None)
    assert inside == ["in", "out", "in", "begin", "end", "out"]


def test_graphs_of_a_pool_are_captured_on_one_stream(monkeypatch):
    used, captures = [], []
    monkeypatch.setattr(
        torch.cuda, "CUDAGraph", lambda: mock.Mock(capture_begin=lambda pool: captures.append(used[-1]))
    )
    monkeypatch.setattr(torch.cuda, "Stream", mock.Mock)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock)
    monkeypatch.setattr(torch.cuda, "stream", lambda one: used.append(one) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    measure.capture_stream.cache_clear()
    try:
        for _ in range(2):
            measure.capture(dict, None)
    finally:
        measure.capture_stream.cache_clear()  # of what is no stream
    assert len(captures) == 2 and captures[0] is captures[1]


def test_timing_statistics():
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == Timing(3.5, 2.0, 5.0, 1.0, 6)
    assert Timing.of([7.0]) == Timing(7.0, 7.0, 7.0, 7.0, 1)


def test_a_graph_that_does_not_write_its_results_has_no_time(monkeypatch):
    problem = LayerProblem.random(case())
    layers = {name: PROVIDERS[name](problem) for name in ("frozen", "peft_dora", "ours")}
    calls = {name: (lambda built=built: forward_backward(built, problem)) for name, built in layers.items()}
    rows = {name: steps.StepRow(name, None, "forward+backward", [], 1, 1, 1, 1, "fp32") for name in layers}

    class Graph:
        def __init__(self, call, results):
            self.call, self.results = call, results

        def replay(self):
            for name, result in self.call().items() if self.call else ():
                self.results[name].copy_(result)

    def capture(call, pool):
        if call is calls["frozen"]:
            raise RuntimeError("cannot be captured")
        results = {name: result.detach().clone() for name, result in call().items()}
        return Graph(None if call is calls["peft_dora"] else call, results), results

    pools, gate = [], Gate(problem)
    monkeypatch.setattr(steps, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: pools.append(None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def time_graphs(calls, step):
        def wrong(name, results):
            return failure(gate.comparisons(layers[name].computes, results, step))

        steps._time_graphs(calls, rows, wrong, problem.seed, torch.device("cpu"), 0.0, (2, 2))

    time_graphs(calls, "forward+backward")
    assert len(pools) == 2  # what comes after the one that failed has a pool of its own
    assert rows["ours"].graph_ms.runs == 2 and rows["ours"].graph_reason is None
    assert rows["frozen"].graph_ms is None and rows["frozen"].graph_reason == "RuntimeError: cannot be captured"
    assert rows["peft_dora"].graph_ms is None and rows["peft_dora"].graph_reason.startswith("y: error inf")

    only_y = {"ours": lambda: {"y": layers["ours"].forward(problem.x)}}  # a pass that gives y alone
    rows["ours"] = steps.StepRow("ours", None, "forward", [], 1, 1, 1, 1, "fp32")
    time_graphs(only_y, "forward")
    assert rows["ours"].graph_ms.runs == 2 and rows["ours"].graph_reason is None


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_graphs_and_memory_on_a_gpu():
    rows = steps.measure_case(LayerCase(256, 512, 512, 16, "bf16", "cuda"), seconds=0.2, rounds=(3, 20))
    assert [(row.provider, row.reason, row.graph_reason) for row in rows if row.reason or row.graph_reason] == []
    assert all(row.backend == "triton" for row in rows if row.provider.startswith("ours"))
    for row in rows:
        assert row.graph_ms.median > 0 and row.ms.median > 0
        assert row.peak_bytes >= 2 * row.M * row.N  # y at least
        assert row.host_us > 0
    counts = steps.count_launches(LayerCase(256, 512, 512, 16, "bf16", "cuda"))
    assert counts.keys() == {(row.provider, row.step) for row in rows} and min(counts.values()) >= 1


def test_shapes():
    names = [(shape.model, shape.layer) for shape in shapes.LAYERS]
    assert len(set(names)) == len(names)
    assert shapes.layer_names(4096, 4096) == ["Llama-3.1-8B q/o"]
    assert shapes.layer_names(1024, 5120) == ["Qwen3-32B k/v"] and shapes.layer_names(3, 3) == []
    assert [str(case) for case in layer.grid([(1, 2)], (3, 4), (5,), ("fp32",), "cpu")] == [
        "M=3 N=1 K=2 R=5 fp32",
        "M=4 N=1 K=2 R=5 fp32",
    ]


def test_named_grids():
    core, decode, full = (shapes.GRIDS[name]("cpu") for name in ("core", "decode", "full"))
    assert len(core) <= 24 and len(set(core)) == len(core)
    assert core[0] == LayerCase(8192, 4096, 4096, 64, "bf16", "cpu") and core[2] == LayerCase(
        8192, 14336, 4096, 384, "bf16", "cpu"
    )
    assert {case.precision for case in core} == set(PRECISIONS)
    for device in ("cpu", "cuda"):
        quantized = shapes.GRIDS["qdora"](device)
        assert len(set(quantized)) == len(quantized) and {case.precision for case in quantized} <= set(QUANTIZED)
        assert all(case.K % 64 == 0 for case in quantized)  # or bitsandbytes may be wrong
    assert LayerCase(8192, 4096, 4096, 64, "nf4-bf16", "cuda") in quantized
    assert {case.M for case in decode} == {1, 8, 16} and set(core[3:5]) < set(decode)
    weights = {(shape.N, shape.K) for shape in shapes.LAYERS}
    assert len(full) == len(set(full)) == 2 * len(weights) * len(shapes.M_LIST) * len(shapes.R_LIST) + 2


def test_which_cases_run(capsys):
    def cases(*argv, device="cuda"):
        return layer.cases_of(layer._parser().parse_args(argv), device)

    assert cases() == cases("--grid", "core") == shapes.core_grid()
    assert cases("--grid", "decode", device="cpu") == shapes.decode_grid("cpu")
    assert [str(case) for case in cases("--tokens", "3", "--rank", "4", "--precision", "fp16")] == [
        "M=3 N=4096 K=4096 R=4 fp16"
    ]
    assert len(cases(device="cpu")) == 8
    core = shapes.core_grid()
    assert cases("--case", "1-4", "6", "10") == [*core[:4], core[5], core[9]]
    assert cases("--grid", "decode", "--case", "2") == shapes.decode_grid()[1:2]
    named = cases("--case", "3x4x5x6:fp16", "3x4x5x6", "dropout", "shared")
    assert named[:2] == [LayerCase(3, 4, 5, 6, "fp16", "cuda"), LayerCase(3, 4, 5, 6, "bf16", "cuda")]
    assert named[2] == dataclasses.replace(core[0], dropout=0.05) and str(named[2]).endswith(" bf16 dropout 0.05")
    assert str(named[3]) == "q, k, v of Llama-3.1-8B M=8192 R=64 bf16"
    for wrong in ("0", "25", "4-3", "3x4x5", "3x4x5x6:int3", "droput"):
        with pytest.raises(ValueError, match=f"--case {wrong}; expected 1 to 24"):
            cases("--case", wrong)
    with pytest.raises(SystemExit):
        layer.main(["--device", "cpu", "--grid", "core", "--rank", "4"])
    assert "--grid core with --rank" in capsys.readouterr().err
