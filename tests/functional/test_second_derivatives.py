"""The second and third derivatives of the functions are those of their definition, which autograd makes in float64."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import dora_kernels
from dora_kernels import options
from dora_kernels.extras.dvora import dvora_linear, dvora_linear_ref, norm_terms
from dora_kernels.functional.rescale import dora_linear_lora_dropout, rescale
from dora_kernels.quant import QuantizedWeight, frozen_product
from dora_kernels.reference import dora_linear_ref, row_norms
from dora_kernels.types import DoraWeight
from tests.support.derivative_routes import assert_equal, derivatives, grad, squares
from tests.support.problem import BACKENDS, DEVICE, EXACT_DTYPE, GRADIENTS, Problem, core

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="float64 kernels run in the interpreter only")


def leaves_of(problem: Problem, needs=GRADIENTS, names=(*GRADIENTS, "x_dropped")) -> dict[str, torch.Tensor]:
    """The tensors of a call by name, of which those in `needs` require gradients."""
    tensors = {name: getattr(problem, name) for name in names if getattr(problem, name) is not None}
    return {name: tensor.detach().clone().requires_grad_(name in needs) for name, tensor in tensors.items()}


def second(function, problem, needs=GRADIENTS, shape=None, **arguments):
    """derivatives() of a function with dora_linear's arguments."""
    leaves = leaves_of(problem, needs)
    given = dict(leaves)
    if shape is not None:
        given |= {name: given[name].view(*shape, -1) for name in ("x", "x_dropped") if name in given}
    given |= {"weight": problem.weight, "scaling": problem.scaling} | arguments
    return derivatives(lambda: function(**given), [leaf for leaf in leaves.values() if leaf.requires_grad])


def a_problem(M=4, dtype=EXACT_DTYPE, adapter_dtype=None, dropout=0.0, zero_row=True, **more) -> Problem:
    """With a row whose norm is 0."""
    torch.manual_seed(0)
    problem = Problem.random(M, 9, 7, 3, dtype, adapter_dtype, dropout=dropout, **more)
    if zero_row:
        problem.weight[2] = problem.lora_B[2] = 0
    return problem


