"""tools/traffic.py counts the bytes that programs load, from Triton's intermediate code and the work they share out."""

import pathlib
import sys
from types import SimpleNamespace

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import traffic  # noqa: E402

# shortened from a kernel of Triton 3.7.1 that loads lora_B once in a block, and base and low in each of its steps
TTIR = """
  tt.func public @_kernel(%base: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("base"(#loc))) attributes {a = false} {
    %first = tt.load %scalar : !tt.ptr<i64> loc(#loc2)
    scf.for %block = %a to %b step %c  : i64 {
      %B = tt.load %1, %2, %3 : tensor<128x64x!tt.ptr<bf16>> loc(#loc3)
      %sum = scf.for %part = %a to %b step %c iter_args(%s = %z) -> (tensor<128xf32>)  : i32 {
        %one = tt.load %4, %2, %3 : tensor<128x!tt.ptr<f32>> loc(#loc4)
        scf.yield %one : tensor<128xf32> loc(#loc4)
      } loc(#loc5)
      %y = scf.for %step = %a to %b step %c iter_args(%s = %z) -> (tensor<128xf32>)  : i32 {
        %base_tile = tt.load %5, %2, %3 : tensor<64x128x!tt.ptr<bf16>> loc(#loc6)
        %low = tt.load %6, %2, %3 : tensor<64x64x!tt.ptr<bf16>> loc(#loc6)
        %r = "tt.reduce"(%low) <{axis = 1 : i32}> ({
        ^bb0(%x: f32 loc(#loc7), %y: f32 loc(#loc7)):
          tt.reduce.return %x : f32 loc(#loc7)
        }) : (tensor<64x64xf32>) -> tensor<64xf32> loc(#loc7)
        scf.yield %r : tensor<128xf32> loc(#loc6)
      } {tt.num_stages = 3 : i32} loc(#loc6)
      scf.if %last {
        scf.for %part = %a to %b step %c  : i32 {
          %many = tt.load %7, %2, %3 : tensor<128x64x!tt.ptr<f32>> loc(#loc8)
        } loc(#loc8)
      } else {
        %other = tt.load %8, %2, %3 : tensor<128x!tt.ptr<f32>> loc(#loc8)
      } loc(#loc8)
      %codes = tt.load %9, %2, %3 : tensor<16x!tt.ptr<i8>> loc(#loc9)
    } loc(#loc9)
    tt.return loc(#loc10)
  } loc(#loc10)
"""
BLOCK, STEP = 128 * 64 * 2 + 16, 64 * 128 * 2 + 64 * 64 * 2


def launched(programs: int, blocks: int, steps: int) -> SimpleNamespace:
    return SimpleNamespace(grid=(programs,), work=SimpleNamespace(blocks=blocks, steps=steps))


def test_bytes_of_one_pass_of_each_loop():
    assert traffic.tile_bytes(TTIR) == {"": 0, "1": BLOCK, "1.1": 128 * 4, "1.2": STEP}


@pytest.mark.parametrize(
    "programs, blocks, steps, visits",
    [
        (4, 4, 10, 4),
        (8, 4, 10, 8),  # two programs a block
        (3, 4, 10, 6),  # 0 to 13, 13 to 26, 26 to 40: each has steps of two blocks
        (1, 4, 10, 4),
    ],
)
def test_a_step_is_loaded_once_and_a_block_by_each_program_that_has_some_of_it(programs, blocks, steps, visits):
    assert traffic.loaded(launched(programs, blocks, steps), TTIR) == visits * BLOCK + blocks * steps * STEP


def test_without_loops_every_program_loads_its_tile():
    ttir = "tt.func {\n%B = tt.load %1, %2, %3 : tensor<128x64x!tt.ptr<bf16>> loc(#loc3)\n}"
    assert traffic.loaded(SimpleNamespace(grid=(3, 5), work=None), ttir) == 15 * 128 * 64 * 2


def test_what_is_not_known_is_0():
    deeper = TTIR.replace('%r = "tt.reduce"', 'scf.for %r = %a to %b step %c : i32 {\n}\n%r = "tt.reduce"')
    assert traffic.loaded(launched(4, 4, 10), deeper) == 0
    assert traffic.loaded(SimpleNamespace(grid=(4,), work=None), TTIR) == 0


def test_a_gemm_loads_both_blocks_at_each_step_of_a_tile_and_its_columns_once_a_row_of_tiles():
    def gemm(nn: bool, R: int, **columns: int) -> SimpleNamespace:
        blocks = {"x": (128, 64), "weight": (64, 256) if nn else (256, 64)}
        sizes = {"M": 300, "N": 512, "K": 320, "R": R}
        return SimpleNamespace(blocks=lambda: blocks, sizes=sizes, constants=lambda: {"NN": nn}, bytes_of=columns)

    step = 2 * (128 * 64 + 256 * 64)
    assert traffic.of_gemm(gemm(True, 0)) == 3 * 2 * 5 * step
    assert traffic.of_gemm(gemm(False, 16, gain=4 * 512, bias=2 * 512)) == 3 * 2 * 6 * step + 3 * 6 * 512
