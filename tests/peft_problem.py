"""A small PEFT model with DoRA adapters, and what the PEFT tests do to it.

Adapters are randomised: on a fresh one B = 0 and gain = 1, where nearly every mistake is invisible.
"""

import copy

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

import dora_kernels
from dora_kernels import ops
from tests.problem import DEVICE


class Net(nn.Module):
    """Two layers for a DoRA adapter to sit on: with and without bias, no dimension a multiple of a block."""

    def __init__(self, conv1d: bool = False):
        super().__init__()
        self.up = Conv1D(40, 24) if conv1d else nn.Linear(24, 40)
        self.down = nn.Linear(40, 20, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def randomise(model, seed=0):
    """Give every adapter tensor a value with B != 0 and a gain far from 1, every bias one that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.3 * noise.tanh())
        elif "lora_" in name or name.endswith("bias"):
            parameter.data.copy_(0.3 * noise)


def build(dtype=torch.float32, conv1d=False, adapters=1, autocast_adapter_dtype=True, train_bias=False, **config):
    """A stock PEFT model in train mode, with `adapters` active DoRA adapters of different ranks."""
    torch.manual_seed(0)
    settings = {"use_dora": True, "target_modules": ["up", "down"], "r": 5, "lora_alpha": 7} | config
    casting = {"autocast_adapter_dtype": autocast_adapter_dtype}
    model = get_peft_model(Net(conv1d).to(DEVICE, dtype), LoraConfig(**settings), **casting)
    for i in range(1, adapters):  # the last one has no dropout: PEFT computes the two kinds differently
        dropout = 0.0 if i == adapters - 1 else settings.get("lora_dropout", 0.0)
        more = settings | {"r": 5 + 2 * i, "lora_dropout": dropout}
        model.add_adapter(["second", "third"][i - 1], LoraConfig(**more), **casting)
    if adapters > 1:
        model.base_model.set_adapter(["default", "second", "third"][:adapters])
    randomise(model)
    layers(model)[0].base_layer.bias.requires_grad_(train_bias)
    return model.train()


def layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def enabled(model):
    """A copy of `model`, taken over entirely."""
    model = copy.deepcopy(model)
    report = dora_kernels.enable(model)
    assert len(report.taken_over) == len(layers(model)) > 0, str(report)
    return model


def tensors(model, x, dy, *, autocast=None, call=None):
    """Output, gradient of x and gradients of the adapters and of the biases, by name."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast(DEVICE, dtype=autocast, enabled=autocast is not None):
        y = (model if call is None else call)(x)
    y.backward(dy.to(y.dtype))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "dx": x.grad} | gradients


def calls(op):
    """How often `op` ran, on whichever backend."""
    return sum(count for (name, _), count in ops.calls.items() if name == op)
