"""Each step in PyTorch and as a kernel against its definition in reference.py.

In float64 both are the definition. In other dtypes their errors are held to those of the definition in the same dtypes,
which rounds each result once (dora_kernels.testing.compare).
"""

import inspect
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dora_kernels import pytorch, reference
from dora_kernels.planning import plan
from dora_kernels.testing import MEAN_RATIO, compare, geometric_mean
from dora_kernels.types import Prepared, Steps
from tests.support.problem import DEVICE, DTYPES, EXACT_DTYPE, Problem
from tests.support.step_problem import SHAPES, TOLERANCE

# three of PyTorch's blocks of rows, the last of them ragged; kernels have several tiles in SHAPES
BLOCKS = (600, 590, 10, 3)
SCALING = 0.75
Results = Iterator[tuple[str, Tensor | None]]


def operands(shape: tuple[int, ...], dtype: torch.dtype, adapter: torch.dtype | None = None) -> SimpleNamespace:
    """What steps are given, one unlike the other: gain is not magnitude / norm, and a zero row's is not 0."""
    M, N, K, R = shape
    problem = Problem.random(*shape, dtype, adapter)
    if N > 1:
        problem.weight[1] = problem.lora_B[1] = 0
    generator, wide = torch.Generator().manual_seed(1), reference.accumulate_dtype(dtype)

    def normal(*size, dtype=dtype):
        return torch.randn(size, dtype=torch.float64, generator=generator).to(dtype).to(DEVICE)

    made = SimpleNamespace(**vars(problem))
    made.norm = reference.norm(problem.weight, problem.lora_A, problem.lora_B, SCALING)[0]
    made.gain, made.base, made.residual = 0.5 + normal(N, dtype=wide).abs(), normal(M, N), normal(N, M).T
    made.low = normal(M, R, dtype=problem.lora_A.dtype)
    made.bank_low, made.bank_B = (normal(*size, dtype=made.low.dtype) for size in ((M, 3 * R), (3, N, R)))
    made.bank_gain, made.bank_scaling = normal(3, N, dtype=wide), torch.tensor([0.75, 0, -2], dtype=wide, device=DEVICE)
    return made


def double(made: SimpleNamespace) -> SimpleNamespace:
    """The same numbers in float64."""
    tensors = {name: value.double() for name, value in vars(made).items() if isinstance(value, Tensor)}
    return SimpleNamespace(**(vars(made) | tensors))


def each(**values: Tensor) -> Iterator[tuple[str, dict[str, Tensor | None]]]:
    """Every choice of what is given and what is None, and its name."""
    for chosen in itertools.product((False, True), repeat=len(values)):
        given = {name: value if there else None for (name, value), there in zip(values.items(), chosen, strict=True)}
        yield " ".join(name for name, value in given.items() if value is not None), given


def norm(steps: Steps, o: SimpleNamespace) -> Results:
    for name, given in each(magnitude=o.magnitude):
        results = steps.norm(o.weight, o.lora_A, o.lora_B, SCALING, **given)
        yield from zip((f"norm, {name}", f"gain, {name}"), results, strict=True)


