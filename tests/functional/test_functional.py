"""dora_linear and its gradients against float64, in every dtype, both ways, on both backends."""

import dataclasses
import gc
import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dora_kernels
from dora_kernels import ops, options
from dora_kernels.planning import devices
from dora_kernels.reference import dora_linear_ref
from dora_kernels.testing import MEAN_RATIO, geometric_mean, rms_error
from tests.support.problem import BACKENDS, DEVICE, DTYPES, EXACT_DTYPE, GRADIENTS, TOLERANCE, Problem, core

# M, N, K, R: each shape is here for one thing that the others do not have
SHAPES = (
    (33, 70, 90, 20),  # every axis ragged, several tiles and splits, R in two chunks
    (64, 64, 64, 16),  # every axis a multiple of the tiles
    (5, 40, 33, 1),  # rank 1, odd strides (no vector loads)
    (7, 24, 10, 17),  # rank above K
    (1, 1, 1, 1),
    (1, 50, 64, 8),  # decode
    (96, 3, 130, 5),  # fewer rows than a tile, many columns
)
# whose tensors have enough elements for a ratio of errors to mean something
LARGE_SHAPES = SHAPES[:2]
WAYS = ("split", "merged")


def ids(value: object) -> str:
    if isinstance(value, tuple):
        return "-".join(map(ids, value))
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=ids)
def test_as_exact_as_pytorch(dtypes, way, backend):
    ratios = []
    for seed, shape in enumerate(SHAPES):
        problem = Problem.random(*shape, *dtypes, seed=seed)
        comparisons = problem.comparisons(problem.ours(backend, way))
        assert all(comparison.ok for comparison in comparisons), (shape, comparisons)
        if shape in LARGE_SHAPES:
            ratios += [comparison.ratio for comparison in comparisons]
    if way == "merged" and dtypes[0] != dtypes[1]:
        return  # asked for by name only: the merged weight rounds the wider adapters (see plan.saved_tensor)
    assert geometric_mean(ratios) <= MEAN_RATIO


@pytest.mark.parametrize("dtypes", DTYPES, ids=ids)
def test_the_bound_rejects_zeros_and_a_wrong_gain(dtypes):
    problem = Problem.random(33, 70, 90, 20, *dtypes)
    actual = problem.ours("reference")
    assert all(comparison.ok for comparison in problem.comparisons(actual))
    for wrong in (lambda value: 0 * value, lambda value: 1.05 * value):
        comparisons = problem.comparisons({name: wrong(value) for name, value in actual.items()})
        assert not any(comparison.ok for comparison in comparisons), comparisons


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arguments", ({"norm_grad": True}, {"dropout": 0.4}), ids=("norm_grad", "dropout"))
@pytest.mark.parametrize("dtypes", DTYPES, ids=ids)
def test_through_the_norm_and_under_dropout(dtypes, arguments, way, backend):
    dropout = arguments.get("dropout", 0.0)
    arguments = {name: value for name, value in arguments.items() if name != "dropout"}
    problem = Problem.random(33, 70, 90, 20, *dtypes, dropout=dropout)
    comparisons = problem.comparisons(problem.ours(backend, way, **arguments), **arguments)
    assert all(comparison.ok for comparison in comparisons), comparisons


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_precision_keeps_a_small_adapter_visible(backend):
    # |scaling * B A| = 5e-4 |W| is below a rounding of base in bf16, and above one of float32
    problem = Problem.random(33, 70, 90, 4, torch.bfloat16, torch.float32)
    problem.lora_B *= 5e-4
    problem.magnitude = problem.magnitude / problem.magnitude * problem.weight.float().norm(dim=1)
    comparisons = problem.comparisons(problem.ours(backend, precision="exact"))
    assert all(comparison.ok for comparison in comparisons), comparisons
    # dmagnitude is a sum of dy * base: exact keeps base in float32, so its error is float32's and not bf16's
    auto, exact = (problem.ours(backend, "split", precision) for precision in ("auto", "exact"))
    truth = problem.exact()["magnitude"]
    assert (exact["magnitude"] - truth).norm() < 0.01 * (auto["magnitude"] - truth).norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", (0.0, 0.4))
