"""The table of tuned configurations: what is chosen, how it is written, what the package makes of it."""

import concurrent.futures
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.lib import tuned
from dora_kernels.cli import stopping
from dora_kernels.planning import configs, devices
from dora_kernels.planning.devices import DeviceFacts
from dora_kernels.planning.tiles import Config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import candidates  # noqa: E402
import precompile  # noqa: E402
import tune  # noqa: E402
from compile_kernels import Compiled  # noqa: E402

H200 = DeviceFacts("NVIDIA H200", "sm_90", 132)
DEFAULTS = configs.CONFIGS["sm_90", 2]
NORM = tune.fields_of(DEFAULTS["norm"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the package looks for tables."""
    monkeypatch.setattr(configs, "TUNED_FOLDER", tmp_path)
    configs.tuned_configs.cache_clear()
    yield tmp_path
    configs.tuned_configs.cache_clear()


def write(folder: Path, table: object) -> None:
    (folder / "nvidia-h200.json").write_text(json.dumps({"meta": {}, "configs": table}))
    configs.tuned_configs.cache_clear()


def norm_config(operand: torch.dtype = torch.bfloat16, facts: DeviceFacts = H200) -> Config:
    return configs.config_for("norm", facts, operand)


def test_a_tuned_configuration_is_used_on_its_gpu_for_its_operands(folder):
    assert norm_config() == DEFAULTS["norm"]
    write(folder, {"2": {"norm": NORM | {"BLOCK_N": 128, "num_stages": 4}}})
    assert norm_config() == replace(DEFAULTS["norm"], BLOCK_N=128, num_stages=4)
    assert norm_config(torch.float16) == norm_config()
    assert norm_config(torch.float32) == configs.CONFIGS["sm_90", 4]["norm"]
    assert configs.config_for("merge", H200, torch.bfloat16) == DEFAULTS["merge"]
    assert norm_config(facts=DeviceFacts("NVIDIA H100 80GB HBM3", "sm_90", 132)) == DEFAULTS["norm"]


def test_the_file_of_a_gpu():
    names = {"NVIDIA H200": "nvidia-h200", "RTX 6000 / Ada (x)": "rtx-6000-ada-x", "../a": "a"}
    assert {name: configs.tuned_path(name).stem for name in names} == names
    assert configs.tuned_path("NVIDIA H200").parent == ROOT / "dora_kernels" / "planning" / "tuned"


@pytest.mark.parametrize(
    "change",
    (
        {"BLOCK_N": 96},
        {"BLOCK_N": 8},
        {"BLOCK_N": -64},
        {"BLOCK_N": 64.0},
        {"BLOCK_N": "64"},
        {"BLOCK_N": None},
        {"BLOCK_M": 64},
        {"num_warps": 3},
        {"num_warps": 32},
        {"num_warps": True},
        {"num_stages": 0},
        {"num_stages": 9},
        {"waves": 0},
        {"BLOCK_Q": 64},
    ),
    ids=str,
)
def test_a_field_that_could_make_a_wrong_launch_means_defaults(change, folder, caplog):
    write(folder, {"2": {"merge": tune.fields_of(DEFAULTS["merge"]) | {"num_stages": 3}, "norm": NORM | change}})
    with caplog.at_level(logging.WARNING, "dora_kernels"):
        assert norm_config() == DEFAULTS["norm"]
        assert configs.config_for("merge", H200, torch.bfloat16) == DEFAULTS["merge"]
    assert len(caplog.records) == 1 and "nvidia-h200.json" in caplog.records[0].getMessage()


def test_a_bound_on_registers_means_defaults_on_amd(folder, caplog):
    """Triton's backend there knows no maxnreg: a launch with one raises."""
    facts, default = DeviceFacts("AMD Instinct MI300X", "gfx942", 304), configs.CONFIGS["gfx942", 2]["norm"]
    table = {"configs": {"2": {"norm": tune.fields_of(default) | {"num_stages": 3}}}}

    def tuned() -> Config:
        (folder / "amd-instinct-mi300x.json").write_text(json.dumps(table))
        configs.tuned_configs.cache_clear()
        return norm_config(facts=facts)

    assert tuned() == replace(default, num_stages=3)
    table["configs"]["2"]["norm"]["maxnreg"] = 128
    with caplog.at_level(logging.WARNING, "dora_kernels"):
        assert tuned() == default
    assert len(caplog.records) == 1 and "expected none on gfx942" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    "text",
    ("", "{", "[]", "null", '{"configs": []}', '{"configs": {"3": {"norm": {}}}}')
    + ('{"configs": {"2": {"gemm": {}}}}', '{"configs": {"2": {"norm": []}}}', '{"configs": {"two": {"norm": {}}}}'),
)
def test_a_broken_table_means_defaults_and_is_logged_once(text, folder, caplog):
    (folder / "nvidia-h200.json").write_text(text)
    configs.tuned_configs.cache_clear()
    with caplog.at_level(logging.WARNING, "dora_kernels"):
        assert norm_config() == DEFAULTS["norm"] and norm_config(torch.float32) == configs.CONFIGS["sm_90", 4]["norm"]
    assert len(caplog.records) == 1


def test_a_missing_table_is_read_once_and_says_nothing(folder, caplog):
    with caplog.at_level(logging.DEBUG, "dora_kernels"):
        norm_config()
    (folder / "nvidia-h200.json").write_text("{")
    norm_config()
    assert not caplog.records


@pytest.mark.parametrize(
    "path", sorted((ROOT / "dora_kernels" / "planning" / "tuned").glob("*.json")), ids=lambda path: path.stem
)
def test_every_table_of_the_package_is_whole(path, monkeypatch, caplog):
    table = json.loads(path.read_text())
    configs.tuned_configs.cache_clear()
    tuned = configs.tuned_configs(table["meta"]["device"], "sm_90")
    assert len(tuned) == sum(map(len, table.get("configs", {}).values())) and not caplog.records


def test_candidates_are_configurations_of_their_kernels():
    for size in tune.PRECISIONS:
        defaults = configs.CONFIGS["sm_90", size]
        for kernel, subject in tune.SUBJECTS.items():
            found = candidates.candidates(kernel, defaults[kernel], "sm_90")
            assert found[0] == defaults[kernel] and len(set(found)) == len(found) > 8
            for config in found:
                assert configs._checked(tune.fields_of(config), defaults[kernel], "sm_90") == config
            ranks = [R for _, _, _, _, R in subject.jobs]
            # what is judged at low and high ranks at once has no winner
            high = kernel.endswith("high_rank")
            assert min(ranks) > configs.HIGH_RANK if high else max(ranks) <= configs.HIGH_RANK


def test_amd_is_given_no_bound_on_registers():
    default = replace(DEFAULTS["epilogue"], maxnreg=None)
    bounded = [config for config in candidates.candidates("epilogue", default, "sm_90") if config.maxnreg]
    assert bounded and not any(config.maxnreg for config in candidates.candidates("epilogue", default, "gfx942"))


def compiled(registers: int = 100, spills: int = 0, shared: int = 1024, programs: int = 2, **more) -> Compiled:
    figures = {"registers": registers, "spills": spills, "shared": shared, "programs": programs}
    return Compiled(**figures, limited_by="registers", **more)


@pytest.fixture
def one_core(monkeypatch):
    """A function: figures of the compiler, of a list of kernels for each candidate -> judged, compiled in turn."""

    def judge(*given: list[Compiled]) -> precompile.Judged:
        target = precompile.TARGETS["sm_90"]
        # a kernel is given by its figures
        settings = {"work": SimpleNamespace(waves=2), "beside": False, "in_gluon": lambda: False}
        kernel = SimpleNamespace(name="_kernel", target=target, **settings)
        room = {16 << place: figures for place, figures in enumerate(given)}
        monkeypatch.setattr(
            precompile,
            "launched_by",
            lambda candidate: [SimpleNamespace(**vars(kernel), found=one) for one in room[candidate.config.BLOCK_N]],
        )
        monkeypatch.setattr(precompile.compile_kernels, "compile_ahead", lambda one: one.found)
        monkeypatch.setattr(
            precompile, "in_all_cores", lambda function, items, *_: dict(enumerate(map(function, items)))
        )
        wanted = [precompile.Trial("norm", Config(BLOCK_N=size), 2, target) for size in room]
        return precompile.judge(wanted, 1, seconds=60)["norm"]

    return judge


def test_a_signal_ends_the_compilation_of_all(heard_signals):
    """Not the line that says so alone: the process waited for all that was still to be compiled."""
    children = set(multiprocessing.active_children())
    with pytest.raises(stopping.Stopped), stopping.unwinding():
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        precompile.in_all_cores(lambda item: time.sleep(60), range(4), 2, time.monotonic() + 60)
    end = time.monotonic() + 30
    while set(multiprocessing.active_children()) - children and time.monotonic() < end:
        time.sleep(0.01)
    assert time.monotonic() < end


def test_only_what_compiles_spills_nothing_and_fits_is_tried(one_core):
    fine = compiled()
    found = one_core(
        [fine, compiled(spills=696, shared=1 << 20, programs=0)],
        [fine, compiled(spills=64)],
        [fine, compiled(spills=68)],
        [compiled(shared=232449, programs=0), fine],
        [fine, Compiled(error="out of registers")],
        [fine, compiled(faults=("no barrier",)), compiled(programs=1)],
    )
    sizes = [config.BLOCK_N for config in found.tried]
    assert sizes == [16, 32], "the default is timed all the same: there is nothing else to compare with"
    assert {config.BLOCK_N: why for config, why in found.refused.items()} == {
        64: "spills",
        128: "over the limit",
        256: "does not compile: out of registers",
        512: "no barrier; waves=2, and a multiprocessor holds 1 (registers)",
    }


def test_candidates_have_a_part_of_the_seconds_to_be_compiled_in(monkeypatch):
    """Else those of a cold cache would take all of them, and nothing would be timed."""
    told = []

    def judge(wanted, processes, seconds):
        told.append(seconds)
        raise KeyboardInterrupt

    threads = concurrent.futures.ThreadPoolExecutor(1)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", lambda *given: threads)
    monkeypatch.setattr(precompile, "card", lambda: ("NVIDIA H200", precompile.TARGETS["sm_90"]))
    monkeypatch.setattr(precompile, "judge", judge)
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--seconds", "30", "--kernel", "low"])
    assert told == [30 * tune.COMPILING] and 0 < tune.COMPILING < 1


def test_the_worst_of_what_a_kernel_is_compiled_for_is_kept(one_core):
    found = one_core([compiled(registers=128, shared=65536), compiled(registers=150, programs=3)])
    assert found.tried == {Config(BLOCK_N=16): {"_kernel": (150, 0, 65536, 2)}}


A, B, C = (Config(BLOCK_N=size) for size in (16, 32, 64))


def test_the_fastest_over_all_shapes_wins_by_more_than_3_percent():
    assert tune.choose(A, {A: [1.0, 2.0], B: [0.9, 1.8], C: [0.8, 2.0]}) == (C, pytest.approx(0.8**0.5))
    assert tune.choose(A, {A: [1.0, 2.0], B: [0.98, 1.95]}) == (A, 1.0)
    assert tune.choose(A, {A: [1.0, 2.0], B: [0.96, 1.92]}) == (B, pytest.approx(0.96))


def test_no_shape_pays_for_another():
    assert tune.choose(A, {A: [1.0, 2.0], B: [0.5, 2.06], C: [0.9, 2.0]}) == (C, pytest.approx(0.9**0.5))


def test_a_wrong_candidate_never_wins_and_a_wrong_default_says_so():
    assert tune.choose(A, {A: [1.0], B: None, C: [0.99]}) == (A, 1.0)
    with pytest.raises(ValueError, match="choose: the default .* was wrong or refused"):
        tune.choose(A, {A: None, B: [1.0]})


# of each kernel the default, one more, and one that is wrong; and one that is not tried
TRIED = {
    name: precompile.Judged(
        {config: {"_kernel": (128, 0, 4096, 2)} for config in (DEFAULTS[name], OTHER, replace(OTHER, num_stages=1))},
        {replace(OTHER, num_warps=1): "spills"},
    )
    for name, OTHER in ((name, replace(DEFAULTS[name], num_warps=16)) for name in ("norm", "merge"))
}


def run_tune(path, times, seconds=100.0, commit="c1", clock=lambda: 0.0, fresh=False):
    """(left out, kernels measured) of tune.tune, the second candidate taking `times[kernel]` of the default's time."""
    measured = []

    def measure(kernel, operand_bytes, configs):
        measured.append(kernel)
        found = {config: [times[kernel] if place == 1 else 1.0] for place, config in enumerate(configs)}
        return found | {configs[-1]: None}

    return tune.tune(TRIED, 2, measure, path, {"commit": commit}, seconds, fresh, clock), measured


def second(kernel: str) -> dict[str, int]:
    return tune.fields_of(list(TRIED[kernel].tried)[1])


def test_only_winners_are_written_and_the_package_reads_them(folder):
    path = folder / "nvidia-h200.json"
    assert run_tune(path, {"norm": 0.8, "merge": 0.99}) == ([], ["norm", "merge"])
    table = json.loads(path.read_text())
    assert table["configs"] == {"2": {"norm": second("norm")}}
    assert table["measured"]["2"]["merge"]["over_default"] == 1.0
    record = table["measured"]["2"]["norm"]
    assert record["jobs"] == ["norm 16x4096x4096x64", "norm 16x8192x8192x64"] and record["commit"] == "c1"
    fields = [tune.fields_of(config) for config in TRIED["norm"].tried]
    assert record["times"] == list(map(list, zip(fields, [[1.0], [0.8], None], strict=True)))
    assert record["tried"] == 2 and [found[0] for found in record["compiled"]] == fields
    assert record["compiled"][0][1] == {"_kernel": [128, 0, 4096, 2]}
    assert record["refused"] == [[fields[1] | {"num_warps": 1}, "spills"]]
    configs.tuned_configs.cache_clear()
    assert norm_config() == Config(**second("norm")) != DEFAULTS["norm"]


def test_a_partial_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "t.json"
    ticks = iter((0.0, 0.0, 10.0))  # the start, before norm, before merge
    assert run_tune(path, {"norm": 0.8}, seconds=5, clock=lambda: next(ticks)) == (["merge"], ["norm"])
    assert run_tune(path, {"norm": 0.8, "merge": 0.7}) == ([], ["merge"])
    assert set(json.loads(path.read_text())["configs"]["2"]) == {"norm", "merge"}
    # another commit measures again, and takes back what no longer wins
    assert run_tune(path, {"norm": 1.0, "merge": 0.7}, commit="c2") == ([], ["norm", "merge"])
    assert set(json.loads(path.read_text())["configs"]["2"]) == {"merge"}
    assert run_tune(path, {"norm": 1.0, "merge": 0.7}, commit="c2", fresh=True)[1] == ["norm", "merge"]


def test_a_table_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "tuned" / "t.json"
    table = {"meta": {}, "configs": {"2": {}}, "measured": {}, "ways": []}
    tuned.write(path, table)
    before = path.read_text()
    with pytest.raises(ValueError):
        tuned.write(path, {"configs": {"2": {"norm": float("nan")}}})
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tuned.write(path, {"configs": {}})
    assert path.read_text() == before
    assert tuned.read(path) == table


@pytest.mark.parametrize("text", ("{", "[]", '"ways"', ""))
def test_of_a_broken_table_there_is_nothing(text, tmp_path):
    (tmp_path / "t.json").write_text(text)
    assert tuned.read(tmp_path / "t.json") == tuned.read(tmp_path / "none.json") == {}


def test_a_part_that_is_not_what_it_should_be_costs_itself_alone(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps({"configs": [], "measured": {"2": {}}, "ways": {}, "more": 1}))
    assert tuned.read(tmp_path / "t.json") == {"measured": {"2": {}}}


def way(M: int, us: float) -> dict:
    return {"M": M, "N": 4096, "K": 4096, "R": 64, "forward": {"split": us}}


def test_tuning_keeps_what_was_measured_of_ways(tmp_path):
    path = tmp_path / "t.json"
    tuned.write(path, {"configs": {}, "ways": [way(8192, 1.0)]})
    run_tune(path, {"norm": 0.8, "merge": 0.7})
    assert tuned.read(path)["ways"] == [way(8192, 1.0)] and tuned.read(path)["configs"]["2"]


def test_a_table_is_entered_part_by_part(folder, capsys):
    package, card = folder / "nvidia-h200.json", {"device": "NVIDIA H200"}
    new = folder / "new.json"
    tuned.write(new, {"meta": card, "ways": [way(8192, 1.0), way(512, 1.0)]})
    assert tuned.main([str(new)]) == 0
    assert tuned.read(package) == {"meta": card, "ways": [way(8192, 1.0), way(512, 1.0)]}
    best = {"2": {"norm": second("norm")}}
    tuned.write(new, {"meta": card | {"commit": "c1"}, "configs": best, "measured": {"2": {}}})
    assert tuned.enter(new) == package
    assert tuned.read(package)["configs"] == best and len(tuned.read(package)["ways"]) == 2
    tuned.write(new, {"meta": card, "ways": [way(8192, 2.0)]})
    tuned.enter(new)
    assert tuned.read(package)["ways"] == [way(512, 1.0), way(8192, 2.0)] and tuned.read(package)["configs"] == best
    new.write_text("{")
    assert tuned.main([str(new)]) == 1 and "is no table" in capsys.readouterr().err


@pytest.mark.skipif(not devices.interpreting(), reason="tiny jobs for the interpreter")
def test_candidates_are_checked_on_the_real_kernels(monkeypatch):
    subject = replace(tune.SUBJECTS["merge"], jobs=(("merge", 16, 40, 24, 8),))
    monkeypatch.setitem(tune.SUBJECTS, "merge", subject)
    default = configs.CONFIGS["interpreter", 2]["merge"]
    other, broken = replace(default, BLOCK_N=64), replace(default, BLOCK_N=48)
    used = []
    config_for = configs.config_for
    call = tune.kernels.TIMED["merge"]

    def spy(operands, steps):
        used.append(configs.config_for("merge", devices.device_facts(torch.device("cpu")), torch.bfloat16))
        return call(operands, steps)

    for calls in (tune.kernels.CALLS, tune.kernels.TIMED):
        monkeypatch.setitem(calls, "merge", spy)
    times = tune.measure_on(torch.device("cpu"), 0, (1, 1))("merge", 2, [default, other, broken])
    assert times[broken] is None and len(times[default]) == len(times[other]) == 1
    assert 0 < times[default][0] < 60  # seconds
    assert {default, other, broken} <= set(used) and configs.config_for is config_for


# prints what is tried of each subject on sm_90
PRECOMPILE = """
import json, os, sys
import precompile
from dataclasses import replace
most, *names = sys.argv[1:]
for name in names:
    subject = precompile.SUBJECTS[name]
    precompile.SUBJECTS[name] = replace(subject, values=subject.values[:int(most) or None])
wanted = precompile.candidates_of(names, 2, precompile.TARGETS["sm_90"])
# a default is tried whatever it is; the second time its faults are told
defaults = precompile.configs.CONFIGS["sm_90", 2]
wanted += [candidate for candidate in wanted if candidate.config == defaults[candidate.subject]]
judged = precompile.judge(wanted, os.cpu_count(), seconds=3000)
assert precompile.card()[0] == ""
for name in names:
    print(name, judged[name].refused, file=sys.stderr)
    assert next(iter(judged[name].tried)) not in judged[name].refused, name
print(json.dumps({name: len(judged[name].tried) for name in names}))
"""


def tried(folder: Path, most: int, *names: str) -> dict[str, int]:
    """Subject -> candidates that are tried on sm_90, of the first `most` or, for 0, all."""
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")]), "CUDA_VISIBLE_DEVICES": ""}
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-c", PRECOMPILE, str(most), *names]
    done = subprocess.run(command, env=env | {"TRITON_CACHE_DIR": str(folder)}, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.nightly
def test_candidates_are_compiled_ahead_and_failures_are_told(tmp_path):
    assert tried(tmp_path, 2, "merge") == {"merge": 3}
    assert list(tmp_path.rglob("_merge_kernel.cubin"))


@pytest.mark.nightly
def test_of_every_subject_enough_is_left_to_choose_from(tmp_path):
    left = tried(tmp_path, 0, *tune.SUBJECTS)
    assert left.keys() == tune.SUBJECTS.keys() and min(left.values()) >= 8, left


def test_fields_of_a_configuration_make_it_again():
    assert Config(**tune.fields_of(A)) == A and asdict(A)["BLOCK_M"] is None and "BLOCK_M" not in tune.fields_of(A)
