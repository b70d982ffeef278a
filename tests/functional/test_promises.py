"""What every operator and public function promises beside its numbers.

Inputs stay as they are, the same call gives the same bits, every output is written entirely (conftest.py poisons
memory), and which results do not depend on the other tokens of the batch. Derivatives: the whole Jacobian, and the
gradient through the norm where the norm is hardest; test_second_derivatives.py has the others.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import dora_kernels
from dora_kernels import ops, options, reference
from dora_kernels.quant import flatten_weight
from dora_kernels.types import DoraWeight
from tests.support.problem import BACKENDS, DEVICE, DTYPES, EXACT_DTYPE, GRADIENTS, TOLERANCE, Problem, core

WAYS = ("split", "merged")
ALIKE = tuple(dtypes for dtypes in DTYPES if dtypes[0] == dtypes[1])  # of the weight and of the adapters
FORWARD = {  # keep, dropped, exact
    "eval": ("", False, False),
    "split": ("base", False, False),
    "gemm": ("z_gemm", False, False),
    "merged": ("z_merged", False, False),
    "exact": ("base", False, True),
    "dropout": ("base", True, False),
}


def names(value: object) -> str:
    if isinstance(value, tuple):
        return "-".join(map(names, value))
    return str(value).removeprefix("torch.")


def forward_call(problem: Problem, kind: str, backend: str) -> tuple[object, ...]:
    keep, dropped, exact = FORWARD[kind]
    dtype = torch.promote_types(problem.x.dtype, problem.lora_A.dtype)
    return (
        problem.x, problem.x * 2 if dropped else None, *flatten_weight(problem.weight), problem.lora_A, problem.lora_B,
        problem.magnitude, problem.bias, None, None, 0.75, dtype, "auto", keep, bool(keep), exact, backend,
    )  # fmt: skip


def backward_call(problem: Problem, kind: str, backend: str, way: str, norm_grad: bool) -> tuple[object, ...]:
    keep, dropped, _ = FORWARD[kind]
    arguments = forward_call(problem, kind, backend)
    _, norm, gain, low, kept = ops.forward(*arguments)
    return (
        problem.dy, problem.x, *flatten_weight(problem.weight), problem.lora_A, problem.lora_B, norm, gain, low, kept,
        None, 0.75, arguments[13], way, keep, dropped, norm_grad, [True, dropped, True, True, True, True],
        problem.magnitude.dtype, problem.x.dtype, backend,
    )  # fmt: skip


def check_call(operator: Callable, arguments: tuple[object, ...], unused: tuple[int, ...] = ()) -> None:
    """Inputs as before in value and version, no NaN in an output, the same bits twice, no output that is an input."""
    flat = [one for argument in arguments for one in (argument if isinstance(argument, list) else [argument])]
    tensors = [argument for argument in flat if isinstance(argument, Tensor)]
    before, versions = [tensor.clone() for tensor in tensors], [tensor._version for tensor in tensors]

    def results() -> list[Tensor]:
        returned = operator(*arguments)
        returned = [returned] if isinstance(returned, Tensor) else list(returned)
        return [tensor for index, tensor in enumerate(returned) if index not in unused]

    first, second = results(), results()
    for tensor, value, version in zip(tensors, before, versions, strict=True):
        assert torch.equal(tensor, value) and tensor._version == version
    for one, two in zip(first, second, strict=True):
        assert not one.isnan().any()
        assert torch.equal(one, two) and (one.numel() == 0 or one.data_ptr() != two.data_ptr())
        assert all(one.numel() == 0 or one.data_ptr() != tensor.data_ptr() for tensor in tensors)
    assert sum(tensor.count_nonzero() > 0 for tensor in first) >= min(len(first), 2) // 2


@pytest.fixture(params=DTYPES, ids=names)
def problem(request):
    return Problem.random(33, 34, 10, 3, *request.param)


@pytest.mark.parametrize("backend", BACKENDS)
class TestEveryOperator:
    def test_norm_and_merge(self, problem, backend):
        dtype = torch.promote_types(problem.x.dtype, problem.lora_A.dtype)
        adapter = (*flatten_weight(problem.weight), problem.lora_A, problem.lora_B)
        check_call(ops.norm, (*adapter, 0.75, dtype, backend))
        check_call(ops.merge, (*adapter, torch.rand(34, device=DEVICE), 0.75, dtype, backend))

    @pytest.mark.parametrize("kind", FORWARD)
    def test_forward(self, problem, kind, backend):
        if kind == "gemm" and problem.x.dtype != problem.lora_A.dtype:
            pytest.skip("the GEMM adds base onto a low-rank term of one dtype")
        check_call(ops.forward, forward_call(problem, kind, backend))

    @pytest.mark.parametrize(
        ("kind", "way", "norm_grad"),
        (("split", "split", False), ("merged", "merged", True), ("exact", "merged", False), ("dropout", "auto", False)),
    )
    def test_backward(self, problem, kind, way, norm_grad, backend):
        check_call(ops.backward, backward_call(problem, kind, backend, way, norm_grad))

    def test_the_public_functions(self, problem, backend):
        adapter = (problem.weight, problem.lora_A, problem.lora_B)
        with options(backend=backend):
            check_call(dora_kernels.weight_norm, (*adapter, 0.75))
            check_call(dora_kernels.merge_weight, (*adapter, problem.magnitude, 0.75))
            arguments = (problem.x, *adapter, problem.magnitude, 0.75, problem.bias)
            check_call(dora_kernels.dora_linear, arguments)
            for name in GRADIENTS:
                getattr(problem, name).requires_grad_()

            def gradients(*arguments):
                y = dora_kernels.dora_linear(*arguments)
                return torch.autograd.grad(y, [getattr(problem, name) for name in GRADIENTS], problem.dy)

            check_call(gradients, arguments)


@pytest.fixture
def dots_like_a_gpus(monkeypatch):
    """The sums of an interpreted dot do not depend on their place in the tile: they are made in float64, rounded once.

    NumPy's own do in float32 where OpenBLAS takes its kernels for Haswell or Zen: the same row has other bits in 20 of
    the 32 places of a 32 x 16 tile than it has in the first.
    """
    matmul = np.matmul
    monkeypatch.setattr(np, "matmul", lambda left, right, dtype: matmul(left, right, dtype=np.float64).astype(dtype))


class TestBatchInvariance:
    """What a token's results depend on beside that token: see dora_linear's docstring, which promises this much."""

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("way", WAYS)
    def test_norm_and_gain_do_not_see_x(self, problem, way, backend):
        with options(backend=backend, way=way):
            results = []
            for M in (1, 5, 33):
                layer = DoraWeight(problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, 0.75)
                results.append(dora_kernels.functional.linear.dora_linear_core(problem.x[:M], layer)[1:])
        for norm, gain in results[1:]:
            assert torch.equal(norm, results[0][0]) and torch.equal(gain, results[0][1])

    @pytest.mark.usefixtures("dots_like_a_gpus")
    @pytest.mark.parametrize("with_residual", (False, True))
    def test_a_row_of_the_epilogue(self, problem, with_residual):
        """The kernel's y, given base and low: the same bits in a batch of one as anywhere in a batch of 33."""
        kernels = pytest.importorskip("dora_kernels.kernels")
        base, low = problem.dy, (problem.x.float() @ problem.lora_A.float().T).to(problem.lora_A.dtype)
        gain, residual = problem.magnitude.float(), problem.dy + 1 if with_residual else None

        def epilogue(rows: slice) -> Tensor:
            part = None if residual is None else residual[rows]
            arguments = (problem.lora_B, gain, problem.bias, 0.75, base.dtype, part)
            return kernels.epilogue(base[rows], low[rows], *arguments)

        whole = epilogue(slice(None))
        for rows in (slice(0, 1), slice(7, 8), slice(32, 33), slice(3, 30)):
            assert torch.equal(epilogue(rows), whole[rows])

    @pytest.mark.usefixtures("dots_like_a_gpus")
    @pytest.mark.parametrize("dtypes", ALIKE, ids=names)
    def test_a_row_of_the_epilogue_of_a_high_rank(self, dtypes):
        """A batch that every program has a part of, and parts of it that are less than a tile."""
        kernels = pytest.importorskip("dora_kernels.kernels")
        problem = Problem.random(130, 80, 10, 72, *dtypes)
        base, low = problem.dy, (problem.x.double() @ problem.lora_A.double().T).to(problem.lora_A.dtype)

        def epilogue(rows: slice) -> Tensor:
            arguments = (problem.lora_B, problem.magnitude.float(), problem.bias, 0.75, base.dtype)
            return kernels.epilogue(base[rows], low[rows], *arguments)

        whole = epilogue(slice(None))
        for rows in (slice(0, 1), slice(7, 8), slice(129, 130), slice(3, 33)):
            assert torch.equal(epilogue(rows), whole[rows])

    def test_a_row_of_gain_times_dy(self, problem):
        kernels = pytest.importorskip("dora_kernels.kernels")
        gain, whole = problem.magnitude.float(), torch.empty_like(problem.dy)
        kernels.token_sums(problem.dy, None, 0.75, gain=gain, dz=whole)
        for rows in (slice(0, 1), slice(32, 33), slice(3, 30)):
            part = torch.empty_like(problem.dy[rows])
            kernels.token_sums(problem.dy[rows], None, 0.75, gain=gain, dz=part)
            assert torch.equal(part, whole[rows])

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("way", WAYS)
    def test_the_numbers_of_other_tokens_do_not_matter(self, problem, way, backend):
        """In a batch of the same size: rows of y and dx keep their bits when the other rows change."""
        first = problem.ours(backend, way)
        problem.x[1::2] *= -3
        problem.dy[1::2] += 1
        second = problem.ours(backend, way)
        for name in ("y", "x"):
            assert torch.equal(first[name][::2], second[name][::2])
            assert not torch.equal(first[name][1::2], second[name][1::2])


