"""Second derivatives of layers are those of the stock layers in float64, on every route by which they are asked for.

And what surrounds them: hooks, checkpointing, split backward passes, and that ordinary training knows nothing of it.
"""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, functional
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")

import dora_kernels
from dora_kernels import DoraLinear, DvoraLinear, VeraProjection, ops, options
from dora_kernels.extras.dvora import dvora_linear_ref
from dora_kernels.functional.autograd import SharedLow
from dora_kernels.testing.run import shared_dropout
from tests.support import library_layers, peft_problem, quantized_problem, shared_problem
from tests.support.derivative_routes import assert_equal, derivatives, grad, squares, weights
from tests.support.peft_problem import calls, enabled
from tests.support.problem import BACKENDS, DEVICE, definition
from tests.support.structure_cases import CASES as STRUCTURES

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="float64 kernels run in the interpreter only")
X = torch.linspace(-2, 2, 4 * 24, dtype=torch.float64).sin().view(2, 2, 24)


def linear(**config):
    return peft_problem.build(torch.float64, **config), X


def convolution(last=False, **config):
    return peft_problem.build_convolution(dtype=torch.float64, last=last, **config)


def tokens():
    return peft_problem.build_embedding(torch.float64), torch.tensor([[1, 3, 5, 3], [0, 12, 3, 7]])


LAYERS = {
    "linear": linear,
    "dropout": lambda: linear(lora_dropout=0.5),
    "a trained bias": lambda: linear(train_bias=True),
    "Conv1D, fan in first": lambda: linear(conv1d=True),
    "two adapters": lambda: linear(adapters=2),
    "three adapters, two with dropout": lambda: linear(adapters=3, lora_dropout=0.5),
    "conv2d": convolution,
    "conv2d, channels last, dropout": lambda: convolution(last=True, lora_dropout=0.5),
    "conv2d, two adapters": lambda: convolution(adapters=2),
    "conv1d": lambda: convolution(dims=1),
    "embedding": tokens,
}


def call_of(model, x, call=None):
    """y of a model, with the same dropout at every call."""

    def run():
        torch.manual_seed(3)
        with shared_dropout(3):
            return (call or (lambda model, x: model(x)))(model, x)

    return run


def found(model, x, call=None):
    """derivatives() in x and in what is trained."""
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if x.is_floating_point():
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        leaves.append(x)
    return derivatives(call_of(model, x, call), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_peft(name, backend):
    stock, x = LAYERS[name]()
    ours, before = enabled(stock), sum(ops.calls.values())
    with options(backend=backend):
        assert_equal(found(ours, x), found(stock, x), 1e-8)
    assert sum(ops.calls.values()) > before
    assert_equal(found(ours.eval(), x), found(stock.eval(), x), 1e-8)


@pytest.mark.parametrize("name", STRUCTURES)
def test_layers_known_by_structure(name):
    case = STRUCTURES[name]
    model, x = case.make(0, torch.float64)
    ours = copy.deepcopy(model)
    assert dora_kernels.enable(ours).taken_over
    assert_equal(found(ours, x, case.call), found(model, x, case.call), 1e-8)


def lycoris_linear():
    pytest.importorskip("lycoris")
    torch.manual_seed(0)
    return library_layers.Wrapped(nn.Linear(24, 10), torch.float64), X


def lycoris_convolution():
    pytest.importorskip("lycoris")
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3, padding=1)
    return library_layers.Wrapped(layer, torch.float64, wd_on_out=False), X[:, :1].expand(2, 4, 24).reshape(2, 4, 4, 6)


def torchtune():
    torch.manual_seed(0)
    return library_layers.torchtune_layer(10, 24, 3, torch.float64), X


