"""The suite of GPU stages: it keeps to its time, ends politely, and brings back what it has, whatever happens."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import gpu_suite  # noqa: E402
from gpu_stages import benchmarks, card, device_tests, running, saving, telling  # noqa: E402

from bench.lib import shapes  # noqa: E402

START_SECONDS = 15.0  # importing torch from a cold disk, before the first stage
PLAN_NAMES = {
    "first": ["facts", "warm", "kernels", "tests_core", "ways", "head", "probe", "decisive", "save"],
    "second": ["warm", "tests_failed", "consan", "tuning", "layer", "model", "compiled", "memcheck", "save"],
}
BUDGETS = {"first": 340, "second": 340}


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def rehearse(tmp_path, stages, seconds, takes, suite=None):
    """Run stages that do nothing but take their time; results and given seconds by name, and the time at the end.

    takes(stage, share) is how long, or an exception, which is raised after the expected time.
    """
    clock, shares = FakeClock(), {}

    def fake(stage):
        def run(suite, share):
            shares[stage.name] = share
            lasts = takes(stage, share)
            clock.now += lasts if not isinstance(lasts, BaseException) else min(stage.expected, share)
            if isinstance(lasts, BaseException):
                raise lasts
            return {"ok": True}

        return replace(stage, run=run)

    suite = suite or running.Suite(tmp_path / "out", work=tmp_path)
    results = running.run_stages([fake(stage) for stage in stages], suite, seconds, {"commit": "c"}, clock)
    written = json.loads((suite.out / "suite.json").read_text())
    assert [row["stage"] for row in written["rows"]] == [stage.name for stage in stages]
    return {row["stage"]: row for row in results}, shares, clock.now


@pytest.mark.parametrize("plan", PLAN_NAMES)
def test_a_plan_fits_its_budget_as_estimated(plan, tmp_path):
    stages, seconds = gpu_suite.PLANS[plan]
    assert [stage.name for stage in stages] == PLAN_NAMES[plan] and seconds == BUDGETS[plan]
    assert all(stage.least <= stage.expected <= stage.most for stage in stages)
    results, shares, end = rehearse(
        tmp_path, stages, seconds - START_SECONDS, lambda stage, share: min(stage.expected, share)
    )
    assert all(result["ok"] for result in results.values()) and end <= seconds - START_SECONDS
    # not cut short either
    assert all(shares[stage.name] >= stage.expected for stage in stages)


@pytest.mark.parametrize("plan", PLAN_NAMES)
def test_a_plan_fits_its_budget_where_every_stage_takes_all_it_gets(plan, tmp_path):
    stages, seconds = gpu_suite.PLANS[plan]
    results, shares, end = rehearse(tmp_path, stages, seconds - START_SECONDS, lambda stage, share: share)
    assert all(result["ok"] for result in results.values()) and end <= seconds - START_SECONDS
    assert all(stage.least <= shares[stage.name] <= stage.most for stage in stages)
    assert shares["save"] == gpu_suite.SAVE.most


@pytest.mark.parametrize(
    ("plan", "stuck"), [(plan, place) for plan, names in PLAN_NAMES.items() for place in range(len(names) - 1)]
)
def test_a_plan_fits_its_budget_where_stages_crash_and_one_cannot_be_killed(plan, stuck, tmp_path):
    stages, seconds = gpu_suite.PLANS[plan]

    def takes(stage, share):
        if stage.always:
            return share
        return share + running.KILL_SECONDS if stage is stages[stuck] else RuntimeError("boom")

    results, shares, end = rehearse(tmp_path, stages, seconds - START_SECONDS, takes)
    assert end <= seconds - START_SECONDS and results["save"]["ok"]
    assert shares["save"] >= gpu_suite.SAVE.most - running.KILL_SECONDS
    assert shares.keys() == results.keys()
    assert sum(result.get("reason") == "RuntimeError: boom" for result in results.values()) == len(stages) - 2


def stage(name, least=0.0, expected=1.0, most=1000.0, **keywords):
    return running.Stage(name, least, expected, most, None, **keywords)


def test_stages_share_the_time(tmp_path):
    stages = stage("a", 50), stage("b", 40), stage("c", 30, most=1000), stage("d", 5, most=10, always=True)
    _, shares, _ = rehearse(tmp_path, stages, 300, lambda stage, share: {"a": 100}.get(stage.name, 10))
    # what is left, but for what the later ones need at least, and save's most
    assert shares == {"a": 300 - 40 - 30 - 10, "b": 200 - 30 - 10, "c": 180, "d": 10}


def test_save_runs_where_no_time_is_left(tmp_path, capsys):
    stages = stage("a", 50), stage("b", 40), stage("c", 3, most=12, always=True)
    results, shares, _ = rehearse(tmp_path, stages, 60, lambda stage, share: 70)
    assert shares == {"a": 50, "c": 3} and results["c"]["ok"]
    assert results["b"]["skipped"] == "0 s left; expected 40 or more" and not results["b"]["ok"]
    assert "b: skipped, 0 s left" in capsys.readouterr().out


def test_told_to_stop_the_suite_goes_on_with_save(tmp_path):
    suite = running.Suite(tmp_path / "out", work=tmp_path)

    def takes(stage, share):
        suite.stop.set()
        return 1.0

    stages = stage("a"), stage("b"), stage("save", always=True)
    results, shares, _ = rehearse(tmp_path, stages, 100, takes, suite)
    assert set(shares) == {"a", "save"} and results["b"]["skipped"] == "told to stop"


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path):
    stages = stage("a"), stage("b"), stage("c", 10)
    takes = {"a": RuntimeError("boom"), "b": 200.0, "c": 5.0}
    results, shares, _ = rehearse(tmp_path, stages, 100, lambda stage, share: takes[stage.name])
    assert results["a"]["reason"] == "RuntimeError: boom" and not results["a"]["ok"]
    assert results["c"]["skipped"].startswith("0 s left")
    text = telling.summary(list(results.values()), tmp_path)
    assert [line.split()[:2] for line in text.splitlines()[:3]] == [["a", "FAILED"], ["b", "ok"], ["c", "skipped"]]


def test_save_runs_where_a_result_cannot_be_written(tmp_path, monkeypatch, capsys):
    write, ran = running.report.write, []

    def full(path, information, rows):
        if len(rows) == 1:
            raise OSError("no space left")
        write(path, information, rows)

    def after(suite):
        if len(ran) == 2:
            raise ValueError("cannot be packed")

    monkeypatch.setattr(running.report, "write", full)
    stages = [
        replace(
            stage(name, always=name == "save"), run=lambda suite, share, name=name: ran.append(name) or {"ok": True}
        )
        for name in ("a", "b", "save")
    ]
    results = running.run_stages(stages, running.Suite(tmp_path), 100, {"commit": "c"}, after=after)
    assert ran == ["a", "b", "save"] and "not_kept" not in results[2]
    assert results[0]["not_kept"] == "OSError: no space left" and "cannot be packed" in results[1]["not_kept"]
    assert "a: not kept" in capsys.readouterr().out and "no space left" in telling.summary(results, tmp_path)


def test_resuming_skips_what_ended_well_for_the_same_commit(tmp_path):
    stages = [stage(name) for name in "abd"] + [stage("c", file="c.json"), stage("save", always=True)]
    rows = [{"stage": n, "seconds": 1.0, "ok": n != "b"} for n in ("a", "b", "c", "save")]
    rows.append({"stage": "d", "ok": True, "skipped": ""})
    (tmp_path / "suite.json").write_text(json.dumps({"meta": {"commit": "c1"}, "rows": rows}))
    assert running.finished_before(tmp_path, tmp_path, stages, "c2") == {}
    assert running.finished_before(tmp_path, tmp_path, stages, None) == {}
    assert set(running.finished_before(tmp_path, tmp_path, stages, "c1")) == {"a"}
    (tmp_path / "c.json").write_text("")
    finished = running.finished_before(tmp_path, tmp_path, stages, "c1")
    assert set(finished) == {"a", "c"}
    ran = []
    stages = [replace(one, run=lambda suite, share, name=one.name: ran.append(name) or {"ok": True}) for one in stages]
    running.run_stages(stages, running.Suite(tmp_path), 100, {"commit": "c1"}, FakeClock(), finished)
    assert ran == ["b", "d", "save"]


POLITE = (
    "import time\nprint('ready', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('wrote the rest')"
)


@pytest.mark.parametrize("ignored", (False, True), ids=("interruptible", "in-the-background"))
def test_a_command_is_stopped_in_time(ignored, tmp_path):
    """Also where SIGINT is ignored, as a shell has it for what it starts in the background, and children inherit."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if ignored else signal.getsignal(signal.SIGINT)
    try:
        done = running.run_command([sys.executable, "-ISuc", POLITE], 8, tmp_path / "logs" / "a.log", grace=6)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.status is None and done.lines == ["ready", "wrote the rest"]


