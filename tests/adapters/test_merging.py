"""Merging PEFT's layers with our kernels: PEFT's weights, PEFT's bookkeeping, and what PEFT gets wrong."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from transformers.pytorch_utils import Conv1D

import dora_kernels
from dora_kernels import DoraLinear, ops, options
from dora_kernels.extras import serving
from dora_kernels.testing import compare, rms_error
from tests.support import quantized_problem
from tests.support.peft_problem import adapt, build, calls, layers
from tests.support.problem import BACKENDS, DEVICE

LAYERS = {
    "linear": lambda: nn.Linear(12, 10),
    "gpt2": lambda: Conv1D(10, 12),
    "conv1d": lambda: nn.Conv1d(6, 10, 3),
    "conv2d": lambda: nn.Conv2d(6, 10, 3, bias=False),
    "conv2d, channels-last": lambda: nn.Conv2d(6, 10, 3).to(memory_format=torch.channels_last),
    "pointwise": lambda: nn.Conv2d(6, 10, 1),
    "conv3d": lambda: nn.Conv3d(6, 10, 2),
    "embedding": lambda: nn.Embedding(12, 10),
}
INPUTS = {
    "linear": (3, 12),
    "gpt2": (3, 12),
    "conv1d": (2, 6, 5),
    "pointwise": (2, 6, 5, 5),
    "conv3d": (2, 6, 4, 4, 4),
}


def models(kind, dtype=torch.float32, adapters=1):
    """Two copies of a model with one layer of this kind: stock, and enabled; and x."""
    torch.manual_seed(0)
    net = nn.Sequential(LAYERS[kind]()).to(DEVICE, dtype)
    if kind == "gpt2":
        net[0].weight.data.mul_(15)  # its weights are small beside the others' and beside B A
    stock = adapt(net, adapters, target_modules=["0"], fan_in_fan_out=kind == "gpt2").eval()
    ours = copy.deepcopy(stock)
    assert len(dora_kernels.enable(ours).taken_over) == 1
    x = torch.arange(12) if kind == "embedding" else torch.randn(INPUTS.get(kind, (2, 6, 5, 5))).to(dtype)
    return stock, ours, x.to(DEVICE)


def weight_of(model):
    return layers(model)[0].base_layer.weight


def state(model):
    """Everything that a refused merge must leave as it was."""
    layer = layers(model)[0]
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    return tensors, list(layer.merged_adapters), sorted(layer._caches)


def assert_unchanged(model, before):
    tensors, *others = state(model)
    assert others == list(before[1:]) and all(torch.equal(tensors[name], before[0][name]) for name in tensors)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_merged_weight_and_the_way_back(kind, dtype, safe_merge):
    stock, ours, x = models(kind, dtype)
    exact = copy.deepcopy(stock).double()
    before, strides = weight_of(ours).clone(), weight_of(ours).stride()
    expected = exact(x.double() if x.is_floating_point() else x)
    ops.calls.clear()
    for model in (stock, ours, exact):
        model.merge_adapter(safe_merge=safe_merge)
    assert calls("merge") == calls("norm") == 1
    assert layers(ours)[0].merged_adapters == layers(stock)[0].merged_adapters == ["default"]
    assert weight_of(ours).dtype == dtype and weight_of(ours).stride() == strides
    comparison = compare("weight", weight_of(ours), weight_of(stock), weight_of(exact))
    assert comparison.ok and comparison.limit < 0.1, comparison
    assert rms_error(ours(x), expected) < (1e-5 if dtype == torch.float32 else 2e-2)
    cached = [sorted(layers(model)[0]._caches.items()) for model in (stock, ours)]
    assert [(name, value.shape) for name, value in cached[0]] == [(name, value.shape) for name, value in cached[1]]
    ours.unmerge_adapter()
    assert layers(ours)[0].merged_adapters == [] and layers(ours)[0]._caches == {}
    # one rounding of the merged weight, seen through the gain
    size = before.abs().max().item() * 4 + 4
    torch.testing.assert_close(weight_of(ours), before, rtol=0, atol=torch.finfo(dtype).eps * size)
    assert weight_of(ours).stride() == strides


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["linear", "gpt2", "conv2d, channels-last", "embedding"])
def test_several_adapters_nest_as_in_the_forward_pass(kind, backend):
    with options(backend=backend):
        _, ours, x = models(kind, adapters=3)
        before, expected = weight_of(ours).clone(), ours(x)
        ops.calls.clear()
        ours.merge_adapter(["default", "second"])
        with pytest.warns(UserWarning, match="additionally merging third"):
            ours.merge_adapter()
        assert layers(ours)[0].merged_adapters == ["default", "second", "third"]
        # the first two are undone on the way to the third, whose norm is that of the unmerged weight
        assert calls("merge") == 3 + 2 and {name for _, name in ops.calls} == {backend}
        assert rms_error(ours(x), expected) < 1e-5
        ours.unmerge_adapter()
    assert rms_error(weight_of(ours), before) < 1e-5


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("ours_first", [True, False])
def test_either_undoes_the_merge_of_the_other(kind, ours_first):
    if kind == "gpt2" and ours_first and not hasattr(LoraLayer, "_unmerged_base_weight"):
        pytest.skip("this PEFT cannot unmerge a Conv1D")
    stock, ours, _ = models(kind)
    before = weight_of(stock).clone()
    model = ours if ours_first else stock
    model.merge_adapter()
    (dora_kernels.disable if ours_first else dora_kernels.enable)(model)
    assert rms_error(weight_of(model), before) > 0.1
    model.unmerge_adapter()
    assert rms_error(weight_of(model), before) < 1e-5


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload(safe_merge):
    stock = build(conv1d=True, adapters=2)
    ours = copy.deepcopy(stock)
    dora_kernels.enable(ours)
    x = torch.randn(5, 24, device=DEVICE)
    expected = stock.eval()(x)
    unloaded = ours.merge_and_unload(safe_merge=safe_merge)
    assert rms_error(unloaded(x), expected) < 1e-5
    assert not layers(unloaded) and unloaded.state_dict().keys() == stock.merge_and_unload().state_dict().keys()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_zero_row_stays_zero_and_comes_back(kind):
    """PEFT's merged row is NaN."""
    stock, ours, _ = models(kind)
    for model in (stock, ours):
        layer = layers(model)[0]
        columns = kind in ("gpt2", "embedding")
        weight_of(model).data[(slice(None), 4) if columns else 4] = 0
        (layer.lora_embedding_B["default"] if kind == "embedding" else layer.lora_B["default"].weight).data[4] = 0
    before = weight_of(ours).clone()
    for model in (stock, ours):
        model.merge_adapter()
    assert weight_of(stock).isnan().any() and weight_of(ours).isfinite().all()
    assert not weight_of(ours)[(slice(None), 4) if columns else 4].any()
    ours.unmerge_adapter()
    assert rms_error(weight_of(ours), before) < 1e-5


