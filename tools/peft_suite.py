"""Run PEFT's own DoRA tests twice, on stock PEFT and with every model enabled, and compare.

    python tools/peft_suite.py                       the tests of the installed PEFT; pip downloads its sdist
    python tools/peft_suite.py --source peft.tar.gz
    python tools/peft_suite.py --backend triton      the kernels; in Triton's interpreter if there is no GPU

Exits 1 if a test that passes on stock PEFT does not pass enabled, or if dora_linear never ran. The tests need
no network; the few that want a model from the hub fail on stock PEFT too, and are counted as such.

Necessary and far from enough: none of these tests looks at the value of a gradient of a linear DoRA layer,
and none runs one with dropout. tests/adapters/test_peft.py does.
"""

import argparse
import collections
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import MagicMock, patch

import pytest

STAND_INS = ("attr", "datasets", "diffusers", "parameterized", "scipy")
"""Modules that the test files import and no DoRA test uses: replaced by an empty one if missing."""

ATOL = 1e-6
COMPARED_TO_THE_BIT = ("test_lora_use_dora_linear",)
"""Tests that compare a fresh adapter's output with the base layer's by torch.allclose, whose default atol of
1e-8 asks float32 outputs near 0 for the very bits of addmm, which stock PEFT has. With an enabled model they use ATOL.
Where gradients are wanted ours adds the bias to gain times the product, which dmagnitude is made from, and not inside
the GEMM: 2.4e-7 away at most, on outputs up to 1.5, and as close to the exact ones (RMS 2.60e-7 against 2.59e-7).
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, help="PEFT's source distribution; downloaded by pip if not given")
    parser.add_argument("--backend", choices=("auto", "triton", "reference"), default="auto")
    parser.add_argument("-k", dest="select", default="dora", help="pytest's -k expression (default: dora)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        unpack_tests(options.source or download(Path(folder)), Path(folder))
        stock = run(Path(folder), options.select)
        failed = [test for test, outcome in stock["outcomes"].items() if outcome == "failed"]
        enabled = run(Path(folder), options.select, options.backend, failed)
    return report(stock, enabled)


def download(folder: Path) -> Path:
    """The source distribution of the installed PEFT: its wheel has no tests."""
    import peft

    requirement = f"peft=={peft.__version__}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-binary",
        ":all:",
        "--no-deps",
        requirement,
    ]
    subprocess.run([*command, "-d", folder], check=True)
    return next(folder.glob("*.tar.gz"))


def unpack_tests(archive: Path, folder: Path) -> None:
    """Put the tests of a source distribution into folder/tests, as the package they are in the repository."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            root, _, path = member.name.partition("/")
            if path.startswith("tests/") and member.isfile():
                member.name = path
                tar.extract(member, folder, filter="data")
    (folder / "tests" / "__init__.py").touch()


