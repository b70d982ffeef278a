"""Every small change to the functions of a kernel's source: statements left out, doubled and exchanged; operators,
constants, conditions, names and arguments.

Annotations, docstrings, decorators and what is outside of functions stay.
"""

from __future__ import annotations

import ast
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_OPERATORS: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub, ast.Mult),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Add, ast.FloorDiv),
    ast.FloorDiv: (ast.Mult, ast.Mod),
    ast.Mod: (ast.FloorDiv,),
    ast.BitXor: (ast.BitOr, ast.BitAnd),
}
_COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Eq: (ast.NotEq, ast.Lt, ast.LtE, ast.GtE),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
# names that may stand in each other's place without a NameError
_ALIKE = (
    ("left", "right"),
    ("ready", "empty"),
    ("row", "column"),
    ("stage", "before"),
    ("stage", "phase"),
    ("gain", "bias"),
    ("x", "weight"),
    ("x", "low"),
    ("weight", "lora"),
    ("low", "lora"),
    ("y", "z"),
    ("k", "column"),
    ("k", "row"),
    ("r", "row"),
    ("M", "N"),
    ("K", "R"),
    ("K", "N"),
    ("BLOCK_M", "BLOCK_N"),
    ("BLOCK_K", "BLOCK_N"),
    ("STAGES", "SLOTS"),
    ("STAGES", "CONSUMERS"),
    ("slots", "other_slots"),
    ("y_part", "z_part"),
    ("PRODUCER_REGISTERS", "CONSUMER_REGISTERS"),
    ("minimum", "maximum"),
    ("program_id", "num_programs"),
    ("tma_load", "tma_store"),
)


_NUMBERS = "stage phase row column k r part number steps before tile first M N K R group_m STAGES SLOTS CONSUMERS WHICH"
_NUMBERS += " BLOCK_M BLOCK_N BLOCK_K ROWS WIDTH PARTS half rows STEP_BYTES PRODUCER_REGISTERS CONSUMER_REGISTERS"
_NUMBERS = frozenset(_NUMBERS.split())
# what they do is in what they return
_PLAIN = (
    "index slice permute cdiv minimum allocate_shared_memory MBarrierLayout NVMMADistributedLayout SliceLayout zeros"
)
_PLAIN += " zeros num_warps corner_of Ring Columns Sizes Operands Outputs static_assert"
_PLAIN = frozenset(_PLAIN.split())
_SAME = ast.parse("lambda value: value", mode="eval").body


@dataclass(frozen=True)
class Mutant:
    """One change: the function, the statement before and after it, and the whole source after it."""

    function: str
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.function}: {self.before}  ->  {self.after}"


def mutants(source: str, step: int = 1) -> Iterator[Mutant]:
    """Every step-th of them, in the order of the source."""
    count = 0
    nodes = ast.parse(source).body
    texts = [ast.unparse(node) for node in nodes]
    for place, function in enumerate(nodes):
        if not isinstance(function, ast.FunctionDef):
            continue
        start, end = count, count + sum(1 for _ in _changes(function))
        count = end
        for number in (at - start for at in range(start, end) if at % step == 0):
            changed = copy.deepcopy(function)
            change, told = next(itertools.islice(_changes(changed), number, None))
            before = _told(told)
            change()
            text = "\n".join([*texts[:place], ast.unparse(changed), *texts[place + 1 :]])
            if ast.unparse(changed) != texts[place]:  # else two that are alike were exchanged
                yield Mutant(function.name, before, _told(told), text)


def _told(nodes: list[ast.stmt]) -> str:
    return "; ".join(_head(ast.unparse(node)) for node in nodes)


def _head(text: str) -> str:
    """A statement in one line: of one that holds others, its head; but its whole condition."""
    lines = text.splitlines()
    return lines[0] if lines[0].endswith(":") else " ".join(line.strip() for line in lines)


Change = tuple[Callable[[], object], list[ast.stmt]]


def _changes(function: ast.FunctionDef) -> Iterator[Change]:
    """Each change of a function: what makes it, and the statements by which to tell it, which it changes in place."""
    for body in _bodies(function):
        for place, statement in enumerate(body):
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # a docstring
            slot = body  # told by what stands there, once it is changed
            yield _at(slot, place, [ast.Pass()])
            if _counts(statement):
                yield _at(slot, place, [statement, copy.deepcopy(statement)])
            if place + 1 < len(body) and not _independent(statement, body[place + 1]):
                yield _at(slot, place, [body[place + 1], statement], 2)
            for change in _of_statement(statement):
                yield change, [statement]


def _counts(statement: ast.stmt) -> bool:
    """True where to run it twice is not what to run it once is: a call, or what it assigns to is in its value."""
    if isinstance(statement, ast.Assign):
        target, value = ast.unparse(statement.targets[0]), ast.unparse(statement.value)
        return any(name in value for name in target.strip("()").split(", "))
    return isinstance(statement, (ast.Expr, ast.AugAssign, ast.For))


