"""Parents that read a layer's weight past the layer: where they do, no adapter is applied, the library's or ours.

torch's nn.TransformerEncoderLayer hands linear1.weight to a fast path in eval mode, nn.MultiheadAttention never calls
its out_proj, WavLM's attention passes q_proj.weight to a function. Such code says so, and is looked at here: `forward`
and the methods that it calls on self, for `self.name.weight` or a longer path of names; `weight.dtype` and the like are
no use of its numbers. A weight that is handed on under another name is not seen.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import weakref
from types import FunctionType

from torch import nn

from dora_kernels.adapters.taking import forward_is_the_class_s

FACTS = frozenset(
    {"device", "dim", "dtype", "element_size", "is_cuda", "is_meta", "layout", "ndim", "numel", "requires_grad"}
    | {"shape", "size", "stride"}
)
"""What may be asked of a weight without using its numbers."""

_known: weakref.WeakKeyDictionary[type, dict[str, str]] = weakref.WeakKeyDictionary()


def remarks(model: nn.Module, layers: list[nn.Module]) -> dict[nn.Module, str]:
    """What the report says of each of the layers whose weight a module of `model` reads past it."""
    found: dict[nn.Module, list[str]] = {}
    wanted = set(layers)
    for parent in model.modules():
        if not parent._modules or not forward_is_the_class_s(parent):
            continue
        for path, function in reads(type(parent)).items():
            child = _at(parent, path)
            if child in wanted:
                found.setdefault(child, []).append(f"{type(parent).__name__}.{function}")
    consequence = "this weight past the layer, and no adapter is applied where that is done"
    return {layer: f"{' and '.join(dict.fromkeys(readers))} can read {consequence}" for layer, readers in found.items()}


def reads(cls: type[nn.Module]) -> dict[str, str]:
    """The paths of submodules whose weight code of `cls` reads when it is called, each with the name of a method."""
    known = _known.get(cls)
    if known is None:
        known = _known[cls] = _reads(cls)
    return known


def _reads(cls: type[nn.Module]) -> dict[str, str]:
    found: dict[str, str] = {}
    # the names of methods, each with the first place in the order of bases where it may be defined
    waiting, seen = [("forward", 0)], {("forward", 0)}
    while waiting:
        name, first = waiting.pop()
        bases = cls.__mro__[first:]
        place = next((first + i for i, base in enumerate(bases) if name in vars(base)), None)
        tree = None if place is None else _source(cls.__mro__[place], name)
        for node in () if tree is None else ast.walk(tree):
            path = _path(node)
            if len(path) > 1 and path[-1] == "weight" and not getattr(node, "is_asked", False):
                found.setdefault(".".join(path[:-1]), name)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = (node.func.attr, 0 if len(_path(node.func)) == 1 else place + 1)
                if (called[1] == 0 or _is_super(node.func.value)) and called not in seen:
                    seen.add(called)
                    waiting.append(called)
    return found


def _source(cls: type, name: str) -> ast.AST | None:
    """The code of a method, with `is_asked` at every expression of which it wants facts alone.

    None of torch's nn.Module, and where there is none to be had.
    """
    method = vars(cls)[name]
    if cls is nn.Module or not isinstance(method, FunctionType):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, SyntaxError, TypeError, ValueError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in FACTS:
            node.value.is_asked = True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr"):
            for argument in node.args:
                argument.is_asked = True
    return tree


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _path(node: ast.AST) -> tuple[str, ...]:
    """("a", "b") of the expression self.a.b; () of any other."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return tuple(reversed(names)) if isinstance(node, ast.Name) and node.id == "self" else ()


def _at(module: nn.Module | None, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module
