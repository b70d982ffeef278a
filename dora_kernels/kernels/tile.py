"""The parts that kernels are made of: matrices and vectors as arguments, tiles, products of rank R; and Launch."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dora_kernels.planning import configs, devices
from dora_kernels.planning.tiles import PROGRAMS_BESIDE, Config
from dora_kernels.quant import Weight
from dora_kernels.reference import accumulate_dtype

TL_DTYPE = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
DTYPE_OF_NAME = {dtype.name: dtype for dtype in TL_DTYPE.values()}


class Matrix(NamedTuple):
    """A 2-D tensor as one argument of a kernel."""

    ptr: torch.Tensor
    stride_0: int
    stride_1: int


class Vector(NamedTuple):
    """A 1-D tensor as one argument of a kernel."""

    ptr: torch.Tensor
    stride: int


class Dtypes(NamedTuple):
    """The dtypes that a kernel works in, and the precision of its dots: one constexpr, DTYPES.

    Names and no tl.dtype: what a JIT hook is told goes through json, which knows tl.dtype outside of tuples alone. In
    lower case: Triton 3.6 reads a "D" or "S" in a constexpr's strings as an attribute.
    """

    operand_name: str
    accumulate_name: str
    precision: str
    parts: int = 1  # in which a float32 operand is given, in bfloat16 (load_parts)

    @property
    def operand(self) -> tl.dtype:
        """The dtype of what a dot multiplies."""
        return DTYPE_OF_NAME[self.operand_name]

    @property
    def accumulate(self) -> tl.dtype:
        """The dtype of sums."""
        return DTYPE_OF_NAME[self.accumulate_name]


def matrix(tensor: torch.Tensor | None) -> Matrix | None:
    """A matrix, or one in parts (parts.py), as an argument; None where there is none.

    A kernel tests for it by `is not None` as it compiles.
    """
    return None if tensor is None else Matrix(tensor, *tensor.stride()[-2:])


def vector(tensor: torch.Tensor | None) -> Vector | None:
    """A 1-D tensor as an argument; None where there is none."""
    return None if tensor is None else Vector(tensor, *tensor.stride())


@triton.jit
def block_offsets(pid, BLOCK: tl.constexpr):
    """The int64 offsets of block `pid`: they are multiplied by strides, and 2^31 elements is one large activation."""
    return tl.cast(pid, tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def known_multiple(number, OF: tl.constexpr):
    """number, of which the compiler then knows that it is a multiple of OF: tl.multiple_of on an argument is lost."""
    if OF > 1:
        number = number // OF * OF
    return number


@triton.jit
def known_rows(matrix, OF: tl.constexpr):
    """matrix, of which the compiler then knows that its rows are a multiple of OF elements apart."""
    return Matrix(matrix.ptr, known_multiple(matrix.stride_0, OF), matrix.stride_1)


@triton.jit
def transposed(matrix):
    """matrix.T"""
    return Matrix(matrix.ptr, matrix.stride_1, matrix.stride_0)


@triton.jit
def load(matrix, offs_0, offs_1, mask_0, mask_1):
    """matrix[offs_0, offs_1], 0 outside the masks."""
    pointers = matrix.ptr + offs_0[:, None] * matrix.stride_0 + offs_1[None, :] * matrix.stride_1
    return tl.load(pointers, mask=mask_0[:, None] & mask_1[None, :], other=0.0)


@triton.jit
def store(matrix, offs_0, offs_1, mask_0, mask_1, tile):
    """matrix[offs_0, offs_1] = tile, inside the masks."""
    pointers = matrix.ptr + offs_0[:, None] * matrix.stride_0 + offs_1[None, :] * matrix.stride_1
    tl.store(pointers, tile.to(matrix.ptr.dtype.element_ty), mask=mask_0[:, None] & mask_1[None, :])


@triton.jit
def load_vector(vector, offs, mask):
    """vector[offs], 0 outside the mask."""
    return tl.load(vector.ptr + offs * vector.stride, mask=mask, other=0.0)


@triton.jit
def load_parts(matrix, offs_0, offs_1, mask_0, mask_1, R, RANK_AXIS: tl.constexpr, DTYPES: tl.constexpr):
    """matrix[offs_0, offs_1] as a tuple of DTYPES.parts tiles that sum to it, the largest first: mostly one.

    The parts of a float32 matrix, in bfloat16, stand side by side along the rank, R apart (parts.py).
    """
    PARTS: tl.constexpr = DTYPES.parts
    tiles = (load(matrix, offs_0, offs_1, mask_0, mask_1),)
    for part in tl.static_range(1, PARTS):
        if RANK_AXIS == 0:
            tile = load(matrix, part * R + offs_0, offs_1, mask_0, mask_1)
        else:
            tile = load(matrix, offs_0, part * R + offs_1, mask_0, mask_1)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def add_dot(acc, left, right, DTYPES: tl.constexpr):
    """acc + left @ right, of tuples of tiles as `load_parts` gives them."""
    return sum_of(add_dots(sums_from(acc, DTYPES), left, right, DTYPES))


@triton.jit
def sums_from(acc, DTYPES: tl.constexpr):
    """acc, as the sums that `add_dots` adds to in the steps of a loop, and of which `sum_of` makes one behind it."""
    sums = (acc,)
    if DTYPES.parts > 1:
        sums = sums + (tl.zeros_like(acc),)
    return sums


@triton.jit
def add_dots(sums, left, right, DTYPES: tl.constexpr):
    """sums with left @ right added; see `add_dot`.

    In parts, the products of the first ones have a sum, and all others one of their own, the smallest first. Against a
    sum of float32 products it rounds a third as much, and at worst 1.2 times; one sum of all, the largest first, 2.3
    times. What is left out is 2^-24 of a product, or, in two parts, 2^-16.
    """
    PARTS: tl.constexpr = DTYPES.parts
    result = (_dot(left[0], right[0], sums[0], DTYPES),)
    if PARTS > 1:
        small = sums[1]
        for below in tl.static_range(PARTS - 1, 0, -1):
            for part in tl.static_range(below + 1):
                if part < len(left) and below - part < len(right):
                    small = _dot(left[part], right[below - part], small, DTYPES)
        result = result + (small,)
    return result


@triton.jit
def sum_of(sums):
    """The sum that `add_dots` has made."""
    result = sums[0]
    if len(sums) > 1:
        # inf times the parts of a number, one of which is 0 or has the other sign, is inf and NaN or -inf: the first of
        # these is right. No finite sum is lost, since an infinite small product belongs to an infinite large one.
        result += tl.where(tl.abs(sums[1]) < float("inf"), sums[1], 0.0)
    return result


@triton.jit
def _dot(left, right, acc, DTYPES: tl.constexpr):
    """acc + left @ right, of tiles."""
    return tl.dot(
        left.to(DTYPES.operand),
        right.to(DTYPES.operand),
        acc,
        input_precision=DTYPES.precision,
        out_dtype=DTYPES.accumulate,
    )


@triton.jit
def resident(factor, offs, mask, R, CHUNKS: tl.constexpr, BLOCK_R: tl.constexpr, DTYPES: tl.constexpr):
    """factor[offs, :R] for all steps of a block: a tuple of CHUNKS chunks [len(offs), BLOCK_R], in parts."""
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        offs_r = chunk * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        chunks = chunks + (load_parts(factor, offs, offs_r, mask, offs_r < R, R, 1, DTYPES),)
    return chunks


@triton.jit
def add_product(
    acc,  # [BLOCK_0, BLOCK_1]
    left,  # (rows, R)
    right,  # (R, columns)
    r,
    offs_0,
    offs_1,
    mask_0,
    mask_1,
    R,
    BLOCK_R: tl.constexpr,
    DTYPES: tl.constexpr,
):
    """acc + left[offs_0, r : r + BLOCK_R] @ right[r : r + BLOCK_R, offs_1]"""
    offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
    mask_r = offs_r < R
    a = load_parts(left, offs_0, offs_r, mask_0, mask_r, R, 1, DTYPES)  # [BLOCK_0, BLOCK_R]
    b = load_parts(right, offs_r, offs_1, mask_r, mask_1, R, 0, DTYPES)  # [BLOCK_R, BLOCK_1]
    return add_dot(acc, a, b, DTYPES)


@triton.jit
def low_rank(
    left,  # (rows, R)
    right,  # (R, columns)
    offs_0,
    offs_1,
    mask_0,
    mask_1,
    R,
    BLOCK_R: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    DTYPES: tl.constexpr,
):
    """(left @ right)[offs_0, offs_1] in DTYPES.accumulate, R walked in chunks of BLOCK_R."""
    acc = tl.zeros([offs_0.shape[0], offs_1.shape[0]], dtype=DTYPES.accumulate)
    if ONE_CHUNK:  # no loop: Triton pipelines innermost loops only, and then that is the caller's
        acc = add_product(acc, left, right, 0, offs_0, offs_1, mask_0, mask_1, R, BLOCK_R, DTYPES)
    else:
        for r in range(0, R, BLOCK_R):
            acc = add_product(acc, left, right, r, offs_0, offs_1, mask_0, mask_1, R, BLOCK_R, DTYPES)
    return acc


def rank_multiple(R: int, *strides: tuple[int, ...] | None) -> int:
    """The power of two that R and the distances of rows (..., R) are multiples of; 1 for 16 and more.

    strides: of the factors that are there. The JIT sees multiples of 16 by itself, and of nothing less: at 8, PEFT's
    default, it loads R elements one by one.
    """
    given = [stride for stride in strides if stride is not None]
    if any(stride[-1] != 1 for stride in given):
        return 1
    multiple = math.gcd(16, R, *(stride[-2] for stride in given))
    return multiple if multiple < 16 else 1


class Launch(NamedTuple):
    """The launch of one call's kernels: device facts, dtypes and the precision of their dots, and the table of tiles.

    Launch plans are kept by it (launches.py): who puts another function in the place of configs.config_for gets others.
    """

    facts: devices.DeviceFacts
    operand: torch.dtype
    accumulate: torch.dtype
    precision: str
    config_for: Callable[..., Config]
    parts: int = 1  # of the float32 operands, in bfloat16 (parts.py); 1 where a kernel takes them as they are
    beside: bool = False  # a GEMM that leaves it few multiprocessors (side.py)

    @classmethod
    def of(cls, weight: Weight, operand: torch.dtype, beside: bool = False) -> "Launch":
        """The launch for low-rank operands of dtype `operand` over `weight`, or over other numbers."""
        facts = devices.device_facts(weight.device)
        # a quantized weight has 8 bits at the most, whatever dtype its library decodes it to
        over = weight.dtype if isinstance(weight, torch.Tensor) else torch.bfloat16
        precision = devices.dot_precision(facts, operand, over)
        return cls(facts, operand, accumulate_dtype(weight.dtype), precision, configs.config_for, beside=beside)

    @property
    def operand_bytes(self) -> int:
        """The bytes of an operand, in all of its parts."""
        return self.operand.itemsize if self.parts == 1 else 2 * self.parts

    def config(self, kernel: str, R: int = 0) -> Config:
        """The tile configuration of `kernel`; given a high rank R, the one that it has for those."""
        name = kernel if R <= configs.HIGH_RANK else f"{kernel}_high_rank"
        name = f"{name}_beside" if self.beside else name
        return self.config_for(name, self.facts, self.operand, self.parts)

    def threads(self, config: Config) -> int:
        """The threads of a program: AMD's warps have 64."""
        return config.num_warps * (64 if self.facts.target.startswith("gfx") else 32)

    @property
    def counts(self) -> bool:
        """True where the last of several programs may finish what all of them have stored (`is_last`).

        Not on AMD's: a barrier there waits for nobody's stores, and the one that counts for its own (tools/atomics.py).
        """
        return not self.facts.target.startswith("gfx")

    def programs(self, blocks: int, steps: int, config: Config, sums: bool) -> int:
        """The number of programs that share the work; sums: what the steps of a block give is summed up."""
        if self.beside:  # all that there is room for, and no more: the GEMM has the rest
            return configs.programs(blocks, steps, PROGRAMS_BESIDE, sums=False)
        return configs.programs(blocks, steps, self.facts.multiprocessors * config.waves, sums)

    @property
    def dtypes(self) -> Dtypes:
        """The kernels' constexpr DTYPES."""
        return _dtypes(self.operand, self.accumulate, self.precision, self.parts)


@functools.cache  # few, and each would take as long to make as three to look up
def _dtypes(operand: torch.dtype, accumulate: torch.dtype, precision: str, parts: int) -> Dtypes:
    """Of torch's dtypes, Triton's."""
    if parts > 1:
        operand, precision = torch.bfloat16, "ieee"
    return Dtypes(TL_DTYPE[operand].name, TL_DTYPE[accumulate].name, precision, parts)
