"""A pytest plugin for runs on a GPU: what passed in an earlier run is left out, the JUnit file is always there, and a
broken CUDA context ends its process.

An illegal memory access makes every later call of its process fail. Under pytest-xdist such a process would take most
of the tests, since it is the fastest to be done with them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

JUNIT_SECONDS = 5.0  # between two writings of the JUnit file, which is there whenever pytest is killed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--passed", type=Path, metavar="JSON", help="a list of tests to leave out, named as in a junit file"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("--passed")
    if path is None:
        return
    passed = set(json.loads(path.read_text()))
    config.hook.pytest_deselected(items=[item for item in items if junit_name(item.nodeid) in passed])
    items[:] = [item for item in items if junit_name(item.nodeid) not in passed]


def junit_name(nodeid: str) -> str:
    """tests/test_a.py::TestB::test_c[d] -> tests.test_a.TestB::test_c[d], classname and name in a junit file."""
    path, _, rest = nodeid.partition("::")
    names, bracket, parameters = rest.partition("[")
    *classes, name = names.split("::")
    return ".".join([path.removesuffix(".py").replace("/", "."), *classes]) + f"::{name}{bracket}{parameters}"


def context_is_broken() -> bool:
    """True if the device answers every call with the error of an earlier one."""
    torch = sys.modules.get("torch")  # not imported for this, which takes seconds: without it there is no context
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class OnDevice:
    """The hooks that remember something of the session."""

    def __init__(self, config: pytest.Config) -> None:
        # pytest's own, which would write at the end alone, and after xdist has waited for its processes
        self.junit = next((p for p in config.pluginmanager.get_plugins() if type(p).__name__ == "LogXML"), None)
        self.written = time.monotonic()
        self.failed: set[str] = set()

    def write(self) -> None:
        if self.junit is not None:
            self.junit.pytest_sessionfinish()
        self.written = time.monotonic()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)
        if time.monotonic() - self.written > JUNIT_SECONDS:
            self.write()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        self.write()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """After the report of the test that broke it has been sent, in a process of xdist's; else the run is over."""
        if nodeid not in self.failed or not context_is_broken():
            return
        if os.environ.get("PYTEST_XDIST_WORKER"):
            time.sleep(0.2)
            os._exit(1)
        pytest.exit("the CUDA context is broken", returncode=pytest.ExitCode.INTERRUPTED)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(OnDevice(config), "on_device")