def test_a_command_that_is_deaf_is_killed_with_what_it_started(tmp_path):
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('deaf')\ntime.sleep(60)"
    script = f'{sys.executable} -ISuc "{deaf}" & echo $!; wait; sleep 60'
    start = time.monotonic()
    done = running.run_command(["sh", "-c", f"trap '' INT; {script}"], 3, tmp_path / "b.log", grace=0.5)
    assert done.status is None and "deaf" in done.lines and time.monotonic() - start < 30
    child = int(done.lines[0])
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "\nState:\tZ" in Path(f"/proc/{child}/status").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("the child of the command is alive")


def test_a_command_ends_where_the_suite_is_told_to_stop(tmp_path):
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    start = time.monotonic()
    done = running.run_command(["sleep", "60"], 60, tmp_path / "a.log", stop=stop)
    assert done.status is None and time.monotonic() - start < 20


def test_a_command_runs_from_the_checkout_without_the_interpreter(tmp_path):
    code = "import bench, gpu_stages, os; exit('TRITON_INTERPRET' in os.environ)"
    done = running.run_command([sys.executable, "-c", code], 60, tmp_path / "c.log")
    assert done.status == 0, done.tail
    suite = running.Suite(tmp_path, work=tmp_path, triton_cache=Path("/some/where"))
    code = "import os; print(os.environ['TRITON_CACHE_DIR'])"
    assert suite.run("d", [sys.executable, "-c", code], 60).lines == ["/some/where"]
    assert (tmp_path / "logs" / "d.log").exists()


def test_the_cards_clocks_are_kept_with_each_stage(tmp_path, monkeypatch):
    """From a script in nvidia-smi's place; one that does not answer is asked once."""
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\necho x >> {tmp_path}/asked\necho '1980, 2619, [N/A], 41'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(card, "_answers", True)
    measuring = replace(stage("a"), run=lambda suite, seconds: {"ok": suite.run("a", ["true"], 30).status == 0})
    idle = replace(stage("b"), run=lambda suite, seconds: {"ok": True})
    times = iter((1_789_000_001.4, 1_789_000_006.6))
    monkeypatch.setattr(card.time, "time", lambda: next(times))
    running.run_stages([measuring, idle], running.Suite(tmp_path / "out", work=tmp_path), 60, {"commit": None})
    rows = json.loads((tmp_path / "out" / "suite.json").read_text())["rows"]
    assert "card" not in rows[1] and [reading.pop("at") for reading in rows[0]["card"]] == [
        1_789_000_001,
        1_789_000_006,
    ]
    assert rows[0]["card"] == 2 * [{"sm_mhz": 1980.0, "memory_mhz": 2619.0, "watts": "[N/A]", "celsius": 41.0}]
    script.write_text(f"#!/bin/sh\necho x >> {tmp_path}/asked\nexit 9\n")
    before = (tmp_path / "asked").read_text()
    assert card.sample() == card.sample() == {}
    assert (tmp_path / "asked").read_text() == before + "x\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a GPU that is not there")
