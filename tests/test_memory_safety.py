"""Nothing reads past the end of what it was given: containers check their parts, and layers without elements are fine.

What could end a process runs in one of its own.
"""

import copy
import dataclasses
import itertools
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import dora_kernels
from dora_kernels import DoraLinear, launch, quant
from dora_kernels.dvora import DvoraLinear, VeraProjection
from dora_kernels.functional import dora_linear_core
from dora_kernels.reference import dora_linear_ref
from dora_kernels.serving import AdapterBank, bank_linear
from tests import structures
from tests.packed import KINDS, quantized
from tests.problem import BACKENDS, DEVICE, Problem, core

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


# Quantised weights.


def wrong_parts(tensor):
    """(what is wrong, another tensor in the place of one part)."""
    yield "is NoneType", None
    yield "has shape", torch.cat((tensor, tensor)) if tensor.dim() else tensor[None]
    yield "has shape", tensor[None]
    yield "is torch.int64", tensor.to(torch.int64)
    yield "is torch.float64", tensor.to(torch.float64)
    yield "on meta", tensor.to("meta")
    yield "is torch.sparse_coo", tensor.double().to_sparse()
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
            with launch.options(backend=backend):
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
        with launch.options(backend=backend):
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
        structures.DORA(broken_linear4bit(**changes), torch.ones(64)) for changes in ({}, {"nested": lambda _: 0})
    ]
    report = dora_kernels.enable(nn.Sequential(*layers))
    assert [layer.taken_over for layer in report.layers] == [True, False]
    assert "absmax is torch.uint8; expected torch.float32" in report.layers[1].reason


# Several adapters in one batch.


def a_bank():
    problems = [Problem.random(5, N, K, R, torch.float32, seed=R) for R in (3, 2, 3)]
    adapters = [(p.lora_A, p.lora_B, p.magnitude, 0.5) for p in problems]
    index = torch.tensor([0, 2, -1, 1, 7], device=DEVICE)
    return problems[0], AdapterBank.of(problems[0].weight, adapters), index


@pytest.mark.parametrize("name", ("lora_A", "lora_B", "gain", "scaling"))
def test_every_field_of_a_bank_is_looked_at(name):
    _, bank, _ = a_bank()
    tensor = getattr(bank, name)
    wrong = [None, 3, tensor[:1], tensor[:0], torch.cat((tensor, tensor)), tensor[None], tensor.flatten()[0]]
    wrong += [tensor.bfloat16(), tensor.double(), tensor.long(), tensor.to_sparse()]
    wrong += [tensor.to("meta")] if DEVICE == "cpu" else []
    for value in wrong:
        with pytest.raises(ValueError, match="AdapterBank: "):
            dataclasses.replace(bank, **{name: value})
    empty = {field.name: getattr(bank, field.name)[:0] for field in dataclasses.fields(bank)}
    with pytest.raises(ValueError, match="at least one adapter"):
        AdapterBank(**empty)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("lora_A", "lora_B", "gain", "scaling", "index"))
def test_a_bank_of_other_strides_computes_the_same(name, backend):
    problem, bank, index = a_bank()
    with launch.options(backend=backend):
        expected = bank_linear(problem.x, problem.weight, bank, index)
        if name == "index":  # a column of a table
            index = torch.stack((index, index.flip(0)), 1)[:, 0]
        else:
            tensor = getattr(bank, name)
            strided = tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor.repeat_interleave(2)[::2]
            assert not strided.is_contiguous()
            bank = dataclasses.replace(bank, **{name: strided})
        for other in (bank, copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
            torch.testing.assert_close(bank_linear(problem.x, problem.weight, other, index), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("lora_A", "lora_B", "gain", "scaling"))
def test_a_bank_that_has_other_strides_since(name, backend):
    """Views into memory that is smaller than what their shape makes of it, and into larger, through .data."""
    for view in (lambda tensor: tensor[:1].expand_as(tensor), lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2]):
        problem, bank, index = a_bank()
        changed = view(torch.rand_like(getattr(bank, name)))
        expected = dataclasses.replace(bank, **{name: changed.contiguous()})
        getattr(bank, name).data = changed
        assert not getattr(bank, name).is_contiguous()
        with launch.options(backend=backend):
            y, expected = (bank_linear(problem.x, problem.weight, one, index) for one in (bank, expected))
        torch.testing.assert_close(y, expected)


