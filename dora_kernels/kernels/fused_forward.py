"""The forward pass through one GEMM, that of the base with the low-rank product in it."""

from torch import Tensor

from dora_kernels.gemm import product_onto_low_rank
from dora_kernels.kernels.epilogue import epilogue


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
    """(gain * z + bias, z if save), z = x @ weight.T + scaling * low @ lora_B.T; as `reference.fused_forward`."""
    z = product_onto_low_rank(x, weight, low, lora_B, scaling)
    return epilogue(z, None, lora_B, gain, bias, scaling, x.dtype), z if save else None
