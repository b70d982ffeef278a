"""DVoRA as a function and as a module, against its dense definition in float64."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import dora_kernels
from dora_kernels import DvoraLinear, VeraProjection, ops, options, reuse
from dora_kernels.extras import dvora
from dora_kernels.extras.dvora import dvora_linear, dvora_linear_ref, dvora_norm, norm_terms
from dora_kernels.testing import compare
from tests.support.problem import BACKENDS, DEVICE, DTYPES, EXACT_DTYPE, TOLERANCE

# ragged; R > K; one token, one rank; more rows than a block of the kernels
SHAPES = ((17, 40, 36, 6), (7, 9, 4, 13), (1, 12, 10, 1), (33, 70, 50, 20))
LEAVES = ("x", "lambda_d", "lambda_b", "magnitude", "bias")


def inputs(M, N, K, R, dtype=EXACT_DTYPE, adapter_dtype=None, seed=0, zero_row=True):
    """An update as large as the weight, a gain between 0.5 and 2, and a row that is zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)

    weight, vera_A, vera_B = normal(N, K, scale=K**-0.5), normal(R, K, scale=K**-0.5), normal(N, R, scale=R**-0.5)
    lambda_d, lambda_b = normal(R), normal(N)
    if zero_row:
        weight[-1], lambda_b[-1] = 0, 0
    norm = torch.linalg.vector_norm(weight + (lambda_b[:, None] * vera_B) @ (lambda_d[:, None] * vera_A), dim=1)
    magnitude = (norm + zero_row * (norm == 0)) * 2 ** normal(N).tanh()
    tensors = {"x": normal(M, K), "weight": weight, "bias": normal(N), "dy": normal(M, N)}
    adapter = {"vera_A": vera_A, "vera_B": vera_B, "lambda_d": lambda_d, "lambda_b": lambda_b, "magnitude": magnitude}
    made = {name: tensor.to(DEVICE, dtype) for name, tensor in tensors.items()}
    return made | {name: tensor.to(DEVICE, adapter_dtype or dtype) for name, tensor in adapter.items()}


def run(function, problem, **arguments):
    """y and the gradient of every leaf, by name."""
    leaves = {name: t.detach().requires_grad_(name in LEAVES) for name, t in problem.items() if name != "dy"}
    y = function(**leaves, **arguments)
    gradients = torch.autograd.grad(y, [leaves[name] for name in LEAVES], problem["dy"].to(y.dtype))
    return {"y": y.detach()} | dict(zip(LEAVES, gradients, strict=True))


def double(problem):
    return {name: tensor.double() for name, tensor in problem.items()}