def test_a_bank_that_was_changed_since_or_is_of_another_dtype():
    problem, bank, index = a_bank()
    with pytest.raises(ValueError, match=r"bank_linear: bank.gain is torch.float32 but weight is torch.float64"):
        bank_linear(problem.x.double(), problem.weight.double(), bank, index)
    with pytest.raises(ValueError, match="bank_linear: a gradient is wanted"):
        other = dataclasses.replace(bank, gain=bank.gain.clone().requires_grad_())
        bank_linear(problem.x, problem.weight, other, index)
    bank.gain.data = bank.gain[:1]
    with pytest.raises(ValueError, match=r"AdapterBank: gain has shape \(1, 16\)"):
        bank_linear(problem.x, problem.weight, bank, index)


def test_what_is_no_bank():
    problem, bank, index = a_bank()
    packed = quantized("int8", N, K)
    adapter = (problem.lora_A, problem.lora_B, problem.magnitude, 1.0)
    for weight in (None, packed, [1.0], "weight"):
        with pytest.raises(ValueError, match="bank_linear: weight is"):
            bank_linear(problem.x, weight, bank, index)
        with pytest.raises(ValueError, match="AdapterBank.of: weight is"):
            AdapterBank.of(weight, [adapter])
    for wrong in (None, 3, [3], [adapter[:2]], [(*adapter, 1)], problem.weight, [None]):
        with pytest.raises(ValueError, match="AdapterBank.of: adapters? "):
            AdapterBank.of(problem.weight, wrong)
    for wrong in (None, [0] * 5, 3, index.to_sparse()):
        with pytest.raises(ValueError, match="bank_linear: index is"):
            bank_linear(problem.x, problem.weight, bank, wrong)


# What a call is given that another one has made.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("norm", "gain", "merged", "low"))
def test_what_is_given_must_fit(name, backend):
    problem = Problem.random(5, N, K, 3, torch.float32)
    arguments = {key: value for key, value in vars(problem).items() if key not in ("dy", "x_dropped")}
    norm = dora_kernels.weight_norm(problem.weight, problem.lora_A, problem.lora_B, problem.scaling)
    made = {"norm": norm, "gain": problem.magnitude / norm, "low": problem.x @ problem.lora_A.T}
    made["merged"] = made["gain"][:, None] * (problem.weight + problem.scaling * problem.lora_B @ problem.lora_A)
    together = {
        "norm": [("norm",), ("norm", "gain"), ("norm", "merged"), ("norm", "gain", "merged")],
        "gain": [("norm", "gain"), ("norm", "gain", "merged")],
        "merged": [("merged",), ("norm", "merged"), ("norm", "gain", "merged")],
        "low": [("low",), ("low", "norm", "gain", "merged")],
    }
    tensor = made[name]
    wrong = [3, tensor[:1], tensor[None], tensor.to(torch.int8), tensor.to_sparse()]
    wrong += [] if name == "norm" else [tensor.bfloat16()]
    for names in together[name]:
        given = {key: made[key] for key in names}
        with launch.options(backend=backend):
            torch.testing.assert_close(core(**arguments, **given), dora_linear_ref(**arguments))
            for value in wrong:
                with pytest.raises(ValueError, match=f"dora_linear: {name} "):
                    dora_linear_core(**arguments, **given | {name: value})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", ("lora_A", "lora_B", "lora_magnitude_vector", "scaling"))
def test_a_scope_looks_at_every_layer_before_the_one_launch(part, backend):
    """The first layer's call makes the norms of all: those of one whose parts do not fit are its own call's affair."""
    model = nn.Sequential(DoraLinear(K, N, 3, 1.0, device=DEVICE), DoraLinear(N, K, 3, 1.0, device=DEVICE))
    x = torch.ones(2, K, device=DEVICE)
    first, second = model
    expected = first(x)
    if part == "scaling":
        second.scaling = 1e39
    elif part == "lora_magnitude_vector":
        second.lora_magnitude_vector = nn.Parameter(second.lora_magnitude_vector[:2].detach())
    else:
        getattr(second, part).weight = nn.Parameter(getattr(second, part).weight[:, :2].detach().contiguous())
    with launch.options(backend=backend), dora_kernels.frozen_adapters(model):
        torch.testing.assert_close(first(x), expected)
        with pytest.raises(ValueError, match="DoraLinear: "):
            second(expected)


def test_packed_factors_are_refused():
    """A QuantizedWeight stands for the weight alone."""
    problem = Problem.random(5, N, K, 3, torch.float32)
    arguments = {key: value for key, value in vars(problem).items() if key not in ("dy", "x_dropped")}
    for name, packed in (("lora_A", quantized("int8", 3, K)), ("lora_B", quantized("int8", N, 3))):
        with pytest.raises(ValueError, match=f"dora_linear: {name} is QuantizedWeight"):
            dora_kernels.dora_linear(**arguments | {name: packed})


# Constructors.


def weight_normed(linear):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(linear)


