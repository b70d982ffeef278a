"""The DoRA layers of the libraries on PyPI, each library's own class: see conformance_checks.py."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.support.conformance_checks import CHECKS, DEVICE, Case, assert_as_good, randomise, tensors
from tests.support.library_layers import Wrapped, import_dora_linear, torchtune_in_float64, torchtune_layer
from tests.support.problem import BACKENDS

pytest.importorskip("lycoris")
pytest.importorskip("peft")
import_dora_linear()

from tests.support import peft_problem  # noqa: E402


def peft(adapters=1, conv1d=False, **config):
    """Two layers, with so many active adapters; over GPT-2's Conv1D too."""

    def build(shapes, dtype):
        sizes = tuple(shapes.randint(9, 30) for _ in range(3))
        model = peft_problem.adapt(
            peft_problem.Net(conv1d, sizes).requires_grad_(False).to(DEVICE, dtype), adapters, r=4, **config
        )
        return randomise(model), torch.randn(2, shapes.randint(2, 9), sizes[0], device=DEVICE, dtype=dtype)

    return Case(build)


def torchtune(quantize_base=False, **arguments):
    def build(shapes, dtype):
        # torchao's NF4 takes multiples of 16384 elements
        N, K = (64, 256) if quantize_base else (shapes.randint(5, 30), shapes.randint(5, 30))
        layer = torchtune_layer(N, K, shapes.randint(1, 7), dtype, quantize_base=quantize_base, **arguments)
        return layer, torch.randn(2, shapes.randint(2, 9), K, device=DEVICE, dtype=dtype)

    return Case(build, exact=torchtune_in_float64)


def lycoris(dimensions=0, **arguments):
    """Over nn.Linear, or over a convolution of so many dimensions."""

    def build(shapes, dtype):
        inputs, outputs, bias = shapes.randint(3, 24), shapes.randint(5, 24), shapes.random() < 0.5
        if dimensions:
            conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
            size, *geometry = (shapes.randint(1, 3) for _ in range(4))  # stride, padding, dilation
            layer = conv(inputs, outputs, size, *geometry, bias=bias)
            x = torch.randn(2, inputs, *(shapes.randint(5, 7) for _ in range(dimensions)))
        else:
            layer, x = nn.Linear(inputs, outputs, bias), torch.randn(2, shapes.randint(2, 9), inputs)
        model = Wrapped(layer, dtype, **{"lora_dim": shapes.randint(1, 5)} | arguments)
        return model, x.to(DEVICE, dtype)

    return Case(build, exact=Wrapped.in_float64)


CASES = {
    "peft": peft(),
    "peft, Conv1D": peft(conv1d=True),
    "peft, dropout": peft(lora_dropout=0.5),
    "peft, two adapters": peft(2),
    "torchtune": torchtune(),
    "torchtune, bias": torchtune(use_bias=True),
    "torchtune, dropout": torchtune(dropout=0.5),
    "torchtune, bias, dropout": torchtune(use_bias=True, dropout=0.3),
    "torchtune, NF4": torchtune(quantize_base=True),
    "torchtune, NF4, bias, dropout": torchtune(quantize_base=True, use_bias=True, dropout=0.3),
    "lycoris": lycoris(),
    "lycoris, input axis": lycoris(wd_on_out=False),
    "lycoris, multiplier, scalar": lycoris(multiplier=0.7, use_scalar=True, rs_lora=True),
    "lycoris, input axis, multiplier": lycoris(multiplier=1.3, wd_on_out=False),
    "lycoris, rank dropout": lycoris(rank_dropout=0.3, rank_dropout_scale=True, dropout=0.5),
    "lycoris, conv1d": lycoris(1),
    "lycoris, conv2d": lycoris(2, multiplier=0.7, rank_dropout=0.2),
    "lycoris, conv3d": lycoris(3),
    "lycoris, conv2d, input axis": lycoris(2, wd_on_out=False),
}


# without a GPU the kernels run in an interpreter, which is slow: parity only, and NF4's decoding has tests of its own
INTERPRETED = BACKENDS[1] if DEVICE == "cpu" else None
COMBINATIONS = [
    (case, check, backend)
    for case in CASES
    for check in CHECKS
    for backend in BACKENDS
    if backend != INTERPRETED or (check == "parity" and "NF4" not in case)
]


@pytest.mark.parametrize("case, check, backend", COMBINATIONS)
def test_conforms(case, check, backend):
    chosen = CASES[case]
    if backend == INTERPRETED:
        chosen = dataclasses.replace(chosen, dtypes=(torch.float32,))
    CHECKS[check](chosen, backend, seed=len(case) + len(check))


@pytest.mark.parametrize("case", ["torchtune", "lycoris"])
def test_the_checks_see_an_error_of_one_in_a_thousand(case):
    case = CASES[case]
    model, x = case.make(0)
    stock, exact = tensors(case, model, x), tensors(case, case.exact(model), x.double())
    for name in stock:
        with pytest.raises(AssertionError):
            assert_as_good(stock | {name: stock[name] * 1.001}, stock, exact)
