"""A quantized weight reads no further than its parts go: they are looked at, wherever they come from."""

import copy
import dataclasses
import functools
import itertools
import pickle

import pytest
import torch
from torch import nn

import dora_kernels
from dora_kernels import DoraLinear, options, quant
from dora_kernels.extras.dvora import DvoraLinear, VeraProjection
from dora_kernels.quant import layout_check, parts
from dora_kernels.reference import dora_linear_ref
from tests.support import restated_layers
from tests.support.packed_weights import KINDS, quantized
from tests.support.problem import BACKENDS, DEVICE

ON_CPU = pytest.mark.skipif(DEVICE == "cuda", reason="the tensors are made on the CPU")
N, K = 16, 24
PARTS = {
    "codebook4": ("packed", "absmax", "code"),
    "codebook4 of 32": ("packed", "absmax", "code"),
    "codebook4 nested": ("packed", "absmax", "code", "nested_absmax", "nested_code", "offset"),
    "int8": ("q", "scale"),
    "float8": ("q", "scale"),
    "nf4_torchao": ("packed", "scalers", "factor", "mean", "lut"),
    "hqq4 axis 0": ("packed", "scale", "zero"),
    "hqq4 axis 1": ("packed", "scale", "zero"),
}


# Quantized weights.


def wrong_parts(tensor):
    """(what is wrong, another tensor in the place of one part)."""
    yield "is NoneType", None
    yield "has shape", torch.cat((tensor, tensor)) if tensor.dim() else tensor[None]
    yield "has shape", tensor[None]
    yield "is torch.int64", tensor.to(torch.int64)
    yield "is torch.float64", tensor.to(torch.float64)
    yield "on meta", tensor.to("meta")
    yield "is torch.sparse_coo", tensor.double().to_sparse()
    yield "is nested", torch.nested.as_nested_tensor([tensor.double().reshape(-1)])
    if tensor.dim():
        yield "has shape", tensor[:-1]
        yield "has shape", tensor[:0]
    if tensor.is_floating_point():
        yield "requires a gradient", tensor.clone().requires_grad_()


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_a_quantised_weight_is_looked_at(kind):
    weight = quantized(kind, N, K)
    assert len(weight.tensors) == len(PARTS[kind])
    for i, name in enumerate(PARTS[kind]):
        for why, wrong in wrong_parts(weight.tensors[i]):
            if kind.startswith("hqq4") and name != "packed" and why == "is torch.float64":
                continue  # scale and zero may have any floating-point dtype
            # of two devices the first part's is the one that is expected
            message = rf"QuantizedWeight {weight.format}: \w+ .*{why}"
            tensors = (*weight.tensors[:i], wrong, *weight.tensors[i + 1 :])
            with pytest.raises(ValueError, match=message) as error:
                dataclasses.replace(weight, tensors=tensors)
            assert name in str(error.value) or why == "on meta"
    for tensors in (weight.tensors[:-1], (*weight.tensors, weight.tensors[0]), list(weight.tensors), None):
        with pytest.raises(ValueError, match=f"QuantizedWeight {weight.format}: tensors is .* {PARTS[kind][0]}"):
            dataclasses.replace(weight, tensors=tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_laid_out_as_good_ones_are_not_gone_through_again(kind, monkeypatch):
    """Any that are not, are: whatever grad mode a weight is read in."""
    weight, gone_through = quantized(kind, N, K), []
    monkeypatch.setattr(parts, "layout_check", lambda tensors: gone_through.append(tensors) or layout_check(tensors))
    monkeypatch.setattr(parts, "_expected_cached", functools.lru_cache(8, typed=True)(parts._Expected))
    for _ in range(2):
        dataclasses.replace(weight, tensors=tuple(tensor.clone() for tensor in weight.tensors))
    assert len(gone_through) == 1
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            for i, tensor in enumerate(weight.tensors):
                if tensor.is_floating_point():
                    wrong = tensor.detach().requires_grad_()
                    with pytest.raises(ValueError, match="requires a gradient"):
                        dataclasses.replace(weight, tensors=(*weight.tensors[:i], wrong, *weight.tensors[i + 1 :]))


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_sizes(kind):
    weight = quantized(kind, N, K)
    wrong = [(N + 1, K), (N - 1, K), (N, K + 1), (-N, -K), (N, K, 1), (N,), (float(N), K), (2**62, 2**62), [N, K], None]
    for shape in wrong:
        with pytest.raises(ValueError, match=r"QuantizedWeight"):
            dataclasses.replace(weight, shape=shape)
    for i, value in itertools.product(range(len(weight.numbers)), (-8, 2**40, 8.0, None, True, "64", [64])):
        numbers = (*weight.numbers[:i], value, *weight.numbers[i + 1 :])
        with pytest.raises(ValueError, match="QuantizedWeight"):
            dataclasses.replace(weight, numbers=numbers)
    for block in (0, 3, 7):  # no block, and blocks that begin within a byte
        if weight.numbers:
            with pytest.raises(ValueError, match=f"QuantizedWeight {weight.format}"):
                dataclasses.replace(weight, numbers=(block, *weight.numbers[1:]))
    for numbers in ((*weight.numbers, 64), weight.numbers[:-1] if weight.numbers else (1,), None, 64):
        with pytest.raises(ValueError, match="QuantizedWeight"):
            dataclasses.replace(weight, numbers=numbers)
    for changes in ({"format": "gguf"}, {"format": None}, {"dtype": torch.int8}, {"dtype": "float32"}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} is"):
            dataclasses.replace(weight, **changes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_refused_or_read(backend):
    """The kernels read q and its scale by their strides, and everything else as it must lie."""
    for kind, names in PARTS.items():
        weight = quantized(kind, N, K)
        expected = weight.dequantize()
        for i, name in enumerate(names):
            part = weight.tensors[i]
            if not part.dim():
                continue
            strided = part.repeat_interleave(2, -1)[..., ::2]
            tensors = (*weight.tensors[:i], strided, *weight.tensors[i + 1 :])
            if weight.format != "row8":
                with pytest.raises(ValueError, match=rf"{name} has strides \(2,\); expected it contiguous"):
                    dataclasses.replace(weight, tensors=tensors)
                continue
            other = dataclasses.replace(weight, tensors=tensors)
            with options(backend=backend):
                norm = dora_kernels.weight_norm(other, *zero_adapter(other), 1.0)
            torch.testing.assert_close(norm, torch.linalg.vector_norm(expected, dim=1))


def zero_adapter(weight):
    return torch.zeros(1, weight.shape[1], device=DEVICE), torch.zeros(weight.shape[0], 1, device=DEVICE)


def test_copies_are_looked_at_and_whole_weights_are_not():
    weight = quantized("codebook4 nested", N, K)
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), copy.copy(weight)):
        assert torch.equal(other.dequantize(), weight.dequantize())
    pickled = weight.__reduce_ex__(2)
    pickled[2]["tensors"] = (*weight.tensors[:1], weight.tensors[1][:1], *weight.tensors[2:])
    with pytest.raises(ValueError, match="absmax has shape"):
        pickled[0](*pickled[1]).__setstate__(pickled[2])
    assert torch.equal(weight.rounded_to(torch.bfloat16).dequantize(), weight.dequantize().bfloat16())
    with pytest.raises(ValueError, match="rounded_to: dtype is torch.int8"):
        weight.rounded_to(torch.int8)
    with pytest.raises(ValueError, match="rounded_to: dtype is torch.bfloat16"):
        quantized("nf4_torchao", N, K).rounded_to(torch.bfloat16)
    for rows, message in ((3, "rows is int"), (slice(0, 4, 2), "rows has step 2")):
        with pytest.raises(ValueError, match=f"dequantize: {message}"):
            weight[rows]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_without_inputs_or_outputs(kind, backend):
    for N, K in ((0, 8), (8, 0), (0, 0)):
        weight = quantized(kind, N, K)
        x, lora_A, lora_B = (
            torch.ones(3, K, device=DEVICE),
            torch.ones(2, K, device=DEVICE),
            torch.ones(N, 2, device=DEVICE),
        )
        magnitude = torch.ones(N, device=DEVICE)
        leaves = [tensor.requires_grad_() for tensor in (x, lora_A, lora_B, magnitude)]
        with options(backend=backend):
            y = dora_kernels.dora_linear(x, weight, lora_A, lora_B, magnitude, 0.5)
            assert dora_kernels.merge_weight(weight, lora_A, lora_B, magnitude, 0.5).shape == (N, K)
        expected = dora_linear_ref(x, weight.dequantize(), lora_A, lora_B, magnitude, 0.5)
        torch.testing.assert_close(y, expected)
        gradients = (torch.autograd.grad(output.sum(), leaves) for output in (y, expected))
        torch.testing.assert_close(*gradients)