@pytest.mark.parametrize("build", (lycoris_linear, lycoris_convolution, torchtune))
def test_other_libraries(build):
    model, x = build()
    ours = copy.deepcopy(model)
    assert dora_kernels.enable(ours).taken_over
    assert_equal(found(ours, x), found(model, x), 1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", (False, True))
def test_shared_inputs(autocast, backend):
    """Of low, made for q, k and v in one node, whose rows get no gradient there."""
    stock = shared_problem.attention(torch.float64)
    ours = shared_problem.shared(copy.deepcopy(stock))
    x, _ = shared_problem.batch(torch.float64)
    if autocast:  # float64 it leaves alone
        ours, x = ours.float(), x.float()

    def call(model, x):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=x.dtype == torch.float32):
            return model(x)

    made = calls("shared_low")
    with options(backend=backend):
        assert_equal(found(ours, x, call), found(stock, x.double()), 0.1 if autocast else 1e-8)
    assert calls("shared_low") > made


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantised(backend):
    stock = quantized_problem.build("nf4")
    twin, x = quantized_problem.dense(stock, torch.float32), X.float()
    with options(backend=backend):
        assert_equal(found(enabled(stock), x), found(twin.double(), X), 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", (0.0, 0.5))
def test_the_modules(dropout, backend):
    torch.manual_seed(0)
    layer = DoraLinear(24, 10, 3, 4.0, dropout=dropout, dtype=torch.float64)
    other = DvoraLinear(24, 10, VeraProjection(30, 20, 4, dtype=torch.float64), dropout=dropout, dtype=torch.float64)
    for module in (layer, other):
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data.uniform_(0.3, 1.0)

    def dropped(x):
        return nn.functional.dropout(x, dropout) if dropout else None

    def dora(_, x):
        return definition(layer, x, x_dropped=dropped(x))

    def dvora(_, x):
        arguments = (*other._vera(), other.vera_magnitude_vector, other.bias)
        return dvora_linear_ref(x, other.weight, *arguments, x_dropped=dropped(x))

    with options(backend=backend):
        assert_equal(found(layer, X), found(layer, X, dora))
        assert_equal(found(other, X), found(other, X, dvora))


class Defined(DvoraLinear):
    """The definition, in the place of a DvoraLinear."""

    def forward(self, x):
        return dvora_linear_ref(x, self.weight, *self._vera(), self.vera_magnitude_vector, self.bias)


@pytest.fixture(params=("linear", "conv2d", "shared", "dvora"))
def twins(request):
    """A stock model or the definition, ours, and x."""
    if request.param == "shared":
        stock = shared_problem.attention(torch.float64)
        return stock, shared_problem.shared(copy.deepcopy(stock)), shared_problem.batch(torch.float64)[0]
    if request.param == "dvora":
        torch.manual_seed(0)
        ours = DvoraLinear(24, 10, VeraProjection(30, 20, 4, dtype=torch.float64), dtype=torch.float64)
        for parameter in ours.parameters():
            parameter.data.uniform_(0.3, 1.0)
        stock = copy.deepcopy(ours)
        stock.__class__ = Defined
        return stock, ours, X
    stock, x = LAYERS[request.param]()
    return stock, enabled(stock), x.detach()


class TestRoutes:
    def test_functional(self, twins):
        """hessian, jacobian, vectorised or not, hvp and vhp, in x."""
        stock, ours, x = twins
        x = x[:1].contiguous()

        def loss(model):
            return lambda x: model(x).sin().sum()

        for vectorize in (False, True):
            hessians = [functional.hessian(loss(model), x, vectorize=vectorize) for model in (stock, ours)]
            assert hessians[0].abs().max() > 1e-3
            torch.testing.assert_close(hessians[1], hessians[0], rtol=1e-8, atol=1e-10)
            jacobians = [functional.jacobian(model, x, vectorize=vectorize) for model in (stock, ours)]
            torch.testing.assert_close(jacobians[1], jacobians[0], rtol=1e-8, atol=1e-10)
        for product in (functional.hvp, functional.vhp, functional.jvp):
            expected, actual = (product(loss(model), x, x.cos())[1] for model in (stock, ours))
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)

    def test_gradients_in_a_batch(self, twins):
        """is_grads_batched, functorch's vmap over autograd.grad, and both with a graph."""
        found = []
        for model in twins[:2]:
            leaves = [p for p in model.parameters() if p.requires_grad]
            x = twins[2].clone(memory_format=torch.preserve_format).requires_grad_()
            leaves.append(x)
            y = model(x)
            dys = torch.stack([weights(y) + shift for shift in range(3)])
            batch = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
            mapped = torch.func.vmap(lambda dy, y=y, to=leaves: torch.autograd.grad(y, to, dy, retain_graph=True))(dys)
            graph = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, create_graph=True)
            one = torch.autograd.grad(y, leaves, dys[1], retain_graph=True)
            found.append([*batch, *mapped, *graph, *grad(squares(graph), leaves)])
            torch.testing.assert_close([g[1] for g in batch], list(one), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-9)

    def test_a_dual_gradient(self, twins):
        """Forward-mode AD of a backward pass: the tangent of dy reaches every gradient, which are linear in dy."""
        _, model, x = twins
        leaves = [p for p in model.parameters() if p.requires_grad]
        y = model(x.clone(memory_format=torch.preserve_format).requires_grad_())
        dy, tangent = weights(y), torch.ones_like(y)
        expected = torch.autograd.grad(y, leaves, tangent, retain_graph=True)
        with forward_ad.dual_level():
            found = torch.autograd.grad(y, leaves, forward_ad.make_dual(dy, tangent), retain_graph=True)
            tangents = [forward_ad.unpack_dual(one).tangent for one in found]
        torch.testing.assert_close(tangents, list(expected), rtol=1e-8, atol=1e-10)

    def test_maml(self, twins):
        """Gradients through two inner steps."""
        found = []
        for model in twins[:2]:
            names = [name for name, p in model.named_parameters() if p.requires_grad]
            start = {name: model.get_parameter(name) for name in names}
            fast = dict(start)
            with torch.enable_grad():
                for _ in range(2):
                    loss = torch.func.functional_call(model, fast, (twins[2],)).square().mean()
                    steps = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                    fast = {name: p - 0.1 * step for (name, p), step in zip(fast.items(), steps, strict=True)}
                loss = torch.func.functional_call(model, fast, (twins[2],)).sin().mean()
            found.append([loss.detach(), *torch.autograd.grad(loss, list(start.values()))])
        torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-11)

    def test_inside_a_checkpoint(self, twins):
        stock, ours, x = twins
        assert_equal(found(ours, x, lambda model, x: checkpoint(model, x, use_reentrant=False)), found(stock, x), 1e-8)

    def test_hooks_fire_as_often_as_in_stock(self, twins):
        counts = []
        for model in twins[:2]:
            x = twins[2].clone(memory_format=torch.preserve_format).requires_grad_()
            fired = {}
            named = {n: p for n, p in model.named_parameters() if p.requires_grad} | {"x": x, "y": None}
            leaves = [tensor for tensor in named.values() if tensor is not None]
            h = x.clone()
            named["h"] = h
            y = named["y"] = model(h)
            for name, tensor in named.items():
                tensor.register_hook(lambda _, name=name, fired=fired: fired.update({name: fired.get(name, 0) + 1}))
            first = torch.autograd.grad(y.sin().sum(), [h, *leaves], create_graph=True)
            history = [dict(fired)]
            (squares(first) + y.sum()).backward()
            history.append(dict(fired))
            counts.append(history)
        assert counts[0] == counts[1]

    def test_retained_graphs(self, twins):
        """The same graph again gives the same bits, ordinary or recorded, in any order."""
        _, model, x = twins
        leaves = [p for p in model.parameters() if p.requires_grad]
        y = model(x.clone().requires_grad_())
        dy = weights(y)
        plain = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        recorded = torch.autograd.grad(y, leaves, dy, create_graph=True)
        again = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
        torch.testing.assert_close(list(recorded), list(plain), rtol=1e-9, atol=1e-11)
        second = grad(squares(recorded), leaves, retain_graph=True)
        assert any(one.any() for one in second)
        assert all(torch.equal(a, b) for a, b in zip(second, grad(squares(recorded), leaves), strict=True))


