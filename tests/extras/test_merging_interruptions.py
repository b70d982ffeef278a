"""A merge leaves a whole checkpoint or none: on disks that refuse, broken off at any moment, and with others beside."""

import contextlib
import errno
import functools
import os
import random as chance
import shutil
import signal
import time

import pytest
import torch

from dora_kernels.cli import stopping
from dora_kernels.extras.merging import blocks, checkpoint, merge_checkpoint, output
from dora_kernels.files.writing import claimed
from tests.support import children
from tests.support.children import Child, in_child
from tests.support.merge_problem import adapter_of, random, write_adapter, write_base

pytestmark = pytest.mark.usefixtures("heard_signals")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def problem(tmp_path):
    """A base of 2 MB with an adapter, and the folder for what is written."""
    shards = [{f"layers.{i}.weight": random(256, 1024, seed=i)} for i in range(2)]
    adapters = [adapter_of(f"layers.{i}", shard[f"layers.{i}.weight"]) for i, shard in enumerate(shards)]
    (tmp_path / "to").mkdir()
    return (
        write_base(tmp_path / "base", *shards),
        write_adapter(tmp_path / "adapter", adapters),
        tmp_path / "to" / "out",
    )


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def merge(base, adapter, out, **settings):
    """What it raised, class and text, in a process with one thread."""
    torch.set_num_threads(1)
    try:
        merge_checkpoint(base, adapter, out, source_format="dora_kernels", **settings)
    except (OSError, ValueError) as error:
        return type(error).__name__, getattr(error, "errno", None), str(error)
    return None


def refused(prepare, problem):
    prepare(problem[2].parent)
    return merge(*problem), names(problem[2].parent)


def small_files(folder):
    children.limit_files(700_000)


def full_disk(folder):
    children.mount(folder, "size=1500k")
    checkpoint._check_space = lambda *_: None  # what is free may be taken after it was looked at


def full_at_the_start(folder):
    children.mount(folder, "size=1500k")


def read_only(folder):
    children.mount(folder)
    children.make_read_only(folder)


@pytest.mark.parametrize("by", ["the system", "reading"])
@pytest.mark.parametrize("prepare, number", [(small_files, errno.EFBIG), (full_disk, errno.ENOSPC)])
def test_a_disk_that_refuses(problem, monkeypatch, prepare, number, by):
    if by == "reading":
        monkeypatch.delattr(os, "copy_file_range")
    (kind, found, text), left = in_child(functools.partial(refused, prepare, problem))
    assert (kind, found, left) == ("OSError", number, []) and str(problem[2]) in text and ".partial" not in text
    assert merge(*problem) is None and names(problem[2].parent) == ["out"]


def test_a_disk_that_is_too_small_is_told_before(problem):
    (kind, _, text), left = in_child(functools.partial(refused, full_at_the_start, problem))
    assert kind == "ValueError" and "GB free; expected 0.00" in text and left == []


def test_a_folder_that_is_read_only(problem):
    (kind, _, text), left = in_child(functools.partial(refused, read_only, problem))
    assert kind == "ValueError" and "may be written" in text and left == []


def from_read_only(folder, problem):
    children.mount(folder)
    shutil.copytree(problem[0], folder / "base")
    children.make_read_only(folder)
    return merge(folder / "base", *problem[1:])


def test_a_base_that_may_only_be_read(problem, tmp_path):
    (tmp_path / "from").mkdir()
    assert in_child(functools.partial(from_read_only, tmp_path / "from", problem)) is None
    assert names(problem[2].parent) == ["out"]


def broken_off(problem, number, at):
    """The class of what a signal raises, which comes when so many bytes are written."""
    torch.set_num_threads(1)

    def progress(done, total, name):
        if done >= at * total:
            os.kill(os.getpid(), number)

    try:
        with stopping.unwinding():
            merge_checkpoint(*problem, source_format="dora_kernels", progress=progress)
    except BaseException as error:
        return type(error).__name__


