"""torchtune: what test_conformance.py does not ask. Which layers and which calls stay torchtune's, and why."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dora_kernels
from dora_kernels import ops
from dora_kernels.testing import check_layer, rms_error
from tests.support.conformance_checks import enabled
from tests.support.library_layers import import_dora_linear, torchtune_in_float64, torchtune_layer
from tests.support.problem import DEVICE

DoRALinear = import_dora_linear()
SIZES = (20, 12, 3)  # N, K, R


def build(*sizes, **arguments):
    torch.manual_seed(0)
    return torchtune_layer(*(sizes or SIZES), **arguments)


def tokens(*shape, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(*(shape or (2, 5)), 12, device=DEVICE, dtype=dtype)


class Subclass(DoRALinear):
    """Whatever a user's class means."""


class NoLinear(nn.Linear):
    pass


def as_subclass(layer):
    layer.__class__ = Subclass


def with_hook(layer):
    layer.lora_a.register_forward_hook(lambda module, inputs, output: 2 * output)


def with_other_dropout(layer):
    layer.dropout = nn.AlphaDropout(0.1)


def with_other_factor(layer):
    layer.lora_b.__class__ = NoLinear


def with_factor_bias(layer):
    layer.lora_b.bias = nn.Parameter(torch.zeros(20, device=DEVICE))


def with_forward_on_the_instance(layer):
    layer.forward = lambda x: x


def with_trained_base(layer):
    layer.weight.requires_grad_(True)


def with_quantize_base_over_a_dense_weight(layer):
    layer._quantize_base = True


def with_tensor_scaling(layer):
    layer.scaling = torch.tensor(2.0)


def with_two_minds_about_the_bias(layer):
    layer.use_bias = True


def with_a_subclass_of_tensor(layer):
    layer.weight = nn.Parameter(Dressed(layer.weight.data), requires_grad=False)


