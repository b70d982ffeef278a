"""DVoRA: DoRA on VeRA (arXiv 2310.11454), whose low-rank matrices are random, frozen and shared by all layers.

    y = gain * (x W^T + lambda_b * (lambda_d * (x vera_A^T)) vera_B^T) + bias
    gain = magnitude / norm,  norm_n = ||W_n + lambda_b_n * (vera_B_n * lambda_d) vera_A||_2

A layer trains R + 2 N numbers: lambda_d (R,), lambda_b (N,) and magnitude (N,). It is DoRA with lora_A = vera_A and
lora_B = lambda_b * vera_B * lambda_d, and has nothing of its own beneath it: the product is `rescale`, the norm
`weight_norm`. What it adds is that W and vera_A are both frozen, so that the norm need not read W again.

    function.py    the layer as a function, its definition, and the norm
    module.py      VeraProjection (the shared matrices) and DvoraLinear
    peft.py        to_dvora, for the layers of a VeRA model of PEFT's
"""

from torch import nn

from dora_kernels.extras.dvora.function import (
    NormTerms,
    dvora_linear,
    dvora_linear_ref,
    dvora_norm,
    norm_terms,
)
from dora_kernels.extras.dvora.module import DvoraLinear, VeraProjection
from dora_kernels.functional.arguments import check_model, check_type

__all__ = [
    "DvoraLinear",
    "NormTerms",
    "VeraProjection",
    "dvora_linear",
    "dvora_linear_ref",
    "dvora_norm",
    "norm_terms",
    "to_dvora",
]


def to_dvora(model: nn.Module, adapter: str = "default") -> nn.Module:
    """Make the VeRA adapter `adapter` of a PEFT model a DVoRA adapter, in place: dvora/peft.py has the rest."""
    check_model("to_dvora", model)
    check_type("to_dvora", "adapter", adapter, str, "the name of an adapter")
    from dora_kernels.extras.dvora import peft  # needs PEFT

    return peft.to_dvora(model, adapter)
