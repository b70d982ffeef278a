"""The weight as kernels read it, in any storage format (see dora_kernels/quant/formats.py); 4 bits: four_bits.py.

A weight reaches a kernel as one argument, a StoredWeight, and one constexpr, its WeightFormat.
It is decoded in registers to what its library decodes it to, rounding included. The update of it is an argument, too.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dora_kernels.kernels.four_bits import codebook, codebook4, hqq4, nf4_torchao
from dora_kernels.kernels.tile import (
    DTYPE_OF_NAME,
    TL_DTYPE,
    Launch,
    Matrix,
    Vector,
    add_dot,
    known_multiple,
    known_rows,
    load,
    load_parts,
    load_vector,
    low_rank,
)
from dora_kernels.planning import configs
from dora_kernels.planning.tiles import Config
from dora_kernels.quant import DENSE, Weight


class StoredWeight(NamedTuple):
    """A weight (N, K) in the storage of its format, as one argument of a kernel."""

    pointers: tuple[torch.Tensor, ...]  # to its parts, in the order of quant/formats.py
    numbers: tuple[int, ...]  # strides, or sizes that follow from N and K


class WeightFormat(NamedTuple):
    """The format of a stored weight: one constexpr, FORMAT."""

    name: str  # a key of quant.FORMATS, but "row8" is "int8" or "float8"; or "dense"
    sizes: tuple[int, ...]  # the numbers of the QuantizedWeight; of "hqq4", two flags behind them
    group: int  # columns from one multiple of it to the next share a scale in every row
    words: bool  # numbers of 1 or 2 bytes, its scales, can be loaded by the words of 4 bytes that they lie in
    dtype_name: str  # of what it is decoded to; see tile.Dtypes

    @property
    def dtype(self) -> tl.dtype:
        """The dtype that the weight is decoded to."""
        return DTYPE_OF_NAME[self.dtype_name]


class Layout(NamedTuple):
    """A stored weight without its tensors: what a launch plan is made from."""

    format: str  # as in WeightFormat
    dtype: torch.dtype  # that it is decoded to
    K: int
    sizes: tuple[int, ...]  # the numbers of the QuantizedWeight
    numbers: tuple[int, ...]  # of the StoredWeight
    words: bool  # the tensors of its scales begin and end with words of 4 bytes


class Update(NamedTuple):
    """The low-rank update scaling * lora_B @ lora_A of a weight (N, K), as one argument of a kernel.

    Kernels take it after the sizes. ptxas allocates by the order of arguments, too: with it first, the merge of an HQQ
    weight at R = 64 took 88 registers on sm_90 in place of 80, and that of an int8 weight 64 in place of 80.
    """

    lora_A: Matrix  # (R, K)
    lora_B: Matrix  # (N, R)
    R: int
    scaling: float


def update_argument(lora_A: torch.Tensor | None, lora_B: torch.Tensor | None, scaling: float) -> Update | None:
    """The update as an argument; None where there is no adapter."""
    return None if lora_A is None else Update(lora_A, lora_B, lora_A.shape[-2], scaling)


@triton.jit
def known_rank(update, MULTIPLE: tl.constexpr):
    """update, of which the compiler then knows that R, and the distance of lora_B's rows, is a multiple of MULTIPLE."""
    R, lora_B = known_multiple(update.R, MULTIPLE), known_rows(update.lora_B, MULTIPLE)
    return Update(update.lora_A, lora_B, R, update.scaling)


@triton.jit
def with_tables(weight, FORMAT: tl.constexpr):
    """weight, with the tables that each tile looks numbers up in, and what is one number, loaded in place of pointers.

    Kernels begin with it: a loop would load them in each of its steps.
    """
    if FORMAT.name == "codebook4":
        packed, absmax, code = weight.pointers[0], weight.pointers[1], codebook(weight.pointers[2])
        if FORMAT.sizes[1] > 0:
            nested_code, offset = tl.load(weight.pointers[4] + tl.arange(0, 256)), tl.load(weight.pointers[5])
            result = StoredWeight((packed, absmax, code, weight.pointers[3], nested_code, offset), weight.numbers)
        else:
            result = StoredWeight((packed, absmax, code), weight.numbers)
    elif FORMAT.name == "nf4_torchao":
        packed, scalers, factor = weight.pointers[0], weight.pointers[1], weight.pointers[2]
        mean, lut = tl.load(weight.pointers[3]).to(tl.float32), codebook(weight.pointers[4])
        result = StoredWeight((packed, scalers, factor, mean, lut), weight.numbers)
    else:
        result = weight
    return result


