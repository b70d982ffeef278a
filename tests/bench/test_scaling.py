"""The arithmetic of docs/scaling.md against what the model and the layers really have."""

import pytest
import torch

from bench.studies import scaling
from dora_kernels import DoraLinear


def test_the_weights_are_the_published_models():
    """70.55e9 parameters, says the model's card; embedding, head and norms are not linear layers of a block."""
    others = 2 * scaling.VOCABULARY * scaling.HIDDEN + (2 * scaling.BLOCKS + 1) * scaling.HIDDEN
    assert scaling.linear_weights() + others == 70_553_706_496


def test_the_adapters_are_those_of_the_layers():
    trained = 0
    for N, K, count in scaling.layers():
        layer = DoraLinear(K, N, scaling.RANK, 1.0, False, device="meta", dtype=torch.bfloat16)
        trained += count * sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
    assert scaling.BLOCKS * trained == scaling.adapter_weights()


@pytest.mark.parametrize("base", ("bf16", "NF4"))
@pytest.mark.parametrize("ranks", scaling.LINKS)
def test_sharding_divides_what_is_held_and_costs_what_is_received(ranks, base):
    sharded, whole = (scaling.RankStep(ranks, base, sharded) for sharded in (True, False))
    assert sharded.base_bytes * ranks == pytest.approx(whole.base_bytes)
    assert sharded.adapter_bytes * ranks == pytest.approx(whole.adapter_bytes)
    # every other rank's part of the base, twice
    others = (ranks - 1) / ranks * scaling.linear_weights() * sharded.itemsize
    assert sharded.received - 3 / 2 * whole.received == pytest.approx(2 * others)


def test_a_faster_link_makes_the_step_shorter_and_nothing_else():
    step = scaling.RankStep(64, "bf16", True)
    assert step.seconds_received == step.received / 50e9
    assert step.seconds_computed == scaling.RankStep(8, "bf16", False).seconds_computed
    frozen = sum(2 * N * K * count for N, K, count in scaling.layers()) * 3 * scaling.TOKENS * scaling.BLOCKS
    assert frozen / 790e12 < step.seconds_computed < 1.5 * frozen / 790e12
