"""Quantised weights: what each library stores, as one container, and the plain-PyTorch meaning of each format.

`read` takes a layer or a weight of bitsandbytes, torchao or HQQ. None of them is imported: a tensor of theirs is known
by the name of its class. `QuantizedWeight.dequantize` is the specification of the formats, and the CPU path.

Letters: N out features, K in features; e = n * K + k is the index of an element in the flat row-major weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

# A block of rows is decoded at once: on a CPU one that stays in the cache, on a GPU one that is worth its launches. The
# temporaries of a block are some four times as large as its result in bfloat16.
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "gpu": 1 << 24}


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A frozen weight (N, K) as its library stores it. The tensors are the library's own, and not copies.

    format: a key of FORMATS, which says what `tensors` and `numbers` are and how they are decoded.
    dtype: to which the library rounds a decoded value, the dtype that nn.Linear would see.
    """

    format: str
    shape: tuple[int, int]
    dtype: torch.dtype
    tensors: tuple[Tensor, ...]
    numbers: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the packed weight is."""
        return self.tensors[0].device

    @property
    def requires_grad(self) -> bool:
        """False: a quantised weight is frozen."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of storage, scales and all."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def dim(self) -> int:
        """2, as Tensor.dim()."""
        return len(self.shape)

    def new_empty(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """As Tensor.new_empty."""
        return self.tensors[0].new_empty(shape, dtype=dtype or self.dtype)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.dequantize(rows)

    def dequantize(self, rows: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """weight[rows] (n, K), bit for bit what the library decodes, in `dtype` if given. rows: of step 1."""
        N, K = self.shape
        start, stop, step = (rows or slice(None)).indices(N)
        if step != 1:
            raise ValueError(f"dequantize: rows has step {step}; expected 1")
        decode, dtype = FORMATS[self.format], dtype or self.dtype
        step = max(1, _BLOCK_ELEMENTS["cpu" if self.device.type == "cpu" else "gpu"] // max(K, 1))
        if stop - start <= step:
            stop = max(start, stop)
            return decode(self, start * K, stop * K).view(stop - start, K).to(dtype)
        dense = self.new_empty((stop - start, K), dtype=dtype)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            dense[first - start : last - start] = decode(self, first * K, last * K).view(last - first, K)
        return dense


Weight = Tensor | QuantizedWeight
DENSE = "dense"
"""The format of a Tensor."""


def parts(weight: Weight) -> tuple[list[Tensor], str, list[int], torch.dtype]:
    """(tensors, format, numbers, dtype): a weight as an operator of ops.py takes it; `whole` is the way back."""
    if isinstance(weight, Tensor):
        return [weight], DENSE, [], weight.dtype
    return list(weight.tensors), weight.format, list(weight.numbers), weight.dtype


def whole(
    tensors: list[Tensor], weight_format: str, numbers: list[int], dtype: torch.dtype, shape: tuple[int, int]
) -> Weight:
    """The weight (N, K) of which `parts` were taken."""
    if weight_format == DENSE:
        return tensors[0]
    return QuantizedWeight(weight_format, shape, dtype, tuple(tensors), tuple(numbers))


# One function per format: the elements [first, last) of the flat weight, rounded to weight.dtype.


def _codebook4(weight: QuantizedWeight, first: int, last: int) -> Tensor:
    """bitsandbytes' NF4 and FP4: code[nibble e] * absmax[e // blocksize].

    tensors: packed uint8 (two elements a byte, the even one in the high nibble), absmax float32 (blocks,), code
    float32 (16,). Nested: absmax is uint8, and behind code come nested_absmax float32, nested_code float32 (256,) and
    offset float32 (): absmax[b] is then nested_code[absmax[b]] * nested_absmax[b // nested_blocksize] + offset.
    numbers: blocksize, nested_blocksize or 0. A block may reach over the end of a row.
    """
    packed, absmax, code, *nested = weight.tensors
    blocksize, nested_blocksize = weight.numbers
    block, last_block = first // blocksize, -(-last // blocksize)
    scale = absmax[block:last_block]
    if nested_blocksize:
        nested_absmax, nested_code, offset = nested
        outer = torch.arange(block, last_block, device=packed.device) // nested_blocksize
        scale = nested_code[scale.int()] * nested_absmax[outer] + offset
    return _decode_blocks(packed, code, scale, blocksize, first, last).to(weight.dtype)


def _nf4_torchao(weight: QuantizedWeight, first: int, last: int) -> Tensor:
    """torchao's NF4Tensor: lut[nibble e] * (scalers[b] / factor[b // scaler_block_size] + mean), b = e // block_size.

    tensors: packed uint8 (as codebook4), scalers int8 (blocks,), factor (blocks / scaler_block_size,), mean (), lut
    (16,). numbers: block_size, scaler_block_size. Every step is rounded to the tensors' dtype.
    """
    packed, scalers, factor, mean, lut = weight.tensors
    block_size, scaler_block_size = weight.numbers
    block, last_block = first // block_size, -(-last // block_size)
    outer = torch.arange(block, last_block, device=packed.device) // scaler_block_size
    scale = (scalers[block:last_block] / factor[outer]).to(weight.dtype) + mean
    return _decode_blocks(packed, lut, scale, block_size, first, last)


def _row8(weight: QuantizedWeight, first: int, last: int) -> Tensor:
    """int8 or float8 with one scale a row: q[n, k] * scale[n], in float32. tensors: q (N, K), scale float32 (N,)."""
    q, scale = weight.tensors
    K = weight.shape[1]
    rows = slice(first // K, last // K) if K else slice(0, 0)
    return (q[rows].float() * scale[rows, None]).to(weight.dtype).flatten()


def _hqq4(weight: QuantizedWeight, first: int, last: int) -> Tensor:
    """HQQ's 4 bits: (nibble - zero[g]) * scale[g], each step rounded to weight.dtype.

    tensors: packed uint8 (the first half of the elements in the high nibbles, the second half in the low ones), scale,
    zero (groups,). numbers: group_size, axis. The group of e is e // group_size along axis 1, and e modulo the number
    of groups along axis 0.
    """
    packed, scale, zero = weight.tensors
    group_size, axis = weight.numbers
    half = packed.numel()
    high, low = packed[first : min(last, half)] >> 4, packed[max(first - half, 0) : max(last - half, 0)] & 15
    e = torch.arange(first, last, device=packed.device)
    group = e // group_size if axis == 1 else e % scale.numel()
    values = torch.cat((high, low)).to(weight.dtype)
    return (values - zero[group].to(weight.dtype)) * scale[group].to(weight.dtype)


FORMATS: dict[str, Callable[[QuantizedWeight, int, int], Tensor]] = {
    "codebook4": _codebook4,
    "nf4_torchao": _nf4_torchao,
    "row8": _row8,
    "hqq4": _hqq4,
}
"""Every format, and what it means."""


_PAIR = {torch.float32: torch.int64, torch.bfloat16: torch.int32, torch.float16: torch.int32}


def _decode_blocks(packed: Tensor, code: Tensor, scale: Tensor, blocksize: int, first: int, last: int) -> Tensor:
    """code[nibble e] * scale[block of e] for e in [first, last); `scale` starts at the block of `first`.

    A block has an even number of elements, so that it starts with a byte.
    """
    start, stop = first // blocksize * blocksize, -(-last // blocksize) * blocksize
    nibbles = torch.arange(256, device=packed.device)
    # of each byte, as one number: looking up single numbers is ten times as fast as pairs
    pairs = torch.stack((code[nibbles >> 4], code[nibbles & 15]), 1).view(_PAIR[code.dtype]).view(-1)
    values = pairs.index_select(0, packed[start // 2 : stop // 2].int()).view(code.dtype)
    whole = values.numel() // blocksize
    values[: whole * blocksize].view(whole, blocksize).mul_(scale[:whole, None])
    values[whole * blocksize :] *= scale[whole:]  # the last block of the weight may be shorter: it has one scale
    return values[first - start : last - start]


# Readers, by the class of the weight or of the layer. Each returns a QuantizedWeight, or raises ValueError.


def read(source: nn.Module | Tensor) -> QuantizedWeight:
    """The quantised weight of a linear layer, or one given as the library's own tensor.

    Raises ValueError, with the reason, for what is not a quantised weight (N, K) in a known format.
    """
    reader = _reader(source)
    if reader is None and isinstance(source, nn.Module):
        weight = getattr(source, "weight", None)
        reader, source = _reader(weight), weight
    if reader is None:
        raise ValueError(f"read: the weight is a {_class_name(source)}; expected one of {', '.join(_NAMES)}")
    return reader(source)


def is_quantized(source: nn.Module | Tensor) -> bool:
    """Whether `source` is of a class that `read` knows, though it may still refuse it."""
    return _reader(source) is not None or _reader(getattr(source, "weight", None)) is not None


def _bitsandbytes4(weight: Any) -> QuantizedWeight:
    state = weight.quant_state
    if state is None:
        raise ValueError("read: the bitsandbytes weight is not quantised yet; expected .to(device) first")
    if len(state.shape) != 2:
        raise ValueError(f"read: the bitsandbytes weight has shape {tuple(state.shape)}; expected (N, K)")
    N, K = state.shape
    if is_packed_for_cpu(weight):
        packed, dtype = _unpacked(weight.data, N, K), state.original_dtype
    else:
        packed, dtype = _bytes(weight), state.dtype
    absmax = _flat_scales(state)
    if packed.numel() != (N * K + 1) // 2:
        raise ValueError(
            f"read: the bitsandbytes weight has {packed.numel()} bytes; expected {(N * K + 1) // 2} for {(N, K)}"
        )
    tensors, nested_blocksize = (packed, absmax, state.code), 0
    if state.nested:
        nested_blocksize = state.state2.blocksize
        tensors += (state.state2.absmax, state.state2.code, state.offset)
    return QuantizedWeight("codebook4", (N, K), dtype, tensors, (state.blocksize, nested_blocksize))


def _bitsandbytes8(layer: Any) -> QuantizedWeight:
    """A Linear8bitLt, whose scales move from the weight to the layer's state in its first call; or its weight alone.

    The scale is the one in bitsandbytes' own products with a decoded weight. Its int8_vectorwise_dequant multiplies
    in another order, and is an ulp of float32 away.
    """
    weight, state = (layer.weight, layer.state) if isinstance(layer, nn.Module) else (layer, None)
    if weight.has_fp16_weights:
        raise ValueError("read: the bitsandbytes layer has has_fp16_weights=True; expected a weight stored as int8")
    absmax = weight.SCB if weight.SCB is not None else getattr(state, "SCB", None)
    if weight.dtype != torch.int8 or absmax is None:
        raise ValueError("read: the bitsandbytes weight is not quantised yet; expected .to(device) first")
    scale = _once(absmax, lambda: absmax.float().flatten() * (1.0 / 127.0))
    return QuantizedWeight("row8", tuple(weight.shape), torch.float32, (_plain(weight), scale))


def _torchao_int8(weight: Any) -> QuantizedWeight:
    if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:
        raise ValueError("read: the torchao weight has its layer quantise or scale x too; expected weight-only")
    zero_point = weight.zero_point
    compiling = torch.compiler.is_compiling()  # a graph cannot ask what a number is; whoever compiles has read before
    if zero_point is not None and not compiling and _once(zero_point, lambda: bool(zero_point.any())):
        raise ValueError("read: the torchao weight has zero points; expected symmetric quantisation")
    return _torchao_rows(weight)


def _torchao_float8(weight: Any) -> QuantizedWeight:
    if weight.act_quant_kwargs is not None:
        raise ValueError("read: the torchao weight has its layer quantise x too; expected weight-only")
    return _torchao_rows(weight)


def _torchao_rows(weight: Any) -> QuantizedWeight:
    """One scale a row, or one for all the rows."""
    q, scale = weight.qdata, weight.scale
    if q.dim() != 2 or q.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(
            f"read: the torchao weight is {q.dtype} {tuple(q.shape)}; expected int8 or float8_e4m3fn (N, K)"
        )
    if scale.numel() not in (1, q.shape[0]):
        raise ValueError(
            f"read: the torchao weight has {scale.numel()} scales; expected one for each of {q.shape[0]} rows"
        )
    return QuantizedWeight("row8", tuple(q.shape), weight.dtype, (q, scale.float().flatten().expand(q.shape[0])))


def _torchao_nf4(weight: Any) -> QuantizedWeight:
    tensors = (
        weight.quantized_data,
        weight.quantized_scalers,
        weight.quantization_factor,
        weight.scaler_mean,
        weight.nf4,
    )
    if weight.dim() != 2 or weight.dtype not in _PAIR:
        raise ValueError(
            f"read: the torchao weight is {weight.dtype} {tuple(weight.shape)}; expected 16 or 32 bits, (N, K)"
        )
    return QuantizedWeight(
        "nf4_torchao", tuple(weight.shape), weight.dtype, tensors, (weight.block_size, weight.scaler_block_size)
    )


def _hqq(layer: Any) -> QuantizedWeight:
    if not layer.ready or layer.meta is None:
        raise ValueError("read: the HQQ layer is not quantised yet")
    meta = layer.meta
    if meta["packing"] != "4bit_u8" or not meta["group_size"]:
        raise ValueError(f"read: the HQQ layer is packed as {meta['packing']}; expected 4bit_u8 in groups")
    if meta.get("quant_zero") or meta.get("quant_scale") or "zero" not in meta or "scale" not in meta:
        raise ValueError("read: the HQQ layer has quantised scales or zeros; expected plain ones")
    packed, scale, zero = (_differentiable(tensor) for tensor in (layer.W_q, meta["scale"], meta["zero"]))
    compute_dtype = meta.get("compute_dtype", torch.float16)
    dtype = torch.promote_types(torch.promote_types(compute_dtype, scale.dtype), zero.dtype)
    tensors = (_bytes(packed), scale.view(-1), zero.view(-1))
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
    return _READERS.get((cls.__module__.partition(".")[0], cls.__name__))


def _class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


# What was computed from a library's tensor, with the version of the tensor it was computed from.
_computed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _once(tensor: Tensor, compute: Callable[[], Any]) -> Any:
    """compute() of the first call for `tensor`, until it is written to: what is read at each call must not wait."""
    if torch.compiler.is_compiling():
        return compute()
    version, value = _computed.get(tensor, (None, None))
    if version != tensor._version:
        value = compute()
        _computed[tensor] = tensor._version, value
    return value


def _differentiable(tensor: Tensor) -> Tensor:
    """A copy of what was computed in inference mode, as HQQ quantises: autograd refuses to save that."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor


def _plain(tensor: Tensor) -> Tensor:
    """A view as torch.Tensor, out of the reach of a subclass's __torch_function__."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.view(tensor.shape)


def _bytes(tensor: Tensor) -> Tensor:
    """The storage of a packed weight, which may be declared as any dtype (quant_storage), as flat uint8."""
    with torch._C.DisableTorchFunctionSubclass():
        return (tensor if tensor.dtype == torch.uint8 else tensor.view(torch.uint8)).view(-1)


# What bitsandbytes does on a CPU. Each trap was seen in 0.50.2.


def is_decoded_wrongly(weight: QuantizedWeight) -> bool:
    """Whether bitsandbytes' dequantize_4bit, and with it its GEMM, is wrong for this weight on this machine.

    With AVX512 it takes each row to start a block: wrong where K is a multiple of 16 and not of the blocksize. Found
    out by decoding a weight of that width, once for each.
    """
    if weight.format != "codebook4" or weight.device.type != "cpu":
        return False
    K, blocksize = weight.shape[1], weight.numbers[0]
    if (K, blocksize) not in _decodes:  # a dict and not functools.cache, which torch.compile would trace through
        _decodes[K, blocksize] = _bitsandbytes_decodes(K, blocksize)
    return not _decodes[K, blocksize]


_decodes: dict[tuple[int, int], bool] = {}


def _bitsandbytes_decodes(K: int, blocksize: int) -> bool:
    from bitsandbytes import functional

    N = 2 * -(-blocksize // K) + 2
    codes = torch.arange(N * K) * 7 % 16
    packed = (codes[::2] << 4).to(torch.uint8)
    packed[: N * K // 2] |= codes[1::2].to(torch.uint8)
    absmax = torch.arange(1.0, 1 - (-N * K // blocksize))
    state = functional.QuantState(absmax, (N, K), None, blocksize, "nf4", torch.float32)
    with torch.compiler.set_stance("force_eager"):  # some shapes go through torch.compile, seconds for one call
        theirs = functional.dequantize_4bit(packed[:, None], state)
    code = functional.get_4bit_type("nf4", "cpu")
    ours = QuantizedWeight("codebook4", (N, K), torch.float32, (packed, absmax, code), (blocksize, 0)).dequantize()
    return torch.equal(ours, theirs)


def is_packed_for_cpu(weight: Any) -> bool:
    """Whether Linear4bit has repacked its weight in place, as it does in eval mode on CPUs with AVX512_BF16.

    Its scales are rounded to bfloat16 from then on, dequantize_4bit returns scrambled values, and no gradient of x can
    be computed. `read` takes the weight as it is.
    """
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def unpack_for_cpu(weight: Any) -> None:
    """Put a weight that was repacked back into the layout that bitsandbytes trains and merges, in place.

    The scales stay as they were rounded. (Its own state_dict() quantises nested ones again, or leaves plain ones
    transposed.)
    """
    state = weight.quant_state
    packed, absmax = _unpacked(weight.data, *state.shape), _flat_scales(state)
    weight.data = packed.view(getattr(state, "original_storage_type", torch.uint8)).view(-1, 1)
    state.absmax, state.dtype, state.packing_format_for_cpu = absmax, state.original_dtype, False


def _flat_scales(state: Any) -> Tensor:
    """absmax (blocks,); that of a weight which is or was repacked is (K / blocksize, N) in bfloat16."""
    return state.absmax.T.flatten().float() if state.absmax.dim() == 2 else state.absmax


def _unpacked(packed: Tensor, N: int, K: int) -> Tensor:
    """The bytes of a weight that was repacked, in the layout of codebook4.

    32 rows are interleaved: byte b of (32 rows, 2 columns) has row b // 2 in its low nibble, row 16 + b // 2 in its
    high one, and column b % 2.
    """
    tiles = packed.view(N // 32, K // 2, 16, 2)
    nibbles = torch.cat((tiles & 15, tiles >> 4), 2).transpose(1, 2)  # (N / 32, 32, K / 2, 2)
    return (nibbles[..., 0] << 4 | nibbles[..., 1]).flatten()