def linear_with(**parts):
    linear = nn.Linear(K, N)
    for name, value in parts.items():
        setattr(linear, name, value)
    return linear


@pytest.mark.parametrize("cls", (DoraLinear, DvoraLinear))
def test_layers_over_what_is_no_plain_linear(cls):
    arguments = (3, 1.0) if cls is DoraLinear else (VeraProjection(K, N, 3),)
    for linear, message in (
        (linear_with(bias=nn.Parameter(torch.zeros(N + 1))), "bias has shape"),
        (linear_with(bias=nn.Parameter(torch.zeros(N, device="meta"))), "bias is on meta"),
        (linear_with(bias=nn.Parameter(torch.zeros(N, dtype=torch.complex64))), "bias is torch.complex64"),
        (linear_with(weight=nn.Parameter(torch.zeros(N, K, 1))), "weight has shape"),
        (weight_normed(nn.Linear(K, N)), "weight is Tensor; expected the layer's own nn.Parameter"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(K, N)), "linear is ParametrizedLinear"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(K, N)), "linear is ParametrizedLinear"),
        (pruned(nn.Linear(K, N)), "weight is Tensor"),
        (nn.LazyLinear(N), "linear is LazyLinear"),
    ):
        with pytest.raises(ValueError, match=rf"{cls.__name__}.from_linear: {message}"):
            cls.from_linear(linear, *arguments)
        assert linear.training and (nn.parameter.is_lazy(linear.weight) or linear.weight.requires_grad)


def pruned(linear):
    from torch.nn.utils import prune

    return prune.l1_unstructured(linear, "weight", 3)


def test_constructors_of_dvora():
    projection = VeraProjection(K, N, 3)
    fine = {"in_features": K, "out_features": N, "projection": projection}
    DvoraLinear(**fine)
    for changes in (
        *({name: value} for name in ("in_features", "out_features") for value in (-3, "x", 2.5, None, True, 2**63)),
        *({"bias": value} for value in ("no", None, 1)),
        *({name: value} for name in ("dtype", "adapter_dtype") for value in (torch.int8, "float32", 32)),
        *({"device": value} for value in ("nowhere", 2.5, [0])),
        *({"d_initial": value} for value in (1e39, -1e39, float("inf"), "1", None)),
        {"d_initial": 1e5, "dtype": torch.float16, "adapter_dtype": torch.float16},
    ):
        with pytest.raises(ValueError, match=f"DvoraLinear: ({next(iter(changes))} is|a matrix would be)"):
            DvoraLinear(**fine | changes)
    assert DvoraLinear(**fine | {"d_initial": 1e300, "dtype": torch.float64}).vera_lambda_d.min() == 1e300
    for changes in (
        *({"dtype": value} for value in (torch.int8, "float32", torch.complex64)),
        *({"seed": value} for value in (1.5, None, "0", True, 2**64, -(2**63) - 1)),
        *({"save": value} for value in (-3.5, None, 1, "no")),
        *({"device": value} for value in ("nowhere", 2.5)),
        *({"rank": value} for value in (0, -1, 2.0, 2**63)),
    ):
        arguments = {"max_in_features": K, "max_out_features": N, "rank": 3} | changes
        with pytest.raises(ValueError, match=f"VeraProjection: ({next(iter(changes))} is|a matrix would be)"):
            VeraProjection(**arguments)
    for sizes in ((-1, N), (K, -1), (2.5, N), (K + 1, N), (None, N)):
        with pytest.raises(ValueError, match="VeraProjection: "):
            projection.of(*sizes)
    for sizes in ((2**63, 1, 1), (1, 2**63, 1), (1, 1, 2**63), (2**31, 2**31, 1)):
        with pytest.raises(ValueError, match="DoraLinear: a matrix would be"):
            DoraLinear(*sizes, 1.0)


# A process that must not end, and what a stranger may put in.


def in_a_process(*arguments):
    """stdout of `python -m ...`; its last words where it ends otherwise than by 0."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    last = "\n".join(done.stderr.splitlines()[-15:])
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}\n{done.stdout[-4000:]}\n{last}"
    return done.stdout


@ON_CPU
def test_layers_without_elements_end_no_process():
    assert "ok" in in_a_process("tests.empty_layers", "some")


@ON_CPU
@pytest.mark.nightly
def test_all_layers_without_elements():
    assert "ok" in in_a_process("tests.empty_layers", "all")


@ON_CPU
def test_wrong_parts_end_in_a_value_error():
    assert "ok: " in in_a_process("tests.fuzz_containers", 0, 300)


@ON_CPU
@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 5))
def test_thousands_of_wrong_parts(seed):
    assert "ok: " in in_a_process("tests.fuzz_containers", seed, 3000)
