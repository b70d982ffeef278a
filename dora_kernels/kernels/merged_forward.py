"""The forward pass through a merged weight."""

import torch
import torch.nn.functional as F

from dora_kernels.kernels.epilogue import epilogue
from dora_kernels.kernels.merge import merge, merge_and_start_norm
from dora_kernels.kernels.norm import start_norm
from dora_kernels.quant import Weight


def merged_forward(
    x: torch.Tensor,
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    gain: torch.Tensor | None,
    scaling: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """(y, norm unless the gain is given, gain, z if save) through a merged weight; as `reference.merged_forward`."""
    row_norm = unfinished = None
    if not save:
        if gain is None:
            row_norm, gain, unfinished = start_norm(weight, lora_A, lora_B, scaling, magnitude)
        merged = merge(weight, lora_A, lora_B, gain, scaling, out_dtype=x.dtype, unfinished=unfinished)
        return F.linear(x, merged, bias), row_norm, gain, None
    if gain is None:
        merged, row_norm, gain, unfinished = merge_and_start_norm(weight, lora_A, lora_B, scaling, magnitude, x.dtype)
    else:
        merged = merge(weight, lora_A, lora_B, None, scaling, out_dtype=x.dtype)
    z = F.linear(x, merged)
    del merged
    y = epilogue(z, None, lora_B, gain, bias, scaling, x.dtype, unfinished=unfinished)
    return y, row_norm, gain, z
