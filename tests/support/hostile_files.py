"""Files as a stranger may make them, and what may come of reading one: what is right, or one ValueError that names it.

Strategies for hypothesis and builders of bytes. The archives of torch.save are in hostile_pickles.py, regular
expressions in hostile_patterns.py.
"""

import contextlib
import copy
import json
import os
import re
import resource
import signal
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from dora_kernels.extras.convert import Unrepresentable

# fixed, so that a push is not refused for what another one left; the night looks elsewhere every time
SUITE = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
)
NIGHT = settings(SUITE, derandomize=False)
MORE_AT_NIGHT = 25


def in_the_suite(examples: int) -> settings:
    return settings(SUITE, max_examples=examples)


def at_night(examples: int) -> settings:
    return settings(NIGHT, max_examples=examples * MORE_AT_NIGHT)


depths = pytest.mark.parametrize(
    "depth",
    [pytest.param(in_the_suite, id="suite"), pytest.param(at_night, id="night", marks=pytest.mark.nightly)],
)

LONGEST_MESSAGE = 2000


class Hung(BaseException):
    """Nothing has come of a call in the seconds that it had. No Exception: nobody catches it by accident."""


FIFOS: list[Path] = []


def make_fifo(path: Path) -> None:
    os.mkfifo(path)
    FIFOS.append(path)