class TestWhatSurrounds:
    def test_split_backward(self, twins):
        """Zero-bubble pipelines make dx first, and the gradients of the parameters later, from the same graph."""
        from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

        _, model, x = twins
        parameters = [p for p in model.parameters() if p.requires_grad]
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = model(x)
        whole = torch.autograd.grad(y, [x, *parameters], weights(y))
        y = model(x)
        (dx,), groups = stage_backward_input([y], [weights(y)], [x], iter(parameters))
        assert torch.equal(dx, whole[0]) and all(p.grad is None for p in parameters)
        try:
            stage_backward_weight(iter(parameters), groups)
        except RuntimeError as error:
            if "'_input_metadata' is invalid" not in str(error):
                raise
            pytest.skip("this torch, 2.11 say, splits no backward pass at an autograd.Function")
        for parameter, expected in zip(parameters, whole[1:], strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-14)

    def test_an_optimizer_in_the_backward_pass(self, twins):
        """A step for each parameter as soon as its gradient is there, as memory-saving training does."""
        results = []
        for in_backward in (False, True):
            model = copy.deepcopy(twins[1])
            parameters = [p for p in model.parameters() if p.requires_grad]
            steps = {p: torch.optim.SGD([p], 0.1) for p in parameters}
            handles = []

            def step(parameter, steps=steps):
                steps[parameter].step()
                parameter.grad = None

            if in_backward:
                handles = [p.register_post_accumulate_grad_hook(step) for p in parameters]
            for _ in range(2):
                model(twins[2]).square().mean().backward()
                if not in_backward:
                    for parameter in parameters:
                        step(parameter)
            assert len(handles) == in_backward * len(parameters)
            results.append(parameters)
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))

    def test_an_ordinary_pass_is_our_operators(self, twins):
        """As many as ever, forward and backward; with create_graph=True only the forward ones."""
        _, model, x = twins
        leaves = [p for p in model.parameters() if p.requires_grad]

        def ran(**keywords):
            ops.calls.clear()
            torch.autograd.grad(model(x).sum(), leaves, **keywords)
            return {name: count for (name, _), count in ops.calls.items()}

        plain, recorded = ran(), ran(create_graph=True)
        backward = {name: count for name, count in plain.items() if name.endswith("backward")}
        assert sum(backward.values()) >= 1 and recorded == {n: c for n, c in plain.items() if n not in backward}


