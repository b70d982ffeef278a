"""torch.library: one opaque operator per pass, so that torch.compile sees shapes and dtypes and nothing else.

The backend and the way are taken inside the operator: every choice returns the same tensors, so that nothing
recompiles when the number of tokens changes. Autograd is in functional/autograd.py, which calls what is behind an
operator, and not the operator, where nobody looks on (functional/signature.py).

An operator takes no NamedTuple: `flatten_forward` and `flatten_backward` take those of types.py apart into the
arguments of a schema, and `unflatten_...` puts them together again inside. A weight is four arguments, those of
`quant.flatten_weight`; its N and K are those of lora_B and lora_A.
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from dora_kernels import passes
from dora_kernels.planning import devices
from dora_kernels.pytorch import PYTORCH
from dora_kernels.quant import Weight, flatten_weight, unflatten_weight
from dora_kernels.reference import accumulate_dtype
from dora_kernels.types import Call, DoraWeight, Epilogue, Forward, Given, Gradients, How, Needs, Saved, Steps

# (operator, backend) -> how often it ran in this process; tests and the demo read it to know what really ran
calls: collections.Counter[tuple[str, str]] = collections.Counter()


_library = torch.library.Library("dora_kernels", "DEF")

_Run = TypeVar("_Run", bound=Callable[..., Any])

OPERATORS: dict[str, Callable[..., Any]] = {}
"""The function behind each operator, by its name."""


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[_Run], _Run]:
    """A decorator that makes a function the operator of this schema; its one overload takes the function's place.

    fake: from the same arguments to results without values. To mypy the overload is the function.
    """

    def operator(run: _Run) -> _Run:
        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dora_kernels::{name}", fake, lib=_library)
        OPERATORS[name] = run
        overload: _Run = getattr(torch.ops.dora_kernels, name).default
        return overload

    return operator


@functools.cache  # an import statement takes 1 us each time
def _kernels() -> Any:
    from dora_kernels import kernels  # needs triton

    return kernels


def _steps(operator: str, requested: str, first: Weight, *others: Weight | None) -> Steps:
    """The steps of the backend that takes the operands; counts the call."""
    dtypes = [operand.dtype for operand in others if operand is not None]
    backend = devices.backend_for(requested, first.device, first.dtype, *dtypes)
    calls[operator, backend] += 1
    if backend == "reference":
        return PYTORCH
    kernels: Steps = _kernels().KERNELS
    return kernels


def is_autocast(device_type: str) -> bool:
    """True if autocast is on for a device; meta has none, and asking is an error there.

    So it is on lazy, vulkan and mkldnn, where this raises torch's RuntimeError: no layer is run there.
    torch.amp.is_autocast_available would ask more generally, and breaks the graph of torch.compile in torch 2.11.
    """
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """torch.autocast off, inside; also on meta, where torch has none to turn off."""
    return torch.autocast(device_type, enabled=False) if is_autocast(device_type) else contextlib.nullcontext()


_ALREADY_PLAIN = contextlib.nullcontext()


class _AutocastOff:
    """torch.autocast(device_type, enabled=False) where it is on: 0.7 us, and in a stack, beside no_grad, 5."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.device_type, False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled(self.device_type, True)


def plain_mode(operand: Weight) -> contextlib.AbstractContextManager[object]:
    """Inside: no autograd, no autocast, the operand's device current. functional/ has handled all three.

    Autocast would still convert the operands; kernels launch on the current device, and a model may be on several.
    """
    device = operand.device
    kind = device.type  # a new string each time
    autocast = torch._C._is_any_autocast_enabled() and is_autocast(kind)
    elsewhere = kind == "cuda" and device.index != torch.cuda.current_device()
    if not (torch.is_grad_enabled() or elsewhere):
        return _AutocastOff(kind) if autocast else _ALREADY_PLAIN
    stack = contextlib.ExitStack()
    stack.enter_context(torch.no_grad())
    if autocast:
        stack.enter_context(torch.autocast(kind, enabled=False))
    if elsewhere:
        stack.enter_context(torch.cuda.device(device))
    return stack


