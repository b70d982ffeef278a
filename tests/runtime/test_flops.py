"""FlopCounterMode counts each operator as the products that it does: torch's own count of the definition."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import dora_kernels
from dora_kernels import flops, merge_weight, ops, options, reference, serving, weight_norm
from dora_kernels.functional.rescale import dora_linear_lora_dropout, rescale
from dora_kernels.quant import QuantizedWeight
from dora_kernels.reference import dora_linear_ref
from tests.support.layer_kinds import STOCK, dvora, lora_dropout, pair, some
from tests.support.problem import DEVICE, GRADIENTS, Problem, core, definition

SIZES = M, N, K, R = 5, 11, 7, 3
SUBSETS = [needs for n in range(len(GRADIENTS) + 1) for needs in itertools.combinations(GRADIENTS, n)]
NORM = torch.linspace(0.5, 2.0, N, device=DEVICE)
KINDS = {
    "plain": {},
    "norm_grad": {"norm_grad": True},
    "norm given": {"norm": NORM},
}


def counted(call, *arguments, **keywords):
    """FLOPs by torch's count, where none is anybody else's."""
    with FlopCounterMode(display=False) as counter:
        call(*arguments, **keywords)
    return counter.get_total_flops()


def problem_of(**arguments):
    return Problem.random(*SIZES, torch.float32, **arguments)


def test_every_operator_has_a_formula():
    assert flops.FORMULAS.keys() == ops.OPERATORS.keys()
    registered = {str(target) for target in flop_registry if str(target).startswith("dora_kernels.")}
    assert registered == {f"dora_kernels.{name}" for name in ops.OPERATORS}


@pytest.mark.parametrize("dropout", (0.0, 0.5))
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_counts_as_its_definition_for_every_subset_of_gradients(kind, dropout):
    problem = problem_of(dropout=dropout)
    counts = set()
    for needs in SUBSETS:
        expected = counted(problem.run, dora_linear_ref, needs, **KINDS[kind])
        assert counted(problem.run, core, needs, **KINDS[kind]) == expected > 0, needs
        counts.add(expected)
    assert len(counts) == 8  # of x, lora_A and lora_B; magnitude and bias have sums


@pytest.mark.parametrize("needs", ((), ("x",), ("x_dropped",), ("x", "x_dropped")))
def test_x_and_what_dropout_makes_of_it_may_need_a_gradient_apart(needs):
    problem = problem_of()

    def run(layer):
        x, x_dropped = (problem.x.clone().requires_grad_(name in needs) for name in ("x", "x_dropped"))
        lora_B = problem.lora_B.clone().requires_grad_()
        layer(x, problem.weight, problem.lora_A, lora_B, problem.magnitude, 0.7, x_dropped=x_dropped).sum().backward()

    assert counted(run, core) == counted(run, dora_linear_ref) > 0


@pytest.mark.parametrize("way", ("split", "merged", "fused"))
@pytest.mark.parametrize("backend", ("reference", "triton"))
def test_the_count_is_of_the_model_and_not_of_the_way(way, backend):
    problem = problem_of()
    with options(backend=backend, way=way):
        assert counted(problem.run, core) == counted(problem.run, dora_linear_ref)


def test_x_of_three_dimensions_in_half_precision_under_wider_adapters():
    problem = Problem.random(*SIZES, torch.bfloat16, torch.float32)

    def run(layer):
        leaves = [one.clone().requires_grad_() for one in (problem.x.unflatten(0, (1, M)), *problem.layer[1:4])]
        layer(leaves[0], problem.weight, *leaves[1:], 0.7).float().sum().backward()

    assert counted(run, core) == counted(run, lambda x, *layer: dora_linear_ref(x.float(), *wide(layer))) > 0


def wide(layer):
    return [part.float() if isinstance(part, torch.Tensor) else part for part in layer]


def test_a_given_low_is_one_product_less_and_has_its_own_gradient():
    problem = problem_of()

    def run(layer, shares):
        x, lora_A, lora_B, magnitude = (tensor.clone().requires_grad_() for tensor in (problem.x, *problem.layer[1:4]))
        low = {"low": ops.shared_low(x.detach(), [lora_A.detach()], x.dtype, "auto").requires_grad_()} if shares else {}
        y = layer(x, problem.weight, lora_A, lora_B, magnitude, 0.7, **low)
        y.sum().backward()
        if shares:
            ops.shared_low_backward(x.detach(), [low["low"].grad], x.dtype, "auto")

    assert counted(run, core, True) == counted(run, dora_linear_ref, False)


def test_a_given_gain_and_merged_weight_change_no_count():
    """What is kept saves the norm's product, as a given norm does; a merged weight saves none of the model's."""
    problem = problem_of()
    gain = problem.magnitude / NORM
    merged = merge_weight(*problem.layer)
    actual = counted(problem.run, core, norm=NORM, gain=gain, merged=merged, needs=("x", "lora_B"))
    assert actual == counted(problem.run, dora_linear_ref, norm=NORM, needs=("x", "lora_B"))


def test_a_quantized_weight_counts_as_the_dense_one():
    problem = problem_of()
    q = torch.randint(-127, 128, (N, K), dtype=torch.int8, device=DEVICE)
    weight = QuantizedWeight("row8", (N, K), torch.float32, (q, torch.ones(N, device=DEVICE)))
    expected = counted(problem.run, dora_linear_ref)
    problem.weight = weight
    assert counted(problem.run, core) == expected


@pytest.mark.parametrize("trained", ((), ("lora_A",), ("lora_B",), ("lora_A", "lora_B")))
def test_functions_of_the_weight_alone(trained):
    problem = problem_of()

    def run(norm_of):
        factors = {"lora_A": problem.lora_A, "lora_B": problem.lora_B}
        lora_A, lora_B = (one.clone().requires_grad_(name in trained) for name, one in factors.items())
        norm = norm_of(problem.weight, lora_A, lora_B, 0.7)
        if trained:
            norm.sum().backward()

    def by_definition(weight, lora_A, lora_B, scaling):
        return reference.row_norms(weight + scaling * lora_B @ lora_A)

    expected = counted(run, by_definition)
    assert counted(run, lambda *layer: weight_norm(*layer, norm_grad=True)) == expected > 0
    merged = counted(reference.merge, *problem.layer[:3], NORM, 0.7)
    assert counted(ops.merge, [problem.weight], "dense", [], torch.float32, *problem.layer[1:3], NORM, 0.7,
                   torch.float32, "auto") == merged > 0  # fmt: skip


def test_norms_of_several_layers():
    layers = [Problem.random(1, rows, columns, 3, torch.float32).layer for rows, columns in ((12, 10), (7, 18))]
    weights, lora_As, lora_Bs, magnitudes, scalings = map(list, zip(*layers, strict=True))
    arguments = (weights, lora_As, lora_Bs, magnitudes, scalings)
    expected = counted(reference.grouped_norm, *arguments)
    assert counted(ops.grouped_norm, *arguments, torch.float32, "auto") == expected > 0


def test_low_of_several_layers():
    """Of other ranks: each is multiplied and differentiated alone by the definition."""
    x, factors = torch.randn(M, K), [torch.randn(rank, K) for rank in (2, 3)]
    dlows = [torch.randn(M, 2), torch.randn(M, 3)]

    def low():
        return [reference.project(x, factor) for factor in factors]

    def dA():
        return [reference.outer_product(dlow, x, 1.0, torch.float32) for dlow in dlows]

    assert counted(ops.shared_low, x, factors, torch.float32, "auto") == counted(low) > 0
    assert counted(ops.shared_low_backward, x, dlows, torch.float32, "auto") == counted(dA) > 0


@pytest.mark.parametrize("residual", (False, True))
def test_the_second_half_alone_for_every_subset_of_gradients(residual):
    problem = problem_of()
    names = ("base", "low", "lora_B", "gain", "bias")
    tensors = dict(zip(names, (problem.dy + 1, torch.randn(M, R), problem.lora_B, NORM, problem.bias), strict=True))

    def by_definition(base, low, lora_B, gain, scaling, bias, *, residual):
        y = gain * (base + scaling * F.linear(low, lora_B)) + bias
        return y if residual is None else y + residual - base

    def run(layer, needs):
        base, low, lora_B, gain, bias = (one.clone().requires_grad_(name in needs) for name, one in tensors.items())
        y = layer(base, low, lora_B, gain, 0.7, bias, residual=problem.dy if residual else None)
        if needs:
            y.sum().backward()

    for needs in (needs for n in range(6) for needs in itertools.combinations(names, n)):
        assert counted(run, rescale, needs) == counted(run, by_definition, needs) > 0, needs


def test_dropout_before_the_low_rank_product_alone():
    problem = problem_of(dropout=0.5)

    def ours(x, weight, lora_A, lora_B, magnitude, scaling, bias, *, x_dropped):
        layer = problem.layer._replace(lora_A=lora_A, lora_B=lora_B, magnitude=magnitude)
        return dora_linear_lora_dropout(x, x_dropped, layer, bias, NORM)

    def by_definition(x, weight, lora_A, lora_B, magnitude, scaling, bias, *, x_dropped):
        return magnitude / NORM * (F.linear(x, weight) + scaling * F.linear(F.linear(x_dropped, lora_A), lora_B)) + bias

    assert counted(problem.run, ours) == counted(problem.run, by_definition) > 0


def test_a_bank_counts_one_adapter_for_each_row():
    problem = problem_of()
    bank = serving.AdapterBank.of(problem.weight, [serving.Adapter(*problem.layer[1:])] * 3)
    index = torch.tensor([2, 0, 1, 1, 2], device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        serving.bank_linear(problem.x, problem.weight, bank, index)
    counts = counter.get_flop_counts()["Global"]

    def row_by_row():
        for base, low in zip(problem.dy[:, None], torch.randn(M, 1, R), strict=True):
            reference.epilogue(base, low, problem.lora_B, NORM, None, 0.7, torch.float32)

    assert counts[torch.ops.dora_kernels.bank_epilogue] == counted(row_by_row) > 0
    # the products with the weight and with every lora_A of the bank are torch's
    assert sum(counts.values()) == counted(row_by_row) + 2 * M * K * (N + 3 * R)


def test_second_derivatives_count_as_what_torch_makes_them_of():
    """The first pass is the operator's; the others are torch's own, and begin with the definition once more."""
    problem = problem_of()

    def run(layer):
        x, lora_A = problem.x.clone().requires_grad_(), problem.lora_A.clone().requires_grad_()
        y = layer(x, problem.weight, lora_A, problem.lora_B, problem.magnitude, 0.7)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        dx.pow(2).sum().backward()

    once_more = counted(problem.run, dora_linear_ref, (), norm=NORM)
    assert counted(run, core) >= counted(run, dora_linear_ref) + once_more


@pytest.mark.parametrize("where", ("meta", "fake"))
def test_tensors_without_numbers(where):
    problem = problem_of()
    expected = counted(problem.run, dora_linear_ref)
    if where == "meta":
        problem = Problem(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in vars(problem).items()})
        assert counted(problem.run, core) == expected
        return
    with FakeTensorMode() as mode:
        for name, value in vars(problem).items():
            if isinstance(value, torch.Tensor):
                setattr(problem, name, mode.from_tensor(value))
        assert counted(problem.run, core) == expected


# Modules


class Definition(nn.Module):
    """The DoRA layers of a model as the definition has them, in the place of PEFT's."""

    def __init__(self, layer):
        super().__init__()
        self.layer = [layer]

    def forward(self, x):
        (layer,) = self.layer
        lora_A, lora_B, magnitude = (
            part["default"].weight for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
        )
        return dora_linear_ref(
            x, layer.base_layer.weight, lora_A, lora_B, magnitude, layer.scaling["default"], layer.base_layer.bias
        )


