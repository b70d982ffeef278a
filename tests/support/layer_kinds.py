"""One small layer of every kind, each with an x: for what has to hold of all of them alike.

STOCK: the libraries' layers that enable() takes over, in any dtype; `pair` gives one as it is and enabled.
ENABLED: layers that compute by our operators, whosever they are, in float32: what keeps and what traces is the same for
    a library's layer and for DoraLinear. Of STOCK one for each way that our code takes, and what has no stock layer.
"""

import copy
import functools

import pytest
import torch
from torch import nn

import dora_kernels
from dora_kernels.adapters.taking import TakenOver
from tests.support.conformance_checks import randomise
from tests.support.problem import DEVICE

pytest.importorskip("peft")

from peft import LoraConfig, VeraConfig, get_peft_model  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from dora_kernels import DoraLinear, DvoraLinear, VeraProjection  # noqa: E402
from tests.support import library_layers, peft_problem, quantized_problem, structure_cases, vera_problem  # noqa: E402


def peft(make, *shape, adapters=1, tokens=0, **config):
    """PEFT's layer over make(), which is called with an x of that shape, or with so many kinds of tokens."""

    def build(dtype):
        settings = {"use_dora": True, "r": 2, "lora_alpha": 3, "target_modules": ["0"]} | config
        model = get_peft_model(nn.Sequential(make()).to(DEVICE, dtype), LoraConfig(**settings))
        if adapters > 1:
            model.add_adapter("second", LoraConfig(**settings | {"r": 3}))
            model.base_model.set_adapter(["default", "second"])
        x = torch.randint(tokens, shape, device=DEVICE) if tokens else torch.randn(shape, device=DEVICE, dtype=dtype)
        return model.base_model.model, x

    return build


def structure(name):
    def build(dtype):
        model, x = structure_cases.CASES[name].make(len(name), dtype)
        return model if "megatron" not in name else nn.Sequential(model, First()), x

    return build


class First(nn.Module):
    """What Megatron-Bridge's layer returns, without the bias beside it."""

    def forward(self, returned):
        return returned[0]


def torchtune(**arguments):
    def build(dtype):
        layer = library_layers.torchtune_layer(6, 8, 2, dtype, **arguments)
        return nn.Sequential(layer), torch.randn(2, 3, 8, dtype=dtype)

    return build


def lycoris(make, *shape, **arguments):
    def build(dtype):
        pytest.importorskip("lycoris")
        return library_layers.Wrapped(make(), dtype, lora_dim=2, **arguments), torch.randn(shape, dtype=dtype)

    return build


STOCK = {
    "peft": peft(lambda: nn.Linear(8, 6), 2, 3, 8),
    "peft, two adapters": peft(lambda: nn.Linear(8, 6), 3, 8, adapters=2),
    "peft, GPT-2": peft(lambda: Conv1D(6, 8), 3, 8, fan_in_fan_out=True),
    "peft, conv1d": peft(lambda: nn.Conv1d(4, 6, 3, padding=1), 2, 4, 5),
    "peft, conv2d": peft(lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), 2, 4, 5, 5),
    "peft, conv2d in groups": peft(lambda: nn.Conv2d(4, 6, 3, groups=2), 2, 4, 5, 5),
    "peft, conv2d 1x1": peft(lambda: nn.Conv2d(4, 6, 1), 2, 4, 1, 1),  # an x that is channels-last, too
    "peft, conv3d": peft(lambda: nn.Conv3d(4, 6, 2), 2, 4, 3, 3, 3),
    "peft, embedding": peft(lambda: nn.Embedding(9, 6), 2, 4, tokens=9),
    "torchtune": torchtune(),
    "torchtune, bias": torchtune(use_bias=True),
    "lycoris": lycoris(lambda: nn.Linear(8, 6), 2, 3, 8),
    "lycoris, conv2d": lycoris(lambda: nn.Conv2d(4, 6, 3), 2, 4, 5, 5),
    "lycoris, input axis": lycoris(lambda: nn.Linear(8, 6), 2, 3, 8, wd_on_out=False),
    **{name: structure(name) for name in structure_cases.CASES if "dropout" not in name},
}
"""name -> build(dtype): a stock model and an x."""

# not bitsandbytes' int8: on a CPU the second call of a stock layer whose first was hooked fails
QUANTIZED = {name: functools.partial(quantized_problem.build, name) for name in ("nf4", "hqq", "torchao int8")}