def test_the_card_is_asked_once_for_all_and_one_by_one_where_it_refuses(monkeypatch):
    pytest.importorskip("triton")
    from gpu_stages import facts

    asked, clock = [], FakeClock()

    def query(*fields):
        asked.append(fields)
        clock.now += 4 if slow else 0
        return ["x" for _ in fields] if answers(fields) else []

    monkeypatch.setattr(facts.card, "query", query)
    monkeypatch.setattr(facts.time, "monotonic", clock)
    slow, answers = False, lambda fields: True
    assert facts.smi() == dict.fromkeys(facts.SMI, "x") and asked == [facts.SMI]
    answers = lambda fields: fields != facts.SMI and fields != ("mig.mode.current",)  # noqa: E731
    assert facts.smi() == dict.fromkeys(facts.SMI, "x") | {"mig.mode.current": "-"}
    slow, answers = True, lambda fields: False
    asked.clear()
    assert facts.smi() == dict.fromkeys(facts.SMI, "-") and len(asked) == 3  # 12 s and not 56
    # the roofs are worth more
    assert list(facts.FACTS)[-1] == "smi"


# a GPU that is not there, and a stage that takes a minute
TERMINATED = """
import sys, torch
sys.path.insert(0, "tools")
import gpu_suite
from gpu_stages.running import Stage
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "NVIDIA Pretended"
def long(suite, seconds):
    (suite.work / "measured.json").write_text("{}")
    print("started", flush=True)
    return {"ok": suite.run("long", ["sleep", "60"], seconds).status == 0}
stages = Stage("long", 1, 1, 60, long), Stage("next", 1, 1, 60, long), gpu_suite.SAVE
gpu_suite.PLANS["first"] = (stages, 90)
sys.exit(gpu_suite.main(["--plan", "first", "--out", sys.argv[1]]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends to have a GPU")
@pytest.mark.parametrize("number", (signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.nightly)))
def test_what_was_measured_is_saved_where_the_suite_is_terminated(number, tmp_path):
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    command = [sys.executable, "-c", TERMINATED, str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert "started\n" in iter(process.stdout.readline, "")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    rows = {row["stage"]: row for row in json.loads((tmp_path / "out" / "suite.json").read_text())["rows"]}
    assert rows["save"]["ok"] and rows["next"]["skipped"] == "told to stop" and not rows["long"]["ok"]
    saving.unpack_results(tmp_path / "out" / saving.RESULTS, tmp_path / "unpacked")
    assert {"measured.json", "logs", "suite-first.json"} <= {path.name for path in (tmp_path / "unpacked").iterdir()}
    assert (tmp_path / "out" / saving.CACHE).exists()


def test_no_gpu_is_exit_status_2(tmp_path):
    env = dict(os.environ, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    command = [sys.executable, str(ROOT / "tools" / "gpu_suite.py"), "--plan", "first", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    assert done.returncode == 2 and "sees no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_handful_of_files_comes_back(tmp_path):
    """What stages leave is in one archive, logs cut to their ends; the cache is pruned and found again."""
    suite = running.Suite(tmp_path / "out", work=tmp_path / "work", triton_cache=tmp_path / "cache", plan="second")
    (suite.work / "logs").mkdir(parents=True)
    (suite.work / "layer.json").write_text("layer")
    (suite.work / "logs" / "layer.log").write_text("x" * saving.LOG_BYTES + "the end")
    kernel = suite.triton_cache / "KEY"
    kernel.mkdir(parents=True)
    for name in ("k.cubin", "k.json", "__grp__k.json", "k.ptx", "k.ttir", "launcher.so"):
        (kernel / name).write_text(name)
    suite.out.mkdir()
    (suite.out / "suite.json").write_text("suite")
    outcome = saving.save(suite, 30)
    assert sorted(path.name for path in suite.out.iterdir()) == ["cache.tar.xz", "results.tar.gz", "suite.json"]
    assert outcome["ok"] and "4 files, 0 left out" in outcome["note"]
    saving.unpack_results(suite.out / saving.RESULTS, tmp_path / "results")
    assert (tmp_path / "results" / "layer.json").read_text() == "layer"
    assert (tmp_path / "results" / "suite-second.json").read_text() == "suite"
    log = (tmp_path / "results" / "logs" / "layer.log").read_text()
    assert len(log) == saving.LOG_BYTES and log.endswith("the end")
    assert saving.unpack_cache(suite.out / saving.CACHE, tmp_path / "again") == 4
    assert {path.name for path in (tmp_path / "again" / "KEY").iterdir()} == {
        "k.cubin", "k.json", "__grp__k.json", "launcher.so",
    }  # fmt: skip


def test_a_cache_that_is_too_large_is_packed_as_far_as_the_time_goes(tmp_path):
    for number in range(5):
        (tmp_path / "cache" / f"K{number}").mkdir(parents=True)
        (tmp_path / "cache" / f"K{number}" / "k.cubin").write_text("x")
    ticks = iter(range(100))
    packed = saving.pack_cache(tmp_path / "cache", tmp_path / "c.tar.xz", 3, lambda: float(next(ticks)))
    assert packed == (2, 3) and saving.unpack_cache(tmp_path / "c.tar.xz", tmp_path / "again") == 2
    assert saving.pack_cache(tmp_path / "none", tmp_path / "c.tar.xz", 3) == (0, 0)


def commands(plan, share=lambda stage: 40.0):
    """What each benchmark of a plan is started with, by the name of its file, where each stage gets share(stage)."""
    asked = {}

    class Suite(running.Suite):
        def run(self, name, command, seconds, grace=0, variables=None):
            asked[name] = list(command)
            self.work.joinpath("log").write_text("")
            return running.CommandRun(0, self.work / "log")

    for stage in gpu_suite.PLANS[plan][0]:
        if not stage.name.startswith(("tests", "consan", "memcheck", "save")):
            stage.run(Suite(Path("/nowhere"), "abc"), share(stage))
    return asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
@pytest.mark.parametrize("plan", PLAN_NAMES)
def test_the_benchmarks_take_the_arguments_that_they_are_given(plan, capsys):
    """Each refuses this machine for its missing GPU alone; one that does not know an argument raises SystemExit."""
    for name, command in commands(plan).items():
        if name == "ptxas":  # warm asks the GPU in a process of its own: see below
            assert command[:3] == [sys.executable, "-m", "gpu_stages.warm"]
            continue
        module, arguments = (command[2], command[3:]) if command[1] == "-m" else ("tune", command[2:])
        assert "--commit" in arguments and "--out" in arguments
        assert importlib.import_module(module).main(arguments) == 2, command
        assert "sees no GPU" in capsys.readouterr().err, command


def layer_cases(plan):
    from bench import layer

    found = {name: command for name, command in commands(plan).items() if "bench.layer" in command}
    return {name: layer.cases_of(layer._parser().parse_args(command[3:]), "cuda") for name, command in found.items()}


def test_the_layers_cases_are_the_ones_meant():
    from bench.lib import siblings

    first, second, everything = map(layer_cases, ("first", "second", "all"))
    core = shapes.core_grid("cuda")
    assert first["head"] == [*core[:4], core[5], core[9]]
    assert all(second[provider] == core[:1] for provider in benchmarks.COMPILED)
    sizes = [(case.M, case.N, case.K, case.R) for case in second["layer"] if case in core]
    assert {telling.SQUARE, telling.WIDE, telling.FEW} <= set(sizes)
    assert {siblings.LLAMA, shapes.dropout_case("cuda")} <= set(second["layer"]) <= set(everything["layer"])
    assert set(core) <= set(everything["layer"])


# what a stage has to be told to be of use where it gets its least: a case of the layer takes 2.8 s, two sections of the
# probe 28 s, two shapes of the ways 15 s, 6 s are for counting launches (estimates)
OF_USE = {
    "ptxas": 5, "kernels": 6, "ways": 15, "head": 3 * 2.8, "decisive": 10, "probe": 28, "tuned": 15,
    "layer": 4 * 2.8 + 6, "model": 20, "peft_dora_compiled": 7, "factored_compose_compiled": 5,
}  # fmt: skip


@pytest.mark.parametrize("plan", PLAN_NAMES)
def test_benchmarks_are_told_times_that_are_of_use(plan):
    """Also at a stage's least; as estimated all of the layer's cases fit, and the probe gets nearly all of its most."""
    for share in ("least", "expected", "most"):
        asked = commands(plan, lambda stage, share=share: getattr(stage, share))
        told = {name: float(of[of.index("--seconds") + 1]) for name, of in asked.items() if "--seconds" in of}
        assert told.keys() == asked.keys() - {"facts"}
        assert all(seconds >= OF_USE[name] for name, seconds in told.items()), told
        if share != "least":
            cases = layer_cases(plan)
            assert all(told[name] >= 2.8 * len(cases[name]) for name in ("head", "layer") if name in told), told
            assert told.get("layer", 99) >= 2.8 * len(cases.get("layer", ())) + 6
    assert plan != "first" or told["probe"] >= 48


def test_a_provider_that_compiles_for_too_long_costs_itself_alone(tmp_path, monkeypatch):
    shares, row = {}, {"provider": "ours", "step": "forward+backward", "reason": None, "graph_reason": None}

    def run(self, name, command, seconds, *more, **keywords):
        shares[name] = seconds
        (tmp_path / "log").write_text("")
        if name == "peft_dora_compiled":  # interrupted before its file is written
            return running.CommandRun(None, tmp_path / "log")
        path = Path(command[command.index("--out") + 1])
        path.write_text(json.dumps({"meta": {"left_out": []}, "rows": 3 * [row]}))
        return running.CommandRun(0, tmp_path / "log")

    monkeypatch.setattr(running.Suite, "run", run)
    outcome = benchmarks.compiled(running.Suite(tmp_path, work=tmp_path), 60)
    assert list(shares) == list(benchmarks.COMPILED) and outcome["rows"] == 3 and not outcome["ok"]
    assert outcome["left_out"] == ["peft_dora_compiled: stopped to end within 30 s"]
    assert 29 < shares["peft_dora_compiled"] <= 30 and shares["factored_compose_compiled"] >= 30
    # with less the first one is to be measured for sure
    benchmarks.compiled(running.Suite(tmp_path, work=tmp_path), 35)
    assert 24 < shares["peft_dora_compiled"] <= benchmarks.COMPILED_SECONDS


def test_a_benchmark_is_judged_by_its_file(tmp_path, monkeypatch):
    bad = {"section": "b", "ok": False, "tiles": "", "error": "ptxas: why\nand where"}
    content = {"meta": {"left_out": []}, "rows": [{"section": "a", "ok": True}, bad]}
    written, status, commands = dict(content), 0, []

    def run(self, name, command, seconds, **more):
        commands.append(command)
        path = Path(command[command.index("--out") + 1])
        assert not path.exists(), "an earlier result would look like this one's"
        if written:
            path.write_text(json.dumps(written))
        log = tmp_path / "log"
        log.write_text("the end")
        return running.CommandRun(status, log)

    monkeypatch.setattr(running.Suite, "run", run)
    suite = running.Suite(tmp_path, "abc", work=tmp_path)

    def decisive():
        return benchmarks.benchmark(suite, 100, "decisive", ["-m", "bench.studies.decisive"], roof=True)

    outcome = decisive()
    assert outcome["ok"] and outcome["rows"] == 2 and outcome["not_measured"] == ["b ptxas: why"]
    assert "--roof" not in commands[-1] and commands[-1][-4:] == ["--seconds", "80", "--commit", "abc"]
    (tmp_path / benchmarks.ROOFLINE).write_text("{}")
    written["meta"] = {"left_out": ["host_cost"]}
    assert not decisive()["ok"]
    assert commands[-1][commands[-1].index("--roof") + 1] == str(tmp_path / benchmarks.ROOFLINE)
    written, status = {}, 2
    assert decisive() == {"ok": False, "reason": "exit status 2"}
    status = None
    assert decisive() == {"ok": False, "reason": "stopped to end within 100 s"}


def test_a_broken_cache_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "benchmark", lambda *arguments, **keywords: {"ok": True})
    for content in (b"", b"not an archive", b"\xfd7zXZ\x00 cut off"):
        (tmp_path / "cache.tar.xz").write_bytes(content)
        suite = running.Suite(tmp_path, work=tmp_path, cache=tmp_path / "cache.tar.xz", triton_cache=tmp_path / "cache")
        outcome = benchmarks.warm(suite, 30)
        assert outcome["ok"] and "Error" in outcome["note"], outcome


@pytest.mark.parametrize("won", (True, False), ids=("one-wins", "none-wins"))
def test_the_table_of_the_tuning_goes_into_the_package(won, tmp_path, monkeypatch):
    """And the winners are compiled; a kernel whose default was refused is a dash."""
    measured = {"norm": {"over_default": 0.9}, "merge": {"times": []}}
    table = {"meta": {"device": "NVIDIA H200"}, "measured": {"2": measured}}
    table["configs"] = {"2": {"norm": {"num_warps": 4}} if won else {}}
    asked = []

    def benchmark(suite, seconds, name, command, spare, variables=None):
        asked.append((name, command[1:], seconds))
        (suite.work / "tuned.json").write_text(json.dumps(table))
        return {"ok": True, "rows": 7}

    monkeypatch.setattr(benchmarks, "benchmark", benchmark)
    monkeypatch.setattr(benchmarks.tuned.configs, "TUNED_FOLDER", tmp_path / "tuned")
    outcome = benchmarks.tuning(running.Suite(tmp_path, work=tmp_path), 60)
    assert outcome["ok"] and outcome["over_default"] == {"norm": 0.9, "merge": "-"}
    assert json.loads((tmp_path / "tuned" / "nvidia-h200.json").read_text()) == table
    assert [name for name, _, _ in asked] == ["tuned", "ptxas_tuned"][: 1 + won]
    if won:
        assert asked[1][1] == ["gpu_stages.warm", "--part", "layer", "model"] and sum(row[2] for row in asked) < 111
    assert telling._tuned(tmp_path) == "norm 0.90, merge -"


def test_the_table_of_the_ways_goes_into_the_package_and_keeps_what_was_tuned(tmp_path, monkeypatch):
    """And what it says is told at the end of the run."""
    monkeypatch.setattr(benchmarks.tuned.configs, "TUNED_FOLDER", tmp_path / "tuned")
    package = tmp_path / "tuned" / "nvidia-h200.json"
    best = {"2": {"norm": {"num_warps": 4}}}
    benchmarks.tuned.write(package, {"meta": {}, "configs": best, "measured": {}})
    entry = {"M": 8192, "N": 4096, "K": 4096, "R": 64, "forward": {"split": 400.0, "fused": 380.0}}
    table = {"meta": {"device": "NVIDIA H200"}, "ways": [entry]}

    def run(self, name, command, seconds, **more):
        Path(command[command.index("--table") + 1]).write_text(json.dumps(table))
        write_rows(self.work, "ways", [entry], told=["square: forward fused"])
        (tmp_path / "log").write_text("the end")
        return running.CommandRun(0, tmp_path / "log")

    monkeypatch.setattr(running.Suite, "run", run)
    outcome = benchmarks.ways(running.Suite(tmp_path, work=tmp_path), 60)
    assert outcome["ok"] and outcome["note"] == "entered into nvidia-h200.json"
    known = benchmarks.tuned.read(package)
    assert known["ways"] == [entry] and known["configs"] == best
    text = telling.summary([{"stage": "ways", "seconds": 9.0} | outcome], tmp_path)
    assert "\n    square: forward fused\n" in text
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(benchmarks.tuned.configs, "TUNED_FOLDER", tmp_path / "file" / "tuned")  # cannot be written to
    outcome = benchmarks.ways(running.Suite(tmp_path, work=tmp_path), 60)
    assert not outcome["ok"] and outcome["reason"].startswith("the table is not entered: ")
    assert outcome["told"] == ["square: forward fused"] and outcome["rows"] == 1


def test_a_part_that_cannot_be_recorded_costs_itself_alone(monkeypatch):
    """It is a failure among what is compiled; the parts after it are compiled all the same."""
    pytest.importorskip("triton")
    from gpu_stages import warm, workload

    def broken(target):
        yield [kernel("first")]
        raise AttributeError("no such step")

    def kernel(name):
        return SimpleNamespace(name=name, key="", kernel=SimpleNamespace(module="kernels"))

    monkeypatch.setattr(workload, "PARTS", {"ways": broken, "layer": lambda target: iter([[kernel("second")]])})
    target = workload.specializations.TARGETS["sm_90"]
    *good, bad = workload.wanted("", target, workload.PARTS, False)
    assert [(entry.stage, entry.name) for entry in good] == [("ways", "first"), ("layer", "second")]
    assert (bad.stage, bad.name, bad.tiles()) == ("ways", "launches", "not recorded")
    (found,) = workload.precompile.in_all_cores(warm.compile_one, [bad], 1, time.monotonic() + 30).values()
    assert found == {"ok": False, "error": "AttributeError: no such step"}


@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.is_available(), reason="for a GPU that is not there")
def test_what_the_benchmarks_launch_is_known_before(tmp_path):
    """Recorded and, for want of time, not compiled; and without --target there is no GPU to compile for."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{ROOT / 'tools'}{os.pathsep}{ROOT}", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "gpu_stages.warm", "--tuning", "--seconds", "0", "--out", str(tmp_path / "p.json")]
    done = subprocess.run([*command, "--target", "sm_90"], env=env, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1, done.stderr
    (left_out,) = json.loads((tmp_path / "p.json").read_text())["meta"]["left_out"]
    assert int(left_out.split()[0]) > 150
    done = subprocess.run(command, env=env, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and "expected a GPU" in done.stderr


RECORDED = """
import json, sys
from gpu_stages import workload
target = workload.specializations.TARGETS["sm_90"]
def tiles(parts, kernel):
    entries = workload.wanted("NVIDIA Tuned", target, parts, False)
    return {entry.tiles() for entry in entries if entry.name == kernel}
default, untuned = tiles(["layer"], "_norm_kernel"), tiles(["layer"], "_merge_kernel")
(path := workload.configs.TUNED_FOLDER).mkdir()
table = {"2": {"norm": dict(BLOCK_N=16, BLOCK_K=32, BLOCK_R=64, num_warps=2, num_stages=5)}}
(path / "nvidia-tuned.json").write_text(json.dumps({"configs": table}))
workload.configs.tuned_configs.cache_clear()
tuned = tiles(["layer"], "_norm_kernel")
assert any("warps=2 stages=5" in one for one in tuned) and not any("stages=5" in one for one in default), tuned
assert tiles(["layer"], "_merge_kernel") == untuned
entries = workload.wanted("", target, workload.PARTS, False)
print(*{entry.name for entry in entries if entry.stage == "probe"})
print(len([entry for entry in entries if entry.name == "gemm_kernel"]) >= len(workload.gemm.VARIANTS))
"""


def run_code(code, tmp_path, *prelude):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{ROOT / 'tools'}{os.pathsep}{ROOT}", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", "\n".join([*prelude, code])]
    return subprocess.run(command, env=env, cwd=ROOT, text=True, capture_output=True)


@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.is_available(), reason="for a GPU that is not there")
def test_warm_knows_tuned_tiles_and_what_the_probe_launches(tmp_path):
    pytest.importorskip("triton")
    prelude = "from pathlib import Path", "from dora_kernels.planning import configs"
    done = run_code(RECORDED, tmp_path, *prelude, f"configs.TUNED_FOLDER = Path({str(tmp_path / 'tuned')!r})")
    assert done.returncode == 0, done.stderr
    probe, gemms = done.stdout.splitlines()
    assert "gemm_kernel" in probe.split() and gemms == "True"


