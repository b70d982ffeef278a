"""The experimental GEMM of bench/studies/gluon where there is no GPU: what it computes, in simulated orders of events;
that kernels broken on purpose are noticed; and that it compiles into what a program on sm_90 has.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.studies.gluon.gemm import SHARED_LIMIT, VARIANTS, GemmVariant, launcher, why_not_gluon
from dora_kernels.testing import rms_error
from tests.support.gluon_schedule import Deadlock
from tests.support.gluon_simulator import Descriptor, Simulator

ROOT = Path(__file__).parents[2]
needs_gluon = pytest.mark.skipif(why_not_gluon() is not None, reason="this Triton has no such Gluon")
SOURCE = (ROOT / "bench" / "studies" / "gluon" / "kernel.py").read_text()
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
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).bfloat16()

    x, low, bias = normal(M, K), normal(M, R), normal(N)
    weight, lora = (normal(K, N), normal(R, N)) if variant.nn else (normal(N, K), normal(N, R))
    gain = torch.rand(N, generator=generator) + 0.5
    y, z = (torch.full((M, N), float("nan"), dtype=torch.bfloat16) for _ in range(2))
    left, right = (block_m, block_k), (block_k, block_n) if variant.nn else (block_n, block_k)
    out = (block_m // variant.consumers, block_n // variant.parts)
    descriptors = [Descriptor(tensor, block) for tensor, block in ((x, left), (weight, right), (low, left))]
    descriptors += [Descriptor(lora, right), Descriptor(y, out), Descriptor(z, out)]
    descriptors += [Descriptor(gain, (block_n,)), Descriptor(bias, (block_n,))]
    simulator = Simulator()
    kernel = simulator.load(source).gemm_kernel
    simulator.launch(kernel, programs, seed, *descriptors, M, N, K, R, 8, *variant.constants().values())
    weight, lora = (weight, lora) if variant.nn else (weight.T, lora.T)
    exact = x.double() @ weight.double() + low.double() @ lora.double()
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
LAST = "        acc = warpgroup_mma_wait(0, deps=(acc,))\n"
RELEASE = "        mbarrier.arrive(empty.index(before), count=1)\n"
BROKEN = {
    "a buffer given back before the product has read it": ("warpgroup_mma_wait(1, deps", "warpgroup_mma_wait(2, deps"),
    "a slot reused before its store has read it": ("store_wait(SLOTS - 1)", "store_wait(SLOTS)"),
    "gain of the next tile loaded over that of this one": ("== STAGES * BLOCK_K", "== 0"),
    "the last buffer of a tile never given back": (LAST + RELEASE, LAST),
    "the result read before the last product": (LAST, ""),
    "one consumer too few counted": ("count=CONSUMERS", "count=1"),
    "both consumers on the same rows": ("row = m * BLOCK_M + WHICH * ROWS", "row = m * BLOCK_M"),
    "columns mixed up": (".permute((0, 2, 1)).split()", ".reshape((rows, half, 2)).split()"),
    "a phase that does not flip": (FLIP, ""),
    "the low-rank steps left out": (" + gl.cdiv(R, BLOCK_K)", ""),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_noticed(what):
    old, new = BROKEN[what]
    assert SOURCE.count(old) >= 1
    source = SOURCE.replace(old, new)
    if new == "== 0":
        source = source.replace("pred=k != STAGES * BLOCK_K", "pred=k != 0")
    for seed in range(20):
        try:
            found = errors(source, VARIANTS["two outputs"], (64, 64, 48, 8, 2), seed)
        except (Deadlock, AssertionError):
            return
        if wrong(found):
            return
    pytest.fail(f"not noticed in 20 orders of events: {what}")


def test_slots_that_do_not_divide_the_stores_of_a_tile_are_refused():
    """Five slots for eight stores would look better; a tile would begin at a slot that is still being read."""
    with pytest.raises(AssertionError, match="static_assert"):
        errors(SOURCE, GemmVariant(slots=5), SHAPES[0], 0)
    check = "    gl.static_assert((2 * PARTS if BOTH else PARTS) % SLOTS == 0)\n"
    assert check in SOURCE
    unchecked = (errors(SOURCE.replace(check, ""), GemmVariant(slots=5), SHAPES[0], seed) for seed in range(20))
    assert any(wrong(found) for found in unchecked)


def compiled(code: str) -> subprocess.CompletedProcess:
    """Run Python in a process where Triton compiles; in this one it may be interpreting."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)


