"""One layer's change in magnitude and direction, against the definitions computed with 50 digits; and the lines."""

from decimal import Decimal, getcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_kernels import quant
from dora_kernels.extras.analysis import Analysis, Change, Point, adapter_change, trend, weight_change

N, K, R = 12, 40, 4
getcontext().prec = 50
SIZES = (1.0, 1e-2, 1e-4, 1e-6, 1e-8)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(weight, tuned):
    """delta M and delta D by their definitions, with 50 digits."""
    magnitudes, directions = [], []
    for w, v in zip(weight, tuned, strict=True):
        w, v = ([x if isinstance(x, Decimal) else Decimal(float(x)) for x in row] for row in (w, v))
        ww, vv, wv = (sum(a * b for a, b in zip(*pair, strict=True)) for pair in ((w, w), (v, v), (w, v)))
        magnitudes.append(abs(vv.sqrt() - ww.sqrt()))
        if ww and vv:
            directions.append(1 - wv / (ww.sqrt() * vv.sqrt()))
    mean = [float(sum(values) / len(values)) for values in (magnitudes, directions)]
    return pytest.approx(mean[0], rel=1e-6, abs=0), pytest.approx(mean[1], rel=1e-6, abs=0)


def merged(weight, lora_A, lora_B, scaling, magnitude=None):
    """The tuned rows of an adapter as lists of Decimal."""
    w, a, b = ([[Decimal(float(x)) for x in row] for row in matrix] for matrix in (weight, lora_A, lora_B))
    columns = list(zip(*a, strict=True))
    rows = []
    for n, row in enumerate(w):
        change = [sum(x * y for x, y in zip(b[n], column, strict=True)) for column in columns]
        v = [x + Decimal(scaling) * c for x, c in zip(row, change, strict=True)]
        if magnitude is not None:
            norm = sum(x * x for x in v).sqrt()
            v = [x * Decimal(float(magnitude[n])) / norm for x in v]
        rows.append(v)
    return rows


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
def test_lora_is_the_dense_computation(size, dtype):
    adapter = random(R, K, seed=1, dtype=torch.float32), random(N, R, seed=2, dtype=torch.float32)
    problem = random(N, K, dtype=dtype), *adapter, size
    change = adapter_change(*problem)
    assert (change.delta_magnitude, change.delta_direction) == dense(problem[0], merged(*problem))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("sign", (1, -1, None))
def test_dora_is_the_dense_computation(size, dtype, sign):
    """Gains between 1/4 and 4; a negative magnitude turns a row round, and None is of either sign."""
    magnitude = random(N, K).norm(dim=1) * torch.logspace(-2, 2, N, base=2)
    magnitude = (magnitude * (random(N, seed=3).sign() if sign is None else sign)).to(dtype)
    problem = random(N, K, dtype=dtype), random(R, K, seed=1), random(N, R, seed=2), size, magnitude
    change = adapter_change(*problem)
    assert (change.delta_magnitude, change.delta_direction) == dense(problem[0], merged(*problem))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_a_dense_weight_is_the_dense_computation(size, dtype):
    """A change below the dtype's resolution is none at all, or one of a few elements."""
    weight = random(N, K, dtype=dtype)
    tuned = (weight.double() + size * random(N, K, seed=1)).to(dtype)
    change = weight_change(weight, tuned)
    assert (change.delta_magnitude, change.delta_direction) == dense(weight, tuned)
    assert size < 1e-2 or change.delta_direction > 0


def test_rows_that_turn_round():
    """w.v < 0, where the formula for small angles would divide by next to nothing."""
    weight = random(N, K)
    for tuned in (-weight, -weight + 1e-3 * random(N, K, seed=1), -3 * weight + random(N, K, seed=2)):
        change = weight_change(weight, tuned)
        assert (change.delta_magnitude, change.delta_direction) == dense(weight, tuned)
    assert weight_change(weight, -weight) == Change(0.0, 2.0)


def test_a_change_along_the_row_turns_nothing():
    weight = random(N, K)
    change = weight_change(weight, 1.5 * weight)
    assert change.delta_direction < 1e-12
    assert change.delta_magnitude == pytest.approx(0.5 * weight.double().norm(dim=1).mean().item(), rel=1e-6)
    for seed in range(50):  # rounding has either sign
        row = random(1, K, seed=seed)
        along = adapter_change(row, row, torch.ones(1, 1), 1e-3)
        assert 0 <= along.delta_direction < 1e-15
        assert along.delta_magnitude == pytest.approx(1e-3 * row.double().norm().item(), rel=1e-9)
        round_and_along = adapter_change(row, row, torch.ones(1, 1), -3.0 - seed)
        assert 2 - 1e-12 < round_and_along.delta_direction <= 2