@pytest.mark.parametrize("backend", BACKENDS)
class TestTheFunction:
    @pytest.mark.parametrize("dropout", (0.0, 0.5))
    @pytest.mark.parametrize("norm_grad", (False, True))
    @pytest.mark.parametrize("way", ("split", "merged"))
    def test_every_argument(self, way, norm_grad, dropout, backend):
        problem = a_problem(dropout=dropout)
        needs = (*GRADIENTS, "x_dropped")
        with options(backend=backend, way=way):
            ours = second(core, problem, needs, norm_grad=norm_grad)
        assert_equal(ours, second(dora_linear_ref, problem, needs, norm_grad=norm_grad))

    @pytest.mark.parametrize("shape", ((), (2, 2), (1, 4, 1)))
    def test_shapes_and_a_given_norm(self, shape, backend):
        problem = a_problem(M=4 if shape else 1)
        norm = torch.linalg.vector_norm(problem.weight, dim=1)
        with options(backend=backend):
            ours = second(core, problem, shape=shape, norm=norm)
        assert_equal(ours, second(dora_linear_ref, problem, shape=shape, norm=norm))

    @pytest.mark.parametrize(
        "needs",
        (("x",), ("x", "lora_B"), ("x", "magnitude"), ("lora_A", "lora_B"), ("lora_B", "magnitude"), ("x", "bias")),
    )
    def test_any_subset(self, needs, backend):
        """What is frozen is a constant; nothing has to be saved twice for it."""
        for norm_grad in (False, True):
            problem = a_problem()
            with options(backend=backend):
                ours = second(dora_kernels.dora_linear, problem, needs, norm_grad=norm_grad)
            assert_equal_or_zero(ours, second(dora_linear_ref, problem, needs, norm_grad=norm_grad))

    def test_strides_and_zero_rows(self, backend):
        problem = a_problem()
        problem.weight = problem.weight.T.contiguous().T
        problem.x = torch.cat([problem.x] * 2, 1)[:, ::2]
        with options(backend=backend):
            assert_equal(second(core, problem), second(dora_linear_ref, problem))
        problem = a_problem(M=0)
        with options(backend=backend):
            leaves = leaves_of(problem)
            y = core(**leaves, weight=problem.weight, scaling=1.0)
            first = grad(y.sum(), list(leaves.values()), create_graph=True)
            assert not any(one.any() for one in grad(squares(first), list(leaves.values())))

    @pytest.mark.parametrize(
        ("dtypes", "limit"),
        (
            ((torch.float32, torch.float32), 1e-4),
            ((torch.bfloat16, torch.bfloat16), 0.1),
            ((torch.bfloat16, torch.float32), 0.1),
            ((torch.float16, torch.float32), 0.02),
        ),
        ids=str,
    )
    def test_dtypes(self, dtypes, limit, backend):
        """Within the rounding of y and of the gradients, which both are of x's and the parameters' dtypes."""
        for dropout in (0.0, 0.5):
            problem = a_problem(32, *dtypes, dropout=dropout)
            exact = second(dora_linear_ref, problem.to(torch.float64), (*GRADIENTS, "x_dropped"))
            with options(backend=backend):
                ours = second(core, problem, (*GRADIENTS, "x_dropped"))
            assert_equal(ours, exact, limit)

    def test_autocast(self, backend):
        problem = a_problem(32, torch.float32)

        def function(**arguments):
            with torch.autocast(DEVICE, torch.bfloat16):
                return core(**arguments)

        with options(backend=backend):
            assert_equal(second(function, problem), second(dora_linear_ref, problem.to(torch.float64)), 0.1)
            # a backward pass inside of it, too
            with torch.autocast(DEVICE, torch.bfloat16):
                leaves = leaves_of(problem)
                y = core(**leaves, weight=problem.weight, scaling=1.0)
                first = torch.autograd.grad(y.sum(), list(leaves.values()), create_graph=True)
        assert all(one.dtype == torch.float32 for one in first)

    def test_dropout_on_the_low_rank_product(self, backend):
        problem = a_problem(dropout=0.5)
        norm = torch.linalg.vector_norm(problem.weight, dim=1)

        def definition(x, x_dropped, weight, lora_A, lora_B, magnitude, scaling, bias, norm):
            gain = torch.where(norm == 0, 0, magnitude / torch.where(norm == 0, 1, norm))
            return gain * (x @ weight.T + scaling * x_dropped @ lora_A.T @ lora_B.T) + bias

        def function(x, x_dropped, weight, lora_A, lora_B, magnitude, scaling, bias, norm):
            layer = DoraWeight(weight, lora_A, lora_B, magnitude, scaling)
            return dora_linear_lora_dropout(x, x_dropped, layer, bias, norm)

        with options(backend=backend):
            ours = second(function, problem, norm=norm)
        assert_equal(ours, second(definition, problem, norm=norm))

    @pytest.mark.parametrize("norm_grad", (False, True))
    def test_the_norm_alone(self, norm_grad, backend):
        problem = a_problem()
        leaves = list(leaves_of(problem, names=("lora_A", "lora_B")).values())

        def ours():
            return dora_kernels.weight_norm(problem.weight, *leaves, 0.5, norm_grad=norm_grad) * leaves[1].sum()

        def exact():
            norm = row_norms(problem.weight + 0.5 * leaves[1] @ leaves[0])
            return (norm if norm_grad else norm.detach()) * leaves[1].sum()

        with options(backend=backend):
            assert_equal(derivatives(ours, leaves), derivatives(exact, leaves))


def test_row_norms_by_finite_differences():
    """The one step of the definition that is not torch's own, of rows that are not 0; of those that are, 0."""
    matrix = a_problem().weight.requires_grad_()
    rows = [0, 1, 3]
    assert torch.autograd.gradgradcheck(lambda m: row_norms(m[rows]), matrix)
    first = grad(row_norms(matrix).square().sum() + row_norms(matrix).sum(), [matrix], create_graph=True)
    (second,) = grad(squares(first), [matrix])
    assert not first[0][2].any() and not second[2].any() and second.isfinite().all() and second[3].any()


