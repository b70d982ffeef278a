"""The autograd Functions of linear.py, weight.py and reuse/sharing.py, over the operators of ops.py.

Each returns the gradients of the definition instead where derivatives.py says so.
"""

import functools
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dora_kernels import ops
from dora_kernels.functional import derivatives
from dora_kernels.functional.signature import is_observed, run
from dora_kernels.quant import DENSE, Weight, unflatten_weight
from dora_kernels.reference import accumulate_dtype, dense, dora_linear_ref, gain_of, row_norms
from dora_kernels.types import Call, DoraWeight, Given, Gradients, How, Needs, Saved

Storage = tuple[str, list[int], torch.dtype]
"""Format, numbers and dtype of a flattened weight; its tensors are apart, for autograd has to see them."""


def folded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., K) as rows (M, K) in dtype, differentiable."""
    if x.dim() != 2:
        # math.prod and not Size.numel(), which makes a symbolic size a number: torch.export would fix M; and not -1,
        # which an x without elements leaves open
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return in_dtype(x, dtype)


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in dtype, differentiable."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # which takes 2.5 us to do nothing


class DoraLinearFunction(torch.autograd.Function):
    """y (M, N), norm (N,) and gain (N,), of x (M, K) in the dtype of the base GEMM and x_dropped (M, K).

    norm and gain are None or empty where they are given: never themselves, because autograd would make a view of each.

    held: a list of what the adapter saw before it was folded and cast, alone: no input to autograd, and saved with its
    graph where nothing but a second derivative may need it. It costs no copy.

    direct: the pass is called, and not its operator. The dispatcher takes 12 us to find out that nobody else wants it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_dropped: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        bias: Tensor | None,
        norm: Tensor | None,
        gain: Tensor | None,
        merged: Tensor | None,
        low: Tensor | None,
        scaling: float,
        held: list[Tensor],
        how: How,
        direct: bool,
        storage: Storage,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        layer = DoraWeight(_stored(tensors, storage, how, lora_A, lora_B), lora_A, lora_B, magnitude, scaling)
        # not rounded to a narrower weight's dtype: the low-rank products see it as the adapter does
        dropped = None if x_dropped is None else in_dtype(x_dropped, how.dtype)
        base_bias = None if bias is None else in_dtype(bias, how.base_dtype)
        call = Call(x, dropped, layer, base_bias, Given(norm, gain, low), how)
        if direct:
            y, made_norm, made_gain, made_low, saved = ops.run_forward(call)
        else:
            given_low = {} if low is None else {"given_low": low}
            y, made_norm, made_gain, made_low, saved = ops.forward(*ops.flatten_forward(call), **given_low)
        if ctx is not None:
            shared = None if low is None else low.grad_fn
            ctx.shared = shared if getattr(shared, "_forward_cls", None) is SharedLow else None
            seen = held_version = None
            if ctx.shared is None and lora_A.requires_grad:  # dA is made from it
                seen = x if x_dropped is None else x_dropped
            elif ctx.shared is None and (lora_B.requires_grad or magnitude.requires_grad) and held:
                (seen,) = held
                seen = seen.clone() if seen.is_inference() else seen  # which autograd does not save
                held_version = seen._version
            ctx.held_version = held_version
            ctx.save_for_backward(
                seen,
                lora_A,
                lora_B,
                magnitude,
                made_norm if norm is None else norm,
                made_gain if gain is None else gain,
                (made_low if low is None else low) if how.save_low else None,
                saved if how.save else None,
                merged if x.requires_grad else None,
                *tensors,
            )
            ctx.mark_non_differentiable(*(made for made in (made_norm, made_gain) if made is not None))
            # or autograd makes zeros for norm and gain, two launches in every backward pass
            ctx.set_materialize_grads(False)
            ctx.scaling, ctx.how, ctx.direct, ctx.storage = scaling, how, direct, storage
            ctx.low_given = low is not None
            ctx.dropped_dtype = None if x_dropped is None else x_dropped.dtype
            ctx.bias_dtype = magnitude.dtype if bias is None else bias.dtype
        return y, made_norm, made_gain

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:  # what y went into gave it no gradient
            return (None,) * len(ctx.needs_input_grad)
        x, x_dropped, lora_A, lora_B, magnitude, bias, _norm, _gain, _merged, low, *constants = ctx.needs_input_grad
        needs = Needs(x, x_dropped, lora_A and not ctx.low_given, lora_B, magnitude, bias, low)
        make = _gradients_of_the_definition if derivatives.wanted(dy) else _gradients
        results = make(ctx, dy, needs)
        if type(results) is Gradients:  # of a pass: None where not needed
            made = results
        else:
            made = Gradients(*(one if needed else None for one, needed in zip(results, needs, strict=True)))
        dx_dropped = None if made.x_dropped is None else made.x_dropped.to(ctx.dropped_dtype)
        return (
            made.x,
            dx_dropped,
            made.lora_A,
            made.lora_B,
            made.magnitude,
            made.bias,
            None,
            None,
            None,
            made.low,
            *(None for _ in constants),
        )


