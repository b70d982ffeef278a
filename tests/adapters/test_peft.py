"""PEFT parity: an enabled model gives PEFT's outputs and gradients.

The yardstick is stock PEFT in the same dtypes, both measured against stock PEFT in float64.
"""

import functools

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import dora_kernels
from dora_kernels import ops, options, passes
from dora_kernels.testing import check_layer, geometric_mean, rms_error
from dora_kernels.testing.run import shared_dropout
from tests.support.peft_problem import (
    assert_as_good,
    build,
    calls,
    enabled,
    exact_tensors,
    layers,
    randomise,
    tensors,
    training_step,
)
from tests.support.problem import BACKENDS, DEVICE


def assert_parity(model, x, *, autocast=None):
    """Output and every gradient of an enabled copy of `model`, all its layers computed by dora_linear."""
    dy = torch.randn_like(model(x) if autocast is None else x[..., :20])
    stock = tensors(model, x, dy, autocast=autocast)
    ops.calls.clear()
    ours = tensors(enabled(model), x, dy, autocast=autocast)
    # between several adapters half precision is not rounded: they are composed in PyTorch, over the norm's kernel
    wide = len(layers(model)[0].active_adapters) > 1 and (autocast or x.dtype) != torch.float32
    assert calls("forward") == calls("backward") == (0 if wide else len(layers(model)))
    assert calls("norm") == sum(n for n in (len(layer.active_adapters) for layer in layers(model)) if n > 1)
    assert_as_good(ours, stock, exact_tensors(model, x, dy, autocast=autocast))


CASES = {
    "float32": {},
    "float64": {"dtype": torch.float64},
    "rslora": {"use_rslora": True},
    "conv1d": {"conv1d": True},
    "trained bias": {"train_bias": True},
    "dropout": {"lora_dropout": 0.5},
    "conv1d, dropout": {"conv1d": True, "lora_dropout": 0.5},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "bfloat16, dropout": {"dtype": torch.bfloat16, "lora_dropout": 0.5},
    "bfloat16 adapters": {"dtype": torch.bfloat16, "autocast_adapter_dtype": False},
    "autocast": {"autocast": torch.bfloat16},
    "autocast, dropout": {"autocast": torch.bfloat16, "lora_dropout": 0.5},
    "autocast over bfloat16": {"autocast": torch.bfloat16, "dtype": torch.bfloat16},
    "autocast, conv1d": {"autocast": torch.bfloat16, "conv1d": True},
    "two adapters": {"adapters": 2},
    "two adapters, trained bias": {"adapters": 2, "train_bias": True},
    "two adapters, bfloat16": {"adapters": 2, "dtype": torch.bfloat16},
    "three adapters, two with dropout": {"adapters": 3, "lora_dropout": 0.5},
    "three adapters, two with dropout, autocast": {
        "adapters": 3,
        "lora_dropout": 0.5,
        "autocast": torch.bfloat16,
    },
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_output_and_every_gradient(case, backend):
    if case == "float64" and backend == "triton" and DEVICE == "cuda":
        pytest.skip("float64 kernels run in the interpreter only")
    config = dict(CASES[case])
    autocast = config.pop("autocast", None)
    model = build(**config)
    x = torch.randn(3, 4, 24, device=DEVICE, dtype=config.get("dtype", torch.float32))
    with options(backend=backend):
        assert_parity(model, x, autocast=autocast)


def test_parity_check_sees_an_error_of_one_in_a_thousand():
    model = build()
    x, dy = torch.randn(5, 24, device=DEVICE), torch.randn(5, 20, device=DEVICE)
    stock, exact = tensors(model, x, dy), exact_tensors(model, x, dy)
    for name in stock:
        wrong = stock | {name: stock[name] * 1.001}
        with pytest.raises(AssertionError):
            assert_as_good(wrong, stock, exact)


def test_dropout_draws_what_peft_draws(monkeypatch):
    """On a GPU the mask depends on the dtype it is drawn for, as well as on the seed."""
    model = build(lora_dropout=0.3, dtype=torch.bfloat16, adapters=3)
    x = torch.randn(6, 24, device=DEVICE, dtype=torch.bfloat16)
    drawn, state, dropout = [], [], functional.dropout
    monkeypatch.setattr(functional, "dropout", lambda x, *args: drawn.append(x.dtype) or dropout(x, *args))
    for each in (model, enabled(model)):
        torch.manual_seed(5)
        each(x)
        state.append(torch.rand(4, device=DEVICE))
    assert torch.equal(*state)
    assert drawn == [torch.float32] * 8  # two adapters of each layer, twice


@pytest.mark.parametrize("mode", ["layer.eval", "dropout.eval", "p = 0"])
def test_dropout_that_does_not_drop(mode, monkeypatch):
    """No mask, no random number drawn, and no second product with the base weight."""
    model = build(lora_dropout=0.5)
    for layer in layers(model):
        layer.training = mode != "layer.eval"
        layer.lora_dropout["default"].training = mode != "dropout.eval"
        layer.lora_dropout["default"].p = 0.0 if mode == "p = 0" else 0.5
    assert_parity(model, torch.randn(6, 24, device=DEVICE))
    given, forward = [], passes.forward
    monkeypatch.setattr(
        passes,
        "forward",
        lambda steps, call: given.append(call.x_dropped) or forward(steps, call),
    )
    enabled(model)(torch.randn(6, 24, device=DEVICE))
    assert given == [None, None]


@pytest.mark.parametrize("mode", ["dropout.eval", "p = 0"])
def test_dropout_that_does_not_drop_in_one_of_several_adapters(mode):
    """PEFT then nests as under dropout: over the base layer's output, not over that of the adapters before."""
    model = build(lora_dropout=0.5, adapters=3)
    for layer in layers(model):
        for dropout in layer.lora_dropout.values():
            dropout.train(mode != "dropout.eval")
            dropout.p = 0.0 if mode == "p = 0" else 0.5
    x, dy = torch.randn(5, 24, device=DEVICE), torch.randn(5, 20, device=DEVICE)
    ours, stock = tensors(enabled(model), x, dy), tensors(model, x, dy)
    for name in stock:
        assert rms_error(ours[name], stock[name]) < 1e-5, name


def test_several_adapters_are_not_rounded_in_between():
    """With three adapters the error was 1.31 times PEFT's where the output of each was rounded to bfloat16."""
    ratios = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = build(dtype=torch.bfloat16, adapters=3)
        for name, parameter in model.named_parameters():
            if "magnitude" in name:  # gains near 1, or the errors are those of a chaotic net
                parameter.data.copy_(1 + 0.05 * torch.randn_like(parameter))
        layer = layers(model)[0]
        x = torch.randn(40, 24, device=DEVICE, dtype=torch.bfloat16)
        report = check_layer(layer, x.requires_grad_(), randomise=False, seed=seed)
        assert report.ok, report
        ratios += [row.comparison.ratio for row in report.rows if row.check == "train, accuracy"]
    assert geometric_mean(ratios) < 1.05, ratios


@pytest.mark.parametrize("backend", BACKENDS)
def test_ten_optimizer_steps(backend):
    stock = build(lora_dropout=0.1, adapters=2)
    ours = enabled(stock)
    x, target = torch.randn(8, 24, device=DEVICE), torch.randn(8, 20, device=DEVICE)
    losses = []
    for model in (stock, ours):
        torch.manual_seed(7)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        with options(backend=backend):
            losses.append([training_step(model, optimizer, x, target) for _ in range(10)])
    assert losses[0][-1] < 0.8 * losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = enabled(build(lora_dropout=0.5))
    x, dy = torch.randn(5, 24, device=DEVICE), torch.randn(5, 20, device=DEVICE)
    plain = tensors(model, x, dy)
    ops.calls.clear()
    checkpointed = tensors(model, x, dy, call=functools.partial(checkpoint, model, use_reentrant=reentrant))
    assert calls("forward") == 4 and calls("backward") == 2
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_transformers_model(arch):
    """Attention, tied embeddings, every linear layer a DoRA layer; the whole model's loss and gradients."""
    torch.manual_seed(0)
    if arch == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
    else:
        base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4))
    config = LoraConfig(use_dora=True, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
    model = get_peft_model(base.to(DEVICE), config).train()
    randomise(model)
    ids = torch.randint(64, (2, 16), device=DEVICE)
    results = []
    for each in (model, enabled(model)):
        torch.manual_seed(1)
        loss = each(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss] + [p.grad for p in each.parameters() if p.requires_grad])
    for stock, ours in zip(*results, strict=True):
        assert rms_error(ours, stock) < 1e-4