def assert_equal_or_zero(ours, exact):
    """As assert_equal, where a route may have no derivative at all."""
    for route, tensors in exact.items():
        if any(one.any() for one in tensors):
            assert_equal({route: ours[route]}, {route: tensors})
        else:
            assert not any(one.any() for one in ours[route])


@pytest.mark.parametrize("backend", BACKENDS)
class TestDvora:
    @pytest.mark.parametrize("case", ("plain", "terms", "norm_grad", "norm_grad over terms", "dropout"))
    def test_every_argument(self, case, backend):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, dtype=EXACT_DTYPE, generator=generator)

        frozen = {"weight": normal(9, 7), "vera_A": normal(3, 7), "vera_B": normal(9, 3)}
        names = {"x": (4, 7), "lambda_d": (3,), "lambda_b": (9,), "magnitude": (9,), "bias": (9,)}
        leaves = {name: normal(*shape).requires_grad_() for name, shape in names.items()}
        more = {"norm_grad": "norm_grad" in case}
        terms = norm_terms(frozen["weight"], frozen["vera_A"]) if "terms" in case else None
        mask = (normal(4, 7) > 0).to(EXACT_DTYPE) if case == "dropout" else None

        def arguments():
            dropped = {} if mask is None else {"x_dropped": leaves["x"] * mask}
            return frozen | leaves | more | dropped

        with options(backend=backend):
            ours = derivatives(lambda: dvora_linear(**arguments(), terms=terms), list(leaves.values()))
        exact = derivatives(lambda: dvora_linear_ref(**arguments()), list(leaves.values()))
        assert_equal(ours, exact)


def test_a_product_with_a_quantised_weight():
    packed, scale = torch.randint(-127, 127, (9, 7), dtype=torch.int8), torch.rand(9)
    weight = QuantizedWeight("row8", (9, 7), torch.float32, (packed, scale))
    x = torch.randn(4, 7, requires_grad=True)
    ours = derivatives(lambda: frozen_product(x, weight), [x])
    assert_equal(ours, derivatives(lambda: F.linear(x, weight.dequantize()), [x]), 1e-5)


@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("trained", ("lora_A", "lora_B", "magnitude"))
def test_no_copy_of_x_is_held_for_it(trained, autocast):
    """Where lora_A is trained, the rows that dA is made from; elsewhere x itself, and nothing where x alone has one."""
    problem = a_problem(32, torch.float32)

    def held(*needs):
        leaves, saved = leaves_of(problem, needs), []
        leaves["x"] = leaves["x"].detach().view(2, 16, 7).requires_grad_("x" in needs)
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
            torch.autocast(DEVICE, torch.bfloat16, enabled=autocast),
        ):
            y = core(**leaves, weight=problem.weight, scaling=1.0)
        assert y.requires_grad
        rows = [t for t in saved if t.numel() == 32 * 7 and t.shape != (9, 7)]
        return leaves["x"], rows

    assert not held("x")[1] and not held("bias")[1]
    x, rows = held("x", trained)
    assert len(rows) == 1
    copied = autocast and trained == "lora_A"
    assert (rows[0].data_ptr() != x.data_ptr()) == copied and (rows[0].dtype == torch.bfloat16) == copied


def changed(function, frozen=("lora_A",), create_graph=False, change=True):
    """y and the gradients where x is changed in place after the call; and whether x is freed by the backward pass."""
    problem = a_problem(dtype=torch.float32)
    leaves = leaves_of(problem, [name for name in GRADIENTS if name not in frozen])
    h = leaves["x"] * 1
    y = function(**leaves | {"x": h}, weight=problem.weight, scaling=problem.scaling)
    if change:
        h.mul_(2)
    alive = weakref.ref(h)
    del h
    trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
    first = torch.autograd.grad(y.square().sum(), trained, create_graph=create_graph)
    if create_graph:
        return torch.autograd.grad(sum(one.square().sum() for one in first), trained)
    assert alive() is None, "held longer than its graph's other tensors"
    return y, *first