def let_x_change(node: Any) -> None:
    """Let what was `held` for a node of DoraLinearFunction change in place, as long as no second derivative needs it.

    A hook on that one saved tensor: what autograd saves through hooks it compares with no version, and frees as ever.
    """
    if getattr(node, "held_version", None) is None:
        return
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # others', whose result counts
        node.held_version = None
    else:
        node._raw_saved_tensors[0].register_hooks(_itself, _itself)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _stored(tensors: Sequence[Tensor], storage: Storage, how: How, lora_A: Tensor, lora_B: Tensor) -> Weight:
    """The weight (N, K) as an operator takes it: a dense one in the dtype of the base GEMM."""
    if storage[0] == DENSE:
        return in_dtype(tensors[0], how.base_dtype)
    return unflatten_weight(list(tensors), *storage, (lora_B.shape[0], lora_A.shape[1]))


def _gradients(ctx: Any, dy: Tensor, needs: Needs) -> Sequence[Tensor | None]:
    """The gradients of DoraLinearFunction for dy (M, N), by one pass; None or empty where not needed."""
    seen, lora_A, lora_B, magnitude, norm, gain, low, saved, merged, *tensors = ctx.saved_tensors
    weight = _stored(tensors, ctx.storage, ctx.how, lora_A, lora_B)
    layer = DoraWeight(weight, lora_A, lora_B, magnitude, ctx.scaling)
    x = seen if needs.lora_A else None
    left = Saved(x, norm, gain, low, saved, merged, magnitude.dtype, ctx.bias_dtype)
    # nor a tensor of zeros without memory, which derivatives of torch's own may hand on
    if ctx.direct and not is_observed() and dy.__class__ is Tensor and not (dy.is_neg() or dy._is_zerotensor()):
        return ops.run_backward(dy, left, layer, ctx.how, needs)
    return ops.backward(*ops.flatten_backward(dy, left, layer, ctx.how, needs))