class Dressed(torch.Tensor):
    """A tensor with a meaning of its own, as FSDP2's are."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, data)


LEFT_ALONE = {
    as_subclass: "Subclass, not torchtune's DoRALinear",
    with_hook: "lora_a has hooks",
    with_other_dropout: "dropout is a torch.nn.modules.dropout.AlphaDropout",
    with_other_factor: "lora_b is a ",
    with_factor_bias: "lora_a or lora_b has a bias",
    with_forward_on_the_instance: "forward was replaced on the instance",
    with_trained_base: "the base weight requires a gradient",
    with_quantize_base_over_a_dense_weight: "expected an NF4Tensor",
    with_tensor_scaling: "scaling is a tensor",
    with_two_minds_about_the_bias: "use_bias is True",
    with_a_subclass_of_tensor: "Dressed, not a plain tensor",
}


@pytest.mark.parametrize("change", LEFT_ALONE, ids=lambda change: change.__name__)
def test_left_alone_with_the_reason(change):
    """Before enable the report says so; after it, each call goes to torchtune until enable gives the layer back."""
    layer, changed_later = build(), enabled(build())
    change(layer)
    (entry,) = dora_kernels.enable(layer).layers
    assert not entry.taken_over and entry.library == "torchtune" and LEFT_ALONE[change] in entry.reason
    if change is as_subclass:  # the class is what enable() changes too
        return
    change(changed_later)
    ops.calls.clear()
    if change not in (with_quantize_base_over_a_dense_weight, with_two_minds_about_the_bias):  # torchtune fails
        torch.testing.assert_close(changed_later(tokens()), layer(tokens()), rtol=0, atol=0)
    assert not ops.calls
    dora_kernels.enable(changed_later)
    assert type(changed_later) is DoRALinear


def test_a_fresh_layer_has_a_trained_base():
    """Until set_trainable_params, as torchtune leaves it: the report says what is missing."""
    layer = DoRALinear(12, 20, 3, 5.0)
    assert "the base weight requires a gradient" in str(dora_kernels.enable(layer))


def assert_torchtune_computes(layer, x, call=lambda layer, x: layer(x)):
    ours = enabled(layer)
    ops.calls.clear()
    torch.testing.assert_close(call(ours, x), call(layer, x), rtol=0, atol=0)
    assert not ops.calls


def test_calls_that_stay_torchtune_s():
    layer = build(use_bias=True)
    assert_torchtune_computes(layer, tokens()[0, 0])
    wide_magnitude = build(dtype=torch.bfloat16)
    wide_magnitude.magnitude = nn.Parameter(wide_magnitude.magnitude.float())
    assert_torchtune_computes(wide_magnitude, tokens(dtype=torch.bfloat16))

    def under_autocast(layer, x):
        with torch.autocast(DEVICE, torch.bfloat16):
            return layer(x)

    assert_torchtune_computes(layer, tokens(), under_autocast)


def test_on_the_meta_device():
    """Where torchtune builds its models."""
    ours = enabled(build()).to("meta")
    ops.calls.clear()
    assert ours(tokens().to("meta")).shape == (2, 5, 20) and not ops.calls


def test_disabled_is_the_base_layer():
    layer = build(use_bias=True)
    layer.disabled = True
    assert_torchtune_computes(layer, tokens())
    ours = enabled(layer)
    assert torch.equal(ours(tokens()), F.linear(tokens(), layer.weight, layer.bias))
    ours.disabled = False
    ops.calls.clear()
    assert not torch.equal(ours(tokens()), F.linear(tokens(), layer.weight, layer.bias)) and ops.calls


@pytest.mark.parametrize("use_bias", [False, True])
def test_dropout_draws_what_torchtune_draws(use_bias):
    layer = build(dropout=0.5, use_bias=use_bias)
    results, x = [], tokens()
    for each in (layer, enabled(layer)):
        torch.manual_seed(5)
        results.append((each(x), torch.rand(3, device=DEVICE)))
    (stock, stock_state), (ours, ours_state) = results
    torch.testing.assert_close(ours, stock)
    assert torch.equal(ours_state, stock_state)
    assert rms_error(layer.eval()(tokens()), stock.double()) > 0.01  # it did drop


@pytest.mark.parametrize("use_bias, quantize_base", [(False, False), (True, False), (True, True)])
def test_merged_weight_and_bias(use_bias, quantize_base):
    """A linear layer with them computes what the layer does, the bias times the gain."""
    layer = build(64, 256, 3, use_bias=use_bias, quantize_base=quantize_base).eval()
    x = torch.randn(4, 256, device=DEVICE)
    ours = enabled(layer)
    weight, bias = ours.merged_weight_and_bias()
    assert (bias is None) is not use_bias and not weight.requires_grad
    exact = torchtune_in_float64(layer)(x.double())
    assert rms_error(F.linear(x, weight, bias), exact) < 1e-6
    norm, gain = ours.norm_and_gain()
    torch.testing.assert_close(gain * norm, layer.magnitude.detach())
    layer_base = torchtune_in_float64(layer)
    direction = layer_base.weight + layer.scaling * layer_base.lora_b.weight @ layer_base.lora_a.weight
    assert rms_error(norm, direction.norm(dim=1)) < 1e-6


def test_the_merged_bias_has_its_dtype():
    weight, bias = enabled(build(use_bias=True, dtype=torch.bfloat16)).merged_weight_and_bias()
    assert weight.dtype == bias.dtype == torch.bfloat16


def disable(layer):
    layer.disabled = True


@pytest.mark.parametrize(
    "change, reason",
    [
        (disable, "the adapter is disabled"),
        (with_hook, "lora_a has hooks"),
        (with_trained_base, "the base weight"),
    ],
)
def test_a_layer_that_torchtune_computes_has_no_norm(change, reason):
    ours = enabled(build())
    change(ours)
    for function in (ours.norm_and_gain, ours.merged_weight_and_bias):
        with pytest.raises(ValueError, match=f"{function.__name__}: {reason}.*; expected a layer that enable"):
            function()


def test_dropout_that_does_not_drop():
    """One fused operator, and no random number drawn."""
    layer = build(dropout=0.5)
    layer.dropout.p = 0.0
    ours, state = enabled(layer), torch.get_rng_state()
    x = torch.ones(3, 12, device=DEVICE)
    ops.calls.clear()
    torch.testing.assert_close(ours(x), layer(x))
    assert {operator for operator, _ in ops.calls} == {"forward"} and torch.equal(torch.get_rng_state(), state)


def test_a_zero_row_is_finite():
    """norm 0: torchtune gives NaN. Ours has gain 0 there, and the bias is multiplied by the gain."""
    layer = build(use_bias=True)
    layer.weight.data[3] = 0
    layer.lora_b.weight.data[3] = 0
    ours, x = enabled(layer), tokens().requires_grad_()
    assert layer(x)[..., 3].isnan().all()  # when torchtune stops doing this, the documentation changes
    y = ours(x)
    assert y.isfinite().all() and not y[..., 3].any()
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.requires_grad) and x.grad.isfinite().all()


@pytest.mark.parametrize("arguments", [{}, {"use_bias": True}, {"use_bias": True, "dropout": 0.5}], ids=str)
def test_compiles_without_a_graph_break(arguments):
    ours, x = enabled(build(**arguments)), tokens()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    results = []
    for call in (compiled, ours):
        torch.manual_seed(2)
        results.append(call(x))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("use_bias", [False, True])
def test_gradient_checkpointing(use_bias):
    """The norm of the forward pass serves the recomputation too."""
    ours, x = enabled(build(use_bias=use_bias)), tokens().requires_grad_()
    plain = torch.autograd.grad(ours(x).square().sum(), [x, ours.magnitude, ours.lora_a.weight])
    y = checkpoint(ours, x, use_reentrant=False)
    again = torch.autograd.grad(y.square().sum(), [x, ours.magnitude, ours.lora_a.weight])
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_torchtune_s_own_methods_work_on_a_layer_taken_over():
    ours = enabled(build())
    before = ours(tokens())
    ours.magnitude.data.mul_(2)
    ours.initialize_dora_magnitude()
    plain = F.linear(tokens(), ours.weight + ours.scaling * ours.lora_b.weight @ ours.lora_a.weight)
    torch.testing.assert_close(ours(tokens()), plain)  # a gain of 1
    assert rms_error(before, plain.double()) > 0.01
    assert ours.adapter_params() == ["lora_a.weight", "lora_b.weight", "magnitude"]
    twin = pickle.loads(pickle.dumps(ours))
    assert type(twin) is type(ours) and torch.equal(twin(tokens()), ours(tokens()))


def test_a_model_of_several_layers_is_reported_by_name():
    model = nn.ModuleDict({"q": build(), "other": nn.Linear(3, 3), "k": build(quantize_base=False, use_bias=True)})
    model["k"].weight.requires_grad_(True)
    report = dora_kernels.enable(model)
    assert [entry.name for entry in report.taken_over] == ["q"]
    assert [entry.name for entry in report.left_alone] == ["k"]
    assert str(report).startswith("taken over 1 of 2 DoRA layers")


@pytest.mark.parametrize("arguments", [{"use_bias": True, "dropout": 0.5}, {"quantize_base": True}], ids=str)
def test_check_layer(arguments):
    layer = build(64, 256, 3, **arguments)
    report = check_layer(layer)
    assert report.ok, report
    wrong = copy.deepcopy(layer)
    wrong.weight.requires_grad_(True)
    assert "requires a gradient" in str(check_layer(wrong))
