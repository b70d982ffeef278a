"""What is known of a PEFT layer between two calls (adapters/peft/known.py): it ends with every change that counts.

Each change is made to a layer that is known, alone and in random sequences, and the call is then judged as a layer is
of which nothing is known.
"""

import contextlib
import copy
import gc
import pickle
import random
import weakref

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft.tuners.lora import dora, variants

import dora_kernels
from dora_kernels.adapters.peft import known
from dora_kernels.quant import QuantizedWeight
from tests.support.peft_problem import build, build_convolution, layers
from tests.support.problem import DEVICE
from tests.support.quantized_problem import build as build_quantized


class Sub(nn.Linear):
    """nn.Linear under another name."""


class TwoSteps(nn.Linear):
    """As Falcon's."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class SubConv(nn.Conv2d):
    """nn.Conv2d under another name."""


def over(cls, make):
    """The model of `make` with a first base layer of another class, of the same numbers."""
    model = make()
    layers(model)[0].base_layer.__class__ = cls
    return model


KINDS = {
    "linear": lambda: build(adapters=2),
    "subclass": lambda: over(Sub, lambda: build(adapters=2)),
    "two steps": lambda: over(TwoSteps, lambda: build(adapters=2)),
    "dropout": lambda: build(adapters=2, lora_dropout=0.5),
    "convolution": lambda: build_convolution(adapters=2)[0],
    "subclass of a convolution": lambda: over(SubConv, lambda: build_convolution(adapters=2)[0]),
    "dilated convolution": lambda: build_convolution(adapters=2, config={"padding": "same", "dilation": 2})[0],
    "nf4": lambda: build_quantized("nf4", adapters=2),
    "int8": lambda: build_quantized("int8", adapters=2),
}
DENSE = tuple(name for name in KINDS if name not in ("dropout", "nf4", "int8"))
PARTS = ("base_layer", "lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector")
HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


class OddParameter(nn.Parameter):
    """A weight with perhaps a meaning of its own."""


class OddVariant(variants.DoraLinearVariant):
    """A variant with perhaps a meaning of its own."""


def taken_over(kind):
    model = KINDS[kind]().to(DEVICE)
    dora_kernels.enable(model)
    layer = layers(model)[0]
    layer.set_adapter(first(layer))
    return layer


def first(layer):
    return next(iter(layer.lora_A))


def x_of(layer):
    sizes = [4] * len(getattr(layer.base_layer, "kernel_size", ()))
    return torch.zeros(2, layer.in_features, *sizes, device=DEVICE)


def part_of(layer, part):
    module = getattr(layer, part)
    return module if part == "base_layer" else module[first(layer)]


@contextlib.contextmanager
def put(dictionary, key, value):
    """dictionary[key] = value, until it is over."""
    missing = object()
    before = dictionary.get(key, missing)
    dictionary[key] = value
    try:
        yield
    finally:
        if before is missing:
            del dictionary[key]
        else:
            dictionary[key] = before


@contextlib.contextmanager
def on_class(cls, name, value):
    """cls.name = value, until it is over."""
    missing = object()
    before = vars(cls).get(name, missing)
    setattr(cls, name, value)
    try:
        yield
    finally:
        delattr(cls, name) if before is missing else setattr(cls, name, before)


@contextlib.contextmanager
def as_class(value, cls):
    before, value.__class__ = value.__class__, cls
    try:
        yield
    finally:
        value.__class__ = before


@contextlib.contextmanager
def data(tensor, change):
    before, tensor.data = tensor.data, change(tensor.data)
    try:
        yield
    finally:
        tensor.data = before


@contextlib.contextmanager
def attribute(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def hooked(module, kind):
    handle = getattr(module, f"register_{kind}")(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def active(layer, names):
    before = layer.active_adapter
    layer._active_adapter = names
    try:
        yield
    finally:
        layer._active_adapter = before


def odd(cls, **members):
    """A class over `cls`, which is not known."""
    return type(f"Odd{cls.__name__}", (cls,), members)


def refuse(*arguments):
    """A method in place of another."""
    raise AttributeError("refused")


def changes(layer):
    """A context manager for each change, by name."""
    name = first(layer)
    (second,) = (other for other in layer.lora_A if other != name)
    own, base, scaling = layer.__dict__, layer.base_layer, layer.scaling[name]
    lora_A, lora_B, magnitude = (part_of(layer, part) for part in ("lora_A", "lora_B", "lora_magnitude_vector"))
    made = {}
    for part in PARTS:
        module, holder = part_of(layer, part), layer._modules if part == "base_layer" else layer._modules[part]._modules
        key = part if part == "base_layer" else name
        for kind in HOOKS:
            made[f"{kind} on {part}"] = hooked, module, kind
        made |= {
            f"forward of {part}": (put, module.__dict__, "forward", lambda x: x),
            f"class of {part}": (as_class, module, odd(type(module))),
            f"class of {part} that reads otherwise": (as_class, module, odd(type(module), __getattr__=refuse)),
            f"another {part}": (put, holder, key, copy.deepcopy(module)),
            f"odd {part}": (put, holder, key, nn.Identity() if part != "lora_dropout" else nn.AlphaDropout(0.5)),
            f"{part} over the layer's": (put, own, part, copy.deepcopy(getattr(layer, part))),
        }
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or type(weight).__name__ in ("Params4bit", "Int8Params"):
            continue
        made |= {
            f"weight over that of {part}": (put, module.__dict__, "weight", OddParameter(weight.detach(), False)),
            f"class of the weight of {part}": (as_class, weight, OddParameter),
            f"another weight of {part}": (
                put,
                module._parameters,
                "weight",
                nn.Parameter(weight.detach().clone(), False),
            ),
            f"dtype of {part}": (data, weight, lambda old: old.to(torch.float64)),
            f"integers in {part}": (
                put,
                module._parameters,
                "weight",
                nn.Parameter(weight.detach().to(torch.int8), False),
            ),
            f"device of {part}": (put, module._parameters, "weight", nn.Parameter(weight.detach().to("meta"), False)),
            f"gradient of {part}": (attribute, weight, "requires_grad", not weight.requires_grad),
            f"{part} as ZeRO-3 leaves it": (not_gathered, weight),
        }
    for part, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        bias = nn.Parameter(torch.zeros(len(factor.weight), device=DEVICE))
        made[f"bias of {part}"] = put, factor._parameters, "bias", bias
        made[f"bias over that of {part}"] = put, factor.__dict__, "bias", bias
    made |= {
        "another bias": (put, base._parameters, "bias", nn.Parameter(torch.ones(layer.out_features, device=DEVICE))),
        "a bias over the base layer's": (put, base.__dict__, "bias", torch.ones(layer.out_features, device=DEVICE)),
        "class of the layer": (as_class, layer, refusing(type(layer))),
        "fan_in_fan_out": (put, own, "fan_in_fan_out", True),
        "cast_input_dtype_enabled": (put, own, "cast_input_dtype_enabled", False),
        "disabled": (put, own, "_disable_adapters", True),
        "merged": (put, own, "merged_adapters", [name]),
        "another scaling": (put, layer.scaling, name, 3.0),
        "a tensor as scaling": (put, layer.scaling, name, torch.tensor(float(scaling), device=DEVICE)),
        "infinite scaling": (put, layer.scaling, name, float("inf")),
        "no variant": (put, own, "lora_variant", {}),
        "another variant": (put, layer.lora_variant, name, OddVariant()),
        "another variant of the same class": (put, layer.lora_variant, name, type(layer.lora_variant[name])()),
        "class of the variant": (as_class, layer.lora_variant[name], odd(type(layer.lora_variant[name]))),
        "the second adapter": (active, layer, [second]),
        "its name alone": (active, layer, second),
        "both adapters": (active, layer, [name, second]),
        "the other way round": (active, layer, [second, name]),
        "an adapter that is missing": (active, layer, ["elsewhere"]),
        "PEFT's caching in eval mode": (caching, layer),
        "dropout's p": (put, part_of(layer, "lora_dropout").__dict__, "p", 0.9),
        "eval mode": (attribute, layer, "training", False),
    }
    for owner, module in (("the base layer", base), ("lora_A", lora_A)):
        made[f"forward of the class of {owner}"] = on_class, type(module), "forward", refuse
    made["__call__ of the class of the base layer"] = on_class, type(base), "__call__", refuse
    if hasattr(base, "dilation"):
        made["_conv_forward of the base layer"] = put, base.__dict__, "_conv_forward", refuse
        made["_conv_forward of lora_A"] = put, lora_A.__dict__, "_conv_forward", refuse
        made["_conv_forward of lora_B"] = put, lora_B.__dict__, "_conv_forward", refuse
        made["_conv_forward of its class"] = on_class, type(base), "_conv_forward", refuse
        made["dilation"] = put, base.__dict__, "dilation", tuple(3 for _ in base.dilation)
        made["padding"] = put, base.__dict__, "padding", tuple(0 for _ in base.dilation)
    return {key: lambda function=function, rest=rest: function(*rest) for key, (function, *rest) in made.items()}


@contextlib.contextmanager
def not_gathered(weight):
    with put(weight.__dict__, "ds_status", "not available"), data(weight, lambda old: old.new_empty(0)):
        yield


@contextlib.contextmanager
def caching(layer):
    with attribute(dora, "ENABLE_DORA_CACHING", True), attribute(layer, "training", False):
        yield


def refusing(cls):
    """A class over that of the layer which computes nothing."""

    def read_base(cls, layer):
        return None, "it refuses"

    return type("Refusing", (cls,), {"read_base": classmethod(read_base)})


def is_same_weight(actual, expected):
    """True of the same tensor, or of a view of the same memory, or of equal quantized weights."""
    if isinstance(expected, QuantizedWeight):
        return all(map(torch.equal, actual.tensors, expected.tensors)) and actual.dtype == expected.dtype
    one, other = ((t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for t in (actual, expected))
    return one == other


def difference(layer, x):
    """What is wrong with a call's parts, as a layer takes them that may be known; None if nothing is."""
    parts, reason = layer.read_call(x)
    expected, expected_reason = layer._judge(x)
    if reason != expected_reason:
        return f"{reason!r}; expected {expected_reason!r}"
    if reason is not None:
        return None
    if parts.operand is not expected.operand or not is_same_weight(parts.weight, expected.weight):
        return "another operand or weight"
    for actual, adapter in zip(parts.adapters, expected.adapters, strict=True):
        if not all(one is other for one, other in zip(actual, adapter, strict=True)):
            return "another adapter"
    if parts.dora is not None:
        (adapter,) = expected.adapters
        over = adapter.over(expected.weight)
        if not all(one is other for one, other in zip(parts.dora[1:], over[1:], strict=True)):
            return "other tensors of the adapter"
        if parts.bias is not layer.base_layer.bias:
            return "another bias"
    return None


