"""A scaling that the accumulator cannot hold is refused, or its library's; right where the accumulator is float64."""

import math

import pytest
import torch
from torch import nn

import dora_kernels
from dora_kernels import DoraLinear, dora_linear, merge_weight, options, weight_norm
from dora_kernels.extras.serving import AdapterBank
from dora_kernels.functional.arguments import check_elements, check_number, check_probability
from dora_kernels.functional.rescale import rescale
from dora_kernels.functional.validate import check_scaling
from dora_kernels.reference import dora_linear_ref
from tests.support import restated_layers
from tests.support.problem import BACKENDS, DEVICE, Problem, core

M, N, K, R = 5, 8, 6, 2
LARGEST = torch.finfo(torch.float32).max
BEYOND = (1e39, -1e39, math.nextafter(LARGEST, math.inf), 1e308)
HALF_OR_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)


def arguments_of(dtype, scaling):
    problem = Problem.random(M, N, K, R, dtype)
    arguments = {name: value for name, value in vars(problem).items() if name not in ("dy", "x_dropped")}
    return arguments | {"scaling": scaling}


def entries(dtype, scaling):
    """Every function that takes a scaling, called with this one."""
    a = arguments_of(dtype, scaling)
    adapter = (a["weight"], a["lora_A"], a["lora_B"])
    base, low = a["x"] @ a["weight"].T, a["x"] @ a["lora_A"].T
    gain = a["magnitude"].to(torch.promote_types(dtype, torch.float32))
    return {
        "dora_linear": lambda: dora_linear(**a),
        "dora_linear, norm_grad": lambda: dora_linear(**a, norm_grad=True),
        "dora_linear, norm and dropout": lambda: core(**a, norm=gain, x_dropped=a["x"]),
        "weight_norm": lambda: weight_norm(*adapter, scaling),
        "merge_weight": lambda: merge_weight(*adapter, a["magnitude"], scaling),
        "rescale": lambda: rescale(base, low, a["lora_B"], gain, scaling),
        "AdapterBank.of": lambda: AdapterBank.of(a["weight"], [(*adapter[1:], a["magnitude"], scaling)]).gain,
        "DoraLinear": lambda: layer_of(a)(a["x"]),
    }


def layer_of(a):
    """A DoraLinear of these numbers."""
    rank, alpha = (R, R * a["scaling"]) if abs(a["scaling"]) < 1e300 else (1, a["scaling"])
    layer = DoraLinear(K, N, rank, alpha, dtype=a["weight"].dtype, device=DEVICE)
    layer.load_state_dict(
        {"weight": a["weight"], "bias": a["bias"], "lora_A.weight": a["lora_A"], "lora_B.weight": a["lora_B"]}
        | {"lora_magnitude_vector": a["magnitude"]}
    )
    return layer


def definitions(a):
    """What each of `entries` is to give, written out in float64."""
    update = a["weight"] + a["scaling"] * a["lora_B"] @ a["lora_A"]
    norm = update.square().sum(1).sqrt()
    gain = a["magnitude"] / norm
    return {
        "dora_linear": dora_linear_ref(**a),
        "dora_linear, norm and dropout": a["x"] @ update.T + a["bias"],  # the norm given is the magnitude
        "weight_norm": norm,
        "merge_weight": gain[:, None] * update,
        "rescale": a["magnitude"] * (a["x"] @ update.T),
        "AdapterBank.of": gain[None],
        "DoraLinear": dora_linear_ref(**a),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF_OR_FLOAT32)
def test_beyond_float32_is_refused(dtype, backend):
    for scaling in BEYOND:
        for name, call in entries(dtype, scaling).items():
            with (
                options(backend=backend),
                pytest.raises(ValueError, match=rf"{name.split(',')[0]}: .*scaling is"),
            ):
                call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_beyond_float32_is_right_in_float64(backend):
    if DEVICE == "cuda":
        pytest.skip("float64 kernels run in the interpreter only")
    for scaling in (1e39, -3.7e100):
        with options(backend=backend):
            a = arguments_of(torch.float64, scaling)
            calls, exact = entries(torch.float64, scaling), definitions(a)
            assert calls.keys() - exact.keys() == {"dora_linear, norm_grad"}  # here too, below
            for name, expected in exact.items():
                torch.testing.assert_close(calls[name](), expected, rtol=1e-9, atol=0, msg=name)
            leaves = [a[name].requires_grad_() for name in ("x", "lora_A", "lora_B", "magnitude", "bias")]
            for more in ({}, {"norm_grad": True}):
                actual, expected = dora_linear(**a, **more), dora_linear_ref(**a, **more)
                torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
                gradients = (torch.autograd.grad(y.square().sum(), leaves) for y in (actual, expected))
                for ours, exact in zip(*gradients, strict=True):
                    torch.testing.assert_close(ours, exact, rtol=1e-7, atol=1e-7 * float(exact.abs().max()))


