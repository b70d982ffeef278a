"""The tests lie as the package does, and what two of them share lies in tests/support."""

import ast
import re
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "dora_kernels"
FILES = sorted(TESTS.rglob("*.py"))
# What is no room of the package: the repository's own, and what a user does with all of it
OTHERS = {"support", "bench", "tools", "repo", "runtime", "distributed"}


def imported(path: Path) -> set[str]:
    """Every dotted name that the file imports, by a statement or by a string (importorskip, a process of its own)."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"tests\.support(\.\w+)+", str(node.value)):
            names.add(node.value)
    return names


IMPORTED = {path: imported(path) for path in FILES}


def test_nothing_imports_a_test():
    for path, names in IMPORTED.items():
        tests = [name for name in names if re.match(r"tests\.(\w+\.)*test_", name)]
        assert not tests, f"{path.relative_to(TESTS)} imports {tests}"


def test_every_helper_is_used():
    helpers = {path.stem for path in (TESTS / "support").glob("*.py")} - {"__init__"}
    used = {name.split(".")[2] for names in IMPORTED.values() for name in names if name.startswith("tests.support.")}
    assert helpers <= used, helpers - used


def test_folders_are_the_package_s():
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert folders - OTHERS <= rooms, folders - OTHERS - rooms


def test_no_two_files_have_one_name():
    """docs/ and tools/pretended_gpu name files without their folders."""
    names = Counter(path.name for path in FILES if path.name.startswith("test_"))
    assert set(names.values()) == {1}, names.most_common(3)