def assert_as_good(problem, actual, through=None, **arguments):
    """Each tensor within the bound of what plain PyTorch makes in the same dtypes."""
    exact, yardstick = (run(dvora_linear_ref, p, **arguments) for p in (double(problem), problem))
    for name, value in actual.items():
        # base is rounded to the weight's dtype, and dmagnitude is made from it; so is all else that goes through a norm
        coarse = name != "y" and (name == "magnitude" or arguments.get("norm_grad"))
        comparison = compare(name, value, yardstick[name], exact[name], problem["weight"].dtype if coarse else None)
        assert comparison.ok and comparison.limit < 0.3, comparison


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_terms", (False, True))
@pytest.mark.parametrize("norm_grad", (False, True))
def test_definition(norm_grad, with_terms, backend):
    for shape in SHAPES:
        problem = inputs(*shape)
        terms = norm_terms(problem["weight"], problem["vera_A"]) if with_terms else None
        with options(backend=backend):
            actual = run(dvora_linear, problem, terms=terms, norm_grad=norm_grad)
        expected = run(dvora_linear_ref, double(problem), norm_grad=norm_grad)
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], **TOLERANCE, msg=lambda m, at=(name, shape): f"{at}: {m}")
        assert not actual["magnitude"][-1] and torch.equal(actual["y"][:, -1], problem["bias"][-1].expand(shape[0]))
    other = run(dvora_linear_ref, double(problem), norm_grad=not norm_grad)
    assert not torch.allclose(actual["lambda_d"].double(), other["lambda_d"], rtol=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_terms", (False, True))
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_errors(dtypes, with_terms, backend):
    for shape, norm_grad in ((SHAPES[0], False), (SHAPES[1], True)):
        problem = inputs(*shape, *dtypes, zero_row=False)
        terms = norm_terms(problem["weight"], problem["vera_A"]) if with_terms else None
        with options(backend=backend):
            actual = run(dvora_linear, problem, terms=terms, norm_grad=norm_grad)
        assert_as_good(problem, actual, norm_grad=norm_grad)


@pytest.mark.parametrize("norm_grad", (False, True))
def test_the_terms_of_the_norm_stay_float32_under_autocast(norm_grad):
    """They are no weights of a GEMM."""
    problem = inputs(1, 64, 48, 12, torch.float32)
    tensors = [problem[name] for name in ("weight", "vera_A", "vera_B", "lambda_d", "lambda_b")]
    terms = norm_terms(*tensors[:2])
    expected = dvora_norm(*tensors, terms=terms, norm_grad=norm_grad)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(dvora_norm(*tensors, terms=terms, norm_grad=norm_grad), expected)
        assert not torch.equal(dvora_norm(*tensors, norm_grad=norm_grad), dvora_norm(*tensors, terms=terms))


@pytest.mark.parametrize("update", (0.0, 1e-3, 1.0, 1e3))
def test_the_norm_from_its_terms_is_as_good_as_from_the_weight(update):
    problem = inputs(1, 64, 48, 12, torch.float32)
    problem["lambda_b"] *= update
    names = ("weight", "vera_A", "vera_B", "lambda_d", "lambda_b")
    tensors = [problem[name] for name in names]
    exact = dvora_norm(*(tensor.double() for tensor in tensors))
    terms = norm_terms(problem["weight"], problem["vera_A"])
    comparison = compare("norm", dvora_norm(*tensors, terms=terms), dvora_norm(*tensors), exact)
    assert comparison.ok, comparison


def test_the_norm_from_its_terms_where_the_update_cancels_the_weight():
    """weight = -update to three digits: there the squares, expanded, would have lost six digits of seven."""
    problem = inputs(1, 64, 48, 12, torch.float32, zero_row=False)
    names = ("vera_A", "vera_B", "lambda_d", "lambda_b")
    adapter = [problem[name] for name in names]
    lora_A, lora_B = dvora.function.dvora_update(*adapter)
    weight = 1e-3 * problem["weight"] - lora_B @ lora_A
    exact = dvora_norm(weight.double(), *(tensor.double() for tensor in adapter))
    direct, ours = dvora_norm(weight, *adapter), dvora_norm(weight, *adapter, terms=norm_terms(weight, lora_A))
    comparison = compare("norm", ours, direct, exact)
    assert comparison.ok and comparison.error < 1e-4, comparison
    square = weight.square().sum(1) + 2 * (lora_B * (weight @ lora_A.T)).sum(1) + (lora_B @ lora_A).square().sum(1)
    assert not compare("expanded", square.clamp_min(0).sqrt(), direct, exact).ok


def test_the_terms_of_fewer_rows_than_the_rank():
    """What lies outside the space of vera_A belongs to a row, however few there are."""
    problem = inputs(1, 3, 19, 7, torch.float64, zero_row=False)
    tensors = [problem[name] for name in ("weight", "vera_A", "vera_B", "lambda_d", "lambda_b")]
    torch.testing.assert_close(dvora_norm(*tensors, terms=norm_terms(*tensors[:2])), dvora_norm(*tensors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_narrower_than_x_are_widened(backend):
    problem = inputs(17, 40, 36, 6, torch.float32, torch.bfloat16, zero_row=False)
    problem["lambda_b"] = torch.ones_like(problem["lambda_b"])  # its product with vera_B is not rounded then
    wide = problem | {name: problem[name].float() for name in ("vera_A", "vera_B", "lambda_d", "lambda_b", "magnitude")}
    norm = wide["magnitude"] + 1
    with options(backend=backend):
        actual, expected = run(dvora_linear, problem, norm=norm), run(dvora_linear, wide, norm=norm)
    for name in ("y", "x", "bias"):
        assert torch.equal(actual[name], expected[name]), name


def test_which_terms_are_small():
    """N (P + 1) numbers of the norm's dtype in a quarter of the weight's bytes: K is 8 (P + 1), or 4, and one less."""
    for dtype, R, K in ((torch.bfloat16, 3, 32), (torch.float32, 3, 16), (torch.float64, 1, 8)):
        weight, vera_A = torch.empty(5, K, dtype=dtype), torch.empty(R, K)
        assert dvora.function.terms_are_small(weight, vera_A)
        assert not dvora.function.terms_are_small(weight[:, 1:].contiguous(), vera_A[:, 1:])
        # more rows than columns are a basis of no more than the columns
        assert not dvora.function.terms_are_small(weight, torch.empty(2 * K, K))


def test_a_training_step_under_another_default_device():
    """What reads the weight to keep the terms of its norm makes vectors of its own, where the weight is."""
    layer = DvoraLinear(96, 80, VeraProjection(96, 80, 3, device=DEVICE), device=DEVICE)
    x = torch.randn(5, 96, device=DEVICE)
    expected = layer(x)
    reuse.constants._vectors.cache_clear()
    with torch.device("meta"):
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("with_terms", (False, True))
def test_the_norm_is_a_constant_unless_its_gradient_is_asked_for(with_terms):
    problem = inputs(1, 19, 18, 7)
    tensors = [problem[name] for name in ("weight", "vera_A", "vera_B", "lambda_d", "lambda_b")]
    tensors[3].requires_grad_()
    terms = norm_terms(*tensors[:2]) if with_terms else None
    for norm_grad in (False, True):
        assert dvora_norm(*tensors, terms=terms, norm_grad=norm_grad).requires_grad == norm_grad
        with torch.no_grad():
            assert not dvora_norm(*tensors, terms=terms, norm_grad=norm_grad).requires_grad
    assert not dvora_norm(*tensors, terms=terms).requires_grad


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 kernels run in the interpreter only")
@pytest.mark.parametrize("with_terms", (False, True))
def test_gradcheck_on_the_kernel_code(with_terms):
    problem = inputs(4, 19, 18, 17, zero_row=False)
    terms = norm_terms(problem["weight"], problem["vera_A"]) if with_terms else None

    def function(*leaves):
        with options(backend="triton"):
            arguments = problem | dict(zip(LEAVES, leaves, strict=True))
            arguments.pop("dy")
            return dvora_linear(**arguments, terms=terms, norm_grad=True)

    leaves = [problem[name].requires_grad_() for name in LEAVES]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_that_of_dora(backend):
    problem = inputs(17, 40, 36, 6)
    plain = run(dvora_linear_ref, double(problem))
    dropped = nn.functional.dropout(problem["x"], 0.5)
    with options(backend=backend):
        actual = run(dvora_linear, problem, x_dropped=dropped)
    expected = run(dvora_linear_ref, double(problem), x_dropped=dropped.double())
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], **TOLERANCE)
    assert not torch.allclose(actual["y"].double(), plain["y"], rtol=0.1)


def test_dropout_is_rounded_once():
    """As the definition, which float32 adapters take to float32, rounds it: a base added to a rounded y would show."""
    for shape in SHAPES:
        problem = inputs(*shape, torch.bfloat16, torch.float32, zero_row=False)
        dropped = nn.functional.dropout(problem["x"], 0.5)
        yardstick = run(dvora_linear_ref, problem, x_dropped=dropped)["y"]
        exact = run(dvora_linear_ref, double(problem), x_dropped=dropped.double())["y"]
        comparison = compare("y", run(dvora_linear, problem, x_dropped=dropped)["y"], yardstick, exact)
        assert comparison.error < 1.1 * comparison.yardstick < 0.01, (shape, comparison)


def test_no_gradient_is_made_for_the_frozen_matrices():
    """Products there are for dx, dlow and dB alone, and none of vera_A's shape (R, K) or weight's (N, K)."""
    problem = inputs(17, 40, 36, 6)
    problem["x"].requires_grad_()
    for name in ("lambda_d", "lambda_b", "magnitude"):
        problem[name].requires_grad_()
    dy = problem.pop("dy")
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if "mm" in function.__name__:
                made.append(tuple(result.shape))
            return result

    terms = norm_terms(problem["weight"], problem["vera_A"])
    y = dvora_linear(**problem, terms=terms)
    with Watch():
        y.backward(dy)
    assert set(made) <= {(17, 36), (17, 6), (40, 6)} and made.count((17, 36)) == 2, made


@pytest.mark.parametrize("quantized", ("nf4", "int8"))
def test_quantised_weight(quantized):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(128, 72)
    if quantized == "nf4":
        packed = bitsandbytes.nn.Linear4bit(128, 72, quant_type="nf4", compute_dtype=torch.float32)
    else:
        packed = bitsandbytes.nn.Linear8bitLt(128, 72, has_fp16_weights=False)
    packed.load_state_dict(linear.state_dict())
    layer = DvoraLinear.from_linear(packed.to(DEVICE), VeraProjection(200, 100, 8, device=DEVICE))
    weight = layer.base()[0].dequantize(dtype=torch.float32)
    with torch.no_grad():
        layer.vera_lambda_b.normal_()
        layer.vera_magnitude_vector.mul_(1.5)
    x = torch.randn(5, 128, device=DEVICE, requires_grad=True)
    arguments = (weight, *layer._vera(), layer.vera_magnitude_vector, layer.base_layer.bias.float())
    expected = dvora_linear_ref(x, *arguments)
    leaves = (x, layer.vera_lambda_d, layer.vera_lambda_b, layer.vera_magnitude_vector)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    for _ in range(2):
        y = layer(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        got = torch.autograd.grad(y.square().sum(), leaves)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.02)  # the merged weight is in the stored dtype
    layer.unmerge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"lambda_d": torch.ones(3)}, r"dvora_linear: lambda_d has shape \(3,\) but .*; expected lambda_d \(2,\)"),
        ({"lambda_b": torch.ones(3)}, r"dvora_linear: lambda_b has shape \(3,\) but .*; expected lambda_b \(4,\)"),
        ({"vera_B": torch.ones(4, 3)}, r"dvora_linear: vera_B has shape \(4, 3\)"),
        ({"vera_A": torch.ones(2, 6)}, r"dvora_linear: vera_A has shape \(2, 6\)"),
        ({"vera_A": torch.ones(2, 5, requires_grad=True)}, "dvora_linear: vera_A.requires_grad is True"),
        ({"weight": torch.ones(4, 5, requires_grad=True)}, "dvora_linear: weight.requires_grad is True"),
        ({"magnitude": torch.ones(5)}, r"dvora_linear: magnitude has shape \(5,\)"),
        ({"x": torch.ones(3, 6)}, r"dvora_linear: x has shape \(3, 6\)"),
        ({"x": torch.ones(3, 5).double()}, "dvora_linear: x is torch.float64 but weight is torch.float32"),
        ({"lambda_b": 3}, "dvora_linear: lambda_b is 3; expected a torch.Tensor"),
        ({"norm_grad": 1}, "dvora_linear: norm_grad is 1"),
    ),
    ids=str,
)
def test_bad_input(change, message):
    good = {"x": torch.ones(3, 5), "weight": torch.ones(4, 5), "vera_A": torch.ones(2, 5), "vera_B": torch.ones(4, 2)}
    good |= {"lambda_d": torch.ones(2), "lambda_b": torch.ones(4), "magnitude": torch.ones(4)}
    dvora_linear(**good)
    with pytest.raises(ValueError, match=message):
        dvora_linear(**(good | change))


