"""LyCORIS: what test_conformance.py does not ask. Which modules stay LyCORIS', and the wrapping itself."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("lycoris")

from lycoris import create_lycoris  # noqa: E402
from lycoris.modules.locon import LoConModule  # noqa: E402
from lycoris.modules.loha import LohaModule  # noqa: E402
from lycoris.modules.norms import NormModule  # noqa: E402

import dora_kernels  # noqa: E402
from dora_kernels import ops  # noqa: E402
from dora_kernels.adapters.taking import TakenOver  # noqa: E402
from dora_kernels.testing import check_layer, rms_error  # noqa: E402
from tests.support.conformance_checks import assert_as_good, enabled, randomise  # noqa: E402
from tests.support.library_layers import Wrapped  # noqa: E402
from tests.support.problem import DEVICE  # noqa: E402


class Subclass(LoConModule):
    """Whatever a user's class means."""


def linear(**arguments):
    torch.manual_seed(0)
    return Wrapped(nn.Linear(12, 20), **arguments)


def conv(*, groups=1, padding_mode="zeros", **arguments):
    torch.manual_seed(0)
    return Wrapped(nn.Conv2d(6, 8, 3, padding=1, groups=groups, padding_mode=padding_mode), **arguments)


def tokens():
    torch.manual_seed(1)
    return torch.randn(2, 5, 12, device=DEVICE)


def images():
    torch.manual_seed(1)
    return torch.randn(2, 6, 5, 5, device=DEVICE)


def x_for(model):
    return tokens() if isinstance(model.layer, nn.Linear) else images()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def with_trained_base():
    model = linear()
    model.layer.weight.requires_grad_(True)
    return model


def with_other_factor():
    model = linear()
    model.adapter.lora_up = nn.utils.parametrizations.weight_norm(model.adapter.lora_up)
    return model


def with_tensor_multiplier():
    model = linear()
    model.adapter.multiplier = torch.tensor(0.5, device=DEVICE)
    return model


def with_forward_on_the_instance():
    model = linear()
    model.adapter.forward = model.layer.forward = lambda x: x
    return model


def with_hooked_base():
    model = linear()
    model.adapter.org_forward = lambda x: F.linear(x, model.layer.weight)
    return model


