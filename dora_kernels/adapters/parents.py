"""Parents that read a layer's weight past the layer. Where they do no adapter is applied, enabled or not.

torch's nn.TransformerEncoderLayer hands linear1.weight to a fast path in eval mode, WavLM's attention passes
q_proj.weight to a function, nn.MultiheadAttention never calls its out_proj, which is therefore left alone. The source
says so, and is read here: `forward`, of the class or put on the instance, what that wraps, and the methods that it
calls on self, for `self.name.weight` or a longer path of names. A weight that is handed on under another name is not
seen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from torch import nn

from dora_kernels.adapters.source import reads_of

CALLABLE = (FunctionType, MethodType, functools.partial)
"""The types of attributes of an instance that may be called in place of a method."""


class Remark(NamedTuple):
    """Text of the report on a layer whose weight a module reads past it."""

    text: str
    is_called: bool = True
    """False of the out_proj of an nn.MultiheadAttention that never calls it."""


def remarks(model: nn.Module, layers: Iterable[tuple[nn.Module, nn.Module]]) -> dict[nn.Module, Remark]:
    """The remark in the report on each layer whose weight a module of `model` reads past it.

    layers: (what a parent holds, the layer), the same module but where a library's layer stands beside the wrapped one.
    """
    found: dict[nn.Module, list[str]] = {}
    uncalled: dict[nn.Module, str] = {}
    held: dict[nn.Module, list[nn.Module]] = {}
    for module, layer in layers:
        held.setdefault(module, []).append(layer)
    of_class: dict[type, Uses] = {}
    for parent in model.modules():
        if not parent._modules:
            continue
        cls = type(parent)
        if not any(isinstance(value, CALLABLE) for value in vars(parent).values()):
            if cls not in of_class:
                of_class[cls] = uses(cls)
            used = of_class[cls]
        else:
            used = uses(cls, parent)
        for path, function in used.read.items():
            for layer in held.get(_at(parent, path), ()):
                reader = f"{cls.__name__}.{function}"
                found.setdefault(layer, []).append(reader)
                if isinstance(parent, nn.MultiheadAttention) and path == "out_proj" and path not in used.called:
                    uncalled.setdefault(layer, reader)
    return {layer: _remark(readers, uncalled.get(layer)) for layer, readers in found.items()}


def _remark(readers: list[str], uncalled: str | None) -> Remark:
    names = dict.fromkeys(readers)
    consequence = "this weight past the layer, and no adapter is applied where that is done"
    if uncalled is None:
        return Remark(f"{' and '.join(names)} can read {consequence}")
    others = [name for name in names if name != uncalled]
    more = f"; {' and '.join(others)} can read it, too" if others else ""
    return Remark(f"{uncalled} reads this weight and never calls the layer: no adapter is applied there{more}", False)


class Uses(NamedTuple):
    """The submodules that code of a class uses when it is called."""

    read: dict[str, str]
    """The paths of those whose weight is read, each with the name of a method."""
    called: set[str]
    """The names of those that are called, and of methods of the class."""


def uses(cls: type[nn.Module], parent: nn.Module | None = None) -> Uses:
    """The submodules that code of `cls` uses when it is called.

    parent: the module itself, if functions on the instance replace methods of its class.
    """
    found: dict[str, str] = {}
    # the names of methods, each with the first place in the order of bases where it may be defined
    waiting, seen = [("forward", 0)], {("forward", 0)}
    while waiting:
        name, first = waiting.pop()
        own = () if parent is None or first else tuple(_functions(vars(parent).get(name), parent))
        bases = cls.__mro__[first:]
        place = next((first + i for i, base in enumerate(bases) if name in vars(base)), None)
        if not own and place is not None and cls.__mro__[place] is not nn.Module:
            own = tuple(_functions(vars(cls.__mro__[place])[name], parent))
        for function, names in own:
            known = reads_of(function)
            for root, path in known.weights:
                if root in names:
                    found.setdefault(path, name)
            for root, method in known.calls:
                if root is None and place is not None:
                    called = (method, place + 1)
                elif root in names:
                    called = (method, 0)
                else:
                    continue
                if called not in seen:
                    seen.add(called)
                    waiting.append(called)
    return Uses(found, {name for name, _ in seen})


def _functions(value: Any, parent: nn.Module | None) -> Iterator[tuple[FunctionType, set[str]]]:
    """The functions that run when `value` is called, also through wrappers and closures; each with the names that
    `parent` has in it: that of the first parameter, and those of closures."""
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, functools.partial):
            waiting += [value.func, vars(value).get("__wrapped__")]
        elif isinstance(value, MethodType):
            if value.__self__ is parent:
                waiting.append(value.__func__)
        elif isinstance(value, FunctionType) and value not in seen:
            seen.add(value)
            cells = dict(zip(value.__code__.co_freevars, map(_content, value.__closure__ or ()), strict=True))
            names = {name for name, content in cells.items() if parent is not None and content is parent}
            yield value, names | {*value.__code__.co_varnames[: min(1, value.__code__.co_argcount)]}
            waiting += [vars(value).get("__wrapped__"), *cells.values()]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _at(module: nn.Module | None, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module