def test_x_may_change_in_place_where_lora_A_is_frozen():
    """As with PEFT's formula over a frozen lora_A, which saves no x; a second derivative needs it, and says so."""
    function = dora_kernels.dora_linear
    torch.testing.assert_close(changed(function), changed(dora_linear_ref, change=False), rtol=1e-4, atol=1e-5)
    expected = changed(dora_linear_ref, create_graph=True, change=False)
    torch.testing.assert_close(changed(function, create_graph=True, change=False), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation: x of a DoRA layer is at version 1"):
        changed(function, create_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed(function, frozen=())


@pytest.mark.parametrize("function", ("dora_linear", "rescale"))
def test_the_bias_alone_is_trained(function):
    """Its gradient is dy's sum, and dy has a derivative."""
    problem = a_problem(dtype=torch.float32)
    leaves = leaves_of(problem, ("bias",))
    if function == "dora_linear":
        y = dora_kernels.dora_linear(**leaves, weight=problem.weight, scaling=problem.scaling)
    else:
        base, low = leaves["x"] @ problem.weight.T, leaves["x"] @ leaves["lora_A"].T
        y = rescale(base, low, leaves["lora_B"], leaves["magnitude"], 1.5, leaves["bias"])
    (first,) = torch.autograd.grad(y.pow(3).sum(), leaves["bias"], create_graph=True)
    (again,) = torch.autograd.grad(first.sum(), leaves["bias"])
    flat = y.detach().reshape(-1, y.shape[-1])
    torch.testing.assert_close(first, 3 * flat.square().sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, 6 * flat.sum(0), rtol=1e-4, atol=1e-4)


def test_a_frozen_lora_A_under_hooks_that_copy_what_is_saved():
    """The copy of an x that was written to before the call is at another version than x."""
    problem, found = a_problem(dtype=torch.float32), []
    for function in (dora_kernels.dora_linear, dora_linear_ref):
        leaves = leaves_of(problem, ("x", "lora_B", "magnitude"))
        trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
        leaves["x"] = (leaves["x"] * 1).mul_(2).mul_(0.5)
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
            y = function(**leaves, weight=problem.weight, scaling=problem.scaling)
        first = torch.autograd.grad(y.square().sum(), trained, create_graph=True)
        found.append(torch.autograd.grad(sum(one.square().sum() for one in first), trained))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_a_checkpointed_call_with_a_frozen_lora_A(use_reentrant):
    def called(function):
        def call(x, weight, scaling, **adapter):
            return checkpoint(lambda x: function(x * 1, weight, **adapter, scaling=scaling), x, use_reentrant=False)

        def reentrant(x, weight, scaling, **adapter):
            return checkpoint(lambda x: function(x, weight, **adapter, scaling=scaling), x, use_reentrant=True)

        return reentrant if use_reentrant else call

    function = dora_kernels.dora_linear
    if not use_reentrant:  # torch refuses autograd.grad through a reentrant region
        for create_graph in (False, True):
            expected = changed(dora_linear_ref, create_graph=create_graph, change=False)
            found = changed(called(function), create_graph=create_graph, change=False)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        return
    problem, gradients = a_problem(dtype=torch.float32), []
    for one in (called(function), dora_linear_ref):
        leaves = leaves_of(problem, [name for name in GRADIENTS if name != "lora_A"])
        one(**leaves, weight=problem.weight, scaling=problem.scaling).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves.values()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_an_x_of_inference_mode_where_lora_A_is_frozen():
    problem = a_problem(dtype=torch.float32)
    leaves = leaves_of(problem, ("lora_B", "magnitude"))
    with torch.inference_mode():
        leaves["x"] = leaves["x"] * 1
    given = {"weight": problem.weight, "scaling": problem.scaling}
    trained = [leaves["lora_B"], leaves["magnitude"]]
    ours = torch.autograd.grad(dora_kernels.dora_linear(**leaves, **given).sum(), trained)
    leaves["x"] = problem.x
    torch.testing.assert_close(ours, torch.autograd.grad(dora_linear_ref(**leaves, **given).sum(), trained))
