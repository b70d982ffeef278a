"""A plugin of pytest: writes down which lines of the package each test runs, or runs the tests it is given in order.

It is copied to where the tests run, and imports nothing of the tool.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

_STDERR = os.dup(2)  # before pytest captures it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-lines", type=Path, help="seconds of each test, and the lines of the package that it ran")
    parser.addoption("--tests", type=Path, help="{test: seconds}: run these, in this order, and no longer")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--write-lines"):
        config.pluginmanager.register(Lines(config.rootpath, config.getoption("--write-lines")))

    if config.getoption("--tests"):
        config.pluginmanager.register(Limits(json.loads(config.getoption("--tests").read_text())))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--tests"):
        collected = {item.nodeid: item for item in items}
        names = json.loads(config.getoption("--tests").read_text())
        items[:] = [collected[name] for name in names if name in collected]  # a mutant may change what is collected


class Limits:
    """Ends the process, as failed, where a test takes longer than its seconds."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        faulthandler.dump_traceback_later(self.seconds[item.nodeid], exit=True, file=_STDERR)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()


class Lines:
    """{test: [seconds, {file: lines}]}, written at the end."""

    def __init__(self, root: Path, file: Path) -> None:
        self.root, self.package, self.file = str(root), f"{root}/dora_kernels/", file
        self.ran: dict[str, set[int]] = {}
        self.tests: dict[str, tuple[float, dict[str, list[int]]]] = {}

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        """The trace function for sys.settrace; it follows only the package's own functions."""
        name = frame.f_code.co_filename
        if not name.startswith(self.package):
            return None
        self.ran.setdefault(name[len(self.root) + 1 :], set()).add(frame.f_lineno)
        return self.trace

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.ran.clear()
        start = time.monotonic()
        threading.settrace(self.trace)
        sys.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)
            ran = {name: sorted(lines) for name, lines in self.ran.items()}
            self.tests[item.nodeid] = (time.monotonic() - start, ran)

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(json.dumps(self.tests))
