"""Layers known by structure: each restated layer (structures.py) is taken over, and what only looks like one is not."""

import pytest
import torch
from torch import nn

from tests import structures
from tests.conformance import CHECKS, DEVICE, Case, randomise
from tests.structures import DORA, DoRALinear, LinearLoRA, Llava, Llm, Parallel


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
    "vl-t5 simple": case(structures.DoraLinear_simple),
    "vl-t5": case(structures.DoraLinear),
    "llava": case(lambda linear: Llava.Linear(linear, dropout=0.5)),
    "fsdp_qlora": case(lambda linear: DORA(linear, linear.weight.norm(dim=1))),
    "fsdp_qlora, no bias": case(lambda linear: DORA(linear, linear.weight.norm(dim=1)), bias=False),
    "megatron": case(lambda linear: DoRALinear(Parallel(linear), dropout=0.5), call=first),
    "megatron, layer norm": case(lambda linear: DoRALinear(structures.LayerNormParallel(linear)), call=first),
    "megatron, added bias": case(lambda linear: DoRALinear(Parallel(linear, adds_bias=True), dropout=0.5), call=first),
    "automodel": case(LinearLoRA.patch),
    "automodel, post": case(lambda linear: LinearLoRA.patch(linear, dropout=0.5)),
    "automodel, pre": case(lambda linear: LinearLoRA.patch(linear, dropout=0.5, position="pre"), bias=False),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_conformance(name, check):
    CHECKS[check](CASES[name], "reference", seed=len(name))


@pytest.mark.parametrize("name", CASES)
def test_conformance_with_the_kernels(name):
    CHECKS["parity"](CASES[name], "triton", seed=len(name))
