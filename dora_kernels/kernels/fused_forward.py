"""The forward pass through one GEMM, that of the base with the low-rank product in it."""

from torch import Tensor

from dora_kernels.gemm import product_onto_low_rank
from dora_kernels.kernels.epilogue import epilogue
from dora_kernels.kernels.hopper.launch import gemm, why_not_gemm
from dora_kernels.planning.devices import log_once


def fused_forward(
    x: Tensor,
    weight: Tensor,
    low: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    scaling: float,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """(gain * z + bias, z if save), z = x @ weight.T + scaling * low @ lora_B.T; as `reference.fused_forward`.

    By our GEMM where it can take these tensors, and else in three passes over z, two of them the GEMM library's.
    """
    reason = why_not_gemm(x, weight, low, lora_B, gain, bias)
    if reason is None:
        return gemm(x, weight, nn=False, low=low, lora=lora_B, scaling=scaling, gain=gain, bias=bias, both=save)
    log_once(f"dora_kernels leaves a fused forward pass to the GEMM library: {reason}")
    z = product_onto_low_rank(x, weight, low, lora_B, scaling)
    return epilogue(z, None, lora_B, gain, bias, scaling, x.dtype), z if save else None
