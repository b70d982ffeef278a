"""The GEMM for Hopper where there is no GPU: right in any order of events, and broken ones are noticed.

tests/support/gluon_simulator.py says what a run of the kernel's source is held to.
"""

import dataclasses
import re

import pytest
import torch

pytest.importorskip("triton")

from dora_kernels.planning.tiles import GEMMS  # noqa: E402
from tests.support.gluon_equivalents import EQUIVALENTS  # noqa: E402
from tests.support.gluon_gemm import SOURCE, Build, fault, idle, simulate  # noqa: E402
from tests.support.gluon_mutants import mutants  # noqa: E402

BUILD = Build().with_config(GROUP_M=3)
BARE = {"low": False, "gain": False, "bias": False}
BUILDS = {
    "two outputs": BUILD,
    "3 stages, 4 slots": BUILD.with_config(stages=3, slots=4),
    "3 stages, wide slots": BUILD.with_config(stages=3, parts=2),
    "one consumer": BUILD.with_config(consumers=1),
    "one output": dataclasses.replace(BUILD, both=False),
    "dx": dataclasses.replace(BUILD, nn=True, both=False, **BARE),
    "dx, two outputs": dataclasses.replace(BUILD, nn=True),
    "no low rank": dataclasses.replace(BUILD, low=False),
    "no gain": dataclasses.replace(BUILD, gain=False),
    "no bias, float16": dataclasses.replace(BUILD, bias=False, dtype=torch.float16),
}
# M, N, K, R, programs. Whole tiles, more than one for a program; tails everywhere; R over one step, rows of tiles that
# are no multiple of a group; one tile and the fewest steps; more programs than tiles
SHAPES = ((64, 64, 48, 8, 3), (50, 100, 45, 4, 2), (33, 65, 41, 17, 5), (16, 32, 40, 2, 1), (64, 32, 64, 8, 6))
# at its own block sizes: what registers and shared memory there are
OWN = dataclasses.replace(BUILD, config=GEMMS["sm_90"]["forward"])
OWN_SHAPE = (150, 300, 384, 16, 3)
# what shows a fault soonest comes first
RUNS = [
    (BUILD, SHAPES[3], 0),
    (BUILD, SHAPES[1], 0),
    (BUILDS["dx"], SHAPES[2], 1),
    (BUILDS["no low rank"], SHAPES[0], 2),
    (BUILDS["one output"], SHAPES[2], 3),
    (BUILDS["one consumer"], SHAPES[0], 4),
    (BUILDS["3 stages, wide slots"], SHAPES[1], 5),
    (BUILDS["no gain"], SHAPES[3], 6),
    (BUILDS["no bias, float16"], SHAPES[4], 7),
    (BUILDS["dx, two outputs"], SHAPES[2], 8),
    (BUILDS["3 stages, 4 slots"], SHAPES[0], 9),
    (OWN, OWN_SHAPE, 10),
    (OWN.with_config(consumers=1), (130, 8, 320, 8, 1), 11),
    (BUILD.with_config(slots=8), SHAPES[3], 12),
]
# what the kernel refuses to compile: slots that do not divide the stores of a tile, and parts that it cannot cut
REFUSED = [
    BUILD.with_config(slots=3),
    BUILDS["one output"].with_config(slots=8),
    BUILD.with_config(parts=1),
    BUILD.with_config(parts=8, BLOCK_N=64),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Products of a few rows go to one thread: another would only spin, and on two busy cores that took 80 of 95 s."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("build", BUILDS)
def test_the_kernel_is_right_in_any_order_of_events(build):
    for shape in SHAPES:
        for seed in range(2):
            simulate(SOURCE, BUILDS[build], shape, seed)


@pytest.mark.nightly
@pytest.mark.parametrize("build", BUILDS)
def test_the_kernel_is_right_in_many_orders_of_events(build):
    for shape in SHAPES:
        for seed in range(2, 22):
            simulate(SOURCE, BUILDS[build], shape, seed)


def test_the_kernel_is_right_with_its_own_blocks_and_fits_a_multiprocessor():
    simulate(SOURCE, OWN, OWN_SHAPE, 0)
    simulate(SOURCE, dataclasses.replace(BUILDS["dx"], config=GEMMS["sm_90"]["dx"]), OWN_SHAPE, 0)


def test_products_stores_and_buffers_are_busy():
    for build, shape, seed in RUNS:
        assert idle(simulate(SOURCE, build, shape, seed), build, shape) is None


LAST = "    acc = warpgroup_mma_wait(0, deps=(acc,))\n"
RELEASE = "    mbarrier.arrive(ring.empty.index(stage), count=1)\n"
INIT = """    for stage in gl.static_range(STAGES):
        mbarrier.init(ring.ready.index(stage), count=1)
        mbarrier.init(ring.empty.index(stage), count=CONSUMERS)
"""
INIT_EMPTY = "        mbarrier.init(ring.empty.index(stage), count=CONSUMERS)\n"
FENCE = "    fence_async_shared()\n"
WHOLE_STEP = "mbarrier.expect(ring.ready.index(stage), STEP_BYTES)"
LOAD_STEP = "            load_step(x, weight, row, column, k, ring, stage, NN)\n"
# what is wrong -> (old, new), and what the simulator says of it
BROKEN = {
    "a buffer given back before the product has read it": (
        ("warpgroup_mma_wait(1, deps", "warpgroup_mma_wait(2, deps"),
        "has a copy write .* beside: consume . has a product read",
    ),
    "a slot reused before its store has read it": (
        ("store_wait(SLOTS - 1)", "store_wait(SLOTS)"),
        "consume . writes .* beside: consume . has a copy read",
    ),
    "gain of the next tile loaded over that of this one": (
        ("k == STAGES * BLOCK_K", "k == 0"),
        "consume . reads .* beside: produce . has a copy write",
    ),
    "gain one step too early": (("== STAGES * BLOCK_K", "== (STAGES - 1) * BLOCK_K"), "beside: consume . reads"),
    "gain that never comes": (("k == STAGES * BLOCK_K", "k == sizes.K"), "nothing has written"),
    "the last buffer of a tile never given back": ((LAST + RELEASE, LAST), "all wait"),
    "the sum read before the last product": ((LAST, ""), "Accumulator"),
    "the sum read with a product in flight": ((LAST, LAST.replace("0", "1")), "read before its last product"),
    "one consumer too few counted": (("count=CONSUMERS", "count=1"), "whose last phase may not have ended|beside"),
    "an arrival that counts twice": ((RELEASE, RELEASE.replace("count=1", "count=2")), "beside|ended|too many"),
    "both consumers on the same rows": (("row + WHICH * ROWS", "row"), "not written once"),
    "columns mixed up": ((".permute((0, 2, 1)).split()", ".reshape((rows, half, 2)).split()"), "is wrong in"),
    "a phase that does not flip": (("phase ^ 1", "phase"), "signals|beside"),
    "the ring taken to be full at first": (("phase = 1 ", "phase = 0 "), "all wait"),
    "the low-rank steps left out": (("if LOW_RANK:", "if False:"), "beside: produce . has a copy write"),
    "the low-rank product not scaled": (("            acc *= scaling\n", ""), "is wrong in"),
    "all of the sum scaled": (
        ("        parts = halves(acc)", "        acc *= scaling\n        parts = halves(acc)"),
        "is wrong in",
    ),
    "z rounded before the gain": (("y_part = z_part", "y_part = z_part.to(y.dtype).to(gl.float32)"), "y is wrong in"),
    "bytes of gain not expected": (("STEP_BYTES + GAIN_BYTES + BIAS_BYTES", "STEP_BYTES + BIAS_BYTES"), "all wait"),
    "bytes that nothing copies expected": ((WHOLE_STEP, WHOLE_STEP.replace("BYTES", "BYTES + 16")), "all wait"),
    "the copies of a step not waited for": (
        ("    mbarrier.wait(ring.ready.index(stage), phase)\n", ""),
        "has a product read .* beside: produce . has a copy write|nothing has written",
    ),
    "a buffer filled again without a wait": (
        ("            mbarrier.wait(ring.empty.index(stage), phase)\n            if", "            if"),
        "may not have ended|beside",
    ),
    "no fence before a store": (("    fence_async_shared()\n    tma_store", "    tma_store"), "without a fence"),
    "a fence before what it is for": (
        (
            "    buffer.store(value.to(output.dtype))\n    fence_async_shared()\n",
            "    fence_async_shared()\n    buffer.store(value.to(output.dtype))\n",
        ),
        "without a fence",
    ),
    "no fence after the barriers' begin": ((INIT + "    fence_async_shared()\n", INIT), "no fence since"),
    "a fence between the barriers' begins": (
        (INIT_EMPTY + FENCE, FENCE + INIT_EMPTY.replace("stage", "0")[4:]),
        "no fence since",
    ),
    "barriers never initialised": ((INIT, ""), "may not be initialised"),
    "a barrier initialised by a role": (
        (
            "    stage = 0\n    phase = 1",
            "    mbarrier.init(ring.ready.index(0), count=1)\n    stage = 0\n    phase = 1",
        ),
        "initialised twice",
    ),
    "barriers initialised after the roles": (
        ("    tma_store_wait(0)\n", "    tma_store_wait(0)\n    mbarrier.init(ring.ready.index(0), count=1)\n"),
        "initialised twice",
    ),
    "stores that nothing waits for": (("    tma_store_wait(0)\n", ""), "ends with stores under way"),
    "one slot for both": (("(1, other_slots, outputs", "(1, slots, outputs"), "consume . writes .* beside: consume"),
    "one slot for all stores": (("number % SLOTS", "0"), "beside"),
    "roles with each other's registers": (
        ("[CONSUMER_REGISTERS, PRODUCER_REGISTERS]", "[PRODUCER_REGISTERS, CONSUMER_REGISTERS]"),
        "registers in one role and",
    ),
    "more registers than there are": (("[CONSUMER_REGISTERS, P", "[CONSUMER_REGISTERS + 16, P"), "registers"),
    "a consumer of one warp": (("            [4, 1],\n", "            [1, 4],\n"), "does not fit|has 1 warps"),
    "more shared memory than there is": (
        ("[STAGES] + weight.block_type.shape", "[STAGES + 1] + weight.block_type.shape"),
        "bytes of shared memory",
    ),
    "another layout than the copies'": (("shape, x.layout)", "shape, weight.layout)"), "holds a block in"),
    "a tile left out": (
        ("range(gl.program_id(0), tile_count", "range(1 + gl.program_id(0), tile_count"),
        "or neither|not written once",
    ),
    "a tile too many": (("BLOCK_N), gl.num_programs(0))", "BLOCK_N) + 1, gl.num_programs(0))"), "a block at"),
    "the first tile by every program": (("gl.program_id(0), tile_count", "0, tile_count"), "not written once"),
    "rows and columns exchanged": (("row, column = corner_of", "column, row = corner_of"), "a block at"),
    "the steps of one tile less for the producer": (
        ("range(0, sizes.K, BLOCK_K)", "range(BLOCK_K, sizes.K, BLOCK_K)"),
        "all wait",
    ),
    "a step more for the producer": (
        ("range(0, sizes.K, BLOCK_K)", "range(0, sizes.K + BLOCK_K, BLOCK_K)"),
        "a block at",
    ),
    "an output loaded": (("operands = Operands(x, ", "operands = Operands(y, "), "a block .* and a buffer"),
    "a call that Gluon does not take": (("mbarrier.arrive(", "mbarrier.arrive(pred_=True, mbarrier="), "argument"),
    "one product at a time": (("warpgroup_mma_wait(1, deps", "warpgroup_mma_wait(0, deps"), "idle"),
    "one store at a time": (("store_wait(SLOTS - 1)", "store_wait(0)"), "idle"),
    "no store under way from one tile to the next": (
        ("    tma_store_wait(0)\n", "        tma_store_wait(0)\n"),
        "idle",
    ),
    "a load at a time": (
        (LOAD_STEP, LOAD_STEP + LOAD_STEP[:12] + "if low is None: mbarrier.wait(ring.ready.index(stage), phase ^ 1)\n"),
        "idle",
    ),
    "rows of tiles not grouped": (("Sizes(M, N, K, R, group_m)", "Sizes(M, N, K, R, 1)"), "another order"),
    "columns before rows": (
        (
            "(first + inside % rows) * BLOCK_M, (inside // rows)",
            "(first + inside // gl.cdiv(sizes.N, BLOCK_N)) * BLOCK_M, (inside % gl.cdiv(sizes.N, BLOCK_N))",
        ),
        "another order",
    ),
    "a buffer of the ring left out": (("stage == STAGES, 0, stage", "stage == STAGES, 1, stage"), "idle"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_noticed(what):
    (old, new), said = BROKEN[what]
    assert SOURCE.count(old) >= 1
    found = fault(SOURCE.replace(old, new), RUNS, REFUSED)
    assert found is not None and re.search(said, found), found


def test_a_share_of_all_mutants_is_noticed():
    for mutant in mutants(SOURCE, step=40):
        if not any(row.covers(mutant) for row in EQUIVALENTS):
            assert fault(mutant.source, RUNS, REFUSED) is not None, str(mutant)


@pytest.mark.nightly
def test_every_mutant_is_noticed_or_as_right():
    survivors = [mutant for mutant in mutants(SOURCE) if fault(mutant.source, RUNS, REFUSED) is None]
    unknown = [str(mutant) for mutant in survivors if not any(row.covers(mutant) for row in EQUIVALENTS)]
    assert not unknown, "\n".join(unknown)
    stale = [row for row in EQUIVALENTS if not any(row.covers(mutant) for mutant in survivors)]
    assert not stale, stale