IN_ALL_CORES = """
import os, sys, time
import precompile
class Unpicklable(Exception):
    def __init__(self, one, other): super().__init__(one)
def work(item):
    if item == 3: raise Unpicklable("three", lambda: 0)
    if item == 5: time.sleep(60)
    return {"ok": True}
start = time.monotonic()
done = precompile.in_all_cores(work, range(6), 2, start + 5)
assert sorted(done) == [0, 1, 2, 3, 4] and done[3] == {"ok": False, "error": "Unpicklable: three"}, done
assert time.monotonic() - start < 15
def die(item):
    os._exit(1)
done = precompile.in_all_cores(die, range(3), 2, start + 100)
assert len(done) == 3 and not any(found["ok"] for found in done.values())
precompile._compile_candidate = lambda candidate: work(candidate.config)
wanted = [precompile.Trial("norm", item, 2, None) for item in (0, 1, 3, 5)]
judged = precompile.judge(wanted, 2, seconds=2)["norm"]
assert list(judged.tried) == [0, 1] and judged.refused == {3: "Unpicklable: three", 5: "not compiled in 2 s"}, judged
print("good", time.monotonic() - start < 30)
"""


@pytest.mark.nightly
def test_a_compilation_that_fails_or_never_ends_costs_no_other(tmp_path):
    pytest.importorskip("triton")
    done = run_code(IN_ALL_CORES, tmp_path)
    assert done.stdout == "good True\n", done.stderr


