"""Each decomposition gives what its operator gives, and takes its place where it is asked for and nowhere else."""

import itertools

import pytest
import torch
from torch._decomp import global_decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx

from dora_kernels import DoraLinear, ops, options
from dora_kernels.decompositions import DECOMPOSITIONS
from dora_kernels.quant import flatten_weight
from tests.support.packed_weights import KINDS, quantized
from tests.support.problem import DEVICE, EXACT_DTYPE, Problem

# weight dtype, adapter dtype, the relative error that rounding explains
DTYPES = (
    (EXACT_DTYPE, EXACT_DTYPE, 1e-14 if DEVICE == "cpu" else 1e-6),
    (torch.float32, torch.float32, 1e-6),
    (torch.bfloat16, torch.float32, 1e-2),
    (torch.float16, torch.float16, 1e-3),
)
DECODED = [kind for kind in KINDS if kind in ("int8", "float8") or "hqq4" in kind]


def assert_same(operator, arguments, limit, **given):
    """The decomposition's results are of the operator's shapes and dtypes, and apart by at most `limit` in RMS."""
    with torch.no_grad():
        actual, expected = DECOMPOSITIONS[operator](*arguments, **given), operator(*arguments, **given)
    assert isinstance(actual, tuple) == isinstance(expected, tuple)
    for one, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (actual, expected)), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        # zeros would be apart by 1
        assert not other.numel() or (one - other).double().norm() <= limit * other.double().norm()


def forward_arguments(problem, weight, dtype, keep="", *, dropped=False, norm=None, gain=None, exact=False):
    x_dropped = problem.x.flip(0).to(dtype) if dropped else None
    return (
        problem.x, x_dropped, *flatten_weight(weight), problem.lora_A, problem.lora_B, problem.magnitude, problem.bias,
        norm, gain, 0.75, dtype, "auto", keep, bool(keep), exact, "reference",
    )  # fmt: skip


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_forward(dtypes):
    *kinds, limit = dtypes
    problem, dtype = Problem.random(5, 12, 10, 3, *kinds), torch.promote_types(*kinds)
    row = torch.linspace(0.5, 2, 12, device=DEVICE, dtype=torch.promote_types(kinds[0], torch.float32))
    low = torch.nn.functional.linear(problem.x.to(dtype), problem.lora_A.to(dtype))
    for keep, exact in itertools.product(("", "base", "z_merged"), (False, True)):
        if exact and keep == "z_merged":
            continue  # is not made
        for given in ({}, {"norm": row}, {"norm": row, "gain": row.flip(0)}):
            arguments = forward_arguments(problem, problem.weight, dtype, keep, exact=exact, **given)
            assert_same(ops.forward, arguments, limit)
            # base is made apart from low, which may then be anything
            assert_same(ops.forward, arguments, limit, given_low=3 * low if keep == "base" else low)
    for keep in ("", "base"):
        assert_same(ops.forward, forward_arguments(problem, problem.weight, dtype, keep, dropped=True), limit)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_others(dtypes):
    *kinds, limit = dtypes
    problem, dtype = Problem.random(5, 12, 10, 3, *kinds), torch.promote_types(*kinds)
    stored, adapter = flatten_weight(problem.weight), (problem.lora_A, problem.lora_B)
    accumulate = torch.promote_types(kinds[0], torch.float32)
    gain = torch.linspace(0.5, 2, 12, device=DEVICE, dtype=accumulate)
    assert_same(ops.norm, (*stored, *adapter, 0.75, dtype, "reference"), 1e-2 * limit if limit > 1e-6 else limit)
    assert_same(ops.merge, (*stored, *adapter, gain, 0.75, dtype, "reference"), limit)
    base, low = problem.dy, problem.x[:, :3].to(dtype)
    for bias, residual in itertools.product((None, problem.bias), (None, base.flip(0))):
        assert_same(ops.rescale, (base, low, adapter[1], gain, bias, residual, 0.75, "reference"), limit)
    lows, lora_B, scaling = problem.x[:, :6].to(dtype), torch.stack([adapter[1], -2 * adapter[1]]).to(dtype), gain[:2]
    index = torch.tensor([0, 1, -1, 1, 0], device=DEVICE)
    bank = (base, lows, lora_B, torch.stack([gain, gain.flip(0)]), scaling, problem.bias, index, "reference")
    assert_same(ops.bank_epilogue, bank, limit)


