"""The error measure itself: what it accepts and, above all, what it rejects."""

import math

import pytest
import torch

from dora_kernels.testing import compare, geometric_mean, rms_error


def test_rms_error_is_relative_to_the_exact_value():
    exact = torch.tensor([3.0, 4.0])
    assert rms_error(exact, exact) == 0
    assert rms_error(torch.zeros(2), exact) == pytest.approx(1.0)
    assert rms_error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)


def test_nan_inf_and_something_for_nothing_are_infinitely_wrong():
    exact = torch.ones(2)
    assert rms_error(torch.tensor([1.0, math.nan]), exact) == math.inf
    assert rms_error(torch.tensor([1.0, math.inf]), exact) == math.inf
    assert rms_error(exact, torch.zeros(2)) == math.inf
    assert rms_error(torch.zeros(2), torch.zeros(2)) == 0


def test_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"actual has shape \(1, 2\); expected \(2,\)"):
        rms_error(torch.ones(1, 2), torch.ones(2))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_compare(dtype):
    torch.manual_seed(0)
    exact = torch.randn(1000, dtype=torch.float64)
    rounded = exact.to(dtype)
    assert compare("t", rounded, rounded, exact).ok
    assert compare("t", rounded, rounded, exact).ratio == 1
    for wrong in (torch.zeros_like(rounded), rounded * 1.05, rounded * math.nan, -rounded):
        assert not compare("t", wrong, rounded, exact).ok
    # a float32 tensor that went through bfloat16
    if dtype == torch.bfloat16:
        assert not compare("t", rounded.float(), exact.float(), exact).ok
        assert compare("t", rounded.float(), exact.float(), exact, through=dtype).ok


def test_geometric_mean():
    assert geometric_mean([0.5, 2.0, 1.0]) == pytest.approx(1.0)