def test_zero_row_is_finite():
    """norm 0: PEFT divides by it; ours has gain 0 there, for the first adapter and for those nested on it."""
    model = build(adapters=2)
    layer = layers(model)[0]
    layer.base_layer.weight.data[3] = 0
    for name in ("default", "second"):
        layer.lora_B[name].weight.data[3] = 0
    x, dy = torch.randn(5, 24, device=DEVICE), torch.randn(5, 20, device=DEVICE)
    assert tensors(model, x, dy)["y"].isnan().any()  # when PEFT stops doing this, the documentation changes
    assert all(value.isfinite().all() for value in tensors(enabled(model), x, dy).values())
    torch.testing.assert_close(layer.base_layer.bias[3].expand(5), enabled(model).up(x)[:, 3])


def test_nan_is_not_hidden():
    model = build(adapters=2)
    layers(model)[0].lora_B["second"].weight.data[3, 0] = torch.nan
    assert enabled(model).up(torch.randn(5, 24, device=DEVICE))[:, 3].isnan().all()


def test_compiles_without_a_graph_break():
    model = enabled(build(lora_dropout=0.5))
    x, dy = torch.randn(5, 24, device=DEVICE), torch.randn(5, 20, device=DEVICE)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(tensors(model, x, dy, call=compiled), tensors(model, x, dy))


@pytest.mark.parametrize("lora_dropout", [False, True], ids=["adapter", "lora"])
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norms_of_several_adapters_are_kept(dtype, conv1d, lora_dropout):
    """Inside frozen_adapters, in eval mode and in train mode, until something changes."""
    model = build(dtype, conv1d, adapters=3, lora_dropout=0.5)
    dora_kernels.enable(model, dropout="lora" if lora_dropout else None)
    x = torch.randn(6, 24, device=DEVICE, dtype=dtype)

    def made():
        """How many norms a call makes; its output, with the same masks in train mode."""
        forward, counted = ops.run_forward, []
        before = calls("norm"), calls("grouped_norm")
        with pytest.MonkeyPatch.context() as patch, torch.no_grad(), shared_dropout(0):
            patch.setattr(
                ops, "run_forward", lambda call: (out := forward(call), counted.append(out.norm is not None))[0]
            )
            y = model(x)
        return calls("norm") - before[0] + sum(counted) + calls("grouped_norm") - before[1], y

    for training in (False, True):
        model.train(training)
        assert made()[0] == 6 == made()[0]
        with dora_kernels.frozen_adapters(model):
            (first, y), (second, again) = made(), made()
            assert first == 6 and second == 0 and torch.equal(y, again)
            layers(model)[0].lora_B["second"].weight.data.mul_(2)
            dora_kernels.invalidate(model)
            count, changed = made()
            assert count == 6 and not torch.equal(changed, y)