def _independent(one: ast.stmt, other: ast.stmt) -> bool:
    """True where it is plain that the order of two statements is no matter."""

    def names(node: ast.AST, context: type) -> set[str]:
        return {found.id for found in ast.walk(node) if isinstance(found, ast.Name) and isinstance(found.ctx, context)}

    def plain(node: ast.stmt) -> bool:
        called = {ast.unparse(call.func).rpartition(".")[2] for call in ast.walk(node) if isinstance(call, ast.Call)}
        return isinstance(node, (ast.Assign, ast.AnnAssign, ast.Expr)) and called <= _PLAIN

    apart = not names(one, ast.Store) & names(other, ast.Load) and not names(other, ast.Store) & names(one, ast.Load)
    return apart and not names(one, ast.Store) & names(other, ast.Store) and (plain(one) or plain(other))


def _at(body: list[ast.stmt], place: int, put: list[ast.stmt], length: int = 1) -> Change:
    told = body[place : place + length]

    def change() -> None:
        body[place : place + length] = put
        told[:] = put

    return change, told


def _bodies(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse"):
        body = getattr(node, name, None)
        if isinstance(body, list) and body:
            yield body
            for statement in body:
                yield from _bodies(statement)


def _of_statement(statement: ast.stmt) -> Iterator[Callable[[], object]]:
    """What changes an expression of the statement, but of those that it holds."""

    def setter(node: ast.AST, **fields: object) -> Callable[[], object]:
        return lambda: [setattr(node, name, value) for name, value in fields.items()]

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "body", "orelse") and not isinstance(node, (ast.IfExp, ast.Lambda)):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield child
                    yield from walk(child)

    if isinstance(statement, ast.AugAssign):
        for operator in _OPERATORS.get(type(statement.op), ()):
            yield setter(statement, op=operator())
    if isinstance(statement, ast.If):
        yield setter(statement, test=ast.Constant(True))
        yield setter(statement, test=ast.Constant(False))
        yield setter(statement, test=ast.UnaryOp(ast.Not(), statement.test))
    for node in walk(statement):
        if isinstance(node, ast.BinOp):
            for operator in _OPERATORS.get(type(node.op), ()):
                yield setter(node, op=operator())
            yield setter(node, op=ast.Mult(), right=ast.Constant(1))
            if isinstance(node.op, (ast.Sub, ast.FloorDiv, ast.Mod)):
                yield setter(node, left=node.right, right=node.left)
        elif isinstance(node, ast.Compare):
            for comparison in _COMPARISONS.get(type(node.ops[0]), ()):
                yield setter(node, ops=[comparison()])
        elif isinstance(node, ast.IfExp):
            yield setter(node, body=node.orelse, orelse=node.body)
            yield setter(node, test=ast.Constant(True))
            yield setter(node, test=ast.Constant(False))
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield setter(node, value=not node.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, int):
            for value in (node.value - 1, node.value + 1, 2 * node.value + 2):
                yield setter(node, value=value)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            field = "id" if isinstance(node, ast.Name) else "attr"
            for pair in _ALIKE:
                if getattr(node, field) in pair:
                    yield setter(node, **{field: pair[1 - pair.index(getattr(node, field))]})
        if isinstance(node, (ast.Call, ast.Tuple, ast.List)):
            yield from _of_arguments(node)
        if isinstance(node, ast.Call):
            for place in range(len(node.keywords)):
                yield lambda node=node, place=place: node.keywords.pop(place)
            if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
                yield setter(node, func=_SAME, args=[node.func.value])


def _of_arguments(node: ast.Call | ast.Tuple | ast.List) -> Iterator[Callable[[], object]]:
    """What exchanges two neighbours, leaves one of a list out, or makes a number larger or smaller by one."""
    given = node.args if isinstance(node, ast.Call) else node.elts
    if any(isinstance(one, ast.Starred) for one in given) or isinstance(getattr(node, "ctx", None), ast.Store):
        return
    for place, one in enumerate(given):
        if not isinstance(node, ast.Call):
            yield lambda place=place: given.pop(place)
        if place + 1 < len(given) and ast.unparse(node)[:10] != "gl.minimum":
            yield lambda place=place: given.insert(place, given.pop(place + 1))
        name = one.id if isinstance(one, ast.Name) else one.attr if isinstance(one, ast.Attribute) else ""
        if isinstance(one, ast.BinOp) or name in _NUMBERS:
            for operator in (ast.Add, ast.Sub):
                other = ast.BinOp(one, operator(), ast.Constant(1))
                yield lambda place=place, other=other: given.__setitem__(place, other)