def test_terms_that_do_not_fit():
    tensors = tuple(
        inputs(1, 6, 5, 2, torch.float32)[name] for name in ("weight", "vera_A", "vera_B", "lambda_d", "lambda_b")
    )
    terms = norm_terms(*tensors[:2])
    dvora_norm(*tensors, terms=terms)
    for name, tensor in terms._asdict().items():
        for wrong in (tensor[:-1], tensor[:, :-1], tensor.flatten(), tensor.double(), tensor.clone().requires_grad_()):
            with pytest.raises(ValueError, match=rf"dvora_norm: terms.{name} is torch.float"):
                dvora_norm(*tensors, terms=terms._replace(**{name: wrong}))
        for wrong in (None, tensor.int(), tensor.to("meta")):
            with pytest.raises(ValueError, match=rf"dvora_norm: terms.{name} is "):
                dvora_norm(*tensors, terms=terms._replace(**{name: wrong}))
    with pytest.raises(ValueError, match="dvora_norm: terms is tuple; expected norm_terms"):
        dvora_norm(*tensors, terms=tuple(terms))


# the module


@pytest.fixture
def layer():
    """A layer after some training; small enough an R for its terms to be kept."""
    torch.manual_seed(0)
    layer = DvoraLinear(48, 40, VeraProjection(60, 50, 6, device=DEVICE), device=DEVICE)
    with torch.no_grad():
        layer.vera_lambda_b.normal_()
        layer.vera_magnitude_vector.mul_(1 + torch.rand(40, device=DEVICE))
    return layer