def test_a_change_in_the_last_bits_of_float64():
    weight = random(N, K, dtype=torch.float64)
    tuned = torch.where(random(N, K, seed=1) > 0, weight * (1 + 2**-51), weight)
    change = weight_change(weight, tuned)
    assert 0 < change.delta_magnitude < 1e-14 and 0 < change.delta_direction < 1e-30
    assert (change.delta_magnitude, change.delta_direction) == dense(weight, tuned)


def test_no_update_is_exactly_nothing():
    weight, lora_A, lora_B = random(N, K), random(R, K, seed=1), torch.zeros(N, R)
    for change in (weight_change(weight, weight.clone()), adapter_change(weight, lora_A, lora_B, 2.0)):
        assert (change.delta_magnitude, change.delta_direction) == (0.0, 0.0)
    change = adapter_change(weight, lora_A, lora_B, 2.0, weight.double().norm(dim=1))
    assert change.delta_direction == 0.0 and change.delta_magnitude < 1e-14


def test_rows_of_zeros_have_a_norm_and_no_direction():
    weight, lora_A, lora_B = random(N, K, dtype=torch.float64), random(R, K, seed=1), random(N, R, seed=2)
    weight[0] = 0  # before
    lora_B[1] = 0
    weight[1] = 0  # before and after
    weight[2] = -(lora_B[2].double() @ lora_A.double())  # after, but for rounding
    magnitude = torch.linspace(1, 3, N)
    tuned = weight + lora_B.double() @ lora_A.double()
    change = adapter_change(weight, lora_A, lora_B, 1.0)
    norms = weight.norm(dim=1), tuned.norm(dim=1)
    assert change.delta_magnitude == pytest.approx((norms[1] - norms[0]).abs().mean().item(), rel=1e-12)
    cosines = torch.cosine_similarity(weight[3:], tuned[3:], dim=1)
    assert change.delta_direction == pytest.approx((1 - cosines).mean().item(), rel=1e-12)
    # DoRA: gain 0 where the norm is 0, whatever the magnitude
    change = adapter_change(weight, lora_A, lora_B, 1.0, magnitude)
    after = torch.where(tuned.norm(dim=1) < 1e-9, 0, magnitude.double())
    assert change.delta_magnitude == pytest.approx((after - norms[0]).abs().mean().item(), rel=1e-12)
    assert change.delta_direction == pytest.approx((1 - cosines).mean().item(), rel=1e-12)
    nothing = weight_change(torch.zeros(2, 3), torch.ones(2, 3))
    assert nothing.delta_direction is None and nothing.delta_magnitude == pytest.approx(3**0.5)


def test_a_magnitude_of_zero_leaves_no_direction():
    change = adapter_change(random(N, K), random(R, K, seed=1), random(N, R, seed=2), 1.0, torch.zeros(N))
    assert change.delta_direction is None
    assert change.delta_magnitude == pytest.approx(random(N, K).norm(dim=1).mean().item(), rel=1e-6)


def test_blocks_of_rows_and_ranks_above_K_change_nothing(monkeypatch):
    wide = random(3 * K, K, seed=4)
    problem = random(N, K), wide, random(N, 3 * K, seed=2), 0.1
    before = adapter_change(*problem), weight_change(problem[0], random(N, K, seed=5))
    assert before[0].delta_direction == dense(problem[0], merged(*problem))[1]
    monkeypatch.setattr("dora_kernels.extras.analysis.measure._BLOCK_BYTES", 8 * K * 5)  # blocks of 5, 5 and 2 rows
    after = adapter_change(*problem), weight_change(problem[0], random(N, K, seed=5))
    for one, other in zip(before, after, strict=True):
        assert one.delta_direction == pytest.approx(other.delta_direction, rel=1e-12)
        assert one.delta_magnitude == pytest.approx(other.delta_magnitude, rel=1e-12)


def test_a_quantised_weight_is_its_decoded_self():
    q, scale = torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N) + 0.1
    weight = quant.QuantizedWeight("row8", (N, K), torch.float32, (q, scale))
    lora_A, lora_B = random(R, K, seed=1), random(N, R, seed=2)
    assert adapter_change(weight, lora_A, lora_B, 0.5) == adapter_change(weight.dequantize(), lora_A, lora_B, 0.5)
    assert weight_change(weight, random(N, K)) == weight_change(weight.dequantize(), random(N, K))


