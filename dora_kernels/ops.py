"""torch.library: one opaque operator per pass, so that torch.compile sees shapes and dtypes and nothing else.

The backend and the way are taken inside the operator: every choice returns the same tensors, so that nothing
recompiles when the number of tokens changes. Autograd is in autograd.py.

A weight is four arguments, those of `quant.parts`; its N and K are those of lora_B and lora_A.
"""

import collections
import contextlib
from typing import Any

import torch
from torch import Tensor

from dora_kernels import passes
from dora_kernels.planning import devices
from dora_kernels.pytorch import PYTORCH
from dora_kernels.quant import QuantizedWeight, Weight, whole
from dora_kernels.reference import accumulate_dtype
from dora_kernels.types import Needs, Steps

# (operator, backend) -> how often it ran in this process; tests and the demo read it to know what really ran
calls: collections.Counter[tuple[str, str]] = collections.Counter()

_library = torch.library.Library("dora_kernels", "DEF")


def _steps(operator: str, requested: str, *arguments: object) -> Steps:
    """The steps of the backend that takes the tensors among `arguments`; counts the call."""
    tensors = [argument for argument in arguments if isinstance(argument, (Tensor, QuantizedWeight))]
    backend = devices.backend_for(requested, tensors[0].device, *(tensor.dtype for tensor in tensors))
    calls[operator, backend] += 1
    if backend == "reference":
        return PYTORCH
    from dora_kernels.kernels import KERNELS  # needs triton

    return KERNELS


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for a device; meta has none, and asking is an error there.

    So it is on lazy, vulkan and mkldnn, where this raises torch's RuntimeError: no layer is run there.
    torch.amp.is_autocast_available would ask more generally, and breaks the graph of torch.compile in torch 2.11.
    """
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """torch.autocast off, inside; also on meta, where torch has none to turn off."""
    return torch.autocast(device_type, enabled=False) if is_autocast(device_type) else contextlib.nullcontext()


_NOTHING_TO_SETTLE = contextlib.nullcontext()


def _settled(tensor: Weight) -> contextlib.AbstractContextManager:
    """The state in which an operator's code runs: what surrounds the call has been accounted for in functional/.

    No autograd (the Functions are in autograd.py), no autocast (which would still convert the operands), and
    tensor's device as the current one, where kernels launch: a model may be spread over several.
    """
    device = tensor.device
    autocast = is_autocast(device.type)
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    if not (torch.is_grad_enabled() or autocast or elsewhere):
        return _NOTHING_TO_SETTLE
    stack = contextlib.ExitStack()
    stack.enter_context(torch.no_grad())
    if autocast:
        stack.enter_context(torch.autocast(device.type, enabled=False))
    if elsewhere:
        stack.enter_context(torch.cuda.device(device))
    return stack


def _or_empty(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """An empty tensor for each None: the results of an operator cannot be None."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def _whole(
    tensors: list[Tensor],
    weight_format: str,
    weight_numbers: list[int],
    weight_dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
) -> Weight:
    return whole(tensors, weight_format, weight_numbers, weight_dtype, (lora_B.shape[0], lora_A.shape[1]))


_library.define(
    "norm(Tensor[] weight, str weight_format, int[] weight_numbers, ScalarType weight_dtype, Tensor lora_A, "
    "Tensor lora_B, float scaling, ScalarType dtype, str backend) -> Tensor"
)


