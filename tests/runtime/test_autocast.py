"""Mixed precision: dtypes as nn.Linear's and PEFT's in every combination; autocast's regions and cache; GradScaler."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dora_kernels import DoraLinear, ops, options, weight_norm
from dora_kernels.functional.rescale import rescale
from tests.support.compile_problem import Recorder
from tests.support.problem import BACKENDS, DEVICE

pytest.importorskip("peft")

from tests.support.peft_problem import build, calls, enabled, tensors  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EXACT = {"rtol": 0, "atol": 0}


def outcome(function, *arguments, **keywords):
    """The dtype of every tensor, or the error: a combination that PEFT refuses has to be refused."""
    try:
        return {name: value.dtype for name, value in function(*arguments, **keywords).items()}
    except RuntimeError:
        return RuntimeError


def linear(weight_dtype, x, autocast):
    with torch.autocast(DEVICE, dtype=autocast, enabled=autocast is not None):
        return {"y": nn.Linear(24, 20, device=DEVICE, dtype=weight_dtype)(x)}


@pytest.mark.parametrize("dropout", (0.0, 0.5))
@pytest.mark.parametrize("wide", (True, False), ids=("float32 adapters", "adapters in the weight's dtype"))
@pytest.mark.parametrize("weight_dtype", (F32, BF16, F16), ids=str)
def test_dtypes_in_every_combination(weight_dtype, wide, dropout):
    """Output and every gradient, whatever the dtype of x, with autocast off and on."""
    model = build(dtype=weight_dtype, autocast_adapter_dtype=wide, lora_dropout=dropout)
    ours, dy = enabled(model), torch.randn(5, 20, device=DEVICE)
    for x_dtype, autocast in itertools.product((F32, BF16, F16), (None, BF16, F16)):
        x = torch.randn(5, 24, device=DEVICE, dtype=x_dtype)
        ops.calls.clear()
        actual = outcome(tensors, ours, x, dy, autocast=autocast)
        assert actual == outcome(tensors, model, x, dy, autocast=autocast), (x_dtype, autocast)
        expected = outcome(linear, weight_dtype, x, autocast)
        assert (actual if actual is RuntimeError else actual["y"]) == (
            expected if expected is RuntimeError else expected["y"]
        )
        if actual is not RuntimeError:
            assert calls("forward") == calls("backward") == 2, (x_dtype, autocast)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_dtype", (F32, BF16), ids=str)
def test_dtypes_of_dora_linear_and_of_rescale(weight_dtype, backend):
    """The float32 magnitude promotes nothing; gradients have their leaf's dtype."""
    layer = DoraLinear(24, 20, rank=5, alpha=7.0, device=DEVICE, dtype=weight_dtype)
    nn.init.normal_(layer.lora_B.weight)
    A, B, magnitude = layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector

    def two_pieces(x):
        norm = weight_norm(layer.weight, A, B, layer.scaling, norm_grad=True)
        return rescale(F.linear(x, layer.weight), F.linear(x, A), B, magnitude / norm, layer.scaling, layer.bias)

    for function, autocast in itertools.product((layer, two_pieces), (BF16, F16)):
        x = torch.randn(5, 24, device=DEVICE, dtype=weight_dtype, requires_grad=True)
        layer.zero_grad()
        with options(backend=backend), torch.autocast(DEVICE, dtype=autocast):
            y = function(x)
            assert y.dtype == autocast
            assert weight_norm(layer.weight, A, B, layer.scaling).dtype == F32
        y.float().square().sum().backward()
        assert x.grad.dtype == weight_dtype
        assert {p.grad.dtype for p in (A, B, magnitude)} == {F32}
        assert all(p.grad.isfinite().all() and p.grad.any() for p in (A, B, magnitude))


def test_autocast_turned_off_inside_autocast():
    """As without any; and around it the layer goes on in autocast's dtype."""
    model, x = enabled(build()), torch.randn(5, 24, device=DEVICE)
    plain, half = model(x), None
    with torch.autocast(DEVICE, dtype=BF16):
        half = model(x)
        with torch.autocast(DEVICE, enabled=False):
            torch.testing.assert_close(model(x), plain, **EXACT)
            with torch.autocast(DEVICE, dtype=F16):
                assert model(x).dtype == F16
        torch.testing.assert_close(model(x), half, **EXACT)
    assert half.dtype == BF16 and plain.dtype == F32


def test_the_cache_of_casts_changes_nothing_and_is_not_filled_by_us():
    """Autocast keeps the half-precision copy of a leaf until the region ends: our operators see no stale one."""
    model, x = enabled(build()), torch.randn(5, 24, device=DEVICE)
    results = []
    for cache in (True, False):
        with torch.autocast(DEVICE, dtype=BF16, cache_enabled=cache):
            results.append([model(x)])
            with torch.no_grad():
                saved = [p.clone() for p in model.parameters()]
                for parameter in model.parameters():
                    parameter.mul_(1.5)
            results[-1].append(model(x))
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), saved, strict=True):
                    parameter.copy_(value)
    torch.testing.assert_close(*results, **EXACT)
    assert not torch.equal(*results[0])


def test_backward_under_autocast_and_after_it():
    """The backward pass has the dtypes of its forward pass, wherever it runs."""
    model, x, dy = enabled(build()), torch.randn(5, 24, device=DEVICE), torch.randn(5, 20, device=DEVICE)
    after = tensors(model, x, dy, autocast=BF16)
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast(DEVICE, dtype=BF16):
        y = model(leaf)
        y.backward(dy.to(y.dtype))
    inside = {"y": y.detach(), "dx": leaf.grad} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(inside, after, **EXACT)


def test_grad_scaler():
    """Steps as with PEFT's layers; a step whose gradients overflow is skipped, and the scale halved."""
    stock = build(dtype=F32)
    x, target = torch.randn(64, 24, device=DEVICE), torch.randn(64, 20, device=DEVICE)
    losses, scales = [], []
    for model in (stock, enabled(stock)):
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**24, growth_interval=1000)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(24):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, dtype=F16):
                loss = F.mse_loss(model(x).float(), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
        assert scaler.get_scale() < 2.0**24
    # a model that does not train is 0.4% off or more; ours is 0.06%
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert scales[1] >= scales[0] / 2  # no earlier overflow than PEFT's


@pytest.mark.parametrize("inside", (True, False))
def test_autocast_in_a_compiled_function_and_around_it(inside):
    torch._dynamo.reset()
    model, recorder = enabled(build()), Recorder()
    x, dy = torch.randn(5, 24, device=DEVICE), torch.randn(5, 20, device=DEVICE)
    expected = tensors(model, x, dy, autocast=BF16)

    def function(x):
        with torch.autocast(DEVICE, dtype=BF16):
            return model(x)

    compiled = recorder.compile(function if inside else model)
    actual = tensors(model, x, dy, call=compiled, autocast=None if inside else BF16)
    torch.testing.assert_close(actual, expected, **EXACT)
    assert recorder.graphs == [("forward", {"forward": 2}), ("backward", {"backward": 2})]
    torch._dynamo.reset()
