"""rescale and the differentiable norm, against the layer that they make together, and alone."""

import pytest
import torch
import torch.nn.functional as F

from dora_kernels import ops, options, weight_norm
from dora_kernels.functional.rescale import dora_linear_lora_dropout, rescale
from dora_kernels.quant import flatten_weight
from dora_kernels.reference import dora_linear_ref
from dora_kernels.types import DoraWeight
from tests.support.problem import BACKENDS, DEVICE, DTYPES, EXACT_DTYPE, GRADIENTS, TOLERANCE, Problem, two_pieces

SHAPES = ((17, 40, 36, 6), (33, 70, 50, 20), (1, 12, 10, 1), (7, 9, 4, 13))


def layer_with_peft_dropout(x, weight, lora_A, lora_B, magnitude, scaling, bias=None, *, x_dropped):
    gain = magnitude / weight_norm(weight, lora_A, lora_B, scaling)
    base, low = F.linear(x_dropped, weight), F.linear(x_dropped.to(lora_A.dtype), lora_A)
    return rescale(base, low, lora_B, gain, scaling, bias, residual=F.linear(x, weight))


def definition(x, weight, lora_A, lora_B, magnitude, scaling, bias=None, *, x_dropped):
    """With the dropout on the low-rank branch alone."""
    y = dora_linear_ref(torch.zeros_like(x), weight, lora_A, lora_B, magnitude, scaling, bias)
    gain = magnitude / torch.linalg.vector_norm(weight + scaling * lora_B @ lora_A, dim=1).detach()
    low = F.linear(x_dropped.to(lora_A.dtype), lora_A)
    return (y + gain * (F.linear(x, weight) + scaling * F.linear(low, lora_B))).to(x.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm_grad", (False, True))
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_norm_and_rescale_are_the_layer(dtypes, norm_grad, backend):
    for shape in SHAPES:
        problem = Problem.random(*shape, *dtypes)
        with options(backend=backend):
            actual = problem.run(two_pieces, norm_grad=norm_grad)
        for comparison in problem.comparisons(actual, norm_grad=norm_grad):
            assert comparison.ok, (shape, comparison)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_of_the_low_rank_branch_alone(backend):
    problem = Problem.random(17, 40, 36, 6, dropout=0.5)
    expected = problem.run(definition)
    with options(backend=backend):
        actual = problem.run(two_pieces)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], **TOLERANCE)
    assert not torch.allclose(actual["y"], problem.yardstick()["y"], rtol=0.1)  # PEFT's dropout is another function


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_with_a_residual_it_is_the_layer_under_peft_s_dropout(dtypes, backend):
    for shape in SHAPES:
        problem = Problem.random(*shape, *dtypes, dropout=0.5)
        with options(backend=backend):
            actual = problem.run(layer_with_peft_dropout)
        for comparison in problem.comparisons(actual):
            assert comparison.ok, (shape, comparison)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [(name,) for name in GRADIENTS] + [("lora_A", "magnitude"), ()], ids=str)
