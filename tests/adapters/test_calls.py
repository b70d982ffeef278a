"""Calls that are the library's whatever the layer: what surrounds them, against a stock twin. calls.py says which."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import dora_kernels
from dora_kernels import ops
from tests.support.layer_kinds import STOCK, assert_same, leaves, lora_dropout, pair, some, y_and_gradients

pytest.importorskip("peft")

from peft import VeraConfig, get_peft_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::UserWarning")


def trained(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def loss(model, x):
    return lambda parameters, x=x: functional_call(model, parameters, (x,)).pow(2).sum()


def tangents(parameters):
    return {name: p.sin() for name, p in parameters.items()}


def per_sample_gradients(model, x):
    return vmap(grad(lambda p, one: loss(model, one[None])(p)), (None, 0))(trained(model), x)


def jacobian_reverse(model, x):
    return jacrev(lambda p: functional_call(model, p, (x,)))(trained(model))


def jacobian_forward(model, x):
    return jacfwd(lambda p: functional_call(model, p, (x,)))(trained(model))


def second_derivatives(model, x):
    name, parameter = list(trained(model).items())[-1]
    return hessian(lambda p: loss(model, x)({name: p}))(parameter)


def directional(model, x):
    parameters = trained(model)
    return jvp(loss(model, x), (parameters,), (tangents(parameters),))


def reverse(model, x):
    y, pull = vjp(lambda p: functional_call(model, p, (x,)), trained(model))
    return y, pull(torch.ones_like(y))


def hessian_vector(model, x):
    parameters = trained(model)
    return jvp(grad(loss(model, x)), (parameters,), (tangents(parameters),))[1]


def linear(model, x):
    parameters = trained(model)
    y, push = linearize(lambda p: functional_call(model, p, (x,)), parameters)
    return y, push(tangents(parameters))


def batched(model, x):
    with torch.no_grad():
        return vmap(model)(torch.stack([x, x.flip(0)]))


def ensemble(model, x):
    models = [copy.deepcopy(model) for _ in range(2)]
    for p in models[1].parameters():
        p.data.mul_(1.5)
    parameters, buffers = stack_module_state(models)
    return vmap(lambda p, b: functional_call(model, (p, b), (x,)))(parameters, buffers)


def dual(model, x):
    pairs = zip(trained(model).items(), tangents(trained(model)).values(), strict=True)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, tangent) for (name, p), tangent in pairs}
        return tuple(forward_ad.unpack_dual(functional_call(model, duals, (x,))))


def dual_attributes(model, x):
    """As torch's tutorial has it: a tensor with a tangent in the place of each parameter, on the module."""
    parameters = [(m, n, p) for m in model.modules() for n, p in m._parameters.items() if p is not None]
    with forward_ad.dual_level():
        for module, name, parameter in parameters:
            delattr(module, name)
            setattr(module, name, forward_ad.make_dual(parameter.detach(), parameter.detach().cos()))
        try:
            return tuple(forward_ad.unpack_dual(model(x)))
        finally:
            for module, name, parameter in parameters:
                delattr(module, name)
                module.register_parameter(name, parameter)


def forward_mode_jacobian(model, x):
    (name, parameter), *_ = trained(model).items()
    return torch.autograd.functional.jacobian(
        lambda p: functional_call(model, {name: p}, (x,)), parameter, strategy="forward-mode", vectorize=True
    )


TRANSFORMS = (
    per_sample_gradients,
    jacobian_reverse,
    jacobian_forward,
    second_derivatives,
    directional,
    reverse,
    hessian_vector,
    linear,
    batched,
    ensemble,
    dual,
    dual_attributes,
    forward_mode_jacobian,
)


FEW = (per_sample_gradients, hessian_vector, batched, ensemble, dual, dual_attributes)
"""Those that every kind of layer is tried with in every run; the other kinds have the rest at night."""

COMBINATIONS = [
    pytest.param(name, transform, marks=() if name == "peft" or transform in FEW else pytest.mark.nightly)
    for name in STOCK
    for transform in TRANSFORMS
]


@pytest.mark.parametrize("name, transform", COMBINATIONS)
def test_transforms(name, transform):
    """In eval mode by a model that has kept its norms, too; and the next call without a transform is ours again."""
    stock, ours, x = pair(name)
    for training in (True, False):
        stock.train(training), ours.train(training)
        try:
            expected = transform(stock, x)
        except (RuntimeError, TypeError, ValueError) as error:
            pytest.skip(f"stock cannot: {str(error).splitlines()[0]}")
        assert leaves(expected)[-1].any()
        y = ours(x)
        ops.calls.clear()
        assert_same(transform(ours, x), expected)
        assert not ops.calls or transform is linear  # which makes y once without a transform
        assert_same(ours(x), y)
        assert ops.calls