def definition(layer, x):
    return dvora_linear_ref(x, layer.weight, *layer._vera(), layer.vera_magnitude_vector, layer.bias)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"d_initial": "a"}, "d_initial is 'a'; expected a finite Python number"),
        ({"d_initial": float("inf")}, "d_initial is inf; expected a finite Python number"),
        ({"d_initial": None}, "d_initial is None; expected a finite Python number"),
        ({"dropout": "a"}, r"dropout is 'a'; expected a probability in \[0, 1\)"),
        ({"dropout": 1}, r"dropout is 1; expected a probability in \[0, 1\)"),
        ({"dropout": float("nan")}, r"dropout is nan; expected a probability in \[0, 1\)"),
    ),
    ids=str,
)
def test_bad_numbers(arguments, message):
    linear, projection = nn.Linear(4, 4, device=DEVICE), VeraProjection(4, 4, 2, device=DEVICE)
    with pytest.raises(ValueError, match=f"DvoraLinear: {message}"):
        DvoraLinear(4, 4, projection, **arguments)
    with pytest.raises(ValueError, match=f"DvoraLinear.from_linear: {message}"):
        DvoraLinear.from_linear(linear, projection, **arguments)
    assert linear.weight.requires_grad


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_fresh_layer_is_its_linear(dtype):
    linear = nn.Linear(24, 20, dtype=dtype, device=DEVICE)
    layer = DvoraLinear.from_linear(linear, VeraProjection(24, 20, 4, device=DEVICE))
    x = torch.randn(5, 24, dtype=dtype, device=DEVICE)
    limit = 2 * torch.finfo(dtype).eps * linear(x).abs().max().item()
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=limit)
    assert layer.weight is linear.weight
    trained = {name: p.dtype for name, p in layer.named_parameters() if p.requires_grad}
    names = ("vera_lambda_d", "vera_lambda_b", "vera_magnitude_vector")
    assert trained == dict.fromkeys(names, torch.float32)
    assert layer.vera_lambda_d.unique().tolist() == [pytest.approx(0.1)]


