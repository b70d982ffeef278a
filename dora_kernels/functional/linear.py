"""dora_linear: validation, shape folding, dtypes under autocast, and what the call saves."""

import math
from typing import Any

import torch
from torch import Tensor

from dora_kernels import decompositions
from dora_kernels.functional.autograd import DoraLinearFunction, folded, in_dtype, let_x_change
from dora_kernels.functional.signature import KEPT, signature_of
from dora_kernels.functional.validate import (
    check_adapter,
    check_call,
    check_norm_grad,
    check_row,
    check_scaling,
    check_tensor,
    check_tracing,
)
from dora_kernels.ops import is_autocast
from dora_kernels.planning import plan
from dora_kernels.planning.options import current_options
from dora_kernels.quant import QuantizedWeight, Weight, flatten_weight
from dora_kernels.reference import accumulate_dtype
from dora_kernels.types import NOTHING_GIVEN, Call, DoraWeight, Given, How

_unsafe_view = torch.ops.aten._unsafe_view.default


def dora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    norm_grad: bool = False,
) -> Tensor:
    """The DoRA linear layer, differentiable in everything but weight (DoRA, arXiv 2402.09353, equation 5).

        y = gain * (x weight^T + scaling * (x lora_A^T) lora_B^T) + bias
        gain = magnitude / norm,  norm_n = ||(weight + scaling * lora_B lora_A)_n||_2

    Shapes: x (..., K), weight (N, K) of any strides or a QuantizedWeight, frozen, lora_A (R, K), lora_B (N, R),
    magnitude (N,), bias (N,) -> y (..., N). A row whose norm is 0 has gain 0: its output is the bias, and its gradients
    are 0. So has a row whose norm float32 cannot hold: entries all below about 1e-23 or one above 1e19.

    Dtypes: x and weight share one (under autocast both are cast to autocast's; a quantized weight is decoded to x's),
    which y has too; the adapters and the magnitude may have another one, float32 over bfloat16 say. norm and gain are
    float32, float64 for float64.

    norm_grad: False holds the norm constant in the backward pass (section 4.3 of the paper, and what PEFT does);
    True is the exact gradient.

    Second derivatives and higher ones (create_graph=True), and gradients in a batch (is_grads_batched=True), are those
    of the formula as norm_grad has it, in plain PyTorch, at PyTorch's cost. Inside torch.compile they are refused, by
    AOTAutograd, by torch.func ("Batching rule not implemented") or by us.

    Deterministic: repeated calls are bitwise equal, in y and every gradient. norm, gain and the merged weight see no x,
    and the kernels make a row of y from that row of base and low alone, at every M; but base and low come from GEMMs,
    where the library or the split of a sum may round a row otherwise at another M. So y of one token in another batch
    is not promised to the bit. The numbers of the other tokens do not reach it, nor does a NaN or inf among them.

    NaN and inf come out where the formula says in IEEE arithmetic: a gain or scaling of 0 does not hide an inf (NaN).

    Raises ValueError, naming the argument, where shapes, dtypes, devices or scaling do not fit, and where weight
    requires a gradient; NotImplementedError where a tensor is dual (forward-mode AD), under the transforms of
    torch.func, torch.fx.symbolic_trace and, with gradients, torch.jit.trace.
    """
    layer = DoraWeight(weight, lora_A, lora_B, magnitude, scaling)
    return dora_linear_core(x, layer, bias, norm_grad=norm_grad)[0]