@contextlib.contextmanager
def bounded(seconds: float = 10.0, megabytes: int = 2048) -> Iterator[None]:
    """Raises Hung after so many seconds, in `re` and in the opening of a FIFO, too; more memory cannot be had."""

    def end(signum: int, frame: Any) -> None:
        raise Hung(f"nothing came of it in {seconds} s")

    def release() -> None:
        for path in FIFOS:  # a reader that is not Python goes on waiting, signal or not, until somebody has written
            with contextlib.suppress(OSError):
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    timer = threading.Timer(seconds + 0.5, release)
    if FIFOS:
        timer.start()

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, end)
    resource.setrlimit(resource.RLIMIT_AS, (size + (megabytes << 20), hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        timer.cancel()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def seen(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What a folder holds, hidden files too: (mode, size, time of the last change) by path."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    } | {str(path.relative_to(folder)): (path.lstat().st_mode, 0, 0) for path in folder.rglob("*") if path.is_dir()}


def value_or_refusal(folder: Path, call: Callable[[], Any], *names: object, **bounds: Any) -> tuple[Any, str]:
    """(what the call returns, ""), or (None, the message of its ValueError) where nothing in `folder` has changed.

    names: one of them is in the message. Whatever else the call does is an AssertionError or goes on as it came.
    """
    before = seen(folder)
    try:
        with bounded(**bounds):
            return call(), ""
    except ValueError as error:
        message = str(error)
        assert type(error) in (ValueError, Unrepresentable), f"a {type(error)}: {message}"
    assert re.match("(convert|analyze): ", message), message
    assert len(message) <= LONGEST_MESSAGE, f"{len(message)} characters: {message[:300]}"
    assert not names or any(str(name) in message for name in names), f"it names none of {names}: {message}"
    assert seen(folder) == before, "a refusal has left something"
    return None, message


class Raw(str):
    """A piece of JSON, or of something like it, that no value of Python is written as."""


def render(value: Any) -> str:
    """JSON, with every Raw as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {render(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(render, value)) + "]"
    return json.dumps(value)


DEEP = 10**5
HOSTILE_VALUES = (
    *(None, True, False, 0, 1, -1, 4, 8, 2, -0.0, 4.0, 4.5, 1e308, 5e-324, 2**53 + 1, 2**63, 2**64, -(2**63)),
    *("", "4", "8", "true", "all", "gaussian", "../x", "/dev/zero", "\ud800", "\0", "x" * 5000, "$\\frac$\n"),
    *([], {}, [[]], {"": None}, [4], {"a": 4}, {"layers": {"0": 4}}, [None] * 100),
    *map(Raw, ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "4e0", "0x4", "04", "+4", "'4'", "nul")),
    *(Raw("1" + "0" * 400), Raw("-1" + "0" * 400), Raw("1" + "0" * 5000), Raw("1e" + "9" * 30), Raw("0." + "0" * 400)),
    *(Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * DEEP + "1" + "}" * DEEP), Raw("[" * DEEP), Raw('"\\ud800"')),
)
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(HOSTILE_VALUES)
)
any_json = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(("weight_map", "r", "lora_alpha")), inner, max_size=4)
    ),
    max_leaves=10,
)


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to everything in a document, the document itself first."""
    found = [above]
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(inner, (*above, key))
    return found


@st.composite
def spoilt(draw: st.DrawFn, document: Any, values: st.SearchStrategy[Any] = leaves) -> Any:
    """A document with one or two places that are something else, gone, or called something else."""
    top = copy.deepcopy([document])
    for _ in range(draw(st.integers(1, 2))):
        *way, key = draw(st.sampled_from(places(top)[1:] or [(0,)]))
        other, kind = draw(values), draw(st.integers(0, 6))
        holder: Any = top
        for part in way:
            holder = holder[part]
        if way and kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[str(other)[:5000]] = holder.pop(key)
        else:
            holder[key] = other
    return top[0]


# what may become of the text of a document as a whole
TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "spaces": lambda text: b" " * 1000,
    "half": lambda text: text[: len(text) // 2],
    "twice": lambda text: text + text,
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "UTF-32": lambda text: text.decode().encode("utf-32"),
    "Latin 1": lambda text: text.replace(b"{", b'{"\xe9": "\xff", ', 1),
    "half a surrogate": lambda text: text.replace(b"{", b'{"\xed\xa0\x80": 1, ', 1),
    "a NUL": lambda text: text + b"\0",
    "a comment": lambda text: text + b"// r",
    "a key twice": lambda text: text.replace(b"{", b'{"r": 3, "r": 4, "lora_alpha": 3, "weight_map": {}, ', 1),
    "in a list": lambda text: b"[" + text + b"]",
    "a string": lambda text: json.dumps(text.decode()).encode(),
    "deep": lambda text: text.replace(b"{", b'{"deep": ' + b"[" * DEEP + b"]" * DEEP + b", ", 1),
    "deep objects": lambda text: b'{"a":' * DEEP + text + b"}" * DEEP,
    "deep and cut": lambda text: b'{"r":[' * DEEP,
    "a key of a megabyte": lambda text: text.replace(b"{", b'{"' + b"k" * 2**20 + b'": 4, ', 1),
    "10^5 keys": lambda text: text.replace(b"{", b"{" + b"".join(b'"%d": 4, ' % key for key in range(10**5)), 1),
    "an array of 10^6 numbers": lambda text: text.replace(b"{", b'{"a": [' + b"4," * 10**6 + b"4], ", 1),
}
texts = st.sampled_from(sorted(TEXTS))


def sparse(path: Path, size: int) -> None:
    """Let a file be of so many bytes, which take no room on the disk."""
    with path.open("ab") as file:
        file.truncate(size)


def _replace(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


# what may stand in a file's place
PLACES: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda path: path.unlink(),
    "a folder": lambda path: _replace(path, Path.mkdir),
    "a FIFO": lambda path: _replace(path, make_fifo),
    "a socket": lambda path: _replace(path, lambda to: os.mknod(to, 0o600 | stat.S_IFSOCK)),
    "endless zeros": lambda path: _replace(path, lambda to: to.symlink_to("/dev/zero")),
    "a full device": lambda path: _replace(path, lambda to: to.symlink_to("/dev/full")),
    "a terminal": lambda path: _replace(path, lambda to: to.symlink_to("/dev/tty")),
    "a file of the kernel": lambda path: _replace(path, lambda to: to.symlink_to("/proc/self/maps")),
    "memory": lambda path: _replace(path, lambda to: to.symlink_to("/proc/self/mem")),
    "a dangling link": lambda path: _replace(path, lambda to: to.symlink_to("nothing here")),
    "a link to itself": lambda path: _replace(path, lambda to: to.symlink_to(to.name)),
    "a terabyte": lambda path: sparse(path, 2**40),
    "100 MB of spaces": lambda path: path.write_bytes(b" " * 10**8),
    "no permission": lambda path: path.chmod(0),
    "a folder without permission": lambda path: path.parent.chmod(0),
}


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read whatever there is; as before for anybody else."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


DTYPES = (
    *("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F16", "BF16", "F32", "F64", "C64"),
    *("F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("F128", "", "f32", "torch.float32", "object"),
)
NAMES = (
    *("", ".", "..", "../a", "/etc/passwd", "a\nb", "a\x1b[31m", "$\\frac$", "a" * 10**5, "é" * 300, "\0", "\u2028"),
    *("base_model.model.", "base_model.model..lora_A.weight", ".lora_A.weight", "__metadata__", "weight_map"),
    *(f"base_model.model.{'x' * 5000}.lora_A.weight", "base_model.model.a.b.lora_A.default.weight"),
)
header_values = st.one_of(
    st.sampled_from(DTYPES),
    st.sampled_from(NAMES),
    st.sampled_from((0, 1, 3, 5, 6, -1, 4.0, 2**31, 2**63, 2**64, Raw("1e3"), Raw("1" + "0" * 400))),
    st.lists(st.sampled_from((0, 1, 2, 3, 5, 6, 20, 24, 80, 2**40, 2**62, 2**63, -1)), max_size=7),
    leaves,
)


def safetensors_parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the data behind it."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def safetensors_bytes(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file. length: what it says of its header, where that is a lie."""
    text = render(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with some flipped, cut out, put in, or cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(changed) - 1)))
        kind = draw(st.integers(0, 5))
        if kind <= 2 and changed:
            changed[place] ^= draw(st.sampled_from((1, 2, 4, 8, 16, 32, 64, 128, 255)))
        elif kind == 3:
            del changed[place : place + draw(st.integers(1, 16))]
        elif kind == 4:
            changed[place:place] = draw(st.binary(min_size=1, max_size=16))
        else:
            del changed[place:]
    return bytes(changed)
