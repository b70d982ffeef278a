"""DoraLinear: construction, state dict, merge and unmerge, training."""

import copy

import pytest
import torch
from torch import nn

from dora_kernels import DoraLinear, options
from tests.support.problem import BACKENDS, DEVICE, definition


@pytest.fixture
def layer():
    """A layer after some training: B, gain and bias all count."""
    torch.manual_seed(0)
    layer = DoraLinear(24, 20, rank=4, alpha=6.0, device=DEVICE)
    with torch.no_grad():
        layer.lora_B.weight.normal_()
        layer.lora_magnitude_vector.mul_(1 + torch.rand(20, device=DEVICE))
    return layer


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_fresh_layer_is_its_linear(dtype, bias):
    linear = nn.Linear(24, 20, bias=bias, dtype=dtype, device=DEVICE)
    layer = DoraLinear.from_linear(linear, rank=4, alpha=8.0)
    x = torch.randn(5, 24, dtype=dtype, device=DEVICE)
    # the merged way rounds before it adds the bias
    torch.testing.assert_close(
        layer(x), linear(x), rtol=0, atol=2 * torch.finfo(dtype).eps * linear(x).abs().max().item()
    )
    assert layer.weight is linear.weight and layer.scaling == 2.0
    assert {parameter.dtype for parameter in layer.parameters() if parameter.requires_grad} == {torch.float32}


def test_forward_is_the_definition(layer):
    x = torch.randn(2, 3, 24, device=DEVICE)
    torch.testing.assert_close(layer(x), definition(layer, x))


def test_dropout_is_pefts(layer):
    layer.dropout = 0.5
    x = torch.randn(64, 24, device=DEVICE)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, definition(layer, x, x_dropped=nn.functional.dropout(x, 0.5)))
    assert not torch.allclose(y, definition(layer, x))
    torch.testing.assert_close(layer.eval()(x), definition(layer, x))


def test_only_the_adapter_is_trained(layer):
    layer(torch.randn(5, 24, device=DEVICE)).square().sum().backward()
    trained = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert trained == {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    layer = DoraLinear(24, 20, rank=4, alpha=8.0, device=DEVICE)
    x, target = torch.randn(32, 24, device=DEVICE), torch.randn(32, 20, device=DEVICE)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        loss = (layer(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert layer.lora_B.weight.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_merge_and_unmerge(layer, dtype, backend):
    layer.weight.data = layer.weight.data.to(dtype)
    layer.bias.data = layer.bias.data.to(dtype)
    x = torch.randn(5, 24, dtype=dtype, device=DEVICE)
    before, y = layer.weight.clone(), layer(x)
    with options(backend=backend):
        layer.merge()
        layer.merge()
    assert layer.merged and not torch.allclose(layer.weight, before)
    error = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), y, rtol=error, atol=error * y.abs().max().item())
    with pytest.raises(ValueError, match="the layer is merged"):
        layer.reset_adapter()
    with options(backend=backend):
        layer.unmerge()
        layer.unmerge()
    # one rounding of the merged weight, whose entries are up to |W'|/gain from zero
    torch.testing.assert_close(
        layer.weight, before, rtol=0, atol=torch.finfo(dtype).eps * before.abs().max().item() * 4
    )
    assert not layer.merged


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_merge_does_not_see_autocast(layer, backend):
    """A float32 weight comes back as it was: adapters that autocast had rounded would stay in it in part."""
    plain, cast, before = layer, copy.deepcopy(layer), layer.weight.clone()
    with options(backend=backend):
        plain.merge()
        with torch.autocast(DEVICE, torch.bfloat16):
            standing_for_it, _ = cast.merged_weight_and_bias()
            cast.merge()
            assert torch.equal(cast.weight, plain.weight) and torch.equal(standing_for_it, plain.weight)
            assert not torch.allclose(cast.weight, before, rtol=0.1)
            cast.unmerge()
    torch.testing.assert_close(cast.weight, before, rtol=0, atol=1e-6)


def test_unmerge_refuses_what_is_lost(layer):
    with torch.no_grad():
        layer.lora_magnitude_vector[3] = 0
    layer.merge()
    with pytest.raises(ValueError, match="1 of 20 rows were merged with gain 0"):
        layer.unmerge()
    assert layer.merged


def test_unmerge_refuses_a_row_that_float16_has_lost():
    """A gain of 2e-7 leaves zeros and subnormal numbers, from which the row came back wrong by its own size."""
    torch.manual_seed(0)
    layer = DoraLinear(35, 21, 3, 5.0, device=DEVICE, dtype=torch.float16)
    with torch.no_grad():
        layer.lora_B.weight.normal_(0, 0.2)
        layer.lora_magnitude_vector[3] = 1e-7
    layer.merge()
    with pytest.raises(ValueError, match=r"1 of 21 rows were merged with a gain too small for torch.float16 \(row 3\)"):
        layer.unmerge()
    assert layer.merged


@pytest.mark.parametrize("gain", (1.5, 0.5, 0.4))
def test_unmerge_takes_a_row_that_was_subnormal_before(gain):
    """Unless a gain below a half has cost it more than a bit."""
    layer = DoraLinear(35, 21, 3, 5.0, device=DEVICE, dtype=torch.float16)
    with torch.no_grad():
        layer.weight[3] = 1e-5
        layer.reset_adapter()
        layer.lora_magnitude_vector.mul_(gain)
    before = layer.weight.clone()
    layer.merge()
    if gain < 0.5:
        with pytest.raises(ValueError, match=r"1 of 21 rows were merged with a gain too small for torch.float16"):
            layer.unmerge()
        return
    layer.unmerge()
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=torch.finfo(torch.float16).eps)
    # a step of the subnormal numbers; a merged row is 5e-6 off
    torch.testing.assert_close(layer.weight[3], before[3], rtol=0, atol=2**-24)