def test_exact_precision_rounds_the_output_once(dropout, backend):
    problem = Problem.random(33, 70, 90, 4, torch.bfloat16, torch.float32, dropout=dropout)
    exact = problem.exact()["y"]
    once = rms_error(exact.to(torch.bfloat16), exact)
    assert rms_error(problem.ours(backend, precision="exact")["y"], exact) < 1.02 * once
    assert rms_error(problem.ours(backend)["y"], exact) > 1.1 * once


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=ids)
def test_inference(dtypes, way, backend):
    """With no gradient wanted a merged weight carries the gain, and is rounded with it."""
    problem = Problem.random(33, 70, 90, 20, *dtypes)
    comparisons = problem.comparisons(problem.ours(backend, way, needs=()), needs=())
    assert [comparison.name for comparison in comparisons] == ["y"] and comparisons[0].ok, comparisons


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("given_norm", (False, True), ids=("through_the_norm", "given_norm"))
@pytest.mark.parametrize("shape", ((6, 35, 34, 17), (3, 4, 40, 1)), ids=ids)
def test_gradcheck_on_the_kernel_code(shape, given_norm, way):
    """Finite differences in float64: with the norm as an input (it is detached otherwise), and through the norm."""
    if DEVICE == "cuda":
        pytest.skip("float64 kernels run in the interpreter only")
    problem = Problem.random(*shape)
    norm = torch.linalg.vector_norm(problem.weight, dim=1) if given_norm else None

    def function(x, lora_A, lora_B, magnitude, bias):
        with options(backend="triton", way=way):
            return core(x, problem.weight, lora_A, lora_B, magnitude, 0.75, bias, norm=norm, norm_grad=not given_norm)

    inputs = [getattr(problem, name).requires_grad_() for name in GRADIENTS]
    before = ops.calls["backward", "triton"]
    # fast mode: one random direction a gradient instead of every element, a second instead of minutes
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert ops.calls["backward", "triton"] > before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "needs", [(name,) for name in GRADIENTS] + [("x", "lora_B"), ("lora_A", "magnitude"), ()], ids=ids
)
def test_any_subset_of_gradients(needs, way, backend):
    problem = Problem.random(17, 40, 36, 6)
    actual, exact = problem.ours(backend, way, needs=needs), problem.exact(needs=needs)
    assert actual.keys() == {"y", *needs}
    for name in actual:
        torch.testing.assert_close(actual[name], exact[name], **TOLERANCE)


