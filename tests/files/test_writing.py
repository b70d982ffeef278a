"""What is written is whole or not there: on disks that refuse, under signals, and with two writers at once."""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

import pytest

from dora_kernels.files import claims, writing
from dora_kernels.files.writing import check_target, claimed, creating, replacing, write_text
from tests.support import children
from tests.support.children import Child, in_child
from tests.support.racing_threads import in_threads

pytestmark = pytest.mark.usefixtures("heard_signals")
BIG = "new" * 100_000


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def create(path, content="new"):
    with creating("f", path) as made:
        made.write_text(content)


def create_folder(path, content="new"):
    with creating("f", path) as made:
        made.mkdir()
        (made / "part").write_text(content)


def content_of(path):
    return (path / "part" if path.is_dir() else path).read_text()


CREATE = pytest.mark.parametrize("create", [create, create_folder], ids=("file", "folder"))
WRITE = pytest.mark.parametrize("write", [create, create_folder, write_text], ids=("file", "folder", "replaced"))


def refusal(write, *arguments):
    """("ok", None), or the class and text of the OSError or ValueError that it raised."""
    try:
        write(*arguments)
    except (OSError, ValueError) as error:
        return type(error).__name__, str(error)
    return "ok", ""


def test_a_file_is_made_and_replaced(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("first\n", "second \u00e9\r\n", ""):
        write_text(path, text)
        assert path.read_bytes() == text.encode() and names(tmp_path) == ["a.txt"]


def test_the_mode_and_the_owner_stay(tmp_path):
    path = tmp_path / "a"
    before = os.umask(0o027)
    try:
        write_text(path, "")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        with creating("f", tmp_path / "b") as made:
            made.mkdir()
            (made / "private").touch(0o600)  # as safetensors makes its files
        assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o750
        assert stat.S_IMODE((tmp_path / "b" / "private").stat().st_mode) == 0o640
    finally:
        os.umask(before)
    path.chmod(0o604)
    if os.getuid() == 0:
        os.chown(path, children.NOBODY, children.NOBODY)
    owner = path.stat().st_uid
    write_text(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o604 and path.stat().st_uid == owner


def test_links_are_followed_and_stay(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link, other = tmp_path / "folder" / "a", tmp_path / "link", tmp_path / "other"
    link.symlink_to("folder/a")
    write_text(link, "made behind a dangling link")
    assert link.is_symlink() and target.read_text() == link.read_text() == "made behind a dangling link"
    os.link(target, other)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and other.read_text().startswith("made")
    assert names(tmp_path) == ["folder", "link", "other"] and names(tmp_path / "folder") == ["a"]
    link.unlink()
    link.symlink_to("link")
    assert refusal(write_text, link, "")[0] == "OSError"


@WRITE
@pytest.mark.parametrize("name", ["a" * 255, "\u00e9" * 127, "a" * 247, "..a", "a\nb", "\udcff"])
def test_any_name_that_the_system_takes(tmp_path, write, name):
    write(tmp_path / name, "new")
    assert content_of(tmp_path / name) == "new" and names(tmp_path) == [name]


@WRITE
def test_a_block_that_raises_leaves_the_old_file(tmp_path, write, monkeypatch):
    def fails(self, *arguments, **settings):
        open(self, "w").close()
        raise MemoryError

    if write is write_text:
        (tmp_path / "a").write_text("old")
    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(MemoryError):
        write(tmp_path / "a", "new")
    monkeypatch.undo()
    assert names(tmp_path) == (["a"] if write is write_text else [])
    assert write is not write_text or (tmp_path / "a").read_text() == "old"


def test_what_cannot_be_written_is_said_before(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("no/where")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    for good in ("file", "link", "free", "a" * 255, "pipe", "/dev/full", "/dev/stdout", "/dev/null"):
        check_target("f", "out", tmp_path / good)
    for bad, reason in {
        "folder": "not a folder",
        "": "not a folder",
        "no/where": "a folder that exists",
        "file/a": "a folder that exists",
        "dangling": "a folder that exists",
        "loop": "symbolic links",
        "a" * 256: "too long",
        "a/" * 3000: "too long",
        "a\0b": "null",
        "\ud800": "encode",
        "/proc/self/fd/999": "may be written",
        "/proc/new": "may be written",
    }.items():
        if (bad, os.getuid()) in (("/proc/new", 0), ("/proc/self/fd/999", 0)):
            continue  # root may, says the system, until it is tried
        with pytest.raises(ValueError) as error:
            check_target("f", "out", os.path.join(tmp_path, bad))
        assert str(error.value).startswith("f: out is '") and reason in str(error.value), (bad, error.value)
        assert len(str(error.value)) < 400
    for bad in ("", ".", str(tmp_path / "free") + "/", str(tmp_path / "file") + "/"):
        with pytest.raises(ValueError, match="f: out is .*expected a file, "):
            check_target("f", "out", bad)
    assert names(tmp_path) == ["dangling", "file", "folder", "link", "loop", "pipe"]


def test_a_device_and_a_pipe_are_written_to(tmp_path):
    write_text("/dev/null", BIG)
    with pytest.raises(OSError, match="/dev/full") as error:
        write_text("/dev/full", "new")
    assert error.value.errno == errno.ENOSPC and stat.S_ISCHR(os.stat("/dev/full").st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError) as error:  # not to wait for ever
        write_text(pipe, "new")
    assert error.value.errno == errno.ENXIO
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    while refusal(write_text, pipe, "new" * 1000) != ("ok", ""):  # until it has opened the pipe
        assert reader.poll() is None
    assert reader.communicate(timeout=children.SECONDS)[0] == "new" * 1000 and names(tmp_path) == ["pipe"]


def test_a_reader_that_has_gone_is_a_broken_pipe():
    reading, writing_end = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        write_text(f"/dev/fd/{writing_end}", "new")
    os.close(writing_end)


def print_around(path, out):
    os.dup2(out, 1)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    print("before")
    write_text(path, "new\n")
    print("after", flush=True)


@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1", "/dev/fd/1", "link"])
def test_stdout_goes_on_behind_what_is_written_to_it(tmp_path, name):
    """Be it a pipe or, where the shell has redirected it, a file, which is not replaced under its feet."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    with open(tmp_path / "out", "wb") as file:
        in_child(partial(print_around, tmp_path / name, file.fileno()))
    assert (tmp_path / "out").read_text() == "before\nnew\nafter\n" and names(tmp_path) == ["link", "out"]
    reading, writing_end = os.pipe()
    in_child(partial(print_around, tmp_path / name, writing_end))
    os.close(writing_end)
    with os.fdopen(reading) as file:
        assert file.read() == "before\nnew\nafter\n"


def test_a_folder_and_a_socket_are_refused(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the name of a socket may have 108 bytes
        server.bind("socket")
        with pytest.raises(ValueError, match="not a socket"):
            check_target("f", "out", "socket")
        assert refusal(write_text, "socket", "new")[0] == "OSError"
    with pytest.raises(ValueError, match="is a folder"):
        write_text(tmp_path, "new")
    assert names(tmp_path) == ["socket"]


def limited(write, path):
    children.limit_files(1000)
    return refusal(write, path, BIG), names(path.parent)


@WRITE
def test_a_file_that_grows_too_large(tmp_path, write):
    path = tmp_path / "a"
    if write is write_text:
        path.write_text("old")
    (kind, text), left = in_child(partial(limited, write, path))
    assert kind == "OSError" and os.strerror(errno.EFBIG) in text and str(path) in text and ".partial" not in text
    assert left == (["a"] if write is write_text else []) and (not left or path.read_text() == "old")


def on_a_full_disk(write, folder):
    children.mount(folder, "size=64k")
    path = folder / "a"
    if write is write_text:
        path.write_text("old")
    (folder / "room").write_bytes(b"x" * 40_000)
    results = [refusal(write, path, BIG), names(folder), content_of(path) if path.exists() else None]
    (folder / "room").unlink()
    return *results, refusal(write, path, "new"), content_of(path)


@WRITE
def test_a_full_disk(tmp_path, write):
    old = "old" if write is write_text else None
    (kind, text), left, content, again, new = in_child(partial(on_a_full_disk, write, tmp_path))
    assert kind == "OSError" and os.strerror(errno.ENOSPC) in text and str(tmp_path / "a'") in text
    assert left == (["a", "room"] if old else ["room"]) and content == old
    assert again == ("ok", "") and new == "new"


def in_a_read_only_folder(write, folder):
    children.mount(folder)
    (folder / "old").write_text("old")
    children.make_read_only(folder)
    path = folder / ("old" if write is write_text else "new")
    return (
        refusal(check_target, "f", "out", path),
        refusal(write, path, "new"),
        names(folder),
        content_of(folder / "old"),
    )


@WRITE
def test_a_read_only_file_system(tmp_path, write):
    before, after, left, content = in_child(partial(in_a_read_only_folder, write, tmp_path))
    assert before[0] == "ValueError" and "may be written" in before[1]
    assert after[0] == "OSError" and os.strerror(errno.EROFS) in after[1] and ".lock" not in after[1]
    assert left == ["old"] and content == "old"


def as_nobody(write, folder):
    children.become_nobody()
    path = folder / ("old" if write is write_text else "new")
    return (
        refusal(check_target, "f", "out", path),
        refusal(write, path, "new"),
        names(folder),
        content_of(folder / "old"),
    )


@WRITE
def test_a_folder_that_may_not_be_written(write):
    with tempfile.TemporaryDirectory() as folder:  # tmp_path may not be entered by others
        (Path(folder) / "old").write_text("old")
        (Path(folder) / "old").chmod(0o666)
        os.chmod(folder, 0o555)
        before, after, left, content = in_child(partial(as_nobody, write, Path(folder)))
        os.chmod(folder, 0o755)
    assert before[0] == "ValueError" and "folder that may be written" in before[1]
    assert after[0] == "PermissionError" and left == ["old"] and content == "old"


@WRITE
def test_a_folder_that_vanishes(tmp_path, write):
    folder = tmp_path / "folder"
    folder.mkdir()
    with claimed("f", folder / "a"):
        (folder / ".a.lock").unlink()
        folder.rmdir()
        with pytest.raises(FileNotFoundError, match="folder/a'"):
            write(folder / "a", "new")
        folder.mkdir()  # and comes again: another run may be there
        write(folder / "a", "new")
    assert names(folder) == ["a"]


@CREATE
@pytest.mark.parametrize(
    "appear",
    [
        lambda path: path.write_text("theirs"),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("nowhere"),
        lambda path: os.mkfifo(path),
    ],
    ids=("file", "empty folder", "dangling link", "pipe"),
)
def test_nothing_that_has_appeared_is_replaced(tmp_path, create, appear):
    path = tmp_path / "out"
    with pytest.raises(ValueError, match="^f: .*out exists; expected a name that is free"):
        with creating("f", path) as made:
            made.mkdir() if create is create_folder else made.write_text("ours")
            appear(path)
            theirs = path.lstat()
    assert os.path.samestat(theirs, path.lstat()) and names(tmp_path) == ["out"]
    with pytest.raises(ValueError, match="exists"):
        create(path)
    assert os.path.samestat(theirs, path.lstat()) and names(tmp_path) == ["out"]


LINK, LINK_AT, RENAME_AT_2, FLOCK = 86, 265, 316, 73


def without(number, calls, write, path, appear=None):
    children.forbid(number, *calls)
    if appear is not None:
        path.mkdir()
    return refusal(write, path, "new"), names(path.parent), content_of(path)


@WRITE
@pytest.mark.parametrize(
    "number, calls",
    [
        (errno.EOPNOTSUPP, [FLOCK]),
        (errno.ENOLCK, [FLOCK]),
        (errno.EPERM, [LINK, LINK_AT]),
        (errno.EINVAL, [RENAME_AT_2]),
        (errno.ENOSYS, [FLOCK, LINK, LINK_AT, RENAME_AT_2]),
    ],
    ids=("flock", "no locks left", "link", "renameat2", "all"),
)
def test_file_systems_that_lack_a_call(tmp_path, write, number, calls):
    result = in_child(partial(without, number, calls, write, tmp_path / "a"))
    assert result == (("ok", ""), ["a"], "new")


def race(write, folder, writers=4):
    """Of so many processes that write at the same moment: (what each was told, content, what lies in the folder)."""
    path, (reading, writing_end) = folder / "out", os.pipe()

    def work(number):
        os.close(writing_end)
        os.read(reading, 1)  # until every end for writing is closed
        told = refusal(write, path, str(number) * 5000)
        return told

    started = [Child(partial(work, number)) for number in range(writers)]
    os.close(reading)
    os.close(writing_end)
    return [child.result() for child in started], content_of(path), names(folder)


@pytest.mark.parametrize("times", [15, pytest.param(1000, marks=pytest.mark.nightly)])
@CREATE
def test_of_many_processes_one_has_written(tmp_path, create, times):
    for number in range(times):
        folder = tmp_path / str(number)
        folder.mkdir()
        told, content, left = race(create, folder)
        winners = [writer for writer, (kind, _) in enumerate(told) if kind == "ok"]
        assert len(winners) == 1, told
        assert content == str(winners[0]) * 5000 and left == ["out"]
        assert all("exists" in text or "another run" in text for kind, text in told if kind != "ok"), told


@pytest.mark.parametrize("times", [100, pytest.param(5000, marks=pytest.mark.nightly)])
@CREATE
def test_of_many_threads_one_has_written(tmp_path, create, times):
    for number in range(times):
        path, told = tmp_path / f"{number}" / "out", {}
        path.parent.mkdir()

        def work(writer, path=path, told=told):
            told[writer] = refusal(create, path, str(writer) * 100)

        in_threads(*(partial(work, writer) for writer in range(3)))
        winners = [writer for writer, (kind, _) in told.items() if kind == "ok"]
        assert len(winners) == 1, told
        assert content_of(path) == str(winners[0]) * 100 and names(path.parent) == ["out"]


def test_a_run_holds_its_claim_from_beginning_to_end(tmp_path):
    path, link = tmp_path / "a", tmp_path / "link"
    link.symlink_to("a")
    with claimed("f", link):
        with claimed("f", path), claimed("f", tmp_path / "b"):
            pass
        for write in (write_text, create):
            told = in_child(partial(refusal, write, path, "other"))
            assert told[0] == "ValueError" and "a is being written by another run" in told[1]
        told = in_child(partial(refusal, partial(claimed("g", link).__enter__)))
        assert told[1].startswith("g: ") and "link is being written by another run" in told[1]
        thread = threading.Thread(target=lambda: told_there.append(refusal(write_text, path, "other")))
        told_there = []
        thread.start()
        thread.join()
        assert told_there[0][0] == "ValueError"
        write_text(path, "ours")
    assert path.read_text() == "ours" and names(tmp_path) == ["a", "link"]
    assert not claims._held
    assert in_child(partial(refusal, write_text, path, "other")) == ("ok", "")


@WRITE
def test_what_a_killed_run_leaves_is_used_again(tmp_path, write):
    def die(path):
        with replacing(path) if write is write_text else creating("f", path) as made:
            made.mkdir()
            (made / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ProcessLookupError):
        in_child(partial(die, tmp_path / "a"))
    assert names(tmp_path) == [".a.lock", ".a.partial"]
    write(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"] and content_of(tmp_path / "a") == "new"


def test_no_lock_is_waited_for(tmp_path):
    """Whoever has put a pipe in its place; the link's target is not touched."""
    os.mkfifo(tmp_path / ".a.lock")
    assert in_child(partial(refusal, write_text, tmp_path / "a", "new"))[0] == "OSError"  # which may not take long
    (tmp_path / "other").write_text("theirs")
    (tmp_path / ".b.lock").symlink_to("other")
    assert refusal(write_text, tmp_path / "b", "new")[0] == "OSError"
    assert (tmp_path / "other").read_text() == "theirs" and {"a", "b"}.isdisjoint(names(tmp_path))


def test_a_link_that_a_killed_run_left_is_not_written_through(tmp_path):
    """The run was killed between link and unlink: what it has written has two names."""
    create(tmp_path / "a")
    (tmp_path / ".a.partial").mkdir()
    os.link(tmp_path / "a", tmp_path / ".a.partial" / "a")
    (tmp_path / "a").rename(tmp_path / "theirs")
    create(tmp_path / "a", "second")
    assert (tmp_path / "theirs").read_text() == "new" and content_of(tmp_path / "a") == "second"


OURS = {claims.__file__, writing.__file__}


def interrupted(write, path, step):
    """Write, with Ctrl-C at that step of Python in our code or contextlib's; False if there is none.

    Not as a frame is left: no signal comes there, and what is raised there passes its `finally` by.
    """
    left = [step]

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in OURS and not frame.f_code.co_filename.endswith("contextlib.py"):
            return None
        frame.f_trace_opcodes = True
        left[0] -= event != "return"
        if left[0] == 0 and event != "return":
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        write(path, "new")
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return left[0] <= 0


@WRITE
def test_an_interrupt_at_any_step_leaves_all_or_nothing(tmp_path, write):
    step, path = 1, tmp_path / "a"
    old = "old" if write is write_text else None
    states = set()
    while True:
        if old:
            path.write_text(old)
        broken = interrupted(write, path, step)
        state = content_of(path) if path.exists() else None
        assert state in (old, "new") and names(tmp_path) == (["a"] if state else []), step
        assert not claims._held, step
        if not broken:
            break
        states.add(state)
        step += 3
        if path.is_dir():
            (path / "part").unlink()
            path.rmdir()
        path.unlink(missing_ok=True)
    assert states == {old, "new"} and step > 200
