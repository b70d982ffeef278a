"""The operators of inference in plain PyTorch, by the specification, for programs that run where no kernel of ours is.

torch.onnx.export takes them by itself, of a module and of a program that torch.export has made. For everybody else the
operators stay, in torch.compile and torch.export too. A program in ATen alone, for a runtime without Python:

    table = torch.export.default_decompositions()
    table.update(dora_kernels.decompositions.DECOMPOSITIONS)
    program = program.run_decompositions(table)

A decomposition gives what its operator does, to rounding: products of matrices in the dtype of their operands, norm,
gain and the epilogue in float32 (float64 for float64). The norm stays a function of the weights; nothing is written in
place; no size is asked for, so that the number of tokens stays free.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from dora_kernels import ops, reference
from dora_kernels.quant import DENSE, FORMATS, flatten_weight, unflatten_weight
from dora_kernels.reference import accumulate_dtype, gain_of
from dora_kernels.types import Call, Forward


def is_for_onnx() -> bool:
    """True while torch.onnx.export runs, whichever of its two exporters it is."""
    onnx = sys.modules.get("torch.onnx")  # torch imports it where it is asked for
    return onnx is not None and onnx.is_in_onnx_export()


def is_traced_for_onnx() -> bool:
    """True while torch.onnx.export(dynamo=False) records: torch.jit.trace sees an operator, and no way into it.

    It would run an autograd Function, too, and leave results of it out of the graph.
    """
    return torch._C._get_tracing_state() is not None and is_for_onnx()  # the question that Dynamo can trace


def _dense(
    tensors: list[Tensor], weight_format: str, numbers: list[int], dtype: torch.dtype, shape: tuple[int, int]
) -> Tensor:
    """weight (N, K) in its dtype, decoded at once: QuantizedWeight.dequantize writes block after block into memory.

    Raises ValueError over 4 bits with a codebook, whose decoder multiplies in place and reads two values as one number.
    """
    if weight_format not in (DENSE, "row8", "hqq4"):
        raise ValueError(
            f"decompositions: weight is {weight_format}, whose decoder writes in place; "
            "expected a dense weight, HQQ's or 8 bits with a scale for each row"
        )
    # ONNX shifts no bytes: its exporter makes int8 of uint8 >> 4
    tensors = [tensor.int() if tensor.dtype == torch.uint8 else tensor for tensor in tensors]
    whole = unflatten_weight(tensors, weight_format, numbers, dtype, shape)
    if isinstance(whole, Tensor):
        return whole
    decoded: Tensor = FORMATS[weight_format](whole, 0, math.prod(shape))
    return decoded.view(shape)


def _norm_of(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """norm (N,); reference.row_norms would take it twice, for the sake of a second derivative."""
    norm: Tensor = torch.linalg.vector_norm(reference.direction(weight, lora_A, lora_B, scaling), dim=1)
    return norm


def forward(call: Call) -> Forward:
    """The results of ops.run_forward, of x and x_dropped (..., K)."""
    x, x_dropped, layer, bias, given, how = call
    weight, lora_A, lora_B, magnitude, scaling = layer
    base_dtype = accumulate_dtype(x.dtype) if how.exact else x.dtype
    adapter_input = x if x_dropped is None else x_dropped
    with ops.plain_mode(x):
        weight = _dense(*flatten_weight(weight), (len(lora_B), lora_A.shape[1]))
        lora_A, lora_B = lora_A.to(how.dtype), lora_B.to(how.dtype)
        norm = _norm_of(weight, lora_A, lora_B, scaling) if given.norm is None else given.norm
        gain = gain_of(magnitude, norm) if given.gain is None else given.gain
        weight = weight.to(x.dtype).to(base_dtype)
        base = F.linear(adapter_input.to(base_dtype), weight)
        residual = None if x_dropped is None else F.linear(x.to(base_dtype), weight)
        low = F.linear(adapter_input.to(how.dtype), lora_A) if given.low is None else given.low
        y = reference.epilogue(base, low, lora_B, gain, bias, scaling, x.dtype, residual)
        z = base
        if how.save not in ("", "base"):
            z = reference.epilogue(base, low, lora_B, torch.ones_like(gain), None, scaling, base_dtype)
    return Forward(
        y,
        norm if given.norm is None else None,
        gain if given.gain is None else None,
        low if how.save_low and given.low is None else None,
        z if how.save else None,
    )


def _forward(*flat: Any, **given_low: Any) -> tuple[Tensor, ...]:
    call = ops.unflatten_forward(*flat, **given_low)
    return tuple(call.x.new_empty(0) if made is None else made for made in forward(call))


def norm(
    weight: list[Tensor], weight_format: str, weight_numbers: list[int], weight_dtype: torch.dtype, lora_A: Tensor,
    lora_B: Tensor, scaling: float, dtype: torch.dtype, backend: str,
) -> Tensor:  # fmt: skip
    """The result of ops.norm."""
    with ops.plain_mode(lora_A):
        whole = _dense(weight, weight_format, weight_numbers, weight_dtype, (len(lora_B), lora_A.shape[1]))
        return _norm_of(whole, lora_A.to(dtype), lora_B.to(dtype), scaling)


def merge(
    weight: list[Tensor], weight_format: str, weight_numbers: list[int], weight_dtype: torch.dtype, lora_A: Tensor,
    lora_B: Tensor, gain: Tensor, scaling: float, dtype: torch.dtype, backend: str,
) -> Tensor:  # fmt: skip
    """The result of ops.merge."""
    with ops.plain_mode(lora_A):
        whole = _dense(weight, weight_format, weight_numbers, weight_dtype, (len(lora_B), lora_A.shape[1]))
        return reference.merge(whole, lora_A.to(dtype), lora_B.to(dtype), gain, scaling)


def rescale(
    base: Tensor, low: Tensor, lora_B: Tensor, gain: Tensor, bias: Tensor | None, residual: Tensor | None,
    scaling: float, backend: str,
) -> Tensor:  # fmt: skip
    """The result of ops.rescale, of base (..., N), low (..., R) and residual (..., N)."""
    with ops.plain_mode(base):
        return reference.epilogue(base, low, lora_B.to(low.dtype), gain, bias, scaling, base.dtype, residual)


def bank_epilogue(
    base: Tensor, low: Tensor, lora_B: Tensor, gain: Tensor, scaling: Tensor, bias: Tensor | None, index: Tensor,
    backend: str,
) -> Tensor:  # fmt: skip
    """The result of ops.bank_epilogue."""
    with ops.plain_mode(base):
        return reference.bank_epilogue(base, low, lora_B, gain, scaling, bias, index)


BY_NAME: dict[str, Callable[..., Any]] = {
    "forward": _forward,
    "norm": norm,
    "merge": merge,
    "rescale": rescale,
    "bank_epilogue": bank_epilogue,
}

DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    getattr(ops, name): decomposition for name, decomposition in BY_NAME.items()
}
"""The function that stands for each operator, as ExportedProgram.run_decompositions takes it."""


def _recorded(
    mode: ProxyTorchDispatchMode, operator: torch._ops.OpOverload, types: Any, args: Any = (), kwargs: Any = None
) -> Any:
    """The results of an operator that goes into a graph of torch.fx or, if ONNX is made of it, of its decomposition.

    torch's table of decompositions is no place for them: with an entry there fake tensors of free sizes ask it and not
    our fake results, and torch.compile fails where the environment has CI.
    """
    if is_for_onnx():
        with mode:
            return DECOMPOSITIONS[operator](*args, **(kwargs or {}))
    return mode.__torch_dispatch__(operator, types, args, kwargs)


for _name in BY_NAME:
    torch.library.register_torch_dispatch(f"dora_kernels::{_name}", ProxyTorchDispatchMode, _recorded)
del _name
