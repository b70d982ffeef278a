"""The signature of a call: all that its checks and its choices are made from, so that each signature is checked once.

Two calls of one signature differ in the numbers of their tensors, in how many tokens there are and in scaling, which is
checked at each call. Taking it is 3.5 us, what it stands for 8.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import profiler

from dora_kernels import decompositions, ops
from dora_kernels.functional.tracing import is_traced, is_transformed
from dora_kernels.planning.options import current_options
from dora_kernels.quant import QuantizedWeight
from dora_kernels.types import DoraWeight, Given

PLAIN = (Tensor, nn.Parameter)
"""The classes of tensors of which nothing but torch's operators makes anything."""

KEPT = 4096
"""The most signatures that are kept: of many ranks and shapes in one process, a few hundred."""


# asked at each call
_is_profiled_here = torch._C._autograd._profiler_enabled
_function_modes = torch._C._len_torch_function_stack


def is_observed() -> bool:
    """True if the operators that run now are more than run: they go into a graph, are transformed, or are profiled.

    By a profiler that Python has started, for one thread or for all; or by any that is on in this thread.
    Or a TorchFunctionMode sees them, to which an operator is one call. torch.set_default_device leaves such a mode on:
    it would be asked about each attribute of a tensor that a pass and its launches read.
    """
    return (
        is_traced() or is_transformed() or profiler._is_profiler_enabled or _is_profiled_here() or _function_modes() > 0
    )


def run(name: str, *arguments: Any) -> Any:
    """The results of the operator of that name in ops.py, whose dispatcher is asked only where somebody may look on.

    Those of its decomposition where ONNX' tracer records, which is to see no operator of ours.
    """
    if is_observed() or not all(map(_is_plain, arguments)):
        if decompositions.is_traced_for_onnx():
            return decompositions.BY_NAME[name](*arguments)
        return getattr(ops, name)(*arguments)
    return ops.OPERATORS[name](*arguments)


def _is_plain(argument: object) -> bool:
    if isinstance(argument, (list, tuple)):
        return all(map(_is_plain, argument))
    return not isinstance(argument, Tensor) or (argument.__class__ in PLAIN and not argument.is_neg())


def signature_of(
    x: Any, layer: DoraWeight, bias: Any, x_dropped: Any, given: Given, norm_grad: Any
) -> tuple[object, ...] | None:
    """The signature of a call of `dora_linear_core`, without scaling; None where the call has to be checked itself.

    That is where its operators are observed, where anything but a plain tensor is among its tensors, or where norm_grad
    is no bool. The imaginary part of a conjugate is not plain: its memory has the numbers with the other sign, which
    torch's dispatcher turns for an operator, and nobody for a kernel.
    """
    if x is None or (norm_grad is not False and norm_grad is not True) or is_observed():
        return None
    weight, lora_A, lora_B, magnitude, _ = layer
    whole: tuple[Any, ...] = (lora_A, lora_B, magnitude, bias, given.norm, given.gain, given.merged)
    facts: list[object] = []
    if weight.__class__ is QuantizedWeight:
        if not all(tensor.__class__ in PLAIN and not tensor.is_neg() for tensor in weight.tensors):
            return None
        facts += weight.dtype, weight.device, weight.shape
    else:
        whole = (weight, *whole)
    for tensor in whole:
        if tensor is None:
            facts.append(None)
        elif tensor.__class__ in PLAIN and not tensor.is_nested and not tensor.is_neg():
            facts += tensor.dtype, tensor.device, tensor.layout, tensor.shape, tensor.requires_grad
        else:
            return None
    for tensor in (x, x_dropped, given.low):
        if tensor is None:
            facts.append(None)
        elif tensor.__class__ in PLAIN and not tensor.is_nested and not tensor.is_neg():
            facts += tensor.dtype, tensor.device, tensor.layout, tensor.shape[-1:]
        else:
            return None
    # of their rows what is asked, and not how many they are
    if x_dropped is not None:
        facts.append(x_dropped.shape == x.shape)
    if given.low is not None:
        facts.append(given.low.shape[:-1] == (math.prod(x.shape[:-1]),))
    options = current_options()
    facts += options.backend, options.way, options.precision, norm_grad, torch.is_grad_enabled()
    if torch._C._is_any_autocast_enabled():  # first: the type of a device is a new string each time
        device = x.device.type
        facts.append(torch.get_autocast_dtype(device) if ops.is_autocast(device) else None)
    return tuple(facts)