def run(folder: Path, select: str, backend: str = "", without: Sequence[str] = ()) -> dict:
    """Run the test files that mention DoRA, enabled with `backend` or, for "", stock; what Plugin wrote."""
    files = sorted((folder / "tests").glob("test_*.py"))
    files = [path for path in files if "dora" in path.read_text().lower()]
    outcomes = folder / "outcomes.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:warnings",
    ]
    command += ["-p", Path(__file__).stem, "-k", select, f"--rootdir={folder}", f"--outcomes={outcomes}"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    if backend:
        command += ["--enable", *(f"--deselect={test}" for test in without)]
        environment["DORA_KERNELS_BACKEND"] = backend
        if backend == "triton" and not has_gpu():
            environment["TRITON_INTERPRET"] = "1"
    print(f"== PEFT's tests, {'every model enabled' if backend else 'stock'}", flush=True)
    subprocess.run([*command, *map(str, files)], cwd=folder, env=environment)
    return json.loads(outcomes.read_text())


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def report(stock: dict, enabled: dict) -> int:
    """Print the comparison; the exit code."""
    passed = {test for test, outcome in stock["outcomes"].items() if outcome == "passed"}
    lost = sorted(test for test in passed if enabled["outcomes"].get(test) != "passed")
    ran = sum(count for name, count in enabled["calls"].items() if name.startswith("forward "))
    print(f"\nPEFT {enabled['version']}: {len(passed)} DoRA tests pass on stock PEFT", end="")
    print(f" ({tally(stock)}), {len(passed) - len(lost)} of them with every model enabled ({tally(enabled)})")
    for reason, count in sorted(enabled["layers"].items(), key=lambda item: -item[1]):
        print(f"{count:7} DoRA layers {reason}")
    print(f"{enabled['tests_with_calls']:7} tests ran dora_linear; operator calls: ", end="")
    print(", ".join(f"{name} {count}" for name, count in sorted(enabled["calls"].items())) or "none")
    print(f"{len(COMPARED_TO_THE_BIT):7} compared at atol {ATOL}, not 1e-8: {', '.join(COMPARED_TO_THE_BIT)}")
    for test in lost:
        print(f"LOST {test}: {enabled['outcomes'].get(test, 'did not run')}")
    if not ran:
        print("FAILED: dora_linear never ran")
    return 1 if lost or not ran or not passed else 0


def tally(result: dict) -> str:
    counts = collections.Counter(result["outcomes"].values())
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))


# The other half of this file is a pytest plugin, loaded by name in the test run.


def pytest_addoption(parser):
    parser.addoption("--outcomes", help="file for the outcomes of this run")
    parser.addoption("--enable", action="store_true", help="pass every model that gets an adapter to enable()")


def pytest_configure(config):
    if config.getoption("outcomes"):
        sys.meta_path.append(StandIns())
        config.pluginmanager.register(Plugin(config.getoption("outcomes"), config.getoption("enable")))


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports an empty module, whose every name is a mock, for each missing package of STAND_INS."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: stand_in(spec.name, name)
        return module

    def exec_module(self, module):
        pass


def stand_in(module: str, name: str) -> MagicMock:
    if name.startswith("__"):
        raise AttributeError(f"{module}.{name}")
    return MagicMock(name=f"{module}.{name}")


class Plugin:
    """Enables every model PEFT injects an adapter into; writes down outcomes, layers and operator calls."""

    def __init__(self, path: str, enable: bool):
        from peft.tuners.tuners_utils import BaseTuner

        self.path = Path(path)
        self.outcomes: dict[str, str] = {}
        self.layers: collections.Counter[str] = collections.Counter()
        self.calls: collections.Counter = collections.Counter()
        self.tests_with_calls = 0
        self.enabled = enable
        if enable:
            from dora_kernels import ops

            self.calls = ops.calls
            inject = BaseTuner.inject_adapter  # construction, add_adapter and load_adapter all end up here
            BaseTuner.inject_adapter = lambda tuner, model, *args, **kwargs: self.enable(
                inject(tuner, model, *args, **kwargs), model
            )

    def enable(self, result, model):
        import dora_kernels

        for layer in dora_kernels.enable(model).layers:
            self.layers["taken over" if layer.taken_over else f"left to PEFT: {layer.reason}"] += 1
        return result

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = (
                report.outcome if report.when == "call" else f"{report.outcome} in {report.when}"
            )

    def pytest_runtest_setup(self, item):
        self.before = self.calls.total()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        import torch

        if self.enabled and item.name in COMPARED_TO_THE_BIT:
            with patch("torch.allclose", functools.partial(torch.allclose, atol=ATOL)):
                return (yield)
        return (yield)

    def pytest_runtest_teardown(self, item):
        self.tests_with_calls += self.calls.total() > self.before

    def pytest_sessionfinish(self):
        import peft

        self.path.write_text(
            json.dumps(
                {
                    "version": peft.__version__,
                    "outcomes": self.outcomes,
                    "layers": self.layers,
                    "calls": {" ".join(key): count for key, count in self.calls.items()},
                    "tests_with_calls": self.tests_with_calls,
                }
            )
        )


if __name__ == "__main__":
    sys.exit(main())
