"""A graph that somebody makes of a layer has in it what computes the norm, and nothing that was kept."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import dora_kernels
from dora_kernels import reuse
from dora_kernels.extras.dvora import dvora_linear
from dora_kernels.functional.tracing import is_traced, is_transformed

pytest.importorskip("peft")

from tests.support.layer_kinds import ENABLED, seeded  # noqa: E402

# not over 4 bits: their libraries' layers cannot be traced, nor have their state dicts
TRACED = [kind for kind in ENABLED if kind not in ("peft, nf4", "peft, hqq")]


def state_of(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


def write(state, values):
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)


def jit(model, x):
    """Checked by torch, which traces twice and compares the graphs."""
    traced = torch.jit.trace(model, x)
    return lambda state, x: (write(state_of(traced), state), traced(x))[1]


def fx(model, x, **how):
    return make_fx(lambda state, x: functional_call(model, state, (x,)), **how)(state_of(model), x)


def exported(model, x, **how):
    program = torch.export.export(model, (x,), **how).module()
    return lambda state, x: (write(state_of(program), state), program(x))[1]


def compiled(model, x):
    program = torch.compile(model, backend="aot_eager")
    program(x)
    return lambda state, x: (write(state_of(model), state), program(x))[1]


TRACERS = {
    "jit.trace": jit,
    "make_fx": fx,
    "make_fx, fake": lambda model, x: fx(model, x, tracing_mode="fake"),
    "make_fx, before dispatch": lambda model, x: fx(model, x, pre_dispatch=True),
    "export": lambda model, x: exported(model, x, strict=False),
    "compile": compiled,
}
# what bitsandbytes' weights and PEFT's buffers, one for all VeRA layers, do not go through; nor does DVoRA, which PEFT,
# whose every traced call is, does not compute: the call says so
CANNOT = {
    ("jit.trace", "peft, int8"),
    ("jit.trace", "to_dvora"),
    ("export", "peft, int8"),
    ("compile", "peft, int8"),
    ("make_fx, fake", "peft, int8"),
    ("make_fx, fake", "to_dvora"),
}


@pytest.mark.parametrize(
    ("kind", "tracer"),
    [
        pytest.param(kind, tracer, marks=[pytest.mark.nightly] if tracer == "compile" and kind != "peft" else [])
        for kind in TRACED
        for tracer in TRACERS
    ],
)
def test_the_program_follows_its_weights(kind, tracer):
    """Traced inside the scope, after a call that has kept the norm; outside, cold and warm."""
    if (tracer, kind) in CANNOT:
        pytest.skip("the library's tensors cannot be traced so")
    for situation in ("inside", "cold", "warm") if tracer == "jit.trace" else ("inside", "cold"):
        model, x = ENABLED[kind]()
        model.eval()
        with torch.no_grad():
            if situation == "inside":
                with dora_kernels.frozen_adapters(model):
                    first = model(x)
                    kept = dict(reuse.store.by_layer)
                    program = TRACERS[tracer](model, x)
                    assert kept and all(reuse.store.by_layer.get(layer) is one for layer, one in kept.items())
            else:
                first = model(x) if situation == "warm" else seeded(copy.deepcopy(model), x)
                program = TRACERS[tracer](model, x)
            state = {n: 1.5 * value if value.is_floating_point() else value for n, value in state_of(model).items()}
            twin = copy.deepcopy(model)
            write(state_of(twin), state)
            changed = twin(x)
            assert not torch.allclose(changed, first, rtol=1e-2)
            torch.testing.assert_close(program(state, x), changed, rtol=1e-5, atol=1e-5, msg=situation)


answers = []


class Asking(nn.Module):
    def forward(self, x):
        answers.append((is_traced(), is_transformed()))
        return x * 2


def under(context):
    def ask(module, x):
        with context():
            module(x)

    return ask


ASKED = {
    "plain": (lambda module, x: module(x), (False, False)),
    "no gradients": (under(torch.no_grad), (False, False)),
    "a default device": (under(lambda: torch.device("cpu")), (False, False)),
    "jit.trace": (lambda module, x: torch.jit.trace(module, x, check_trace=False), (True, False)),
    "make_fx": (lambda module, x: make_fx(module)(x), (True, False)),
    "before dispatch": (lambda module, x: make_fx(module, pre_dispatch=True)(x), (True, False)),
    "export": (lambda module, x: torch.export.export(module, (x,), strict=False), (True, False)),
    "a mode": (under(lambda: FlopCounterMode(display=False)), (True, False)),
    "vmap": (lambda module, x: torch.func.vmap(module)(x), (False, True)),
    "grad": (lambda module, x: torch.func.grad(lambda x: module(x).sum())(x), (False, True)),
    "functionalize": (lambda module, x: torch.func.functionalize(module)(x), (False, True)),
    "jvp": (lambda module, x: torch.func.jvp(module, (x,), (x,)), (False, True)),
    "forward mode": (under(forward_ad.dual_level), (False, True)),
}


@pytest.mark.parametrize("how", ASKED)
def test_who_is_asked(how):
    ask, expected = ASKED[how]
    answers.clear()
    ask(Asking(), torch.ones(3))
    assert set(answers) == {expected}
    answers.clear()
    Asking()(torch.ones(3))
    assert answers == [(False, False)]


def arguments(M, trained):
    """x, lora_A, lora_B and magnitude of dora_linear over WEIGHT."""
    shapes = {"x": (M, 6), "lora_A": (2, 6), "lora_B": (5, 2), "magnitude": (5,)}
    return [torch.randn(shape, requires_grad=name in trained) for name, shape in shapes.items()]


@pytest.mark.parametrize("trained", (("x", "lora_B", "magnitude"), ("x", "lora_A", "lora_B", "magnitude"), ("lora_B",)))
def test_the_function_is_traced_without_gradients(trained):
    """A recorded autograd Function is replayed with the Python objects of the recorded call: with its x."""
    weight = torch.randn(5, 6)

    def call(x, *adapter):
        return dora_kernels.dora_linear(x, weight, *adapter, 0.5)

    with pytest.raises(NotImplementedError, match="dora_linear: torch.jit.trace cannot record our backward pass"):
        torch.jit.trace(call, arguments(3, trained), check_trace=False)
    with torch.no_grad():
        traced, others = torch.jit.trace(call, arguments(3, trained), check_trace=False), arguments(4, trained)
        torch.testing.assert_close(traced(*others), call(*others))


@pytest.mark.parametrize("name", ("weight_norm", "dvora_linear", "dvora_linear, frozen"))
def test_the_other_functions_are_replayed_with_their_gradients(name):
    weight, vera_A, vera_B = torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
    if name == "weight_norm":
        shapes, frozen = [(2, 6), (5, 2)], ()
        call = functools.partial(dora_kernels.weight_norm, weight, scaling=0.5, norm_grad=True)
    else:
        shapes, frozen = [(3, 6), (2,), (5,), (5,)], (3,) if "frozen" in name else ()
        call = lambda x, *adapter: dvora_linear(x, weight, vera_A, vera_B, *adapter)  # noqa: E731
    recorded, others = (
        [torch.randn(shape, requires_grad=number not in frozen) for number, shape in enumerate(shapes)]
        for _ in range(2)
    )
    traced = torch.jit.trace(lambda *tensors: call(*tensors), recorded, check_trace=False)

    def first_and_second(function):
        leaves = [tensor for tensor in others if tensor.requires_grad]
        y = function(*others)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return y, first, torch.autograd.grad(sum(one.square().sum() for one in first), leaves)

    torch.testing.assert_close(first_and_second(traced), first_and_second(call))
