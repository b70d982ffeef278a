"""Functions of the weight and its adapter alone: the norm, the merged weight, and the weight out of a merged one."""

import torch
from torch import Tensor

from dora_kernels import decompositions, ops
from dora_kernels.functional.autograd import WeightNorm
from dora_kernels.functional.linear import operand_dtypes
from dora_kernels.functional.signature import run
from dora_kernels.functional.validate import check_adapter, check_norm_grad, check_row
from dora_kernels.planning.options import current_options
from dora_kernels.quant import Weight, flatten_weight
from dora_kernels.reference import gain_of
from dora_kernels.types import DoraWeight

ROWS_SHOWN = 8
"""The number of rows that an error names."""


def weight_norm(weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float, *, norm_grad: bool = False) -> Tensor:
    """norm (N,) of dora_linear: the row norms of weight (N, K) + scaling * lora_B (N, R) @ lora_A (R, K).

    float32 (float64 for float64 weights). norm_grad: False makes it a constant for autograd, True gives lora_A and
    lora_B its gradient (0 where the norm is 0). The adapters are taken in the dtype in which dora_linear would multiply
    them by an x of weight's dtype. Raises ValueError as dora_linear.
    """
    scaling = check_adapter("weight_norm", weight, lora_A, lora_B, scaling)
    check_norm_grad("weight_norm", norm_grad, None)
    backend = current_options().backend
    _, dtype = operand_dtypes(weight, lora_A)
    if norm_grad and not decompositions.is_traced_for_onnx():
        stored = flatten_weight(weight)
        norm: Tensor = WeightNorm.apply(lora_A, lora_B, scaling, dtype, backend, stored[1:], *stored[0])
        return norm
    with torch.no_grad():
        norm = run("norm", *flatten_weight(weight), lora_A, lora_B, scaling, dtype, backend)
    return norm


def merge_weight(weight: Weight, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float) -> Tensor:
    """gain * (weight + scaling * lora_B @ lora_A), (N, K) in weight.dtype: the weight of an equivalent nn.Linear.

    Shapes and dtypes as dora_linear; rounded once; a constant for autograd. Raises ValueError as dora_linear.
    """
    return merge_weight_and_norm(DoraWeight(weight, lora_A, lora_B, magnitude, scaling))[0]


def merge_weight_and_norm(layer: DoraWeight, norm: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`merge_weight`, with the norm (N,), given or not, and the gain (N,) that went into it."""
    weight, lora_A, lora_B, magnitude, scaling = layer
    scaling = check_adapter("merge_weight", weight, lora_A, lora_B, scaling)
    check_row("merge_weight", "magnitude", magnitude, weight)
    backend = current_options().backend
    _, dtype = operand_dtypes(weight, lora_A)
    with torch.no_grad():
        stored = flatten_weight(weight)
        norm = run("norm", *stored, lora_A, lora_B, scaling, dtype, backend) if norm is None else norm
        gain = gain_of(magnitude, norm)
        return run("merge", *stored, lora_A, lora_B, gain, scaling, dtype, backend), norm, gain


def unmerge_weight(function: str, layer: DoraWeight, norm: Tensor, gain: Tensor) -> Tensor:
    """merged / gain - scaling * lora_B @ lora_A, (N, K): what merge_weight_and_norm merged into layer.weight.

    In merged.dtype, to within one rounding of it. Where norm and gain are 0 the merged row is, and the row was
    -scaling * lora_B @ lora_A. Raises ValueError, in the name of `function`, where gain is 0 and norm is not, or so
    small that the row lies below the dtype's normal numbers (6e-5 in float16) and has lost digits.
    """
    merged, lora_A, lora_B, _, scaling = layer
    assert isinstance(merged, Tensor)  # a quantized weight is merged into a new dense one
    shrunk = (
        (merged.abs().amax(1) < torch.finfo(merged.dtype).tiny) & (gain.abs() < 0.5) if merged.numel() else gain == 0
    )
    lost = (((gain == 0) | shrunk) & (norm != 0)).nonzero().flatten().tolist()
    if lost:
        shown = ", ".join(map(str, lost[:ROWS_SHOWN])) + (", ..." if len(lost) > ROWS_SHOWN else "")
        how = "gain 0" if not gain[lost].any() else f"a gain too small for {merged.dtype}"
        raise ValueError(
            f"{function}: {len(lost)} of {len(gain)} rows were merged with {how} (row {shown}); expected none: "
            "their weights cannot be recovered"
        )
    scaling = check_adapter(function, merged, lora_A, lora_B, scaling)
    backend = current_options().backend
    dtype = torch.promote_types(merged.dtype, lora_A.dtype)  # whatever autocast says now
    with torch.no_grad():
        stored = flatten_weight(merged.to(gain.dtype) / torch.where(gain == 0, 1, gain)[:, None])
        # By the kernel that merged: the product's own error then cancels. By another GEMM it stays, and a float32
        # weight comes back 5.9 units in the last place of its largest entry off, not 2.9; worse where TF32 is allowed.
        # A half weight under float32 adapters was merged in bf16x6 or bf16x3 on a GPU, and is here, where it is float32
        # already, unmerged in ieee or tf32x3: what the two differ by is far below the rounding that it is stored with.
        weight = ops.merge(*stored, lora_A, lora_B, torch.ones_like(gain), -scaling, dtype, backend)
        return weight.to(merged.dtype)
