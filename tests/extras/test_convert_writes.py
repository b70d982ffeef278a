"""What convert writes is whole or not there: on disks that refuse, killed at any moment, and with others beside it."""

import errno
import functools
import os
import random
import shutil
import signal
import time

import pytest
import torch

from dora_kernels.cli import main, stopping
from dora_kernels.extras.convert import FORMATS, Checkpoint, convert_checkpoint, files
from dora_kernels.files.writing import claimed
from tests.support import children
from tests.support.children import Child, in_child
from tests.support.convert_problem import adapter, assert_same, reread, several, written

pytestmark = pytest.mark.usefixtures("heard_signals")
FORMAT = pytest.mark.parametrize("target", ["dora_kernels", "peft"], ids=("file", "folder"))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def convert(source, out, target):
    """The exit code of the command, in a process with one thread."""
    torch.set_num_threads(1)
    return main(["convert", str(source), str(out), "--from", "lycoris", "--to", target])


def refused(prepare, source, out, target):
    """(exit code, what is in the folder) where `prepare` has made writing impossible."""
    prepare(out.parent)
    return convert(source, out, target), names(out.parent)


def small_files(folder):
    children.limit_files(1000)


def full_disk(folder):
    children.mount(folder, "size=64k")
    (folder / "room").write_bytes(b"x" * (64 << 10))


def read_only(folder):
    children.mount(folder)
    children.make_read_only(folder)


@FORMAT
@pytest.mark.parametrize(
    "prepare, reason",
    [(small_files, errno.EFBIG), (full_disk, errno.ENOSPC), (read_only, None)],
    ids=("large", "full", "read only"),
)
def test_a_disk_that_refuses(tmp_path, capfd, target, prepare, reason):
    source, out = written(tmp_path, "lycoris", several()), tmp_path / "folder" / "out"
    out.parent.mkdir()
    code, left = in_child(functools.partial(refused, prepare, source, out, target))
    error = capfd.readouterr().err
    assert code == 2 and left == (["room"] if prepare is full_disk else [])
    assert error.count("\n") == 1 and error.startswith("convert: ") and str(out) in error, error
    assert (os.strerror(reason) if reason else "may be written") in error, error
    assert ".partial" not in error and ".lock" not in error
    assert convert_checkpoint(source, out, "lycoris", target) and names(out.parent) == ["out"]


def test_places_where_nothing_can_be(tmp_path, capsys):
    source = written(tmp_path, "lycoris", [adapter("a")])
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = names(tmp_path)
    for out in ("file", "dangling", "folder", "pipe", "file/a", "no/where", "a" * 256, "a\0b", "", "/dev/full"):
        assert convert(source, os.path.join(tmp_path, out), "peft") == 2, out
        error = capsys.readouterr().err
        assert error.startswith("convert: ") and error.count("\n") == 1 and "Traceback" not in error, error
    assert names(tmp_path) == before
    with pytest.raises(ValueError, match="^convert: .*null"):
        convert_checkpoint(source, tmp_path / "a\0b", "lycoris", "peft")


@FORMAT
def test_what_appears_while_it_converts_is_left_alone(tmp_path, target, monkeypatch):
    source, out = written(tmp_path, "lycoris", several()), tmp_path / "out"
    save = files.save

    def overtaken(*arguments):
        out.mkdir()
        save(*arguments)

    monkeypatch.setattr(files, "save", overtaken)
    with pytest.raises(ValueError, match="^convert: .*out exists"):
        convert_checkpoint(source, out, "lycoris", target)
    assert names(out) == [] and names(tmp_path) == ["as-lycoris", "out"]


def test_a_run_that_would_write_the_same_is_refused_at_its_start(tmp_path, capfd):
    source, out = written(tmp_path, "lycoris", several()), tmp_path / "out"
    with claimed("test", out):
        assert in_child(functools.partial(convert, source, out, "peft")) == 2
    assert "is being written by another run" in capfd.readouterr().err
    assert names(tmp_path) == ["as-lycoris"]