def _gradients_of_the_definition(ctx: Any, dy: Tensor, needs: Needs) -> list[Tensor | None]:
    """The gradients of DoraLinearFunction for dy (M, N), None where not needed, that can be differentiated again."""
    seen, lora_A, lora_B, magnitude, norm, _gain, _low, _saved, _merged, *tensors = ctx.saved_tensors
    how, scaling = ctx.how, ctx.scaling
    if ctx.held_version is not None and seen._version != ctx.held_version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: x of a "
            f"DoRA layer is at version {seen._version}; expected version {ctx.held_version}: its second derivatives "
            "need it, though with a frozen lora_A the first do not"
        )
    accumulate = norm.dtype
    weight = _in_accumulate_dtype(tensors, ctx.storage, lora_A, lora_B)
    rows = (dy.shape[0], lora_A.shape[1])
    if ctx.shared is not None:
        seen = SharedLow.rows_of(ctx.shared)
    else:
        seen = derivatives.absent(weight, rows) if seen is None else folded(seen, seen.dtype)
    # under dropout x meets the frozen weight alone
    x, x_dropped = (derivatives.absent(weight, rows), seen) if how.dropped else (seen, None)

    def definition(x: Tensor, x_dropped: Tensor | None, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Tensor:
        x, lora_A, lora_B, magnitude = (one.to(accumulate) for one in (x, lora_A, lora_B, magnitude))
        return dora_linear_ref(
            x,
            weight,
            lora_A,
            lora_B,
            magnitude,
            scaling,
            x_dropped=None if x_dropped is None else x_dropped.to(accumulate),
            norm=None if how.norm_grad else norm,
            norm_grad=how.norm_grad,
        )

    *needs_definition, needs_bias, needs_low = needs
    inputs = (x, x_dropped, lora_A, lora_B, magnitude)
    made = derivatives.gradients(definition, inputs, needs_definition, dy)
    dbias = dlow = None
    with ops.without_autocast(dy.device.type):
        if needs_bias:
            dbias = dy.to(accumulate).sum(0).to(ctx.bias_dtype)
        if needs_low:
            gain = gain_of(magnitude, norm)
            dlow = (scaling * ((dy.to(accumulate) * gain) @ lora_B.to(accumulate))).to(how.dtype)
    return [*made, dbias, dlow]


def _in_accumulate_dtype(tensors: Sequence[Tensor], storage: Storage, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """weight (N, K) in the accumulate dtype."""
    weight: Any = unflatten_weight(list(tensors), *storage, (lora_B.shape[0], lora_A.shape[1]))
    accumulate = accumulate_dtype(weight.dtype)
    with torch.no_grad():
        return dense(weight, accumulate).to(accumulate)


class WeightNorm(torch.autograd.Function):
    """norm, with the gradient of lora_A and lora_B through it."""

    @staticmethod
    def forward(
        ctx: Any,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dtype: torch.dtype,
        backend: str,
        storage: Storage,
        *tensors: Tensor,
    ) -> Tensor:
        norm: Tensor = run("norm", list(tensors), *storage, lora_A, lora_B, scaling, dtype, backend)
        ctx.save_for_backward(lora_A, lora_B, norm, *tensors)
        ctx.settings = (scaling, dtype, backend, storage)
        return norm

    @staticmethod
    def backward(ctx: Any, dnorm: Tensor) -> tuple[Tensor | None, ...]:
        lora_A, lora_B, norm, *tensors = ctx.saved_tensors
        storage: Storage
        scaling, dtype, backend, storage = ctx.settings
        needs_A, needs_B, *constants = ctx.needs_input_grad
        needs = [needs_A, needs_B]
        if derivatives.wanted(dnorm):
            weight = _in_accumulate_dtype(tensors, storage, lora_A, lora_B)

            def definition(lora_A: Tensor, lora_B: Tensor) -> Tensor:
                return row_norms(weight + scaling * lora_B.to(weight.dtype) @ lora_A.to(weight.dtype))

            dA, dB = derivatives.gradients(definition, (lora_A, lora_B), needs, dnorm)
        else:
            dA, dB = run(
                "norm_backward", dnorm, tensors, *storage, lora_A, lora_B, norm, scaling, dtype, needs, backend
            )
        return dA if needs_A else None, dB if needs_B else None, *(None for _ in constants)


class SharedLow(torch.autograd.Function):
    """low (M, R) of each lora_A; x gets no gradient here, its layers have it.

    rows: a list of x (M, K) alone, which so is no input to autograd, and yet saved with its graph: the second
    derivatives, of the layers too, need it.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: list[Tensor], dtype: torch.dtype, backend: str, lows: Any, *lora_As: Tensor
    ) -> tuple[Tensor, ...]:
        low = run("shared_low", rows[0], list(lora_As), dtype, backend)
        ctx.save_for_backward(rows[0])
        ctx.set_materialize_grads(False)
        ctx.settings = lora_As[0].dtype, backend
        ctx.lows = weakref.ref(lows)
        ctx.unpacked = -1, None
        parts: tuple[Tensor, ...] = low.split([lora_A.shape[0] for lora_A in lora_As], 1)
        return parts

    @staticmethod
    def rows_of(node: Any) -> Tensor:
        """x (M, K) of a node of this Function: several ask, and a checkpoint unpacks once in a backward pass."""
        now = torch._C._current_graph_task_id()
        if node.unpacked[0] != now:
            node.unpacked = now, *node.saved_tensors
            # at the end of this backward pass, in which the node itself may not run
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(SharedLow.forget_rows, node))
        rows: Tensor = node.unpacked[1]
        return rows

    @staticmethod
    def forget_rows(node: Any) -> None:
        """Let go of what `rows_of` has unpacked."""
        node.unpacked = -1, None

    @staticmethod
    def backward(ctx: Any, *dlows: Tensor | None) -> tuple[Tensor | None, ...]:
        now, rows = ctx.unpacked
        if now != torch._C._current_graph_task_id():
            (rows,) = ctx.saved_tensors
        SharedLow.forget_rows(ctx)
        lows = ctx.lows()
        if lows is not None:
            lows.waiting.clear()  # what this backward pass frees cannot be in another graph
        present = [dlow for dlow in dlows if dlow is not None]
        if any(derivatives.wanted(dlow) for dlow in present):
            accumulate = accumulate_dtype(rows.dtype)
            with ops.without_autocast(rows.device.type):
                products = [dlow.to(accumulate).T @ rows.to(accumulate) for dlow in present]
            made = iter([product.to(ctx.settings[0]) for product in products])
        else:
            made = iter(run("shared_low_backward", rows, present, *ctx.settings) if present else ())
        return None, None, None, None, *(None if dlow is None else next(made) for dlow in dlows)
