"""Every kind of layer, enabled, of one size or another: build() gives a model and an x, the same ones every time."""

import functools

import torch
from torch import nn

from dora_kernels import DoraLinear, DvoraLinear, VeraProjection
from tests.adapters import test_peft_conv, test_peft_embedding
from tests.extras import test_dvora_peft
from tests.support import quantized_problem
from tests.support.peft_problem import build, enabled
from tests.support.problem import DEVICE


def batch(features=24):
    return torch.randn(5, features, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def dora():
    torch.manual_seed(0)
    layer = DoraLinear(24, 20, rank=4, alpha=6.0, device=DEVICE)
    nn.init.normal_(layer.lora_B.weight)
    return layer, batch()


def dvora():
    """With small terms of the norm, kept through training."""
    torch.manual_seed(0)
    layer = DvoraLinear(48, 40, VeraProjection(48, 40, 6, device=DEVICE), device=DEVICE)
    nn.init.normal_(layer.vera_lambda_b)
    return layer, batch(48)


def conv():
    model, x = test_peft_conv.build()
    return enabled(model), x


def quantized(format):
    return enabled(quantized_problem.build(format, sizes=quantized_problem.ALIGNED)), batch(64)


KINDS = {
    "DoraLinear": dora,
    "DvoraLinear": dvora,
    "peft": lambda: (enabled(build()), batch()),
    "peft, Conv1D": lambda: (enabled(build(conv1d=True)), batch()),
    "peft, two adapters": lambda: (enabled(build(adapters=2)), batch()),
    "peft, convolution": conv,
    "peft, embedding": lambda: (enabled(test_peft_embedding.build()), torch.arange(13, device=DEVICE)),
    "peft, nf4": functools.partial(quantized, "nf4"),
    "peft, int8": functools.partial(quantized, "int8"),
    "peft, hqq": functools.partial(quantized, "hqq"),
    "to_dvora": lambda: (test_dvora_peft.dvora_model(), batch()),
}


@torch.no_grad()
def call(model, x):
    torch.manual_seed(1)
    return model(x)
