"""The DoRA layers of the libraries on PyPI beside PEFT, each library's own class: see conformance.py."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

pytest.importorskip("lycoris")

from lycoris.modules.locon import LoConModule

from tests import conformance
from tests.conformance import CHECKS, DEVICE, Case, randomise
from tests.libraries import import_dora_linear
from tests.problem import BACKENDS

DoRALinear = import_dora_linear()


def torchtune(shapes, dtype, *, quantize_base=False, **arguments):
    """A DoRALinear as torchtune trains it: base frozen, magnitude from the weights."""
    N, K = (128, 256) if quantize_base else (shapes.randint(5, 40), shapes.randint(5, 40))
    with torch.device(DEVICE):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # as torchtune builds its models
        try:
            layer = DoRALinear(K, N, shapes.randint(1, 7), 5.0, quantize_base=quantize_base, **arguments)
        finally:
            torch.set_default_dtype(default)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in layer.adapter_params())
    layer.lora_b.weight.data.copy_(0.1 * torch.randn_like(layer.lora_b.weight))
    layer.initialize_dora_magnitude()
    x = torch.randn(3, shapes.randint(2, 9), K, device=DEVICE, dtype=dtype)
    return randomise(layer), x


def in_float64(layer):
    """A copy, dense: torchao's NF4 has no float64."""
    dense = copy.deepcopy(layer)
    if layer._quantize_base:
        dense.weight = nn.Parameter(layer.weight.get_original_weight(), requires_grad=False)
        dense._quantize_base = False
    return dense.double()


def torchtune_case(**arguments):
    return Case(lambda shapes, dtype: torchtune(shapes, dtype, **arguments), exact=in_float64)


class Wrapped(nn.Module):
    """A layer and the LoConModule over it, as a training script has them: one call, two modules."""

    def __init__(self, layer, **arguments):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.adapter = LoConModule("adapter", layer, **arguments)
        self.adapter.apply_to()
        self.eps = None

    def forward(self, x):
        with mock.patch.object(torch, "finfo", self.finfo if self.eps else torch.finfo):
            return self.layer(x)

    def finfo(self, dtype):
        return mock.Mock(eps=self.eps)

    def in_float64(self):
        """The same layer exactly: the eps that LyCORIS adds to a norm is that of dora_scale's dtype."""
        exact = copy.deepcopy(self).double()
        exact.eps = torch.finfo(self.adapter.dora_scale.dtype).eps
        return exact


def lycoris_linear(shapes):
    return nn.Linear(shapes.randint(5, 40), shapes.randint(5, 40), bias=shapes.random() < 0.5), (3,)


def lycoris_conv(dimensions):
    def draw(shapes):
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        size, stride, padding, dilation = (shapes.randint(1, 3) for _ in range(4))
        layer = conv(
            shapes.randint(3, 9),
            shapes.randint(3, 9),
            size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            bias=shapes.random() < 0.5,
        )
        return layer, tuple(shapes.randint(5, 7) for _ in range(dimensions))

    return draw


def lycoris_case(draw=lycoris_linear, multiplier=1.0, **arguments):
    def build(shapes, dtype):
        layer, sizes = draw(shapes)
        settings = {"weight_decompose": True, "lora_dim": shapes.randint(1, 5), "alpha": 3.0} | arguments
        model = Wrapped(layer, multiplier=multiplier, **settings).to(DEVICE, dtype)
        model.adapter.lora_up.weight.data.copy_(0.3 * torch.randn_like(model.adapter.lora_up.weight))
        if isinstance(layer, nn.Linear):
            x = torch.randn(*sizes, layer.in_features)
        else:
            x = torch.randn(2, layer.in_channels, *sizes)
        return randomise(model), x.to(DEVICE, dtype)

    return Case(build, exact=Wrapped.in_float64)


CASES = {
    "lycoris": lycoris_case(),
    "lycoris, input axis": lycoris_case(wd_on_out=False),
    "lycoris, multiplier, scalar": lycoris_case(multiplier=0.7, use_scalar=True, rs_lora=True),
    "lycoris, input axis, multiplier": lycoris_case(multiplier=1.3, wd_on_out=False),
    "lycoris, rank dropout": lycoris_case(rank_dropout=0.3, rank_dropout_scale=True, dropout=0.5),
    "lycoris, conv1d": lycoris_case(lycoris_conv(1)),
    "lycoris, conv2d": lycoris_case(lycoris_conv(2), multiplier=0.7, rank_dropout=0.2),
    "lycoris, conv3d": lycoris_case(lycoris_conv(3)),
    "lycoris, conv2d, input axis": lycoris_case(lycoris_conv(2), wd_on_out=False),
    "torchtune": torchtune_case(),
    "torchtune, bias": torchtune_case(use_bias=True),
    "torchtune, dropout": torchtune_case(dropout=0.5),
    "torchtune, bias, dropout": torchtune_case(use_bias=True, dropout=0.3),
    "torchtune, NF4": torchtune_case(quantize_base=True),
    "torchtune, NF4, bias, dropout": torchtune_case(quantize_base=True, use_bias=True, dropout=0.3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES)
def test_conforms(case, check, backend):
    CHECKS[check](CASES[case], backend, seed=len(case) + len(check))


def test_the_checks_see_a_wrong_scaling():
    case = CASES["torchtune"]
    model, x = case.make(0)
    stock, exact = conformance.tensors(case, model, x), conformance.tensors(case, case.exact(model), x.double())
    model.scaling *= 1.001
    with pytest.raises(AssertionError):
        conformance.assert_as_good(conformance.tensors(case, model, x), stock, exact)
