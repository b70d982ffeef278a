"""The region of activation checkpointing in which a call runs, for the first time or again.

A region is the object that torch makes once for each checkpoint() and holds as long as its graph: with
use_reentrant=False the frame that its hooks share, with use_reentrant=True the node of autograd. So what a call leaves
for its recomputation is found by that recomputation and by no other call. There is no public way to ask: if torch's
hooks look different, and in the checkpointing of other libraries, no region is seen, and nothing is reused.
"""

import sys
from types import CodeType
from typing import Any

import torch
from torch.utils import checkpoint

_FORWARD = checkpoint.CheckpointFunction.forward.__code__
_BACKWARD = checkpoint.CheckpointFunction.backward.__code__
_FIRST, _AGAIN = "_checkpoint_hook.__init__.<locals>.pack_hook", "_recomputation_hook.__init__.<locals>.pack_hook"

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_current_node = torch._C._current_autograd_node


def of_first_call(training: bool) -> Any | None:
    """The region that runs the present call and may run it again, or None.

    A reentrant region runs it without gradients. It is looked for in training only, in the stack of Python's frames.
    """
    if not torch.is_grad_enabled():
        return _context(_FORWARD) if training else None
    if _top_hooks(True) is None:  # of every call that is not checkpointed, and asked in each
        return None
    # in a backward pass a region is part of what an outer one recomputes; the tensors saved are not its own
    return None if in_backward() else _in_hook(_FIRST, "frame")


def of_call_again(region: Any | None) -> bool:
    """True if `region` runs the present call again."""
    if region is None or not torch.is_grad_enabled():
        return False
    frame = _in_hook(_AGAIN, "target_frame_ref")
    if frame is not None:
        return frame() is region
    # the node alone does not tell: its hooks, too, run as if in it
    return _current_node() is region and _context(_BACKWARD) is region


def in_backward() -> bool:
    """True if autograd is running a backward pass, in which checkpointing runs forward passes once more."""
    return torch._C._current_graph_task_id() != -1


def _in_hook(name: str, variable: str) -> Any | None:
    """A variable of the innermost hook on saved tensors if that is torch.utils.checkpoint's of that name, else None."""
    hooks = _top_hooks(True)
    if hooks is None:
        return None
    pack = hooks[0]
    while hasattr(pack, "__wrapped__"):  # torch 2.13 wraps one
        pack = pack.__wrapped__
    if getattr(pack, "__qualname__", "") != name or getattr(pack, "__module__", "") != checkpoint.__name__:
        return None
    variables = pack.__code__.co_freevars
    return pack.__closure__[variables.index(variable)].cell_contents if variable in variables else None


def _context(code: CodeType) -> Any | None:
    """The ctx of the innermost running call of one of CheckpointFunction's functions, or None."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["ctx"]
