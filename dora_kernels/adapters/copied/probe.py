"""The test of a layer that looks like a library's: its own forward is run and compared with what dora_kernels computes.

A shrunk twin is run: an object of the layer's own class, with the layer's own attributes and a few random float64
numbers for each parameter. So a large layer costs no more, no device is needed, the layer stays as it is, and a fresh
adapter (B = 0) proves as much as a trained one. Output and every gradient are compared, in eval mode and in train mode
with a dropout of one half. The rows of the twin's weight have sizes from 1e-7 to 10: an eps in the norm shows only in
small rows.

The test cannot see a branch that is taken only for other numbers, shapes, devices or dtypes; what happens inside the
submodules in Structure.opaque (a parallel or a quantized base layer), which plain ones replace; and attributes that
change after enable().
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels.adapters.copied.structure import LayerParts, Structure
from dora_kernels.adapters.taking import TakenOver, class_over, library_class
from dora_kernels.planning.options import own_options
from dora_kernels.types import DoraWeight

N, K, R = 7, 5, 3
ROWS = (1.0, 10.0, 1e-1, 1e-2, 1e-3, 1e-5, 1e-7)
"""The sizes of the rows of the twin's weight."""
TOLERANCE = 1e-5
"""Relative to the norm of each row: an intermediate in float32 is not another meaning."""
DROPOUT = 0.5
SEED = 0
NOT_COPIED = ("forward", "_old_forward", "_hf_hook", "dora_dropout")
"""Attributes that a twin does not get: accelerate's, which are bound to the module, and what take_over sets."""

PLAIN = (bool, int, float, str, type(None))
"""The types of attributes that are settings."""
REMEMBERED = 1024
"""The number of results that are kept. A layer that differs from all others in a setting needs a run for itself."""

_results: dict[Hashable, str | None] = {}


@torch.inference_mode(False)
def why_not_same(layer: nn.Module, parts: LayerParts, computed_by: type[Structure]) -> str | None:
    """The reason why `layer`, made of `parts`, does not compute what `computed_by` computes; None if it does.

    Run once for layers of the same code and the same settings.
    """
    small = _small_parts(parts)
    known, unknown = _by_identity(layer, parts, small, computed_by.opaque)
    if unknown is not None:
        return f"it has a tensor that is no part of a DoRA layer: {unknown}"
    key = computed_by, _code(layer), _settings(layer, computed_by.opaque), parts.bias is None, parts.norm_grad
    if key in _results:
        return _results[key]
    found = _run(layer, small, known, computed_by)
    while len(_results) >= REMEMBERED:
        _results.pop(next(iter(_results)), None)
    _results[key] = found
    return found


def _run(layer: nn.Module, small: LayerParts, known: dict[int, Tensor], computed_by: type[Structure]) -> str | None:
    # the generator of the CPU alone: manual_seed and fork_rng would touch the accelerator's too
    state = torch.default_generator.get_state()
    try:
        twins = _twins(layer, small, known, computed_by)
        for training in (False, True):
            for module in (module for twin in twins for module in twin.modules()):
                module.training = training  # not by train(), which merges in some libraries
            expected, actual = map(_outcome, twins)
            names = [name for name in expected if _differs(actual[name], expected[name])]
            if names:
                mode = "train" if training else "eval"
                return f"it computes something else than {computed_by.formula} in {mode} mode, see {', '.join(names)}"
    except Exception as error:  # somebody's code may raise anything
        message = str(error).partition("\n")[0]
        return f"its forward could not be checked: {type(error).__name__}: {message}"
    finally:
        torch.default_generator.set_state(state)
    return None


def _twins(
    layer: nn.Module, small: LayerParts, known: dict[int, Tensor], computed_by: type[Structure]
) -> list[nn.Module]:
    """Two small layers of the same numbers: one of the class of `layer`, and one that is taken over."""
    cls = library_class(layer)
    twins = []
    for twin_class in (cls, class_over(cls, computed_by)):
        twin = _twin(layer, known)
        twin.__class__ = cls
        for size, features in (("in_features", K), ("out_features", N)):
            if size in vars(twin):
                setattr(twin, size, features)
        computed_by.stand_ins(twin, small)
        twin.__class__ = twin_class
        twins.append(twin)
    return twins


