"""Checks of what a layer computes with: ValueError if shapes, dtypes, devices or scaling do not fit."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # not in its stub

from dora_kernels.decompositions import is_for_onnx
from dora_kernels.functional.arguments import (
    DTYPE_NAMES,
    LARGEST,
    check_dense,
    check_flag,
    described,
    is_number,
)
from dora_kernels.quant import QuantizedWeight, Weight
from dora_kernels.quant.parts import FLOATING

_ZERO_IN_FLOAT32 = 2.0**-150
"""Half of float32's smallest number: it, and all that is smaller, rounds to 0 in float32."""

_INSTEAD = (
    "; expected neither: use torch.autograd (grad with create_graph or is_grads_batched, functional in reverse mode), "
    "or the definition in plain PyTorch, dora_kernels.reference.dora_linear_ref"
)


def _shape(tensor: Weight) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_transforms(function: str, *tensors: Weight | None) -> None:
    """Raise NotImplementedError inside a transform of torch.func, where a tensor is a dual one of forward-mode AD, and
    where the first one is what torch.fx.symbolic_trace passes in a tensor's place.

    What is batched or dual passes by an opaque operator: its result would have no tangent, and nobody would be told.
    """
    if torch.compiler.is_compiling():
        return
    _check_proxy(function, tensors[0])
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


def _check_proxy(function: str, x: object) -> None:
    if isinstance(x, Proxy):
        raise NotImplementedError(
            f"{function}: called inside torch.fx.symbolic_trace; expected make_fx, torch.export or torch.compile, "
            "which know our operators"
        )


def check_tracing(function: str, x: Tensor) -> None:
    """Raise NotImplementedError where torch.jit.trace records a call with gradients, and where x is what
    torch.fx.symbolic_trace passes.

    torch.jit.trace replays an autograd Function with the Python objects of the recorded call, which say what to save
    and hold x.
    """
    _check_proxy(function, x)
    # of the questions, the one that Dynamo can trace
    if torch._C._get_tracing_state() is not None and torch.is_grad_enabled() and not is_for_onnx():
        raise NotImplementedError(
            f"{function}: torch.jit.trace cannot record our backward pass; expected torch.no_grad() around it"
        )


def check_adapter(function: str, weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> float:
    """Raise ValueError unless weight, lora_A, lora_B and scaling fit each other; scaling as a float."""
    check_transforms(function, weight, lora_A, lora_B)
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        if name != "weight" or not isinstance(tensor, QuantizedWeight):
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
    return check_scaling(function, scaling, weight.dtype)


def check_scaling(function: str, scaling: float, dtype: torch.dtype) -> float:
    """scaling as a float. Raise ValueError unless it is a number with which tensors of dtype can be multiplied.

    They are in float32, in which it must be finite, or in float64. One too small for float32 is 0 there, and said to
    be: a GEMM skips the product with it, and 0 * inf is NaN.
    """
    reason = why_not_scaling(scaling, dtype)
    if reason is not None:
        raise ValueError(f"{function}: {reason}")
    scaling = float(scaling)
    if dtype != torch.float64 and -_ZERO_IN_FLOAT32 <= scaling <= _ZERO_IN_FLOAT32:
        return 0.0
    return scaling


def why_not_scaling(scaling: object, dtype: torch.dtype) -> str | None:
    """The reason that tensors of dtype cannot be multiplied with `scaling`; None if they can."""
    largest = LARGEST[torch.float64 if dtype == torch.float64 else torch.float32]
    # a comparison and not math.isfinite, which torch.compile cannot trace for a scaling that changes
    if is_number(scaling) and -largest <= scaling <= largest:
        return None
    return f"scaling is {described(scaling)}; expected a finite Python number, of at most {largest:.3g} over {dtype}"


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
    check_flag(function, "norm_grad", norm_grad)
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


def check_tensor(function: str, name: str, tensor: Any, weight: Weight | None, called: str = "weight") -> None:
    """Raise ValueError unless `tensor` is a dense floating-point tensor on the device of weight, if there is one."""
    lacks_shape = isinstance(tensor, UninitializedTensorMixin)
    # asked here as well: check_dense takes 0.1 us, and each call of dora_linear has five tensors
    if lacks_shape or not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_nested:
        check_dense(function, name, tensor)
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{function}: {name} is {tensor.dtype}; expected one of {DTYPE_NAMES}")
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
    check_row(function, "gain", gain, lora_B, "lora_B")
    if bias is not None:
        check_row(function, "bias", bias, lora_B, "lora_B")
    return check_scaling(function, scaling, base.dtype)
