"""What a benchmark or a tool writes is whole, its own while it runs, and where it cannot be one line says so."""

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.lib import outputs, report, tuned
from dora_kernels.files.writing import claimed
from dora_kernels.planning import configs
from tests.support import children
from tests.support.children import in_child

pytestmark = pytest.mark.usefixtures("heard_signals")
ROOT = Path(__file__).parents[2]
ROWS = [{"number": number} for number in range(1000)]


@outputs.command("bench.some")
def some(path, before=lambda: None, rows=ROWS):
    """A benchmark: it claims its file, works, and writes."""
    outputs.claim("bench.some", path)
    before()
    report.write(path, {"a": 1}, rows)
    return 0


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_result_is_written_and_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "folder" / "some.json"
    assert some(path, lambda: path.parent.joinpath(".some.json.lock").stat()) == 0
    assert json.loads(path.read_text())["rows"] == ROWS and names(path.parent) == ["some.json"]


def limited(path):
    children.limit_files(4096)
    return some(path)


def on_a_full_disk(path):
    children.mount(path.parent, "size=64k")
    path.write_text("old")
    code = some(path, lambda: path.with_name("room").write_bytes(b"x" * (60 << 10)))
    return code, path.read_text(), names(path.parent)


def test_a_disk_that_refuses_leaves_the_old_result(tmp_path, capfd):
    path = tmp_path / "some.json"
    path.write_text("old")
    assert in_child(functools.partial(limited, path)) == 2
    error = capfd.readouterr().err
    assert error == f"bench.some: [Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}: '{path}'\n"
    assert path.read_text() == "old" and names(tmp_path) == ["some.json"]
    assert in_child(functools.partial(on_a_full_disk, path)) == (2, "old", ["room", "some.json"])
    assert os.strerror(errno.ENOSPC) in capfd.readouterr().err
    assert some(Path("/dev/full")) == 2
    assert os.strerror(errno.ENOSPC) in capfd.readouterr().err


def test_what_cannot_be_written_is_said_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path, reason in {tmp_path: "not a folder", tmp_path / "file" / "a": "file'", tmp_path / "a\0": "null"}.items():
        assert some(path, lambda: pytest.fail("it began to work")) == 2
        error = capsys.readouterr().err
        assert error.startswith("bench.some: ") and error.count("\n") == 1 and reason in error, error


def test_of_two_runs_the_second_is_told_at_its_start(tmp_path, capfd):
    path = tmp_path / "some.json"

    def another():
        began = functools.partial(some, path, lambda: os._exit(7))
        assert in_child(began) == 2
        assert "is being written by another run" in capfd.readouterr().err

    assert some(path, another) == 0
    assert some(path) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line_and_leaves_nothing(tmp_path, capsys, number):
    assert some(tmp_path / "some.json", lambda: signal.raise_signal(number)) == 128 + number
    assert capsys.readouterr().err == f"bench.some: ended by {number.name}\n" and names(tmp_path) == []


def test_an_error_of_the_work_is_raised(tmp_path):
    with pytest.raises(ValueError, match="ours"):
        some(tmp_path / "some.json", lambda: (_ for _ in ()).throw(ValueError("ours")))
    assert names(tmp_path) == []


def test_a_table_that_another_run_holds_is_not_entered_into(tmp_path, capfd, monkeypatch):
    """Both would read it, and the entries of who writes first would be gone."""
    package, new = tmp_path / "gpu.json", tmp_path / "new.json"
    tuned.write(new, {"meta": {"device": "gpu"}, "configs": {"2": {}}})
    monkeypatch.setattr(configs, "tuned_path", lambda name: package)
    with claimed("tune", package):
        assert in_child(functools.partial(tuned.main, [str(new)])) == 2
    assert "gpu.json is being written by another run" in capfd.readouterr().err and not package.exists()
    assert tuned.main([str(new)]) == 0 and tuned.read(package) == tuned.read(new)


def test_a_benchmark_that_is_killed_leaves_its_old_result(tmp_path):
    """The command itself, asked to end while it measures: nothing but the old file is there."""
    path = tmp_path / "kernels.json"
    path.write_text("old")
    arguments = ["--device", "cpu", "--case", "64x64x64x8", "--case-seconds", "60", "--out", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.kernels", *arguments], cwd=ROOT, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + children.SECONDS
    while not (tmp_path / ".kernels.json.lock").exists() and time.monotonic() < end:
        time.sleep(0.01)
    process.terminate()
    _, error = process.communicate(timeout=children.SECONDS)
    assert process.returncode == 143 and error.endswith("bench.kernels: ended by SIGTERM\n"), error
    assert names(tmp_path) == ["kernels.json"] and path.read_text() == "old"