def test_an_x_that_was_changed_in_place():
    """Torch's own message, which names the tensor, in every layer that needs x; the right result where none does."""
    for name in ("linear", "shared", "conv2d"):
        stock, x = (shared_problem.attention(torch.float64), X) if name == "shared" else LAYERS[name]()
        ours = shared_problem.shared(copy.deepcopy(stock)) if name == "shared" else enabled(stock)
        messages = []
        for model in (stock, ours):
            h = x.detach().clone().requires_grad_() * 1
            y = model(h)
            h.add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation") as error:
                y.sum().backward()
            messages.append(str(error.value))
        for message in messages:
            assert "is at version 1; expected version 0" in message and "view was created" not in message


@pytest.mark.parametrize("transform", ("grad", "vmap", "vmap without gradients", "jvp", "vjp", "per sample", "dual"))
@pytest.mark.parametrize("layer", ("DoraLinear", "DvoraLinear"))
def test_transforms_of_torch_func_are_one_clear_line(layer, transform):
    torch.manual_seed(0)
    module = DoraLinear(5, 6, 2, 3.0) if layer == "DoraLinear" else DvoraLinear(5, 6, VeraProjection(8, 8, 3))
    x, tensors = torch.randn(3, 5), {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}

    def loss(tensors, x):
        return torch.func.functional_call(module, tensors, (x,)).sum()

    def dual():
        with forward_ad.dual_level():
            assert module(x).shape == (3, 6)  # what is no dual tensor may pass
            module(forward_ad.make_dual(x, x))

    run = {
        "grad": lambda: torch.func.grad(loss)(tensors, x),
        "vmap": lambda: torch.func.vmap(module)(x),
        "vmap without gradients": torch.no_grad()(lambda: torch.func.vmap(module)(x)),
        "jvp": lambda: torch.func.jvp(module, (x,), (x,)),
        "vjp": lambda: torch.func.vjp(module, x),
        "per sample": lambda: torch.func.vmap(torch.func.grad(loss), (None, 0))(tensors, x),
        "dual": dual,
    }[transform]
    for mode in (True, False):
        module.train(mode)
        with pytest.raises(
            NotImplementedError, match=f"^{layer}: called .*; expected neither: use torch.autograd"
        ) as error:
            run()
        assert "\n" not in str(error.value)