@torch.library.impl(_library, "norm", "CompositeExplicitAutograd")
def _norm(
    tensors: list[Tensor],
    weight_format: str,
    weight_numbers: list[int],
    weight_dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    weight = _whole(tensors, weight_format, weight_numbers, weight_dtype, lora_A, lora_B)
    steps = _steps("norm", backend, weight, lora_A, lora_B)
    with _settled(weight):
        return steps.norm(weight, lora_A.to(dtype), lora_B.to(dtype), scaling)[0]


@torch.library.register_fake("dora_kernels::norm", lib=_library)
def _norm_fake(weight, weight_format, weight_numbers, weight_dtype, lora_A, lora_B, scaling, dtype, backend):
    return lora_B.new_empty(lora_B.shape[:1], dtype=accumulate_dtype(weight_dtype))


_library.define(
    "merge(Tensor[] weight, str weight_format, int[] weight_numbers, ScalarType weight_dtype, Tensor lora_A, "
    "Tensor lora_B, Tensor gain, float scaling, ScalarType dtype, str backend) -> Tensor"
)


@torch.library.impl(_library, "merge", "CompositeExplicitAutograd")
def _merge(
    tensors: list[Tensor],
    weight_format: str,
    weight_numbers: list[int],
    weight_dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    scaling: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    weight = _whole(tensors, weight_format, weight_numbers, weight_dtype, lora_A, lora_B)
    steps = _steps("merge", backend, weight, lora_A, lora_B)
    with _settled(weight):
        return steps.merge(weight, lora_A.to(dtype), lora_B.to(dtype), gain, scaling)


@torch.library.register_fake("dora_kernels::merge", lib=_library)
def _merge_fake(weight, weight_format, weight_numbers, weight_dtype, lora_A, lora_B, gain, scaling, dtype, backend):
    return lora_B.new_empty((lora_B.shape[0], lora_A.shape[1]), dtype=weight_dtype)


_library.define(
    "forward(Tensor x, Tensor? x_dropped, Tensor[] weight, str weight_format, int[] weight_numbers, "
    "ScalarType weight_dtype, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor? bias, Tensor? norm, "
    "Tensor? gain, float scaling, ScalarType dtype, str way, str keep, bool keep_low, bool exact, str backend, *, "
    "Tensor? given_low=None)"
    " -> (Tensor y, Tensor norm, Tensor gain, Tensor low, Tensor kept)"
)


@torch.library.impl(_library, "forward", "CompositeExplicitAutograd")
def _forward(
    x: Tensor,
    x_dropped: Tensor | None,
    tensors: list[Tensor],
    weight_format: str,
    weight_numbers: list[int],
    weight_dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    *arguments: Any,
    given_low: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """passes.forward; the schema above names the arguments."""
    *arguments, backend = arguments
    weight = _whole(tensors, weight_format, weight_numbers, weight_dtype, lora_A, lora_B)
    arguments = (x, x_dropped, weight, lora_A, lora_B, *arguments, given_low)
    steps = _steps("forward", backend, *arguments)
    with _settled(x):
        return _or_empty(x, *passes.forward(steps, *arguments))


@torch.library.register_fake("dora_kernels::forward", lib=_library)
def _forward_fake(
    x,
    x_dropped,
    weight,
    weight_format,
    weight_numbers,
    weight_dtype,
    lora_A,
    lora_B,
    magnitude,
    *arguments,
    given_low=None,
):
    _bias, norm, gain, _scaling, dtype, _way, keep, keep_low, exact, _backend = arguments
    M, (N, R) = x.shape[0], lora_B.shape
    y = x.new_empty((M, N))
    accumulate = accumulate_dtype(x.dtype)
    new_norm = magnitude.new_empty((N,), dtype=accumulate) if norm is None else x.new_empty(0)
    new_gain = magnitude.new_empty((N,), dtype=accumulate) if gain is None else x.new_empty(0)
    low = x.new_empty((M, R), dtype=dtype) if keep_low and given_low is None else x.new_empty(0)
    kept_dtype = accumulate_dtype(x.dtype) if exact else x.dtype
    kept = x.new_empty((M, N), dtype=kept_dtype) if keep else x.new_empty(0)
    return y, new_norm, new_gain, low, kept


_library.define(
    "backward(Tensor dy, Tensor? x, Tensor[] weight, str weight_format, int[] weight_numbers, "
    "ScalarType weight_dtype, Tensor lora_A, Tensor lora_B, Tensor norm, Tensor gain, Tensor? low, Tensor? kept, "
    "Tensor? merged, float scaling, ScalarType dtype, str way, str keep, bool dropped, bool norm_grad, bool[] needs, "
    "ScalarType magnitude_dtype, ScalarType bias_dtype, str backend)"
    " -> (Tensor dx, Tensor dx_dropped, Tensor dA, Tensor dB, Tensor dmagnitude, Tensor dbias, Tensor dlow)"
)


@torch.library.impl(_library, "backward", "CompositeExplicitAutograd")
def _backward(
    dy: Tensor,
    x: Tensor | None,
    tensors: list[Tensor],
    weight_format: str,
    weight_numbers: list[int],
    weight_dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """passes.backward; the schema above names the arguments."""
    *arguments, backend = arguments
    weight = _whole(tensors, weight_format, weight_numbers, weight_dtype, lora_A, lora_B)
    arguments = (dy, x, weight, lora_A, lora_B, *arguments)
    steps = _steps("backward", backend, *arguments)
    with _settled(dy):
        return _or_empty(dy, *passes.backward(steps, *arguments))


@torch.library.register_fake("dora_kernels::backward", lib=_library)
def _backward_fake(dy, x, weight, weight_format, weight_numbers, weight_dtype, lora_A, lora_B, *arguments):
    *_, dtype, _way, _keep, _dropped, _norm_grad, needs, magnitude_dtype, bias_dtype, _backend = arguments
    M, N, (R, K) = dy.shape[0], lora_B.shape[0], lora_A.shape
    shapes = ((M, K), (M, K), (R, K), (N, R), (N,), (N,), (M, R))
    dtypes = (dy.dtype, dy.dtype, lora_A.dtype, lora_B.dtype, magnitude_dtype, bias_dtype, dtype)
    needs = Needs(*needs)
    return tuple(
        dy.new_empty(shape, dtype=dtype) if needed else dy.new_empty(0)
        for shape, dtype, needed in zip(shapes, dtypes, needs, strict=True)
    )


_library.define(
    "norm_backward(Tensor dnorm, Tensor[] weight, str weight_format, int[] weight_numbers, ScalarType weight_dtype, "
    "Tensor lora_A, Tensor lora_B, Tensor norm, float scaling, ScalarType dtype, bool[] needs, str backend)"
    " -> (Tensor dA, Tensor dB)"
)


@torch.library.impl(_library, "norm_backward", "CompositeExplicitAutograd")
def _norm_backward(
    dnorm: Tensor,
    tensors: list[Tensor],
    weight_format: str,
    weight_numbers: list[int],
    weight_dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """passes.norm_backward; the schema above names the arguments."""
    *arguments, backend = arguments
    weight = _whole(tensors, weight_format, weight_numbers, weight_dtype, lora_A, lora_B)
    steps = _steps("norm_backward", backend, weight, lora_A, lora_B)
    with _settled(weight):
        return _or_empty(dnorm, *passes.norm_backward(steps, dnorm, weight, lora_A, lora_B, *arguments))


@torch.library.register_fake("dora_kernels::norm_backward", lib=_library)
def _norm_backward_fake(dnorm, weight, weight_format, weight_numbers, weight_dtype, lora_A, lora_B, *arguments):
    *_, needs, _backend = arguments
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else dnorm.new_empty(0)
        for tensor, needed in zip((lora_A, lora_B), needs, strict=True)
    )


_library.define(
    "grouped_norm(Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, Tensor[] magnitudes, float[] scalings, "
    "ScalarType dtype, str backend) -> (Tensor norm, Tensor gain)"
)


@torch.library.impl(_library, "grouped_norm", "CompositeExplicitAutograd")
def _grouped_norm(
    weights: list[Tensor],
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    magnitudes: list[Tensor],
    scalings: list[float],
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    steps = _steps("grouped_norm", backend, weights[0], lora_As[0], magnitudes[0])
    with _settled(weights[0]):
        lora_As, lora_Bs = ([tensor.to(dtype) for tensor in tensors] for tensors in (lora_As, lora_Bs))
        return steps.grouped_norm(weights, lora_As, lora_Bs, magnitudes, scalings)


@torch.library.register_fake("dora_kernels::grouped_norm", lib=_library)
def _grouped_norm_fake(weights, lora_As, lora_Bs, magnitudes, scalings, dtype, backend):
    total, accumulate = sum(weight.shape[0] for weight in weights), accumulate_dtype(weights[0].dtype)
    return tuple(weights[0].new_empty(total, dtype=accumulate) for _ in range(2))


_library.define(
    "rescale(Tensor base, Tensor low, Tensor lora_B, Tensor gain, Tensor? bias, Tensor? residual, float scaling, "
    "str backend) -> Tensor"
)


@torch.library.impl(_library, "rescale", "CompositeExplicitAutograd")
def _rescale(
    base: Tensor,
    low: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scaling: float,
    backend: str,
) -> Tensor:
    steps = _steps("rescale", backend, base, low, lora_B)
    with _settled(base):
        return steps.epilogue(base, low, lora_B.to(low.dtype), gain, bias, scaling, base.dtype, residual)


@torch.library.register_fake("dora_kernels::rescale", lib=_library)
def _rescale_fake(base, low, lora_B, gain, bias, residual, scaling, backend):
    return base.new_empty(base.shape)


_library.define(
    "rescale_backward(Tensor dy, Tensor? base, Tensor low, Tensor lora_B, Tensor gain, float scaling, "
    "bool residual, bool[] needs, ScalarType bias_dtype, str backend) "
    "-> (Tensor dbase, Tensor dlow, Tensor dB, Tensor dgain, Tensor dbias)"
)


@torch.library.impl(_library, "rescale_backward", "CompositeExplicitAutograd")
def _rescale_backward(
    dy: Tensor,
    base: Tensor | None,
    low: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    scaling: float,
    residual: bool,
    needs: list[bool],
    bias_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, ...]:
    """passes.rescale_backward."""
    steps = _steps("rescale_backward", backend, dy, low, lora_B)
    B = lora_B.to(low.dtype)
    with _settled(dy):
        arguments = (dy, base, low, B, gain, scaling, residual, needs, lora_B.dtype, bias_dtype)
        gradients = passes.rescale_backward(steps, *arguments)
        return _or_empty(dy, *gradients)


@torch.library.register_fake("dora_kernels::rescale_backward", lib=_library)
def _rescale_backward_fake(dy, base, low, lora_B, gain, scaling, residual, needs, bias_dtype, backend):
    shapes = (dy.shape, low.shape, lora_B.shape, gain.shape, gain.shape)
    dtypes = (dy.dtype, low.dtype, lora_B.dtype, gain.dtype, bias_dtype)
    return tuple(
        dy.new_empty(shape, dtype=dtype) if needed else dy.new_empty(0)
        for shape, dtype, needed in zip(shapes, dtypes, needs, strict=True)
    )


_library.define(
    "bank_epilogue(Tensor base, Tensor low, Tensor lora_B, Tensor gain, Tensor scaling, Tensor? bias, Tensor index, "
    "str backend) -> Tensor"
)


@torch.library.impl(_library, "bank_epilogue", "CompositeExplicitAutograd")
def _bank_epilogue(base: Tensor, low: Tensor, lora_B: Tensor, *arguments: Any) -> Tensor:
    """Steps.bank_epilogue; the schema above names the arguments."""
    *arguments, backend = arguments
    steps = _steps("bank_epilogue", backend, base, low, lora_B)
    with _settled(base):
        return steps.bank_epilogue(base, low, lora_B, *arguments)


@torch.library.register_fake("dora_kernels::bank_epilogue", lib=_library)
def _bank_epilogue_fake(base, low, lora_B, gain, scaling, bias, index, backend):
    return base.new_empty(base.shape)


_library.define("shared_low(Tensor x, Tensor[] lora_As, ScalarType dtype, str backend) -> Tensor")


@torch.library.impl(_library, "shared_low", "CompositeExplicitAutograd")
def _shared_low(x: Tensor, lora_As: list[Tensor], dtype: torch.dtype, backend: str) -> Tensor:
    """passes.shared_low."""
    steps = _steps("shared_low", backend, x, *lora_As)
    with _settled(x):
        return passes.shared_low(steps, x, lora_As, dtype)


@torch.library.register_fake("dora_kernels::shared_low", lib=_library)
def _shared_low_fake(x, lora_As, dtype, backend):
    return x.new_empty((x.shape[0], sum(lora_A.shape[0] for lora_A in lora_As)), dtype=dtype)


_library.define("shared_low_backward(Tensor x, Tensor[] dlows, ScalarType dtype, str backend) -> Tensor[]")


@torch.library.impl(_library, "shared_low_backward", "CompositeExplicitAutograd")
def _shared_low_backward(x: Tensor, dlows: list[Tensor], dtype: torch.dtype, backend: str) -> list[Tensor]:
    """passes.shared_low_backward."""
    steps = _steps("shared_low_backward", backend, x, *dlows)
    with _settled(x):
        return passes.shared_low_backward(steps, x, dlows, dtype)


@torch.library.register_fake("dora_kernels::shared_low_backward", lib=_library)
def _shared_low_backward_fake(x, dlows, dtype, backend):
    return [x.new_empty((dlow.shape[1], x.shape[1]), dtype=dtype) for dlow in dlows]


OPERATORS = (
    "norm",
    "grouped_norm",
    "norm_backward",
    "merge",
    "forward",
    "backward",
    "rescale",
    "rescale_backward",
    "bank_epilogue",
    "shared_low",
    "shared_low_backward",
)

# what is called: the one overload of each operator, looked up once
norm = torch.ops.dora_kernels.norm.default
merge = torch.ops.dora_kernels.merge.default
forward = torch.ops.dora_kernels.forward.default
backward = torch.ops.dora_kernels.backward.default
norm_backward = torch.ops.dora_kernels.norm_backward.default
rescale = torch.ops.dora_kernels.rescale.default
rescale_backward = torch.ops.dora_kernels.rescale_backward.default
bank_epilogue = torch.ops.dora_kernels.bank_epilogue.default
grouped_norm = torch.ops.dora_kernels.grouped_norm.default
shared_low = torch.ops.dora_kernels.shared_low.default
shared_low_backward = torch.ops.dora_kernels.shared_low_backward.default
