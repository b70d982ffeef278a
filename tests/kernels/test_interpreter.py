"""The repaired interpreter against torch, bit for bit, and the unrepaired one caught being wrong.

Every case is a small kernel with its expected result. In this process the interpreter is repaired and each
case must match; in a subprocess without the repair each case must fail. When the second test fails after a
Triton upgrade, upstream has mended something: drop that part of the repair.
"""

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INF, NAN = float("inf"), float("nan")
NEGATES = hasattr(InterpreterBuilder, "create_fneg")  # from Triton 3.8 on; -a is 0 - a before


@triton.jit
def _binary_kernel(a_ptr, b_ptr, out_ptr, NAME: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offs)
    b = tl.load(b_ptr + offs)
    if NAME == "add":
        out = a + b
    elif NAME == "sub":
        out = a - b
    elif NAME == "mul":
        out = a * b
    elif NAME == "div":
        out = a / b
    elif NAME == "neg":
        out = -a
    elif NAME == "greater":
        out = tl.where((offs > 2) & (a > b), a, b)
    elif NAME == "equal":
        out = a == b
    elif NAME == "fma":
        out = tl.fma(a, b, a)
    elif NAME == "literal":
        out = a * 3.0 + 1
    tl.store(out_ptr + offs, out)


@triton.jit
def _cast_kernel(a_ptr, out_ptr, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offs)
    if ROUNDING == "implicit":
        tl.store(out_ptr + offs, a)
    else:
        tl.store(out_ptr + offs, a.to(out_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING))


@triton.jit
def _masked_load_kernel(a_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(a_ptr + offs, mask=offs < n, other=0.3))