def grouped_norm(steps: Steps, o: SimpleNamespace) -> Results:
    """Of a layer, a part of it that is smaller in every axis, and the layer once more."""
    (N, K), R = ((size + 1) // 2 for size in o.weight.shape), (len(o.lora_A) + 1) // 2
    whole = o.weight, o.lora_A, o.lora_B, o.magnitude
    part = o.weight[:N, :K], o.lora_A[:R, :K], o.lora_B[:N, :R], o.magnitude[:N]
    layers = zip(whole, (tensor.contiguous() for tensor in part), whole, strict=True)
    yield from zip(("norm", "gain"), steps.grouped_norm(*layers, (SCALING, -1.5, 0.0)), strict=True)


def merge(steps: Steps, o: SimpleNamespace) -> Results:
    for (name, given), subtract, out_dtype in itertools.product(each(gain=o.gain), (False, True), (None, o.gain.dtype)):
        merged = steps.merge(o.weight, o.lora_A, o.lora_B, given["gain"], SCALING, subtract, out_dtype)
        yield f"{name} {subtract=} {out_dtype}", merged
    yield "by default", steps.merge(o.weight, o.lora_A, o.lora_B, o.gain, SCALING)


def start_norm(steps: Steps, o: SimpleNamespace) -> Results:
    """norm and gain as the epilogue leaves them, and the y that it makes of them."""
    norm, gain, unfinished = steps.start_norm(o.weight, o.lora_A, o.lora_B, SCALING, o.magnitude)
    rest = o.bias, SCALING, o.x.dtype
    yield "y", steps.epilogue(o.base, o.low, o.lora_B, gain, *rest, unfinished=unfinished)
    yield from (("norm", norm), ("gain", gain))
    norm, gain, unfinished = steps.start_norm(o.weight, o.lora_A, o.lora_B, SCALING, o.magnitude)
    yield "merged", steps.merge(o.weight, o.lora_A, o.lora_B, gain, SCALING, unfinished=unfinished)
    yield from (("norm of merged", norm), ("gain of merged", gain))


def prepare(steps: Steps, o: SimpleNamespace) -> Results:
    """By the step itself and by merge on its way; what counts finds zeros."""
    for factor, alone in itertools.product((1.0, SCALING), (False, True)):
        prepared = Prepared(torch.empty_like(o.lora_B), factor, steps.counters(o.dy, *o.weight.shape))
        if alone:
            steps.prepare(prepared, o.lora_B, o.gain)
        else:
            yield "merged", steps.merge(o.weight, o.lora_A, o.lora_B, o.gain, SCALING, prepared=prepared)
        assert prepared.counters is None or not prepared.counters.any()
        yield f"{factor=} {alone=}", prepared.scaled_B


def factors(steps: Steps, o: SimpleNamespace) -> Results:
    """The factors themselves, and what the steps make of them in this form."""
    A, B = steps.factors(o.x, o.lora_A, o.lora_B)
    for name, factor in (("A", A), ("B", B)):
        yield name, factor if factor.dim() == 2 else factor.double().sum(0).float()
    yield from zip(("norm", "gain"), steps.norm(o.weight, A, B, SCALING, o.magnitude), strict=True)
    prepared = Prepared(torch.empty_like(B), SCALING, None)
    yield "merged", steps.merge(o.weight, A, B, o.gain, SCALING, prepared=prepared)
    yield "P through scaled_B of merge", steps.project(o.dy, prepared.scaled_B.mT)
    prepared = Prepared(torch.empty_like(B), SCALING, None)
    steps.prepare(prepared, B, o.gain)
    yield "P through scaled_B", steps.project(o.dy, prepared.scaled_B.mT)
    yield "low", steps.project(o.x, A)
    yield "y", steps.epilogue(o.base, o.low, B, o.gain, o.bias, SCALING, o.x.dtype)
    through = o.x, o.weight, A, B, o.magnitude, o.bias
    yield from zip(("y", "norm", "gain", "z"), steps.merged_forward(*through, None, SCALING, True), strict=True)


def project(steps: Steps, o: SimpleNamespace) -> Results:
    for out_dtype, counted in itertools.product((None, o.gain.dtype), (False, True)):
        counters = torch.zeros(o.dy.shape[0], dtype=torch.int32, device=DEVICE) if counted else None
        yield f"{out_dtype} {counted=}", steps.project(o.dy, o.lora_B.T, out_dtype, counters)
    yield "other strides", steps.project(o.residual, o.lora_B.T.contiguous())
    low = steps.project(o.x, o.lora_A, as_factor=True)
    yield "as a factor", low if low.dim() == 2 else low.double().sum(0).float()


def epilogue(steps: Steps, o: SimpleNamespace) -> Results:
    for name, given in each(low=o.low, bias=o.bias, residual=o.residual):
        y = steps.epilogue(o.base, lora_B=o.lora_B, gain=o.gain, scaling=SCALING, out_dtype=o.x.dtype, **given)
        yield name, y


def bank_epilogue(steps: Steps, o: SimpleNamespace) -> Results:
    """Of three adapters, one of which scales by 0, and of rows without one: mixed, sorted, and alone."""
    mixed = torch.arange(len(o.base), device=DEVICE) % 4 - 1
    for (name, given), index in itertools.product(
        each(bias=o.bias), (mixed, mixed.sort().values, torch.full_like(mixed, -1))
    ):
        given |= {"index": index}
        yield name, steps.bank_epilogue(o.base, o.bank_low, o.bank_B, o.bank_gain, o.bank_scaling, **given)


def fused_forward(steps: Steps, o: SimpleNamespace) -> Results:
    for (name, given), save in itertools.product(each(bias=o.bias), (False, True)):
        through = o.x, o.weight, o.low.to(o.x.dtype), o.lora_B.to(o.x.dtype), o.gain
        results = steps.fused_forward(*through, **given, scaling=SCALING, save=save)
        yield from zip((f"{result}, {name} {save=}" for result in ("y", "z")), results, strict=True)


def dx(steps: Steps, o: SimpleNamespace) -> Results:
    yield "dx", steps.dx(o.dy, o.weight)


def merged_forward(steps: Steps, o: SimpleNamespace) -> Results:
    for (name, given), save in itertools.product(each(bias=o.bias, gain=o.gain), (False, True)):
        given |= {"scaling": SCALING, "save": save}
        results = steps.merged_forward(o.x, o.weight, o.lora_A, o.lora_B, o.magnitude, **given)
        yield from zip((f"{result}, {name} {save=}" for result in ("y", "norm", "gain", "z")), results, strict=True)


def token_sums(steps: Steps, o: SimpleNamespace) -> Results:
    """Each sum alone and all of them, from base, which lacks the low-rank product, and from z."""
    outputs = {"dB": o.lora_B, "dmagnitude": o.magnitude, "dbias": o.bias, "dz": o.dy}
    for wanted, lacks_low_rank in itertools.product((*outputs, ""), (False, True)):
        written = {name: torch.empty_like(like) for name, like in outputs.items() if wanted in (name, "")}
        if "dmagnitude" in written:
            given = {"gain": o.gain, "saved": o.base, "norm": o.norm, "lora_B": o.lora_B if lacks_low_rank else None}
        else:
            given = {"gain": o.gain if lacks_low_rank or "dz" in written else None}
        reads_low = "dB" in written or ("dmagnitude" in written and lacks_low_rank)
        steps.token_sums(o.dy, o.low if reads_low else None, SCALING, **given, **written)
        yield from ((f"{name} of {wanted or 'all'}, {lacks_low_rank=}", tensor) for name, tensor in written.items())


def outer_product(steps: Steps, o: SimpleNamespace) -> Results:
    for out_dtype in (o.low.dtype, o.gain.dtype):
        yield str(out_dtype), steps.outer_product(o.low, o.x, SCALING, out_dtype)
    low = steps.project(o.x, o.lora_A, as_factor=True)
    yield "of a factor", steps.outer_product(low, o.x, SCALING, o.gain.dtype)


CALLS = {
    call.__name__: call
    for call in (
        norm,
        start_norm,
        grouped_norm,
        merge,
        prepare,
        factors,
        project,
        epilogue,
        bank_epilogue,
        fused_forward,
        merged_forward,
        token_sums,
        outer_product,
        dx,
    )
}
# Where the planner may leave a product to the GEMM library
PRODUCTS = ("project", "token_sums", "outer_product")
# What nothing is rounded for on the way
ROUNDED_ONCE = ("merge", "epilogue", "bank_epilogue")


def results_of(
    implementation: str, name: str, o: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, Tensor | None]]:
    """What an implementation makes of the operands (conftest.py has made memory NaN)."""
    if implementation == "pytorch":
        monkeypatch.setattr(pytorch, "_BLOCK_BYTES", {"cpu": 1})  # blocks of 256 rows
        monkeypatch.setattr(pytorch, "_BLOCK_BYTES_ELSEWHERE", 1)
        steps = pytorch.PYTORCH
    else:
        by_kernel = implementation == "kernels"
        monkeypatch.setattr(plan, "project_by_kernel", lambda *ranks, **keywords: by_kernel)
        monkeypatch.setattr(plan, "outer_by_kernel", lambda *ranks, **keywords: by_kernel)
        steps = pytest.importorskip("dora_kernels.kernels").KERNELS
    return list(CALLS[name](steps, o))


