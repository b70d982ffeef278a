"""Work in a forked process: under limits, in file systems and as a user that this process must not have itself."""

import ctypes
import os
import pickle
import resource
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SECONDS = 60
_NEW_USERS, _NEW_MOUNTS = 0x10000000, 0x00020000
_READ_ONLY, _REMOUNT = 1, 32
NOBODY = 65534


class Child:
    """A forked process that does `work`; what that returns or raises is the result."""

    def __init__(self, work: Callable[[], Any]) -> None:
        reading, writing = os.pipe()
        # no signal may come before the child is where it ends: it would go on as a second pytest
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self.number = os.fork()
        if self.number == 0:
            os.close(reading)
            _serve(work, writing, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(writing)
        self._reading = reading

    def signal(self, number: int) -> None:
        os.kill(self.number, number)

    def result(self) -> Any:
        """What the work returned. Raises what it raised; ProcessLookupError with the exit code where it was killed."""
        content = b""
        while select.select([self._reading], [], [], SECONDS)[0]:
            part = os.read(self._reading, 1 << 16)
            content += part
            if not part:
                break
        else:
            self.signal(signal.SIGKILL)
        os.close(self._reading)
        code = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
        if not content:
            raise ProcessLookupError(code)
        good, result = pickle.loads(content)
        if not good:
            raise result
        return result


def _serve(work: Callable[[], Any], writing: int, mask: set[int]) -> None:
    try:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            answer = pickle.dumps((True, work()))
        except BaseException as error:
            answer = pickle.dumps((False, error))
        os.write(writing, answer)
    finally:
        os._exit(0)


def in_child(work: Callable[[], Any]) -> Any:
    """What work() returns in a process of its own. The test is skipped where that cannot have what it needs."""
    try:
        return Child(work).result()
    except Unavailable as error:
        pytest.skip(str(error))


class Unavailable(Exception):
    """Raised in a child for want of a right: the test that asked is skipped."""


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond so many bytes: EFBIG."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def mount(folder: Path, options: str = "") -> None:
    """Put an empty file system of memory on the folder, that this process alone sees."""
    uid, gid = os.getuid(), os.getgid()
    if not _call("unshare", _NEW_USERS | _NEW_MOUNTS):
        raise Unavailable("no mounts of its own for a process here")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    if not _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options.encode()):
        raise Unavailable("no file system of memory for a process here")


def make_read_only(folder: Path) -> None:
    """The file system that `mount` has put there takes no further write."""
    if not _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", _REMOUNT | _READ_ONLY, b""):
        raise Unavailable("no file system to read only for a process here")


def become_nobody() -> None:
    """Be bound by permissions, which root is not."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def forbid(number: int, *calls: int) -> None:
    """Have the kernel refuse system calls (by their numbers on x86-64) to this process, with an error's number."""
    if os.uname().machine != "x86_64":
        raise Unavailable("the calls' numbers are those of x86-64")
    load, jump_if, give = 0x20, 0x15, 0x06
    refused, allowed = 0x00050000 | number, 0x7FFF0000
    steps = [(load, 0, 0, 0)]  # the call's number
    for call in calls:
        steps += [(jump_if, 0, 1, call), (give, 0, 0, refused)]
    steps.append((give, 0, 0, allowed))

    class Step(ctypes.Structure):
        _fields_ = [("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32)]

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint16), ("steps", ctypes.POINTER(Step))]

    program = Program(len(steps), (Step * len(steps))(*(Step(*step) for step in steps)))
    no_new_privileges, set_filter, by_program = 38, 22, 2
    if not (
        _call("prctl", no_new_privileges, 1, 0, 0, 0) and _call("prctl", set_filter, by_program, ctypes.byref(program))
    ):
        raise Unavailable("no filter of system calls for a process here")


def _call(name: str, *arguments: Any) -> bool:
    return getattr(ctypes.CDLL(None), name)(*arguments) == 0
