"""Small PEFT models with DoRA adapters (linear layers, convolutions, an embedding), and what the tests do to them.

Adapters are randomised: on a fresh one B = 0 and gain = 1, where nearly every mistake is invisible.
"""

import copy

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

import dora_kernels
from dora_kernels import ops
from dora_kernels.testing import compare
from tests.support.problem import DEVICE

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
TOKENS, WIDTH = 13, 10


class Net(nn.Module):
    """Two layers for a DoRA adapter to sit on: with and without bias, no dimension a multiple of a block."""

    def __init__(self, conv1d: bool = False, sizes: tuple[int, int, int] = (24, 40, 20)):
        super().__init__()
        narrow, wide, out = sizes
        self.up = Conv1D(wide, narrow) if conv1d else nn.Linear(narrow, wide)
        self.down = nn.Linear(wide, out, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class ConvNet(nn.Module):
    """A convolution as asked for and a pointwise one, with an activation that overwrites the first one's output."""

    def __init__(self, dims=2, **config):
        super().__init__()
        self.up = CONVOLUTIONS[dims - 1](6, 10, **({"kernel_size": 3} | config))
        self.down = CONVOLUTIONS[dims - 1](10, 4, 1, bias=False)
        self.act = nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: the output is scaled, and PEFT reads by how much from embed_scale."""

    def __init__(self, *args, scale, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

    def forward(self, x):
        return super().forward(x) * self.embed_scale.to(self.weight.dtype)


class Tokens(nn.Module):
    def __init__(self, scale=None, **config):
        super().__init__()
        self.up = ScaledEmbedding(TOKENS, WIDTH, scale=scale) if scale else nn.Embedding(TOKENS, WIDTH, **config)

    def forward(self, x):
        return self.up(x)


def randomise(model, seed=0):
    """Give every adapter tensor a value with B != 0 and a gain far from 1, every bias one that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.3 * noise.tanh())
        elif "lora_" in name or name.endswith("bias"):
            parameter.data.copy_(0.3 * noise)


def build(dtype=torch.float32, conv1d=False, train_bias=False, **config):
    """A stock PEFT model in train mode, with active DoRA adapters (see `adapt`)."""
    torch.manual_seed(0)
    model = adapt(Net(conv1d).to(DEVICE, dtype), **config)
    layers(model)[0].base_layer.bias.requires_grad_(train_bias)
    return model


def build_convolution(dims=2, dtype=torch.float32, last=False, config=None, **peft_config):
    """A stock PEFT model over ConvNet, and x."""
    torch.manual_seed(0)
    net = ConvNet(dims, **(config or {})).to(DEVICE, dtype)
    # PEFT views lora_A as a matrix, so that a model can be made channels-last before, but not after
    net = net.to(memory_format=LAST[dims]) if last else net
    x = torch.randn(2, 6, 5, 4, 3)[(..., *(0,) * (3 - dims))].to(DEVICE, dtype)
    x = x.contiguous(memory_format=LAST[dims]) if last else x.contiguous()
    return adapt(net, **({"r": 4} | peft_config)), x


def build_embedding(dtype=torch.float32, config=None, **peft_config):
    """A stock PEFT model over one embedding of TOKENS tokens."""
    torch.manual_seed(0)
    net = Tokens(**(config or {})).to(DEVICE, dtype)
    return adapt(net, **({"target_modules": ["up"]} | peft_config))


def adapt(net, adapters=1, autocast_adapter_dtype=True, **config):
    """`net` in PEFT, in train mode, with `adapters` active DoRA adapters of different ranks."""
    settings = {"use_dora": True, "target_modules": ["up", "down"], "r": 5, "lora_alpha": 7} | config
    casting = {"autocast_adapter_dtype": autocast_adapter_dtype}
    model = get_peft_model(net, LoraConfig(**settings), **casting)
    for i in range(1, adapters):  # the last one has no dropout: PEFT computes the two kinds differently
        dropout = 0.0 if i == adapters - 1 else settings.get("lora_dropout", 0.0)
        more = settings | {"r": 5 + 2 * i, "lora_dropout": dropout}
        model.add_adapter(["second", "third"][i - 1], LoraConfig(**more), **casting)
    if adapters > 1:
        model.base_model.set_adapter(["default", "second", "third"][:adapters])
    randomise(model)
    return model.train()


def layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


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


def exact_tensors(model, x, dy, *, autocast=None):
    """The same by stock PEFT in float64, with the dropout masks that `model` draws."""
    exact = copy.deepcopy(model).double()
    handles = []
    for layer, twin in zip(layers(model), layers(exact), strict=True):
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, nn.Dropout):
                twin.lora_dropout[name] = Replay()
                handles.append(dropout.register_forward_hook(twin.lora_dropout[name].record))
    tensors(model, x, dy, autocast=autocast)
    for handle in handles:
        handle.remove()
    return tensors(exact, x.double(), dy.double())


class Replay(nn.Module):
    """Applies the mask of another module's dropout: its derivative."""

    def record(self, module, inputs, output):
        (mask,) = torch.autograd.grad(output.sum(), inputs, retain_graph=True)  # output / input would be 0 / 0 at a 0
        self.mask = mask.double()

    def forward(self, x):
        return x * self.mask


def assert_as_good(ours, stock, exact):
    """Each tensor as close to exact as stock PEFT's, which passes through the output's dtype."""
    assert ours.keys() == stock.keys() == exact.keys()
    for name, value in ours.items():
        assert value.dtype == stock[name].dtype and value.shape == stock[name].shape, name
        comparison = compare(name, value, stock[name], exact[name], through=ours["y"].dtype)
        assert comparison.limit < 0.2, comparison  # zeros have an error of 1
        if value.dtype == torch.float64:  # where exact is stock, and has the rounding errors of its own sums
            assert comparison.error < 1e-14, comparison
        else:
            assert comparison.ok, comparison


def training_step(model, optimizer, x, target):
    loss = nn.functional.mse_loss(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
