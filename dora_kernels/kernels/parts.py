"""float32 operands as bfloat16 matrices that sum to them, for tensor cores that multiply bfloat16.

A float32 has 24 bits and a bfloat16 8, so that three parts are the number itself and two are it to 2^-16. Of a product
of two such operands the pairs of parts that are left out are as small as what is: six products in three parts have no
larger an error than a product in float32, three in two parts have 4e-6 (tile.add_dot). The parts are made once, before
the kernels that multiply them: made in a loop, they pass through shared memory in every step and for every tile.
"""

import torch
import triton
import triton.language as tl

from dora_kernels.kernels.launches import LaunchPlan, planned
from dora_kernels.kernels.tile import Launch, block_offsets, store
from dora_kernels.planning.configs import ceil_div

# The largest bfloat16: what is above it rounds to inf, of which nothing can be taken away.
_LARGEST = tl.constexpr(float.fromhex("0x1.fep127"))
_BLOCK, _WARPS = 1024, 4  # 8 elements a thread: two loads of 16 bytes and, for each part, one store


@triton.jit
def split(tile, PARTS: tl.constexpr):
    """PARTS bfloat16 tiles that sum to a float32 tile, the largest first; those below an inf or a NaN are 0.

    Three are exact from 2^-110 on, where the last bit is still one of bfloat16's.
    """
    finite = tl.abs(tile) < float("inf")
    rest = tl.where(finite, tl.minimum(tl.maximum(tile, -_LARGEST), _LARGEST), tile)
    high = rest.to(tl.bfloat16)
    parts = (high,)
    rest = tl.where(finite, tile - high.to(tl.float32), 0.0)
    for _ in tl.static_range(1, PARTS):
        high = rest.to(tl.bfloat16)
        parts = parts + (high,)
        rest -= high.to(tl.float32)
    return parts


@triton.jit
def whole(tiles, DTYPE: tl.constexpr):
    """The sum of the tiles that `load_parts` gives, exact in float32."""
    tile = tiles[0].to(DTYPE)
    for part in tl.static_range(1, len(tiles)):
        tile += tiles[part].to(DTYPE)
    return tile


@triton.jit
def store_parts(matrix, offs_0, offs_1, mask_0, mask_1, R, tile, DTYPES: tl.constexpr):
    """matrix[offs_0, offs_1] = tile, inside the masks; in parts, R apart, where those of DTYPES are to be bfloat16."""
    PARTS: tl.constexpr = DTYPES.parts
    if PARTS > 1 and matrix.ptr.dtype.element_ty == tl.bfloat16:
        tiles = split(tile, PARTS)
        for part in tl.static_range(PARTS):
            store(matrix, offs_0, part * R + offs_1, mask_0, mask_1, tiles[part])
    else:
        store(matrix, offs_0, offs_1, mask_0, mask_1, tile)


@triton.jit
def _parts_kernel(
    sources,  # float32, contiguous, of sizes[i] elements each
    results,  # bfloat16: after every widths[i] elements of a source's first part come as many of its second, and so on
    sizes,
    widths,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The parts of the sources. One program owns BLOCK elements of one source."""
    block = tl.program_id(0)
    for index in tl.static_range(len(sources)):
        size, width = tl.cast(sizes[index], tl.int64), widths[index]  # a size of 1 is a constant, without a .to
        blocks = tl.cdiv(size, BLOCK)
        if (block >= 0) & (block < blocks):
            offs = block_offsets(block, BLOCK)
            tiles = split(tl.load(sources[index] + offs, mask=offs < size, other=0.0), PARTS)
            pointers = results[index] + offs + offs // width * width * (PARTS - 1)
            for part in tl.static_range(PARTS):
                tl.store(pointers + part * width, tiles[part], mask=offs < size)
        block -= blocks


def parts(count: int, *matrices: torch.Tensor) -> list[torch.Tensor]:
    """Of each float32 matrix (rows, R), `count` bfloat16 matrices (count, rows, R) that sum to it, in one launch.

    They stand side by side along R, as `tile.load_parts` wants them: the memory is (rows, count * R), or, of a matrix
    whose columns are contiguous, (count * R, rows).
    """
    sources, results, widths = [], [], []
    for matrix in matrices:
        rows, R = matrix.shape
        if matrix.mT.is_contiguous():
            sources.append(matrix.mT)
            result = matrix.new_empty(count, R, rows, dtype=torch.bfloat16)
            results.append(result.mT)
            widths.append(R * rows)
        else:
            sources.append(matrix.contiguous())
            result = matrix.new_empty(rows, count, R, dtype=torch.bfloat16)
            results.append(result.transpose(0, 1))
            widths.append(R)
    sizes = [source.numel() for source in sources]
    blocks = sum(ceil_div(size, _BLOCK) for size in sizes)
    if blocks:
        _plan(count).launch((blocks,), tuple(sources), tuple(results), tuple(sizes), tuple(widths))
    return results


@planned
def _plan(count: int) -> LaunchPlan:
    return LaunchPlan(_parts_kernel, None, PARTS=count, BLOCK=_BLOCK, num_warps=_WARPS)


def factors(beside: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 matrices in parts, made in one launch, where all that they meet is bfloat16; as `reference.factors`."""
    if beside.dtype != torch.bfloat16 or lora_A.dtype != torch.float32:
        return lora_A, lora_B
    return in_parts(Launch.of(beside, torch.float32), lora_A, lora_B)[1:]


# precision of the dots -> the parts that they would make of each float32 operand
_PARTS = {"bf16x3": 2, "bf16x6": 3}


def in_parts(launch: Launch, factor: torch.Tensor | None, *others: torch.Tensor | None) -> tuple:
    """(launch, factor, *others) with these in parts where they are float32 and the launch's dots would make the parts.

    factor (R, K), lora_A say, becomes (parts, R, K), others (N, R) become (parts, N, R). If one of them is in parts
    already, so are all behind this.
    """
    matrices = (factor, *others)
    flat = [matrix is not None and matrix.dim() == 2 for matrix in matrices]
    count = _PARTS.get(launch.precision, 1)
    for matrix, is_flat in zip(matrices, flat, strict=True):
        if matrix is not None and not is_flat:
            count = matrix.shape[0]
    if count == 1:
        return launch, *matrices
    launch = _in_parts(launch, count)
    if not any(flat):
        return launch, *matrices
    turned = None if factor is None else factor.mT
    made = iter(parts(count, *(matrix for matrix, is_flat in zip((turned, *others), flat, strict=True) if is_flat)))
    turned, *others = (
        next(made) if is_flat else matrix for matrix, is_flat in zip((turned, *others), flat, strict=True)
    )
    return launch, None if turned is None else turned.mT, *others


@planned
def _in_parts(launch: Launch, count: int) -> Launch:
    return launch._replace(operand=torch.float32, precision="ieee", parts=count)