def write_rows(folder: Path, name: str, rows: list, **meta) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"meta": meta, "rows": rows}))


def test_the_most_telling_numbers_come_last_and_a_missing_one_is_a_dash(tmp_path):
    lines = telling.telling(tmp_path, "first")
    assert len(lines) == 10 and all(line.split()[-1] == "-" for line in lines)
    (tmp_path / "kernels.json").write_text("broken")
    assert telling.telling(tmp_path, "first") == lines
    shape = dict(zip("MNKR", telling.SQUARE, strict=True)) | {"precision": "bf16"}
    kernel = shape | {"by": "kernel", "ms": {"median": 3.0}}
    write_rows(
        tmp_path,
        "kernels",
        [
            kernel | {"kernel": "norm", "percent_of_roof": 81.4},
            kernel | {"kernel": "project", "percent_of_roof": 70.0},
            kernel | {"kernel": "project", "by": "library", "ms": {"median": 2.0}},
            kernel | {"kernel": "merge", "ms": None},
        ],
        roof={"bandwidth": 3.1e12, "matmul": {"bf16": 7e14}},
    )
    step = shape | {"step": "forward+backward", "variant": ""}
    rows = [step | {"provider": name, "graph_ms": {"median": ms}} for name, ms in (("ours", 2.0), ("frozen", 1.0))]
    rows += [row | {"variant": "dropout 0.05", "graph_ms": {"median": 9.0}} for row in rows]
    write_rows(tmp_path, "head", rows)
    way = {"section": "merged_against_split", "N": 4096, "R": 64}
    decisive = [way | {"M": M, "ms": {"split": 1.0, "merged": 1.5 - M / 1024}} for M in (2048, 16)]
    decisive += [{"section": "host_cost", "call": "layer, forward+backward", "us": 412.3}]
    write_rows(tmp_path, "decisive", decisive)
    times = {"forward": {"split": 400.0, "fused": 380.0}, "backward": {"none": 500.0, "low rank": 600.0}}
    ways = [shape | {"pass": name, "way": way, "us": us} for name, of in times.items() for way, us in of.items()]
    write_rows(tmp_path, "ways", [*ways, shape | {"pass": "forward", "way": "merged", "left_out": "no GEMM"}])
    found = [" ".join(line.split()) for line in telling.telling(tmp_path, "first")]
    for expected in (
        "TB/s 3.10", "TFLOP/s 700", "token_sums 81% / - / - / -", "library 1.50 / -", "tokens 2.00 / - / -",
        "way fused 0.950 / - / none 1.000", "412 us", "N=4096 R=64: [2048]",
    ):  # fmt: skip
        assert any(expected in line for line in found), (expected, found)


