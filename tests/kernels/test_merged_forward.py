"""The forward pass through a merged weight, whose norm is made on the same way over the weight; see test_steps.py."""

import pytest
import torch
import torch.nn.functional as F

from dora_kernels import reference
from tests.support.packed_weights import quantized
from tests.support.problem import DTYPES, Problem

kernels = pytest.importorskip("dora_kernels.kernels")

from dora_kernels.kernels.launches import LaunchPlan  # noqa: E402

SCALING = 0.75
WEIGHTS = {
    "dense": lambda weight: weight,
    "transposed": lambda weight: weight.T.contiguous().T,
    "codebook4 nested": lambda weight: quantized("codebook4 nested", *weight.shape, weight.dtype),
    "float8": lambda weight: quantized("float8", *weight.shape, weight.dtype),
}
CASES = [("dense", dtypes) for dtypes in DTYPES] + [(kind, DTYPES[1]) for kind in list(WEIGHTS)[1:]]


@pytest.mark.parametrize(("kind", "dtypes"), CASES, ids=str)
def test_a_forward_pass_that_keeps_z_is_its_steps(kind, dtypes):
    """z and y to the bit; norm and gain but for the order of a sum of float32. A given gain changes no bit of them."""
    problem = Problem.random(9, 70, 130, 20, *dtypes)
    if kind in ("dense", "transposed"):
        problem.weight[1] = problem.lora_B[1] = 0
    weight, x, bias = WEIGHTS[kind](problem.weight), problem.x, problem.bias
    adapter = weight, problem.lora_A, problem.lora_B

    def call(gain):
        return kernels.merged_forward(x, *adapter, problem.magnitude, bias, gain, SCALING, True)

    y, norm, gain, z = call(None)
    assert torch.equal(z, F.linear(x, kernels.merge(*adapter, None, SCALING, out_dtype=x.dtype)))
    assert torch.equal(y, kernels.epilogue(z, None, problem.lora_B, gain, bias, SCALING, x.dtype))
    expected_norm, expected_gain = kernels.norm(*adapter, SCALING, problem.magnitude)
    torch.testing.assert_close(norm, expected_norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(gain, expected_gain, rtol=1e-6, atol=0)
    assert (norm[1] == 0) == (kind in ("dense", "transposed")) == bool((y[:, 1] == bias[1]).all())
    for one, other in zip(call(None), (y, norm, gain, z), strict=True):
        assert torch.equal(one, other)
    given = call(gain)
    assert torch.equal(given[0], y) and given[1] is None and given[2] is gain and torch.equal(given[3], z)


@pytest.mark.parametrize(("M", "N", "K"), ((0, 40, 30), (5, 40, 0), (5, 0, 30)))
def test_a_pass_without_tokens_columns_or_rows(M, N, K):
    """norm and gain are written whatever there is."""
    problem = Problem.random(M, N, K, 3, torch.float32)
    adapter = problem.weight, problem.lora_A, problem.lora_B
    y, norm, gain, z = kernels.merged_forward(problem.x, *adapter, problem.magnitude, problem.bias, None, SCALING, True)
    assert y.shape == z.shape == (M, N) and not (K == 0 and z.any())
    expected = reference.norm(*adapter, SCALING, problem.magnitude)
    torch.testing.assert_close((norm, gain), expected)
    assert K > 0 or torch.equal(y, problem.bias.expand(M, N))


@pytest.mark.parametrize(
    ("save", "given", "expected"),
    (
        (True, False, ["_merge_kernel with squares", "_epilogue_kernel"]),
        (True, True, ["_merge_kernel", "_epilogue_kernel"]),
        (False, False, ["_norm_kernel with squares", "_merge_kernel"]),
        (False, True, ["_merge_kernel"]),
    ),
)
def test_how_often_a_forward_pass_reads_the_weight(save, given, expected, monkeypatch):
    """Once where z is kept; a given gain, as that of frozen adapters, asks for no squares."""
    launch, launched = LaunchPlan.launch, []

    def recorded(plan, grid, *arguments, **keywords):
        names = plan.kernel.arg_names
        squares = arguments[names.index("squares_ptr")] if "squares_ptr" in names else None
        launched.append(plan.kernel.fn.__name__ + (" with squares" if squares is not None else ""))
        launch(plan, grid, *arguments, **keywords)

    problem = Problem.random(9, 40, 30, 3, torch.float32)
    gain = torch.ones_like(problem.magnitude) if given else None
    monkeypatch.setattr(LaunchPlan, "launch", recorded)
    adapter = problem.weight, problem.lora_A, problem.lora_B, problem.magnitude
    kernels.merged_forward(problem.x, *adapter, problem.bias, gain, SCALING, save)
    assert launched == expected
