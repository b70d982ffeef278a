"""Gluon's names for the source of a simulated kernel, each of which refuses what Gluon's own would not take."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from tests.support.gluon_schedule import Body
from tests.support.gluon_values import Layout

if TYPE_CHECKING:
    from tests.support.gluon_simulator import Simulator

LANGUAGE = "dora_kernels.kernels.hopper.language"


def load(source: str, simulator: Simulator) -> types.SimpleNamespace:
    """The names that a kernel's source defines; its functions are generators, which stop before every operation."""
    names: dict[str, Any] = {"__name__": "simulated", "_run": _run}
    with mock.patch.dict(sys.modules, {LANGUAGE: _module(simulator)}):
        exec(compile(_Stopping().visit(ast.parse(source)), "<kernel>", "exec"), names)
    return types.SimpleNamespace(**names)


class _Stopping(ast.NodeTransformer):
    """Makes generators of functions, in which each call runs what it gets, if that is one, to its end."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.body = [self.visit(statement) for statement in node.body]
        node.body += ast.parse("return\nyield").body  # with none it would be no generator
        return ast.fix_missing_locations(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.value = node.value and self.visit(node.value)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.Lambda:
        return node

    def visit_Call(self, node: ast.Call) -> ast.YieldFrom:
        self.generic_visit(node)
        return ast.YieldFrom(ast.Call(ast.Name("_run", ast.Load()), [node.func, *node.args], node.keywords))


def _run(function: Callable, *arguments: object, **named: object) -> Body:
    result = function(*arguments, **named)
    return (yield from result) if inspect.isgenerator(result) else result


def _module(simulator: Simulator) -> types.ModuleType:
    """language.py of the package, by the simulator."""
    real = _real_language()

    def slice_layout(dim: int, parent: Layout) -> Layout:
        assert isinstance(parent, Layout), parent
        return Layout("SliceLayout", (dim, parent))

    def static_assert(cond: bool, msg: str = "") -> None:
        assert cond, "static_assert"

    def jit(fn: Callable | None = None, do_not_specialize: Sequence[str] = ()) -> Callable:
        if fn is None:
            return functools.partial(jit, do_not_specialize=do_not_specialize)
        assert set(do_not_specialize) <= set(inspect.signature(fn).parameters), do_not_specialize
        return fn

    language = {
        "constexpr": object,
        "program_id": lambda axis: simulator.place[0] if axis == 0 else 0,
        "num_programs": lambda axis: simulator.place[1] if axis == 0 else 1,
        "cdiv": lambda x, div: -(-x // div),
        "minimum": lambda x, y: min(x, y),
        "maximum": lambda x, y: max(x, y),
        "where": lambda condition, x, y: x if condition else y,
        "zeros": simulator.zeros,
        "expand_dims": simulator.expand_dims,
        "num_warps": simulator.num_warps_of_role,
        "static_range": range,
        "static_assert": static_assert,
        "SliceLayout": slice_layout,
        "NVMMADistributedLayout": simulator.mma_layout,
        "int64": torch.int64,
        "float32": torch.float32,
        "allocate_shared_memory": simulator.allocate_shared_memory,
        "warp_specialize": simulator.warp_specialize,
    }
    barriers = {name: getattr(simulator, name) for name in ("init", "expect", "arrive", "wait")}
    barriers["MBarrierLayout"] = lambda: Layout("MBarrierLayout")
    names = {
        name: getattr(simulator, name)
        for name in ("tma_load", "tma_store", "tma_store_wait", "fence_async_shared")
        + ("warpgroup_mma", "warpgroup_mma_init", "warpgroup_mma_wait")
    }
    module = types.ModuleType(LANGUAGE)
    vars(module).update(_held_to(names, real))
    module.gl = types.SimpleNamespace(**_held_to(language, getattr(real, "gl", None)))
    module.mbarrier = types.SimpleNamespace(**_held_to(barriers, getattr(real, "mbarrier", None)))
    module.gluon = types.SimpleNamespace(jit=jit)
    return module


@functools.cache
def _real_language() -> Any:
    """Gluon as the kernel has it on a GPU; None where this Triton has no such Gluon."""
    try:
        import dora_kernels.kernels.hopper.language as language
    except (ImportError, AttributeError):
        return None
    return language


def _held_to(functions: dict[str, Any], real: Any) -> dict[str, Any]:
    """The functions, each of which refuses a call that Gluon's own of this name would not take."""
    return {name: _held(function, getattr(real, name, None)) for name, function in functions.items()}


def _held(function: Any, real: Any) -> Any:
    if real is None or isinstance(function, (type, torch.dtype)):
        return function
    signature = _signature(getattr(real, "fn", real))
    known = set()

    def call(*arguments: object, **named: object) -> Any:
        kind = (len(arguments), *named)
        if kind not in known:
            signature.bind(*arguments, **named)
            known.add(kind)
        return function(*arguments, **named)

    return call


@functools.cache
def _signature(real: Any) -> inspect.Signature:
    signature = inspect.signature(real)
    kept = [value for name, value in signature.parameters.items() if name not in ("_semantic", "_generator")]
    return signature.replace(parameters=kept)