def dora_linear_core(
    x: Tensor,
    layer: DoraWeight,
    bias: Tensor | None = None,
    *,
    x_dropped: Tensor | None = None,
    given: Given = NOTHING_GIVEN,
    norm_grad: bool = False,
    function: str = "dora_linear",
) -> tuple[Tensor, Tensor, Tensor]:
    """y, norm (N,) and gain (N,): `dora_linear` with what other libraries' layers and reuse/ need beside it.

    x_dropped: dropout(x), of x's shape. The adapter then sees x_dropped, and the base layer x (PEFT's meaning):
        y = x weight^T + (gain - 1) * x_dropped weight^T + gain * scaling * (x_dropped lora_A^T) lora_B^T + bias
    given: constants, but for low.
        norm (N,)      used in place of the row norms, so norm_grad cannot be asked for with it
        gain (N,)      magnitude / norm, given with norm or not at all
        merged (N, K)  merge_weight's, in x's dtype; the backward pass takes it where otherwise it would make it
        low (M, R)     x lora_A^T in the dtype of the low-rank product (reuse/sharing.py): lora_A has its gradient
                       through low alone, x all of its own from this call. Not with x_dropped or norm_grad
    function: the name that error messages give.
    """
    scaling, how, direct = checked(function, x, layer, bias, x_dropped, given, norm_grad)
    weight, lora_A, lora_B, magnitude, _ = layer
    base_dtype, dtype = how.base_dtype, how.dtype
    if not direct and decompositions.is_traced_for_onnx():
        return _decomposed(x, layer._replace(scaling=scaling), bias, x_dropped, given, how)
    # the kernels read both without a stride
    norm = None if given.norm is None else _constant_row(given.norm, base_dtype)
    gain = None if given.gain is None else given.gain.contiguous()
    stored = flatten_weight(weight)
    tensors, storage = stored[0], stored[1:]
    # outside the Function, which then saves its inputs: a second derivative leads on through them
    x_rows = folded(x, base_dtype)
    # wider adapters see what was dropped as it is; the Function widens it, and saves it narrow
    dropped_rows = None if x_dropped is None else folded(x_dropped, dtype if dtype == base_dtype else x_dropped.dtype)
    grad = torch.is_grad_enabled()
    held = [x if x_dropped is None else x_dropped] if grad and not torch.compiler.is_compiling() else []
    adapter = (lora_A, lora_B, magnitude, bias)
    given_rows = (norm, gain, given.merged, given.low)
    arguments: tuple[Any, ...] = (
        x_rows,
        dropped_rows,
        *adapter,
        *given_rows,
        scaling,
        held,
        how,
        direct,
        storage,
        *tensors,
    )
    made: Any = DoraLinearFunction.apply(*arguments) if grad else DoraLinearFunction.forward(None, *arguments)
    y, new_norm, new_gain = made
    if held and not lora_A.requires_grad:
        let_x_change(y.grad_fn)
    y = unfolded(y, x.shape[:-1])
    return y, new_norm if norm is None else norm, new_gain if gain is None else gain


