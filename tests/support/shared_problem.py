"""A PEFT model of layers that read the same x, and how often its product with lora_A was shared."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import dora_kernels
from tests.support.peft_problem import adapt, calls, enabled
from tests.support.problem import DEVICE

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WIDTHS = {"q_proj": 20, "k_proj": 12, "v_proj": 28}


class Attention(nn.Module):
    """q, k and v of x (M, 24), side by side; k and v of `other` where there is one."""

    other = None

    def __init__(self):
        super().__init__()
        for name, width in WIDTHS.items():
            self.add_module(name, nn.Linear(24, width, bias=name == "q_proj"))

    def forward(self, x):
        other = x if self.other is None else self.other
        return torch.cat([self.q_proj(x), self.k_proj(other), self.v_proj(other)], -1)


def attention(dtype=torch.float32, net=Attention, **config):
    """A stock PEFT model in train mode, its ranks from 3 to 5."""
    torch.manual_seed(0)
    settings = {"target_modules": list(WIDTHS), "rank_pattern": {"k_proj": 3, "v_proj": 4}} | config
    return adapt(net().to(DEVICE, dtype), **settings)


def shared(model):
    """`model` itself, enabled with fuse_shared_inputs; at least one group has to be there."""
    report = dora_kernels.enable(model, fuse_shared_inputs=True)
    assert any(layer.shares_with for layer in report.layers), str(report)
    return model


def batch(dtype=torch.float32, shape=(7, 24), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(*shape[:-1], width, generator=generator) for width in (shape[-1], sum(WIDTHS.values())))
    return x.to(DEVICE, dtype), dy.to(DEVICE, dtype)


@contextlib.contextmanager
def products(forward, backward):
    """Fails unless that many shared products were made in the two passes."""
    names = ("shared_low", "shared_low_backward")
    before = [calls(name) for name in names]
    yield
    assert [calls(name) - count for name, count in zip(names, before, strict=True)] == [forward, backward]


@pytest.fixture
def pair():
    """A model enabled without and with fuse_shared_inputs."""
    model = enabled(attention())
    return model, shared(copy.deepcopy(model))


def net_of(model):
    return model.base_model.model
