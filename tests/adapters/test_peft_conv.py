"""PEFT's convolutions: an enabled model gives PEFT's outputs and gradients, in PEFT's memory format."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model

import dora_kernels
from dora_kernels import ops, options
from dora_kernels.adapters.peft.conv import DoraKernelsConv2d
from dora_kernels.testing import check_layer, geometric_mean, rms_error
from dora_kernels.testing.run import shared_dropout
from tests.support.peft_problem import (
    CONVOLUTIONS,
    LAST,
    adapt,
    assert_as_good,
    build_convolution,
    calls,
    enabled,
    exact_tensors,
    layers,
    randomise,
    tensors,
    training_step,
)
from tests.support.problem import BACKENDS, DEVICE

CASES = {
    "1d": {"dims": 1},
    "2d": {},
    "3d": {"dims": 3},
    "float64": {"dtype": torch.float64},
    "stride, padding, no bias": {"config": {"stride": 2, "padding": 1, "bias": False}},
    "same": {"config": {"padding": "same", "dilation": 2}},
    "ragged": {"dims": 2, "config": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1)}},
    "circular": {"config": {"padding": 1, "padding_mode": "circular"}},
    "circular, dropout": {"config": {"padding": 1, "padding_mode": "circular"}, "lora_dropout": 0.5},
    "groups": {"config": {"groups": 2, "kernel_size": 2}},
    "groups, channels-last, dropout": {"config": {"groups": 2}, "last": True, "lora_dropout": 0.5},
    "channels-last": {"last": True},
    "channels-last, dropout": {"last": True, "lora_dropout": 0.5},
    "3d, channels-last": {"dims": 3, "last": True, "config": {"bias": False}},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.5},
    "1d, dropout": {"dims": 1, "lora_dropout": 0.5},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16, channels-last": {"dtype": torch.float16, "last": True},
    "bfloat16 adapters": {"dtype": torch.bfloat16, "autocast_adapter_dtype": False},
    "autocast": {"autocast": torch.bfloat16},
    "autocast over bfloat16, channels-last, dropout": {
        "autocast": torch.bfloat16,
        "dtype": torch.bfloat16,
        "last": True,
        "lora_dropout": 0.5,
    },
    "two adapters, channels-last": {"adapters": 2, "last": True},
    "two adapters, bfloat16": {"adapters": 2, "dtype": torch.bfloat16},
    "three adapters, two with dropout": {"adapters": 3, "lora_dropout": 0.5, "config": {"padding": 1}},
}


# the kernels see the same rows whatever the convolution was
KERNELS = ("2d", "groups", "bfloat16", "channels-last, dropout", "two adapters, bfloat16", "autocast")


@pytest.mark.parametrize(
    ("case", "backend"), [(case, "reference") for case in CASES] + [(case, "triton") for case in KERNELS]
)
def test_output_and_every_gradient(case, backend):
    config = dict(CASES[case])
    autocast = config.pop("autocast", None)
    model, x = build_convolution(**config)
    with torch.autocast(DEVICE, dtype=autocast, enabled=autocast is not None):
        y = model(x)
    dy = torch.randn_like(y)
    stock = tensors(model, x, dy, autocast=autocast)
    ops.calls.clear()
    with options(backend=backend):
        ours = tensors(enabled(model), x, dy, autocast=autocast)
    # the pointwise layer is a linear one where its pixels lie together
    folded = config.get("last", False) and config.get("adapters", 1) == 1
    adapters = config.get("adapters", 1)
    assert (calls("forward"), calls("rescale")) == ((1, 1) if folded else (0, 2 * adapters))
    assert {name for _, name in ops.calls} == {backend}
    if config.get("dims") != 3:  # the vendor's 3d convolution changes the format as it likes
        assert ours["y"].stride() == stock["y"].stride()
    assert_as_good(ours, stock, exact_tensors(model, x, dy, autocast=autocast))


@pytest.mark.parametrize("last", [False, True])
def test_check_layer(last):
    model, _ = build_convolution(lora_dropout=0.3, last=last)
    for layer in layers(model):
        check_layer(layer).raise_if_failed()


def test_check_layer_says_that_groups_do_not_merge():
    model, _ = build_convolution(dims=1, config={"groups": 2})
    report = check_layer(layers(model)[0])
    report.raise_if_failed()
    assert [row.check for row in report.rows if row.ok is None] == ["merge, accuracy"]


def test_check_layer_sees_a_wrong_convolution(monkeypatch):
    model, _ = build_convolution()
    norm = DoraKernelsConv2d.norm
    monkeypatch.setattr(DoraKernelsConv2d, "norm", lambda *arguments: norm(*arguments) * 1.01)
    with pytest.raises(AssertionError, match="rms error above"):
        check_layer(layers(model)[0]).raise_if_failed()


@st.composite
def convolutions(draw):
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    config = {
        "in_channels": groups * draw(st.integers(1, 4)),
        "out_channels": groups * draw(st.integers(1, 4)),
        "kernel_size": draw(st.integers(1, 3)),
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)),
        "bias": draw(st.booleans()),
        "groups": groups,
    }
    sizes = draw(st.tuples(st.integers(1, 3), *[st.integers(3, 6)] * dims))
    return dims, config, sizes, groups * draw(st.integers(1, 3)), draw(st.sampled_from([0.0, 0.5])), draw(st.booleans())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(convolutions())
def test_any_convolution(case):
    dims, config, (batch, *sizes), rank, dropout, last = case
    torch.manual_seed(0)
    net = nn.Sequential(CONVOLUTIONS[dims - 1](**config)).to(DEVICE)
    model = get_peft_model(net, LoraConfig(use_dora=True, target_modules=["0"], r=rank, lora_dropout=dropout)).train()
    randomise(model)
    x = torch.randn(batch, config["in_channels"], *sizes, device=DEVICE)
    x = x.to(memory_format=LAST[dims]) if last and dims > 1 else x
    dy = torch.randn_like(model(x))
    stock, ours = (tensors(each, x, dy) for each in (model, enabled(model)))
    for name, value in ours.items():
        # sums of few terms may cancel
        torch.testing.assert_close(value, stock[name], rtol=1e-3, atol=2e-4 * max(1, stock[name].abs().max().item()))


@pytest.mark.parametrize("mode", ["dropout.eval", "p = 0"])
@pytest.mark.parametrize("adapters", [1, 3])
def test_dropout_that_does_not_drop(adapters, mode):
    """PEFT then puts an adapter on a base of its own all the same, which it pads with zeros."""
    model, x = build_convolution(lora_dropout=0.5, adapters=adapters, config={"padding": 1, "padding_mode": "circular"})
    for layer in layers(model):
        for dropout in layer.lora_dropout.values():
            dropout.train(mode != "dropout.eval")
            dropout.p = 0.0 if mode == "p = 0" else 0.5
    dy = torch.randn_like(model(x))
    ours, stock = tensors(enabled(model), x, dy), tensors(model, x, dy)
    for name in stock:
        assert rms_error(ours[name], stock[name]) < 1e-5, name


def test_a_pointwise_conv1d_of_transposed_tokens():
    """(B, L, C) seen as (B, C, L): a linear layer, whose output is laid out as the vendor's."""
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Conv1d(6, 10, 1)).to(DEVICE), target_modules=["0"])
    x = torch.randn(2, 5, 6, device=DEVICE).transpose(1, 2)
    expected, ours = model(x), enabled(model)
    ops.calls.clear()
    y = ours(x)
    assert calls("forward") == 1 and y.stride() == expected.stride() and rms_error(y, expected) < 1e-5


