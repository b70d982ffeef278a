"""Nothing reads past the end of what it was given: containers check their parts, and layers without elements are fine.

What could end a process runs in one of its own.
"""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import dora_kernels
from dora_kernels import DoraLinear, options
from dora_kernels.extras.dvora import DvoraLinear, VeraProjection
from dora_kernels.extras.serving import AdapterBank, bank_linear
from dora_kernels.reference import dora_linear_ref
from tests.support.packed_weights import quantized
from tests.support.problem import BACKENDS, DEVICE, Problem, core

ON_CPU = pytest.mark.skipif(DEVICE == "cuda", reason="the tensors are made on the CPU")
N, K = 16, 24


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
    with options(backend=backend):
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
        with options(backend=backend):
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
        with options(backend=backend):
            torch.testing.assert_close(core(**arguments, **given), dora_linear_ref(**arguments))
            for value in wrong:
                with pytest.raises(ValueError, match=f"dora_linear: {name} "):
                    core(**arguments, **given | {name: value})


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
    with options(backend=backend), dora_kernels.frozen_adapters(model):
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
        with pytest.raises(ValueError, match="VeraProjection.of: in_features is "):
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
    assert "ok" in in_a_process("tests.support.empty_layers", "some")


@ON_CPU
@pytest.mark.nightly
def test_all_layers_without_elements():
    assert "ok" in in_a_process("tests.support.empty_layers", "all")


@ON_CPU
def test_wrong_parts_end_in_a_value_error():
    assert "ok: " in in_a_process("tests.support.container_fuzzer", 0, 300)


@ON_CPU
@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 5))
def test_thousands_of_wrong_parts(seed):
    assert "ok: " in in_a_process("tests.support.container_fuzzer", seed, 3000)
