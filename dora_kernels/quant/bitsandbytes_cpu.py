"""Detect and undo what bitsandbytes does to a 4-bit weight on a CPU. Each trap was seen in 0.50.2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dora_kernels.quant.formats import QuantizedWeight


def is_decoded_wrongly(weight: QuantizedWeight) -> bool:
    """True if bitsandbytes' dequantize_4bit, and so its GEMM, is wrong for this weight on this machine.

    With AVX512 it assumes that each row starts a block: wrong if K is a multiple of 16 and not of the blocksize, unless
    there is only one block. Tested by decoding a weight of that width, once for each width and blocksize.
    """
    if weight.format != "codebook4" or weight.device.type != "cpu":
        return False
    (N, K), blocksize = weight.shape, weight.numbers[0]
    if N * K <= blocksize:
        return False
    if (K, blocksize) not in _decodes:  # a dict and not functools.cache, which torch.compile would trace through
        _decodes[K, blocksize] = _bitsandbytes_decodes(K, blocksize)
    return not _decodes[K, blocksize]


_decodes: dict[tuple[int, int], bool] = {}


def _bitsandbytes_decodes(K: int, blocksize: int) -> bool:
    from bitsandbytes import functional

    N = 2 * -(-blocksize // K) + 2
    codes = torch.arange(N * K) * 7 % 16
    packed = (codes[::2] << 4).to(torch.uint8)
    packed[: N * K // 2] |= codes[1::2].to(torch.uint8)
    absmax = torch.arange(1, 1 - (-N * K // blocksize), dtype=torch.float32)
    state = functional.QuantState(absmax, (N, K), None, blocksize, "nf4", torch.float32)
    with torch.compiler.set_stance("force_eager"):  # some shapes go through torch.compile, seconds for one call
        theirs = functional.dequantize_4bit(packed[:, None], state)
    code = functional.get_4bit_type("nf4", "cpu")
    ours = QuantizedWeight("codebook4", (N, K), torch.float32, (packed, absmax, code), (blocksize, 0)).dequantize()
    return torch.equal(ours, theirs)


def is_packed_for_cpu(weight: Any) -> bool:
    """True if Linear4bit has repacked its weight in place, as it does in eval mode on CPUs with AVX512_BF16.

    From then on its scales are rounded to bfloat16, dequantize_4bit returns scrambled values, and no gradient of x can
    be computed. `read` reads such a weight all the same.
    """
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def unpack_for_cpu(weight: Any) -> None:
    """Put a repacked weight back into the layout in which bitsandbytes trains and merges, in place.

    Its scales stay rounded. (bitsandbytes' own state_dict() quantizes nested scales again, or leaves plain ones
    transposed.)
    """
    state = weight.quant_state
    packed, absmax = unpacked(weight.data, *state.shape), flat_scales(state)
    weight.data = packed.view(getattr(state, "original_storage_type", torch.uint8)).view(-1, 1)
    state.absmax, state.dtype, state.packing_format_for_cpu = absmax, state.original_dtype, False


def flat_scales(state: Any) -> Tensor:
    """absmax (blocks,), also of a weight that is or was repacked: there it is (K / blocksize, N) in bfloat16."""
    absmax: Tensor = state.absmax
    return absmax.T.flatten().float() if absmax.dim() == 2 else absmax


def unpacked(packed: Tensor, N: int, K: int) -> Tensor:
    """The bytes of a repacked weight in the layout of codebook4.

    32 rows are interleaved: byte b of (32 rows, 2 columns) has row b // 2 in its low nibble, row 16 + b // 2 in its
    high one, and column b % 2. Raises ValueError unless these are the bytes of whole tiles.
    """
    if N % 32 or K % 2 or packed.numel() != N * K // 2:
        raise ValueError(
            f"read: the bitsandbytes weight was repacked and has {packed.numel()} bytes; "
            f"expected {N * K // 2} for {(N, K)}, in tiles of 32 rows and 2 columns"
        )
    tiles = packed.view(N // 32, K // 2, 16, 2)
    nibbles = torch.cat((tiles & 15, tiles >> 4), 2).transpose(1, 2)  # (N / 32, 32, K / 2, 2)
    return (nibbles[..., 0] << 4 | nibbles[..., 1]).flatten()
