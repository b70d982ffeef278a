"""dropout="lora": dropout on the low-rank product alone, in PEFT's layers and in DoraLinear."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")

import dora_kernels
from dora_kernels import DoraLinear, ops, options
from dora_kernels.testing import compare, rms_error
from dora_kernels.testing.run import shared_dropout
from tests.support import conformance_checks, quantized_problem
from tests.support.peft_problem import adapt, build, calls, layers, tensors, training_step
from tests.support.problem import BACKENDS, DEVICE

FACTORIES = {
    "linear": lambda: nn.Linear(24, 20),
    "conv": lambda: nn.Conv2d(6, 10, 3, padding=1),
    "pointwise": lambda: nn.Conv2d(6, 10, 1).to(memory_format=torch.channels_last),
}


def problem(kind, dtype=torch.float32, adapters=1, dropout="lora"):
    """A model of one layer enabled with dropout="lora", in train mode, and x."""
    torch.manual_seed(0)
    model = adapt(nn.Sequential(FACTORIES[kind]()).to(DEVICE, dtype), adapters, target_modules=["0"], lora_dropout=0.5)
    x = torch.randn((5, 24) if kind == "linear" else (2, 6, 4, 5)).to(DEVICE, dtype)
    x = x.to(memory_format=torch.channels_last) if kind == "pointwise" else x
    assert dora_kernels.enable(model, dropout=dropout).left_alone == []
    return model, x


class Definition(nn.Module):
    """gain * (W x + scaling * B A dropout(x)) + bias in plain PyTorch, adapter over adapter."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer, base = self.layer, self.layer.base_layer
        channels = (-1, *(1,) * (x.dim() - 2))
        bias = 0 if base.bias is None else base.bias.view(channels)
        y = base(x) - bias
        for name in layer.active_adapters:
            A, B = layer.lora_A[name], layer.lora_B[name]
            low = A(layer.lora_dropout[name](x.to(A.weight.dtype)))
            direction = base.weight.flatten(1) + layer.scaling[name] * B.weight.flatten(1) @ A.weight.flatten(1)
            norm = torch.linalg.vector_norm(direction, dim=1).detach()
            gain = layer.lora_magnitude_vector[name].weight.flatten() / norm
            y = gain.view(channels) * (y + layer.scaling[name] * B(low))
        return (y + bias).to(x.dtype)


def run(model, x, dy, autocast=None):
    with shared_dropout(0):
        return tensors(model, x, dy, autocast=autocast)


CASES = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "two adapters": {"adapters": 2},
    "three adapters, bfloat16": {"adapters": 3, "dtype": torch.bfloat16},
    "autocast": {"autocast": torch.bfloat16},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", FACTORIES)
@pytest.mark.parametrize("case", CASES)
def test_peft_layers_are_the_definition(case, kind, backend):
    config = dict(CASES[case])
    autocast = config.pop("autocast", None)
    model, x = problem(kind, **config)
    dy = torch.randn(model(x).shape, device=DEVICE)
    with options(backend=backend):
        ours = run(model, x, dy, autocast)
    stock = copy.deepcopy(model)
    dora_kernels.disable(stock)
    yardstick = run(Definition(layers(stock)[0]), x, dy, autocast)
    exact = run(Definition(layers(stock)[0].double()), x.double(), dy.double())
    assert len(ours) == len(exact)
    for name, value in ours.items():
        other = name.replace("base_model.model.0.", "layer.")
        comparison = compare(name, value, yardstick[other], exact[other], through=ours["y"].dtype)
        assert comparison.ok and comparison.limit < 0.2, comparison
    # PEFT's dropout is another function
    assert rms_error(run(stock.float(), x.float(), dy)["y"], exact["y"]) > 0.1