def two_layers():
    """A model of two PEFT layers, enabled, and the same by the definition; an x."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(use_dora=True, r=2, lora_alpha=3, target_modules=["0", "2"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 5)), config).base_model.model
    expected = copy.deepcopy(model)
    for i in (0, 2):
        expected[i] = Definition(expected[i])
    assert len(dora_kernels.enable(model).taken_over) == 2
    return model, expected, torch.randn(2, 3, 8)


def by_module(model, x):
    """FLOPs of each module in a training step, by its name."""
    with FlopCounterMode(display=False) as counter:
        model(x.clone().requires_grad_()).pow(2).sum().backward()
    return {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}


def test_an_enabled_model_is_counted_layer_by_layer_and_stays_ours():
    """As Lightning's measure_flops, and others' calculators of MFU, count a model: forward_fn(), loss, backward."""
    model, expected, x = two_layers()
    ops.calls.clear()
    counts = by_module(model, x)
    assert ops.calls["forward", "reference"] == ops.calls["backward", "reference"] == 2
    assert counts == by_module(expected, x)
    assert counts.keys() == {"Global", "Sequential", "Sequential.0", "Sequential.2"}
    assert counts["Global"] == counts["Sequential.0"] + counts["Sequential.2"]
    assert counts["Sequential.2"] == 2 * 5 * (2 * 6) + 2 * 6 * (2 * 6 * 5 + 3 * 2 * (5 + 6))


COMPOSED = [name for name in STOCK if name.startswith(("peft", "lycoris", "torchtune"))]


@pytest.mark.parametrize("name", some(COMPOSED, "peft, GPT-2", "peft, conv2d", "peft, embedding", "torchtune, bias"))
def test_no_layer_is_counted_less_than_its_frozen_one_and_its_adapter(name):
    """Under the count: base forward and dx, and of the adapter, forward, its two gradients and dx."""
    _, model, x = pair(name, torch.float32)
    ops.calls.clear()
    with FlopCounterMode(display=False) as counter:
        y = model(x)
        assert ops.calls
        y.pow(2).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert any(str(target).startswith("dora_kernels.") and count > 0 for target, count in counts.items())
    rows, features = y.movedim(1, -1).shape if "conv" in name else y.shape, y.shape[1 if "conv" in name else -1]
    assert sum(counts.values()) >= 2 * (rows.numel() // features) * features * 2 * 3  # low lora_B^T, dlow, dB


def test_layers_whose_function_the_library_does_not_have():
    for model, x in (lora_dropout("peft"), lora_dropout("conv1d"), dvora()):
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        assert any(str(target).startswith("dora_kernels.") for target in counter.get_flop_counts()["Global"])


@pytest.mark.parametrize("backend", some(("eager", "aot_eager", "inductor"), "aot_eager"))
def test_a_compiled_model_is_counted_where_torch_counts_one(backend):
    torch._dynamo.reset()
    layer = dora_kernels.DoraLinear(7, 11, rank=3, alpha=2.0)
    nn.init.normal_(layer.lora_B.weight)
    frozen = nn.Linear(7, 11).requires_grad_(False)
    x = torch.randn(5, 7, requires_grad=True)
    plain = torch.compile(frozen, backend=backend)
    compiled = torch.compile(layer, backend=backend)
    for model in (plain, compiled):
        model(x).sum().backward()

    def step(model):
        return lambda: model(x).sum().backward()

    by_torch = counted(step(plain))
    assert by_torch in (0, counted(step(frozen)))
    expected = counted(step(lambda x: definition(layer, x)))
    assert counted(step(compiled)) == (expected if by_torch else 0)


def test_a_recorded_step_and_an_exported_program():
    layer = dora_kernels.DoraLinear(7, 11, rank=3, alpha=2.0)
    nn.init.normal_(layer.lora_B.weight)
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def step(x):
        return torch.autograd.grad(definition(layer, x).sum(), parameters)

    def ours(x):
        return torch.autograd.grad(layer(x).sum(), parameters)

    x = torch.randn(5, 7)
    assert counted(make_fx(ours)(x), x) == counted(step, x) > 0
    with torch.no_grad():
        program = torch.export.export(layer.eval(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
        assert counted(program, x) == counted(definition, layer, x) > 0


LAZILY = """
import sys
import dora_kernels
from dora_kernels import flops
assert not {flops.COUNTER, "triton"} & set(sys.modules)

from importlib import reload
import inspect, torch
from torch.utils import flop_counter
def names():
    return {str(target).split(".")[1] for target in flop_counter.flop_registry if "dora_kernels" in str(target)}
assert names() == set(flops.FORMULAS) and "class FlopCounterMode" in inspect.getsource(flop_counter)
reload(flop_counter)
assert names() == set(flops.FORMULAS)

flop_counter.flop_registry.clear()
reload(flops)
assert names() == set(flops.FORMULAS)
"""


def test_the_counter_is_imported_by_whoever_counts():
    """Before or after this package; it takes longer to import."""
    subprocess.run([sys.executable, "-c", LAZILY], check=True, timeout=120)