@pytest.mark.parametrize("order", [("plain", "default"), ("default", "plain")])
def test_one_adapter_after_another_of_a_mixture_is_merged_by_peft(order):
    stock, ours, _ = models("linear")
    for model in (stock, ours):
        with_plain_lora(model)
    before = weight_of(ours).clone()
    for model in (stock, ours):
        for name in order:
            layers(model)[0].merge(adapter_names=[name])
        assert layers(model)[0].merged_adapters == list(order)
    assert rms_error(weight_of(ours), weight_of(stock)) < 1e-5
    ours.unmerge_adapter()
    stock.unmerge_adapter()
    assert rms_error(weight_of(ours), weight_of(stock)) < 1e-5
    assert rms_error(weight_of(stock), before) < 1e-5


@pytest.mark.parametrize("kind", LAYERS)
def test_a_row_merged_with_gain_0_is_not_lost_silently(kind):
    _, ours, x = models(kind, adapters=2)
    ours.merge_adapter(["default"])
    ours.unmerge_adapter()
    layers(ours)[0].lora_magnitude_vector["default"].weight.data.view(-1)[[2, 7]] = 0
    ours.merge_adapter(["default"])
    before = state(ours)
    with pytest.raises(ValueError, match=r"unmerge: 2 of 10 rows were merged with gain 0 \(row 2, 7\); expected none"):
        ours.unmerge_adapter()
    assert_unchanged(ours, before)
    with pytest.raises(ValueError, match="merge: 2 of 10 rows"), pytest.warns(UserWarning, match="additionally"):
        ours.merge_adapter(["second"])
    assert_unchanged(ours, before)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("adapters", [1, 2])