def changed(model):
    """Its state with every trained tensor made another."""
    names = set(trained(model))
    return {name: value * 1.5 if name in names else value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", some(STOCK, "peft", "peft, conv2d", "peft, embedding", "lycoris", "torchtune", "llm"))
def test_a_trace_follows_the_weights_that_are_loaded_into_it(name):
    """torch.jit.trace, which checks itself, of a model that has been called and of one that has not."""
    for training in (False, True):
        for warm in (False, True):
            for gradients in (False, True):
                stock, ours, x = pair(name)
                stock.train(training), ours.train(training)
                with torch.set_grad_enabled(gradients):
                    if warm:
                        ours(x)
                    traced = torch.jit.trace(ours, x)
                    state = changed(stock)
                    stock.load_state_dict(state)
                    assert trained(stock).keys() <= traced.state_dict().keys()
                    traced.load_state_dict(state, strict=False)  # LyCORIS saves some numbers by a method of its own
                    of = y_and_gradients if gradients else torch.nn.Module.__call__
                    assert_same(of(traced, x), of(stock, x))


def test_a_trace_inside_frozen_adapters_outlives_it():
    stock, ours, x = pair("peft")
    with torch.no_grad(), dora_kernels.frozen_adapters(ours):
        ours(x)
        traced = torch.jit.trace(ours, x)
    state = changed(stock)
    stock.load_state_dict(state), traced.load_state_dict(state)
    assert_same(traced(x), stock(x))


def test_a_trace_can_be_saved_and_needs_none_of_us(tmp_path):
    stock, ours, x = pair("peft")
    torch.jit.save(torch.jit.trace(ours, x), tmp_path / "traced.pt")
    loaded = torch.jit.load(tmp_path / "traced.pt")
    assert "dora_kernels::" not in str(loaded.inlined_graph)
    assert_same(y_and_gradients(loaded, x), y_and_gradients(stock, x))


@pytest.mark.parametrize("name", ("peft, embedding", "lycoris", "torchtune", "llm", "vl-t5", "automodel"))
def test_a_symbolic_trace_is_the_library_s(name):
    """Through the layer, whose parts are no tensors then; PEFT's linear layers and convolutions cannot be traced."""
    stock, ours, x = pair(name)
    traced = torch.fx.symbolic_trace(ours)
    state = changed(stock)
    stock.load_state_dict(state), ours.load_state_dict(state)  # whose parameters are the trace's
    assert_same(traced(x), stock(x))


@pytest.mark.parametrize("layer", ("DoraLinear", "DvoraLinear"))
def test_a_symbolic_trace_of_a_layer_of_ours_says_what_does_trace_it(layer):
    dora, dvora = dora_kernels.DoraLinear(8, 6, 2, 3.0), dora_kernels.DvoraLinear
    made = dora if layer == "DoraLinear" else dvora(8, 6, dora_kernels.VeraProjection(8, 6, 2))
    with pytest.raises(NotImplementedError, match="called inside torch.fx.symbolic_trace; expected make_fx"):
        torch.fx.symbolic_trace(torch.nn.Sequential(made))


MODES = ("real", "fake", pytest.param("symbolic", marks=pytest.mark.nightly))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ("peft", "peft, conv2d", "peft, embedding", "lycoris", "torchtune", "llm", "vl-t5"))
def test_make_fx_keeps_our_operators(name, mode):
    """In train mode: what is kept in eval mode is another affair."""
    stock, ours, x = pair(name)
    tensors = dict([*ours.named_parameters(), *ours.named_buffers()])
    with torch.no_grad():
        graph = make_fx(lambda p, x: functional_call(ours, p, (x,)), tracing_mode=mode)(tensors, x)
        assert "dora_kernels." in graph.code
        with torch.no_grad():
            for key in trained(stock):
                stock.get_parameter(key).mul_(1.5)
        tensors = dict([*stock.named_parameters(), *stock.named_buffers()])
        assert_same(graph(tensors, x), stock(x))


SURROUNDINGS = {
    "vmap": lambda model, x: vmap(model, randomness="different")(x[None]),
    "a dual level": dual,
    "torch.jit.trace": lambda model, x: torch.jit.trace(model, x, check_trace=False),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("name", ("peft", "conv1d", "llm"))
def test_a_dropout_that_the_library_does_not_have_is_not_given_to_it(name, surroundings):
    """In eval mode, and with the library's own meaning, there is no difference."""
    model, x = lora_dropout(name)
    with pytest.raises(ValueError, match=r'another than enable\(model, dropout="lora"\) asked for; expected eval'):
        SURROUNDINGS[surroundings](model, x)
    SURROUNDINGS[surroundings](model.eval(), x)
    dora_kernels.enable(model.train(), dropout="adapter")
    SURROUNDINGS[surroundings](model, x)


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_dvora_in_peft_says_that_nobody_computes_it(surroundings):
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"])).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    SURROUNDINGS[surroundings](model.base_model.model, x)
    dora_kernels.to_dvora(model)
    y = model(x)
    with pytest.raises(ValueError, match="forward: .*, and PEFT computes no DVoRA"):
        SURROUNDINGS[surroundings](model.base_model.model, x)
    with model.disable_adapter():
        SURROUNDINGS[surroundings](model.base_model.model, x)
    assert torch.equal(model(x), y)


def test_a_layer_of_ours_is_traced_without_gradients():
    layer, x = dora_kernels.DoraLinear(8, 6, 2, 3.0), torch.randn(3, 8)
    with pytest.raises(NotImplementedError, match="DoraLinear: torch.jit.trace cannot record our backward pass"):
        torch.jit.trace(layer, x)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        layer.load_state_dict({name: value + 0.3 for name, value in layer.state_dict().items()})
        assert_same(traced(x), layer(x))


@pytest.mark.parametrize("transform", (per_sample_gradients, batched), ids=lambda transform: transform.__name__)
def test_transforms_inside_a_compiled_function(transform):
    stock, ours, x = pair("peft")
    expected = transform(stock, x)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: transform(ours, x), backend="eager")
    assert_same(compiled(x), expected)


@pytest.mark.parametrize("name", ("peft", "conv1d", "llm"))
def test_another_thread_s_forward_mode_is_not_ours(name):
    """torch has one level for all threads; a tangent is a tensor's."""
    model, x = lora_dropout(name)
    results = []
    thread = threading.Thread(target=lambda: results.append(y_and_gradients(model, x)))
    with forward_ad.dual_level():
        thread.start()
        thread.join()
    assert len(results) == 1
    for call in (dual, dual_input):
        with pytest.raises(ValueError, match="forward-mode AD is at work"):
            call(model, x)


def dual_input(model, x):
    with forward_ad.dual_level():
        model(forward_ad.make_dual(x, x))