def test_state_dict_has_pefts_names(layer):
    names = {"weight", "bias", "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}
    assert set(layer.state_dict()) == names
    other = DoraLinear(24, 20, rank=4, alpha=6.0, device=DEVICE)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 24, device=DEVICE)
    assert torch.equal(other(x), layer(x))


def test_weights_move_to_and_from_peft(layer):
    peft = pytest.importorskip("peft")
    linear = nn.Linear(24, 20, device=DEVICE)
    linear.weight.data, linear.bias.data = layer.weight.data.clone(), layer.bias.data.clone()
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(linear), config)
    prefix = "base_model.model.0."
    adapter = {prefix + name: value for name, value in layer.state_dict().items() if name.startswith("lora")}
    result = peft.set_peft_model_state_dict(model, adapter)
    assert not result.unexpected_keys
    x = torch.randn(5, 24, device=DEVICE)
    torch.testing.assert_close(model(x), layer(x))
    back = peft.get_peft_model_state_dict(model)
    fresh = DoraLinear.from_linear(nn.Linear(24, 20, device=DEVICE), rank=4, alpha=6.0)
    fresh.load_state_dict({name.removeprefix(prefix): value for name, value in back.items()}, strict=False)
    for name in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"):
        assert torch.equal(fresh.state_dict()[name], layer.state_dict()[name])


def test_deepcopy_and_meta(layer):
    x = torch.randn(5, 24, device=DEVICE)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert DoraLinear(24, 20, rank=4, alpha=6.0, device="meta").weight.is_meta


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "DoraLinear: rank is 0; expected a positive int"),
        ({"rank": 2.0}, "DoraLinear: rank is 2.0"),
        ({"alpha": float("nan")}, "DoraLinear: alpha is nan; expected a finite Python number"),
        ({"alpha": None}, "DoraLinear: alpha is None; expected a finite Python number"),
        ({"dropout": 1.0}, "DoraLinear: dropout is 1.0; expected a probability"),
    ],
    ids=str,
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        DoraLinear(**({"in_features": 8, "out_features": 6, "rank": 2, "alpha": 4.0} | arguments))


def test_from_linear_takes_exactly_a_linear():
    with pytest.raises(ValueError, match="linear is Bilinear; expected torch.nn.Linear"):
        DoraLinear.from_linear(nn.Bilinear(2, 2, 2), rank=1, alpha=1.0)


def test_a_merged_layer_refuses_the_state_dict(layer):
    state = layer.state_dict()
    layer.merge()
    for call in (layer.state_dict, lambda: layer.load_state_dict(state)):
        with pytest.raises(ValueError, match="the layer is merged; expected unmerge"):
            call()


def test_a_zero_row_is_unmerged(layer):
    with torch.no_grad():
        layer.weight[3] = 0
        layer.lora_B.weight[3] = 0
    before = layer.weight.clone()
    layer.merge()
    layer.unmerge()
    torch.testing.assert_close(layer.weight, before)
