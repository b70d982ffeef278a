"""Readers of other libraries' quantized weights, by the class of the weight or of the layer.

Each returns a QuantizedWeight, or raises ValueError. No library is imported: its tensors are recognized by the name of
their class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dora_kernels.quant.bitsandbytes_cpu import flat_scales, is_packed_for_cpu, unpacked
from dora_kernels.quant.formats import DENSE, QuantizedWeight, Weight
from dora_kernels.quant.parts import PAIR


def read(source: nn.Module | Tensor) -> QuantizedWeight:
    """The quantized weight of a linear layer, or of the library's own weight tensor.

    Raises ValueError, with the reason, for anything but a quantized weight (N, K) in a known format.
    """
    stored: Any = source
    reader = _reader(stored)
    if reader is None and isinstance(stored, nn.Module):
        stored = _weight_of(stored)
        reader = _reader(stored)
    if reader is None:
        raise ValueError(f"read: the weight is a {_class_name(stored)}; expected one of {', '.join(_NAMES)}")
    try:
        return reader(stored)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:  # a file may lack anything
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"read: the {_class_name(stored)} is not as its library builds it: {reason}") from error


def read_or_reason(source: nn.Module | Tensor) -> tuple[QuantizedWeight | None, str | None]:
    """(weight, None), or (None, the reason) if it cannot be read."""
    try:
        return read(source), None
    except ValueError as error:
        return None, str(error).removeprefix("read: ")


def is_quantized(source: nn.Module | Tensor) -> bool:
    """True if `read` knows the class of `source`; it may still refuse it."""
    return _reader(source) is not None or _reader(getattr(source, "weight", None)) is not None


def _weight_of(layer: nn.Module) -> Any:
    """layer.weight or None, past nn.Module.__getattr__ where nothing is traced: it takes 0.4 us."""
    if not torch.compiler.is_compiling() and "weight" in layer._parameters:
        return layer._parameters["weight"]
    return getattr(layer, "weight", None)


def _bitsandbytes4(weight: Any) -> QuantizedWeight:
    state = weight.quant_state
    if state is None:
        raise ValueError("read: the bitsandbytes weight is not quantized yet; expected .to(device) first")
    if len(state.shape) != 2:
        raise ValueError(f"read: the bitsandbytes weight has shape {tuple(state.shape)}; expected (N, K)")
    N, K = state.shape
    if is_packed_for_cpu(weight):
        packed, dtype = unpacked(weight.data, N, K), state.original_dtype
    else:
        packed, dtype = _bytes(weight), state.dtype
    absmax = flat_scales(state)
    tensors: tuple[Tensor, ...] = (packed, absmax, state.code)
    nested_blocksize = 0
    if state.nested:
        nested_blocksize = state.state2.blocksize
        tensors += (state.state2.absmax, state.state2.code, state.offset)
    return QuantizedWeight("codebook4", (N, K), dtype, tensors, (state.blocksize, nested_blocksize))


def _bitsandbytes8(layer: Any) -> QuantizedWeight:
    """A Linear8bitLt, whose scales move from the weight to the layer's state in its first call; or its weight alone.

    The scale is the one in bitsandbytes' own products with a decoded weight. Its int8_vectorwise_dequant multiplies
    in another order, and is an ulp of float32 away.
    """
    is_layer = isinstance(layer, nn.Module)
    weight, state = layer.weight if is_layer else layer, layer.state if is_layer else None
    if weight.has_fp16_weights:
        raise ValueError("read: the bitsandbytes layer has has_fp16_weights=True; expected a weight stored as int8")
    absmax = weight.SCB if weight.SCB is not None else getattr(state, "SCB", None)
    if weight.dtype != torch.int8 or absmax is None:
        raise ValueError("read: the bitsandbytes weight is not quantized yet; expected .to(device) first")
    scale = _made_of(absmax, absmax.float().flatten() * (1.0 / 127.0))
    return QuantizedWeight("row8", tuple(weight.shape), torch.float32, (_plain(weight), scale))


def _torchao_int8(weight: Any) -> QuantizedWeight:
    if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:
        raise ValueError("read: the torchao weight has its layer quantize or scale x too; expected weight-only")
    zero_point = weight.zero_point
    compiling = torch.compiler.is_compiling()  # a graph cannot ask what a number is; whoever compiles has read before
    if zero_point is not None and not compiling and _once(zero_point, lambda: bool(zero_point.any())):
        raise ValueError("read: the torchao weight has zero points; expected symmetric quantization")
    return _torchao_rows(weight)


def _torchao_float8(weight: Any) -> QuantizedWeight:
    if weight.act_quant_kwargs is not None:
        raise ValueError("read: the torchao weight has its layer quantize x too; expected weight-only")
    return _torchao_rows(weight)


def _torchao_rows(weight: Any) -> QuantizedWeight:
    """One scale a row, or one for all the rows."""
    q, scale = weight.qdata, weight.scale
    if q.dim() != 2 or q.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(
            f"read: the torchao weight is {q.dtype} {tuple(q.shape)}; expected int8 or float8_e4m3fn (N, K)"
        )
    if scale.numel() != 1 and (scale.dim() == 0 or scale.numel() != q.shape[0] or scale.shape[0] != q.shape[0]):
        raise ValueError(
            f"read: the torchao weight has scales {tuple(scale.shape)}; expected one for each of {q.shape[0]} rows"
        )
    return QuantizedWeight(
        "row8", tuple(q.shape), weight.dtype, (q, _made_of(scale, scale.float().flatten().expand(q.shape[0])))
    )


def _torchao_nf4(weight: Any) -> QuantizedWeight:
    tensors = (
        weight.quantized_data,
        weight.quantized_scalers,
        weight.quantization_factor,
        weight.scaler_mean,
        weight.nf4,
    )
    if weight.dim() != 2 or weight.dtype not in PAIR:
        raise ValueError(
            f"read: the torchao weight is {weight.dtype} {tuple(weight.shape)}; expected 16 or 32 bits, (N, K)"
        )
    return QuantizedWeight(
        "nf4_torchao", tuple(weight.shape), weight.dtype, tensors, (weight.block_size, weight.scaler_block_size)
    )


def _hqq(layer: Any) -> QuantizedWeight:
    if not layer.ready or layer.meta is None:
        raise ValueError("read: the HQQ layer is not quantized yet")
    meta = layer.meta
    if meta["packing"] != "4bit_u8" or not meta["group_size"]:
        raise ValueError(f"read: the HQQ layer is packed as {meta['packing']}; expected 4bit_u8 in groups")
    if meta.get("quant_zero") or meta.get("quant_scale") or "zero" not in meta or "scale" not in meta:
        raise ValueError("read: the HQQ layer has quantized scales or zeros; expected plain ones")
    packed, scale, zero = (_differentiable(tensor) for tensor in (layer.W_q, meta["scale"], meta["zero"]))
    # of a layer that was quantized where gradients were on
    scale, zero = (tensor.detach() if tensor.requires_grad else tensor for tensor in (scale, zero))
    compute_dtype = meta.get("compute_dtype", torch.float16)
    dtype = torch.promote_types(torch.promote_types(compute_dtype, scale.dtype), zero.dtype)
    tensors = (_bytes(packed), scale.flatten(), zero.flatten())
    return QuantizedWeight("hqq4", tuple(meta["shape"]), dtype, tensors, (meta["group_size"], meta["axis"]))


_READERS = {
    ("bitsandbytes", "Params4bit"): _bitsandbytes4,
    ("bitsandbytes", "Linear8bitLt"): _bitsandbytes8,
    ("bitsandbytes", "Int8Params"): _bitsandbytes8,
    ("torchao", "Int8Tensor"): _torchao_int8,
    ("torchao", "Float8Tensor"): _torchao_float8,
    ("torchao", "NF4Tensor"): _torchao_nf4,
    ("hqq", "HQQLinear"): _hqq,
}
_NAMES = tuple(".".join(names) for names in _READERS)


def _reader(source: object) -> Callable[[Any], QuantizedWeight] | None:
    cls = type(source)
    if cls is nn.Parameter or cls is Tensor:  # of which Dynamo, under a strict export, cannot take the name apart
        return None
    return _READERS.get((cls.__module__.partition(".")[0], cls.__name__))


def _class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


# library's tensor -> its version when it was checked, and the result of the check
_computed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _once(tensor: Tensor, compute: Callable[[], Any]) -> Any:
    """compute(), cached until `tensor` is seen to change: a check in every call must not wait for the device.

    For checks only: a number that goes into a result must never be cached like this.
    """
    if torch.compiler.is_compiling():
        return compute()
    version, value = _computed.get(tensor, (None, None))
    if version != tensor._version:
        value = compute()
        _computed[tensor] = tensor._version, value
    return value


def _made_of(source: Tensor, made: Tensor) -> Tensor:
    """`made`, marked as computed from `source`. Readers compute it in each call: the library may write to `source`."""
    if made is not source and not torch.compiler.is_compiling():
        made.dora_source = source  # type: ignore[attr-defined]
    return made


def sources(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The library's own tensors behind those of a weight: it changes whenever one of these does."""
    return [getattr(tensor, "dora_source", tensor) for tensor in tensors]


def origin_of(weight: Weight) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
    """The tensors that a weight is read from, its library's own, and all else that its numbers depend on."""
    if isinstance(weight, QuantizedWeight):
        return tuple(sources(weight.tensors)), (weight.format, weight.numbers, weight.dtype)
    return (weight,), (DENSE, weight.dtype)


def _differentiable(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of one made in inference mode, as HQQ makes them: autograd refuses to save such a tensor."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor


def _plain(tensor: Tensor) -> Tensor:
    """A view as a plain torch.Tensor, without the subclass's __torch_function__."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.view(tensor.shape)


def _bytes(tensor: Tensor) -> Tensor:
    """The storage of a packed weight, which may be declared as any dtype (quant_storage), as flat uint8."""
    with torch._C.DisableTorchFunctionSubclass():
        return (tensor if tensor.dtype == torch.uint8 else tensor.view(torch.uint8)).view(-1)
