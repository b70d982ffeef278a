"""Runs pytest in a fork of a process that has imported the libraries, which takes longer than most mutants live.

For each line of its input, [arguments, file for the output], it prints the fork's process id, and then its exit status.
It is copied to where the tests run, and imports nothing of the package, nor of the tool.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import sys
from pathlib import Path

import pytest

LIBRARIES = ("torch", "triton", "numpy", "hypothesis", "transformers", "peft")


def run(arguments: list[str], output: str) -> None:
    """pytest, in this process, which it ends."""
    os.setsid()  # what the tests start is killed with them
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    status = pytest.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    if Path("tests/conftest.py").exists():  # else it is a toy, which needs none of them
        runpy.run_path("tests/conftest.py")  # what has to be chosen before triton is imported
        with contextlib.redirect_stdout(sys.stderr):
            for name in LIBRARIES:
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
    assert not any(name.partition(".")[0] == "dora_kernels" for name in sys.modules)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            run(*json.loads(line))
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