def _or_empty(like: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """An empty tensor for each None: the results of an operator cannot be None."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def _empty(
    like: Tensor, needs: Sequence[bool], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]
) -> tuple[Tensor, ...]:
    """New tensors of these shapes and dtypes, without elements where not needed."""
    sizes = zip(needs, shapes, dtypes, strict=True)
    return tuple(
        like.new_empty(shape if needed else 0, dtype=dtype if needed else None) for needed, shape, dtype in sizes
    )


def flatten_forward(call: Call) -> tuple[Any, ...]:
    """The positional arguments of `forward`; given.low goes by its name, and given.merged to `backward`."""
    layer, given, how = call.layer, call.given, call.how
    return (
        call.x, call.x_dropped, *flatten_weight(layer.weight), layer.lora_A, layer.lora_B, layer.magnitude, call.bias,
        given.norm, given.gain, layer.scaling, how.dtype, how.way, how.save, how.save_low, how.exact, how.backend,
    )  # fmt: skip


def unflatten_forward(
    x: Tensor, x_dropped: Tensor | None, weight: list[Tensor], weight_format: str, weight_numbers: list[int],
    weight_dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, bias: Tensor | None,
    norm: Tensor | None, gain: Tensor | None, scaling: float, dtype: torch.dtype, way: str, keep: str, keep_low: bool,
    exact: bool, backend: str, *, given_low: Tensor | None = None,
) -> Call:  # fmt: skip
    """The call of which these are the arguments."""
    whole = _whole(weight, weight_format, weight_numbers, weight_dtype, lora_A, lora_B)
    layer = DoraWeight(whole, lora_A, lora_B, magnitude, scaling)
    how = How(x.dtype, dtype, way, save=keep, backend=backend, save_low=keep_low, exact=exact)
    return Call(x, x_dropped, layer, bias, Given(norm, gain, given_low), how)


def flatten_backward(dy: Tensor, saved: Saved, layer: DoraWeight, how: How, needs: Sequence[bool]) -> tuple[Any, ...]:
    """The arguments of `backward`."""
    return (
        dy, saved.x, *flatten_weight(layer.weight), layer.lora_A, layer.lora_B, saved.norm, saved.gain, saved.low,
        saved.intermediate, saved.merged, layer.scaling, how.dtype, how.way, how.save, how.dropped, how.norm_grad,
        list(needs), saved.magnitude_dtype, saved.bias_dtype, how.backend,
    )  # fmt: skip


def unflatten_backward(
    dy: Tensor, x: Tensor | None, weight: list[Tensor], weight_format: str, weight_numbers: list[int],
    weight_dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor, norm: Tensor, gain: Tensor, low: Tensor | None,
    kept: Tensor | None, merged: Tensor | None, scaling: float, dtype: torch.dtype, way: str, keep: str, dropped: bool,
    norm_grad: bool, needs: list[bool], magnitude_dtype: torch.dtype, bias_dtype: torch.dtype, backend: str,
) -> tuple[Tensor, Saved, DoraWeight, How, Needs]:  # fmt: skip
    """dy, what was saved, the layer without its magnitude, how, and the gradients needed."""
    whole = _whole(weight, weight_format, weight_numbers, weight_dtype, lora_A, lora_B)
    saved = Saved(x, norm, gain, low, kept, merged, magnitude_dtype, bias_dtype)
    layer = DoraWeight(whole, lora_A, lora_B, None, scaling)  # type: ignore[arg-type]  # the direction alone
    how = How(dy.dtype, dtype, way, save=keep, backend=backend, dropped=dropped, norm_grad=norm_grad)
    return dy, saved, layer, how, Needs(*needs)


def _whole(
    weight: list[Tensor], weight_format: str, weight_numbers: list[int], weight_dtype: torch.dtype, lora_A: Tensor,
    lora_B: Tensor,
) -> Weight:  # fmt: skip
    return unflatten_weight(weight, weight_format, weight_numbers, weight_dtype, (lora_B.shape[0], lora_A.shape[1]))


def run_forward(call: Call) -> Forward:
    """The results of a forward pass by the steps of its backend: of the operator `forward`, with None where it has an
    empty tensor."""
    layer, given = call.layer, call.given
    steps = _steps("forward", call.how.backend, call.x, call.x_dropped, *layer[:4], call.bias, *given)
    with plain_mode(call.x):
        return passes.forward(steps, call)


def run_backward(dy: Tensor, saved: Saved, layer: DoraWeight, how: How, needs: Needs) -> Gradients:
    """The results of a backward pass: of the operator `backward`, as `run_forward`."""
    tensors = (saved.x, *layer[:3], saved.norm, saved.gain, saved.low, saved.intermediate, saved.merged)
    steps = _steps("backward", how.backend, dy, *tensors)
    with plain_mode(dy):
        return passes.backward(steps, dy, saved, layer, how, needs)


def _forward_fake(*flat: Any, **given_low: Any) -> tuple[Tensor, ...]:
    x, _, layer, _, given, how = unflatten_forward(*flat, **given_low)
    (M, _), (N, R), accumulate = x.shape, layer.lora_B.shape, accumulate_dtype(x.dtype)
    made = (True, given.norm is None, given.gain is None, how.save_low and given.low is None, bool(how.save))
    dtypes = (x.dtype, accumulate, accumulate, how.dtype, accumulate if how.exact else x.dtype)
    return _empty(x, made, ((M, N), (N,), (N,), (M, R), (M, N)), dtypes)


@_operator(
    "forward(Tensor x, Tensor? x_dropped, Tensor[] weight, str weight_format, int[] weight_numbers, "
    "ScalarType weight_dtype, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor? bias, Tensor? norm, "
    "Tensor? gain, float scaling, ScalarType dtype, str way, str keep, bool keep_low, bool exact, str backend, *, "
    "Tensor? given_low=None)"
    " -> (Tensor y, Tensor norm, Tensor gain, Tensor low, Tensor kept)",
    fake=_forward_fake,
)
def forward(*flat: Any, **given_low: Any) -> tuple[Tensor, ...]:
    call = unflatten_forward(*flat, **given_low)
    return _or_empty(call.x, run_forward(call))


def _backward_fake(*flat: Any) -> tuple[Tensor, ...]:
    dy, saved, layer, how, needs = unflatten_backward(*flat)
    (M, N), (R, K), A_dtype, B_dtype = dy.shape, layer.lora_A.shape, layer.lora_A.dtype, layer.lora_B.dtype
    dtypes = (dy.dtype, dy.dtype, A_dtype, B_dtype, saved.magnitude_dtype, saved.bias_dtype, how.dtype)
    return _empty(dy, needs, ((M, K), (M, K), (R, K), (N, R), (N,), (N,), (M, R)), dtypes)


@_operator(
    "backward(Tensor dy, Tensor? x, Tensor[] weight, str weight_format, int[] weight_numbers, "
    "ScalarType weight_dtype, Tensor lora_A, Tensor lora_B, Tensor norm, Tensor gain, Tensor? low, Tensor? kept, "
    "Tensor? merged, float scaling, ScalarType dtype, str way, str keep, bool dropped, bool norm_grad, bool[] needs, "
    "ScalarType magnitude_dtype, ScalarType bias_dtype, str backend)"
    " -> (Tensor dx, Tensor dx_dropped, Tensor dA, Tensor dB, Tensor dmagnitude, Tensor dbias, Tensor dlow)",
    fake=_backward_fake,
)
def backward(*flat: Any) -> tuple[Tensor, ...]:
    dy, saved, layer, how, needs = unflatten_backward(*flat)
    return _or_empty(dy, run_backward(dy, saved, layer, how, needs))


@_operator(
    "norm(Tensor[] weight, str weight_format, int[] weight_numbers, ScalarType weight_dtype, Tensor lora_A, "
    "Tensor lora_B, float scaling, ScalarType dtype, str backend) -> Tensor",
    fake=lambda weight, weight_format, weight_numbers, weight_dtype, lora_A, lora_B, *_: lora_B.new_empty(
        lora_B.shape[:1], dtype=accumulate_dtype(weight_dtype)
    ),
)
def norm(
    weight: list[Tensor], weight_format: str, weight_numbers: list[int], weight_dtype: torch.dtype, lora_A: Tensor,
    lora_B: Tensor, scaling: float, dtype: torch.dtype, backend: str,
) -> Tensor:  # fmt: skip
    whole = _whole(weight, weight_format, weight_numbers, weight_dtype, lora_A, lora_B)
    steps = _steps("norm", backend, whole, lora_A, lora_B)
    with plain_mode(whole):
        return steps.norm(whole, lora_A.to(dtype), lora_B.to(dtype), scaling)[0]


@_operator(
    "merge(Tensor[] weight, str weight_format, int[] weight_numbers, ScalarType weight_dtype, Tensor lora_A, "
    "Tensor lora_B, Tensor gain, float scaling, ScalarType dtype, str backend) -> Tensor",
    fake=lambda weight, weight_format, weight_numbers, weight_dtype, lora_A, lora_B, *_: lora_B.new_empty(
        (lora_B.shape[0], lora_A.shape[1]), dtype=weight_dtype
    ),
)
def merge(
    weight: list[Tensor], weight_format: str, weight_numbers: list[int], weight_dtype: torch.dtype, lora_A: Tensor,
    lora_B: Tensor, gain: Tensor, scaling: float, dtype: torch.dtype, backend: str,
) -> Tensor:  # fmt: skip
    whole = _whole(weight, weight_format, weight_numbers, weight_dtype, lora_A, lora_B)
    steps = _steps("merge", backend, whole, lora_A, lora_B)
    with plain_mode(whole):
        return steps.merge(whole, lora_A.to(dtype), lora_B.to(dtype), gain, scaling)


@_operator(
    "norm_backward(Tensor dnorm, Tensor[] weight, str weight_format, int[] weight_numbers, ScalarType weight_dtype, "
    "Tensor lora_A, Tensor lora_B, Tensor norm, float scaling, ScalarType dtype, bool[] needs, str backend)"
    " -> (Tensor dA, Tensor dB)",
    fake=lambda dnorm, weight, weight_format, numbers, weight_dtype, lora_A, lora_B, norm, scaling, dtype, needs, _: (
        _empty(dnorm, needs, (lora_A.shape, lora_B.shape), (lora_A.dtype, lora_B.dtype))
    ),
)
def norm_backward(
    dnorm: Tensor, weight: list[Tensor], weight_format: str, weight_numbers: list[int], weight_dtype: torch.dtype,
    lora_A: Tensor, lora_B: Tensor, norm: Tensor, scaling: float, dtype: torch.dtype, needs: list[bool], backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    whole = _whole(weight, weight_format, weight_numbers, weight_dtype, lora_A, lora_B)
    layer = DoraWeight(whole, lora_A, lora_B, None, scaling)  # type: ignore[arg-type]  # the direction alone
    steps = _steps("norm_backward", backend, *layer[:3])
    with plain_mode(whole):
        return _or_empty(dnorm, passes.norm_backward(steps, dnorm, norm, layer, dtype, needs))


def _grouped_norm_fake(weights: list[Tensor], *_: Any) -> tuple[Tensor, ...]:
    total, accumulate = sum(weight.shape[0] for weight in weights), accumulate_dtype(weights[0].dtype)
    return tuple(weights[0].new_empty(total, dtype=accumulate) for _ in range(2))


@_operator(
    "grouped_norm(Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, Tensor[] magnitudes, float[] scalings, "
    "ScalarType dtype, str backend) -> (Tensor norm, Tensor gain)",
    fake=_grouped_norm_fake,
)
def grouped_norm(
    weights: list[Tensor], lora_As: list[Tensor], lora_Bs: list[Tensor], magnitudes: list[Tensor],
    scalings: list[float], dtype: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    steps = _steps("grouped_norm", backend, weights[0], lora_As[0], magnitudes[0])
    with plain_mode(weights[0]):
        lora_As, lora_Bs = ([tensor.to(dtype) for tensor in tensors] for tensors in (lora_As, lora_Bs))
        return steps.grouped_norm(weights, lora_As, lora_Bs, magnitudes, scalings)


@_operator(
    "rescale(Tensor base, Tensor low, Tensor lora_B, Tensor gain, Tensor? bias, Tensor? residual, float scaling, "
    "str backend) -> Tensor",
    fake=lambda base, *_: base.new_empty(base.shape),
)
def rescale(
    base: Tensor, low: Tensor, lora_B: Tensor, gain: Tensor, bias: Tensor | None, residual: Tensor | None,
    scaling: float, backend: str,
) -> Tensor:  # fmt: skip
    steps = _steps("rescale", backend, base, low, lora_B)
    with plain_mode(base):
        return steps.epilogue(base, low, lora_B.to(low.dtype), gain, bias, scaling, base.dtype, residual)


@_operator(
    "rescale_backward(Tensor dy, Tensor? base, Tensor low, Tensor lora_B, Tensor gain, float scaling, "
    "bool residual, bool[] needs, ScalarType bias_dtype, str backend) "
    "-> (Tensor dbase, Tensor dlow, Tensor dB, Tensor dgain, Tensor dbias)",
    fake=lambda dy, base, low, lora_B, gain, scaling, residual, needs, bias_dtype, backend: _empty(
        dy,
        needs,
        (dy.shape, low.shape, lora_B.shape, gain.shape, gain.shape),
        (dy.dtype, low.dtype, lora_B.dtype, gain.dtype, bias_dtype),
    ),
)
def rescale_backward(
    dy: Tensor, base: Tensor | None, low: Tensor, lora_B: Tensor, gain: Tensor, scaling: float, residual: bool,
    needs: list[bool], bias_dtype: torch.dtype, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    steps = _steps("rescale_backward", backend, dy, low, lora_B)
    operands = Epilogue(base, low, lora_B, gain, scaling)
    with plain_mode(dy):
        return _or_empty(dy, passes.rescale_backward(steps, dy, operands, residual, needs, bias_dtype))


@_operator(
    "bank_epilogue(Tensor base, Tensor low, Tensor lora_B, Tensor gain, Tensor scaling, Tensor? bias, Tensor index, "
    "str backend) -> Tensor",
    fake=lambda base, *_: base.new_empty(base.shape),
)
def bank_epilogue(
    base: Tensor, low: Tensor, lora_B: Tensor, gain: Tensor, scaling: Tensor, bias: Tensor | None, index: Tensor,
    backend: str,
) -> Tensor:  # fmt: skip
    steps = _steps("bank_epilogue", backend, base, low, lora_B)
    with plain_mode(base):
        return steps.bank_epilogue(base, low, lora_B, gain, scaling, bias, index)


@_operator(
    "shared_low(Tensor x, Tensor[] lora_As, ScalarType dtype, str backend) -> Tensor",
    fake=lambda x, lora_As, dtype, backend: x.new_empty((x.shape[0], sum(A.shape[0] for A in lora_As)), dtype=dtype),
)
def shared_low(x: Tensor, lora_As: list[Tensor], dtype: torch.dtype, backend: str) -> Tensor:
    steps = _steps("shared_low", backend, x, *lora_As)
    with plain_mode(x):
        return passes.shared_low(steps, x, lora_As, dtype)


@_operator(
    "shared_low_backward(Tensor x, Tensor[] dlows, ScalarType dtype, str backend) -> Tensor[]",
    fake=lambda x, dlows, dtype, backend: [x.new_empty((dlow.shape[1], x.shape[1]), dtype=dtype) for dlow in dlows],
)
def shared_low_backward(x: Tensor, dlows: list[Tensor], dtype: torch.dtype, backend: str) -> list[Tensor]:
    steps = _steps("shared_low_backward", backend, x, *dlows)
    with plain_mode(x):
        return passes.shared_low_backward(steps, x, dlows, dtype)