# What libraries and files say.


def broken_linear4bit(**changes):
    """A Linear4bit as a file makes it, whose state says something else: plain attributes, or inner_ ones."""
    bnb = pytest.importorskip("bitsandbytes")
    weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4", blocksize=64).to("cpu")
    linear = bnb.nn.Linear4bit(64, 64, bias=False)
    state = weight.quant_state.as_dict(packed=True)
    linear.weight = bnb.nn.Params4bit.from_prequantized(weight.data, state, requires_grad=False, device="cpu")
    for name, value in changes.items():
        owner = linear.weight.quant_state
        owner, name = (owner.state2, name.removeprefix("inner_")) if name.startswith("inner_") else (owner, name)
        setattr(owner, name, value(getattr(owner, name)))
    return linear


BROKEN = {
    "absmax has shape": {"absmax": lambda absmax: absmax[:8]},
    "code has shape": {"code": lambda code: code[:2]},
    "absmax has strides": {"absmax": lambda absmax: absmax.repeat_interleave(2)[::2]},
    "nested_absmax has shape": {"inner_absmax": lambda absmax: absmax[:0]},
    "nested_code has shape": {"inner_code": lambda code: code[:8]},
    "blocksize is 0": {"blocksize": lambda blocksize: 0},
    "blocksize is 64.0": {"blocksize": float},
    "packed has shape": {"shape": lambda shape: torch.Size((64, 128))},
    "offset is": {"offset": lambda offset: None},
    "not as its library builds it": {"absmax": lambda absmax: None},
}


