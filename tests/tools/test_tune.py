"""The table of tuned configurations: what is chosen, how it is written, what the package makes of it."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dora_kernels.planning import configs, devices
from dora_kernels.planning.configs import Config
from dora_kernels.planning.devices import DeviceFacts

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import candidates  # noqa: E402
import tune  # noqa: E402

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


@pytest.mark.parametrize(
    "text",
    ("", "{", "[]", "null", '{"meta": {}}', '{"configs": []}', '{"configs": {"3": {"norm": {}}}}')
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
    assert len(tuned) == sum(len(kernels) for kernels in table["configs"].values()) and not caplog.records


def test_candidates_are_configurations_that_can_run():
    for size in tune.PRECISIONS:
        defaults = configs.CONFIGS["sm_90", size]
        for kernel, subject in tune.SUBJECTS.items():
            found = tune.candidates(kernel, defaults[kernel], size, 232448)
            assert found[0] == defaults[kernel] and len(set(found)) == len(found)
            assert 8 <= len(found) <= 16, (kernel, size)
            for config in found:
                assert configs._checked(tune.fields_of(config), defaults[kernel]) == config
            ranks = [R for _, _, _, _, R in subject.jobs]
            # what is judged at low and high ranks at once has no winner
            high = kernel.endswith("high_rank")
            assert min(ranks) > configs.HIGH_RANK if high else max(ranks) <= configs.HIGH_RANK


def test_the_largest_tile_of_a_high_rank_is_tried():
    largest = {"BLOCK_M": 128, "BLOCK_N": 256, "num_warps": 8, "num_stages": 2}
    default = replace(DEFAULTS["epilogue"], BLOCK_M=64)
    found = tune.candidates("epilogue_high_rank", default, 2, 232448)
    assert replace(default, **largest) in found and not candidates.fits("epilogue_high_rank", default, 2, 100)


def test_what_cannot_fit_is_no_candidate():
    config = Config(BLOCK_M=128, BLOCK_K=64, BLOCK_R=64, num_warps=4, num_stages=4)
    # 4 stages of 64 columns of 128 rows of x and of 64 rows of the factor, 2 bytes each: 96 KiB
    assert candidates.fits("project", config, 2, 98304) and not candidates.fits("project", config, 2, 98303)
    norm = Config(BLOCK_N=128, BLOCK_K=128, BLOCK_R=64, num_warps=4, num_stages=1)
    assert candidates.fits("norm", norm, 2, 1 << 20) and not candidates.fits(
        "norm", replace(norm, BLOCK_K=256), 2, 1 << 20
    )
    assert len(tune.candidates("project", config, 2, 98303)) < len(tune.candidates("project", config, 2, 98304))


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


def run_tune(path, times, names=("norm", "merge"), seconds=100.0, commit="c1", clock=lambda: 0.0, fresh=False):
    """(left out, kernels measured) of tune.tune, the second candidate taking `times[kernel]` of the default's time."""
    measured = []

    def measure(kernel, operand_bytes, configs):
        measured.append(kernel)
        found = {config: [times[kernel] if place == 1 else 1.0] for place, config in enumerate(configs)}
        return found | {configs[-1]: None}, {configs[0]: {"_kernel": (128, 0, 4096)}, configs[1]: {}}

    arguments = (names, 2, DEFAULTS, 232448, measure, path, {"commit": commit}, seconds, fresh, clock)
    return tune.tune(*arguments), measured


def second(kernel: str) -> dict[str, int]:
    return tune.fields_of(tune.candidates(kernel, DEFAULTS[kernel], 2, 232448)[1])


def test_only_winners_are_written_and_the_package_reads_them(folder):
    path = folder / "nvidia-h200.json"
    assert run_tune(path, {"norm": 0.8, "merge": 0.99}) == ([], ["norm", "merge"])
    table = json.loads(path.read_text())
    assert table["configs"] == {"2": {"norm": second("norm")}}
    assert table["measured"]["2"]["merge"]["over_default"] == 1.0
    record = table["measured"]["2"]["norm"]
    assert record["jobs"] == ["norm 16x4096x4096x64", "norm 16x8192x8192x64"] and record["commit"] == "c1"
    fields = [tune.fields_of(config) for config in tune.candidates("norm", DEFAULTS["norm"], 2, 232448)]
    assert [found[0] for found in record["times"]] == fields
    assert [found[1] for found in record["times"]] == [[1.0], [0.8], *[[1.0]] * (len(fields) - 3), None]
    assert record["tried"] == len(fields) - 1
    assert record["loaded"] == [[NORM, {"_kernel": [128, 0, 4096]}]]
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
    table = {"meta": {}, "configs": {"2": {}}, "measured": {}}
    tune.write_table(path, table)
    before = path.read_text()
    with pytest.raises(ValueError):
        tune.write_table(path, {"configs": {"2": {"norm": float("nan")}}})
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tune.write_table(path, {"configs": {}})
    assert path.read_text() == before
    assert tune.read_table(path) == table
    path.write_text("{")
    assert tune.read_table(path) == {"meta": {}, "configs": {}, "measured": {}}


