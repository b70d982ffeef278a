"""The host's side of gemm.py: what it can take, and its launch.

Tests on a CPU put simulated ones in the place of `why_not_gluon`, `kernel` and `descriptor`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from dora_kernels.kernels.launches import LaunchPlan, planned
from dora_kernels.planning import devices
from dora_kernels.planning.configs import ceil_div
from dora_kernels.planning.tiles import GEMMS, GemmConfig

# Of any size. The kernel counts in 32 bits, to the end of a block that lies partly outside.
MOST = 2**31 - 2**10
ALIGNED = 16  # bytes: what the copy engine asks of a matrix's address, and of the distance of its rows


@functools.cache
def why_not_gluon() -> str | None:
    """The reason that this Triton cannot compile the kernel's source, or None."""
    if devices.interpreting():
        return "Triton's interpreter runs no Gluon"
    try:
        kernel()
    except (ImportError, AttributeError) as error:
        return f"Triton {triton.__version__}: {type(error).__name__}: {error}"
    return None


def kernel() -> Any:
    """gemm_kernel, imported when it is asked for."""
    from dora_kernels.kernels.hopper.gemm import gemm_kernel

    return gemm_kernel


def why_not_gemm(left: Tensor, right: Tensor, *others: Tensor | None, nn: bool = False) -> str | None:
    """The reason that `gemm` cannot take these operands, or None; others: low, lora, gain, bias, as far as given."""
    if reason := why_not_gluon():
        return reason
    facts = devices.device_facts(left.device)
    if facts.target not in GEMMS:
        return f"no such kernel is built for {facts.name}"
    if left.dtype not in (torch.bfloat16, torch.float16):
        return f"the operands are {left.dtype}; expected half precision"
    config = config_for(facts.target, nn)
    if left.shape[1] <= config.stages * config.BLOCK_K:
        return f"the sums are of {left.shape[1]}; expected more than {config.stages} steps of {config.BLOCK_K}"
    if right.shape[1 if nn else 0] * left.itemsize % ALIGNED:
        return f"rows of {right.shape[1 if nn else 0]} would not be a multiple of {ALIGNED} bytes apart"
    for tensor in (left, right, *others):
        reason = None if tensor is None else _why_not_copied(tensor, left.dtype)
        if reason is not None:
            return reason
    return None


def _why_not_copied(tensor: Tensor, dtype: torch.dtype) -> str | None:
    """The reason that the copy engine cannot take a matrix of dtype, or a vector of it or of float32; or None."""
    strides = tensor.stride()
    if tensor.dtype != dtype and not (tensor.dim() == 1 and tensor.dtype == torch.float32):
        return f"an operand is {tensor.dtype} beside {dtype}"
    if tensor.dim() > 2 or max(tensor.shape) > MOST:
        return f"an operand has {tensor.dim()} dimensions of up to {max(tensor.shape)}; expected two of up to {MOST}"
    # rows that overlap are outside of what CUDA says of a tensor map
    width = tensor.shape[-1]
    if strides[-1] != 1 or any(stride < width or stride * tensor.itemsize % ALIGNED for stride in strides[:-1]):
        return f"an operand has strides of {strides}; expected whole rows, a multiple of {ALIGNED} bytes apart"
    if tensor.data_ptr() % ALIGNED:
        return f"an operand has an address that is no multiple of {ALIGNED} bytes"
    return None


def config_for(target: str, nn: bool) -> GemmConfig:
    """The configuration of the GEMM on a target."""
    return GEMMS[target]["dx" if nn else "forward"]


