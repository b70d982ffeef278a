"""The public functions: validation, shape folding, dtypes under autocast, and autograd."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_kernels import launch, ops, plan
from dora_kernels.ops import is_autocast
from dora_kernels.quant import DENSE, QuantizedWeight, Weight, parts
from dora_kernels.reference import accumulate_dtype, gain_ref

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LARGEST = sys.float_info.max


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
    """The DoRA linear layer, differentiable once in everything but weight (DoRA, arXiv 2402.09353, equation 5).

        y = gain * (x weight^T + scaling * (x lora_A^T) lora_B^T) + bias
        gain = magnitude / norm,  norm_n = ||(weight + scaling * lora_B lora_A)_n||_2

    Shapes: x (..., K), weight (N, K) of any strides or a QuantizedWeight, frozen, lora_A (R, K), lora_B (N, R),
    magnitude (N,), bias (N,) -> y (..., N). A row whose norm is 0 has gain 0: its output is the bias, and its gradients
    are 0. So has a row whose norm float32 cannot hold: entries all below about 1e-23 or one above 1e19.

    Dtypes: x and weight share one (under autocast both are cast to autocast's; a quantised weight is decoded to x's),
    which y has too; the adapters and the magnitude may have another one, float32 over bfloat16 say. norm and gain are
    float32, float64 for float64.

    norm_grad: False holds the norm constant in the backward pass (section 4.3 of the paper, and what PEFT does);
    True is the exact gradient.

    Bits: the same call gives the same ones, in y and in every gradient. norm, gain and the merged weight do not see x,
    and the kernels make a row of y from that row of base and low alone, at every M; but base and low come from GEMMs,
    where the library or the split of a sum may round a row otherwise at another M. So y of one token in another batch
    is not promised to the bit. The numbers of the other tokens do not reach it, nor does a NaN or inf among them.

    NaN and inf come out where the formula says in IEEE arithmetic: a gain or scaling of 0 does not hide an inf (NaN).

    Raises ValueError, naming the argument, where shapes, dtypes, devices or scaling do not fit, and where weight
    requires a gradient. A second derivative, forward-mode AD and torch.func transforms raise torch's own errors.
    """
    return dora_linear_core(x, weight, lora_A, lora_B, magnitude, scaling, bias, norm_grad=norm_grad)[0]


def dora_linear_core(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    x_dropped: Tensor | None = None,
    norm: Tensor | None = None,
    gain: Tensor | None = None,
    norm_grad: bool = False,
    function: str = "dora_linear",
) -> tuple[Tensor, Tensor, Tensor]:
    """y, norm (N,) and gain (N,): `dora_linear` with what other libraries' layers and reuse.py need beside it.

    x_dropped: dropout(x), of x's shape. The adapter then sees x_dropped, and the base layer x (PEFT's meaning):
        y = x weight^T + (gain - 1) * x_dropped weight^T + gain * scaling * (x_dropped lora_A^T) lora_B^T + bias
    norm (N,): used in place of the row norms; a constant, so norm_grad cannot be asked for with it.
    gain (N,): magnitude / norm, given with norm or not at all.
    function: the name that error messages give.
    """
    scaling = _check_adapter(function, weight, lora_A, lora_B, scaling)
    _check_call(function, x, weight, magnitude, bias, x_dropped, norm)
    if not isinstance(norm_grad, bool):
        raise ValueError(f"{function}: norm_grad is {norm_grad!r}; expected True or False")
    if norm is not None and norm_grad:
        raise ValueError(
            f"{function}: norm_grad is True and norm is given; expected norm=None: a given norm is constant"
        )

    options = launch.current_options()
    exact = options.precision == "exact"
    base_dtype, dtype = operand_dtypes(x, lora_A)
    autocast = is_autocast(x.device.type)
    # a quantised weight is decoded to what is asked for, as its library's own layer does
    converted = autocast or isinstance(weight, QuantizedWeight)
    if x.dtype != weight.dtype and (not converted or torch.float64 in (x.dtype, weight.dtype)):
        raise ValueError(
            f"{function}: x is {x.dtype} but weight is {weight.dtype}; expected one dtype"
            + (": autocast leaves float64 alone" if autocast else " outside autocast")
        )

    grad = torch.is_grad_enabled()
    needs_A, needs_B = grad and lora_A.requires_grad, grad and lora_B.requires_grad
    needs_dot = (grad and magnitude.requires_grad) or (norm_grad and (needs_A or needs_B))
    keep = ""
    if needs_dot:
        must_split, wide = exact or x_dropped is not None, dtype != base_dtype
        keep = plan.kept_tensor(base_dtype, options.way, must_split=must_split, wide=wide)
    keep_low = needs_B or keep == "base"
    # the kernels read both without a stride
    norm = None if norm is None else norm.detach().to(accumulate_dtype(base_dtype)).contiguous()
    gain = None if gain is None else gain.contiguous()
    dropped = x_dropped is not None
    tensors, *storage = parts(weight)
    settings = _Settings(
        scaling, base_dtype, dtype, options.way, keep, keep_low, exact, norm_grad, dropped, options.backend, *storage
    )
    arguments = (x, x_dropped, lora_A, lora_B, magnitude, bias, norm, gain, settings, *tensors)
    y, norm, gain = _DoraLinear.apply(*arguments) if grad else _DoraLinear.forward(None, *arguments)
    # outside the Function: autograd refuses to modify in place a view that a Function has returned
    return y.view(*x.shape[:-1], weight.shape[0]), norm, gain


def operand_dtypes(x: Tensor, lora_A: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes in which x meets the weight and in which it meets the adapters: autocast's, else their own.

    As nn.Linear's: autocast leaves float64 alone, and adapters wider than x widen their own products only.
    """
    if is_autocast(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        return dtype, dtype
    return x.dtype, torch.promote_types(x.dtype, lora_A.dtype)


def weight_norm(weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """norm (N,) of dora_linear: the row norms of weight (N, K) + scaling * lora_B (N, R) @ lora_A (R, K).

    float32 (float64 for float64 weights), a constant for autograd. The adapters are taken in the dtype in which
    dora_linear would multiply them by an x of weight's dtype. Raises ValueError as dora_linear.
    """
    scaling = _check_adapter("weight_norm", weight, lora_A, lora_B, scaling)
    backend = launch.current_options().backend
    _, dtype = operand_dtypes(weight, lora_A)
    with torch.no_grad():
        return ops.norm(*parts(weight), lora_A, lora_B, scaling, dtype, backend)


def merge_weight(weight: Weight, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float) -> Tensor:
    """gain * (weight + scaling * lora_B @ lora_A), (N, K) in weight.dtype: the weight of an equivalent nn.Linear.

    Shapes and dtypes as dora_linear; rounded once; a constant for autograd. Raises ValueError as dora_linear.
    """
    return merge_weight_and_norm(weight, lora_A, lora_B, magnitude, scaling)[0]


def merge_weight_and_norm(
    weight: Weight, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`merge_weight`, with the norm (N,) and the gain (N,) that went into it."""
    scaling = _check_adapter("merge_weight", weight, lora_A, lora_B, scaling)
    _check_row("merge_weight", "magnitude", magnitude, weight)
    backend = launch.current_options().backend
    _, dtype = operand_dtypes(weight, lora_A)
    with torch.no_grad():
        stored = parts(weight)
        norm = ops.norm(*stored, lora_A, lora_B, scaling, dtype, backend)
        gain = gain_ref(magnitude, norm)
        return ops.merge(*stored, lora_A, lora_B, gain, scaling, dtype, backend), norm, gain


class _Settings(NamedTuple):
    """What a call has settled beside its tensors; passes.py says what each is."""

    scaling: float
    base_dtype: torch.dtype
    dtype: torch.dtype
    way: str
    keep: str
    keep_low: bool
    exact: bool
    norm_grad: bool
    dropped: bool
    backend: str
    weight_format: str
    weight_numbers: list[int]
    weight_dtype: torch.dtype

    def weight(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], str, list[int], torch.dtype]:
        """The weight's arguments of an operator; a dense one in the dtype of the base GEMM."""
        if self.weight_format == DENSE:
            return parts(tensors[0].to(self.base_dtype))
        return list(tensors), self.weight_format, self.weight_numbers, self.weight_dtype


class _DoraLinear(torch.autograd.Function):
    """Folds the leading dimensions, settles dtypes, and calls the operators of ops.py."""

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
        settings: _Settings,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        base_dtype = settings.base_dtype
        rows = (x.shape[:-1].numel(), lora_A.shape[1])
        x_rows = x.reshape(rows).to(base_dtype)
        # not rounded to a narrower weight's dtype: the low-rank products see it as the adapter does
        dropped_rows = None if x_dropped is None else x_dropped.reshape(rows).to(settings.dtype)
        y, new_norm, new_gain, low, kept = ops.forward(
            x_rows,
            dropped_rows,
            *settings.weight(tensors),
            lora_A,
            lora_B,
            magnitude,
            None if bias is None else bias.to(base_dtype),
            norm,
            gain,
            settings.scaling,
            settings.dtype,
            settings.way,
            settings.keep,
            settings.keep_low,
            settings.exact,
            settings.backend,
        )
        norm = new_norm if norm is None else norm
        gain = new_gain if gain is None else gain
        if ctx is not None:
            adapter_rows = x_rows if dropped_rows is None else dropped_rows
            ctx.save_for_backward(
                adapter_rows if lora_A.requires_grad else None,
                lora_A,
                lora_B,
                norm,
                gain,
                low if settings.keep_low else None,
                kept if settings.keep else None,
                *tensors,
            )
            ctx.mark_non_differentiable(norm, gain)
            ctx.settings = settings
            ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
            ctx.dropped_dtype = x.dtype if x_dropped is None else x_dropped.dtype
            ctx.magnitude_dtype = magnitude.dtype
            ctx.bias_dtype = magnitude.dtype if bias is None else bias.dtype
        return y, norm, gain

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, norm, gain, low, kept, *tensors = ctx.saved_tensors
        settings = ctx.settings
        needs_x, needs_dropped, needs_A, needs_B, needs_magnitude, needs_bias, *constants = ctx.needs_input_grad
        needs = [needs_x, needs_dropped, needs_A, needs_B, needs_magnitude, needs_bias]
        gradients = ops.backward(
            dy,
            x,
            *settings.weight(tensors),
            lora_A,
            lora_B,
            norm,
            gain,
            low,
            kept,
            settings.scaling,
            settings.dtype,
            settings.way,
            settings.keep,
            settings.dropped,
            settings.norm_grad,
            needs,
            ctx.magnitude_dtype,
            ctx.bias_dtype,
            settings.backend,
        )
        dx, dx_dropped, dA, dB, dmagnitude, dbias = (
            gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
        )
        if dx is not None:
            dx = dx.view(ctx.x_shape).to(ctx.x_dtype)
        if dx_dropped is not None:
            dx_dropped = dx_dropped.view(ctx.x_shape).to(ctx.dropped_dtype)
        return dx, dx_dropped, dA, dB, dmagnitude, dbias, *(None for _ in constants)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _check_adapter(function: str, weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> float:
    """Raise ValueError unless weight, lora_A, lora_B and scaling fit each other; scaling as a float."""
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(tensor, QuantizedWeight):
            _check_tensor(function, name, tensor, weight)
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
    # a comparison and not math.isfinite, which torch.compile cannot trace for a scaling that changes
    number = isinstance(scaling, (int, float)) and not isinstance(scaling, bool)
    if not number or not -_LARGEST <= scaling <= _LARGEST:
        raise ValueError(f"{function}: scaling is {scaling!r}; expected a finite Python number")
    return float(scaling)


def _check_call(
    function: str,
    x: Tensor,
    weight: Weight,
    magnitude: Tensor,
    bias: Tensor | None,
    x_dropped: Tensor | None,
    norm: Tensor | None,
) -> None:
    """Raise ValueError unless what surrounds the adapter fits weight (N, K)."""
    K = weight.shape[1]
    _check_tensor(function, "x", x, weight)
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(
            f"{function}: x has shape {_shape(x)} but weight has shape {_shape(weight)}; "
            f"expected x (..., K) with K = {K}"
        )
    if x_dropped is not None:
        _check_tensor(function, "x_dropped", x_dropped, weight)
        if x_dropped.shape != x.shape:
            raise ValueError(
                f"{function}: x_dropped has shape {_shape(x_dropped)} but x has shape {_shape(x)}; expected one shape"
            )
    _check_row(function, "magnitude", magnitude, weight)
    if bias is not None:
        _check_row(function, "bias", bias, weight)
    if norm is not None:
        _check_row(function, "norm", norm, weight)


def _check_row(function: str, name: str, tensor: Tensor, weight: Weight) -> None:
    """Raise ValueError unless `tensor` has one number per output row of weight."""
    _check_tensor(function, name, tensor, weight)
    if tensor.dim() != 1 or tensor.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{function}: {name} has shape {_shape(tensor)} but weight has shape {_shape(weight)}; "
            f"expected {name} (N,) with N = {weight.shape[0]}"
        )


def _check_tensor(function: str, name: str, tensor: Tensor, weight: Weight) -> None:
    """Raise ValueError unless `tensor` is a dense floating-point tensor on weight's device."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{function}: {name} is {type(tensor).__name__}; expected a torch.Tensor")
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise ValueError(f"{function}: {name} is {layout}; expected a dense tensor (torch.strided)")
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{function}: {name} is {tensor.dtype}; expected one of float64, float32, bfloat16, float16")
    if isinstance(weight, (Tensor, QuantizedWeight)) and tensor.device != weight.device:
        raise ValueError(
            f"{function}: {name} is on {tensor.device} but weight is on {weight.device}; expected one device"
        )