LEFT_ALONE = {
    "bypass_mode": (lambda: linear(bypass_mode=True), "bypass_mode is on"),
    "Tucker": (lambda: conv(use_tucker=True), "Tucker"),
    "groups": (lambda: conv(groups=2), "groups=2"),
    "padding_mode": (lambda: conv(padding_mode="reflect"), "padding_mode='reflect'"),
    "subclass": (lambda: linear(algorithm=Subclass), "Subclass, not LyCORIS' LoConModule"),
    "another algorithm": (lambda: linear(algorithm=LohaModule), "LohaModule, not LyCORIS' LoConModule"),
    "trained base": (with_trained_base, "the base weight requires a gradient"),
    "other factor": (with_other_factor, "lora_up is a "),
    "tensor multiplier": (with_tensor_multiplier, "multiplier or scale is a tensor"),
    "forward on the instance": (with_forward_on_the_instance, "forward was replaced on the instance"),
    "hooked base": (with_hooked_base, "another wrapper or hook under this one"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone_with_the_reason(case):
    build, reason = LEFT_ALONE[case]
    model = build()
    expected = model(x_for(model))
    (entry,) = dora_kernels.enable(model).layers
    assert not entry.taken_over and entry.library == "lycoris" and reason in entry.reason, entry.reason
    ops.calls.clear()
    assert torch.equal(model(x_for(model)), expected) and not ops.calls


def test_a_change_after_enable_goes_to_lycoris():
    model = linear()
    ours = enabled(model)
    for each in (model, ours):
        each.adapter.bypass_mode = True
    ops.calls.clear()
    assert torch.equal(ours(tokens()), model(tokens())) and not ops.calls
    dora_kernels.enable(ours)
    assert type(ours.adapter) is LoConModule


def test_plain_lora_is_no_dora_layer():
    for model in (linear(weight_decompose=False), Wrapped(nn.LayerNorm(12), algorithm=NormModule)):
        assert str(dora_kernels.enable(model)) == "no DoRA layer found"


@pytest.mark.parametrize("build", [linear, conv])
def test_an_x_without_a_batch_goes_to_lycoris(build):
    model = build()
    x = x_for(model)[0, 0] if build is linear else x_for(model)[0]
    ours = enabled(model)
    ops.calls.clear()
    assert torch.equal(ours(x), model(x)) and not ops.calls


@pytest.mark.parametrize("part, dtype, autocast", [("x", torch.float64, True), ("dora_scale", torch.float32, False)])
def test_dtypes_that_do_not_meet_are_lycoris_error(part, dtype, autocast):
    model, x = linear(dtype=torch.float32 if autocast else torch.bfloat16), tokens()
    x = x.to(dtype) if part == "x" else x.bfloat16()
    if part == "dora_scale":
        model.adapter.dora_scale = nn.Parameter(model.adapter.dora_scale.to(dtype))
    for each in (model, enabled(model)):
        with pytest.raises(RuntimeError, match="dtype"), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            each(x)


def test_an_argument_beyond_x_is_lycoris_affair():
    """Which passes it on to the wrapped layer."""
    for call in (lambda model: model.layer(tokens(), 1), lambda model: model.layer(tokens(), scale=1)):
        for model in (linear(), enabled(linear())):
            with pytest.raises(TypeError, match="forward"):
                call(model)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        return self.out(self.conv(x).relu().mean(dim=(2, 3)))


def test_a_whole_network():
    """enable(network) reaches the layers of a model that does not hold the modules, and disable gives them back."""
    torch.manual_seed(0)
    net = Net().to(DEVICE).requires_grad_(False)
    settings = {"linear_dim": 2, "conv_dim": 2, "linear_alpha": 1, "conv_alpha": 1, "dora_wd": True}
    network = create_lycoris(net, 1.0, algo="lora", **settings)
    x = torch.randn(2, 3, 6, 6, device=DEVICE)
    base = net(x)
    network.apply_to()
    randomise(network.to(DEVICE))
    expected = net(x)
    assert rms_error(expected, base.double()) > 0.01
    assert len(dora_kernels.enable(network).taken_over) == 2
    assert all(isinstance(module.forward.__self__, TakenOver) for module in (net.conv, net.out))
    ops.calls.clear()
    close(net(x), expected)
    assert {operator for operator, _ in ops.calls} >= {"forward", "rescale"}
    assert len(dora_kernels.disable(network).left_alone) == 2
    ops.calls.clear()
    assert torch.equal(net(x), expected) and not ops.calls  # what the model's layers hold is LyCORIS' forward again
    dora_kernels.enable(network)
    network.restore()
    assert torch.equal(net(x), base)


def test_a_copy_has_its_own_layers():
    """The wrapped layer of a copy holds the forward of the copy's module, and so after disable."""
    ours = enabled(linear())
    assert ours.layer.forward.__self__ is ours.adapter and type(ours.adapter) is not LoConModule
    assert ours.layer.forward.__func__ is type(ours.adapter).forward
    dora_kernels.disable(ours)
    assert ours.layer.forward.__func__ is LoConModule.forward


def stacked():
    """Two modules over one layer: the second calls the forward of the first."""
    model = linear()
    model.second = randomise(LoConModule("second", model.layer, weight_decompose=True, lora_dim=2).to(DEVICE))
    model.second.apply_to()
    return model


def test_two_modules_over_one_layer():
    model = stacked()
    ours, plain = copy.deepcopy(model), linear()
    report = dora_kernels.enable(ours)
    assert [entry.name for entry in report.taken_over] == ["adapter"]
    assert [(entry.name, entry.reason) for entry in report.left_alone] == [
        ("second", "there is another wrapper or hook under this one")
    ]
    assert rms_error(model(tokens()), plain(tokens()).double()) > 0.01
    ops.calls.clear()
    close(ours(tokens()), model(tokens()))
    assert ops.calls  # the second calls the first, which is ours
    dora_kernels.disable(ours)
    ops.calls.clear()
    assert torch.equal(ours(tokens()), model(tokens())) and not ops.calls


@pytest.mark.parametrize("wd_on_out", [True, False])
@pytest.mark.parametrize("multiplier", [0.0, 0.4, -1.0])
def test_the_multiplier_is_read_at_each_call(multiplier, wd_on_out):
    """0 leaves V, as LyCORIS has it, and not W; in eval mode too, where the norm is kept."""
    model = linear(wd_on_out=wd_on_out).eval()
    ours = enabled(model)
    with torch.no_grad():
        before = ours(tokens())
        for each in (model, ours):
            each.adapter.multiplier = multiplier
        close(ours(tokens()), model(tokens()))
        assert rms_error(ours(tokens()), before.double()) > 0.01


@pytest.mark.parametrize("build", [linear, conv])
@pytest.mark.parametrize("arguments", [{"multiplier": 0.7}, {"wd_on_out": False}, {"rank_dropout": 0.5}], ids=str)
def test_merging_agrees(build, arguments):
    """What merge_to writes is merged_weight_and_bias, and the merged layer computes what ours does in eval mode."""
    model = build(**arguments)
    ours = enabled(model)
    weight, bias = ours.adapter.merged_weight_and_bias()  # in train mode: the mask of rank_dropout is not in it
    y = ours.eval()(x_for(model))
    ours.adapter.restore()
    ours.adapter.merge_to(ours.adapter.multiplier)
    close(weight, ours.layer.weight)
    assert torch.equal(bias, ours.layer.bias)
    close(ours(x_for(model)), y)
    assert rms_error(weight, model.layer.weight.double()) > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_merged_weight_is_rounded_once(dtype):
    model = linear(dtype=dtype)
    weight, _ = enabled(model).adapter.merged_weight_and_bias()
    twin = enabled(model.in_float64()).adapter
    exact, _ = twin.merged_weight_and_bias()
    assert weight.dtype == dtype and exact.dtype == torch.float64
    eps = torch.finfo(dtype).eps
    norm, _ = twin.norm_and_gain()
    exact = exact * (norm / (norm + eps))[:, None]  # dora_scale's eps, which float64 has not
    assert rms_error(weight, exact) < 0.3 * eps


def test_norm_and_gain():
    model = linear(multiplier=0.7, rank_dropout=0.5)  # in train mode, and no row is dropped
    norm, gain = enabled(model).adapter.norm_and_gain()
    adapter = model.adapter
    direction = model.layer.weight + adapter.scale * adapter.lora_up.weight @ adapter.lora_down.weight
    close(norm, direction.norm(dim=1))
    close(gain, 0.7 * (adapter.dora_scale.flatten() / direction.norm(dim=1) - 1) + 1)
    with pytest.raises(ValueError, match="norm_and_gain: wd_on_out is False; expected"):
        enabled(linear(wd_on_out=False)).adapter.norm_and_gain()
    changed = enabled(linear()).adapter
    changed.bypass_mode = True
    with pytest.raises(ValueError, match="merged_weight_and_bias: bypass_mode is on.*; expected"):
        changed.merged_weight_and_bias()


def test_random_numbers_are_lycoris_own():
    """module_dropout, then the mask of rank_dropout: the same modules and the same rows are dropped."""
    model = linear(rank_dropout=0.4, rank_dropout_scale=True, module_dropout=0.5)
    ours, dropped, x = enabled(model), 0, tokens()
    base = F.linear(x, model.layer.weight, model.layer.bias)
    for seed in range(8):
        results = []
        for each in (model, ours):
            torch.manual_seed(seed)
            results.append((each(x), torch.rand(3)))
        close(results[1][0], results[0][0])
        assert torch.equal(results[1][1], results[0][1])
        dropped += torch.equal(results[1][0], base)
    assert 0 < dropped < 8


def gradients(model, x, autocast=None):
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
        y = model(x)
    y.square().sum().backward()
    return {"y": y.detach(), "dx": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("build", [linear, conv])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wd_on_out", [True, False])
def test_autocast(build, base, wd_on_out):
    """As the training scripts run it: float32 adapters, over a base of half precision too."""
    model = build(wd_on_out=wd_on_out)
    model.layer.to(base)
    ours = enabled(model)
    stock = gradients(model, x_for(model), torch.bfloat16)
    ops.calls.clear()
    actual = gradients(ours, x_for(model), torch.bfloat16)
    assert ops.calls
    assert_as_good(actual, stock, gradients(model.in_float64(), x_for(model).double()))


@pytest.mark.parametrize("build", [linear, conv])
@pytest.mark.parametrize("base, factors", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_factors_of_another_dtype(base, factors, build):
    """Without autocast. LyCORIS rounds the product of float32 factors to the base's dtype; here it stays float32."""
    model = build(dtype=base)
    for factor in (model.adapter.lora_down, model.adapter.lora_up):
        factor.to(factors)
    x = x_for(model).to(base)
    ours = enabled(model)
    stock = gradients(model, x)
    ops.calls.clear()
    actual = gradients(ours, x)
    assert ops.calls
    assert_as_good(actual, stock, gradients(model.in_float64(), x.double()))


def test_a_zero_row_is_finite():
    """The eps keeps the gain finite, in LyCORIS and here, and the gradient of a norm of 0 is 0 in both."""
    model = linear()
    model.layer.weight.data[3] = 0
    model.adapter.lora_up.weight.data[3] = 0
    stock, ours = gradients(model, tokens()), gradients(enabled(model), tokens())
    for name, value in ours.items():
        assert value.isfinite().all(), name
    close(ours["y"], stock["y"])
    torch.testing.assert_close(ours["adapter.lora_up.weight"], stock["adapter.lora_up.weight"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build, wd_on_out", [(linear, True), (linear, False), (conv, True)])
def test_compiles_without_a_graph_break(build, wd_on_out):
    ours = enabled(build(wd_on_out=wd_on_out))
    compiled = torch.compile(ours.adapter, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x_for(ours)), ours(x_for(ours)))


def test_the_norm_has_its_gradient_in_eval_mode_too():
    """Where it is not kept: the graph of the first call is gone in the second."""
    model = linear().eval()
    ours = enabled(model)
    first, second, stock = gradients(ours, tokens()), gradients(ours, tokens()), gradients(model, tokens())
    for name, value in stock.items():
        close(first[name], value)
        close(second[name], value)


def test_on_the_meta_device():
    ours = enabled(linear()).to("meta")
    ops.calls.clear()
    assert ours(tokens().to("meta")).shape == (2, 5, 20) and not ops.calls


def test_pickle():
    ours = enabled(linear())
    twin = pickle.loads(pickle.dumps(ours))
    assert type(twin.adapter) is type(ours.adapter) and torch.equal(twin(tokens()), ours(tokens()))


@pytest.mark.parametrize("build", [linear, conv])
def test_check_layer(build):
    model = build(wd_on_out=False, rank_dropout=0.3)
    model.adapter.rank_dropout = 0.0
    report = check_layer(model.adapter)
    assert report.ok, report
    model.layer.weight.requires_grad_(True)
    assert "requires a gradient" in str(check_layer(model.adapter))


@pytest.mark.parametrize("wd_on_out", [True, False])
def test_the_eps_is_added_where_it_matters(wd_on_out):
    """Over weights of the size of the eps it halves the gain."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 20)
    layer.weight.data.mul_(torch.finfo(torch.float32).eps)
    model = Wrapped(layer, wd_on_out=wd_on_out)
    model.adapter.lora_up.weight.data.mul_(torch.finfo(torch.float32).eps)
    ours, stock = gradients(enabled(model), tokens()), gradients(model, tokens())
    assert_as_good(ours, stock, gradients(model.in_float64(), tokens().double()))