def test_the_last_number_on_either_side():
    for dtype in (torch.float64, *HALF_OR_FLOAT32):
        largest = torch.finfo(torch.promote_types(dtype, torch.float32)).max
        for sign in (1, -1):
            assert check_scaling("f", sign * largest, dtype) == sign * largest
            assert check_number("f", "alpha", sign * torch.finfo(dtype).max, dtype) == sign * torch.finfo(dtype).max
            with pytest.raises(ValueError, match="f: scaling is"):
                check_scaling("f", math.nextafter(sign * largest, sign * math.inf), dtype)
            with pytest.raises(ValueError, match="f: alpha is"):
                check_number("f", "alpha", math.nextafter(sign * torch.finfo(dtype).max, sign * math.inf), dtype)
            for scaling in (sign * 2.0**-150, math.nextafter(sign * 2.0**-150, sign)):
                expected = scaling if dtype == torch.float64 else torch.tensor(scaling, dtype=torch.float64).float()
                assert (check_scaling("f", scaling, dtype) == 0) == (expected == 0)
    assert check_probability("f", "p", 0) == 0 and check_probability("f", "p", math.nextafter(1, 0)) < 1
    for p in (1, math.nextafter(0, -1)):
        with pytest.raises(ValueError, match="f: p is"):
            check_probability("f", "p", p)
    for rows, columns in ((2**60, 1), (1, 2**60), (2**30, 2**30), (0, 2**60)):
        check_elements("f", N=rows, K=columns)
    for rows, columns in ((2**60 + 1, 1), (0, 2**60 + 1), (2**60 + 1, 0), (2**30, 2**30 + 1)):
        with pytest.raises(ValueError, match="f: a matrix would be N x K, "):
            check_elements("f", N=rows, K=columns)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ("split", "merged"))
@pytest.mark.parametrize("dtype", HALF_OR_FLOAT32)
def test_the_largest_that_float32_holds(dtype, way, backend):
    """Its square is beyond: norm_grad's gradient must not need it. lora_B is small enough for a sensible product."""
    # float16 has no number small enough beside more than this, and few digits for it
    scaling, tolerance = (1e5, 0.1) if dtype == torch.float16 else (LARGEST, 16 * torch.finfo(dtype).eps)
    a = arguments_of(dtype, scaling)
    a["lora_B"] = (a["lora_B"].double() * 0.7 / scaling).to(dtype)
    assert a["lora_B"].abs().max() > 0
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in a.items()}
    names = ("x", "lora_A", "magnitude", "bias")
    for more in ({}, {"norm_grad": True}):
        results = []
        for values, function in ((a, dora_linear), (wide, dora_linear_ref)):
            leaves = [values[name].detach().requires_grad_() for name in names]
            with options(backend=backend, way=way):
                y = function(**values | dict(zip(names, leaves, strict=True)), **more)
            results.append((y, *torch.autograd.grad(y.sum(), leaves)))
        for actual, exact in zip(*results, strict=True):
            error = (actual.double() - exact).norm() / exact.norm()
            assert error < tolerance, (more, error)


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_small_for_float32_is_zero_there(backend):
    """A GEMM would skip the product, and 0 * inf is NaN: no row may hide the inf."""
    a = arguments_of(torch.float32, 1e-50)
    with options(backend=backend):
        for function in (dora_linear, lambda **a: dora_linear(**a, norm_grad=True)):
            assert torch.equal(function(**a), function(**a | {"scaling": 0.0}))
        a["lora_B"][3, 0] = math.inf
        y = dora_linear(**a)
        assert y[:, 3].isnan().all() and y[:, :3].isfinite().all()
    if DEVICE == "cpu":
        a = arguments_of(torch.float64, 1e-50)
        a["lora_B"] *= 1e50
        with options(backend=backend):
            torch.testing.assert_close(dora_linear(**a), dora_linear_ref(**a))


def test_one_that_was_set_on_a_layer_later():
    for dtype in HALF_OR_FLOAT32:
        layer = DoraLinear(K, N, R, 1.0, dtype=dtype, device=DEVICE)
        layer.scaling = 1e39
        with pytest.raises(ValueError, match="DoraLinear: scaling is 1e"):
            layer(torch.ones(M, K, dtype=dtype, device=DEVICE))


# Layers of other libraries: the library's forward has the call.


@pytest.mark.parametrize("base", ("linear", "convolution", "embedding"))
def test_peft_has_the_call(base, monkeypatch):
    peft = pytest.importorskip("peft")
    modules = {"linear": nn.Linear(K, N), "convolution": nn.Conv2d(K, N, 1), "embedding": nn.Embedding(9, K)}
    x = {"linear": torch.ones(2, K), "convolution": torch.ones(2, K, 3, 3), "embedding": torch.tensor([[1, 2]])}[base]
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(modules[base]), peft.LoraConfig(r=2, use_dora=True, target_modules=["0"]))
    assert len(dora_kernels.enable(model).taken_over) == 1
    layer = model.base_model.model[0]
    calls, library_forward = [], type(layer).library_forward
    monkeypatch.setattr(type(layer), "library_forward", lambda *a, **k: calls.append(1) or library_forward(*a, **k))
    model(x)
    assert not calls
    for scaling in (1e39, -1e39, math.inf, math.nan):
        layer.scaling["default"] = scaling
        ours, _ = outcome(model, x), calls.append("the library's own")
        assert calls[-2:] == [1, "the library's own"]
        report = dora_kernels.enable(model)
        assert "scaling is " in report.left_alone[0].reason
        theirs = outcome(model, x)
        assert type(ours) is type(theirs)
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, theirs, equal_nan=True)
        layer.scaling["default"] = 0.5
        assert len(dora_kernels.enable(model).taken_over) == 1


def outcome(model, x):
    """What the model returns, or the error that PyTorch makes of such a number inside the library."""
    try:
        return model(x)
    except RuntimeError as error:
        return error


def test_structures_have_the_call():
    layer = restated_layers.Llm.Linear(nn.Linear(K, N))
    model = nn.Sequential(layer)
    assert len(dora_kernels.enable(model).taken_over) == 1
    layer.scaling = 1e39
    adapter, reason = layer.read(layer)
    assert adapter is None and "scaling is 1e+39" in reason
    assert "scaling is 1e+39" in dora_kernels.enable(model).layers[0].reason
