"""torch.export for inference: the operators are in the exported program, M stays free, and the bits are eager's."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dora_kernels
from dora_kernels import DoraLinear, weight_norm
from dora_kernels.functional.rescale import rescale
from tests.support.problem import DEVICE

DYNAMIC = torch.export.Dim.DYNAMIC


class Rescaled(nn.Module):
    """A DoRA layer in two pieces, as layers over other bases are."""

    def __init__(self):
        super().__init__()
        self.layer = dora_linear_module()

    def forward(self, x):
        layer, adapter = self.layer, (self.layer.lora_A.weight, self.layer.lora_B.weight)
        gain = layer.lora_magnitude_vector / weight_norm(layer.weight, *adapter, layer.scaling, norm_grad=True)
        return rescale(F.linear(x, layer.weight), F.linear(x, adapter[0]), adapter[1], gain, layer.scaling, layer.bias)


def dora_linear_module():
    torch.manual_seed(0)
    layer = DoraLinear(24, 20, rank=5, alpha=7.0, device=DEVICE).eval()
    with torch.no_grad():
        layer.lora_B.weight.normal_()
        layer.lora_magnitude_vector.mul_(1 + 0.5 * torch.randn(20, device=DEVICE).tanh())
    return layer


def peft_model(**config):
    pytest.importorskip("peft")
    from tests.support import peft_problem

    return peft_problem.enabled(peft_problem.build(**config)).eval()


MODELS = {
    "DoraLinear": (dora_linear_module, {"forward": 1}),
    "rescale": (Rescaled, {"rescale": 1, "norm": 1}),
    "peft": (peft_model, {"forward": 2}),
    "peft, conv1d": (lambda: peft_model(conv1d=True), {"forward": 2}),
    # the norms of all adapters that nest are made together, to be kept: two layers, two adapters
    "peft, two adapters": (lambda: peft_model(adapters=2), {"forward": 2, "norm": 4}),
}


def exported(model, *arguments, dynamic, strict):
    """`model` in inference, with the dimensions `dynamic` of its one input free."""
    shapes = {dimension: DYNAMIC for dimension in dynamic}
    # PeftModel.forward has *args
    dynamic_shapes = (shapes,) if isinstance(model, (DoraLinear, Rescaled, Logits)) else ((shapes,),)
    with torch.no_grad():
        return torch.export.export(model, arguments, dynamic_shapes=dynamic_shapes, strict=strict)


def operators(program):
    names = [str(node.target).split(".")[1] for node in program.graph.nodes if "dora_kernels." in str(node.target)]
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize(
    ("name", "strict"), [(name, False) for name in MODELS] + [("DoraLinear", True), ("rescale", True), ("peft", True)]
)
def test_the_program_has_the_operators_and_eagers_bits(name, strict):
    """At every M, 1 and 0 tokens too."""
    make, expected = MODELS[name]
    model = make()
    program = exported(model, torch.randn(5, 24, device=DEVICE), dynamic=(0,), strict=strict)
    assert operators(program) == expected
    for M in (9, 1, 0):
        x = torch.randn(M, 24, device=DEVICE)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=0)


class Logits(nn.Module):
    """A language model as a function of its tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids).logits


def test_a_transformers_model_with_free_batch_and_length():
    pytest.importorskip("peft")
    from tests.support.llama_problem import llama

    model = Logits(llama().eval())
    program = exported(model, torch.randint(64, (2, 8), device=DEVICE), dynamic=(0, 1), strict=False)
    assert operators(program) == {"forward": 7}
    ids = torch.randint(64, (3, 11), device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(ids), model(ids), rtol=0, atol=0)


@pytest.mark.skipif(DEVICE == "cuda", reason="the layers of restated_layers.py are on the CPU")
@pytest.mark.parametrize("strict", (False, True))
def test_a_layer_that_may_be_quantised(strict):
    """Dynamo can ask what its base weight is."""
    from tests.support import restated_layers

    linear = torch.nn.Linear(24, 20)
    model = torch.nn.Sequential(restated_layers.DORA(linear, linear.weight.detach().norm(dim=1)))
    model.requires_grad_(False).eval()
    assert dora_kernels.enable(model).taken_over
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=strict)
        assert torch.equal(program.module()(x), model(x))
    assert sum(operators(program).values()) > 0


@pytest.mark.parametrize("format", ("hqq", "torchao int8"))
def test_a_quantised_model(format):
    """Not over bitsandbytes: torch.export replaces its parameters by plain ones, without what says how to decode."""
    pytest.importorskip({"hqq": "hqq", "torchao int8": "torchao"}[format])
    pytest.importorskip("peft")
    from tests.support import peft_problem, quantized_problem

    model = peft_problem.enabled(quantized_problem.build(format)).eval()
    K = peft_problem.layers(model)[0].in_features
    program = exported(model, torch.randn(5, K, device=DEVICE), dynamic=(0,), strict=False)
    assert operators(program) == {"forward": 2}
    x = torch.randn(9, K, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=0)


LOAD = """
import sys, torch
import dora_kernels  # registers the operators
program, x, y = sys.argv[1:]
loaded = torch.export.load(program)
assert str(loaded.graph).count("dora_kernels.forward") == 2
with torch.no_grad():
    actual = loaded.module()(torch.load(x))
assert "peft" not in sys.modules
torch.testing.assert_close(actual, torch.load(y), rtol=1e-5, atol=1e-5)
print("equal")
"""


def test_save_and_load(tmp_path):
    """The process that loads needs the operators, and neither PEFT nor the model's code."""
    model, x = peft_model(), torch.randn(9, 24, device=DEVICE)
    files = [str(tmp_path / name) for name in ("program.pt2", "x.pt", "y.pt")]
    torch.export.save(exported(model, x[:5], dynamic=(0,), strict=False), files[0])
    with torch.no_grad():
        torch.save(x, files[1])
        torch.save(model(x), files[2])
    command = [sys.executable, "-c", LOAD, *files]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "equal", result.stderr