def test_any_subset_of_gradients(needs, backend):
    problem = Problem.random(17, 40, 36, 6)
    with options(backend=backend):
        actual = problem.run(two_pieces, needs)
    exact = problem.exact(needs=needs)
    assert actual.keys() == {"y", *needs}
    for name, value in actual.items():
        torch.testing.assert_close(value, exact[name], **TOLERANCE)


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 kernels run in the interpreter only")
def test_gradcheck_on_the_kernel_code():
    problem = Problem.random(6, 35, 34, 17)
    inputs = [getattr(problem, name).requires_grad_() for name in GRADIENTS]

    def function(x, lora_A, lora_B, magnitude, bias):
        with options(backend="triton"):
            return two_pieces(x, problem.weight, lora_A, lora_B, magnitude, 0.75, bias, norm_grad=True)

    ops.calls.clear()
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert ops.calls["rescale_backward", "triton"] and ops.calls["norm_backward", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_of_a_convolution(backend):
    """(B, N, H, W) seen as (B, H, W, N), in both memory formats."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 8, 5, 3, generator=generator).to(DEVICE, EXACT_DTYPE)
    low = torch.randn(2, 4, 5, 3, generator=generator).to(DEVICE, EXACT_DTYPE)
    lora_B = torch.randn(8, 4, generator=generator).to(DEVICE, EXACT_DTYPE)
    gain = torch.rand(8, generator=generator).to(DEVICE, EXACT_DTYPE)
    expected = gain[:, None, None] * (base + 0.5 * torch.einsum("brhw,nr->bnhw", low, lora_B))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        images = [tensor.contiguous(memory_format=memory_format) for tensor in (base, low)]
        with options(backend=backend):
            y = rescale(*(image.movedim(1, -1) for image in images), lora_B, gain, 0.5).movedim(-1, 1)
        torch.testing.assert_close(y, expected, **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dnorm", (0.0, 1.0, torch.inf, torch.nan))
def test_a_zero_row_has_no_gradient_through_the_norm(dnorm, backend):
    """Whatever comes back to it: the derivative of magnitude / norm is infinite there."""
    problem = Problem.random(5, 12, 10, 3)
    problem.weight[4], problem.lora_B[4] = 0, 0
    lora_A, lora_B = problem.lora_A.requires_grad_(), problem.lora_B.requires_grad_()
    with options(backend=backend):
        norm = weight_norm(problem.weight, lora_A, lora_B, 0.75, norm_grad=True)
    dnorms = norm.detach().clone()
    dnorms[4] = dnorm
    dA, dB = torch.autograd.grad(norm, (lora_A, lora_B), dnorms)
    direction = problem.weight + 0.75 * lora_B @ lora_A
    expected = torch.autograd.grad(direction.square().sum() / 2, (lora_A, lora_B))
    torch.testing.assert_close((dA, dB), expected, **TOLERANCE)
    assert norm[4] == 0 and not dB[4].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_product_is_taken_in_the_dtype_of_low(backend):
    """The same bits for a wider lora_B that was rounded to it before."""
    problem = Problem.random(17, 40, 36, 6, torch.float32)
    low = (problem.x @ problem.lora_A.T).bfloat16().requires_grad_()
    results = []
    for lora_B in (problem.lora_B, problem.lora_B.bfloat16().float()):
        with options(backend=backend):
            y = rescale(problem.dy, low, lora_B.requires_grad_(), problem.magnitude, 0.75)
        results.append((y, *torch.autograd.grad(y, (low, lora_B), problem.dy)))
    assert all(torch.equal(actual, expected) for actual, expected in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_narrower_than_others_are_widened(backend):
    """The gain, and for dropout on the low-rank branch alone the adapters, or what they see."""
    torch.manual_seed(0)
    problem = Problem.random(17, 40, 36, 6, torch.float32, torch.bfloat16, dropout=0.4)
    low, norm = problem.x[:, :6].contiguous(), problem.magnitude.float() + 1

    def of_dropout(lora_A, lora_B):
        layer = DoraWeight(problem.weight, lora_A, lora_B, problem.magnitude, 0.75)
        return dora_linear_lora_dropout(problem.x, problem.x_dropped, layer, problem.bias, norm)

    def of_rescale(gain):
        return rescale(problem.dy, low, problem.lora_B.float(), gain, 0.75)

    with options(backend=backend):
        for function, narrow in (
            (of_dropout, (problem.lora_A, problem.lora_B)),
            (of_rescale, (problem.magnitude.bfloat16(),)),
        ):
            assert torch.equal(function(*narrow), function(*(tensor.float() for tensor in narrow)))
        problem = Problem.random(17, 40, 36, 6, torch.bfloat16, torch.float32, dropout=0.4)
        narrow = of_dropout(problem.lora_A, problem.lora_B)
        problem.x_dropped = problem.x_dropped.float()
        assert torch.equal(narrow, of_dropout(problem.lora_A, problem.lora_B))


def test_one_token_without_a_dimension_for_it():
    base, low, lora_B, gain = torch.randn(12), torch.randn(3), torch.randn(12, 3), torch.rand(12)
    torch.testing.assert_close(rescale(base, low, lora_B, gain, 0.5), gain * (base + 0.5 * lora_B @ low))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    problem = Problem.random(0, 12, 10, 3)
    with options(backend=backend):
        actual = problem.run(two_pieces)
    assert actual["y"].shape == (0, 12) and not any(actual[name].any() for name in GRADIENTS)


# opcheck calls the bare operators, whose autograd lives in rescale.py
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", (DTYPES[0], DTYPES[1], DTYPES[3]), ids=str)
def test_opcheck(dtypes, backend):
    problem = Problem.random(5, 12, 10, 3, *dtypes)
    base, low = problem.dy + 1, F.linear(problem.x.to(dtypes[1]), problem.lora_A)
    gain = torch.rand(12, device=DEVICE)
    torch.library.opcheck(ops.rescale, (base, low, problem.lora_B, gain, problem.bias, None, 0.75, backend))
    torch.library.opcheck(ops.rescale, (base, low, problem.lora_B, gain, None, base + 1, 0.75, backend))
    subsets = [True] * 5, [False, True, False, False, True], [False, False, False, True, False]
    for needs, residual in zip((*subsets, [True] * 5), (False, False, False, True), strict=True):
        arguments = (problem.dy, base, low, problem.lora_B, gain, 0.75, residual, needs, torch.float32, backend)
        torch.library.opcheck(ops.rescale_backward, arguments)
    adapter = (*flatten_weight(problem.weight), problem.lora_A, problem.lora_B)
    for needs in ([True, False], [False, True]):
        torch.library.opcheck(ops.norm_backward, (gain, *adapter, gain + 1, 0.75, dtypes[1], needs, backend))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"base": torch.zeros(3, 5)}, r"rescale: base has shape \(3, 5\) but lora_B has shape \(4, 2\); expected base"),
        ({"low": torch.zeros(3, 5)}, r"rescale: low has shape \(3, 5\) but lora_B has shape \(4, 2\); expected low"),
        ({"low": torch.zeros(2, 2)}, r"rescale: low has shape \(2, 2\) but base has shape \(3, 4\); expected the same"),
        ({"base": torch.zeros(2, 3, 4), "low": torch.zeros(2, 5, 2)}, r"low has shape \(2, 5, 2\) but base has shape"),
        ({"base": torch.zeros(())}, r"rescale: base has shape \(\) but lora_B has shape"),
        ({"gain": torch.ones(3)}, r"rescale: gain has shape \(3,\) but lora_B .* expected gain \(N,\) with N = 4"),
        ({"bias": torch.ones(4, 1)}, r"rescale: bias has shape \(4, 1\)"),
        ({"residual": torch.zeros(1, 4)}, r"rescale: residual is torch.float32 of shape \(1, 4\) but base is"),
        ({"residual": torch.zeros(3, 4).double()}, "rescale: residual is torch.float64"),
        ({"lora_B": torch.zeros(4)}, r"rescale: lora_B has shape \(4,\); expected 2 dimensions"),
        ({"scaling": float("nan")}, "rescale: scaling is nan"),
        ({"base": torch.zeros(3, 4).int()}, "rescale: base is torch.int32"),
        ({"low": torch.zeros(3, 2, device="meta")}, "rescale: low is on meta but lora_B is on cpu"),
    ),
    ids=str,
)
def test_bad_input(change, message):
    good = {"base": torch.zeros(3, 4), "low": torch.zeros(3, 2), "lora_B": torch.zeros(4, 2), "gain": torch.ones(4)}
    rescale(**good, scaling=1.0)
    with pytest.raises(ValueError, match=message):
        rescale(**(good | {"scaling": 1.0} | change))