EVERY = [
    (implementation, name)
    for implementation in ("pytorch", "kernels", "library")
    for name in (PRODUCTS if implementation == "library" else CALLS)
]


STEPS = [name for name, step in pytorch.PYTORCH._asdict().items() if callable(step)]


def test_every_step_is_called():
    """But `dense`, which PyTorch's has from the definition; test_quantized.py holds the kernel to it bit for bit.

    And `counters` and `fork`, which are memory and a stream for others.
    """
    assert set(STEPS) - {"dense", "counters", "fork"} == CALLS.keys() and pytorch.PYTORCH.dense is reference.dense


@pytest.mark.parametrize("name", STEPS)
def test_a_step_has_the_parameters_of_its_definition(name):
    kernels = pytest.importorskip("dora_kernels.kernels").KERNELS
    for steps in (pytorch.PYTORCH, kernels):
        assert parameters(getattr(steps, name)) == parameters(getattr(reference, name))


def parameters(function: Callable) -> list[tuple]:
    """Name, kind and default of each."""
    return [(one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(
    ("implementation", "name", "shape"),
    [(*pair, shape) for pair in EVERY for shape in (*SHAPES, BLOCKS)[: None if pair[0] == "pytorch" else -1]],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_a_step_is_its_definition(implementation, name, shape, monkeypatch):
    o = operands(shape, EXACT_DTYPE)
    actual = results_of(implementation, name, o, monkeypatch)
    for (one, result), (_, expected) in zip(actual, CALLS[name](reference, o), strict=True):
        assert (result is None) == (expected is None), one
        if result is not None:
            torch.testing.assert_close(result, expected, **TOLERANCE, msg=lambda message, one=one: f"{one}: {message}")


@pytest.mark.parametrize(
    ("implementation", "name", "dtypes"),
    # the planner leaves products of two dtypes to kernels
    [(*pair, dtypes) for pair in EVERY for dtypes in DTYPES if pair[0] != "library" or dtypes[0] == dtypes[1]],
    ids=lambda value: str(value).replace("torch.", ""),
)
def test_a_step_rounds_as_its_definition(implementation, name, dtypes, monkeypatch):
    o = operands(SHAPES[1], *dtypes)
    actual = results_of(implementation, name, o, monkeypatch)
    comparisons = []
    for (one, result), (_, yardstick), (_, exact) in zip(
        actual, CALLS[name](reference, o), CALLS[name](reference, double(o)), strict=True
    ):
        if result is not None:
            assert result.dtype == yardstick.dtype, one
            # into a wider result, too, a scaled factor and a CPU's product have the operands' dtype
            through = o.low.dtype if name in ("project", "outer_product") else None
            comparisons.append(compare(one, result, yardstick, exact, through))
    assert not [comparison for comparison in comparisons if not comparison.ok]
    if name in ROUNDED_ONCE:
        assert geometric_mean([comparison.ratio for comparison in comparisons]) <= MEAN_RATIO
