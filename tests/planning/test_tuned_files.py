"""The file of a GPU's measurements, whatever is in its place: ignored with one warning, and no call waits or raises."""

import json
import logging
import os

import pytest

from dora_kernels.planning import configs, measured
from tests.support.tuned_tables import H200, entry, forget_tables, pretend_table

CONFIG = {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 64, "num_warps": 4, "num_stages": 3}


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where the table of an H200 is read."""
    pretend_table(monkeypatch, tmp_path)
    path = configs.tuned_path(H200.name)
    path.unlink()
    yield path
    forget_tables()


def is_ignored(caplog):
    forget_tables()
    with caplog.at_level(logging.WARNING, "dora_kernels"):
        assert measured.table_of(H200.name) is measured.NOTHING
        assert configs.tuned_configs(H200.name, H200.target) == {}
    messages = [record.getMessage() for record in caplog.records]
    return bool(messages) and all("ignores" in message and len(message) < 800 for message in messages)


@pytest.mark.parametrize("kind", ("fifo", "folder", "device", "endless", "dangling", "round"))
def test_what_is_no_file_is_ignored_at_once(path, kind, caplog):
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        ends = {"device": "/dev/null", "endless": "/dev/zero", "dangling": path.with_name("none"), "round": path}
        path.symlink_to(ends[kind])
    assert is_ignored(caplog)


DEEP = "[" * 900 + "]" * 900


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\xff", b'{"ways": "\xff"}', b"{" * 10**6, b"[" * 10**6 + b"]" * 10**6,
        *(f'{{"{part}": {value}}}' for part in ("ways", "configs") for value in (
            DEEP, "1" + "0" * 400, "1" + "0" * 5000, "NaN", '"' + "x" * 10**6 + '"', "[" + "1," * 10**5 + "1]",
        )),
        f'{{"ways": [{DEEP}], "configs": {{"2": {DEEP}}}}}',
        f'{{"ways": [{{"M": {DEEP}}}], "configs": {{"2": {{"norm": {{"BLOCK_N": {DEEP}}}}}}}}}',
        f'{{"ways": [{{"M": 1{"0" * 400}}}], "configs": {{"2": {{"norm": {{"num_warps": 1{"0" * 400}}}}}}}}}',
        json.dumps({"ways": [{"x" * 10**5: 1}], "configs": {"x" * 10**5: {"y": {}}}}),
        json.dumps({"ways": [entry(forward={"x" * 10**5: 1})], "configs": {"2": {"y" * 10**5: {}}}}),
        json.dumps({"ways": [entry(M=2**31)], "configs": {"2": {"norm": CONFIG | {"x" * 10**5: 1}}}}),
        json.dumps({"ways": {}, "configs": {"9" * 5000: {"norm": CONFIG}}}),
        *(json.dumps({"configs": {"2": {"norm": CONFIG | {"BLOCK_N": rows}}}}) for rows in (512, 2**20, 2**60, 2**400)),
    ],
    ids=lambda content: str(content)[:40],
)  # fmt: skip
def test_no_content_makes_a_call_raise(path, content, caplog):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert is_ignored(caplog)


def test_a_table_beyond_its_size_is_ignored(path, caplog):
    path.write_text(json.dumps({"configs": {"2": {"norm": CONFIG}}}) + " " * configs.MOST_BYTES)
    assert is_ignored(caplog) and f"has more than {configs.MOST_BYTES} bytes" in caplog.text


def test_the_largest_tile_is_taken(path, caplog):
    path.write_text(json.dumps({"configs": {"2": {"norm": CONFIG | {"BLOCK_N": configs.MOST_ROWS}}}}))
    forget_tables()
    assert configs.tuned_configs(H200.name, H200.target)[2, "norm"].BLOCK_N == 256 and not caplog.records
