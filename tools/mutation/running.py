"""Runs tests on a copy of the checkout, in which one expression is different."""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from mutation import plugin, server
from mutation.changes import Mutant

COPIED = ("dora_kernels", "tests", "tools", "bench", "pyproject.toml")
Lines = dict[str, tuple[float, dict[str, list[int]]]]
"""{test: (seconds, {file of the package: lines that the test ran})}"""


class Copy:
    """A copy of the checkout, and a process that runs tests on it."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
            elif (root / name).exists():
                shutil.copy(root / name, folder / name)
        for module in (plugin, server):
            shutil.copy(module.__file__, folder / f"mutation_{Path(module.__file__).name}")

    def __enter__(self) -> Copy:
        paths = os.pathsep.join(filter(None, (str(self.folder), os.environ.get("PYTHONPATH"))))
        # bytecode is known by size and second, which two mutants of one file may share
        environment = os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "mutation_server.py"], cwd=self.folder, env=environment, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()

    def digest(self) -> str:
        """Of everything that decides which lines a test runs."""
        files = sorted(path for path in self.folder.rglob("*") if path.suffix in (".py", ".json", ".toml"))
        named = (bytes(path.relative_to(self.folder)) + path.read_bytes() for path in files)
        return hashlib.sha256(b"".join(named)).hexdigest()

    def run(self, arguments: Sequence[str], seconds: float) -> tuple[str, float, str]:
        """("passed", "failed" or "timeout", seconds, the last lines of the output) of pytest -x."""
        output = self.folder / "output.txt"
        command = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "mutation_plugin"]
        command += ["--rootdir", str(self.folder), *arguments]
        start = time.monotonic()
        self.server.stdin.write(json.dumps([command, str(output)]).encode() + b"\n")
        # not buffered here: select sees what the pipe holds, and not a line that was read beside the first
        process, ended = int(self.server.stdout.readline()), False
        try:
            ended = bool(select.select([self.server.stdout], [], [], seconds)[0])
        finally:
            if not ended:  # after Ctrl-C too
                os.killpg(process, signal.SIGKILL)
            status = int(self.server.stdout.readline())
        text = output.read_text(errors="replace")
        last = "\n".join(text.splitlines()[-5:])
        ended = ended and not re.search(r"^Timeout \(\d", text, re.MULTILINE)  # the plugin's
        if status in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
            raise RuntimeError(last)  # says nothing about what is tested
        passed = status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        return "passed" if passed else "failed" if ended else "timeout", time.monotonic() - start, last

    def lines(self, tests: Sequence[str], seconds: float = 3600) -> Lines:
        """The lines that each of the tests runs. Raises RuntimeError, with pytest's last lines, unless they pass."""
        file = self.folder / "lines.json"
        state, _, output = self.run(["--write-lines", str(file), *tests], seconds)
        if state != "passed":
            raise RuntimeError(output or state)
        return json.loads(file.read_text())

    def try_mutant(self, mutant: Mutant, tests: Sequence[str], lines: Lines, patience: float) -> dict[str, object]:
        """The row of the report for one mutant; the copy is whole again afterwards."""
        chosen = those_that_run(mutant, tests, lines)
        if not chosen:
            return asdict(mutant) | {"status": "survived", "seconds": 0.0, "tests": 0, "by": None}
        limits = {test: patience + 10 * lines[test][0] for test in chosen}
        (self.folder / "tests.json").write_text(json.dumps(limits))
        files = dict.fromkeys(test.partition("::")[0] for test in chosen)
        path = self.folder / mutant.path
        source = path.read_bytes()
        path.write_bytes(mutant.apply(source))
        try:
            arguments = ["--tests", str(self.folder / "tests.json"), *files]
            state, took, output = self.run(arguments, 2 * patience + sum(limits.values()) / 3)
        finally:
            path.write_bytes(source)
        by = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        status = {"passed": "survived", "failed": "killed", "timeout": "timeout"}[state]
        row = {"status": status, "seconds": round(took, 1), "tests": len(chosen), "by": by[1] if by else None}
        return asdict(mutant) | row


def those_that_run(mutant: Mutant, tests: Sequence[str], lines: Lines) -> list[str]:
    """Those of `tests` (files, or single ones) that run the mutant's statement, the quick ones first.

    Behind them single ones, which are named because they compile or read the file, and what runs no line of the
    package: it runs in a process of its own.
    """
    seconds: dict[str, float] = {}
    others = []
    for name, (took, ran) in lines.items():
        file = name.partition("::")[0]
        if file in tests:
            here = ran.get(mutant.path, ())
            if mutant.ran is None or any(mutant.ran[0] <= line <= mutant.ran[1] for line in here):
                seconds[name] = took
            elif not ran:
                others.append(name)
        elif name.partition("[")[0] in tests:
            others.append(name)
    return sorted(seconds, key=seconds.__getitem__) + others
