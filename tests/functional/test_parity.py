"""Ours is as close to float64 as PEFT, on random configurations: a few at every push, 200 every night."""

import pytest
import torch

pytest.importorskip("peft")

from tests.support import parity_ratios  # noqa: E402
from tests.support.problem import BACKENDS, DTYPES  # noqa: E402


def check(seed: int, count: int, backend: str, dtypes) -> None:
    rows = parity_ratios.measure(seed, count, backend, dtypes)
    assert rows.keys() == {"y", "x", "lora_A", "lora_B", "magnitude", "bias"}
    assert all(row.ok for row in rows.values()), "\n".join(f"{name}: {row}" for name, row in rows.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=parity_ratios.NAMES.values())
def test_as_exact_as_peft(dtypes, backend):
    check(1, 8, backend, dtypes)


@pytest.mark.nightly
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=parity_ratios.NAMES.values())
def test_as_exact_as_peft_on_200_configurations(dtypes, backend):
    check(2, 200, backend, dtypes)


def test_the_promise_rejects_what_is_worse():
    """Errors half as large again, or one result four times as far off, or nothing but zeros."""

    def row(*errors: float) -> parity_ratios.Row:
        return parity_ratios.Row.of([parity_ratios.Comparison("y", error, 1e-3, 1e-7) for error in errors])

    fine = [1e-3, 0.9e-3, 1.1e-3, 1e-3] * 5
    assert row(*fine).ok
    assert not row(*(1.5 * error for error in fine)).ok
    assert not row(*fine, 4e-3).ok
    assert not row(*(1.0 for _ in fine)).ok


def test_the_yardstick_is_peft():
    """PEFT's own layer, called with our tensors, computes the definition: in float64 there is nothing between them."""
    problem = parity_ratios.configurations(3, 1)[0].problem(torch.float64, torch.float64)
    exact = problem.exact()
    stock = problem.run(parity_ratios.peft_dora)
    for name in exact:
        torch.testing.assert_close(stock[name], exact[name])