def pair(name, dtype=torch.float64):
    """(stock model in train mode, the same enabled, x). Nothing drops: masks would differ from call to call."""
    torch.manual_seed(len(name))
    stock, x = STOCK[name](dtype) if name in STOCK else (QUANTIZED[name](), torch.randn(3, 24, device=DEVICE))
    stock = randomise(stock).train()
    for module in stock.modules():
        for probability in ("p", "dropout_p"):
            if isinstance(getattr(module, probability, None), float):
                setattr(module, probability, 0.0)
    ours = copy.deepcopy(stock)
    report = dora_kernels.enable(ours)
    assert len(report.taken_over) == len(report) > 0, str(report)
    return stock, ours, x.to(DEVICE)


def taken_over(model):
    """The first layer of `model` that is ours."""
    return next(module for module in model.modules() if isinstance(module, TakenOver))


def leaves(value):
    """The tensors of a result, in order."""
    return torch.utils._pytree.tree_leaves(value)


def assert_same(actual, expected):
    """In float64 to 1e-9 of the largest number, in float32 (quantized weights have no other) to 1e-5."""
    actual, expected = leaves(actual), leaves(expected)
    assert len(actual) == len(expected) > 0
    for ours, stock in zip(actual, expected, strict=True):
        tolerance = 1e-9 if stock.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(ours, stock, rtol=tolerance, atol=tolerance * stock.abs().max().item())


def some(names, *every_run):
    """The names, of which those not among every_run are for the night."""
    return [pytest.param(name, marks=() if name in every_run else pytest.mark.nightly) for name in names]


def y_and_gradients(model, x):
    """y, and what autograd gives of it for x and every trained parameter."""
    inputs = [p for _, p in model.named_parameters() if p.requires_grad]
    y = model(x)
    return y.detach(), torch.autograd.grad(y.pow(2).sum(), inputs)


def lora_dropout(name):
    """A model enabled with dropout="lora" that drops, and an x."""
    if name == "llm":
        model, x = structure_cases.CASES["llm, dropout"].make(0, torch.float64)
    else:
        make = (lambda: nn.Linear(8, 6)) if name == "peft" else (lambda: nn.Conv1d(4, 6, 1))
        model, x = peft(make, *((3, 8) if name == "peft" else (2, 4, 5)), lora_dropout=0.5)(torch.float64)
    dora_kernels.enable(model.train(), dropout="lora")
    return model, x


def dvora():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"])).double()
    return dora_kernels.to_dvora(model).base_model.model, torch.randn(3, 8, dtype=torch.float64)


def batch(features=24):
    return torch.randn(5, features, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def dora_linear():
    torch.manual_seed(0)
    layer = DoraLinear(24, 20, rank=4, alpha=6.0, device=DEVICE)
    nn.init.normal_(layer.lora_B.weight)
    return layer, batch()


def dvora_linear():
    """With small terms of the norm, kept through training."""
    torch.manual_seed(0)
    layer = DvoraLinear(48, 40, VeraProjection(48, 40, 6, device=DEVICE), device=DEVICE)
    nn.init.normal_(layer.vera_lambda_b)
    return layer, batch(48)


def quantized(format):
    model = quantized_problem.build(format, sizes=quantized_problem.ALIGNED)
    return peft_problem.enabled(model), batch(64)


def of_stock(name):
    return lambda: pair(name, torch.float32)[1:]


ENABLED = {
    "DoraLinear": dora_linear,
    "DvoraLinear": dvora_linear,
    "peft": of_stock("peft"),
    "peft, GPT-2": of_stock("peft, GPT-2"),
    "peft, two adapters": of_stock("peft, two adapters"),
    "peft, conv2d": of_stock("peft, conv2d"),
    "peft, embedding": of_stock("peft, embedding"),
    "peft, nf4": functools.partial(quantized, "nf4"),
    "peft, int8": functools.partial(quantized, "int8"),
    "peft, hqq": functools.partial(quantized, "hqq"),
    "to_dvora": lambda: (vera_problem.dvora_model(), batch()),
}
"""name -> build(): a model and an x, the same ones every time."""


@torch.no_grad()
def seeded(model, x):
    """y with the same draw of masks every time."""
    torch.manual_seed(1)
    return model(x)