class TestDerivatives:
    @pytest.mark.parametrize(
        ("kind", "way"),
        (("norm_grad", "split"), ("norm_grad", "merged"), ("given_norm", "split"), ("dropout", "merged")),
    )
    def test_the_whole_jacobian(self, way, kind):
        """gradcheck element by element, in float64 on the kernel code."""
        if DEVICE == "cuda":
            pytest.skip("float64 kernels run in the interpreter only")
        problem = Problem.random(2, 2, 3, 1, dropout=0.5 if kind == "dropout" else 0.0)
        norm = None if kind == "norm_grad" else torch.linalg.vector_norm(problem.weight, dim=1)
        leaves = (*GRADIENTS, "x_dropped") if kind == "dropout" else GRADIENTS

        def function(x, lora_A, lora_B, magnitude, bias, x_dropped=None):
            with options(backend="triton", way=way):
                return core(
                    x, problem.weight, lora_A, lora_B, magnitude, 0.75, bias, x_dropped=x_dropped, norm=norm,
                    norm_grad=norm is None,
                )  # fmt: skip

        assert torch.autograd.gradcheck(function, [getattr(problem, name).requires_grad_() for name in leaves])

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("dtypes", ((EXACT_DTYPE, EXACT_DTYPE), DTYPES[0], DTYPES[3]), ids=names)
    def test_through_the_norm_of_cancelling_and_of_zero_rows(self, dtypes, way, backend):
        """|W + s B A| = 1e-3 |W| in every other row, a row of zeros between: against autograd of the definition.

        0.1 |W| over a bfloat16 base, whose rounding would leave PyTorch without a correct digit too.

        Split, where base is kept and not z, the sum for the norm's gradient cancels once more: over 40 seeds in float32
        dA and dB are 1.7 times as far off as PyTorch's in the geometric mean, merged (the default) 1.2 and 1.3.
        """
        problem = Problem.random(17, 40, 36, 6, *dtypes)
        adapter = problem.scaling * problem.lora_B.double() @ problem.lora_A.double()
        noise = torch.randn(adapter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        left = 0.1 if dtypes[0] == torch.bfloat16 else 1e-3
        problem.weight[::2] = (-adapter * (1 + left * noise.to(DEVICE)))[::2].to(problem.weight.dtype)
        problem.weight[3] = problem.lora_B[3] = 0
        problem.magnitude = reference.norm(problem.weight, problem.lora_A, problem.lora_B, 0.75)[0]
        problem.magnitude = (1.1 * problem.magnitude).to(problem.lora_A.dtype)
        actual = problem.ours(backend, way, norm_grad=True)
        assert (actual["lora_B"][3] == 0).all() and actual["magnitude"][3] == 0
        if dtypes[0] == torch.float64:
            exact = problem.exact(norm_grad=True)
            for name in actual:
                size = exact[name].abs().max()
                torch.testing.assert_close(actual[name] / size, exact[name] / size, **TOLERANCE)
        else:
            comparisons = problem.comparisons(actual, norm_grad=True)
            slack = 2 if way == "split" else 1
            assert all(comparison.error <= slack * comparison.limit for comparison in comparisons), comparisons
            assert all(comparison.limit < 0.1 for comparison in comparisons), comparisons  # zeros have an error of 1