def run_pytest(folder: Path, source: str, *options: str) -> dict:
    """Run a test file with the plugin; counts and failures."""
    (folder / "test_some.py").write_text(source)
    xml = folder / "tests.xml"
    command = [*device_tests.PYTEST, "-p", "gpu_stages.pytest_on_device", f"--junitxml={xml}", *options]
    command += [f"--rootdir={folder}", "-c", os.devnull, str(folder / "test_some.py")]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)  # the plugin would take its process for one of ours
        done = running.run_command(command, 120, folder / "tests.log")
    return device_tests.pytest_outcome(xml, done.log) | {"status": done.status, "log": done.log}


@pytest.fixture
def pytest_run(tmp_path):
    return partial(run_pytest, tmp_path)


SOME = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2, 'one is two'
def test_skipped(): pytest.skip('why')
class TestClass:
    @pytest.mark.parametrize("i", ("a::b", "c"))
    def test_in_class(self, i): assert i == "c"
"""


@pytest.fixture(scope="module")
def some_run(tmp_path_factory):
    return run_pytest(tmp_path_factory.mktemp("some"), SOME)


def test_a_test_run_is_read_from_its_junit_file_or_its_log(some_run, tmp_path):
    outcome = some_run
    assert outcome["status"] == 1 and outcome["counts"] == {"passed": 2, "failure": 2, "skipped": 1}
    assert "one is two" in outcome["failures"]["test_some::test_bad"]
    again = device_tests.pytest_outcome(tmp_path / "none.xml", outcome["log"])
    assert again == {"counts": {"passed": 2, "failed": 2, "skipped": 1}, "failures": None, "passed": None}


KILLED = """
import os, signal, time
from gpu_stages import pytest_on_device
pytest_on_device.JUNIT_SECONDS = 1
def test_bad(): assert 0, "wrong"
def test_slow(): time.sleep(1.5)
def test_killed(): os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_junit_file_is_there_where_pytest_is_killed(pytest_run):
    outcome = pytest_run(KILLED)
    assert outcome["status"] == -signal.SIGKILL and outcome["counts"] == {"failure": 1, "passed": 1}
    assert outcome["failures"].keys() == {"test_some::test_bad"}


