"""Every layer that is known by structure as a Case: restated from its formula, of random sizes."""

import torch
from torch import nn

import dora_kernels
from tests.support import restated_layers
from tests.support.conformance_checks import DEVICE, Case, randomise
from tests.support.restated_layers import DORA, DoRALinear, LinearLoRA, Llava, Llm, Parallel


def case(make, bias=True, **more):
    """A Case of one layer, made of an nn.Linear of random sizes, with an x of three dimensions."""

    def build(shapes, dtype):
        K, N = shapes.randrange(9, 40), shapes.randrange(9, 40)
        linear = nn.Linear(K, N, bias=bias).requires_grad_(False)
        layer = nn.Sequential(randomise(make(linear)).to(DEVICE, dtype))
        return layer, torch.randn(2, shapes.randrange(3, 9), K, device=DEVICE, dtype=dtype)

    return Case(build, **more)


def first(model, x):
    """y of a layer that returns its bias beside it."""
    return model(x)[0]


CASES = {
    "llm": case(Llm.Linear),
    "llm, dropout": case(lambda linear: Llm.Linear(linear, dropout=0.5)),
    "llm, norm_grad": case(lambda linear: Llm.Linear(linear, dora_simple=False), bias=False),
    "llm, magnitude alone": case(lambda linear: Llm.Linear(linear, Wdecompose=True, dropout=0.3)),
    "vl-t5 simple": case(restated_layers.DoraLinear_simple),
    "vl-t5": case(restated_layers.DoraLinear),
    "llava": case(lambda linear: Llava.Linear(linear, dropout=0.5)),
    "fsdp_qlora": case(lambda linear: DORA(linear, linear.weight.norm(dim=1))),
    "fsdp_qlora, no bias": case(lambda linear: DORA(linear, linear.weight.norm(dim=1)), bias=False),
    "megatron": case(lambda linear: DoRALinear(Parallel(linear), dropout=0.5), call=first),
    "megatron, layer norm": case(lambda linear: DoRALinear(restated_layers.LayerNormParallel(linear)), call=first),
    "megatron, added bias": case(lambda linear: DoRALinear(Parallel(linear, adds_bias=True), dropout=0.5), call=first),
    "automodel": case(LinearLoRA.patch),
    "automodel, post": case(lambda linear: LinearLoRA.patch(linear, dropout=0.5)),
    "automodel, pre": case(lambda linear: LinearLoRA.patch(linear, dropout=0.5, position="pre"), bias=False),
}


def only(layer):
    """What enable() says of `layer`, which it finds once."""
    (report,) = dora_kernels.enable(nn.Sequential(layer)).layers
    return report


def make(name, seed=0):
    """The layer of a case in train mode, as it is in its library, and an x."""
    model, x = CASES[name].make(seed)
    return model[0], x