def test_over_a_quantised_weight():
    model = quantized_problem.build("nf4", lora_dropout=0.5)
    twin = quantized_problem.dense(model, torch.float32)
    for each in (model, twin):
        assert dora_kernels.enable(each, dropout="lora").left_alone == []
    x, dy = torch.randn(5, 24, device=DEVICE), torch.randn(5, 20, device=DEVICE)
    ours, expected = run(model, x, dy), run(twin, x, dy)
    for name, value in ours.items():
        assert rms_error(value, expected[name]) < 1e-5, name


def dora_linear(dropout_on, p=0.5):
    torch.manual_seed(0)
    layer = DoraLinear(24, 20, rank=4, alpha=6.0, dropout=p, dropout_on=dropout_on, device=DEVICE)
    with torch.no_grad():
        layer.lora_B.weight.normal_()
        layer.lora_magnitude_vector.mul_(1 + torch.rand(20, device=DEVICE))
    return layer


@pytest.mark.parametrize("backend", BACKENDS)
def test_dora_linear_is_the_definition(backend):
    layer = dora_linear("lora")
    x = torch.randn(7, 24, device=DEVICE)
    with shared_dropout(0), options(backend=backend):
        y = layer(x)
    with shared_dropout(0):
        dropped = F.dropout(x, 0.5)
    direction = layer.weight + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    gain = layer.lora_magnitude_vector / torch.linalg.vector_norm(direction, dim=1)
    low = layer.scaling * dropped @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    torch.testing.assert_close(y, gain * (F.linear(x, layer.weight) + low) + layer.bias)
    assert "dropout_on='lora'" in repr(layer)
    linear = nn.Linear(24, 20, device=DEVICE)
    assert DoraLinear.from_linear(linear, 4, 8.0, dropout=0.5, dropout_on="lora").dropout_on == "lora"


def test_dora_linear_over_a_quantised_weight():
    pytest.importorskip("bitsandbytes")
    linear = quantized_problem.nf4(nn.Linear(64, 20), torch.float32)
    layer = DoraLinear.from_linear(linear, 4, 8.0, dropout=0.5, dropout_on="lora")
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(7, 64, device=DEVICE, requires_grad=True)
    with shared_dropout(0):
        y = layer(x)
        y.sum().backward()
    dense = DoraLinear(64, 20, 4, 8.0, dropout=0.5, dropout_on="lora", device=DEVICE)
    weight, bias = layer.base()
    dense.load_state_dict(layer.state_dict() | {"weight": weight.dequantize(), "bias": bias}, strict=False)
    twin = x.detach().clone().requires_grad_()
    with shared_dropout(0):
        expected = dense(twin)
        expected.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, twin.grad)


def outputs(dropout_on, masks=4000):
    layer = dora_linear(dropout_on).double()
    x = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.no_grad():
        expected = layer.eval()(x[None])
        return layer.train()(x.expand(masks, -1)), expected


def test_one_mean_and_two_variances():
    """Over the masks both are eval mode's output on average; PEFT's varies by (gain - 1) * W d beside it.

    The variances are those of the formulas: d_k = 2 x_k b_k with b_k a fair coin, so Var(sum_k c_k d_k) is
    sum_k (c_k x_k)^2, with c = gain * scaling * B A, and (gain - 1) * W more for "adapter".
    """
    layer = dora_linear("adapter").double()
    x = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    update = layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    gain = (layer.lora_magnitude_vector / torch.linalg.vector_norm(layer.weight + update, dim=1))[:, None]
    coefficients = {"lora": gain * update, "adapter": gain * update + (gain - 1) * layer.weight}
    variances = {}
    for dropout_on, c in coefficients.items():
        y, expected = outputs(dropout_on)
        variances[dropout_on] = y.var(dim=0)
        predicted = (c * x).square().sum(dim=1).detach()
        assert ((y.mean(dim=0) - expected[0]).abs() < 5 * (predicted / len(y)).sqrt()).all()
        torch.testing.assert_close(variances[dropout_on], predicted, rtol=0.15, atol=0)
    assert (variances["adapter"] - variances["lora"]).abs().max() > 0.1 * variances["lora"].max()


