"""The forward pass as one Triton GEMM, to be held against cuBLAS and an epilogue (decisive.py): its best case."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The tile of program `pid`, in groups of GROUP_M rows of tiles that share columns of the weight in L2."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * blocks_n)
    first = group * GROUP_M
    rows = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
    inside = pid % (GROUP_M * blocks_n)
    return first + inside % rows, inside // rows


@triton.jit
def _fused_kernel(
    x_ptr,  # (M, K)
    low_ptr,  # (M, R), times scaling
    weight_ptr,  # (N, K)
    lora_B_ptr,  # (N, R)
    gain_ptr,  # (N,) float32
    y_ptr,  # (M, N)
    z_ptr,  # (M, N), or None
    M,
    N,
    K,
    R,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """z = [x | low] @ [weight | lora_B].T, y = gain * z. All contiguous, sizes multiples of tiles: the best case."""
    m, n = _tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + offs_m[:, None] * K + (k + offs_k)[None, :])
        weight = tl.load(weight_ptr + offs_n[None, :] * K + (k + offs_k)[:, None])
        acc = tl.dot(x, weight, acc)
    for r in range(0, R, BLOCK_K):
        low = tl.load(low_ptr + offs_m[:, None] * R + (r + offs_k)[None, :])
        lora_B = tl.load(lora_B_ptr + offs_n[None, :] * R + (r + offs_k)[:, None])
        acc = tl.dot(low, lora_B, acc)
    y = acc * tl.load(gain_ptr + offs_n)[None, :]
    offsets = offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty))
    if z_ptr is not None:
        tl.store(z_ptr + offsets, acc.to(z_ptr.dtype.element_ty))


@triton.jit
def _fused_descriptor_kernel(
    x_desc,
    low_desc,
    weight_desc,
    lora_B_desc,
    gain_ptr,
    y_desc,
    z_desc,
    M,
    N,
    K,
    R,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """_fused_kernel through tensor descriptors (the bulk copy engine of Hopper)."""
    m, n = _tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x = x_desc.load([m * BLOCK_M, k])
        weight = weight_desc.load([n * BLOCK_N, k])
        acc = tl.dot(x, weight.T, acc)
    for r in range(0, R, BLOCK_K):
        low = low_desc.load([m * BLOCK_M, r])
        lora_B = lora_B_desc.load([n * BLOCK_N, r])
        acc = tl.dot(low, lora_B.T, acc)
    y = acc * tl.load(gain_ptr + n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    y_desc.store([m * BLOCK_M, n * BLOCK_N], y.to(y_desc.dtype))
    if z_desc is not None:
        z_desc.store([m * BLOCK_M, n * BLOCK_N], acc.to(z_desc.dtype))


# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages: the largest and the smallest that published Triton matmuls for Hopper take
FUSED_TILES = ((128, 256, 64, 8, 3), (128, 128, 64, 4, 4))


def fused_linear(
    x: Tensor,
    low: Tensor,
    weight: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    tiles: tuple[int, ...],
    descriptors: bool,
    keep_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(gain * z, z if keep_z) with z = x @ weight.T + low @ lora_B.T, in one kernel.

    A training step keeps z. Raises ValueError where a size is no multiple of a tile.
    """
    block_m, block_n, block_k, warps, stages = tiles
    (M, K), N, R = x.shape, weight.shape[0], low.shape[1]
    if M % block_m or N % block_n or K % block_k or R % block_k:
        raise ValueError(f"fused_linear: sizes {(M, N, K, R)}; expected multiples of {(block_m, block_n, block_k)}")
    y, z = x.new_empty((M, N)), x.new_empty((M, N)) if keep_z else None
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8}
    grid = (triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)
    kernel, operands = _fused_kernel, [x, low, weight, lora_B, gain, y, z]
    if descriptors:
        kernel = _fused_descriptor_kernel
        left, right, out = [block_m, block_k], [block_n, block_k], [block_m, block_n]
        blocks = (left, left, right, right, None, out, out if keep_z else None)
        operands = [
            tensor if block is None else TensorDescriptor.from_tensor(tensor, block)
            for tensor, block in zip(operands, blocks, strict=True)
        ]
    kernel[grid](*operands, M, N, K, R, **sizes, num_warps=warps, num_stages=stages)
    return y, z