@pytest.fixture
def made(monkeypatch):
    """Grows by one whenever terms are made."""
    made = []
    monkeypatch.setattr(dvora.function, "norm_terms", lambda *a: made.append(None) or norm_terms(*a))
    return made


def test_terms_are_made_once_and_outlive_training_steps(layer, made):
    x, target = torch.randn(32, 48, device=DEVICE), torch.randn(32, 40, device=DEVICE)
    twin = copy.deepcopy(layer)
    histories = []
    for model, function in ((layer, lambda x: layer(x)), (twin, lambda x: definition(twin, x))):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(10):
            model.train()
            loss = (function(x) - target).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        histories.append(losses)
    ours, dense = histories
    assert len(made) == 1
    assert ours[-1] < 0.9 * ours[0]
    assert ours == pytest.approx(dense, rel=1e-5)


def change_in_place(layer):
    layer.weight.mul_(2)


def load(layer):
    layer.load_state_dict({name: 2 * tensor for name, tensor in layer.state_dict().items()})


def replace(layer):
    layer.weight = nn.Parameter(3 * layer.weight, requires_grad=False)


def write_behind(layer):
    layer.weight.data.view(-1)[:] = layer.weight.data.view(-1).flip(0)


def write_behind_vera_A(layer):
    layer.projection.vera_A.data[2, 5] *= 1.001


