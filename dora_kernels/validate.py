"""What every public function asks of its arguments: ValueError where shapes, dtypes, devices or scaling do not fit."""

import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dora_kernels.quant import QuantizedWeight, Weight

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DROPOUTS = ("adapter", "lora")
"""What dropout may fall on: all that an adapter adds, or its low-rank product alone."""
_LARGEST = sys.float_info.max


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_transforms(function: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError inside a transform of torch.func, and where a tensor is a dual one of forward-mode AD.

    What is batched or dual passes by an opaque operator: its result would have no tangent, and nobody would be told.
    """
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        keys = {interpreter.key().name for interpreter in torch._C._functorch.get_interpreter_stack()}
        if not torch.is_grad_enabled():
            keys.discard("Functionalize")  # operators are taken as they are
        if keys:
            found = ", ".join(sorted(keys)).lower()
            raise NotImplementedError(f"{function}: called inside a transform of torch.func ({found}){_INSTEAD}")
    if forward_ad._current_level >= 0:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError(f"{function}: called with a dual tensor of forward-mode AD{_INSTEAD}")


_INSTEAD = (
    "; expected neither: use torch.autograd (grad with create_graph or is_grads_batched, functional in reverse mode), "
    "or the definition in plain PyTorch, dora_kernels.reference.dora_linear_ref"
)


def check_adapter(function: str, weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> float:
    """Raise ValueError unless weight, lora_A, lora_B and scaling fit each other; scaling as a float."""
    check_transforms(function, weight, lora_A, lora_B)
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(tensor, QuantizedWeight):
            check_tensor(function, name, tensor, weight)
        if tensor.dim() != 2:
            raise ValueError(f"{function}: {name} has shape {_shape(tensor)}; expected 2 dimensions")
    if weight.requires_grad:
        raise ValueError(f"{function}: weight.requires_grad is True; expected False: DoRA freezes the weight")
    (N, K), (R, _) = weight.shape, lora_A.shape
    if lora_A.shape[1] != K:
        raise ValueError(
            f"{function}: lora_A has shape {_shape(lora_A)} but weight has shape {_shape(weight)}; "
            f"expected lora_A (R, K) with K = {K}"
        )
    if lora_B.shape[0] != N or lora_B.shape[1] != R:
        raise ValueError(
            f"{function}: lora_B has shape {_shape(lora_B)} but weight has shape {_shape(weight)} and lora_A "
            f"{_shape(lora_A)}; expected lora_B (N, R) with N = {N}, R = {R}"
        )
    if lora_A.dtype != lora_B.dtype:
        raise ValueError(f"{function}: lora_A is {lora_A.dtype} but lora_B is {lora_B.dtype}; expected one dtype")
    return check_scaling(function, scaling)


def check_scaling(function: str, scaling: float) -> float:
    """scaling as a float. Raise ValueError unless it is a finite number."""
    return check_number(function, "scaling", scaling)


def check_number(function: str, name: str, value: float) -> float:
    """`value` as a float. Raise ValueError unless it is a finite number."""
    # a comparison and not math.isfinite, which torch.compile cannot trace for a scaling that changes
    if not _is_number(value) or not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{function}: {name} is {value!r}; expected a finite Python number")
    return float(value)


def check_probability(function: str, name: str, value: float) -> float:
    """`value` as a float. Raise ValueError unless it is a probability below 1, as dropout's is."""
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{function}: {name} is {value!r}; expected a probability in [0, 1)")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_call(
    function: str,
    x: Tensor,
    weight: Weight,
    magnitude: Tensor,
    bias: Tensor | None,
    x_dropped: Tensor | None,
    norm: Tensor | None,
) -> None:
    """Raise ValueError unless what surrounds the adapter fits weight (N, K)."""
    check_transforms(function, x, magnitude, bias, x_dropped, norm)
    K = weight.shape[1]
    check_tensor(function, "x", x, weight)
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(
            f"{function}: x has shape {_shape(x)} but weight has shape {_shape(weight)}; "
            f"expected x (..., K) with K = {K}"
        )
    if x_dropped is not None:
        check_tensor(function, "x_dropped", x_dropped, weight)
        if x_dropped.shape != x.shape:
            raise ValueError(
                f"{function}: x_dropped has shape {_shape(x_dropped)} but x has shape {_shape(x)}; expected one shape"
            )
    check_row(function, "magnitude", magnitude, weight)
    if bias is not None:
        check_row(function, "bias", bias, weight)
    if norm is not None:
        check_row(function, "norm", norm, weight)