def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing(kind, adapters):
    stock, ours, _ = models(kind, adapters=adapters)
    for model in (stock, ours):
        magnitude = layers(model)[0].lora_magnitude_vector[["default", "second"][adapters - 1]].weight
        magnitude.data.view(-1)[3] = torch.inf
    before = state(ours)
    for model in (stock, ours):
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            model.merge_adapter(safe_merge=True)
    assert_unchanged(ours, before)
    ours.merge_adapter()
    assert not weight_of(ours).isfinite().all()


def test_a_merge_does_not_see_autocast():
    weights = []
    for autocast in (False, True):
        _, ours, _ = models("linear")
        before = weight_of(ours).clone()
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
            ours.merge_adapter()
            weights.append(weight_of(ours).clone())
            ours.unmerge_adapter()
        assert rms_error(weight_of(ours), before) < 1e-6
    assert torch.equal(*weights)


# What is not plainly ours is merged by PEFT.


def with_lora_bias(model):
    model.add_adapter("biased", LoraConfig(target_modules=["0"], lora_bias=True))
    model.base_model.set_adapter(["default", "biased"])


def with_plain_lora(model):
    model.add_adapter("plain", LoraConfig(target_modules=["0"], init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if ".plain." in name:
            parameter.data.fill_(0.1)
    model.base_model.set_adapter(["default", "plain"])


@pytest.mark.parametrize("change", [with_lora_bias, with_plain_lora])
def test_a_mixture_is_merged_by_peft(change):
    stock, ours, x = models("linear")
    for model in (stock, ours):
        torch.manual_seed(1)
        change(model)
    before = weight_of(ours).clone()
    expected = stock.eval()(x)
    assert rms_error(ours(x), expected) < 1e-5
    for model in (stock, ours):
        model.merge_adapter()
    assert rms_error(weight_of(ours), weight_of(stock)) < 1e-5 and rms_error(ours(x), expected) < 1e-4
    ours.unmerge_adapter()
    assert rms_error(weight_of(ours), before) < 1e-5


def test_a_convolution_in_groups_is_not_merged():
    net = nn.Sequential(nn.Conv1d(6, 10, 3, groups=2)).to(DEVICE)
    model = adapt(net, target_modules=["0"], r=4)
    dora_kernels.enable(model)
    with pytest.raises(NotImplementedError, match="groups > 1"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="merged_weight_and_bias: PEFT does not merge a convolution in groups"):
        layers(model)[0].merged_weight_and_bias()


@pytest.mark.parametrize(
    "change", [{"padding": "same", "dilation": 2}, {"padding": 1, "padding_mode": "reflect"}], ids=str
)
def test_a_convolution_that_no_weight_can_stand_for_is_left(change):
    """PEFT's lora_A is not dilated and pads with zeros: stock merge changes the output, merge_model not."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, use_dora=True, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Conv1d(7, 13, 3, **change)), config).to(DEVICE).eval()
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    assert len(dora_kernels.enable(model).taken_over) == 1
    x = torch.randn(2, 7, 11, device=DEVICE)
    before = model(x)
    (reason,) = serving.merge_model(model).values()
    assert "no one weight computes both" in reason
    assert torch.equal(model(x), before)


def test_errors_and_warnings_are_peft_s():
    _, ours, _ = models("linear")
    layer = layers(ours)[0]
    with pytest.raises((TypeError, ValueError), match="adapter_names should be a list"):
        layer.merge(adapter_names="default")
    layer.merge(adapter_names=["absent"])
    assert not layer.merged
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
    layer.merge()
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge()
    layer.merged_adapters.append("absent")
    layer.unmerge()
    assert not layer.merged


def test_disabled_adapters_are_unmerged_by_the_next_call():
    _, ours, x = models("conv2d")
    layer = layers(ours)[0]
    expected = layer.base_layer(x)
    ours.merge_adapter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(ours.disable_adapter())
        assert rms_error(ours(x), expected) < 1e-5
    assert not layer.merged


# What whole-model merging reads.


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("adapters", [1, 2])
def test_merged_weight_and_bias(kind, adapters):
    _, ours, x = models(kind, adapters=adapters)
    layer, expected = layers(ours)[0], ours(x)
    base = copy.deepcopy(layer.base_layer)
    weight, bias = layer.merged_weight_and_bias()
    assert weight.shape == base.weight.shape and weight.dtype == base.weight.dtype and not weight.requires_grad
    base.weight.data = weight
    if bias is not None:
        base.bias.data = bias
    assert rms_error(base(x), expected) < 1e-5
    layer.merge()
    again, _ = layer.merged_weight_and_bias()
    assert torch.equal(again, weight) and again.data_ptr() != layer.base_layer.weight.data_ptr()


def test_over_a_quantised_weight():
    """The dense layer that stands for it; merging into the quantized weight itself stays PEFT's."""
    model = quantized_problem.build("nf4", adapters=2).eval()
    dora_kernels.enable(model)
    x = torch.randn(3, 24, device=DEVICE)
    expected = model.up(x)
    weight, bias = model.up.merged_weight_and_bias()
    assert weight.shape == (40, 24) and rms_error(F.linear(x, weight, bias), expected) < 1e-5
    model.set_adapter("default")
    norm, gain = model.up.norm_and_gain()
    merged = F.linear(x, model.up.merged_weight_and_bias()[0], bias)
    assert norm.shape == gain.shape == (40,) and rms_error(merged, model.up(x)) < 1e-5
    ops.calls.clear()
    model.merge_adapter()
    assert not ops.calls and model.up.merged
    with pytest.raises(ValueError, match="merged_weight_and_bias: the layer is merged"):
        model.up.merged_weight_and_bias()


@pytest.mark.parametrize("kind", LAYERS)
def test_norm_and_gain(kind):
    stock, ours, _ = models(kind)
    norm, gain = layers(ours)[0].norm_and_gain()
    stock.merge_adapter()
    expected = layers(stock)[0]._caches["default-weight_norm"].flatten()
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(gain, layers(stock)[0].lora_magnitude_vector["default"].weight.flatten() / expected)
    assert norm.shape == (10,) and not norm.requires_grad and not gain.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.merge_adapter(), r"norm_and_gain: \['default', 'second'\] are merged"),
        (lambda model: None, "norm_and_gain: 2 adapters are active"),
        (lambda model: model.base_model.disable_adapter_layers(), "norm_and_gain: the adapters are disabled"),
    ],
)
def test_norm_and_gain_want_one_adapter(change, message):
    _, ours, _ = models("linear", adapters=2)
    change(ours)
    with pytest.raises(ValueError, match=message):
        layers(ours)[0].norm_and_gain()


def test_merged_weight_wants_adapters_that_can_be_merged():
    _, ours, _ = models("linear")
    with_plain_lora(ours)
    with pytest.raises(ValueError, match="adapter 'plain': the adapter is plain LoRA; expected active DoRA adapters"):
        layers(ours)[0].merged_weight_and_bias()
    layers(ours)[0].set_adapter([])
    with pytest.raises(ValueError, match="merged_weight_and_bias: no adapter is active"):
        layers(ours)[0].merged_weight_and_bias()


# DoraLinear.


def test_dora_linear_safe_merge():
    layer = DoraLinear(12, 10, rank=4, alpha=6.0, device=DEVICE)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(3, 12, device=DEVICE)
    expected = layer(x)
    layer.merge(safe_merge=True)
    assert rms_error(layer(x), expected) < 1e-5
    layer.unmerge()
    layer.lora_magnitude_vector.data[3] = torch.nan
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="DoraLinear.merge: 1 of 10 rows of the merged weight are not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged
    with pytest.raises(ValueError, match="DoraLinear.merge: safe_merge is 'yes'; expected True or False"):
        layer.merge(safe_merge="yes")
    layer.merge()
    assert layer.merged and F.linear(x, layer.weight).isnan().any()