@triton.jit
def _mask_and_scalar_kernel(a_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    first = tl.program_id(0) == 0
    tl.store(out_ptr + offs, tl.load(a_ptr + offs, mask=(offs < n) & first, other=2.0), mask=(offs > 0) & first)


@triton.jit
def _argument_kernel(a_ptr, out_ptr, scaling, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(a_ptr + offs) * scaling)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _reduce_kernel(a_ptr, out_ptr, NAME: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offs[:, None] * BLOCK + offs[None, :])
    if NAME == "sum_rows":
        tl.store(out_ptr + offs, tl.sum(a, axis=1))
    elif NAME == "sum_columns":
        tl.store(out_ptr + offs[None, :], tl.sum(a, axis=0, keep_dims=True))
    elif NAME == "sum_all":
        tl.store(out_ptr, tl.sum(a))
    elif NAME == "own":
        tl.store(out_ptr + offs, tl.reduce(a, 1, _add))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    square = offs[:, None] * BLOCK + offs[None, :]
    a = tl.load(a_ptr + square)
    b = tl.load(b_ptr + square)
    acc = tl.full([BLOCK, BLOCK], 1.0, dtype=tl.float32)
    acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    tl.store(out_ptr + square, acc.to(out_ptr.dtype.element_ty))


@triton.jit
def _range_kernel(a_ptr, out_ptr, start, n):
    total = 0.0
    for i in range(start, tl.minimum(n, 100), 2):
        total += tl.load(a_ptr + i)
    tl.store(out_ptr, total)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# One unit in bf16's last place at 1 is 2**-7. Halfway cases with the even neighbour below and above, just
# under and over halfway, a carry into the exponent; float32's largest (inf in bf16) and the largest that bf16
# keeps; subnormals of both types.
_AWKWARD = torch.tensor(
    [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 - 2**-20, 1 + 2**-8 + 2**-20, 2 - 2**-8, -1 - 2**-8, -1 - 3 * 2**-8]
    + [3.4028234663852886e38, -3.4028234663852886e38, 3.38953138925e38, 0.0, -0.0, INF, -INF, 0.1, -0.3]
    + [2**-130, 2**-133, 3 * 2**-134, 2**-134, 2**-149, -(2**-149)]
)
# NaN with a payload only in the bits that bf16 drops (truncated, it is inf), and with every bit set (rounded
# up, it is -0). By their bits: a Python float would make another NaN of them.
_NANS = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(F32)
_SPECIAL = torch.tensor([INF, -INF, NAN, 0.0, -0.0, 3.3895e38, -3.3895e38, 2**-133], dtype=BF16)


def _pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 (128,) twice: random values, then each special value against each."""
    a = torch.cat([_random(64).to(BF16), _SPECIAL.repeat(8)])
    b = torch.cat([_random(64, seed=1).to(BF16), _SPECIAL.repeat_interleave(8)])
    return a, b


def _binary(name: str, expected, out_dtype: torch.dtype = BF16):
    a, b = _pairs()
    out = torch.empty(128, dtype=out_dtype)
    _binary_kernel[1,](a, b, out, NAME=name, BLOCK=128)
    return out, expected(a, b).to(out_dtype)


def _cast(source: torch.dtype, target: torch.dtype, rounding: str | None = None, scale: float = 1.0):
    values = torch.cat([_AWKWARD, _NANS, _random(40, seed=2)])
    if scale != 1.0:
        values = _random(64, seed=2) * scale
    if not source.is_floating_point:  # no int for inf and NaN
        values = (_random(64, seed=2) * 1000).round()
    a = values.to(source)
    out = torch.empty(64, dtype=target)
    _cast_kernel[1,](a, out, ROUNDING=rounding, BLOCK=64)
    if rounding == "rtz":
        truncated = (a.view(torch.int32) & -65536).view(F32)
        return out, torch.where(a.isnan(), a, truncated).to(target)
    return out, a.to(target)


def _masked_load():
    a = _random(16).to(BF16)
    out = torch.empty(16, dtype=BF16)
    _masked_load_kernel[1,](a, out, 9, BLOCK=16)
    return out, torch.where(torch.arange(16) < 9, a, torch.tensor(0.3, dtype=BF16))


def _argument(dtype: torch.dtype):
    a = _random(16).to(dtype)
    out = torch.empty(16)
    _argument_kernel[1,](a, out, 0.3, BLOCK=16)
    return out, a.float() * 0.3


def _reduce(name: str, expected):
    # eighths: every partial sum is exact in float32, and in bf16 for the reduction that rounds each step
    a = ((_random(16, 16) * 8).round() / 8).clamp(-1, 1).to(BF16)
    wanted = expected(a)
    out = torch.empty(wanted.numel(), dtype=BF16)
    _reduce_kernel[1,](a, out, NAME=name, BLOCK=16)
    return out, wanted.flatten()


def _dot(out_dtype: torch.dtype, precision: str | None = None, dtype: torch.dtype = BF16):
    # quarters up to 4: products and sums are exact in float32, whatever the order, but not in bf16
    a, b = (((_random(16, 16, seed=i) * 4).round() / 4).clamp(-4, 4).to(dtype) for i in (3, 4))
    out = torch.empty(16, 16, dtype=out_dtype)
    _dot_kernel[1,](a, b, out, PRECISION=precision, BLOCK=16)
    return out, (a.double() @ b.double().T + 1).to(out_dtype)


CASES = {
    "add": lambda: _binary("add", torch.add),
    "sub": lambda: _binary("sub", torch.sub),
    "mul": lambda: _binary("mul", torch.mul),
    "div, which Triton promotes to float32": lambda: _binary("div", lambda a, b: a.float() / b.float(), F32),
    "neg": lambda: _binary("neg", lambda a, b: -a if NEGATES else 0 - a),
    "greater and where": lambda: _binary("greater", lambda a, b: torch.where((a > b) & (torch.arange(128) > 2), a, b)),
    "equal": lambda: _binary("equal", torch.eq, BF16),
    "fma": lambda: _binary("fma", lambda a, b: a.double() * b.double() + a.double()),
    "literal": lambda: _binary("literal", lambda a, b: a * 3.0 + 1),
    "float32 -> bf16": lambda: _cast(F32, BF16),
    "float32 -> bf16 by the store": lambda: _cast(F32, BF16, "implicit"),
    "float32 -> bf16 toward zero": lambda: _cast(F32, BF16, "rtz"),
    "float64 -> bf16": lambda: _cast(F64, BF16),
    "float16 -> bf16": lambda: _cast(F16, BF16),
    "int32 -> bf16": lambda: _cast(torch.int32, BF16),
    "bf16 -> float32": lambda: _cast(BF16, F32),
    "bf16 -> float64": lambda: _cast(BF16, F64),
    "other of a masked load": _masked_load,
    "bf16 * argument": lambda: _argument(BF16),
    "float16 * argument": lambda: _argument(F16),
    "sum over rows": lambda: _reduce("sum_rows", lambda a: a.float().sum(1).to(BF16)),
    "sum over columns": lambda: _reduce("sum_columns", lambda a: a.float().sum(0).to(BF16)),
    "sum of all": lambda: _reduce("sum_all", lambda a: a.float().sum().to(BF16)),
    "reduce with a function": lambda: _reduce("own", lambda a: a.float().sum(1).to(BF16)),
    "dot -> float32": lambda: _dot(F32),
    "dot -> bf16": lambda: _dot(BF16),
    "float32 dot in bf16x3": lambda: _dot(F32, "bf16x3", F32),
    "float32 dot in bf16x6": lambda: _dot(F32, "bf16x6", F32),
}


def _same(out: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit, -0 apart from 0, except that a NaN is any NaN."""
    same_sign = torch.signbit(out) == torch.signbit(expected)
    equal = (out == expected) & same_sign | out.isnan() & expected.isnan()
    return out.shape == expected.shape and bool(equal.all())


def right_without_repair() -> list[str]:
    """The cases that match with whatever interpreter this process has. Run unrepaired, in a subprocess."""
    right = []
    for name, case in CASES.items():
        try:
            if _same(*case()):
                right.append(name)
        except Exception as error:  # an exception is not a match; what it is differs between releases
            print(f"{name}: {error}", file=sys.stderr)
    return right


def _interpreter():
    """The module; importing its package repairs, which is too early for what is shown without."""
    from dora_kernels.kernels import interpreter

    return interpreter


@pytest.fixture(autouse=True, scope="module")
def _repaired():
    assert _interpreter().repair()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on inf, NaN and division by zero in float32
@pytest.mark.parametrize("name", CASES)
def test_repaired_matches_torch(name):
    out, expected = CASES[name]()
    assert _same(out, expected), f"got {out[out != expected]}, expected {expected[out != expected]}"


def test_unrepaired_is_wrong_in_every_case():
    """Documents the trap. A name printed here is right upstream by now: drop its case and its repair."""
    code = "import test_interpreter as t; print(*t.right_without_repair(), sep='; ')"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=os.path.dirname(__file__),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.strip() == ""


def test_float_argument_keeps_float64():
    a = _random(16).double()
    out = torch.empty(16, dtype=F64)
    _argument_kernel[1,](a, out, 0.1, BLOCK=16)
    assert _same(out, a * 0.1)  # float32's 0.1 is 1.5e-8 away


def test_a_mask_and_a_scalar():
    """Fails unrepaired on Triton 3.9 alone."""
    a, out = _random(16), torch.zeros(16)
    _mask_and_scalar_kernel[1,](a, out, 9, BLOCK=16)
    assert _same(out, torch.cat([torch.zeros(1), a[1:9], torch.full((7,), 2.0)]))


def test_range_over_run_time_bounds():
    a = _random(9)
    out = torch.empty(1)
    _range_kernel[1,](a, out, 1, 8)
    assert _same(out, a[1] + a[3] + a[5] + a[7:8])


@pytest.mark.parametrize("dtype", [F32, F16])
def test_what_upstream_does_right_stays_right(dtype):
    a, b = _random(128, seed=5).to(dtype), _random(128, seed=6).to(dtype)
    out = torch.empty(128, dtype=dtype)
    _binary_kernel[1,](a, b, out, NAME="mul", BLOCK=128)
    assert _same(out, a * b)
    assert _same(*_cast(BF16, dtype, scale=1e-5))  # normal numbers of bf16, subnormal ones of float16


def test_repair_is_idempotent():
    before = InterpreterBuilder.cast_impl
    assert _interpreter().repair()
    assert InterpreterBuilder.cast_impl is before


@pytest.mark.parametrize("environment", ["no triton", "not interpreting"])
def test_repair_leaves_others_alone(environment):
    """Importing the module needs neither Triton nor NumPy, and without the interpreter it changes nothing."""
    hide = "sys.modules.update(triton=None, numpy=None); importlib.util.find_spec = lambda name: None"
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("alone", {os.path.abspath(_interpreter().__file__)!r})
{hide if environment == "no triton" else ""}
alone = importlib.util.module_from_spec(spec)
spec.loader.exec_module(alone)
assert alone.repair() is False
theirs = sys.modules.get("triton.runtime.interpreter")
assert theirs is None or "repaired" not in theirs.InterpreterBuilder.cast_impl.__name__
"""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