def known_layer(kind):
    layer = taken_over(kind)
    x = x_of(layer)
    layer.read_call(x)
    assert layer.__dict__[known.ATTRIBUTE].state is not None
    parts, reason = layer.read_call(x)
    assert reason is None and parts.dora is not None  # the second call is not judged anew
    return layer, x


def wrong_after(layer, x):
    """The changes after which a known layer's call is not judged as it should be."""
    wrong = []
    for name, change in changes(layer).items():
        layer.read_call(x)
        with change():
            found = difference(layer, x)
        if found is not None:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("kind", KINDS)
def test_every_change_is_seen(kind):
    layer, x = known_layer(kind)
    for name, change in changes(layer).items():
        layer.read_call(x)
        with change():
            assert difference(layer, x) is None, name
        assert difference(layer, x) is None, f"after {name}"
    assert layer.read_call(x)[0].dora is not None


@pytest.mark.parametrize("kind", KINDS)
def test_random_sequences_of_changes(kind):
    layer, x = known_layer(kind)
    generator = random.Random(0)
    undo, hits = [], 0
    for _ in range(300):
        if undo and generator.random() < 0.7:
            undo.pop().close()
        else:
            stack = contextlib.ExitStack()
            try:
                stack.enter_context(generator.choice(list(changes(layer).values()))())
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
                continue  # it cannot be made beside those that were
            undo.append(stack)
        try:
            layer._judge(x)
        except (AttributeError, RuntimeError, TypeError):
            continue  # nobody computes such a layer
        assert difference(layer, x) is None
        parts, reason = layer.read_call(x)
        hits += reason is None and parts.dora is not None
    assert hits > 10