def test_what_passed_before_is_left_out(some_run, pytest_run, tmp_path):
    before = some_run
    assert sorted(before["passed"]) == [
        "test_some.TestClass::test_in_class[c]", "test_some::test_good", "test_some::test_skipped",
    ]  # fmt: skip
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps([*before["passed"], "test_some::test_gone"]))
    new = "def test_not_reached_before(): pass"
    outcome = pytest_run(SOME + new, f"--passed={earlier}")
    assert outcome["counts"] == {"failure": 2, "passed": 1} and outcome["failures"].keys() == before["failures"].keys()
    assert outcome["passed"] == ["test_some::test_not_reached_before"]


BROKEN = """
import torch
calls = []
def broken():
    if calls: raise RuntimeError("CUDA error: an illegal memory access was encountered")
torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, broken
def test_fails(): assert 0
def test_good(): pass
def test_breaks():
    calls.append(1)
    assert 0, "wrong"
def test_never(): pass
"""


def test_nothing_runs_in_a_process_whose_gpu_context_is_broken(pytest_run):
    outcome = pytest_run(BROKEN)
    assert outcome["counts"] == {"passed": 1, "failure": 2}
    # not 1, as where all were run
    assert outcome["status"] == 2 and "the CUDA context is broken" in outcome["log"].read_text()


def test_side_by_side_only_the_process_with_the_broken_context_ends(pytest_run):
    pytest.importorskip("xdist")
    outcome = pytest_run(BROKEN, "-n", "1")
    assert outcome["counts"]["passed"] == 2 and "test_some::test_breaks" in outcome["failures"]