@pytest.mark.parametrize("kind", DECODED)
@pytest.mark.parametrize("N", (12, 600))
def test_quantized_weights(kind, N):
    """Of more elements than are decoded in one block, too."""
    K = 512 if N == 600 else 16
    problem = Problem.random(5, N, K, 3, torch.float32)
    weight = quantized(kind, N, K)
    stored, adapter = flatten_weight(weight), (problem.lora_A, problem.lora_B)
    assert_same(ops.forward, forward_arguments(problem, weight, torch.float32), 1e-6)
    assert_same(ops.norm, (*stored, *adapter, 0.75, torch.float32, "reference"), 1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in DECODED])
def test_a_codebook_is_refused(kind):
    problem, weight = Problem.random(5, 12, 16, 3, torch.float32), quantized(kind, 12, 16)
    with pytest.raises(ValueError, match=f"decompositions: weight is {weight.format}, .*; expected a dense weight"):
        DECOMPOSITIONS[ops.forward](*forward_arguments(problem, weight, torch.float32))


def layer():
    torch.manual_seed(0)
    made = DoraLinear(24, 20, rank=5, alpha=7.0, device=DEVICE).eval()
    torch.nn.init.normal_(made.lora_B.weight)
    return made


def test_a_zero_row_has_gain_zero():
    model, x = layer(), torch.randn(3, 24, device=DEVICE)
    with torch.no_grad():
        model.weight[4], model.lora_B.weight[4] = 0, 0
        operands = (model.weight, model.lora_A.weight, model.lora_B.weight)
        problem = Problem(x, *operands, model.lora_magnitude_vector, model.bias, x)
        arguments = forward_arguments(problem, model.weight, torch.float32)
        y, norm, gain, *_ = DECOMPOSITIONS[ops.forward](*arguments)
    assert norm[4] == gain[4] == 0 and torch.equal(y[:, 4], model.bias[4].expand(3)) and y.isfinite().all()


def test_where_they_are_taken():
    """By a table that has them: a program of torch.export keeps the operators by default, and so does make_fx."""
    model, x = layer(), torch.randn(5, 24, device=DEVICE)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        kept = program.run_decompositions()
        table = torch.export.default_decompositions()
        table.update(DECOMPOSITIONS)
        plain = program.run_decompositions(table)
        for one in (program, kept):
            assert "dora_kernels.forward" in str(one.graph)
        assert "dora_kernels" not in str(plain.graph)
        assert "dora_kernels.forward" in str(make_fx(model)(x).graph)
        targets = {n.target for n in plain.graph.nodes if n.op == "call_function"}
        assert all(getattr(target, "namespace", "aten") == "aten" for target in targets)
        for M in (9, 1, 0):
            x = torch.randn(M, 24, device=DEVICE)
            torch.testing.assert_close(plain.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_no_table_of_torch_has_them():
    """Fake tensors of free sizes would ask it, and torch.compile fails over an entry where CI is set."""
    names = {name for table in global_decomposition_table.values() for name in map(str, table)}
    assert names and not any("dora_kernels" in name for name in names)


@pytest.mark.nightly
def test_compiled_in_continuous_integration(monkeypatch):
    monkeypatch.setenv("CI", "1")
    model, x = layer(), torch.randn(5, 24, device=DEVICE)
    with torch.no_grad(), options(backend="reference"):
        torch.testing.assert_close(torch.compile(model, dynamic=True)(x), model(x), rtol=1e-5, atol=1e-5)