def test_several_adapters_are_not_rounded_in_between():
    ratios = []
    for seed in range(4):
        model, x = build_convolution(dtype=torch.bfloat16, adapters=3)
        randomise(model, seed)
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:  # or the rounding of the base is all that counts
                parameter.data.mul_(0.3)
        exact = copy.deepcopy(model).double().up(x.double())
        ratios.append(rms_error(enabled(model).up(x), exact) / rms_error(model.up(x), exact))
    assert geometric_mean(ratios) < 1.1, ratios


def test_half_precision_base_under_dropout_where_peft_fails():
    """PEFT multiplies a float32 dropout(x) with the bfloat16 weight; ours takes it in the weight's dtype."""
    model, x = build_convolution(dtype=torch.bfloat16, lora_dropout=0.5)
    with pytest.raises(RuntimeError, match="type"):
        model(x)  # when PEFT stops doing this, the case joins those above
    results = []
    for each, images in ((enabled(model), x), (copy.deepcopy(model).double(), x.double())):
        with shared_dropout(0):
            results.append(each(images))
    assert results[0].dtype == torch.bfloat16 and rms_error(*results) < 0.02


class UNet(nn.Module):
    """Down, a step embedding, up again and a skip: what a diffusion model is made of."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.step = nn.Linear(5, 12)
        self.middle = nn.Conv2d(12, 12, 1)
        self.up = nn.Conv2d(12, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x, step):
        skip = F.silu(self.norm(self.first(x)))
        inner = F.silu(self.down(skip) + self.step(step)[:, :, None, None])
        inner = F.interpolate(self.up(F.silu(self.middle(inner))), scale_factor=2.0)
        return self.last(torch.cat([skip, inner], dim=1))


@pytest.mark.parametrize("last", [False, True])
def test_a_unet_trains_as_in_peft(last):
    torch.manual_seed(0)
    names = ["first", "down", "step", "middle", "up", "last"]
    net = UNet().to(DEVICE, memory_format=torch.channels_last if last else torch.contiguous_format)
    stock = adapt(net, target_modules=names, lora_dropout=0.1)
    for name, parameter in stock.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.mul_(0.3)
    ours = enabled(stock)
    x = torch.randn(4, 3, 8, 8, device=DEVICE)
    x = x.to(memory_format=torch.channels_last) if last else x
    step, target = torch.randn(4, 5, device=DEVICE), torch.randn(4, 3, 8, 8, device=DEVICE)
    losses = []
    for model in (stock, ours):
        torch.manual_seed(7)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([training_step(lambda x, model=model: model(x, step), optimizer, x, target) for _ in range(10)])
    assert losses[0][-1] < 0.9 * losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True])
def test_zero_row_is_finite(last, backend):
    """norm 0: PEFT divides by it; ours has gain 0 there."""
    model, x = build_convolution(adapters=2, last=last)
    for layer in layers(model):
        layer.base_layer.weight.data[3] = 0
        for name in ("default", "second"):
            layer.lora_B[name].weight.data[3] = 0
    dy = torch.randn_like(model(x))
    assert tensors(model, x, dy)["y"].isnan().any()
    with options(backend=backend):
        ours = tensors(enabled(model), x, dy)
        assert all(value.isfinite().all() for value in ours.values())
        torch.testing.assert_close(enabled(model).up(x)[:, 3].flatten(), model.up.base_layer.bias[3].expand(12))


@pytest.mark.parametrize("last", [False, True])
def test_the_norm_is_kept_inside_frozen_adapters(last):
    model, x = build_convolution(adapters=1 if last else 2, last=last)
    model = enabled(model).eval()
    ops.calls.clear()
    with torch.no_grad(), dora_kernels.frozen_adapters(model):
        first = model(x)
        made = ops.calls.copy()
        assert torch.equal(model(x), first)
        norms = sum(count for (name, _), count in made.items() if name == "norm")
        # the pointwise one's is made within forward, or by the scope
        assert norms == (1 if last else 4) and calls("norm") == norms
        model.up.set_scale("default", 0.3)
        assert not torch.equal(model(x), first) and calls("norm") > norms


def replaced(model):
    model.up.base_layer.forward = lambda x: x


LEFT_TO_PEFT = {
    "the base layer is dilated": lambda model: setattr(model.up.base_layer, "dilation", (2, 2)),
    "requires a gradient": lambda model: model.up.base_layer.requires_grad_(),
    "forward of base_layer was replaced": replaced,
    "has a bias": lambda model: setattr(model.up.lora_B["default"], "bias", nn.Parameter(torch.ones(10))),
}


@pytest.mark.parametrize("reason", LEFT_TO_PEFT)
def test_left_to_peft(reason):
    model, _ = build_convolution()
    LEFT_TO_PEFT[reason](model)
    report = dora_kernels.enable(model)
    assert [layer.name for layer in report.left_alone] == ["base_model.model.up"]
    assert reason in report.left_alone[0].reason


@pytest.mark.parametrize("call", ["unbatched", "adapter_names"])
def test_calls_that_go_to_peft(call):
    model, x = build_convolution(config={"bias": False})
    ours = enabled(model)
    ops.calls.clear()
    results = [each.up(x[0]) if call == "unbatched" else each.up(x, adapter_names=None) for each in (model, ours)]
    assert torch.equal(*results) and not ops.calls


def test_compiles_without_a_graph_break():
    model, x = build_convolution(lora_dropout=0.5, last=True)
    model = enabled(model)
    dy = torch.randn_like(model(x))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(tensors(model, x, dy, call=compiled), tensors(model, x, dy))
