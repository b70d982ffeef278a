"""The tiles of a weight as it is stored: how they are loaded, and looked up; see also tests/quant/."""

import dataclasses

import pytest
import torch

from dora_kernels.planning.tiles import Config
from tests.support.packed_weights import quantized
from tests.support.problem import DEVICE
from tests.support.step_problem import tiles

kernels = pytest.importorskip("dora_kernels.kernels")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from dora_kernels.kernels import four_bits  # noqa: E402


def test_what_a_norm_loads_ahead():
    """Nothing where the weight is not loaded in whole vectors, or has scales as large as itself."""

    def stages(weight):
        _, layout = kernels.stored_weight.weight_argument(weight)
        return kernels.stored_weight.weight_stages(layout, Config(num_stages=3))

    def stored(kind, K=96):
        return quantized(kind, 32, K, torch.bfloat16)

    dense = torch.empty(32, 96)
    assert stages(dense) == stages(stored("int8")) == 3
    assert stages(dense.T) is stages(dense[:, :90].contiguous()) is None
    assert stages(stored("codebook4 nested")) == stages(stored("nf4_torchao")) == stages(stored("hqq4 axis 1")) == 3
    assert stages(stored("hqq4 axis 0")) is stages(stored("codebook4", 95)) is None


def test_a_norm_of_few_rows_over_4_bits_has_tiles_of_16():
    """Blocks become smaller until each multiprocessor has one; numbers are looked up for 16 rows at a time."""
    weight = quantized("codebook4", 10, 128)
    lora_A, lora_B = torch.randn(3, 128, device=DEVICE), torch.randn(10, 3, device=DEVICE)
    with tiles("norm", {"BLOCK_K": 128}):
        norm, _ = kernels.norm(weight, lora_A, lora_B, 0.5)
    torch.testing.assert_close(norm, (weight.dequantize() + 0.5 * lora_B @ lora_A).norm(dim=1))


MISPLACED = {"codebook4 nested": 1, "nf4_torchao": 2, "hqq4 axis 1": 2}  # kind -> a part of 1 or 2 bytes a number


@pytest.mark.parametrize("kind", MISPLACED)
@pytest.mark.parametrize("N", [3, 4])
def test_scales_are_loaded_by_words_only_where_they_fill_them(kind, N):
    """Nothing says that a library's tensors begin or end with a word of 4 bytes."""
    weight, part = quantized(kind, N, 64 if N == 3 else 256, torch.bfloat16), MISPLACED[kind]
    one = weight.tensors[part]
    moved = torch.cat((one[:1], one))[1:]  # by the bytes of a number
    tensors = (*weight.tensors[:part], moved, *weight.tensors[part + 1 :])
    misplaced = dataclasses.replace(weight, tensors=tensors)
    layouts = [kernels.stored_weight.weight_argument(one)[1] for one in (weight, misplaced)]
    by_words = [kernels.stored_weight.weight_format(layout, 64).words for layout in layouts]
    assert by_words == [N == 4 or kind == "hqq4 axis 1", False]
    for stored in (weight, misplaced):
        assert torch.equal(kernels.dense(stored, torch.bfloat16), weight.dequantize())


@triton.jit
def _look_up_kernel(code_ptr, codes_ptr, values_ptr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """values = code[codes], [BLOCK_N, BLOCK_K]."""
    offs = tl.arange(0, BLOCK_N)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    values = four_bits.looked_up(four_bits.codebook(code_ptr), tl.load(codes_ptr + offs), BLOCK_N, BLOCK_K)
    tl.store(values_ptr + offs, values)


@pytest.mark.parametrize("tile", [(16, 16), (16, 64), (32, 16), (64, 128), (128, 64)], ids=str)
def test_what_is_looked_up_stays_in_its_place(tile):
    """The interpreter's tiles are 32 x 32 or 16 x 32, a GPU's larger."""
    code, codes = torch.randn(16, device=DEVICE), torch.randint(0, 16, tile, dtype=torch.int32, device=DEVICE)
    values = torch.empty(tile, device=DEVICE)
    _look_up_kernel[1,](code, codes, values, *tile)
    assert torch.equal(values, code[codes])