@pytest.mark.skipif(DEVICE == "cuda", reason="the vendor's names of a product differ")
@pytest.mark.parametrize("kind", FACTORIES)
def test_half_the_products_with_the_base_weight(kind):
    """One forward and one backward; for PEFT's dropout two and two, and no formula has fewer."""
    counts = {}
    for dropout in ("adapter", "lora"):
        model, x = problem(kind, dropout=dropout)
        weight = layers(model)[0].base_layer.weight
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            model(x.requires_grad_()).sum().backward()
        shapes = [list(weight.shape), list(weight.flatten(1).shape), list(weight.flatten(1).T.shape)]
        products = [event for event in profile.events() if event.name in PRODUCTS]
        operands = [event.input_shapes[PRODUCTS[event.name]] for event in products]
        counts[dropout] = sum(any(shape in shapes for shape in pair) for pair in operands)
    assert counts == {"adapter": 4, "lora": 2}


# and where among the arguments the factors are
PRODUCTS = {
    "aten::mm": slice(0, 2),
    "aten::addmm": slice(1, 3),
    "aten::addmm_": slice(1, 3),
    "aten::convolution": slice(1, 2),
    "aten::convolution_backward": slice(2, 3),
}


def test_the_meaning_is_the_layer_s_and_not_in_its_state_dict():
    model = build(lora_dropout=0.5)
    state = list(model.state_dict())
    x = torch.randn(6, 24, device=DEVICE)
    results = {}
    for dropout in ("adapter", "lora"):
        dora_kernels.enable(model, dropout=dropout)
        with shared_dropout(0):
            results[dropout] = model(x)
    assert rms_error(results["lora"], results["adapter"]) > 0.1
    assert list(model.state_dict()) == state
    with shared_dropout(0):
        assert torch.equal(copy.deepcopy(model)(x), results["lora"])
    dora_kernels.enable(model)  # as it was
    with shared_dropout(0):
        assert torch.equal(model(x), results["lora"])
    dora_kernels.disable(model)
    assert not any("dora_dropout" in vars(layer) for layer in layers(model))
    dora_kernels.enable(model)
    with shared_dropout(0):
        assert torch.equal(model(x), results["adapter"])


@pytest.mark.parametrize("change", ["eval", "p = 0"])
def test_where_nothing_is_dropped_the_meanings_agree(change):
    model = build(lora_dropout=0.5)
    if change == "eval":
        model.eval()
    for layer in layers(model):
        layer.lora_dropout["default"].p = 0.0 if change == "p = 0" else 0.5
    x, results = torch.randn(6, 24, device=DEVICE), []
    for dropout in ("adapter", "lora"):
        dora_kernels.enable(model, dropout=dropout)
        results.append(model(x))
    assert torch.equal(*results)


def test_checkpointing_uses_the_norm_again():
    model, x = problem("linear")
    dy = torch.randn(5, 20, device=DEVICE)
    plain = tensors(model, x, dy)
    ops.calls.clear()
    checkpointed = tensors(model, x, dy, call=lambda x: checkpoint(model, x, use_reentrant=False))
    assert calls("norm") == 1 and calls("rescale") == 2
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)