def write_one_ulp(layer):
    row = layer.weight.data[3]
    row[7] = torch.nextafter(row[7], row[7] + 1)


def test_the_same_call_gives_the_same_bits(layer):
    """From the first call on, in each mode: with terms the norm is rounded otherwise."""
    x = torch.randn(64, 48, device=DEVICE)
    terms, factors = norm_terms(layer.weight, layer._vera()[0]), layer._vera()
    assert not torch.equal(dvora_norm(layer.weight, *factors, terms=terms), dvora_norm(layer.weight, *factors))
    outputs = {True: [], False: []}
    for training in (False, True, True, False, True):
        layer.train(training)
        outputs[training] += [layer(x) for _ in range(3)]
    for first, *others in outputs.values():
        assert all(torch.equal(first, other) for other in others)


def test_terms_of_a_weight_that_moves_are_made_once(layer, made):
    """Its numbers count, and not where they are."""
    x = torch.randn(5, 48, device=DEVICE)
    for _ in range(4):
        for _ in range(2 if len(made) else 1):
            torch.testing.assert_close(layer(x), definition(layer, x))
        layer.weight.data = layer.weight.data.clone()
    assert len(made) == 1
    dora_kernels.invalidate(layer)
    layer(x)
    assert len(made) == 2


CHANGES = (
    change_in_place, load, replace, write_behind, write_behind_vera_A, write_one_ulp, lambda layer: layer.double()
)  # fmt: skip


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("change", CHANGES)
def test_terms_are_made_again_after(change, training, layer, made):
    layer.train(training)
    x = torch.randn(5, 48, device=DEVICE)
    for _ in range(3):
        layer(x)
    assert len(made) == training  # see dvora_linear_reusing
    with torch.no_grad():
        change(layer)
    x = x.to(layer.weight.dtype)
    for _ in range(3):
        torch.testing.assert_close(layer(x), definition(layer, x))
    assert len(made) == 2 * training


def test_terms_that_would_be_large_are_not_kept(made):
    layer = DvoraLinear(48, 40, VeraProjection(48, 40, 24, device=DEVICE), device=DEVICE)
    x = torch.randn(5, 48, device=DEVICE)
    for _ in range(3):
        torch.testing.assert_close(layer(x), definition(layer, x))
    assert not made
    assert not dvora.function.terms_are_small(layer.weight, layer.projection.vera_A)


def test_the_weight_is_not_read_for_the_norm(layer, monkeypatch):
    """The norm operator sees (N, R + 1) in place of the weight."""
    seen = []
    norm = ops.OPERATORS["norm"]
    monkeypatch.setitem(ops.OPERATORS, "norm", lambda tensors, *a: seen.append(tensors[0].shape) or norm(tensors, *a))
    for _ in range(3):
        layer(torch.randn(5, 48, device=DEVICE))
    assert seen == [(40, 7)] * 3


def test_terms_made_in_inference_mode_serve_training(layer):
    x = torch.randn(5, 48, device=DEVICE)
    with torch.inference_mode():
        layer(x), layer(x)
    terms = reuse.store.constants[layer].value
    assert not terms.weight.is_inference() and not terms.vera_A.is_inference()
    layer(x).sum().backward()
    assert layer.vera_lambda_d.grad is not None