def gemm(
    left: Tensor,  # (M, K)
    right: Tensor,  # (N, K); nn: (K, N)
    *,
    nn: bool,
    low: Tensor | None = None,  # (M, R)
    lora: Tensor | None = None,  # (N, R); nn: (R, N)
    scaling: float = 1.0,
    gain: Tensor | None = None,  # (N,)
    bias: Tensor | None = None,  # (N,)
    both: bool = False,
    multiprocessors: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y, z if both else None): z = left @ right.T + scaling * low @ lora.T, y = gain * z + bias; nn: not transposed.

    Of operands that `why_not_gemm` has no objection to. multiprocessors: how many it may run on, default all.
    """
    facts = devices.device_facts(left.device)
    shape = left.shape[0], right.shape[1 if nn else 0]
    y = left.new_empty(shape)
    z = left.new_empty(shape) if both else None
    if y.numel():
        config = config_for(facts.target, nn)
        launch(config, nn, left, right, low, lora, y, z, gain, bias, scaling, multiprocessors or facts.multiprocessors)
    return y, z


def launch(
    config: GemmConfig,
    nn: bool,
    x: Tensor,
    weight: Tensor,
    low: Tensor | None,
    lora: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    programs: int,
) -> None:
    """Launches the kernel on as many programs, or as many as there are tiles.

    Raises ValueError where gain and bias, which come with step number `stages`, would never come.
    """
    (M, K), N = x.shape, y.shape[1]
    R = 0 if low is None else low.shape[1]
    if K <= config.stages * config.BLOCK_K:
        raise ValueError(f"launch: the sums are of {K}; expected more than {config.stages} steps of {config.BLOCK_K}")
    tensors = (x, weight, low, lora, y, z, gain, bias)
    descriptors = [
        None if tensor is None else descriptor(tensor, block)
        for tensor, block in zip(tensors, blocks(config, nn).values(), strict=True)
    ]
    grid = (min(programs, ceil_div(M, config.BLOCK_M) * ceil_div(N, config.BLOCK_N)),)
    plan(kernel(), config, nn).launch(grid, *descriptors, M, N, K, R, float(scaling), config.GROUP_M)


@planned
def plan(function: Any, config: GemmConfig, nn: bool) -> LaunchPlan:
    """The launch of the kernel that `kernel` gives."""
    return LaunchPlan(function, None, **constants(config, nn))


@functools.cache
def blocks(config: GemmConfig, nn: bool) -> dict[str, tuple[int, ...]]:
    """The block that each descriptor moves, in the order of the kernel's arguments."""
    left = (config.BLOCK_M, config.BLOCK_K)
    right = (config.BLOCK_K, config.BLOCK_N) if nn else (config.BLOCK_N, config.BLOCK_K)
    out = (config.BLOCK_M // config.consumers, config.BLOCK_N // config.parts)
    blocks = {"x": left, "weight": right, "low": left, "lora": right, "y": out, "z": out}
    return blocks | dict.fromkeys(("gain", "bias"), (config.BLOCK_N,))


def constants(config: GemmConfig, nn: bool) -> dict[str, Any]:
    """The kernel's constants and the options of its launch."""
    return {
        "STAGES": config.stages,
        "SLOTS": config.slots,
        "NN": nn,
        "PRODUCER_REGISTERS": config.producer_registers,
        "CONSUMER_REGISTERS": config.consumer_registers,
        "num_warps": 8 // config.consumers,  # of a consumer; the compiler adds the other roles'
        "maxnreg": config.launch_registers,
    }


def descriptor(tensor: Tensor, block: Sequence[int]) -> Any:
    """A tensor as the copy engine takes it: blocks of it, with zeros for what lies outside."""
    from dora_kernels.kernels.hopper.language import TensorDescriptor

    shape, strides = list(tensor.shape), list(tensor.stride())
    return TensorDescriptor(tensor, shape, strides, list(block), layout(tuple(block), tensor.dtype))


@functools.cache  # 100 us for the eight of a launch
def layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    """The layout of a block in shared memory: swizzled if it has two dimensions."""
    from dora_kernels.kernels.hopper.language import gl

    if len(block) == 1:
        return gl.NVMMASharedLayout(0, 8 * dtype.itemsize, rank=1)
    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, str(dtype).removeprefix("torch.")))