def test_it_trains():
    model, x = problem("linear")
    target = torch.randn(5, 20, device=DEVICE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = [training_step(model, optimizer, x, target) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]


PROBABILITY = 0.5


def structural(kind):
    """A layer known by structure with PEFT's dropout, its parts (weight, lora_A, lora_B, magnitude, s, bias), and x."""
    from tests.support import restated_layers

    torch.manual_seed(0)
    linear, p = nn.Linear(24, 20).requires_grad_(False), PROBABILITY
    layer = {
        "llm": lambda: restated_layers.Llm.Linear(linear, dropout=p),
        "llm, norm_grad": lambda: restated_layers.Llm.Linear(linear, dropout=p, dora_simple=False),
        "llava": lambda: restated_layers.Llava.Linear(linear, dropout=p),
        "megatron": lambda: restated_layers.DoRALinear(restated_layers.Parallel(linear), dropout=p),
        "automodel": lambda: restated_layers.LinearLoRA.patch(linear, dropout=p, position="pre"),
    }[kind]()
    layer = conformance_checks.randomise(layer).to(DEVICE, torch.float64)
    by_name = {name: value for name, value in layer.named_parameters() if value.requires_grad}
    find = lambda *words: next(  # noqa: E731
        value for name, value in by_name.items() if any(word in name for word in words)
    )
    A, B, magnitude = find("lora_A", "linear_in"), find("lora_B", "linear_out"), find("magnitude", "weight_m")
    weight, bias = (getattr(layer, "to_wrap", layer).get_parameter(name) for name in ("weight", "bias"))
    return layer, (weight, A, B, magnitude.flatten(), 1.5, bias), torch.randn(2, 5, 24, device=DEVICE).double()


@pytest.mark.parametrize("kind", ["llm", "llm, norm_grad", "llava", "megatron", "automodel"])
def test_layers_known_by_structure(kind):
    layer, (weight, A, B, magnitude, s, bias), x = structural(kind)
    (report,) = dora_kernels.enable(nn.Sequential(layer), dropout="lora").layers
    assert report.taken_over and report.reason == ""
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    torch.manual_seed(1)
    y = layer(x)
    y = y[0] + y[1] if isinstance(y, tuple) else y
    torch.manual_seed(1)
    dropped = F.dropout(x, PROBABILITY)
    norm = torch.linalg.vector_norm(weight + s * B @ A, dim=1)
    gain = magnitude / (norm if kind == "llm, norm_grad" else norm.detach())
    expected = gain * (x @ weight.T + s * dropped @ A.T @ B.T) + bias
    assert rms_error(y, expected) < 1e-12
    dy = torch.randn_like(y)
    gradients = (torch.autograd.grad(each, parameters, dy) for each in (y, expected))
    for ours, exact in zip(*gradients, strict=True):
        assert exact.any() and rms_error(ours, exact) < 1e-12


def test_the_report_names_a_dropout_that_stays_the_library_s():
    from tests.support import restated_layers

    linear = nn.Linear(8, 6).requires_grad_(False)
    own = [
        restated_layers.LinearLoRA.patch(copy.deepcopy(linear), dropout=0.5),
        restated_layers.Llm.Linear(linear, dropout=0.5, Wdecompose=True),
    ]
    no_dropout = [restated_layers.LinearLoRA.patch(copy.deepcopy(linear)), restated_layers.DoraLinear(linear)]
    model = nn.Sequential(*own, *no_dropout)
    report = dora_kernels.enable(model, dropout="lora")
    assert not report.left_alone
    assert ["dropout" in layer.reason for layer in report.layers] == [True, True, False, False], str(report)
    assert str(report).count("taken over but for") == 2
    assert "taken over but for" not in str(dora_kernels.enable(model, dropout="adapter"))


def test_bad_input():
    model = build(lora_dropout=0.5)
    with pytest.raises(ValueError, match="enable: dropout is 'peft'; expected one of None, adapter, lora"):
        dora_kernels.enable(model, dropout="peft")
    assert not any(isinstance(layer, dora_kernels.adapters.taking.TakenOver) for layer in layers(model))
    with pytest.raises(ValueError, match="DoraLinear: dropout_on is 'x'; expected one of adapter, lora"):
        DoraLinear(3, 4, 1, 1.0, dropout_on="x")
    layer, x = dora_linear("lora"), torch.randn(2, 5, device=DEVICE)
    with pytest.raises(ValueError, match=r"DoraLinear: x has shape \(2, 5\)"):
        layer(x)
    with pytest.raises(ValueError, match="DoraLinear: x is torch.bfloat16 but weight is torch.float32; expected one"):
        layer(torch.randn(2, 24, device=DEVICE, dtype=torch.bfloat16))