@ON_CPU
@pytest.mark.parametrize("message", BROKEN)
def test_a_checkpoint_of_4_bits_whose_parts_do_not_fit(message):
    linear = broken_linear4bit(**BROKEN[message])
    assert quant.is_quantized(linear) and quant.read(broken_linear4bit()).shape == (64, 64)
    for make in (
        lambda: quant.read(linear),
        lambda: DoraLinear.from_linear(linear, 4, 1.0),
        lambda: DvoraLinear.from_linear(linear, VeraProjection(64, 64, 4)),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert message in quant.read_or_reason(linear)[1]


@ON_CPU
def test_enable_leaves_such_a_layer_alone_and_a_call_sees_a_later_change():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(broken_linear4bit(), broken_linear4bit())
    model.is_loaded_in_4bit = True
    model = peft.get_peft_model(model, peft.LoraConfig(use_dora=True, target_modules=["0", "1"]))
    first, second = (model.base_model.model[i] for i in (0, 1))
    state = first.base_layer.weight.quant_state
    state.absmax = state.absmax[:8]
    report = dora_kernels.enable(model)
    assert [layer.taken_over for layer in report.layers] == [False, True]
    assert "absmax has shape (8,); expected (64,)" in report.layers[0].reason
    state = second.base_layer.weight.quant_state
    state.absmax = state.absmax[:8]
    weight, reason = second.read_base(second)  # what each call asks; the call itself is then bitsandbytes'
    assert weight is None and "absmax has shape (8,)" in reason

    ours = DoraLinear.from_linear(broken_linear4bit(), 4, 1.0)
    ours(torch.ones(2, 64))
    ours.base_layer.weight.quant_state.absmax = state.absmax
    with pytest.raises(ValueError, match="absmax has shape"):
        ours(torch.ones(2, 64))


@ON_CPU
def test_other_libraries_weights_whose_parts_do_not_fit():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(48, 20, has_fp16_weights=False).to("cpu")
    layer.weight.SCB = layer.weight.SCB[:3]
    with pytest.raises(ValueError, match=r"scale has shape \(3,\); expected \(20,\)"):
        quant.read(layer)
    torchao = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(64, 32)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    layer.weight.scale = layer.weight.scale.T  # (1, N): a scale for each column, of a square weight as many as rows
    with pytest.raises(ValueError, match="scales"):
        quant.read(layer)
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    for part, message in (("quantized_scalers", "scalers has shape"), ("quantization_factor", "factor has shape")):
        weight = nf4.to_nf4(torch.randn(64, 256, requires_grad=True))
        assert quant.read(weight).shape == (64, 256)
        setattr(weight, part, getattr(weight, part)[:0])
        with pytest.raises(ValueError, match=message):
            quant.read(weight)
    quantize = pytest.importorskip("hqq.core.quantize")
    settings = quantize.BaseQuantizeConfig(nbits=4, group_size=8, axis=1)
    for changes, message in (
        ({"scale": lambda scale: scale[:2]}, "scale has shape"),
        ({"zero": lambda zero: zero[:1]}, "zero has shape"),
        ({"group_size": lambda size: 16}, "scale has shape"),
        ({"axis": lambda axis: 2}, "axis 2"),
        ({"shape": lambda shape: None}, "not as its library builds it"),
    ):
        with torch.no_grad():
            layer = quantize.HQQLinear(nn.Linear(24, 20), settings, compute_dtype=torch.float32, device="cpu")
        quant.read(layer)
        for name, change in changes.items():
            layer.meta[name] = change(layer.meta[name])
        with pytest.raises(ValueError, match=message):
            quant.read(layer)


@ON_CPU
def test_fsdp_qlora_gives_a_reason():
    layers = [
        restated_layers.DORA(broken_linear4bit(**changes), torch.ones(64)) for changes in ({}, {"nested": lambda _: 0})
    ]
    report = dora_kernels.enable(nn.Sequential(*layers))
    assert [layer.taken_over for layer in report.layers] == [True, False]
    assert "absmax is torch.uint8; expected torch.float32" in report.layers[1].reason