COMPILE = """
from bench.studies.gluon import gemm
assert gemm.main() == 0
print("five stages")
assert gemm.main({"too large": gemm.GemmVariant(stages=5)}) == 1
"""


@pytest.mark.nightly
@needs_gluon
def test_every_variant_compiles_into_what_a_program_has():
    done = compiled(COMPILE)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.partition("five stages")[0].splitlines()
    assert [line[:34].strip() for line in lines] == list(VARIANTS)
    for line in lines:
        stack, shared = (int(line.split(f" {word} ")[1].split()[0]) for word in ("stack", "shared"))
        assert stack == 0 and 200_000 < shared <= SHARED_LIMIT, line


# A driver that knows its device and no more: the JIT binds the arguments and compiles, and would launch next.
LAUNCH = """
import torch, triton
from triton.backends.compiler import GPUTarget
from bench.studies.gluon import gemm, kernel

class Driver:
    get_current_device = get_current_stream = lambda *arguments: 0
    get_current_target = lambda *arguments: GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
run, compiled, grids = kernel.gemm_kernel.run, [], []

def warmup(*arguments, grid, warmup, **options):
    grids.append(grid)
    compiled.append(run(*arguments, grid=grid, warmup=True, **options))

kernel.gemm_kernel.run = warmup

def bf16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)

M, N, K, R = 1000, 1032, 520, 8
for variant in (gemm.VARIANTS["two outputs"], gemm.VARIANTS["dx"]):
    weight, lora = (bf16(K, N), bf16(R, N)) if variant.nn else (bf16(N, K), bf16(N, R))
    z = bf16(M, N) if variant.both else None
    arguments = bf16(M, K), weight, torch.zeros(N), bf16(N), bf16(M, N), z
    gemm.launcher(variant, *arguments, bf16(M, R), lora, programs=7)()
    gemm.launcher(variant, *arguments, programs=1000)()
    ahead = gemm.compile_ahead(variant)
    assert compiled[-1] is compiled[-2], "a launch without an adapter compiles anew"
    assert compiled[-1].src.signature == ahead.src.signature
    assert compiled[-1].asm["cubin"] == ahead.asm["cubin"]
    assert grids[-2:] == [(7,), (8 * 5,)], grids
"""


@pytest.mark.nightly
@needs_gluon
def test_what_is_compiled_ahead_is_what_a_launch_compiles():
    done = compiled(LAUNCH)
    assert done.returncode == 0, done.stderr


@needs_gluon
def test_the_launcher_refuses_what_the_kernel_cannot_take():
    def bf16(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    x, weight, gain, bias, y = bf16(64, 256), bf16(64, 256), torch.zeros(64), bf16(64), bf16(64, 64)
    one = VARIANTS["one output"]
    with pytest.raises(ValueError, match="more than 4 steps of 64"):  # gain comes with the fifth
        launcher(one, x, weight, gain, bias, y, programs=1)
    x, weight = bf16(64, 320), bf16(64, 320)
    launcher(one, x, weight, gain, bias, y, programs=1)
    with pytest.raises(ValueError, match="both or neither"):
        launcher(one, x, weight, gain, bias, y, y, programs=1)
    with pytest.raises(ValueError, match="weight has shape"):
        launcher(one, x, bf16(320, 64), gain, bias, y, programs=1)
    with pytest.raises(ValueError, match="gain is torch.bfloat16"):
        launcher(one, x, weight, bias, bias, y, programs=1)
