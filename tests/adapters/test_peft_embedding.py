"""PEFT's embedding: an enabled model gives PEFT's outputs and gradients."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import dora_kernels
from dora_kernels import ops, options
from dora_kernels.adapters.peft.embedding import DoraKernelsEmbedding
from dora_kernels.testing import check_layer, compare, geometric_mean, rms_error
from tests.support.peft_problem import TOKENS, WIDTH, build_embedding, calls, enabled, layers, randomise
from tests.support.problem import BACKENDS, DEVICE


def tensors(model, ids, dy, autocast=None):
    """The output and the gradients of the adapters by name."""
    model.zero_grad()
    with torch.autocast(DEVICE, dtype=autocast, enabled=autocast is not None):
        y = model(ids)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


CASES = {
    "float32": {},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16 adapters": {"dtype": torch.bfloat16, "autocast_adapter_dtype": False},
    "float16": {"dtype": torch.float16},
    "autocast": {"autocast": torch.bfloat16},
    "padding": {"config": {"padding_idx": 3}},
    "scaled gradient": {"config": {"scale_grad_by_freq": True}},
    "scaled": {"config": {"scale": 3.25}},
    "scaled, bfloat16": {"config": {"scale": 3.25}, "dtype": torch.bfloat16},
    "dropout, which PEFT has not here": {"lora_dropout": 0.5},
    "two adapters": {"adapters": 2},
    "three adapters, bfloat16": {"adapters": 3, "dtype": torch.bfloat16},
    "two adapters, scaled": {"adapters": 2, "config": {"scale": 0.5}},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_output_and_every_gradient(case, backend):
    if case == "float64" and backend == "triton" and DEVICE == "cuda":
        pytest.skip("float64 kernels run in the interpreter only")
    config = dict(CASES[case])
    autocast = config.pop("autocast", None)
    model = build_embedding(**config)
    ids = torch.tensor([[1, 3, 5, 3], [0, 12, 3, 7]], device=DEVICE)
    dy = torch.randn(2, 4, WIDTH, device=DEVICE)
    stock = tensors(model, ids, dy, autocast)
    ops.calls.clear()
    with options(backend=backend):
        ours = tensors(enabled(model), ids, dy, autocast)
    assert {name for _, name in ops.calls} == {backend}
    assert calls("rescale") == calls("norm") == config.get("adapters", 1)
    exact = tensors(copy.deepcopy(model).double(), ids, dy.double())
    for name, value in ours.items():
        assert value.dtype == stock[name].dtype and value.shape == stock[name].shape, name
        comparison = compare(name, value, stock[name], exact[name], through=ours["y"].dtype)
        assert comparison.limit < 0.2 and comparison.ok, comparison  # zeros have an error of 1
        if value.dtype == torch.float64:
            assert comparison.error < 1e-14, comparison


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_embedding(data):
    vocabulary, width, rank = (data.draw(st.integers(1, most)) for most in (40, 40, 9))
    shape = data.draw(st.lists(st.integers(0, 4), min_size=0, max_size=3))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(vocabulary, width)).to(DEVICE)
    model = get_peft_model(net, LoraConfig(use_dora=True, target_modules=["0"], r=rank)).train()
    randomise(model)
    ids = torch.randint(vocabulary, shape, device=DEVICE)
    dy = torch.randn(*shape, width, device=DEVICE)
    stock, ours = tensors(model, ids, dy), tensors(enabled(model), ids, dy)
    for name, value in ours.items():
        torch.testing.assert_close(value, stock[name], rtol=1e-4, atol=1e-4)


def test_check_layer(monkeypatch):
    layer = layers(build_embedding(dtype=torch.bfloat16))[0]
    check_layer(layer).raise_if_failed()
    norm = DoraKernelsEmbedding.norm
    monkeypatch.setattr(DoraKernelsEmbedding, "norm", lambda *arguments: norm(*arguments) * 1.05)
    with pytest.raises(AssertionError, match="rms error above"):
        check_layer(layer).raise_if_failed()


def test_several_adapters_are_not_rounded_in_between():
    ratios, ids = [], torch.arange(TOKENS, device=DEVICE)
    for seed in range(4):
        model = build_embedding(dtype=torch.bfloat16, adapters=3)
        randomise(model, seed)
        exact = copy.deepcopy(model).double()(ids)
        ratios.append(rms_error(enabled(model)(ids), exact) / rms_error(model(ids), exact))
    assert geometric_mean(ratios) < 1.1, ratios


def test_zero_column_is_finite():
    """norm 0: PEFT divides by it; ours has gain 0 there, and the output is 0."""
    model = build_embedding()
    model.up.base_layer.weight.data[:, 4] = 0
    model.up.lora_embedding_B["default"].data[4] = 0
    ids, dy = torch.arange(TOKENS, device=DEVICE), torch.randn(TOKENS, WIDTH, device=DEVICE)
    assert tensors(model, ids, dy)["y"].isnan().any()
    ours = tensors(enabled(model), ids, dy)
    assert all(value.isfinite().all() for value in ours.values()) and not ours["y"][:, 4].any()


def test_the_norm_is_kept_inside_frozen_adapters():
    model, ids = enabled(build_embedding(adapters=2)).eval(), torch.arange(TOKENS, device=DEVICE)
    ops.calls.clear()
    with dora_kernels.frozen_adapters(model):
        first = model(ids)
        assert torch.equal(model(ids), first) and calls("norm") == 2
        model.up.lora_embedding_B["second"].data = 2 * model.up.lora_embedding_B["second"].data
        assert not torch.equal(model(ids), first) and calls("norm") == 4
    model(ids)
    assert calls("norm") == 6


LEFT_TO_PEFT = {
    "max_norm": {"max_norm": 1.0},
    "sparse gradients": {"sparse": True},
}


@pytest.mark.parametrize("reason", LEFT_TO_PEFT)
def test_left_to_peft(reason):
    report = dora_kernels.enable(build_embedding(config=LEFT_TO_PEFT[reason]))
    assert len(report.left_alone) == 1 and reason in report.left_alone[0].reason


def test_hooks_of_the_base_layer_run():
    model, seen = enabled(build_embedding()), []
    model.up.base_layer.register_forward_hook(lambda *args: seen.append(args))
    ops.calls.clear()
    model(torch.arange(3, device=DEVICE))
    assert len(seen) == 1 and calls("rescale") == 1


def test_a_language_model_with_its_embedding():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=True, **sizes))
    config = LoraConfig(use_dora=True, target_modules=["embed_tokens", "q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base.to(DEVICE), config).train()
    randomise(model)
    ids = torch.randint(64, (2, 16), device=DEVICE)
    results = []
    for each in (model, enabled(model)):
        loss = each(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss] + [p.grad for p in each.parameters() if p.requires_grad])
    for stock, ours in zip(*results, strict=True):
        assert rms_error(ours, stock) < 1e-4


def test_compiles_without_a_graph_break():
    model, ids = enabled(build_embedding()), torch.arange(TOKENS, device=DEVICE)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids))
