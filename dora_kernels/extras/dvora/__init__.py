"""DVoRA: DoRA on VeRA (arXiv 2310.11454), whose low-rank matrices are random, frozen and shared by all layers.

    y = gain * (x W^T + lambda_b * (lambda_d * (x vera_A^T)) vera_B^T) + bias
    gain = magnitude / norm,  norm_n = ||W_n + lambda_b_n * (vera_B_n * lambda_d) vera_A||_2

A layer trains R + 2 N numbers: lambda_d (R,), lambda_b (N,) and magnitude (N,). It is DoRA with lora_A = vera_A and
lora_B = lambda_b * vera_B * lambda_d, and has nothing of its own beneath it: the product is `rescale`, the norm
`weight_norm`. What it adds is that W and vera_A are both frozen, so that the norm need not read W again.

    function.py    the layer as a function, its definition, and the norm
    module.py      VeraProjection (the shared matrices) and DvoraLinear
"""

from dora_kernels.extras.dvora.function import (
    NormTerms,
    dvora_linear,
    dvora_linear_ref,
    dvora_linear_reusing,
    dvora_norm,
    dvora_update,
    norm_terms,
    terms_are_small,
)
from dora_kernels.extras.dvora.module import DvoraLinear, VeraProjection

__all__ = [
    "DvoraLinear",
    "NormTerms",
    "VeraProjection",
    "dvora_linear",
    "dvora_linear_ref",
    "dvora_linear_reusing",
    "dvora_norm",
    "dvora_update",
    "norm_terms",
    "terms_are_small",
]