def check_norm_grad(function: str, norm_grad: bool, norm: Tensor | None) -> None:
    """Raise ValueError unless norm_grad is a bool, and False where norm is given."""
    if not isinstance(norm_grad, bool):
        raise ValueError(f"{function}: norm_grad is {norm_grad!r}; expected True or False")
    if norm is not None and norm_grad:
        raise ValueError(
            f"{function}: norm_grad is True and norm is given; expected norm=None: a given norm is constant"
        )


def check_row(function: str, name: str, tensor: Tensor, weight: Weight, called: str = "weight") -> None:
    """Raise ValueError unless `tensor` has one number per output row of weight, which messages call `called`."""
    check_tensor(function, name, tensor, weight, called)
    if tensor.dim() != 1 or tensor.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{function}: {name} has shape {_shape(tensor)} but {called} has shape {_shape(weight)}; "
            f"expected {name} (N,) with N = {weight.shape[0]}"
        )


def check_tensor(function: str, name: str, tensor: Tensor, weight: Weight | None, called: str = "weight") -> None:
    """Raise ValueError unless `tensor` is a dense floating-point tensor on the device of weight, if there is one."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{function}: {name} is {type(tensor).__name__}; expected a torch.Tensor")
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise ValueError(f"{function}: {name} is {layout}; expected a dense tensor (torch.strided)")
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{function}: {name} is {tensor.dtype}; expected one of float64, float32, bfloat16, float16")
    if isinstance(weight, (Tensor, QuantizedWeight)) and tensor.device != weight.device:
        raise ValueError(
            f"{function}: {name} is on {tensor.device} but {called} is on {weight.device}; expected one device"
        )


def check_rescale(
    function: str,
    base: Tensor,
    low: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    scaling: float,
    bias: Tensor | None,
    residual: Tensor | None,
) -> float:
    """Raise ValueError unless the arguments of rescale fit each other; scaling as a float."""
    check_transforms(function, base, low, lora_B, gain, bias, residual)
    check_tensor(function, "lora_B", lora_B, None)
    if lora_B.dim() != 2:
        raise ValueError(f"{function}: lora_B has shape {_shape(lora_B)}; expected 2 dimensions")
    N, R = lora_B.shape
    for name, tensor, columns in (("base", base, N), ("low", low, R)):
        check_tensor(function, name, tensor, lora_B, "lora_B")
        if tensor.dim() == 0 or tensor.shape[-1] != columns:
            raise ValueError(
                f"{function}: {name} has shape {_shape(tensor)} but lora_B has shape {_shape(lora_B)}; "
                f"expected {name} (..., {columns})"
            )
    if base.shape[:-1] != low.shape[:-1]:
        raise ValueError(
            f"{function}: low has shape {_shape(low)} but base has shape {_shape(base)}; "
            "expected the same dimensions but for the last"
        )
    if residual is not None:
        check_tensor(function, "residual", residual, lora_B, "lora_B")
        if residual.shape != base.shape or residual.dtype != base.dtype:
            raise ValueError(
                f"{function}: residual is {residual.dtype} of shape {_shape(residual)} but base is {base.dtype} of "
                f"shape {_shape(base)}; expected the same"
            )
    for name, tensor in (("gain", gain), ("bias", bias)):
        if tensor is not None:
            check_row(function, name, tensor, lora_B, "lora_B")
    return check_scaling(function, scaling)
