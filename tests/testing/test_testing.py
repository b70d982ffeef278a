"""The error measure and the checks that users run: what they accept and, above all, what they reject."""

import json
import math

import pytest
import torch
from torch import nn

import dora_kernels
from dora_kernels import dora_linear, options
from dora_kernels.reference import dora_linear_ref
from dora_kernels.testing import (
    check_gradients,
    check_layer,
    compare,
    dora_layers,
    geometric_mean,
    nan_filled_memory,
    random_inputs,
    rms_error,
)
from tests.support.problem import BACKENDS, DEVICE

SHAPE = (7, 12, 10, 3)


def test_rms_error_is_relative_to_the_exact_value():
    exact = torch.tensor([3.0, 4.0])
    assert rms_error(exact, exact) == 0
    assert rms_error(torch.zeros(2), exact) == pytest.approx(1.0)
    assert rms_error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)


def test_nan_inf_and_something_for_nothing_are_infinitely_wrong():
    exact = torch.ones(2)
    assert rms_error(torch.tensor([1.0, math.nan]), exact) == math.inf
    assert rms_error(torch.tensor([1.0, math.inf]), exact) == math.inf
    assert rms_error(exact, torch.zeros(2)) == math.inf
    assert rms_error(torch.zeros(2), torch.zeros(2)) == 0


def test_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"actual has shape \(1, 2\) but exact has \(2,\)"):
        rms_error(torch.ones(1, 2), torch.ones(2))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_compare(dtype):
    torch.manual_seed(0)
    exact = torch.randn(1000, dtype=torch.float64)
    rounded = exact.to(dtype)
    assert compare("t", rounded, rounded, exact).ok
    assert compare("t", rounded, rounded, exact).ratio == 1
    for wrong in (torch.zeros_like(rounded), rounded * 1.05, rounded * math.nan, -rounded):
        assert not compare("t", wrong, rounded, exact).ok
    # a float32 tensor that went through bfloat16
    if dtype == torch.bfloat16:
        assert not compare("t", rounded.float(), exact.float(), exact).ok
        assert compare("t", rounded.float(), exact.float(), exact, through=dtype).ok


def test_one_wrong_element_of_a_million_shows():
    torch.manual_seed(0)
    exact = torch.randn(1_000_000, dtype=torch.float64)
    rounded = exact.to(torch.bfloat16)
    wrong = rounded.clone()
    wrong[123_456] += 1
    comparison = compare("t", wrong, rounded, exact)
    assert comparison.error <= comparison.limit and not comparison.ok


def test_geometric_mean():
    assert geometric_mean([0.5, 2.0, 1.0]) == pytest.approx(1.0)


def test_nan_filled_memory_fills_and_restores():
    torch.use_deterministic_algorithms(False)  # conftest.py has it on
    with nan_filled_memory():
        assert torch.empty(1000).isnan().all() and torch.ones(3).new_empty(5).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arguments", ({}, {"norm_grad": True}), ids=str)
@pytest.mark.parametrize("dtypes", ((torch.float32, None), (torch.bfloat16, torch.float32)), ids=str)
def test_dora_linear_passes(dtypes, arguments, backend):
    inputs = random_inputs(*SHAPE, *dtypes, device=DEVICE)
    with options(backend=backend):
        report = check_gradients(dora_linear, inputs | arguments).raise_if_failed()
    tensors = {row.subject for row in report.rows if row.check == "accuracy"}
    assert tensors == {"y", "dx", "dlora_A", "dlora_B", "dmagnitude", "dbias"}
    differentiated = [row for row in report.rows if row.check == "finite differences" and row.ok]
    assert len(differentiated) == 5 or DEVICE == "cuda"
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


def with_gradients(change):
    """dora_linear_ref, whose gradients go through `change(name, gradient)`."""

    def function(**inputs):
        class Changed(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *tensors):
                with torch.enable_grad():
                    ctx.leaves = [t.detach().requires_grad_() for t in tensors]
                    ctx.y = dora_linear_ref(**(inputs | dict(zip(names, ctx.leaves, strict=True))))
                return ctx.y.detach()

            @staticmethod
            def backward(ctx, dy):
                gradients = torch.autograd.grad(ctx.y, ctx.leaves, dy)
                return tuple(change(name, gradient) for name, gradient in zip(names, gradients, strict=True))

        names = [name for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.requires_grad]
        return Changed.apply(*(inputs[name] for name in names))

    return function


def only(wanted, change):
    """A change of one gradient."""
    return with_gradients(lambda name, gradient: change(gradient) if name == wanted else gradient)


def mutating(**inputs):
    y = dora_linear_ref(**inputs)
    inputs["weight"].data.mul_(1.5)  # behind autograd's back, as a raw kernel would
    return y


def unwritten(**inputs):
    y = dora_linear_ref(**inputs)
    return torch.where(torch.arange(len(y), device=y.device)[:, None] == len(y) - 1, torch.empty_like(y), y)


def one_wrong_element(gradient):
    wrong = gradient.clone()
    wrong.view(-1)[3] *= -1
    return wrong


runs = iter(range(10**6))

