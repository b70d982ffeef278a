"""The tables of what was measured on a GPU, whatever stands in their place: no call raises, none waits."""

import json
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dora_kernels.planning import configs, measured
from dora_kernels.planning.configs import CONFIGS, Config, config_for, tuned_configs
from dora_kernels.planning.measured import PARTS, fastest, table_of
from tests.support import hostile_files as hostile
from tests.support.hostile_files import TEXTS, any_json, bounded, depths, render, spoilt
from tests.support.tuned_tables import H200, entry, forget_tables

FIELDS = {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 64, "num_warps": 4, "num_stages": 3}
TABLE = {
    "meta": {"gpu": H200.name},
    "configs": {"2": {"norm": FIELDS}},
    "ways": [entry(forward={"split": 463.0, "fused": 441.5}, backward={"none": 2.0, "all": 1.0}), entry(M=1)],
}
# Triton makes no block of more elements, and a GPU has no more threads in a block, which are 32 to a warp.
MOST_ELEMENTS, MOST_WARPS = 2**20, 32


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "TUNED_FOLDER", tmp_path)
    yield configs.tuned_path(H200.name)
    forget_tables()


def read():
    """What a call reads of both parts, in a process that is new."""
    forget_tables()
    with bounded(5, 1024):
        tuned, table = tuned_configs(H200.name, H200.target), table_of(H200.name)
        for part, ways in PARTS.items():
            assert fastest(table.entries, part, (4096, 4096, 64), ways[0]) in ways
        for kernel in CONFIGS[H200.target, 2]:
            assert config_for(kernel, H200, torch.bfloat16) in (tuned.get((2, kernel)), CONFIGS[H200.target, 2][kernel])
    return tuned, table


def check(path, content):
    path.write_bytes(content)
    tuned, table = read()
    for (size, kernel), config in tuned.items():
        default = CONFIGS[H200.target, size][kernel]
        assert type(config) is Config
        blocks = {name: getattr(config, name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R")}
        elements = 1
        for name, value in blocks.items():
            assert (value is None) == (getattr(default, name) is None)
            assert value is None or (type(value) is int and value >= 16 and value & (value - 1) == 0)
            elements *= value if value is not None and name != "BLOCK_R" else 1
        assert elements <= MOST_ELEMENTS and all(value is None or value <= 4096 for value in blocks.values())
        assert type(config.num_warps) is int and 1 <= config.num_warps <= MOST_WARPS
    for one in table.entries:
        assert all(type(size) is int and 0 < size < 2**31 for size in (one.M, one.N, one.K, one.R))
        times = [time for part in PARTS for time in getattr(one, part) if time is not None]
        assert all(type(time) in (int, float) and 0 < time < float("inf") for time in times)
    return tuned, table


def test_the_table_itself_is_read(place):
    tuned, table = check(place, render(TABLE).encode())
    assert len(tuned) == 1 and len(table.entries) == 2


@depths
@pytest.mark.parametrize("part", ["any", "configs", "ways"])
def test_tables_of_any_json(place, depth, part, caplog):
    caplog.set_level(logging.CRITICAL)

    @depth(30)
    @given(document=any_json)
    def holds(document):
        check(place, render(document if part == "any" else TABLE | {part: document}).encode("utf-8", "surrogatepass"))

    holds()


@depths
def test_tables_with_a_wrong_part(place, depth, caplog):
    caplog.set_level(logging.CRITICAL)
    sizes = st.sampled_from((16, 17, 32, 48, 2**12, 2**20, 2**31, 2**60, 2**64, 2**400, 1, 0, True, 64.0, "64"))

    @depth(120)
    @given(document=spoilt(TABLE, sizes | hostile.leaves))
    def holds(document):
        check(place, render(document).encode("utf-8", "surrogatepass"))

    holds()


@pytest.mark.parametrize("field", ["BLOCK_N", "BLOCK_K", "BLOCK_R", "num_warps", "num_stages", "maxnreg", "waves"])
def test_numbers_that_no_launch_could_take(place, field, caplog):
    caplog.set_level(logging.CRITICAL)
    for value in (2**13, 2**20, 2**31, 2**60, 2**64, 2**400, -16, 0, 64.0, "64", True, [64], {}, render):
        value = hostile.Raw("1e999") if value is render else value
        tuned, table = check(place, render(TABLE | {"configs": {"2": {"norm": FIELDS | {field: value}}}}).encode())
        assert tuned == {} and len(table.entries) == 2, "the other part counts"


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_of_a_table(place, name):
    check(place, TEXTS[name](render(TABLE).encode()))


@pytest.mark.parametrize("name", hostile.PLACES)
def test_something_else_in_a_tables_place(place, name):
    place.write_text(json.dumps(TABLE))
    hostile.PLACES[name](place)
    mode = place.parent.stat().st_mode
    try:
        with hostile.as_nobody() if "permission" in name else bounded(60):
            tuned, table = read()
    finally:
        place.parent.chmod(0o700 | mode)
    assert tuned == {} and table is measured.NOTHING


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "../../x", "", "é", "\n", "/dev/zero", "\ud800"])
def test_the_name_of_a_gpu(place, name):
    forget_tables()
    with bounded(5):
        assert tuned_configs(name, H200.target) == {} and table_of(name) is measured.NOTHING


def test_one_warning_for_what_is_ignored(place, caplog):
    for text in (b"[" * 10**5, b"{", b"\xff", render(TABLE | {"ways": 3, "configs": 4}).encode()):
        caplog.clear()
        place.write_bytes(text)
        read()
        assert caplog.records and all(str(place) in record.message for record in caplog.records)
        assert all(len(record.message) < 1000 for record in caplog.records)