@triton.jit
def weight_tile(
    weight,  # (N, K) as stored, `with_tables`
    offs_n,
    mask_n,
    k,
    K,
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """weight[offs_n, k : k + BLOCK_K] in FORMAT.dtype, 0 outside; k is a multiple of BLOCK_K."""
    offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
    if FORMAT.name == "dense":
        columns = tl.arange(0, BLOCK_K).to(tl.int64)
        tile = load(right_of(elements(weight), k), offs_n, columns, mask_n, columns < K - k)  # [BLOCK_N, BLOCK_K]
    elif FORMAT.name == "int8" or FORMAT.name == "float8":
        tile = load(elements(weight), offs_n, offs_k, mask_n, offs_k < K)
        scale = load_vector(Vector(weight.pointers[1], weight.numbers[2]), offs_n, mask_n).to(tl.float32)  # [BLOCK_N]
        if FORMAT.name == "float8":
            tile = _float8(tile)
        tile = scale[:, None] * tile.to(tl.float32)
    elif FORMAT.name == "codebook4":
        tile = codebook4(weight, offs_n, mask_n, k, K, FORMAT, BLOCK_N, BLOCK_K)
    elif FORMAT.name == "nf4_torchao":
        tile = nf4_torchao(weight, offs_n, mask_n, k, K, FORMAT, BLOCK_N, BLOCK_K)
    else:
        tl.static_assert(FORMAT.name == "hqq4")
        tile = hqq4(weight, offs_n, mask_n, k, K, FORMAT, BLOCK_N, BLOCK_K)
    return tile.to(FORMAT.dtype)


@triton.jit
def right_of(matrix, k):
    """matrix[:, k:]"""
    return Matrix(matrix.ptr + tl.cast(k, tl.int64) * matrix.stride_1, matrix.stride_0, matrix.stride_1)


@triton.jit
def elements(weight):
    """The matrix (N, K) of a weight that is stored one element after the other: of a dense one, or in 8 bits each."""
    return Matrix(weight.pointers[0], weight.numbers[0], weight.numbers[1])


@triton.jit
def _float8(bits):
    """float32 of the bits of float8_e4m3fn, which not every target converts: a float16 less 8 in its exponent."""
    magnitude = (bits & 0x7F).to(tl.uint16)
    half = ((bits & 0x80).to(tl.uint16) << 8) | (magnitude << 7)
    value = 256.0 * half.to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def direction_tile(
    weight,  # (N, K) as stored
    update,  # (N, K) or None
    lora_B,  # its lora_B[offs_n], of CHUNKS chunks: see `resident`
    offs_n,
    mask_n,
    k,
    K,
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    DTYPES: tl.constexpr,
):
    """weight and weight + scaling * lora_B @ lora_A at offs_n and the BLOCK_K columns from k, a multiple of BLOCK_K."""
    w = weight_tile(weight, offs_n, mask_n, k, K, FORMAT, BLOCK_N, BLOCK_K).to(DTYPES.accumulate)  # [BLOCK_N, BLOCK_K]
    direction = w
    if update is not None:
        if CHUNKS > 0:
            columns = tl.arange(0, BLOCK_K).to(tl.int64)
            product = tl.zeros([BLOCK_N, BLOCK_K], dtype=DTYPES.accumulate)
            for chunk in tl.static_range(CHUNKS):
                offs_r = chunk * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
                lora_A = load_parts(
                    right_of(update.lora_A, k), offs_r, columns, offs_r < update.R, columns < K - k, update.R, 0, DTYPES
                )
                product = add_dot(product, lora_B[chunk], lora_A, DTYPES)
        else:
            offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
            mask_k = offs_k < K
            product = low_rank(
                update.lora_B, update.lora_A, offs_n, offs_k, mask_n, mask_k, update.R, BLOCK_R, False, DTYPES
            )
        direction += update.scaling * product
    return w, direction


def weight_config(launch: Launch, kernel: str, layout: Layout, R: int, squares: bool = False) -> Config:
    """The configuration of the norm or merge kernel: more registers, or a smaller tile, where it would spill some.

    squares: the merge writes those, too.
    """
    if layout.K % 16:  # each element has an address: up to 1032 bytes a thread otherwise, of 128 registers
        config = configs.alone(launch.config(kernel))
    else:
        config = launch.config(kernel, R)
    target = launch.facts.target
    if layout.format == DENSE:
        if squares and target == "sm_100" and R <= configs.HIGH_RANK and launch.operand_bytes != 4:
            return configs.of_rows(config, max(16, config.BLOCK_N // 2))  # 72 to 144 bytes at R = 64
        if squares and target == "sm_80" and launch.parts > 1:
            return dataclasses.replace(config, maxnreg=255)  # 72 bytes at R = 8, down to 128 registers
        return config
    if launch.parts > 1:  # 240 bytes a thread otherwise, of 128 registers
        config = configs.unlimited(config)
    assert config.BLOCK_N is not None and config.BLOCK_K is not None
    BLOCK_N, BLOCK_K = config.BLOCK_N, config.BLOCK_K
    merges, four_bits = kernel == "merge", layout.format not in _BY_ELEMENTS
    if four_bits and layout.K % 2:  # each code of 4 bits has an address of its own
        BLOCK_N = max(16, BLOCK_N // 4)  # 1436 bytes a thread on sm_120 otherwise
        if merges and launch.parts > 1:
            BLOCK_K //= 2  # 576 bytes on sm_90 at R = 64
    elif layout.format == "hqq4" and target in ("sm_100", "sm_120"):
        BLOCK_N = max(16, BLOCK_N // 2)  # 88 and 168 bytes
        if merges:
            BLOCK_K = min(64, BLOCK_K)  # 112 bytes on sm_120 at R = 384
    elif merges and target == "sm_100" and (R <= configs.HIGH_RANK or (squares and launch.operand_bytes > 2)):
        BLOCK_N = max(16, BLOCK_N // 2)  # 72 to 168 bytes in a training step; of squares at R = 384, 288
    elif merges and four_bits and (target == "sm_80" or launch.parts == 3):
        BLOCK_N = min(64, BLOCK_N)  # up to 116 bytes in a training step, and in three parts on sm_90 at R = 384, 84
    return configs.of_rows(config, BLOCK_N, BLOCK_K)


def walk_config(launch: Launch, config: Config, layout: Layout, R: int, out_bytes: int = 0) -> tuple[Config, int]:
    """(config, CHUNKS) of the norm or merge kernel; out_bytes: of an element that is written."""
    if layout.K % 16 and R > configs.HIGH_RANK:  # each element has an address: 1864 bytes a thread otherwise
        return configs.alone(config, num_stages=2), 0
    weight_bytes = layout.dtype.itemsize
    if layout.format != DENSE:
        weight_bytes, out_bytes = configs.bytes_of_quantized(out_bytes)
    operand_bytes, target = launch.operand_bytes, launch.facts.target
    return configs.with_lora_B_resident(config, R, operand_bytes, weight_bytes, out_bytes, target)


def weight_stages(layout: Layout, config: Config) -> int | None:
    """For how many steps of a loop over K all its loads are on their way; None: those that feed no dot are waited for.

    None for what is not loaded in whole vectors, which would be loaded as before, but copied once more, and where it
    would cost more than it hides: HQQ's scale and zero for every weight (axis 0) would take 120 KB of shared memory,
    and leave room for one program a multiprocessor instead of two.
    """
    if layout.format in _BY_ELEMENTS:
        whole_vectors = layout.numbers[1] == 1 and layout.numbers[0] % 16 == 0
    else:
        whole_vectors = layout.K % 2 == 0
    scale_of_each = layout.format == "hqq4" and layout.sizes[1] == 0
    return config.num_stages if whole_vectors and not scale_of_each else None


def weight_format(layout: Layout, BLOCK_K: int) -> WeightFormat:
    """The FORMAT of a kernel whose tiles have BLOCK_K columns."""
    K, sizes = layout.K, layout.sizes
    group = 1  # 64 where K is a multiple of 64
    if layout.format == "hqq4":
        group_size, axis = sizes
        half, groups = layout.numbers
        sizes = group_size, axis, K > 0 and half % K == 0, K > 0 and groups % K == 0
        group = math.gcd(K, group_size, BLOCK_K) if axis == 1 else 1
    elif layout.format not in _BY_ELEMENTS:
        group = math.gcd(K, sizes[0], BLOCK_K)
    # a scale of every weight comes in whole vectors, or has an address of its own: nothing to be had by words
    return WeightFormat(layout.format, sizes, group, group > 1 and layout.words, TL_DTYPE[layout.dtype].name)


_BY_ELEMENTS = (DENSE, "int8", "float8")


def weight_argument(weight: Weight) -> tuple[StoredWeight, Layout]:
    """A weight as an argument, and what a launch plan is made from."""
    if isinstance(weight, torch.Tensor):
        numbers = weight.stride()
        return StoredWeight((weight,), numbers), Layout(DENSE, weight.dtype, weight.shape[1], (), numbers, False)
    (N, K), name, pointers, sizes = weight.shape, weight.format, weight.tensors, weight.numbers
    words = False
    if name == "row8":
        q, scale = pointers
        name = "int8" if q.dtype == torch.int8 else "float8"
        pointers = q.view(torch.int8 if name == "int8" else torch.uint8), scale
        numbers = (*q.stride(), *scale.stride())
    else:
        numbers = (N * K // 2, N * K // sizes[0]) if name == "hqq4" else (K // 2,)
        words = all(part.data_ptr() % 4 == 0 and part.nbytes % 4 == 0 for part in pointers[1:3])
    return StoredWeight(tuple(pointers), numbers), Layout(name, weight.dtype, K, tuple(sizes), numbers, words)
