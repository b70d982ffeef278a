"""The changes: expressions of a file, and what each is replaced by."""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One change: `source[start:end]`, which is `original`, becomes `mutated`; in bytes, as ast counts."""

    path: str
    line: int
    function: str
    source: str  # the line, or its first
    original: str
    mutated: str
    nth: int  # of the same changes on this line
    start: int
    end: int
    ran: tuple[int, int] | None  # the first and last line of the statement; None where importing the file runs it

    @property
    def change(self) -> str:
        return f"{self.original} -> {self.mutated}" + (f" ({self.nth})" if self.nth > 1 else "")

    def __str__(self) -> str:
        return f"{self.path}:{self.line} ({self.function or 'top level'})  {self.change}"

    def apply(self, source: bytes) -> bytes:
        """The file with the change."""
        return source[: self.start] + self.mutated.encode() + source[self.end :]


_BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
_BINARY |= {ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
_COMPARISON = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
_COMPARISON |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
_BOOLEAN = {ast.And: ast.Or, ast.Or: ast.And}
_NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}


def changed(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions that may stand in place of `node`, each with one difference at its top."""

    def another(**fields: object) -> ast.expr:
        other = copy.copy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return other

    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        yield another(op=_BINARY[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield another(op=_BOOLEAN[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node.operand
    elif isinstance(node, ast.Compare):
        for place, op in enumerate(node.ops):
            yield another(ops=[*node.ops[:place], _COMPARISON[type(op)](), *node.ops[place + 1 :]])
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = node.value
        yield another(value=type(value)(not value if value in (0, 1) else value + 1))
    elif isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr == "to":
            yield function.value
        elif isinstance(function, ast.Name) and function.id in _NAMES:
            yield another(func=ast.Name(_NAMES[function.id]))
        elif isinstance(function, ast.Attribute) and function.attr in _NAMES:
            yield another(func=ast.Attribute(function.value, _NAMES[function.attr]))


def _negated(test: ast.expr) -> Iterator[ast.expr]:
    """`not` before a condition that has no operator of its own to change."""
    if not isinstance(test, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
        yield ast.UnaryOp(ast.Not(), test)


class Finder(ast.NodeVisitor):
    """Collects the mutants of one file, in the order of the source."""

    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source = path, source
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.functions: list[str] = []
        self.ran: tuple[int, int] | None = None
        self.seen: Counter[tuple[int, str, str]] = Counter()
        self.found: list[Mutant] = []
        self.visit(ast.parse(source))

    def _add(self, node: ast.AST, mutated: str) -> None:
        start = self.lines[node.lineno - 1] + node.col_offset
        end = self.lines[node.end_lineno - 1] + node.end_col_offset
        line = self.source.splitlines()[node.lineno - 1].decode().strip()
        original = " ".join(self.source[start:end].decode().split())
        key = (node.lineno, original, mutated)
        self.seen[key] += 1
        names = (".".join(self.functions), line, original, mutated, self.seen[key])
        self.found.append(Mutant(self.path, node.lineno, *names, start, end, self.ran))

    def visit(self, node: ast.AST) -> None:
        outer = self.ran
        if isinstance(node, ast.stmt) and outer is not None:
            body = getattr(node, "body", None)  # of a compound statement the head alone
            self.ran = (node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno)
        for other in changed(node):
            # parentheses: what stands around may bind tighter than the new operator
            text = ast.unparse(other)
            self._add(node, text if isinstance(node, (ast.Constant, ast.Call)) else f"({text})")
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            for other in _negated(node.test):
                self._add(node.test, f"({ast.unparse(other)})")
        super().visit(node)
        self.ran = outer

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in _BINARY:
            other = copy.copy(node)
            other.op = _BINARY[type(node.op)]()
            self._add(node, ast.unparse(other))
        self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self.ran = self.ran, (node.lineno, node.end_lineno)  # a default is in each call
        self.functions.append(node.name)
        for child in (*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body):
            self.visit(child)
        self.functions.pop()
        self.ran = outer

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.functions.append(node.name)
        for child in node.body:
            self.visit(child)
        self.functions.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "strict":  # of zip: an assertion
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Nothing: tests do not hold what a message says."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """A message; and ast does not say where in the source its parts are (before Python 3.12)."""