FAULTS = {
    "right": (dora_linear_ref, None),
    "right by hand": (with_gradients(lambda name, gradient: gradient), None),
    "zeros": (only("lora_A", torch.zeros_like), "zero everywhere"),
    "NaN": (only("lora_B", lambda g: g * math.nan), "not finite"),
    "a factor": (only("magnitude", lambda g: g * 1.01), "rms error above"),
    "one element": (only("x", one_wrong_element), "rms error above"),
    "missing": (only("lora_A", lambda g: None), "no gradient came"),
    "dtype": (lambda **inputs: dora_linear_ref(**inputs).double(), "dtype is torch.float64; expected torch.float32"),
    "shape": (lambda **inputs: dora_linear_ref(**inputs)[None], r"shape is \(1, 7, 12\); expected \(7, 12\)"),
    "mutated input": (mutating, "weight changed"),
    "uninitialised memory": (unwritten, "perhaps nobody wrote"),
    "not deterministic": (lambda **i: dora_linear_ref(**i) * (1 + 1e-7 * (next(runs) % 2)), "differs in a second run"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(fault):
    function, reason = FAULTS[fault]
    report = check_gradients(function, random_inputs(*SHAPE), dora_linear_ref, finite_differences=False)
    if reason is None:
        report.raise_if_failed()
        return
    with pytest.raises(AssertionError, match=reason):
        report.raise_if_failed()


def test_finite_differences_find_what_the_reference_shares():
    function = only("bias", lambda g: g * 1.001)
    report = check_gradients(function, random_inputs(*SHAPE) | {"norm_grad": True}, function)
    assert [(row.check, row.subject) for row in report.failures] == [("finite differences", "dbias")]


def test_an_input_on_which_nothing_is_tested_fails():
    inputs = random_inputs(*SHAPE)
    with torch.no_grad():
        inputs["lora_B"].zero_()
    with pytest.raises(AssertionError, match="exact result is zero everywhere"):
        check_gradients(dora_linear, inputs).raise_if_failed()


def test_an_unknown_function_needs_a_reference():
    with pytest.raises(ValueError, match="reference is None and function is add; expected a reference"):
        check_gradients(torch.add, random_inputs(*SHAPE))
    with pytest.raises(ValueError, match="the function returned tuple; expected one torch.Tensor"):
        check_gradients(lambda **inputs: (inputs["x"],), random_inputs(*SHAPE), dora_linear_ref)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", (0.0, 0.4))
def test_a_module_is_checked_with_its_parameters(dropout, backend):
    torch.manual_seed(0)
    layer = dora_kernels.DoraLinear(10, 12, 3, 6.0, dropout=dropout, device=DEVICE)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(7, 10, device=DEVICE, requires_grad=True)
    with options(backend=backend):
        report = check_gradients(layer, x).raise_if_failed()
    assert {row.subject for row in report.rows} >= {"dlora_A.weight", "dlora_B.weight", "dlora_magnitude_vector"}


class TestLayer:
    """check_layer on PEFT's layers."""

    @pytest.fixture
    def model(self):
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 16, bias=False)).to(DEVICE)
        config = peft.LoraConfig(r=4, use_dora=True, lora_dropout=0.25, target_modules=["0", "2"])
        return peft.get_peft_model(model, config)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_passes_and_leaves_the_layer_alone(self, model, backend):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for _, layer in dora_layers(model):
            with options(backend=backend):
                report = check_layer(layer).raise_if_failed()
            checks = {row.check for row in report.rows}
            assert checks > {"train, accuracy", "eval, accuracy", "merge, accuracy", "unmerge, accuracy"}
        assert len(dora_layers(model)) == 2
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model.training and type(layer).__module__.startswith("peft")

    def test_dropout_is_not_rounded_to_the_weights_dtype_for_float32_adapters(self):
        """dlora_A and dlora_B under dropout: 1.3 and 1.5 of PEFT's error where dropout(x) is rounded to bfloat16."""
        peft = pytest.importorskip("peft")
        ratios = {"dlora_A": [], "dlora_B": []}
        for seed in range(3):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(60, 50)).to(DEVICE, torch.bfloat16)
            config = peft.LoraConfig(r=4, use_dora=True, lora_dropout=0.3, target_modules=["0"])
            report = check_layer(peft.get_peft_model(model, config).base_model.model[0], seed=seed)
            for row in report.rows:
                for name in ratios:
                    if row.check == "train, accuracy" and row.subject.startswith(name):
                        ratios[name].append(row.comparison.ratio)
        for name in ratios:
            assert geometric_mean(ratios[name]) < 1.1, ratios

    def test_an_enabled_layer_passes(self, model):
        dora_kernels.enable(model)
        check_layer(model.base_model.model[0]).raise_if_failed()

    def test_a_wrong_layer_fails(self, model, monkeypatch):
        from dora_kernels.adapters.peft.linear import DoraKernelsLinear

        forward = DoraKernelsLinear.forward
        monkeypatch.setattr(DoraKernelsLinear, "forward", lambda self, x: forward(self, x) * 1.01)
        with pytest.raises(AssertionError, match="rms error above"):
            check_layer(model.base_model.model[0]).raise_if_failed()

    def test_what_enable_leaves_alone_fails_with_the_reason(self, model):
        model.base_model.model[0].base_layer.weight.requires_grad_(True)
        with pytest.raises(AssertionError, match="the base weight requires a gradient"):
            check_layer(model.base_model.model[0]).raise_if_failed()
        with pytest.raises(AssertionError, match="no DoRA layer found"):
            check_layer(nn.Linear(4, 4)).raise_if_failed()

    def test_a_fresh_layer_as_it_is_tests_nothing(self, model):
        with pytest.raises(AssertionError, match="exact result is zero everywhere"):
            check_layer(model.base_model.model[0], randomise=False).raise_if_failed()