def test_the_files_of_the_device_are_there():
    names = {str(path.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("test_*.py")}
    core, off, rest = (list(names) for names in (device_tests.CORE, device_tests.OFF_DEVICE, device_tests.files()))
    listed = [*core, *off, *rest]
    assert len(set(listed)) == len(listed) and set(listed) == names
    assert rest[: len(device_tests.NEXT)] == list(device_tests.NEXT)
    path, _, name = device_tests.HUGE.partition("::")
    assert path == f"tests/{device_tests.HUGE_FILE}" and device_tests.HUGE_FILE in core
    assert (ROOT / path).read_text().rpartition("\ndef test_")[2].startswith(f"{name.removeprefix('test_')}(")


FAILURES = {
    "tests.kernels.test_steps::test_a[test_x.y]": "",
    "tests.adapters.test_peft.TestB::test_c": "",
    "::tests.test_ops": "",
}
PASSED = ["tests.kernels.test_steps::test_b"]


@pytest.fixture
def second_tests(tmp_path, monkeypatch):
    """second_tests(earlier) is (files, tests left out, outcome) of the second plan's tests; earlier: the first's row of
    tests_core, or text in the place of suite.json.
    """
    asked = []

    def run(self, name, command, *more):
        asked[:] = command
        (tmp_path / "tests_failed.xml").write_text(
            '<testsuite><testcase classname="tests.test_ops" name="test_d"/></testsuite>'
        )
        (tmp_path / "log").write_text("1 passed")
        return running.CommandRun(0, tmp_path / "log")

    monkeypatch.setattr(running.Suite, "run", run)

    def second_tests(earlier: dict | str) -> tuple[list[str], list[str], dict]:
        if isinstance(earlier, dict):
            rows = [{"stage": "facts", "ok": True}, {"stage": "tests_core", "ok": False} | earlier]
            earlier = json.dumps({"meta": {}, "rows": rows})
        (tmp_path / "suite.json").write_text(earlier)
        suite = running.Suite(tmp_path, work=tmp_path, failed=tmp_path / "suite.json")
        outcome = device_tests.tests_failed(suite, 80)
        left_out = next(argument for argument in asked if argument.startswith("--passed="))
        files = [argument.removeprefix("tests/") for argument in asked if argument.startswith("tests/")]
        return files, json.loads(Path(left_out.partition("=")[2]).read_text()), outcome

    return second_tests


def test_the_second_plan_tests_what_failed_in_the_first(second_tests):
    files, left_out, _ = second_tests({"failures": FAILURES, "passed": PASSED, "complete": True})
    assert files[:4] == [
        "kernels/test_steps.py",
        "test_ops.py",
        "adapters/test_peft.py",
        "functional/test_functional.py",
    ]
    assert files[-1] == device_tests.HUGE_FILE and "kernels/test_bounds.py" not in files and left_out == PASSED


@pytest.mark.parametrize(
    "earlier",
    (
        {"failures": FAILURES, "passed": PASSED, "complete": False},  # its time was up
        {"failures": None, "passed": None, "complete": False},  # the junit file is broken
        {"skipped": "3 s left; expected 40 or more"},
    ),
    ids=("out-of-time", "no-junit-file", "skipped"),
)
def test_the_second_plan_tests_what_the_first_did_not_come_to(earlier, second_tests):
    files, left_out, outcome = second_tests(earlier)
    assert set(device_tests.CORE) <= set(files) and len(set(files)) == len(files)
    assert left_out == (earlier.get("passed") or []) and outcome["ok"]


def test_without_the_earlier_result_everything_is_tested(second_tests, tmp_path):
    for broken in ("not json", "[]", "{}"):
        files, left_out, outcome = second_tests(broken)
        assert set(files) == {*device_tests.CORE, *device_tests.files()} and left_out == []
        assert outcome["ok"] and "suite.json" in outcome["note"]
    suite = running.Suite(tmp_path, work=tmp_path, failed=tmp_path / "nowhere.json")
    assert "nowhere.json: FileNotFoundError" in device_tests.tests_failed(suite, 80)["note"]


@pytest.mark.parametrize(
    ("status", "end", "complete"), ((0, "", True), (1, "", True), (1, "session-timeout: 40", False), (None, "", False))
)
def test_a_test_run_that_was_cut_short_is_not_complete(status, end, complete, tmp_path, monkeypatch):
    def run(self, name, command, *more):
        (tmp_path / "tests_core.xml").write_text("<testsuite/>")
        (tmp_path / "log").write_text(f"9 passed {end}")
        return running.CommandRun(status, tmp_path / "log")

    monkeypatch.setattr(running.Suite, "run", run)
    assert device_tests.tests_core(running.Suite(tmp_path, work=tmp_path), 80)["complete"] is complete


@pytest.fixture
def pretended_table():
    """The path of the pretended card's table in the package, in which a run under the pretence leaves one."""
    path = benchmarks.tuned.configs.tuned_path("Pretended NVIDIA H100 80GB HBM3")
    assert not path.exists()
    yield path
    path.unlink(missing_ok=True)
    if path.parent.exists() and not any(path.parent.iterdir()):
        path.parent.rmdir()


@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends to have a GPU")
def test_the_first_plan_runs_in_order_on_a_pretended_gpu(tmp_path, pretended_table):
    """At its own sizes, which nothing computes: four minutes of starting what a GPU would be asked."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tools.pretended_gpu", "--idle", str(ROOT / "tools" / "gpu_suite.py")]
    command += ["--plan", "first", "--seconds", "600", "--out", str(tmp_path), "--commit", "rehearsed"]
    done = subprocess.run(command, env=environment, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode in (0, 1), done.stderr
    rows = {row["stage"]: row for row in json.loads((tmp_path / "suite.json").read_text())["rows"]}
    assert list(rows) == PLAN_NAMES["first"] and not any("skipped" in row for row in rows.values())
    for name in ("facts", "kernels", "ways", "head", "decisive", "save"):
        assert rows[name]["ok"] and not rows[name].get("not_measured"), (name, rows[name])
    assert rows["warm"]["rows"] > 0 and rows["probe"]["rows"] > 0
    assert rows["tests_core"]["counts"]["passed"] > 0 and rows["tests_core"]["failures"] == {}
    saving.unpack_results(tmp_path / saving.RESULTS, tmp_path / "results")
    assert "-" not in [line.split()[-1] for line in telling.telling(tmp_path / "results", "first")]
    ways = benchmarks.read(tmp_path / "results" / "ways.json")["rows"]
    assert len(ways) == 10 * len(shapes.WAY_SHAPES) and all(row["timed"] and row["us"] for row in ways)
    assert len(benchmarks.tuned.read(pretended_table)["ways"]) == len(shapes.WAY_SHAPES)
    sums = telling._rows(tmp_path / "results", "probe", section="overlap", mechanism="own GEMM, 128 programs", ok=True)
    assert len(sums) == 3 and all("hidden" in row for row in sums)