def test_a_device_of_x_is_seen():
    layer, x = known_layer("linear")
    assert layer.read_call(x.to("meta"))[1] == layer._judge(x.to("meta"))[1] is not None


@pytest.mark.parametrize("kinds", [DENSE, ("int8", "nf4")])
def test_every_element_of_the_state_is_needed(kinds, monkeypatch):
    """Without any one of them some change of some layer is not seen."""
    read, needed, elements = known.read, set(), set()
    for layer, x in map(known_layer, kinds):
        elements |= set(range(len(read(layer, x.device, layer.base_kind)[0])))
        for index in elements - needed:

            def without(*arguments, index=index):
                reading = read(*arguments)
                return None if reading is None else ((*reading[0][:index], *reading[0][index + 1 :]), *reading[1:])

            monkeypatch.setattr(known, "read", without)
            vars(layer).pop(known.ATTRIBUTE)
            layer.read_call(x)
            if wrong_after(layer, x) or layer.read_call(x.to("meta"))[1] is None:
                needed.add(index)
            monkeypatch.undo()
    # a quantized weight is read at each call, and has to be on the device of x
    assert elements - needed == ({4} if "int8" in kinds else set())


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_an_adapter_that_is_deleted_is_not_held(kind):
    layer, _ = known_layer(kind)
    parts = [weakref.ref(part_of(layer, part).weight) for part in ("lora_A", "lora_B", "lora_magnitude_vector")]
    layer.delete_adapter(first(layer))
    gc.collect()
    assert [part() for part in parts] == [None] * 3


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_knows_nothing_of_its_own(copied):
    layer, x = known_layer("linear")
    twin = copied(layer)
    assert difference(twin, x) is None
    assert vars(twin)[known.ATTRIBUTE] is not vars(layer)[known.ATTRIBUTE] or copied is copy.copy
    dora_kernels.disable(layer)
    assert known.ATTRIBUTE not in vars(layer)