def test_functionalize_takes_operators_as_they_are():
    """make_fx is used with it: without gradients the operator is in the graph, with them no Function can be."""
    layer, x = DoraLinear(5, 6, 2, 3.0).requires_grad_(False), torch.randn(3, 5)
    with torch.no_grad():
        graph = make_fx(torch.func.functionalize(layer))(x)
        assert "dora_kernels.forward" in graph.code
        torch.testing.assert_close(graph(x), layer(x), rtol=0, atol=0)
    with pytest.raises(NotImplementedError, match="DoraLinear: called inside a transform of torch.func .functionalize"):
        torch.func.functionalize(layer)(x)


REFUSALS = {
    "eager": (NotImplementedError, "dora_kernels: create_graph=True in a backward pass that torch.compile has traced"),
    "aot_eager": (RuntimeError, "does not currently support double backward|requires create_graph=False"),
}


@pytest.mark.parametrize("backend", REFUSALS)
@pytest.mark.parametrize("kind", ("DoraLinear", "dvora"))
def test_of_a_compiled_layer_they_are_refused(kind, backend):
    """Under backend="eager" Dynamo runs the traced backward pass without gradients: its result would be a constant."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = dora_kernels.DoraLinear(6, 5, 2, 4.0)
    if kind == "dvora":
        layer = DvoraLinear(6, 5, VeraProjection(6, 5, 2))
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(3, 6, requires_grad=True)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)

    def gradient(call, create_graph):
        return torch.autograd.grad(call(x).square().sum(), x, create_graph=create_graph)[0]

    torch.testing.assert_close(gradient(compiled, False), gradient(layer, False))
    error, message = REFUSALS[backend]
    with pytest.raises(error, match=message):
        gradient(compiled, True).sum().backward()
    torch.testing.assert_close(gradient(compiled, False), gradient(layer, False))
    torch._dynamo.reset()


def test_rows_that_a_checkpoint_unpacks_for_a_group_go_with_the_backward_pass(monkeypatch):
    """Also where the gradient of lora_A is not asked for, and the node that they are shared through does not run."""
    ours, rows, unpack = shared_problem.shared(shared_problem.attention(torch.float64)), [], SharedLow.rows_of

    def watching(node):
        unpacked = unpack(node)
        rows.append(weakref.ref(unpacked))
        return unpacked

    monkeypatch.setattr(SharedLow, "rows_of", watching)
    x = shared_problem.batch(torch.float64)[0].detach().requires_grad_()
    y = checkpoint(lambda x: ours(x * 1), x, use_reentrant=False)
    (dx,) = torch.autograd.grad(y.sum(), x)
    rows.clear()
    y = checkpoint(lambda x: ours(x * 1), x, use_reentrant=False)
    (again,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(again, dx)
    del again
    gc.collect()
    assert y.requires_grad and len(rows) > 1 and not any(reference() is not None for reference in rows)
