"""float32 operands as bfloat16 matrices that sum to them, for tensor cores that multiply bfloat16.

A float32 has 24 bits and a bfloat16 8, so that three parts are the number itself and two are it to 2^-16. Of a product
of two such operands the pairs of parts that are left out are as small as what is: six products in three parts have no
larger an error than a product in float32, three in two parts have 4e-6 (tile.add_dot). The parts are made once, before
the kernels that multiply them: made in a loop, they pass through shared memory in every step and for every tile.
"""

import torch
import triton
import triton.language as tl

from dora_kernels.kernels.tile import block_offsets
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
def _parts_kernel(
    sources,  # float32, contiguous, of sizes[i] elements each
    results,  # (PARTS, sizes[i]) in bfloat16, contiguous
    sizes,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """results[i][0] + results[i][1] + ... = sources[i]. One program owns BLOCK elements of one source."""
    block = tl.program_id(0)
    for index in tl.static_range(len(sources)):
        size = sizes[index].to(tl.int64)
        blocks = tl.cdiv(size, BLOCK)
        if (block >= 0) & (block < blocks):
            offs = block_offsets(block, BLOCK)
            tiles = split(tl.load(sources[index] + offs, mask=offs < size, other=0.0), PARTS)
            for part in tl.static_range(PARTS):
                tl.store(results[index] + part * size + offs, tiles[part], mask=offs < size)
        block -= blocks


def parts(count: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Of each float32 matrix (rows, columns), `count` bfloat16 matrices (count, rows, columns) that sum to it.

    One launch for all of them. A transposed matrix has transposed parts.
    """
    turned = [not tensor.is_contiguous() and tensor.mT.is_contiguous() for tensor in tensors]
    sources = [(tensor.mT if turn else tensor).contiguous() for tensor, turn in zip(tensors, turned, strict=True)]
    results = [source.new_empty((count, *source.shape), dtype=torch.bfloat16) for source in sources]
    sizes = [source.numel() for source in sources]
    blocks = sum(ceil_div(size, _BLOCK) for size in sizes)
    if blocks:
        _parts_kernel[blocks,](
            tuple(sources), tuple(results), tuple(sizes), PARTS=count, BLOCK=_BLOCK, num_warps=_WARPS
        )
    return [result.mT if turn else result for result, turn in zip(results, turned, strict=True)]