@pytest.mark.parametrize("at", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(problem, number, at):
    assert in_child(functools.partial(broken_off, problem, number, at)) in ("Stopped", "KeyboardInterrupt")
    assert names(problem[2].parent) == []
    assert merge(*problem) is None and names(problem[2].parent) == ["out"]


@pytest.mark.parametrize("at", [0.0, 0.4, 1.0])
def test_a_kill_leaves_nothing_that_is_taken_for_a_checkpoint(problem, at):
    with pytest.raises(ProcessLookupError, match="-9"):
        Child(functools.partial(broken_off, problem, signal.SIGKILL, at)).result()
    assert names(problem[2].parent) == [".out.lock", ".out.partial"]
    assert merge(*problem) is None and names(problem[2].parent) == ["out"]


def test_an_error_of_the_callers_leaves_nothing(problem):
    with pytest.raises(ZeroDivisionError):
        merge_checkpoint(*problem, progress=lambda *_: 1 / 0)
    assert names(problem[2].parent) == []


@pytest.mark.parametrize("times", [3, pytest.param(60, marks=pytest.mark.nightly)])
def test_killed_at_any_moment(problem, tmp_path, times):
    assert merge(*problem) is None
    whole, draw = content(problem[2]), chance.Random(0)
    shutil.rmtree(problem[2])
    for _ in range(times):
        child = Child(functools.partial(merge, *problem))
        time.sleep(draw.uniform(0, 0.1))
        child.signal(signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            assert child.result() is None
        if problem[2].exists():
            assert content(problem[2]) == whole
            shutil.rmtree(problem[2])
    assert merge(*problem) is None and content(problem[2]) == whole and names(problem[2].parent) == ["out"]


def test_of_two_at_once_one_has_written(problem):
    runs = [Child(functools.partial(merge, *problem)) for _ in range(4)]
    results = [run.result() for run in runs]
    assert results.count(None) == 1
    for kind, _, text in (result for result in results if result is not None):
        assert kind == "ValueError" and ("by another run" in text or "exists" in text)
    assert names(problem[2].parent) == ["out"]


def test_a_run_that_would_write_the_same_is_refused_at_its_start(problem):
    with claimed("test", problem[2]):
        kind, _, text = in_child(functools.partial(merge, *problem))
    assert kind == "ValueError" and "is being written by another run" in text and names(problem[2].parent) == []


def test_places_where_nothing_can_be(problem, tmp_path):
    base, adapter, _ = problem
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "inside").symlink_to(base)
    before = content(tmp_path)
    places = [
        "file",
        "dangling",
        "base",
        "to",
        "file/a",
        "no/where",
        "a" * 256,
        "a\0b",
        "base/out",
        "inside/out",
    ]
    for name in places:
        with pytest.raises(ValueError, match="^merge: .*expected") as error:
            merge_checkpoint(base, adapter, os.path.join(tmp_path, name))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="^merge: .*1_Pooling/out is within .*, which is copied; expected"):
        merge_checkpoint(base, adapter, base / "1_Pooling" / "out")
    assert content(tmp_path) == before


def test_what_appears_while_it_merges_is_left_alone(problem, monkeypatch):
    write = output.Writer.write

    def overtaken(self, made):
        problem[2].mkdir()
        write(self, made)

    monkeypatch.setattr(output.Writer, "write", overtaken)
    with pytest.raises(ValueError, match="^merge: .*out exists"):
        merge_checkpoint(*problem)
    assert names(problem[2]) == [] and names(problem[2].parent) == ["out"]


def truncate(path):
    os.truncate(path, path.stat().st_size - 1000)


def rewrite(path):
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, time.time_ns() + 10**9))


def replace(path):
    other = path.with_name("other")
    shutil.copy(path, other)
    other.replace(path)


@pytest.mark.parametrize("change", [truncate, rewrite, replace, os.unlink])
@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("step", ["before", "during"])
def test_a_base_that_is_changed_meanwhile(problem, monkeypatch, change, shard, step):
    path = problem[0] / f"model-0000{shard + 1}-of-00002.safetensors"
    if step == "before":
        write = output.Writer.write
        monkeypatch.setattr(output.Writer, "write", lambda self, made: (change(path), write(self, made)))
    else:
        merge_one = blocks.LayerMerge.merge
        changed = []

        def changes(self, block, first):
            if not changed and self.key == f"layers.{shard}.weight":
                changed.append(change(path))
            merge_one(self, block, first)

        monkeypatch.setattr(blocks.LayerMerge, "merge", changes)
    if step == "during" and change in (replace, os.unlink):  # what is open stays what it was
        merge_checkpoint(*problem)
        return
    with pytest.raises(ValueError, match="^merge: .*model-.*(was changed during the merge|ends before|cannot be read)"):
        merge_checkpoint(*problem)
    assert names(problem[2].parent) == []