def _outcome(twin: nn.Module) -> dict[str, Tensor | None]:
    """The outputs of a twin, and the gradients of x and of every parameter that has one, by name."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    x, dy = (torch.randn(2, 4, n, dtype=torch.float64, device="cpu", generator=generator) for n in (K, N))
    x.requires_grad_()
    inputs = {"x": x} | {name: tensor for name, tensor in twin.named_parameters() if tensor.requires_grad}
    torch.default_generator.manual_seed(SEED)
    with torch.enable_grad(), torch.autocast("cpu", enabled=False), own_options(backend="reference"):
        returned = _computed(twin, x) if isinstance(twin, TakenOver) else twin(x)
        y, *more = returned if isinstance(returned, tuple) else (returned,)
        gradients = torch.autograd.grad(y, list(inputs.values()), dy, allow_unused=True)
    outcome = {"y": y.detach().reshape(-1, N).T} | {f"output {i + 1}": value for i, value in enumerate(more)}
    return outcome | {f"d{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}


def _computed(twin: Structure, x: Tensor) -> Any:
    """The output of a twin that is taken over. Its forward is not called: it may hand the call to the library."""
    parts, against = twin.read(twin)
    if against is not None:
        raise ValueError(against)
    return twin.compute(x, parts)


def _differs(actual: Tensor | None, expected: Tensor | None) -> bool:
    """True if a row is further from the library's than TOLERANCE of that row's norm."""
    if actual is None or expected is None:
        return actual is not expected
    if actual.shape != expected.shape:
        return True
    actual, expected = (tensor.detach().double().reshape(tensor.shape[0], -1) for tensor in (actual, expected))
    return not bool(((actual - expected).norm(dim=1) <= TOLERANCE * expected.norm(dim=1)).all())


def _small_parts(parts: LayerParts) -> LayerParts:
    """Random numbers in float64 for every tensor of `parts`: B != 0, and gains from about 0.5 to 2."""
    generator = torch.Generator("cpu").manual_seed(SEED)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device="cpu", generator=generator)

    rows = torch.tensor(ROWS, dtype=torch.float64, device="cpu")
    bias = parts.bias
    magnitude = rows * K**0.5 * (1 + random(N).tanh()).clamp(min=0.2)
    dora = DoraWeight(
        weight=nn.Parameter(rows[:, None] * random(N, K), requires_grad=False),
        lora_A=nn.Parameter(random(R, K)),
        lora_B=nn.Parameter(rows[:, None] * random(N, R) / max(abs(parts.dora.scaling), 1.0)),
        magnitude=nn.Parameter(magnitude),
        scaling=parts.dora.scaling,
    )
    bias = None if bias is None else nn.Parameter(rows * random(N), requires_grad=bias.requires_grad)
    return parts._replace(dora=dora, bias=bias)


def _by_identity(
    layer: nn.Module, parts: LayerParts, small: LayerParts, opaque: tuple[str, ...]
) -> tuple[dict[int, Tensor], str | None]:
    """The small tensor for each tensor of the layer, by id; and the name of one that is no part of it."""
    pairs = zip((*parts.dora, parts.bias), (*small.dora, small.bias), strict=True)
    sources = {id(owner(value)): new for value, new in pairs if isinstance(value, Tensor)}
    known: dict[int, Tensor] = {}
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if _is_within(name, opaque):
            continue
        new = sources.get(id(tensor))
        if new is None:
            return {}, f"{name} (made in inference mode)" if tensor.is_inference() else name
        shape = (N, 1) if new.dim() == 1 and tensor.dim() == 2 else new.shape
        known[id(tensor)] = nn.Parameter(new.detach().view(shape), requires_grad=new.requires_grad)
    return known, None


def owner(tensor: Tensor) -> Tensor:
    """The tensor itself, or what it is a view of."""
    return tensor if tensor._base is None else tensor._base


def _twin(module: nn.Module, known: dict[int, Tensor]) -> nn.Module:
    """`module` with the small tensors for its own, without its hooks; every other attribute is shared."""
    twin = module.__class__.__new__(module.__class__)
    for name, value in vars(module).items():
        if name not in NOT_COPIED:
            vars(twin)[name] = OrderedDict() if "hooks" in name else value
    vars(twin)["_parameters"] = {name: known.get(id(value), value) for name, value in module._parameters.items()}
    vars(twin)["_buffers"] = dict(module._buffers)
    vars(twin)["_modules"] = {
        name: None if child is None else _twin(child, known) for name, child in module._modules.items()
    }
    weight = twin._parameters.get("weight")
    if isinstance(twin, nn.Linear) and weight is not None and weight.dim() == 2:
        twin.out_features, twin.in_features = weight.shape
    if isinstance(twin, nn.Dropout):
        twin.p = DROPOUT
    return twin


def _code(layer: nn.Module) -> Hashable:
    """Every function and plain attribute of the classes of a layer and its submodules, of torch's the class: libraries
    patch classes and make new ones, a class for each layer. By weak references: the key keeps no class alive."""
    return tuple(tuple(map(_functions, library_class(module).__mro__)) for module in layer.modules())


def _functions(cls: type) -> Hashable:
    if cls.__module__.partition(".")[0] in ("torch", "builtins"):
        return cls
    made_of: list[Hashable] = []
    for name, value in vars(cls).items():
        if type(value) in PLAIN and not name.startswith("__"):
            made_of.append((name, value))
        parts = (value.fget, value.fset) if isinstance(value, property) else (getattr(value, "__func__", value),)
        made_of += [weakref.ref(part) for part in parts if isinstance(part, FunctionType)]
    return tuple(made_of)


def _settings(layer: nn.Module, opaque: tuple[str, ...]) -> Hashable:
    """The plain attributes of a layer and its submodules, but for those in which two layers of a kind differ."""
    skipped = {"training", "in_features", "out_features", *NOT_COPIED}
    return tuple(
        (path, name, value)
        for path, module in layer.named_modules()
        if not _is_within(path, opaque)
        for name, value in vars(module).items()
        if type(value) in PLAIN and name not in skipped
    )


def _is_within(path: str, modules: tuple[str, ...]) -> bool:
    """True if `path` is one of `modules`, or inside one of them."""
    return any(path == module or path.startswith(f"{module}.") for module in modules)
