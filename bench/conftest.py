"""Ratios at the end of a pytest-benchmark run."""

import pytest

from bench.lib.report import problems, table

# what bench_layer.py has measured, as rows of a layer.json
rows: pytest.StashKey[list[dict]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[rows] = []


def pytest_terminal_summary(terminalreporter, exitstatus, config: pytest.Config) -> None:
    measured = config.stash[rows]
    if measured:
        terminalreporter.section("layer steps: median time over the frozen linear layer")
        terminalreporter.write_line(table(measured))
        for line in problems(measured):
            terminalreporter.write_line(line)


@pytest.fixture
def record_row(request: pytest.FixtureRequest):
    """Adds a row to the table."""
    return request.config.stash[rows].append