def gradients(layer, function, x):
    with torch.autocast(DEVICE, torch.bfloat16):
        y = function(x)
    names = ("vera_lambda_d", "vera_lambda_b", "vera_magnitude_vector")
    leaves = [getattr(layer, name) for name in names]
    made = torch.autograd.grad(y.double().square().sum(), leaves)
    return {"y": y.detach()} | dict(zip(names, made, strict=True))


@pytest.mark.parametrize("compiled", (False, True))
def test_autocast_and_compile(layer, compiled):
    x = torch.randn(64, 48, device=DEVICE)
    function = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    actual = gradients(layer, function, x)
    yardstick = gradients(layer, lambda x: definition(layer, x).to(torch.bfloat16), x)
    exact = copy.deepcopy(layer).double()
    exact = gradients(exact, lambda x: definition(exact, x), x.double())
    assert actual["y"].dtype == torch.bfloat16
    for name, value in actual.items():
        comparison = compare(name, value, yardstick[name], exact[name], torch.bfloat16)
        assert comparison.ok and comparison.limit < 0.1, comparison


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_merge_and_unmerge(layer, dtype):
    layer = layer.to(dtype)
    x = torch.randn(5, 48, device=DEVICE, dtype=dtype)
    before, weight, y = layer.weight.clone(), layer.weight, layer(x)
    layer.merge()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), y, rtol=0, atol=20 * eps)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
    assert layer.merged and layer.weight is weight and not torch.allclose(weight, before, rtol=0.1)
    with pytest.raises(ValueError, match="DvoraLinear.state_dict: the layer is merged"):
        layer.state_dict()
    layer.unmerge()
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=8 * eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_merge_does_not_see_autocast(layer, backend):
    plain, before = copy.deepcopy(layer), layer.weight.clone()
    with options(backend=backend):
        plain.merge()
        with torch.autocast(DEVICE, torch.bfloat16):
            layer.merge()
            assert torch.equal(layer.weight, plain.weight) and not torch.allclose(layer.weight, before, rtol=0.1)
            layer.unmerge()
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=1e-6)


def test_unmerge_refuses_a_lost_row(layer):
    with torch.no_grad():
        layer.vera_magnitude_vector[3] = 0
    layer.merge()
    with pytest.raises(ValueError, match="DvoraLinear.unmerge: 1 of 40 rows were merged with gain 0"):
        layer.unmerge()
    assert layer.merged


@pytest.mark.parametrize("save", (True, False))
def test_state_dict(layer, save):
    layer.projection = VeraProjection(60, 50, 6, seed=3, save=save, device=DEVICE)
    state = layer.state_dict()
    names = {"weight", "bias", "vera_lambda_d", "vera_lambda_b", "vera_magnitude_vector"}
    assert set(state) == names | ({"projection.vera_A", "projection.vera_B"} if save else set())
    seed = 0 if save else 3
    other = DvoraLinear(48, 40, VeraProjection(60, 50, 6, seed=seed, save=save, device=DEVICE), device=DEVICE)
    x = torch.randn(5, 48, device=DEVICE)
    other(x), other(x)
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), layer(x))
    torch.testing.assert_close(other(x), definition(layer, x))


def test_the_projection_stays_shared():
    projection = VeraProjection(30, 40, 4, device=DEVICE)
    model = nn.Sequential(*(DvoraLinear(*size, projection, device=DEVICE) for size in ((20, 30), (30, 40))))
    for other in (model, copy.deepcopy(model), copy.deepcopy(model).double(), copy.deepcopy(model).half()):
        first, second = (layer._vera() for layer in other)
        assert first[0].data_ptr() == second[0].data_ptr() and first[1].data_ptr() == second[1].data_ptr()
        assert len({buffer.data_ptr() for buffer in other.buffers()}) == 2
        assert first[0].dtype == other[0].weight.dtype
    assert copy.deepcopy(model)[0].projection.vera_A.data_ptr() != projection.vera_A.data_ptr()


