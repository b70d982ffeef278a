"""Gradients that can be differentiated again: those of the definition in plain PyTorch, by autograd.

A backward pass is one opaque operator. Where the graph of the gradients is asked for (create_graph=True: gradient
penalties, MAML, Hessians), and for a dy that no operator takes, the Functions return the gradients of the definition
instead. Ordinary training pays for it with one question a backward pass, and with a reference to x.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dora_kernels.ops import without_autocast


def wanted(dy: Tensor) -> bool:
    """True if this backward pass has to be made of torch's own operators, which autograd and torch.func see through.

    It has to be if autograd records it (create_graph=True), if dy is a batch of gradients (is_grads_batched=True,
    functional.jacobian(vectorize=True), torch.func.vmap over torch.autograd.grad), and if dy is a dual tensor.
    """
    if torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():  # which traces none of the questions below
        _refuse_create_graph(dy)
        return False
    return is_batched(dy) or is_dual(dy)


def is_batched(tensor: Tensor) -> bool:
    """True if `tensor` may be a batch that looks like one tensor; inside a transform of torch.func any may be."""
    return torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(tensor)


def is_dual(tensor: Tensor) -> bool:
    """True if `tensor` carries a tangent of forward-mode AD."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def gradients(
    definition: Callable[..., Tensor], inputs: Sequence[Any], needs: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    """The gradients of definition(*inputs) for dy, each None unless needed, with their own graph where it is recorded.

    definition: computes in the accumulate dtype. inputs: as save_for_backward has returned them, so that the graph of
    the gradients leads on to what they were made from; None is not needed.
    """
    with torch.enable_grad(), without_autocast(dy.device.type):
        # a view each: the pass through the definition ends there, and runs no hook of the tensors themselves
        inputs = [one.view_as(one) if needed else one for one, needed in zip(inputs, needs, strict=True)]
        y = definition(*inputs)
    aliases = [one for one, needed in zip(inputs, needs, strict=True) if needed]
    if not aliases:
        return [None] * len(inputs)
    with without_autocast(dy.device.type):
        dy, again = dy.to(y.dtype), torch.is_grad_enabled()
        made = iter(torch.autograd.grad(y, aliases, dy, create_graph=again))
    return [next(made) if needed else None for needed in needs]


def absent(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros in the place of an input whose value no gradient depends on, and which was not saved."""
    return like.new_zeros(()).expand(shape).requires_grad_()


_library = torch.library.Library("dora_kernels", "FRAGMENT")
_library.define("first_derivatives_only(Tensor dy) -> Tensor")


@torch.library.impl(_library, "first_derivatives_only", "CompositeImplicitAutograd")
def _first_derivatives_only(dy: Tensor) -> Tensor:
    """Nothing; raises NotImplementedError at the end of a backward pass that is run with create_graph=True."""
    if torch._C._current_graph_task_id() != -1:  # not while Dynamo asks for shapes
        torch.autograd.Variable._execution_engine.queue_callback(_raise_if_recorded)
    return dy.new_empty(0)


def _raise_if_recorded() -> None:
    # Callbacks see the state of the backward pass. What Dynamo has traced does not: it turns gradients off first
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "dora_kernels: create_graph=True in a backward pass that torch.compile has traced; expected a layer that "
            "is not compiled: there its second derivatives are right"
        )


def _refuse_create_graph(dy: Tensor) -> None:
    """Have the backward pass that Dynamo traces now raise where it is recorded itself.

    Under backend="eager" its gradients would be constants, and nobody would be told. AOTAutograd has a line of its own
    for it, and drops this operator, whose result nobody takes: it is in no graph that AOTAutograd compiles.
    """
    torch.ops.dora_kernels.first_derivatives_only(dy)
