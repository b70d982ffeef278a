"""What the documentation points at exists: tests, files, names of the package."""

import ast
import re
from pathlib import Path

import pytest

import dora_kernels
import dora_kernels.testing

ROOT = Path(__file__).parents[2]
# files that users and other libraries have
OF_OTHERS = ("adapter_config.json",)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# without .venv, where some package has a file of nearly every name
FILES = [path for one in ROOT.glob("[!.]*") for path in ([one] if one.is_file() else one.rglob("*.*"))]


def names_in(file: Path) -> set[str]:
    """The tests of a file."""
    tree = ast.parse(file.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page):
    for file, _, name in re.findall(r"(test_\w+\.py)(::(\w+))?", page.read_text()):
        path = next((ROOT / "tests").rglob(file), None)
        assert path is not None, f"{page.name} names {file}"
        assert not name or name in names_in(path), f"{page.name} names {file}::{name}"


def test_the_readme_is_for_ten_minutes():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 110
    assert max(map(len, lines)) <= 110, max(lines, key=len)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists() or (ROOT / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    """A path, or a file's name alone, in backticks."""
    for name in re.findall(r"`([\w./]+\.(?:py|md|json|txt|toml))`", page.read_text()):
        assert any(path.match(name) for path in FILES) or name in OF_OTHERS, f"{page.name} names {name}"


def test_every_row_of_the_compatibility_tables_names_a_test():
    text = (ROOT / "docs" / "scaling.md").read_text().split("## What it costs")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    headers = [row for row in rows if row.rstrip().endswith("| test |")]
    assert len(headers) == 2 and len(rows) > 15
    for row in rows:
        assert row in headers or "test_" in row.split("|")[-2], row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_package_exist(page):
    for dotted in re.findall(r"`(dora_kernels(?:\.\w+)+)", page.read_text()):
        found = dora_kernels
        for name in dotted.split(".")[1:]:
            found = getattr(found, name, None)
        assert found is not None, f"{page.name} names {dotted}"
