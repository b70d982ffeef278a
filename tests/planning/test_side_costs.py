"""What runs beside dx costs nothing until it takes longer than dx."""

from dataclasses import replace

import pytest

from dora_kernels.planning import costs, side_costs
from dora_kernels.planning.costs import Shape
from dora_kernels.planning.measured import BESIDE
from dora_kernels.planning.tiles import PROGRAMS_BESIDE

H200 = replace(costs.DEVICES["NVIDIA H200"], launch=0.0)
LARGE, SQUARE = Shape(8192, 8192, 8192, 64, 2), Shape(8192, 4096, 4096, 64, 2)


def times(shape, device=H200):
    return {name: 1e6 * time for name, time in side_costs.beside_seconds(shape, device).items()}


def alone(shape, device=H200):
    """Microseconds of each step on the whole device."""
    return {step: 1e6 * costs.seconds(made, shape, device) for step, made in costs.sum_costs(shape, device).items()}


def test_all_of_it_comes_after_dx_or_beside_it():
    found, steps = times(LARGE), alone(LARGE)
    assert list(found) == list(BESIDE)
    library = 1e6 * costs.gemm(8192, 8192, 8192, H200).seconds(LARGE, H200)
    assert found["none"] == pytest.approx(library + sum(steps.values()))
    ours = 1e6 * costs.own_gemm(8192, 8192, 8192, 0, H200, free=PROGRAMS_BESIDE).seconds(LARGE, H200)
    assert found["token sums"] == pytest.approx(ours + steps["project"] + steps["outer_product"])
    assert found["low rank"] == pytest.approx(ours + steps["token_sums"])
    side = side_costs.side_of(H200)  # all is more than fits beside dx
    beside = [costs.seconds(made, LARGE, side) for made in costs.sum_costs(LARGE, side, "kernel").values()]
    assert found["all"] == pytest.approx(1e6 * sum(beside)) and found["all"] > 1.5 * ours


def test_beside_dx_a_step_takes_its_reads_at_the_rate_of_four_multiprocessors():
    """dy of 134 MB at 0.36 TB/s, with an eighth as much of the factor for each 128 tokens of R = 16."""
    side, shape = side_costs.side_of(H200), LARGE._replace(R=16)
    P = costs.sum_costs(shape, side, "kernel")["project"]["P"]
    assert 1e6 * P.seconds(shape, side) == pytest.approx(2 * 8192 * 8192 * (1 + 16 / 128) / 0.36e6, rel=0.1)
    # a higher rank is a matter of products: those of R = 384 take a share of 4 / 132 of the device's rate
    shape = LARGE._replace(R=384)
    dA = costs.sum_costs(shape, side, "kernel")["outer_product"]["dA"]
    assert dA.seconds(shape, side) > 2 * 8192 * 8192 * 384 / (790e12 * 4 / 132)


def test_what_is_beside_dx_is_what_is_fastest():
    chosen = {shape: side_costs.fastest_beside(shape, H200) for shape in (LARGE, SQUARE, SQUARE._replace(R=384))}
    for shape, name in chosen.items():
        found = times(shape)
        assert found[name] == min(found.values())
    assert chosen[LARGE] == "low rank" and chosen[SQUARE._replace(R=384)] == "none"
    # with multiprocessors that read more, more fits beside
    assert side_costs.fastest_beside(SQUARE, replace(H200, side=4e12, matmul=1e16)) != "none"


def test_a_round_more_on_fewer_multiprocessors_is_counted():
    """33 x 16 tiles are four rounds of 132 and five of 128."""
    shape = LARGE._replace(M=33 * 128, K=4096, R=16)
    found = [
        costs.own_gemm(shape.M, 4096, 8192, 0, H200, free=free).seconds(shape, H200) for free in (0, PROGRAMS_BESIDE)
    ]
    assert 1e6 * found[1] + alone(shape)["token_sums"] == pytest.approx(times(shape)["low rank"])
    assert found[1] / found[0] == pytest.approx(5 / 4, rel=0.01)


@pytest.mark.parametrize("shape", (LARGE._replace(M=0), LARGE._replace(N=0), LARGE._replace(K=0), LARGE._replace(R=0)))
def test_nothing_runs_beside_nothing(shape):
    assert (
        side_costs.fastest_beside(shape, H200) == "none" and min(side_costs.beside_seconds(shape, H200).values()) >= 0
    )


@pytest.mark.parametrize("name", ("sm_80", "sm_100", "sm_120", "gfx942", "cpu"))
def test_no_other_device_has_a_gemm_of_ours(name):
    assert side_costs.fastest_beside(LARGE, costs.DEVICES[name]) == "none"