def test_the_norm_is_kept_in_a_scope_and_by_checkpointing(layer, monkeypatch):
    made = []
    norm = dvora.function._norm
    monkeypatch.setattr(dvora.function, "_norm", lambda *a, **k: made.append(None) or norm(*a, **k))
    x = torch.randn(5, 48, device=DEVICE)
    layer(x), layer(x)
    assert len(made) == 2
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert len(made) == 3
    layer.eval()
    layer(x), layer(x)
    assert len(made) == 5
    with dora_kernels.frozen_adapters(layer):
        layer(x), layer(x)
    assert len(made) == 6


def test_where_numbers_are_not_read_a_scope_keeps_from_its_first_step_on(layer):
    """As on a GPU: here of a vector, which nobody reads. Before the step the scope keeps the norm itself."""
    vector, made = torch.ones(7, device=DEVICE), []

    def constant():
        return reuse.constant_reusing(layer, (vector,), lambda: made.append(None) or vector.sum())

    def step():
        layer.vera_lambda_b.grad = torch.ones_like(layer.vera_lambda_b)
        torch.optim.SGD([layer.vera_lambda_b], lr=0.1).step()

    step()
    assert constant() is None
    with dora_kernels.frozen_adapters(layer):
        assert constant() is None
        step()
        assert constant() == 7 == constant() and len(made) == 1
        step()
        with dora_kernels.frozen_adapters(layer):
            assert constant() == 7 and len(made) == 1
            step()
        assert constant() == 7 and len(made) == 1
        vector.mul_(2)
        assert constant() == 14 and len(made) == 2
        vector.data.mul_(2)
        dora_kernels.invalidate(layer)
        assert constant() == 28 and len(made) == 3
    assert constant() is None and layer not in reuse.store.constants


@pytest.mark.parametrize(
    ("build", "message"),
    (
        (lambda: VeraProjection(8, 8, 0), "VeraProjection: rank is 0; expected a positive int"),
        (
            lambda: DvoraLinear(9, 8, VeraProjection(8, 8, 2)),
            "DvoraLinear: .* in_features is 9 and out_features 8; expected",
        ),
        (lambda: DvoraLinear(8, 8, "p"), "DvoraLinear: projection is 'p'; expected a VeraProjection"),
        (lambda: DvoraLinear(8, 8, VeraProjection(8, 8, 2), dropout=1.0), "DvoraLinear: dropout is 1.0"),
        (lambda: DvoraLinear(8, 8, VeraProjection(8, 8, 2), float("nan")), "DvoraLinear: d_initial is nan"),
        (
            lambda: DvoraLinear.from_linear(nn.Conv1d(8, 8, 1), VeraProjection(8, 8, 2)),
            "DvoraLinear.from_linear: linear is Conv1d",
        ),
    ),
)
def test_bad_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def selective(function, x, saved=torch.ops.aten.mm.default):
    """function(x), checkpointed: what matrix products return is saved, everything else computed again."""

    def policy(context, operator, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if operator == saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, x, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize("calls_before", (0, 2))
def test_selective_checkpointing(layer, made, calls_before):
    """It takes the n-th product for the n-th it saved: no terms may be made in one pass and not in the other."""
    x = torch.randn(5, 48, device=DEVICE, requires_grad=True)
    leaves = (x, layer.vera_lambda_d, layer.vera_lambda_b, layer.vera_magnitude_vector)
    expected = torch.autograd.grad(definition(layer, x).square().sum(), leaves)
    for _ in range(calls_before):
        layer(x)
    before = len(made)
    actual = torch.autograd.grad(selective(layer, x).square().sum(), leaves)
    torch.testing.assert_close(actual, expected)
    assert len(made) == before


@pytest.mark.parametrize("use_reentrant", (False, True))
@pytest.mark.parametrize("moved", (False, True))
def test_a_backward_pass_makes_no_terms(layer, made, moved, use_reentrant):
    x = torch.randn(5, 48, device=DEVICE, requires_grad=True)
    for _ in range(3 * moved):
        layer(x)
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    before = len(made)
    with torch.no_grad():
        layer.vera_lambda_b.add_(0)  # the norm that was kept is another version's
        if moved:
            layer.weight.data = layer.weight.data.clone()
    y.sum().backward()
    assert len(made) == before and layer.vera_magnitude_vector.grad is not None
