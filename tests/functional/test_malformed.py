"""A malformed call of any public function is a ValueError that names function, argument and value, and changes nothing.

tests/support/public_functions.py has a row for each: what every argument takes, and what it refuses. A call here gets
one wrong argument, each in turn, or one to three drawn at random.
"""

import contextlib
import inspect
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parameter import is_lazy

from dora_kernels import DoraLinear, DvoraLinear, reuse, to_dvora
from dora_kernels.extras.dvora import peft as dvora_peft
from dora_kernels.functional.arguments import described
from dora_kernels.planning.options import current_options
from tests.support import right_values, vera_problem
from tests.support.public_functions import MODULES, NO_ROW, PUBLIC, Public

CALLS = 1_000
"""Random calls of each function, in 0.4 s; every night twenty times as many, others."""
each_function = pytest.mark.parametrize("public", PUBLIC, ids=str)


@pytest.fixture(autouse=True)
def no_group_is_left():
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


# The table has everything.


def public_names() -> dict[str, Any]:
    """Every function and class that a user may call, by its name; constants are none."""
    found = {}
    for module in MODULES:
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", [name for name in own if not name.startswith("_")]):
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                found[name] = value
    return found


def methods(cls: type) -> dict[str, Any]:
    """The public methods of a class and its bases here that take an argument, by their qualified names."""
    found = {}
    for base in cls.__mro__:
        for name, value in vars(base).items() if base.__module__.startswith("dora_kernels") else ():
            method = getattr(value, "__func__", value)
            if not name.startswith("_") and inspect.isfunction(method) and parameters(method):
                found[method.__qualname__] = method
    return found


def parameters(function: Any) -> set[str]:
    """The names of a function's parameters, but for the instance or class that a method is of."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = [one.name for one in inspect.signature(function).parameters.values() if one.kind not in variadic]
    return {name for name in found if name not in ("self", "cls")}


def test_every_public_name_has_a_row():
    rows = {str(public) for public in PUBLIC}
    names = public_names()
    for cls in [public.function for public in PUBLIC if inspect.isclass(public.function)]:
        names |= methods(cls)
    assert len(names) > 70
    assert not names.keys() - rows - NO_ROW.keys()
    assert not NO_ROW.keys() - names.keys() and not NO_ROW.keys() & rows


@each_function
def test_every_argument_has_its_values(public):
    assert public.arguments.keys() == parameters(public.function)
    assert all(len(argument.refuses) > 5 for argument in public.arguments.values())


# What is right succeeds.


@each_function
def test_right_values_are_taken(public, tmp_path):
    public(public.good(tmp_path))
    for name, argument in public.arguments.items():
        for number, value in enumerate(argument.takes):
            folder = tmp_path / f"{name}{number}"
            folder.mkdir()
            try:
                public(public.good(folder) | {name: value})
            except Exception as error:
                raise AssertionError(f"{public}({name}={described(value)})") from error


# What is wrong is refused.


class Malformed:
    """Malformed calls of one function, which share the arguments that are right: nothing may change them."""

    def __init__(self, public: Public, folder: Path) -> None:
        self.public, self.root, self.made = public, folder, 0
        self.begin()

    def begin(self) -> None:
        """Make the arguments, in a folder of their own."""
        self.made += 1
        self.folder = self.root / str(self.made)
        self.folder.mkdir()
        self.good = self.public.good(self.folder)
        self.before = self.state()

    def state(self) -> object:
        """All that a call must leave as it is."""
        files = {path.relative_to(self.folder): path.is_file() and path.read_bytes() for path in self.folder.rglob("*")}
        scopes = len(reuse.store.scopes), len(reuse.store.by_layer)
        modes = current_options(), torch.get_default_dtype(), torch.is_grad_enabled()
        return files, scopes, modes, bytes(torch.get_rng_state().numpy()), state_of(self.good)

    def fault(self, changes: dict[str, object]) -> str:
        """Why this call is not the ValueError that it should be; "" where it is."""
        modules = {name: value for name, value in changes.items() if isinstance(value, nn.Module)}
        wrong = state_of(modules)
        try:
            with contextlib.redirect_stderr(None):
                self.public(self.good | changes)
        except ValueError as error:
            fault = self.fault_of(str(error), changes)
        except Exception as error:
            fault = f"is {type(error).__name__}: {str(error)[:100]}"
        else:
            fault = "succeeds"
        if self.state() != self.before or state_of(modules) != wrong:
            fault += " and changes something"
            self.begin()
        shown = {name: described(value) for name, value in changes.items()}
        return fault and f"{self.public}({shown}) {fault}"

    def fault_of(self, message: str, changes: dict[str, object]) -> str:
        """Why this message is not the one line that it should be; "" where it is."""
        fault = "is more than a line " if "\n" in message or len(message) > 600 else ""
        if not message.startswith(self.public.says) or "expected" not in message:
            fault += "does not name the function and what was expected "
        names, values = [], []
        for name, value in changes.items():
            argument = self.public.arguments[name]
            names += [name, *argument.called]
            values += [*argument.shown, *texts_of(value)]
        fault += "" if any(name in message for name in names) else "does not name the argument "
        fault += "" if any(value in message for value in values) else "does not show the value "
        return fault and f"{fault}({message[:200]})"


def state_of(value: object) -> object:
    """What a call could change of `value`; two of these are equal where it has not."""
    if is_lazy(value):
        return id(value), value.requires_grad
    if isinstance(value, Tensor):
        numbers = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return id(value), value._version, value.requires_grad, id(value.grad), value.shape, numbers
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().numpy())
    if isinstance(value, nn.Module):
        modules = list(value.modules())
        return [(id(one), type(one), list(vars(one)), one.training, own(one)) for one in modules]
    if isinstance(value, dict):
        return {key: state_of(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [state_of(entry) for entry in value]
    return state_of(vars(value)) if hasattr(value, "__dataclass_fields__") else repr(value)


def own(module: nn.Module) -> list[object]:
    """Parameters, buffers, submodules and numbers of hooks of one module."""
    parts = [state_of(part) for part in (*module._parameters.values(), *module._buffers.values())]
    hooks = [len(value) for name, value in vars(module).items() if name.endswith("_hooks")]
    return [*parts, *map(id, module._modules.values()), *hooks]


def texts_of(value: object) -> list[str]:
    """Any of these in a message shows the value, or a part of it that is wrong."""
    texts = [described(value)[:30], type(value).__name__, getattr(value, "__name__", "")]
    if isinstance(value, (list, tuple, dict)):
        texts += [text for part in value for text in texts_of(part)]
    if isinstance(value, Tensor) and not is_lazy(value):
        shape = "nested" if value.is_nested else str(tuple(value.shape))
        texts += [
            str(value.dtype),
            shape,
            str(value.layout),
            "meta" if value.is_meta else "requires_grad is True",
            "tensor(",
        ]
    return list(filter(None, texts))


@each_function
def test_every_wrong_value_is_a_value_error(public, tmp_path):
    malformed = Malformed(public, tmp_path)
    wrong = [(name, value) for name, argument in public.arguments.items() for value in argument.refuses]
    faults = [malformed.fault({name: value}) for name, value in wrong]
    assert not any(faults), "\n".join(filter(None, faults))


def could_be_right(value: object) -> bool:
    """A tensor of another shape or dtype: two of them may fit each other."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.layout is torch.strided