def saved_tensors(problem: Problem, needs: tuple[str, ...], way: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output of a call and what it saved for its backward pass."""
    saved = []
    x, lora_A, lora_B, magnitude, bias = (
        getattr(problem, name).detach().clone().requires_grad_(name in needs) for name in GRADIENTS
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        with options(way=way):
            y = dora_kernels.dora_linear(x, problem.weight, lora_A, lora_B, magnitude, 0.75, bias)
    return y, saved


@pytest.mark.parametrize("way", WAYS)
def test_only_what_the_backward_needs_is_saved(way):
    problem = Problem.random(64, 48, 40, 6, torch.float32)

    def shapes(*needs: str) -> list[tuple[int, ...]]:
        return sorted(tuple(tensor.shape) for tensor in saved_tensors(problem, needs, way)[1] if tensor.dim() == 2)

    adapter = [(48, 40), (6, 40), (48, 6)]  # weight, lora_A, lora_B: already there
    low, x, kept = (64, 6), (64, 40), (64, 48)
    assert shapes("x") == sorted(adapter)
    assert shapes("bias") == sorted(adapter)
    assert shapes("lora_A") == sorted([*adapter, x])
    # x for second derivatives alone: a reference to what the caller has
    assert shapes("lora_B") == sorted([*adapter, low, x])
    assert shapes("magnitude") == sorted([*adapter, kept, x] + ([low] if way == "split" else []))
    assert shapes(*GRADIENTS) == sorted([*adapter, low, x, kept])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_an_overwritten_output_does_not_reach_the_backward(way, backend):
    """Fused RoPE and SwiGLU kernels write into a projection's output through its pointer, unseen by autograd."""
    problem = Problem.random(16, 40, 36, 6)

    def overwritten(*arguments, **keywords):
        y = core(*arguments, **keywords)
        y.data.fill_(math.nan)
        return y

    with options(backend=backend, way=way):
        actual = problem.run(overwritten)
    exact = problem.exact()
    for name in GRADIENTS:
        torch.testing.assert_close(actual[name], exact[name], **TOLERANCE)


def test_saved_tensors_are_freed_with_the_graph():
    y, saved = saved_tensors(Problem.random(64, 48, 40, 6, torch.float32), GRADIENTS, "split")
    references = [weakref.ref(tensor) for tensor in saved if tensor.dim() == 2 and tensor.shape[0] == 64]
    assert references
    del saved, y
    gc.collect()
    assert not any(reference() is not None for reference in references)


def test_a_pass_is_one_operator():
    """Autograd fills no gradients for norm and gain, which have none: that would be two launches on a GPU."""

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if not operator.is_view and operator is not torch.ops.aten._unsafe_view.default:
                called.append(operator._schema.name)
            return operator(*args, **(kwargs or {}))

    called: list[str] = []
    with Operators():
        Problem.random(5, 40, 36, 6, torch.float32).run(core)
    own = [name for name in called if name.startswith("dora_kernels::")]
    assert own == ["dora_kernels::forward", "dora_kernels::backward"]
    assert called[called.index("dora_kernels::forward") :] == own


def test_an_output_without_a_gradient_gives_none():
    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    problem = Problem.random(5, 40, 36, 6, torch.float32)
    leaf = problem.x.clone().requires_grad_()
    y = dora_kernels.dora_linear(leaf, problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, 0.75)
    NoGradient.apply(y).sum().backward()
    assert leaf.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_strided_inputs(way, backend):
    problem = Problem.random(18, 40, 36, 6)
    exact = problem.exact()
    problem.x = torch.empty(36, 18, dtype=EXACT_DTYPE, device=DEVICE).T.copy_(problem.x)
    problem.weight = torch.empty(36, 40, dtype=EXACT_DTYPE, device=DEVICE).T.copy_(problem.weight)  # fan_in_fan_out
    problem.lora_A = torch.empty(6, 72, dtype=EXACT_DTYPE, device=DEVICE)[:, ::2].copy_(problem.lora_A)
    problem.lora_B = torch.empty(6, 40, dtype=EXACT_DTYPE, device=DEVICE).T.copy_(problem.lora_B)
    problem.magnitude = torch.empty(80, dtype=EXACT_DTYPE, device=DEVICE)[::2].copy_(problem.magnitude)
    problem.bias = torch.empty(80, dtype=EXACT_DTYPE, device=DEVICE)[::2].copy_(problem.bias)
    problem.dy = torch.empty(40, 18, dtype=EXACT_DTYPE, device=DEVICE).T.copy_(problem.dy)
    actual = problem.ours(backend, way)
    for name in actual:
        torch.testing.assert_close(actual[name], exact[name], **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_strided_norm_and_gain(way, backend):
    problem = Problem.random(18, 40, 36, 6)
    norm = torch.linalg.vector_norm(problem.weight, dim=1)
    given = {"norm": norm, "gain": problem.magnitude / norm}
    strided = {name: torch.stack((value, 0 * value), 1)[:, 0] for name, value in given.items()}
    expected, actual = (problem.ours(backend, way, **arguments) for arguments in (given, strided))
    for name in actual:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=ids)
def test_a_given_norm_of_another_dtype(dtype, backend):
    """Is the same norm in float32."""
    problem = Problem.random(17, 40, 36, 6, torch.float32)
    given = (problem.magnitude + 1).to(dtype)
    actual, expected = problem.ours(backend, norm=given), problem.ours(backend, norm=given.float())
    for name in actual:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_gradient(backend):
    """y.sum() sends a gradient of stride 0 down."""
    problem = Problem.random(18, 40, 36, 6)
    problem.dy = torch.ones((), dtype=EXACT_DTYPE, device=DEVICE).expand(18, 40)
    actual, exact = problem.ours(backend), problem.exact()
    for name in actual:
        torch.testing.assert_close(actual[name], exact[name], **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", ((), (1,), (2, 3), (2, 1, 3), (0,), (2, 0)), ids=str)
def test_any_leading_shape(lead, backend):
    problem = Problem.random(math.prod(lead), 40, 36, 6)
    exact = problem.exact()
    problem.x, problem.dy = problem.x.reshape(*lead, 36), problem.dy.reshape(*lead, 40)
    actual = problem.ours(backend)
    assert actual["y"].shape == (*lead, 40) and actual["x"].shape == (*lead, 36)
    for name in actual:
        torch.testing.assert_close(actual[name].reshape(exact[name].shape), exact[name], **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ((4, 0, 5, 2), (4, 5, 0, 2), (4, 5, 6, 0)), ids=ids)
def test_empty_features_and_rank_zero(shape, backend):
    problem = Problem.random(*shape)
    actual, exact = problem.ours(backend), problem.exact()
    for name in actual:
        torch.testing.assert_close(actual[name], exact[name], **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("norm_grad", (False, True))
def test_a_zero_row(norm_grad, way, backend):
    """norm 0: gain 0, the output is the bias, all gradients finite and those of the row's B and magnitude zero."""
    problem = Problem.random(9, 40, 36, 6, torch.float32)
    problem.weight[3] = 0
    problem.lora_B[3] = 0
    actual = problem.ours(backend, way, norm_grad=norm_grad)
    assert all(tensor.isfinite().all() for tensor in actual.values())
    torch.testing.assert_close(actual["y"][:, 3], problem.bias[3].expand(9))
    assert actual["magnitude"][3] == 0 and (actual["lora_B"][3] == 0).all()
    assert actual["magnitude"][4] != 0 and (actual["lora_B"][4] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=ids)
def test_bitwise_the_same_twice(dtype, way, backend):
    problem = Problem.random(70, 70, 90, 20, dtype)
    first, second = problem.ours(backend, way), problem.ours(backend, way)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_norm_is_float32_under_cancellation():
    """|W + s B A| = 1e-3 |W|: the norm is taken from the sum, so it loses 1e-4 of itself and not all of it."""
    problem = Problem.random(1, 48, 64, 16, torch.float32)
    adapter = 0.75 * problem.lora_B.double() @ problem.lora_A.double()
    noise = torch.randn_like(adapter)
    problem.weight = (-adapter + 1e-3 * noise * (adapter.norm() / noise.norm())).float()
    exact = torch.linalg.vector_norm(problem.weight.double() + adapter, dim=1)
    for backend in BACKENDS:
        with options(backend=backend):
            norm = dora_kernels.weight_norm(problem.weight, problem.lora_A, problem.lora_B, 0.75)
        assert norm.dtype == torch.float32
        torch.testing.assert_close(norm.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=ids)
def test_weight_norm_and_merge_weight(dtypes, backend):
    problem = Problem.random(1, 70, 90, 20, *dtypes)
    arguments = (problem.weight, problem.lora_A, problem.lora_B)
    direction = problem.weight.double() + 0.75 * problem.lora_B.double() @ problem.lora_A.double()
    exact_norm = torch.linalg.vector_norm(direction, dim=1)
    exact_merged = (problem.magnitude.double() / exact_norm)[:, None] * direction
    with options(backend=backend):
        norm = dora_kernels.weight_norm(*arguments, 0.75)
        merged = dora_kernels.merge_weight(*arguments, problem.magnitude, 0.75)
    assert norm.dtype == torch.float32 and merged.dtype == problem.weight.dtype
    torch.testing.assert_close(norm.double(), exact_norm, rtol=5e-7, atol=0)
    torch.testing.assert_close(merged.double(), exact_merged, rtol=torch.finfo(merged.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16), ids=ids)
@pytest.mark.parametrize("weight_dtype", (torch.float32, "half"), ids=str)
def test_autocast(weight_dtype, half, backend):
    """Dtypes as nn.Linear's under autocast, gradients in the dtype of their leaf."""
    problem = Problem.random(17, 40, 36, 6, torch.float32)
    problem.weight = problem.weight.to(half if weight_dtype == "half" else weight_dtype)
    exact = problem.exact()
    with torch.autocast(DEVICE, dtype=half):
        linear = torch.nn.functional.linear(problem.x, problem.weight)
        actual = problem.ours(backend)
    assert actual["y"].dtype == linear.dtype == half
    for name in actual:
        if name != "y":
            assert actual[name].dtype == torch.float32, name
        error = (actual[name].double() - exact[name]).norm() / exact[name].norm()
        # three roundings in a row at most (x or dy, an operand, the result)
        assert error < 3 * torch.finfo(half).eps / 2, name


def of_weight_norm(problem):
    leaves = [tensor.detach().requires_grad_() for tensor in (problem.lora_A, problem.lora_B)]
    norm = dora_kernels.weight_norm(problem.weight, *leaves, problem.scaling, norm_grad=True)
    return norm.detach(), *torch.autograd.grad(norm, leaves, problem.magnitude)


def of_merge_weight(problem):
    names = ("weight", "lora_A", "lora_B", "magnitude", "scaling")
    return (dora_kernels.merge_weight(*(getattr(problem, name) for name in names)),)


def of_dora_linear(problem):
    return tuple(problem.run(core).values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("function", "dropout", "names"),
    (
        (of_weight_norm, 0.0, ("lora_A", "lora_B")),
        (of_merge_weight, 0.0, ("lora_A", "lora_B")),
        (of_dora_linear, 0.0, ("x", "weight", "lora_A", "lora_B", "bias")),
        (of_dora_linear, 0.4, ("x", "x_dropped", "weight", "lora_A", "lora_B", "bias")),
    ),
    ids=("weight_norm", "merge_weight", "dora_linear", "dropout"),
)
def test_autocast_takes_of_each_operand_what_its_dtype_holds(function, dropout, names, backend):
    """The same bits for operands that were rounded before: none enters wider than the others."""
    torch.manual_seed(0)
    problem = Problem.random(17, 40, 36, 6, torch.float32, dropout=dropout)
    rounded = dataclasses.replace(problem, **{name: getattr(problem, name).bfloat16().float() for name in names})
    with torch.autocast(DEVICE, dtype=torch.bfloat16), options(backend=backend):
        results = [function(either) for either in (problem, rounded)]
    assert all(torch.equal(actual, expected) for actual, expected in zip(*results, strict=True))
    wide = function(problem)
    assert not any(torch.equal(actual.float(), other) for actual, other in zip(results[0], wide, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", (0.0, 0.4))
def test_adapters_narrower_than_x_are_widened(dropout, backend):
    """float32 over bfloat16 is PEFT's default; this is the other way round, and loses nothing."""
    torch.manual_seed(0)
    problem = Problem.random(17, 40, 36, 6, torch.float32, torch.bfloat16, dropout=dropout)
    wide = dataclasses.replace(problem, lora_A=problem.lora_A.float(), lora_B=problem.lora_B.float())
    actual, expected = problem.ours(backend), wide.ours(backend)
    for name in actual:
        assert torch.equal(actual[name], expected[name].to(actual[name].dtype)), name


def test_backward_inside_autocast():
    problem = Problem.random(17, 40, 36, 6, torch.float32)
    expected = problem.ours("auto")
    x = problem.x.clone().requires_grad_()
    y = dora_kernels.dora_linear(
        x, problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, 0.75, problem.bias
    )
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        (dx,) = torch.autograd.grad(y, x, problem.dy)
    assert torch.equal(dx, expected["x"])


def test_torch_compile_keeps_the_operators():
    problem = Problem.random(12, 40, 36, 6, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(core, fullgraph=True, backend="aot_eager")
    before = dict(ops.calls)
    actual, expected = problem.run(compiled), problem.ours("auto")
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name])
    assert sum(ops.calls.values()) - sum(before.values()) == 4


def test_a_named_backend_never_falls_back():
    if DEVICE == "cuda":
        pytest.skip("the kernels take this device")
    problem = Problem.random(5, 8, 6, 2, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "why_not_triton", lambda device, dtypes: "no kernels here")
        with pytest.raises(ValueError, match=r'options\(backend="triton"\): no kernels here'):
            problem.ours("triton")


class TestErrors:
    """Each message names the function, the argument, both values and what was expected; nothing is changed."""

    def call(self, **changes):
        problem = Problem.random(5, 8, 6, 2, torch.float32)
        arguments = {name: value for name, value in vars(problem).items() if name not in ("dy", "x_dropped")} | changes
        return dora_kernels.dora_linear(**arguments)

    def test_the_call_itself_is_fine(self):
        assert self.call().shape == (5, 8)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x": torch.zeros(5, 7)}, r"x has shape \(5, 7\) but weight has shape \(8, 6\); expected x .* K = 6"),
            ({"x": torch.zeros(())}, r"x has shape \(\)"),
            ({"x": torch.zeros(5, 6, dtype=torch.int64)}, r"x is torch.int64; expected one of float64"),
            ({"x": torch.zeros(5, 6, dtype=torch.bfloat16)}, r"x is torch.bfloat16 but weight is torch.float32"),
            ({"x": [[1.0] * 6]}, r"x is .*1.0.*; expected a torch.Tensor"),
            ({"x": torch.zeros(5, 6).to_sparse()}, r"x is torch.sparse_coo; expected a dense tensor"),
            ({"x": torch.nested.nested_tensor([torch.zeros(2, 6)])}, r"x is nested; expected a dense tensor"),
            ({"x": torch.zeros(5, 6, device="meta")}, r"x is on meta but weight is on cpu; expected one device"),
            ({"weight": torch.zeros(8)}, r"weight has shape \(8,\); expected 2 dimensions"),
            ({"weight": torch.zeros(8, 6, requires_grad=True)}, r"weight.requires_grad is True; expected False"),
            ({"weight": None}, r"weight is None; expected a torch.Tensor"),
            ({"lora_A": torch.zeros(2, 5)}, r"lora_A has shape \(2, 5\) but weight has shape \(8, 6\).* K = 6"),
            ({"lora_B": torch.zeros(8, 3)}, r"lora_B has shape \(8, 3\).*lora_A \(2, 6\); expected .* N = 8, R = 2"),
            ({"lora_B": torch.zeros(7, 2)}, r"lora_B has shape \(7, 2\)"),
            (
                {"lora_B": torch.zeros(8, 2, dtype=torch.float64)},
                r"lora_A is torch.float32 but lora_B is torch.float64",
            ),
            ({"magnitude": torch.zeros(8, 1)}, r"magnitude has shape \(8, 1\).*expected magnitude \(N,\) with N = 8"),
            ({"magnitude": torch.zeros(8, dtype=torch.bool)}, r"magnitude is torch.bool"),
            ({"bias": torch.zeros(6)}, r"bias has shape \(6,\).*expected bias \(N,\) with N = 8"),
            ({"scaling": math.nan}, r"scaling is nan; expected a finite Python number"),
            ({"scaling": math.inf}, r"scaling is inf"),
            ({"scaling": torch.tensor(1.0)}, r"scaling is a Tensor of torch.float32"),
            ({"scaling": True}, r"scaling is True"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_message(self, changes, message):
        if DEVICE == "cuda":
            pytest.skip("the messages name the CPU")
        with pytest.raises(ValueError, match="dora_linear: " + message):
            self.call(**changes)

    def test_core_arguments(self):
        problem = Problem.random(5, 8, 6, 2, torch.float32)
        arguments = {name: value for name, value in vars(problem).items() if name not in ("dy", "x_dropped")}
        with pytest.raises(ValueError, match=r"x_dropped has shape \(4, 6\) but x has shape \(5, 6\)"):
            core(**arguments, x_dropped=problem.x[:4])
        with pytest.raises(ValueError, match=r"norm has shape \(6,\)"):
            core(**arguments, norm=problem.x[0])
        with pytest.raises(ValueError, match=r"norm_grad is True and norm is given"):
            core(**arguments, norm=problem.magnitude, norm_grad=True)
        with pytest.raises(ValueError, match=r"^weight_norm: lora_A has shape"):
            dora_kernels.weight_norm(problem.weight, problem.lora_A[:, 1:], problem.lora_B, 1.0)
        with pytest.raises(ValueError, match=r"^merge_weight: magnitude has shape"):
            dora_kernels.merge_weight(problem.weight, problem.lora_A, problem.lora_B, problem.x[0], 1.0)


def test_the_output_may_be_modified_in_place():
    """nn.Linear's may, and nn.ReLU(inplace=True) after a layer does."""
    problem = Problem.random(5, 8, 6, 2)

    def modified(*arguments, **keywords):
        y = core(*arguments, **keywords)
        y += 1
        return torch.relu_(y)

    def expected(*arguments, **keywords):
        return torch.relu(dora_linear_ref(*arguments, **keywords) + 1)

    actual, exact = problem.run(modified), problem.run(expected)
    for name in actual:
        torch.testing.assert_close(actual[name], exact[name], **TOLERANCE)


def test_torch_compile_takes_a_scaling_that_changes():
    problem = Problem.random(12, 40, 36, 6, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(core, fullgraph=True, backend="aot_eager")
    for scaling in (0.75, 0.5, 0.3):
        problem.scaling = scaling
        torch.testing.assert_close(problem.run(compiled)["y"], problem.ours("auto")["y"])


def test_float16_sums_do_not_overflow_before_scaling():
    problem = Problem.random(2048, 4, 3, 2, torch.float16)
    problem.x, problem.dy = torch.full_like(problem.x, 20.0), torch.full_like(problem.dy, 20.0)
    problem.scaling = 1 / 64
    assert problem.ours("reference")["lora_A"].isfinite().all()
