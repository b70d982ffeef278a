"""Files of strangers are read without waiting, up to a size, and what cannot be read is one ValueError."""

import os
import socket
from pathlib import Path

import pytest

from dora_kernels.files.reading import SHOWN, check_regular, read_bytes, shown


def test_a_file_is_read_whole_up_to_its_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(path)
    assert read_bytes("f", path, 5) == read_bytes("f", tmp_path / "link", 6) == b"12345"
    assert check_regular("f", path) == 5
    with pytest.raises(ValueError, match="^f: .*file has more than 4 bytes; expected at most so many$"):
        read_bytes("f", path, 4)
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 40)
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        read_bytes("f", tmp_path / "sparse", 1000)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fifo", "is a pipe or a device; expected a file"),
        ("socket", "is a pipe or a device"),
        ("folder", "is a folder; expected a file"),
        ("nothing", "cannot be read: No such file or directory; expected a file"),
        ("dangling", "cannot be read: No such file or directory"),
        ("round", "cannot be read: Too many levels of symbolic links"),
        ("x" * 5000, "File name too long"),
        ("a\0b", "null"),
        ("/dev/zero", "is a pipe or a device"),
        ("/dev/null", "is a pipe or a device"),
        ("/proc/self/mem", "cannot be read"),
    ],
    ids=lambda value: None if len(value) > 60 else value,
)
def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch, name, expected):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    with socket.socket(socket.AF_UNIX) as unix:
        monkeypatch.chdir(tmp_path)  # its name may have some 100 letters
        unix.bind("socket")
        with pytest.raises(ValueError, match=expected) as raised:
            read_bytes("f", tmp_path / name, 1000)
    assert str(raised.value).startswith("f: ") and len(str(raised.value)) < 2 * SHOWN


def test_a_file_that_the_system_makes_up_is_read(tmp_path):
    assert read_bytes("f", "/proc/self/cmdline", 100_000)  # of 0 bytes, by its size
    with pytest.raises(ValueError, match="more than 3 bytes"):
        read_bytes("f", "/proc/self/cmdline", 3)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_named(tmp_path):
    (tmp_path / "file").touch(mode=0)
    with pytest.raises(ValueError, match="Permission denied"):
        read_bytes("f", tmp_path / "file", 5)


def test_names_are_shown_to_a_length():
    assert shown(Path("a/b")) == "a/b" and shown("x" * SHOWN) == "x" * SHOWN
    assert shown("a\nb\x1b") == r"a\nb\x1b" and shown("\ud800") == r"\ud800" and shown("é b") == "é b"
    assert len(shown("x" * 5000)) == SHOWN and shown("x" * 5000).endswith("x...")
    assert len(shown("\U000e0001" * 5000)) == SHOWN  # ten letters each