def _decomposed(
    x: Tensor, layer: DoraWeight, bias: Tensor | None, x_dropped: Tensor | None, given: Given, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `dora_linear_core` by torch's operators alone."""
    base_dtype = how.base_dtype
    if isinstance(layer.weight, Tensor):
        layer = layer._replace(weight=in_dtype(layer.weight, base_dtype))
    bias = None if bias is None else in_dtype(bias, base_dtype)
    norm = None if given.norm is None else _constant_row(given.norm, base_dtype)
    low = None if given.low is None else given.low.view(*x.shape[:-1], given.low.shape[1])
    given = Given(norm, given.gain, low)
    made: Any = decompositions.forward(Call(in_dtype(x, base_dtype), x_dropped, layer, bias, given, how))
    return made.y, made.norm if norm is None else norm, made.gain if given.gain is None else given.gain


_known: dict[tuple[object, ...], How] = {}


def checked(
    function: str,
    x: Tensor,
    layer: DoraWeight,
    bias: Tensor | None,
    x_dropped: Tensor | None,
    given: Given,
    norm_grad: bool,
) -> tuple[float, How, bool]:
    """scaling as a float, the How of a call, and whether the passes may be called directly (functional/signature.py).

    Raises as `dora_linear_core`. A call whose signature has been checked before has its scaling checked alone.
    """
    signature = signature_of(x, layer, bias, x_dropped, given, norm_grad)
    if signature is None:
        return *_check(function, x, layer, bias, x_dropped, given, norm_grad), False
    how = _known.get(signature)
    if how is not None:
        return check_scaling(function, layer.scaling, layer.weight.dtype), how, True
    scaling, how = _check(function, x, layer, bias, x_dropped, given, norm_grad)
    if len(_known) >= KEPT:
        _known.clear()
    _known[signature] = how
    return scaling, how, True


def _check(
    function: str,
    x: Tensor,
    layer: DoraWeight,
    bias: Tensor | None,
    x_dropped: Tensor | None,
    given: Given,
    norm_grad: bool,
) -> tuple[float, How]:
    """scaling as a float, and the How of a call. Raises as `dora_linear_core`."""
    weight, lora_A, lora_B, magnitude, scaling = layer
    check_tracing(function, x)
    scaling = check_adapter(function, weight, lora_A, lora_B, scaling)
    check_call(function, x, weight, magnitude, bias, x_dropped, given.norm)
    check_norm_grad(function, norm_grad, given.norm)
    base_dtype, dtype = operand_dtypes(x, lora_A)
    check_dtypes(function, x, weight)
    if given.gain is not None or given.merged is not None:
        _check_given(function, given, weight, base_dtype)
    if given.low is not None:
        _check_low(function, given.low, x, lora_A, dtype, alone=x_dropped is None and not norm_grad)
    return scaling, _how(x, x_dropped, layer, given, norm_grad, (base_dtype, dtype))


def _constant_row(norm: Tensor, base_dtype: torch.dtype) -> Tensor:
    """norm (N,) as a constant in the accumulate dtype, contiguous."""
    dtype = accumulate_dtype(base_dtype)
    if not torch.compiler.is_compiling() and norm.dtype == dtype and not norm.requires_grad and norm.is_contiguous():
        return norm  # in 0.4 us instead of 3
    return norm.detach().to(dtype).contiguous()


def _how(
    x: Tensor,
    x_dropped: Tensor | None,
    layer: DoraWeight,
    given: Given,
    norm_grad: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> How:
    """The How of a call that saves what the gradients wanted of it need. dtypes: `operand_dtypes`."""
    options, (base_dtype, dtype) = current_options(), dtypes
    exact, dropped = options.precision == "exact", x_dropped is not None
    save, needs_B = "", False
    if torch.is_grad_enabled():
        needs_A, needs_B = layer.lora_A.requires_grad and given.low is None, layer.lora_B.requires_grad
        if layer.magnitude.requires_grad or (norm_grad and (needs_A or needs_B)):
            asks = plan.asks(exact, dropped, dtype, base_dtype)
            N, K = layer.weight.shape
            sizes = N, K, layer.lora_A.shape[0]
            save = plan.saved_tensor(options.way, base_dtype, options.backend, x.device, sizes, **asks)
    return How(
        base_dtype,
        dtype,
        options.way,
        save=save,
        backend=options.backend,
        save_low=needs_B or save == "base",
        exact=exact,
        dropped=dropped,
        norm_grad=norm_grad,
    )


def unfolded(y: Tensor, leading: torch.Size) -> Tensor:
    """y (M, N) as (..., N), its memory; no view to autograd: pipelines detach a stage's output in place."""
    return y if len(leading) == 1 else _unsafe_view(y, [*leading, y.shape[1]])


def _check_given(function: str, given: Given, weight: Weight, base_dtype: torch.dtype) -> None:
    """Raise ValueError unless gain and merged are what a call over this weight has made."""
    gain, merged = given.gain, given.merged
    if gain is not None:
        check_row(function, "gain", gain, weight)
        if gain.dtype != accumulate_dtype(base_dtype):
            raise ValueError(f"{function}: gain is {gain.dtype}; expected {accumulate_dtype(base_dtype)}")
    if merged is not None:
        check_tensor(function, "merged", merged, weight)
        if merged.shape != weight.shape or merged.dtype != base_dtype:
            raise ValueError(
                f"{function}: merged is {merged.dtype} {tuple(merged.shape)}; "
                f"expected {base_dtype} {tuple(weight.shape)}"
            )


def _check_low(function: str, low: Tensor, x: Tensor, lora_A: Tensor, dtype: torch.dtype, alone: bool) -> None:
    """Raise ValueError unless `low` can stand for x lora_A^T."""
    check_tensor(function, "low", low, lora_A, "lora_A")
    expected = (math.prod(x.shape[:-1]), lora_A.shape[0])
    if low.shape != expected or low.dtype != dtype:
        raise ValueError(f"{function}: low is {low.dtype} {tuple(low.shape)}; expected {dtype} {expected}")
    if not alone:
        raise ValueError(f"{function}: low is given with x_dropped or norm_grad; expected neither")


def check_dtypes(function: str, x: Tensor, weight: Weight) -> None:
    """Raise ValueError unless x and weight share a dtype, or are brought to one."""
    autocast = is_autocast(x.device.type)
    # a quantized weight is decoded to what is asked for, as its library's own layer does
    converted = autocast or isinstance(weight, QuantizedWeight)
    if x.dtype != weight.dtype and (not converted or torch.float64 in (x.dtype, weight.dtype)):
        raise ValueError(
            f"{function}: x is {x.dtype} but weight is {weight.dtype}; expected one dtype"
            + (": autocast leaves float64 alone" if autocast else " outside autocast")
        )


def operand_dtypes(x: Weight, lora_A: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes in which x meets the weight and in which it meets the adapters: autocast's, else their own.

    As nn.Linear's: autocast leaves float64 alone, and adapters wider than x widen their own products only.
    """
    # the type of a device is a new string each time: 0.2 us
    autocast = torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()
    if autocast and is_autocast(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        return dtype, dtype
    dtype, adapter_dtype = x.dtype, lora_A.dtype
    return dtype, dtype if dtype == adapter_dtype else torch.promote_types(dtype, adapter_dtype)
