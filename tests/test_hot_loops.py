"""What tools/hot_loops.py asks of loads on sm_90, and what its table says."""

import importlib.util
import pathlib
import sys
from types import SimpleNamespace

ROOT = pathlib.Path(__file__).parent.parent


def _load(name: str):
    """A file of tools/ as a module; tools/ is no package."""
    spec = importlib.util.spec_from_file_location(f"{name}_under_test", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses looks its module up
    spec.loader.exec_module(module)
    return module


hot_loops, machine_code = _load("hot_loops"), _load("machine_code")


def _compiled(*loads: tuple, name: str = "_other_kernel", rank: int = 64, loops: dict | None = None, **constants):
    """(job, compiled) with these loads (loop, argument, bytes, asynchronous); the machine code has them too."""
    loads = [machine_code.Load(*load) for load in loads]
    if loops is None:
        loops = {}
        for load in loads:
            kind = f"{'LDGSTS' if load.asynchronous else 'LDG'}.{8 * load.bytes}"
            loops.setdefault(load.loop, {})[kind] = 1
    specialization = SimpleNamespace(
        name=name,
        target=SimpleNamespace(name="sm_90", multiprocessors=132),
        grid=(64, 4),
        constants=lambda: constants,
        flags=lambda: "dense",
        tiles=lambda: "BLOCK_N=64 warps=4 stages=3",
    )
    job = SimpleNamespace(variant="bf16", rank=rank, call="train", shape=(8192, 4096, 4096))
    job.specialization = specialization
    resources = {"registers": 140, "spills": 0, "shared": 65536, "programs": 3, "limited_by": "registers", "error": ""}
    return job, SimpleNamespace(loops=loops, loads=loads, **resources)


def _complaints(*results, everything: bool = False) -> list[str]:
    return [line.partition("sm_90: ")[2] or line for line in hot_loops.complaints(results, everything)]


def test_a_load_in_a_loop_is_asynchronous_and_of_16_bytes():
    assert not _complaints(_compiled(("1", "columns_ptr", 16, True), ("", "columns_ptr", 2, False)))
    found = _complaints(_compiled(("1", "kept_ptr", 16, False), ("1.1", "columns_ptr", 8, True)))
    assert found == ["kept_ptr is loaded synchronously", "columns_ptr is loaded in 8 bytes a thread, expected 16"]


def test_without_a_loop_all_loads_count():
    assert _complaints(_compiled(("", "kept_ptr", 16, False))) == ["kept_ptr is loaded synchronously"]


def test_rows_of_8_numbers_may_come_in_halves():
    assert not _complaints(_compiled(("1", "low_ptr", 8, True), rank=8))
    assert _complaints(_compiled(("1", "low_ptr", 4, True), rank=8))
    assert _complaints(_compiled(("1", "low_ptr", 8, True), rank=64))
    assert _complaints(_compiled(("1", "columns_ptr", 8, True), rank=8)), "its rows are long"


def test_loads_that_only_the_machine_code_has_are_noticed():
    read = _compiled(("1", "columns_ptr", 16, True), loops={"": {"LDG.32": 1}, "1": {"LDGSTS.128": 4, "LDG.128": 1}})
    assert _complaints(read) == ["LDG.128 is not in the PTX"]
    merged = _compiled(("", "weight_ptrs[0]", 16, False), name="_merge_kernel", loops={"": {"LDG.8": 1}})
    assert _complaints(merged) == ["LDG.8 is not in the PTX"], "no exemption covers it"


def test_an_exemption_covers_its_kernel_argument_and_condition_alone(monkeypatch):
    entry = hot_loops.Exemption("norm", "weight_ptrs.[12]", "why", lambda one: one.constants()["FORMAT"] == "hqq4")
    monkeypatch.setattr(hot_loops, "EXEMPTIONS", (entry,))
    gather = ("1", "weight_ptrs[1]", 2, False)
    assert not _complaints(_compiled(gather, name="_norm_kernel", FORMAT="hqq4"), everything=True)
    assert _complaints(_compiled(gather, name="_norm_kernel", FORMAT="dense"))
    assert _complaints(_compiled(gather, name="_merge_kernel", FORMAT="hqq4"))
    assert _complaints(_compiled(("1", "weight_ptrs[0]", 2, False), name="_norm_kernel", FORMAT="hqq4"))


def test_an_exemption_that_nothing_needs_is_complained_of(monkeypatch):
    entries = hot_loops.Exemption("*", "gain_ptr", "first"), hot_loops.Exemption("epilogue", "gain_ptr", "second")
    monkeypatch.setattr(hot_loops, "EXEMPTIONS", entries)
    needs_the_first = _compiled(("", "gain_ptr", 4, False), name="_epilogue_kernel")
    assert not _complaints(needs_the_first)
    found = _complaints(needs_the_first, everything=True)
    assert found == ["hot_loops.EXEMPTIONS: nothing needs epilogue gain_ptr (second)"]


def test_the_table_has_a_row_for_what_is_outside_and_for_each_loop():
    counts = {"": {"other": 7}, "1": {"integer": 5, "predicate": 2, "LDG.128": 8, "BAR": 5, "other": 1}}
    inner = {"LDGSTS.128": 8, "STS.32": 1, "SHFL": 4, "HGMMA.64x128x16": 4}
    outside, outer, inner = (
        dict(zip(hot_loops.HEADER, row, strict=True))
        for row in hot_loops.rows(*_compiled(loops=counts | {"1.1": inner}), every=True)
    )
    assert (outside["kernel"], outside["target"], outside["M, N, K, R"]) == ("other", "sm_90", "8192, 4096, 4096, 64")
    assert (outside["registers"], outside["programs"]) == ("140", "3 (registers)")
    assert (outside["grid"], outside["waves"], outside["loop"], outside["instructions"]) == ("64x4", "0.65", "-", "7")
    assert (outer["kernel"], outer["loop"]) == ("", "1")
    assert (outer["instructions"], outer["int+pred"], outer["BAR"], outer["SHFL"]) == ("21", "7", "5", "0")
    assert outer["device memory"] == "8 LDG.128" and not outer["shared memory"] and not outer["tensor cores"]
    assert (inner["kernel"], inner["loop"], inner["instructions"], inner["SHFL"]) == ("", "1.1", "17", "4")
    assert (inner["device memory"], inner["shared memory"]) == ("8 LDGSTS.128", "1 STS.32")
    assert inner["tensor cores"] == "4 HGMMA.64x128x16"


def test_a_kernel_without_a_loop_has_one_row_and_others_one_for_each_loop():
    def loops(**found: dict) -> list[str]:
        return [row[hot_loops.HEADER.index("loop")] for row in hot_loops.rows(*_compiled(loops={"": {}} | found))]

    assert loops() == ["-"]
    assert loops(**{"1": {}, "1.1": {}}) == ["1", "1.1"]