@pytest.mark.skipif(not devices.interpreting(), reason="tiny jobs for the interpreter")
def test_candidates_are_checked_on_the_real_kernels(monkeypatch):
    subject = replace(tune.SUBJECTS["merge"], jobs=(("merge", 16, 40, 24, 8),))
    monkeypatch.setitem(tune.SUBJECTS, "merge", subject)
    default = configs.CONFIGS["interpreter", 2]["merge"]
    other, broken = replace(default, BLOCK_N=64), replace(default, BLOCK_N=48)
    used = []
    config_for = configs.config_for
    call = tune.kernels.CALLS["merge"]

    def spy(operands, steps):
        used.append(configs.config_for("merge", devices.device_facts(torch.device("cpu")), torch.bfloat16))
        return call(operands, steps)

    monkeypatch.setitem(tune.kernels.CALLS, "merge", spy)
    spilling = replace(default, num_warps=8)
    loaded = iter(({}, {("_a", "1"): (255, 696, 0)}, {}, {}, {}, {}, {}, {("_a", "2"): (255, 696, 0)}))
    monkeypatch.setattr(tune, "in_process", lambda: next(loaded))
    measure = tune.measure_on(torch.device("cpu"), 0, (1, 1))
    times, found = measure("merge", 2, [default, other, broken, spilling])
    assert times[broken] is times[spilling] is None and len(times[default]) == len(times[other]) == 1
    assert 0 < times[default][0] < 60  # seconds
    # the default is timed all the same: there is nothing else to compare with
    assert found == {default: {"_a": (255, 696, 0)}, other: {}, broken: {}, spilling: {"_a": (255, 696, 0)}}
    assert {default, other, broken} <= set(used) and configs.config_for is config_for

    # neither loads anything: what differs in waves alone has the same code, and tiles tried at low ranks are there
    loaded = iter([{}] * 6)
    more, fine = (replace(config, waves=config.waves + 1) for config in (spilling, other))
    times, found = measure("merge", 2, [default, more, fine])
    assert times[more] is None and len(times[default]) == len(times[fine]) == 1
    assert found == {default: {"_a": (255, 696, 0)}, more: {"_a": (255, 696, 0)}, fine: {}}


def test_what_a_process_has_loaded(monkeypatch):
    one, unloaded = (SimpleNamespace(n_regs=n, n_spills=174, metadata=SimpleNamespace(shared=512)) for n in (255, None))
    kernel = SimpleNamespace(device_caches={0: ({"key": one, "other": unloaded}, {}, None, None, None)})
    room = SimpleNamespace(_some_kernel=kernel, constant=1)
    monkeypatch.setitem(sys.modules, "dora_kernels.kernels.invented", room)
    assert tune.in_process()["_some_kernel", "key"] == (255, 696, 512)
    assert ("_some_kernel", "other") not in tune.in_process()


PRECOMPILE = """
import precompile
from dataclasses import replace
target = precompile.TARGETS["sm_90"]
precompile.SUBJECTS["merge"] = replace(
    precompile.SUBJECTS["merge"], values=((64, 64, 4, 2, 1),), jobs=precompile.SUBJECTS["merge"].jobs[:1]
)
wanted = precompile.specializations_of(["merge"], 2, target, target.shared_limit)
print(len(wanted), *(one.tiles() for one in wanted), sep="; ")
broken = replace(wanted[0], constexprs={})
failed = precompile.compile_all([wanted[0], broken], 2)
print(sum(error.startswith("_merge_kernel") for error in failed), precompile.card()[0] == "")
"""


@pytest.mark.nightly
def test_candidates_are_compiled_ahead_and_failures_are_told(tmp_path):
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")]), "CUDA_VISIBLE_DEVICES": ""}
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-c", PRECOMPILE]
    done = subprocess.run(command, env=env | {"TRITON_CACHE_DIR": str(tmp_path)}, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    tiles, counts = done.stdout.splitlines()
    default = "BLOCK_N=64 BLOCK_K=128 BLOCK_R=64 warps=8 stages=2"
    assert tiles == f"2; {default}; BLOCK_N=64 BLOCK_K=64 BLOCK_R=64 warps=4 stages=2"
    assert counts == "1 True"
    assert list(tmp_path.rglob("_merge_kernel.cubin"))


def test_fields_of_a_configuration_make_it_again():
    assert Config(**tune.fields_of(A)) == A and asdict(A)["BLOCK_M"] is None and "BLOCK_M" not in tune.fields_of(A)
