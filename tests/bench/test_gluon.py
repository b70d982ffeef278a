"""The GEMM for Hopper where there is no GPU: what it computes, in simulated orders of events; and that one which is
broken on purpose is noticed.
"""

import dataclasses
from pathlib import Path

import pytest
import torch

from bench.studies.gluon.gemm import CONFIG, VARIANTS, GemmVariant
from dora_kernels.kernels.hopper import launch
from dora_kernels.testing import rms_error
from tests.support.gluon_schedule import Deadlock
from tests.support.gluon_simulator import Descriptor, Simulator

ROOT = Path(__file__).parents[2]
SOURCE = (ROOT / "dora_kernels" / "kernels" / "hopper" / "gemm.py").read_text()
SCALING = 0.7
BF16 = 2**-8  # the spacing of bf16 below 1; a product rounded once is 0.0017 off
# blocks of the simulated kernel: steps of K as few elements as possible, so that there are many
SMALL = (16, 32, 8)
# M, N, K, R, programs. Whole tiles, more programs than one has tiles for; tails everywhere; R over one step;
# one tile and the fewest steps; more programs than tiles
SHAPES = ((64, 64, 48, 8, 3), (50, 100, 45, 4, 2), (33, 70, 96, 24, 5), (16, 32, 40, 2, 1), (64, 32, 64, 8, 6))


def errors(
    source: str, variant: GemmVariant, shape: tuple[int, ...], seed: int, tile: tuple[int, ...] = SMALL
) -> dict[str, float]:
    """The errors of y and z against float64, of the kernel with these blocks, in one order of events."""
    M, N, K, R, programs = shape
    block_m, block_n, block_k = tile
    config = dataclasses.replace(variant.config, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).bfloat16()

    x, low, bias = normal(M, K), normal(M, R), normal(N)
    weight, lora = (normal(K, N), normal(R, N)) if variant.nn else (normal(N, K), normal(N, R))
    gain = torch.rand(N, generator=generator) + 0.5
    y, z = (torch.full((M, N), float("nan"), dtype=torch.bfloat16) for _ in range(2))
    tensors = {"x": x, "weight": weight, "low": low, "lora": lora, "y": y, "z": z, "gain": gain, "bias": bias}
    blocks = launch.blocks(config, variant.nn)
    given = [
        None if dtype is None else Descriptor(tensors[name], blocks[name]) for name, dtype in variant.dtypes().items()
    ]
    simulator = Simulator()
    kernel = simulator.load(source).gemm_kernel
    constants = {name: value for name, value in launch.constants(config, variant.nn).items() if name.isupper()}
    simulator.launch(kernel, programs, seed, *given, M, N, K, R, SCALING, 8, *constants.values())
    weight, lora = (weight, lora) if variant.nn else (weight.T, lora.T)
    exact = x.double() @ weight.double()
    if not variant.adapter:
        return {"y": rms_error(y, exact)}
    exact += SCALING * low.double() @ lora.double()
    found = {"y": rms_error(y, gain.double() * exact + bias.double())}
    return found | ({"z": rms_error(z, exact)} if variant.both else {})


def wrong(found: dict[str, float]) -> dict[str, float]:
    return {name: error for name, error in found.items() if not error < BF16}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernel_is_right_in_any_order_of_events(variant):
    for shape in SHAPES:
        for seed in range(3):
            assert not wrong(errors(SOURCE, VARIANTS[variant], shape, seed)), (shape, seed)


@pytest.mark.nightly
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernel_is_right_in_many_orders_of_events(variant):
    for shape in SHAPES:
        for seed in range(20):
            assert not wrong(errors(SOURCE, VARIANTS[variant], shape, seed)), (shape, seed)


@pytest.mark.nightly
@pytest.mark.parametrize("variant", ["two outputs", "dx"])
def test_the_kernel_is_right_at_its_own_block_sizes(variant):
    assert not wrong(errors(SOURCE, VARIANTS[variant], (300, 600, 384, 16, 3), 0, (128, 256, 64)))


FLIP = "    phase = gl.where(stage == STAGES, phase ^ 1, phase)\n"
LAST = "    acc = warpgroup_mma_wait(0, deps=(acc,))\n"
RELEASE = "    mbarrier.arrive(ring.empty.index(stage), count=1)\n"
BROKEN = {
    "a buffer given back before the product has read it": ("warpgroup_mma_wait(1, deps", "warpgroup_mma_wait(2, deps"),
    "a slot reused before its store has read it": ("store_wait(SLOTS - 1)", "store_wait(SLOTS)"),
    "gain of the next tile loaded over that of this one": ("== STAGES * BLOCK_K", "== 0"),
    "the last buffer of a tile never given back": (LAST + RELEASE, LAST),
    "the result read before the last product": (LAST, ""),
    "one consumer too few counted": ("count=CONSUMERS", "count=1"),
    "both consumers on the same rows": ("row + WHICH * ROWS", "row"),
    "columns mixed up": (".permute((0, 2, 1)).split()", ".reshape((rows, half, 2)).split()"),
    "a phase that does not flip": (FLIP, ""),
    "the low-rank steps left out": ("if LOW_RANK:", "if False:"),
    "the low-rank product not scaled": ("            acc *= scaling\n", ""),
    "all of the sum scaled": ("        parts = halves(acc)", "        acc *= scaling\n        parts = halves(acc)"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_noticed(what):
    old, new = BROKEN[what]
    assert SOURCE.count(old) >= 1
    source = SOURCE.replace(old, new)
    for seed in range(20):
        try:
            found = errors(source, VARIANTS["two outputs"], (64, 64, 48, 8, 2), seed)
        except (Deadlock, AssertionError):
            return
        if wrong(found):
            return
    pytest.fail(f"not noticed in 20 orders of events: {what}")


FIVE = GemmVariant(dataclasses.replace(CONFIG, slots=5))


def test_slots_that_do_not_divide_the_stores_of_a_tile_are_refused():
    """Five slots for eight stores would look better; a tile would begin at a slot that is still being read."""
    with pytest.raises(AssertionError, match="static_assert"):
        errors(SOURCE, FIVE, SHAPES[0], 0)
    check = "    gl.static_assert((PARTS if z is None else 2 * PARTS) % SLOTS == 0)\n"
    assert check in SOURCE
    unchecked = (errors(SOURCE.replace(check, ""), FIVE, SHAPES[0], seed) for seed in range(20))
    assert any(wrong(found) for found in unchecked)
