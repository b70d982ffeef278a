"""Questions about who else sees the operators that run now: a graph being made of them, or a transform of torch.func.

Asked in the calls of layers, so of torch's C++ state: 0.5 us and 0.15 us.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_is_key_included = torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_jit_tracing = torch._C._is_tracing
_transformed = torch._C._are_functorch_transforms_active


def is_traced() -> bool:
    """True if the operators that run now may go into a graph: of torch.compile, torch.export, torch.jit.trace, make_fx,
    or of either way to ONNX, which uses one of these.

    True under any TorchDispatchMode, too: whether it counts operators (FlopCounterMode, selective checkpointing) or
    records them cannot be asked. Fake tensors are made under one. A CUDA graph is no graph of operators, and is asked
    for beside a device.
    """
    return (
        torch.compiler.is_compiling()  # first: Dynamo knows it, and cannot trace the others
        or _is_jit_tracing()
        or _dispatch_modes() > 0
        or _is_key_included(_PRE_DISPATCH)  # make_fx(pre_dispatch=True) has a stack of modes of its own
    )


def is_transformed() -> bool:
    """True if torch.func (grad, vmap, jvp, functionalize) or forward-mode AD gives tensors another meaning now.

    Dynamo can trace this, with the transforms inside a compiled function. Forward-mode AD is for all threads: what
    another one has begun is seen here, too, and whether it means this call its tensors say (`may_carry_tangents`).
    """
    return _transformed() or forward_ad._current_level >= 0


def may_carry_tangents(x: object, others: Callable[[], Iterable[object]]) -> bool:
    """True if the transform in force may concern a call with x and others(). Takes 5 us each, under forward-mode AD.

    True where that cannot be asked: inside torch.func, while torch.compile traces, of subclasses of tensors. There the
    others are not even read: Dynamo of torch 2.11 fails at a parameter that torch.func has put in its place.
    """
    if _transformed() or torch.compiler.is_compiling():
        return True
    floats = (tensor for tensor in (x, *others()) if isinstance(tensor, Tensor) and tensor.is_floating_point())
    return any(
        type(tensor) not in (Tensor, nn.Parameter) or forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in floats
    )
