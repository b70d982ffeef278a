"""The weights whose numbers a function uses, and the methods that it calls, by its source."""

from __future__ import annotations

import ast
import inspect
import textwrap
import weakref
from types import FunctionType

FACTS = frozenset(
    {"device", "dim", "dtype", "element_size", "get_device", "is_complex", "is_contiguous", "is_cpu", "is_cuda"}
    | {"is_floating_point", "is_leaf", "is_meta", "is_sparse", "itemsize", "layout", "nbytes", "ndim", "nelement"}
    | {"numel", "requires_grad", "shape", "size", "stride"}
)
"""Attributes and methods of a weight that do not use its numbers."""

ASKING = frozenset(
    {"empty_like", "expand_as", "full_like", "hasattr", "id", "is_floating_point", "is_tensor", "isinstance", "len"}
    | {"ones_like", "rand_like", "randn_like", "reshape_as", "to", "type", "type_as", "view_as", "zeros_like"}
)
"""The names of functions and methods that ask no more of their arguments: x.to(weight) is x in its dtype."""


class Reads(ast.NodeVisitor):
    """The reads and calls in a function: (root, path) of every root.path.weight whose numbers it may use, and
    (root, method) of every call root.method(). The root of super() is None."""

    def __init__(self) -> None:
        self.weights: set[tuple[str, str]] = set()
        self.calls: set[tuple[str | None, str]] = set()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        root, *path = _path(node) or (None,)
        if len(path) > 1 and path[-1] == "weight":
            self.weights.add((root, ".".join(path[:-1])))
        if node.attr in FACTS:
            self._visit_without_numbers(node.value)
        else:
            self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in node.ops):
            for operand in (node.left, *node.comparators):
                self._visit_without_numbers(operand)
        else:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute):
            root, *path = _path(node.func) or (None,)
            if len(path) == 1 or _is_super(node.func.value):
                self.calls.add((root, node.func.attr))
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        is_fact = name == "getattr" and len(node.args) > 1 and getattr(node.args[1], "value", None) in FACTS
        self.visit(node.func)
        for argument in node.args:
            if name in ASKING or is_fact:
                self._visit_without_numbers(argument)
            else:
                self.visit(argument)
        for keyword in node.keywords:
            self.visit(keyword)

    def _visit_without_numbers(self, node: ast.AST) -> None:
        """Visit an expression of which only facts are asked: x.weight itself, its .data or its .detach() is no read."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "detach":
            self._visit_without_numbers(node.func.value)
        elif isinstance(node, ast.Attribute) and node.attr == "data":
            self._visit_without_numbers(node.value)
        elif isinstance(node, ast.Attribute) and node.attr == "weight":
            self.visit(node.value)
        else:
            self.visit(node)


_known: weakref.WeakKeyDictionary[FunctionType, Reads] = weakref.WeakKeyDictionary()


def reads_of(function: FunctionType) -> Reads:
    """The reads of a function by its source; none where there is no source to be had."""
    known = _known.get(function)
    if known is None:
        known = _known[function] = Reads()
        try:
            known.visit(ast.parse(textwrap.dedent(inspect.getsource(function.__code__))))
        except (OSError, SyntaxError, TypeError, ValueError):
            pass
    return known


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _path(node: ast.AST) -> tuple[str, ...]:
    """("self", "a", "b") of the expression self.a.b; () of any that does not begin with a name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return (node.id, *reversed(names)) if isinstance(node, ast.Name) else ()
