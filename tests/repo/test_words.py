"""Docstrings begin with what a thing is or returns, and a name stands for one thing."""

import ast
import collections
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    path for folder in ("dora_kernels", "bench", "tools", "examples") for path in sorted((ROOT / folder).rglob("*.py"))
]
# a clause and not a name: "Whether x is", "What a layer keeps", "As torch does"; most of them hide a noun or "True if"
CLAUSES = re.compile(r"\s*(As|How|What|When|Where|Whether|Which|Who|Whose|Why)\b")


def texts(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, text) of every docstring, those below an assignment as well."""
    return [
        (node.lineno, node.value.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


def clauses(source: str) -> list[str]:
    """The docstrings that begin with a clause, as "line: first words"."""
    return [f"{line}: {text.strip()[:60]}" for line, text in texts(ast.parse(source)) if CLAUSES.match(text)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_what_a_thing_is_or_returns(path):
    assert not clauses(path.read_text())


def test_clauses_are_found_wherever_a_docstring_stands():
    source = (
        '"""What it is."""\nx = 1\n"""Whether."""\ndef f():\n    """ Why not."""\nclass A:\n    """A whatever."""\n'
    )
    assert clauses(source) == ["1: What it is.", "3: Whether.", "5: Why not."]


def test_no_two_files_define_a_class_of_one_name():
    defined = collections.defaultdict(set)
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                defined[node.name].add(str(path.relative_to(ROOT)))
    twice = {name: sorted(paths) for name, paths in defined.items() if len(paths) > 1}
    assert not twice