@FORMAT
@pytest.mark.parametrize("times", [8, pytest.param(300, marks=pytest.mark.nightly)])
def test_of_two_at_once_one_has_written(tmp_path, target, times):
    sources = [
        written(tmp_path / name, "lycoris", [adapter("a", scaling)])
        for name, scaling in (("one", 1.0), ("two", 2.0))
        if not (tmp_path / name).mkdir()
    ]
    (tmp_path / "to").mkdir()
    for number in range(times):
        out, (reading, writing) = tmp_path / "to" / str(number), os.pipe()

        def work(source, out=out, reading=reading, writing=writing):
            os.close(writing)
            os.read(reading, 1)  # until the other is there, too
            return convert(source, out, target)

        both = [Child(functools.partial(work, source)) for source in sources]
        os.close(reading)
        os.close(writing)
        codes = [child.result() for child in both]
        assert sorted(codes) == [0, 2], codes
        assert reread(out, target)[0].scaling == 1.0 + codes.index(0)
    assert names(tmp_path / "to") == sorted(map(str, range(times)))


ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@FORMAT
@pytest.mark.parametrize("times", [5, pytest.param(200, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("number", [signal.SIGKILL, *ENDS], ids=lambda number: number.name)
def test_killed_at_any_moment(tmp_path, number, target, times):
    """OUT is whole or not there. Only a kill leaves something: the two hidden names, which the next run uses again."""
    adapters = [adapter(f"layers.{index}", seed=index) for index in range(60)]
    source, folder = written(tmp_path, "lycoris", adapters), tmp_path / "folder"
    folder.mkdir()
    start = time.monotonic()
    assert in_child(functools.partial(convert, source, folder / "first", target)) == 0
    took, draw, states = time.monotonic() - start, random.Random(int(number)), []
    for attempt in range(times):
        out = folder / str(attempt)
        child = Child(functools.partial(convert, source, out, target))
        # half of the moments while something is on the disk
        if attempt % 2:
            while not any(folder.glob(".*")) and time.monotonic() < start + children.SECONDS and not out.exists():
                pass
            time.sleep(draw.random() * took / 10)
        else:
            time.sleep(draw.random() * took)
        child.signal(number)
        try:
            code = child.result()
            assert code in (0, ENDS.get(number)), code
        except ProcessLookupError as error:  # before or after the command's own work
            assert error.args[0] == -number
        except KeyboardInterrupt:  # there, too
            assert number == signal.SIGINT
        hidden = {path.name for path in folder.glob(".*")}
        assert hidden <= ({f".{attempt}.lock", f".{attempt}.partial"} if number == signal.SIGKILL else set())
        states.append(out.exists())
        if not out.exists():
            assert convert(source, out, target) == 0
            assert not list(folder.glob(".*"))
        assert_same(reread(out, target), reread(source, "lycoris"))
        for stray in folder.glob(".*"):  # no next run comes to what is whole
            shutil.rmtree(stray) if stray.is_dir() else stray.unlink()
    assert not all(states), "every signal came too late"


def test_a_signal_that_foreign_code_makes_an_error_of_is_told_as_one():
    with pytest.raises(stopping.Stopped, match="SIGTERM"), stopping.unwinding():
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:  # as torch.asarray does
            raise TypeError("no shape") from None
    with pytest.raises(TypeError, match="no shape"), stopping.unwinding():
        raise TypeError("no shape")


def test_tensors_are_copied_where_safetensors_needs_it_alone(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    tensors = {
        "whole": whole,
        "row": whole[1],
        "column": whole[:, 2],
        "same": whole,
        "expanded": torch.ones(1).expand(5),
        "other": torch.ones(3),
        "apart": (pair := torch.arange(8.0))[:4],
        "apart too": pair[4:],
        "negative": torch._neg_view(torch.ones(2)),
        "nothing": torch.ones(0),
    }
    apart = files._apart(tensors)
    for key in ("other", "apart", "apart too"):
        assert apart[key].data_ptr() == tensors[key].data_ptr(), key
    assert sum(tensor.data_ptr() == whole.data_ptr() for tensor in apart.values()) == 1
    files.save(FORMATS["dora_kernels"], Checkpoint(tensors, {}, {}), tmp_path / "out")
    loaded = files.load(FORMATS["dora_kernels"], tmp_path / "out").tensors
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    source = written(tmp_path, "lycoris", [adapter("a")])
    before = os.umask(0o022)
    try:
        convert_checkpoint(source, tmp_path / "peft", "lycoris", "peft")
        convert_checkpoint(source, tmp_path / "ours", "lycoris", "dora_kernels")
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "ours", *(tmp_path / "peft").iterdir())]
    assert modes == [0o644] * 3 and (tmp_path / "peft").stat().st_mode & 0o777 == 0o755
