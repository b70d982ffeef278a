"""Writes that leave the old file whole or the new one whole, whatever breaks in: a full disk, a signal, another run.

What is written is made in a hidden folder beside its place, `.<name>.partial`, and moved from there in one step at the
end. Who makes it holds `.<name>.lock`, and takes it away at the end. A process that is killed outright leaves both at
most; the next one that writes there locks the same file, and begins by removing the folder.

What the disk refuses is an OSError that names the file that was to be written; a place where nothing may be written,
or where another run is at work, a ValueError.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dora_kernels.files.claims import claim, hidden

Target = str | os.PathLike[str]


def check_target(function: str, name: str, path: Target) -> None:
    """Raise ValueError where no file can be written to `path`, as far as that shows before the work is done.

    name: the argument's that the path was given by.
    """

    def refuse(expected: str) -> None:
        raise ValueError(f"{function}: {name} is {str(path)!r:.200}; expected {expected}")

    mode = None
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            mode = os.stat(Path(path)).st_mode  # of "", the folder
        folder = _resolved(path).parent
    except (OSError, ValueError) as error:
        refuse(f"a path that can be: {getattr(error, 'strerror', None) or error}")
    if mode is None and not folder.is_dir():
        refuse("a file in a folder that exists")
    if mode is not None and (stat.S_ISDIR(mode) or stat.S_ISSOCK(mode)):
        refuse(f"a file, not a {'folder' if stat.S_ISDIR(mode) else 'socket'}")
    if os.fspath(path).endswith(os.sep):  # the writers would leave it out
        refuse("a file, and no slash behind it")
    if mode is not None and not os.access(path, os.W_OK):
        refuse("a file that may be written")
    beside = _descriptor(Path(path)) is None and (mode is None or stat.S_ISREG(mode))
    if beside and not os.access(folder, os.W_OK | os.X_OK):
        refuse("a file in a folder that may be written")


@contextlib.contextmanager
def claimed(function: str, path: Target) -> Iterator[None]:
    """Inside, no other run writes to `path`: it gets a ValueError, as this one does where another is inside.

    Where a file system has no locks there is no claim, nor of what is no regular file.
    """
    if _is_poured_into(Path(path)):
        yield
        return
    with claim(_resolved(path), f"{function}: {path}"):
        yield


@contextlib.contextmanager
def replacing(path: Target) -> Iterator[Path]:
    """A path of the same name, in a hidden folder: the file that it has at the end of the block takes `path`'s place.

    It gets the old file's mode and owner. A link stays one: what it points at is replaced; another name of the old file
    (a hard link) keeps the old content. A device, a pipe or /dev/stdout is written to, at the end.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a file")
    if _is_poured_into(path):
        with tempfile.TemporaryDirectory() as folder, _naming(path):
            yield Path(folder) / (path.name or "made")
            _pour(Path(folder) / (path.name or "made"), path)
        return
    target = _resolved(path)
    with _naming(path), _place(target, str(path)) as made:
        yield made
        _finish(made)
        with contextlib.suppress(FileNotFoundError):
            old = os.stat(target)
            if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                with contextlib.suppress(OSError):  # not ours to give away: then it is ours
                    os.chown(made, old.st_uid, old.st_gid)
            os.chmod(made, stat.S_IMODE(old.st_mode))
        os.replace(made, target)
        _sync(target.parent)


@contextlib.contextmanager
def creating(function: str, path: Target) -> Iterator[Path]:
    """A path of the same name, in a hidden folder: the file or folder that is there at the end becomes `path`.

    Raises ValueError where there is a `path` before or, at that moment, by then: nothing is ever replaced.
    """
    path = Path(path)
    target = _resolved(path.parent) / path.name
    taken = f"{function}: {path} exists; expected a name that is free"
    if os.path.lexists(path):
        raise ValueError(taken)
    with _naming(path), _place(target, f"{function}: {path}") as made:
        yield made
        _finish(made)
        try:
            _move(made, path)
        except FileExistsError:
            raise ValueError(taken) from None
        _sync(path.parent)


def write_text(path: Target, text: str) -> None:
    """Replace the file at `path`, or make it, in UTF-8."""
    with replacing(path) as made:
        made.write_text(text, encoding="utf-8", newline="")


def _resolved(path: Target) -> Path:
    """The path of the file itself: behind the links, if `path` is one."""
    return Path(os.path.realpath(path))


def _is_poured_into(path: Path) -> bool:
    """True of a device, a pipe and an open file: they are written to, and not replaced."""
    return _descriptor(path) is not None or (path.exists() and not path.is_file())


def _descriptor(path: Path) -> int | None:
    """The number of this process' open file that `path` stands for (/dev/stdout, /dev/fd/3), else None.

    What is behind it may be a regular file: by another name it would be replaced under the feet of who has it open.
    """
    for _ in range(40):  # as many links as Linux follows
        if os.path.realpath(path.parent) == f"/proc/{os.getpid()}/fd" and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            break
        path = path.parent / os.readlink(path)
    return None


def _pour(made: Path, path: Path) -> None:
    """Write the content of a file to a device, a pipe or an open file, from where that stands."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    number = _descriptor(path)
    if number is not None:
        sink = os.dup(number)
    else:
        # a pipe that nobody reads would never open: ENXIO
        sink = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        os.set_blocking(sink, True)
    with made.open("rb") as source, os.fdopen(sink, "wb") as file:
        shutil.copyfileobj(source, file)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """OSErrors that name no file, or one that is hidden, name `path` instead."""
    try:
        yield
    except OSError as error:
        ours = str(hidden(_resolved(path), ""))
        if error.errno is None or not (error.filename is None or str(error.filename).startswith(ours)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def _place(target: Path, told: str) -> Iterator[Path]:
    """A path in a hidden folder beside `target`, of which nothing is left."""
    with claim(target, told) as held:
        folder = hidden(target, "partial")
        if not held:  # one that no other run has
            folder = folder.with_name(f".{os.urandom(16).hex()}.partial")
        try:
            try:
                _remove(folder)  # of a run that was killed
                folder.mkdir()
                yield folder / target.name
            finally:
                _remove(folder)
        finally:
            # twice, as in claims.py; by now it may be another run's: what a signal has left open is closed later
            with contextlib.suppress(ValueError, OSError), claim(target, told):
                _remove(folder)


def _remove(path: Path) -> None:
    """Remove a file or folder if it is there and can be; what it is a name of (a link, a hard one too) stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _finish(made: Path) -> None:
    """Put all of it on the disk, with the modes that the umask gives to files: libraries' own may be 0600."""
    mode = stat.S_IMODE(made.parent.stat().st_mode) & 0o666
    for path in [made, *made.rglob("*")]:
        if path.is_file():
            path.chmod(mode)
        _sync(path)


def _sync(path: Path) -> None:
    """Have the disk hold a file or folder. Errors of the disk are raised, but not that a folder cannot be."""
    try:
        number = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder that may be written and not read
        return
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(number)


def _move(made: Path, path: Path) -> None:
    """Give what was made its name. Raises FileExistsError where there is one by now."""
    if made.is_file():
        try:
            os.link(made, path)
            return
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            # a file system without hard links
    if _renamed(made, path):
        return
    # the lock keeps other runs out; what another program makes between these two lines is replaced if it is a file
    # or an empty folder
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    made.rename(path)


def _renamed(made: Path, path: Path) -> bool:
    """Rename by Linux' renameat2, which replaces nothing; False where the system or the file system has no such."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    current, no_replace = -100, 1
    if rename(current, os.fsencode(made), current, os.fsencode(path), no_replace) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(number, os.strerror(number), str(path))