def draw(public: Public, random: random.Random) -> dict[str, object]:
    """One to three arguments that are wrong."""
    names = random.sample(sorted(public.arguments), random.randint(1, min(3, len(public.arguments))))
    changes = {name: random.choice(public.arguments[name].refuses) for name in names}
    for name in [name for name, value in changes.items() if could_be_right(value)][1:]:
        del changes[name]
    return changes


def fuzz(public: Public, folder: Path, calls: int) -> None:
    malformed, generator = Malformed(public, folder), random.Random(f"{public} {calls}")
    faults = [malformed.fault(draw(public, generator)) for _ in range(calls)]
    assert not any(faults), "\n".join(filter(None, faults))


@each_function
def test_a_thousand_malformed_calls(public, tmp_path):
    fuzz(public, tmp_path, CALLS)


@pytest.mark.nightly
@each_function
def test_many_malformed_calls(public, tmp_path):
    fuzz(public, tmp_path, 20 * CALLS)


# What is refused on the way, when a part is done.


def refused_on_the_way(change, kept: object) -> None:
    """change() is a ValueError of the backend, which sees the tensors last; `kept` is as it was."""
    before = state_of(kept)
    with pytest.raises(ValueError, match="no backend"):
        change()
    assert state_of(kept) == before


@pytest.mark.parametrize("method", ("from_linear", "reset_adapter", "merge"))
@pytest.mark.parametrize("cls", (DoraLinear, DvoraLinear))
def test_a_layer_is_not_half_made(cls, method, monkeypatch):
    linear = right_values.linear()
    layer = right_values.layer() if cls is DoraLinear else right_values.dvora_layer()
    arguments = (2, 1.0) if cls is DoraLinear else (right_values.projection(),)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    changes = {"from_linear": lambda: cls.from_linear(linear, *arguments)}

    def refuse(*_):
        raise ValueError("no backend")

    monkeypatch.setattr("dora_kernels.functional.weight.current_options", refuse)
    refused_on_the_way(changes.get(method) or getattr(layer, method), [layer, linear, *arguments])


@pytest.mark.parametrize("wrong", ("layer", "backend"))
def test_a_model_is_not_half_converted(wrong, monkeypatch):
    model = vera_problem.vera_model()
    last = vera_problem.layers(model)[-1]
    if wrong == "layer":
        last.vera_dropout["default"] = nn.Flatten()
    norms = dvora_peft.dvora_norm

    def refuse_the_last(weight, *factors):
        if wrong == "backend" and weight is last.base_layer.weight:
            raise ValueError("no backend")
        return norms(weight, *factors)

    monkeypatch.setattr(dvora_peft, "dvora_norm", refuse_the_last)
    before = state_of(model)
    with pytest.raises(ValueError, match="dropout is a|no backend"):
        to_dvora(model)
    assert state_of(model) == before