seeds = st.integers(0, 2**31)


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(-8, 1), st.floats(-6, 6))
def test_scaling_a_tuned_row_turns_nothing(seed, size, scale):
    weight, step = random(N, K, dtype=torch.float64), random(N, K, seed=seed + 1, dtype=torch.float64)
    tuned = weight + 10**size * step
    # by powers of two: any other scale rounds, and with it turns the row
    scaled = tuned * torch.exp2(random(N, 1, seed=seed, dtype=torch.float64).add(scale).round())
    plain, stretched = weight_change(weight, tuned), weight_change(weight, scaled)
    assert 0 <= plain.delta_direction <= 2
    assert stretched.delta_direction == pytest.approx(plain.delta_direction, rel=1e-4, abs=1e-29)


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(-8, 2), st.booleans(), st.integers(1, K + 3))
def test_an_adapter_changes_as_its_merged_weight_does(seed, size, dora, rank):
    weight = random(N, K, seed=seed, dtype=torch.float64)
    lora_A, lora_B = random(rank, K, seed=seed + 1), random(N, rank, seed=seed + 2)
    magnitude = torch.rand(N, generator=torch.Generator().manual_seed(seed)) * 10 if dora else None
    tuned = weight + 10**size * lora_B.double() @ lora_A.double()
    change = adapter_change(weight, lora_A, lora_B, 10**size, magnitude)
    # the merged weight is rounded to float64: 1e-16 of a row's size may be 1e-8 of its change, and is across it
    assert change.delta_direction == pytest.approx(weight_change(weight, tuned).delta_direction, rel=1e-4)
    if dora:
        norms = magnitude.double() - weight.norm(dim=1)
        assert change.delta_magnitude == pytest.approx(norms.abs().mean().item(), rel=1e-12)
    else:
        assert change.delta_magnitude == pytest.approx(weight_change(weight, tuned).delta_magnitude, rel=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lora_A": random(R, K + 1)}, "lora_A has shape"),
        ({"lora_B": random(N, R + 1)}, "lora_B has shape"),
        ({"magnitude": random(N, 1)}, "magnitude has shape"),
        ({"weight": random(N)}, "expected \\(N, K\\)"),
        ({"weight": torch.ones(N, K, dtype=torch.uint8)}, "expected floating point"),
        ({"weight": random(N, K) / 0}, "not finite"),
        ({"lora_B": random(N, R) * torch.nan}, "not finite"),
        ({"magnitude": random(N) / 0}, "not finite"),
    ],
)
def test_refusals_of_an_adapter(change, message):
    problem = {"weight": random(N, K), "lora_A": random(R, K), "lora_B": random(N, R), "scaling": 1.0, **change}
    with pytest.raises(ValueError, match=f"adapter_change: .*{message}"):
        adapter_change(**problem)


def test_refusals_of_a_weight():
    with pytest.raises(ValueError, match="weight_change: tuned has shape"):
        weight_change(random(N, K), random(K, N))
    with pytest.raises(ValueError, match="weight_change: the change is not finite"):
        weight_change(random(N, K), random(N, K) * torch.nan)


def points(pairs, method="full"):
    return [Point(f"layer{i}", "run", method, y, x) for i, (x, y) in enumerate(pairs)]


def test_the_line_and_its_correlation():
    line = trend(points([(1.0, 5.0), (2.0, 3.0), (3.0, 4.0)]))
    assert (line.count, line.slope, line.intercept) == (3, pytest.approx(-0.5), pytest.approx(5.0))
    assert line.correlation == pytest.approx(-0.5)
    tiny = trend(points([(1e-14, 5e-9), (2e-14, 3e-9), (3e-14, 4e-9)]))
    assert tiny.correlation == pytest.approx(-0.5) and tiny.slope == pytest.approx(-0.5e5)


def test_no_line_is_None_and_not_NaN():
    for same in ([(1.0, 2.0)], [(1.0, 2.0), (1.0, 2.0)], [(1.0, 2.0), (1.0, 3.0)]):
        line = trend(points(same))
        assert (line.slope, line.intercept, line.correlation) == (None, None, None)
    level = trend(points([(1.0, 2.0), (2.0, 2.0)]))
    assert (level.slope, level.correlation) == (0.0, None)
    both = Analysis(points([(1.0, 2.0)]) + points([(1.0, 2.0), (2.0, 3.0)], "DoRA"))
    assert list(both.trends()) == ["full", "DoRA"] and both.trends()["DoRA"].correlation == pytest.approx(1)
    assert "none" in str(both) and "nan" not in str(both)
