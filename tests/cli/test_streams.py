"""stdout that is full, closed or not read any more, and encodings that cannot say what is to be said."""

import json
import os
import subprocess
import sys

import pytest

from dora_kernels.cli import main

COMMAND = [sys.executable, "-m", "dora_kernels"]
CHECK = ["check", "--shape", "1x2x3x1", "--dtype", "float32", "--backend", "reference"]
needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def command(arguments, unbuffered=False, **keywords):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONUNBUFFERED": "1"} if unbuffered else {}
    keywords = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment} | keywords
    return subprocess.Popen([*COMMAND, *arguments], text=True, **keywords)


@needs_dev_full
@pytest.mark.parametrize("arguments, unbuffered", [("--help", False), ("--help", True), ("info", False)])
def test_a_full_stdout(arguments, unbuffered):
    with open("/dev/full", "w") as full, command([arguments], unbuffered, stdout=full) as process:
        _, said = process.communicate()
    assert process.returncode == 2 and said.count("\n") == 1 and "No space left on device" in said


@pytest.mark.parametrize("arguments, unbuffered", [("--help", False), ("--help", True), ("info", False)])
def test_nobody_reads_stdout(arguments, unbuffered):
    with command([arguments], unbuffered) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 141 and said == ""


def test_closed_streams(tmp_path):
    code = "import os, sys; [os.close(int(number)) for number in sys.argv[1]]; os.execv(sys.argv[2], sys.argv[2:])"
    for numbers, arguments, expected, said in (
        ("1", ["info"], 2, "dora_kernels: stdout is closed; expected somewhere to print to\n"),
        ("12", ["info"], 2, ""),
        ("2", ["check", "--way", "x"], 2, ""),
        ("02", ["info"], 0, ""),
    ):
        command = [sys.executable, "-c", code, numbers, *COMMAND, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (expected, said)


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="needs /dev/fd")
def test_json_to_a_pipe():
    reader, writer = os.pipe()
    assert main([*CHECK, "--json", f"/dev/fd/{writer}"]) == 0
    os.close(writer)
    with open(reader) as file:
        assert json.load(file)["cases"][0]["ok"]


@needs_dev_full
def test_a_full_stderr_changes_no_exit_code():
    with open("/dev/full", "w") as full, command(["check", "--way", "x"], stderr=full) as process:
        process.communicate()
    assert process.returncode == 2


@pytest.mark.parametrize(
    "encoding",
    ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {"LC_ALL": "C"}),
    ids=str,
)
def test_names_that_cannot_be_printed(encoding):
    names = [b"b\xff\n\x1b[31m\xc3\xa9", b"x"]
    arguments = [os.fsencode(word) for word in [*COMMAND, "analyze"]] + names
    done = subprocess.run(arguments, capture_output=True, env=os.environ | encoding)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and done.stderr.startswith(b"analyze: b")
    assert b"\x1b" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes")
def test_a_name_is_printed_by_any_encoding(tmp_path, monkeypatch, capsys):
    """After the work: where stdout is strict, and not UTF-8 even, nothing may come of it."""
    monkeypatch.chdir(tmp_path)
    sys.stdout.reconfigure(encoding="ascii", errors="strict")
    try:
        assert main([*CHECK, "--json", "\udcff\x1b.json"]) == 0
        assert (sys.stdout.encoding, sys.stdout.errors) == ("ascii", "strict")
    finally:
        sys.stdout.reconfigure(encoding="utf-8")
    assert os.listdir(b".") == [b"\xff\x1b.json"]
