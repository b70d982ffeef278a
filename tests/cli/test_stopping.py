"""Ctrl-C, SIGTERM and SIGHUP at any moment: one line, the exit code that is documented, and nothing left behind."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from dora_kernels.cli import main, stopping
from dora_kernels.files.writing import claimed
from dora_kernels.testing import suite
from tests.support.children import in_child
from tests.support.command_files import write_checkpoints

pytestmark = pytest.mark.usefixtures("heard_signals")
COMMAND = [sys.executable, "-m", "dora_kernels"]
# Python runs it first of all: it sends this process a signal when a module is looked for
SITECUSTOMIZE = """
import os, sys
class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["SEND_AT"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(os.environ["SEND"]))
sys.meta_path.insert(0, Sender())
"""


@pytest.fixture
def handlers():
    """The signals' handlers are as they were at the end."""
    before = {number: signal.getsignal(number) for number in stopping.NUMBERS}
    hook = sys.unraisablehook
    yield
    assert {number: signal.getsignal(number) for number in stopping.NUMBERS} == before and sys.unraisablehook is hook


@pytest.mark.parametrize("number", stopping.NUMBERS, ids=lambda number: number.name)
def test_a_signal_is_an_exception_that_passes_finally(number, handlers):
    steps = []
    with pytest.raises(stopping.Stopped) as caught, stopping.unwinding():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # who hands on a Ctrl-C does not break in
            steps.append("cleaned")
    assert steps == ["cleaned"] and caught.value.code == 128 + number
    assert isinstance(caught.value, KeyboardInterrupt) and str(caught.value) == f"ended by {number.name}"


def test_a_second_press_is_heard(handlers, monkeypatch):
    """Where the first one was swallowed, or the finally blocks wait for something."""
    monkeypatch.setattr(stopping, "ONE_PRESS", 0.01)
    with pytest.raises(stopping.Stopped), stopping.unwinding():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            time.sleep(0.02)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one was not heard")


def test_a_signal_in_a_destructor_is_raised_after_it(handlers, capsys):
    class Raising:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(stopping.Stopped) as caught, stopping.unwinding():
        Raising()
        deadline = time.monotonic() + 10
        threading.Event().wait(10)  # a lock: only a signal to this very thread ends it
    assert caught.value.code == 143 and time.monotonic() < deadline and capsys.readouterr().err == ""


def test_what_is_ignored_stays_ignored(handlers):
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.unwinding():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_handler_that_is_not_pythons_stays(handlers, monkeypatch):
    """As a program in C may have that runs Python: Python cannot say what it is."""
    read = signal.getsignal
    with monkeypatch.context() as patched:
        patched.setattr(signal, "getsignal", lambda number: None if number == signal.SIGHUP else read(number))
        with stopping.unwinding():
            assert read(signal.SIGINT) is not signal.default_int_handler
            assert read(signal.SIGHUP) is signal.SIG_DFL


@pytest.mark.parametrize("number", stopping.NUMBERS, ids=lambda number: number.name)
def test_a_forked_worker_dies_of_a_signal_and_puts_nothing_away(number, handlers, tmp_path):
    with stopping.unwinding(), claimed("f", tmp_path / "a"):
        with pytest.raises(ProcessLookupError) as died:
            in_child(lambda: signal.raise_signal(number))
        assert died.value.args == (-number,) and (tmp_path / ".a.lock").exists()


def test_other_threads_have_no_signals(handlers):
    done = []

    def work():
        with stopping.unwinding():
            done.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("number", stopping.NUMBERS, ids=lambda number: number.name)
def test_a_command_that_is_stopped(number, handlers, monkeypatch, capsys, tmp_path):
    """In the middle of its second case: a real signal, to this process."""
    checked = []

    def check(case):
        checked.append(case)
        if len(checked) == 2:
            signal.raise_signal(number)
        return suite.Report(str(case), ())

    monkeypatch.setitem(suite.LAYERS, "function", check)
    assert main(["check", "--backend", "reference", "--json", str(tmp_path / "check.json")]) == 128 + number
    assert len(checked) == 2 and capsys.readouterr().err == f"check: ended by {number.name}\n"
    assert list(tmp_path.iterdir()) == []


def test_no_memory_is_one_line(monkeypatch, capsys):
    """torch's own error, a RuntimeError; it is not the layer that failed."""
    monkeypatch.setitem(suite.LAYERS, "function", lambda case: torch.empty(2**46))
    assert main(["check", "--backend", "reference"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("check: out of memory: ") and "you tried to allocate" in said and said.count("\n") == 1


def test_a_mistake_of_ours_is_a_traceback(monkeypatch):
    from dora_kernels.cli.commands import info

    monkeypatch.setattr(info, "_devices", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


@pytest.mark.parametrize(
    "command, module",
    [
        ("info", "dora_kernels.cli.running"),
        ("info", "torch"),
        ("info", "torch.fx"),
        ("check", "dora_kernels.testing.suite"),
        ("convert", "safetensors"),
        ("merge", "dora_kernels.extras.merging.output"),
        ("analyze", "matplotlib.figure"),
    ],
)
def test_a_signal_during_an_import(command, module, tmp_path):
    for package in ("safetensors", "matplotlib"):
        pytest.importorskip(package)
    arguments = write_checkpoints(tmp_path)[command]
    before = sorted(tmp_path.iterdir())
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    number = random.Random(module).choice(stopping.NUMBERS)
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "SEND_AT": module, "SEND": str(int(number))}
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment)
    name = command if module == "matplotlib.figure" else "dora_kernels"
    assert (done.returncode, done.stderr) == (128 + number, f"{name}: ended by {number.name}\n")
    left = {path.name for path in tmp_path.iterdir()} - {path.name for path in before} - {"site"}
    assert not {name for name in left if name.startswith(".")} and left <= {"analysis.json"}


def ends_well(arguments, number, delay, twice, folder):
    """Send a signal or two after a while: the command has ended before, or says so in a line, and leaves nothing."""
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    ) as process:
        for pause in (delay, 0.05)[: 1 + twice]:
            time.sleep(pause)
            if process.poll() is None:
                process.send_signal(number)
        _, said = process.communicate(timeout=60)
    # torchao's words, when PEFT imports it
    lines = [line for line in said.splitlines() if not any(noise in line for noise in ("torchao", "_pytree"))]
    expected = [] if process.returncode == 0 else [f"ended by {number.name}"]
    assert process.returncode in (0, 128 + number) and [line.partition(": ")[2] for line in lines] == expected, said
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(100))
def test_a_signal_at_any_moment(seed, tmp_path):
    draw = random.Random(seed)
    commands = write_checkpoints(tmp_path)
    command = draw.choice(list(commands))
    delay = draw.uniform(0.1, 15 if command in ("demo", "check of peft") else 4)  # Python itself has begun after 0.1 s
    ends_well(commands[command], draw.choice(stopping.NUMBERS), delay, draw.random() < 0.3, tmp_path)
