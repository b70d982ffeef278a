"""Fast starts of PEFT's DoRA: a context in which a fresh magnitude is the norm of the weight alone.

A magnitude starts as the norm of W + scaling * lora_B @ lora_A, and PEFT makes that product, its multiple and the sum
as matrices of W's size: nearly all the time of get_peft_model(use_dora=True), and four times the layer's memory. On a
fresh adapter the product is 0, and the norm of W has the same bits.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import itertools
import logging
import math
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.lora import dora
from torch import Tensor, nn

from dora_kernels import quant
from dora_kernels.adapters.reading import class_name, first_reason, why_not_plain
from dora_kernels.functional.tracing import is_traced, is_transformed
from dora_kernels.quant import QuantizedWeight, Weight

logger = logging.getLogger("dora_kernels")

_KNOWN = {
    "update_layer": "b47abf6bd82f0a2b",
    "_cache_clear": "f6a0ca6fa44fafd6",
    "get_weight_norm": "e546ef1acfc84fe8",
    "get_weight_norm of convolutions": "2e11c321bf619972",
    "cache_decorator": "35d36fecf8f8e7b7",
}
"""Fingerprints of PEFT's methods, the same from 0.19.0 to 0.21.2."""

_CLASSES = ("DoraLinearLayer", "DoraEmbeddingLayer", "DoraConv1dLayer", "DoraConv2dLayer", "DoraConv3dLayer")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_LARGEST_SCALING = 2.0**15
"""A larger one may be inf in the product's dtype, and its product with 0 is NaN."""

_ROWS = 256
"""The rows of a block, at least. torch sums a single row in another order, in pieces, on several threads."""

_depth: ContextVar[int] = ContextVar("dora_kernels.fast_init", default=0)
"""The number of contexts that this thread, or asyncio task, is in."""

_lock = threading.Lock()
_open = 0
"""The number of contexts that all threads are in. From the first one to the last _update_layer is in PEFT's place: it
is put there, and taken away, under _lock."""

_library: Callable[..., None] | None = None
"""PEFT's update_layer, since the first context."""


@contextlib.contextmanager
def fast_init() -> Iterator[None]:
    """Inside, PEFT's fresh DoRA adapters start without dense products; the model is the same to the last bit.

        with dora_kernels.starts.fast_init():
            model = peft.get_peft_model(base, config)  # or PeftModel.from_pretrained, add_adapter, load_adapter

    magnitude_n = ||W_n||_2 where lora_B, or lora_A, is 0 and the other finite: PEFT's own in bits, dtype, shape, device
    and class, for linear layers, convolutions, embeddings and quantized bases. No random number is drawn. 4-bit weights
    of bitsandbytes on a CPU are decoded in blocks of rows. Everything else is PEFT's own code: initialisations whose
    product is not 0 ("pissa", "olora", False, ...), subclasses of tensors, the meta device, autocast, traced calls; and
    all of it where PEFT's methods are not those that are known, of 0.19 to 0.21, which is logged once.

    For this thread or asyncio task alone; contexts may nest and overlap. After the last one, PEFT's class is as before.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _open, _library
    with _lock:
        _open += 1
        if _open == 1:
            reason = _why_not_library()
            if reason is None:
                _library = vars(dora.DoraLinearLayer)["update_layer"]
                dora.DoraLinearLayer.update_layer = _update_layer
            else:
                _log(logging.WARNING, f"PEFT starts adapters in its own way: {reason}")
    _depth.set(_depth.get() + 1)


def _leave() -> None:
    global _open
    _depth.set(max(0, _depth.get() - 1))
    with _lock:
        _open -= 1
        # not where somebody has wrapped it meanwhile: outside of a context it does what PEFT's does
        if _open == 0 and vars(dora.DoraLinearLayer)["update_layer"] is _update_layer:
            dora.DoraLinearLayer.update_layer = _library


@functools.cache
def _log(level: int, line: str) -> None:
    """Log a line once."""
    logger.log(level, "fast_init: %s", line)


def _why_not_library() -> str | None:
    """The reason why the methods that _update_layer stands for are not those that are known."""
    linear, convolution = (vars(getattr(dora, name, object)) for name in ("DoraLinearLayer", "_DoraConvNdLayer"))
    norm, of_convolutions = linear.get("get_weight_norm"), convolution.get("get_weight_norm")
    found = {
        "update_layer": linear.get("update_layer"),
        "_cache_clear": linear.get("_cache_clear"),
        "get_weight_norm": getattr(norm, "__wrapped__", None),
        "get_weight_norm of convolutions": getattr(of_convolutions, "__wrapped__", None),
        "cache_decorator": norm,
    }
    other = [name for name, function in found.items() if _fingerprint(function) != _KNOWN[name]]
    return f"{', '.join(other)} of peft.tuners.lora.dora is not as in PEFT 0.19 to 0.21" if other else None


def _fingerprint(function: Any) -> str:
    """A digest of a function's source but for comments and layout; "" where there is no source to be had."""
    try:
        # of the code: a function that wraps another one shows that one's source
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.__code__)))
    except (AttributeError, OSError, SyntaxError, TypeError, ValueError):
        return ""
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def _update_layer(
    self: Any, *, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float, place_on_cpu: bool = False
) -> None:
    """PEFT's DoraLinearLayer.update_layer; inside of fast_init, without the product where that is 0."""
    norm, reason = None, None
    if _depth.get():
        reason = _why_not_call(self, lora_A, lora_B, scaling)
        if reason is None:
            with torch.no_grad(), dora.gather_params_ctx(base_layer.parameters()):
                norm, reason = _norm_of_base(self, base_layer, lora_A, lora_B)
        if reason is not None:
            _log(logging.INFO, f"PEFT starts some adapters in its own way: {reason}")
    if norm is None:
        adapter = {"lora_A": lora_A, "lora_B": lora_B, "scaling": scaling}
        _by_library(self, base_layer=base_layer, **adapter, place_on_cpu=place_on_cpu)
        return
    self._cache_clear()
    self.weight = nn.Parameter(norm.to("cpu") if place_on_cpu else norm, requires_grad=True)


def _by_library(layer: Any, **arguments: Any) -> None:
    assert _library is not None  # _update_layer is called, so there was a context
    _library(layer, **arguments)


def _why_not_call(layer: object, lora_A: Tensor, lora_B: Tensor, scaling: float) -> str | None:
    """The reason why PEFT must make the product of lora_B and lora_A, whatever the base layer is."""
    if type(layer) not in [getattr(dora, name, None) for name in _CLASSES]:
        return f"the layer is a {class_name(layer)}"
    reason = first_reason(why_not_plain(*named) for named in (("lora_A", lora_A), ("lora_B", lora_B)))
    if reason is not None:
        return reason
    if is_traced() or is_transformed():
        return "it is traced or transformed"
    device = lora_A.device
    if device.type == "meta" or lora_B.device != device or torch.is_autocast_enabled(device.type):
        return "the adapter is on the meta device, or on two, or under autocast"
    if lora_A.dtype not in _DTYPES or lora_B.dtype != lora_A.dtype:
        return f"lora_A is {lora_A.dtype} and lora_B {lora_B.dtype}"
    if not lora_A.is_contiguous() or not lora_B.is_contiguous():
        return "lora_A or lora_B is not contiguous"
    if type(scaling) not in (int, float) or not math.isfinite(scaling) or abs(scaling) > _LARGEST_SCALING:
        return "scaling is no number of a usual size"
    zero, other = (lora_B, lora_A) if not lora_B.any() else (lora_A, lora_B)
    if zero.any() or not other.isfinite().all():
        return "lora_B @ lora_A is not 0"
    return None


def _norm_of_base(
    layer: Any, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor
) -> tuple[Tensor | None, str | None]:
    """(the magnitude, None), or (None, the reason why PEFT must make it). The product of lora_B and lora_A is 0."""
    weight = _four_bits_on_cpu(base_layer) if lora_A.device.type == "cpu" else None
    if weight is None:
        weight = dora.dequantize_module_weight(base_layer)
        reason = _why_not_weight(weight)
        if reason is not None:
            return None, reason
        weight = weight.detach().to(lora_A.device)
        if weight.device.type != "cpu" and weight.data_ptr() % 16:
            return None, "the weight is not aligned, and a GPU sums its rows in another order than of a copy"
    # the sum's: a product of two float16 matrices is made in float32, and then rounded
    dtype = torch.promote_types(weight.dtype, lora_A.dtype)
    if isinstance(weight, Tensor) and weight.dim() > 2:
        rank = lora_A.shape[0]
        # views, lora_B (-1, rank) and lora_A (rank, -1), and their product is reshaped: in groups they have other sizes
        elements = lora_B.numel() // rank * (lora_A.numel() // rank)
        if lora_B.numel() % rank or elements != weight.numel():
            return None, "lora_B @ lora_A is not of the weight's shape"
        over = tuple(range(1, weight.dim()))
        return weight.to(dtype).norm(p=2, dim=over, keepdim=True).transpose(1, 0), None
    if isinstance(weight, Tensor):
        weight = dora.transpose(weight, layer.fan_in_fan_out)
    elif layer.fan_in_fan_out:
        return None, "a quantized weight is stored transposed"
    if lora_A.dim() != 2 or lora_B.dim() != 2 or tuple(weight.shape) != (lora_B.shape[0], lora_A.shape[1]):
        return None, "lora_B @ lora_A is not of the weight's shape"
    return _row_norms(weight, dtype), None


def _four_bits_on_cpu(base_layer: nn.Module) -> QuantizedWeight | None:
    """The weight of a bitsandbytes layer on a CPU, if a block of its rows is decoded as bitsandbytes decodes it."""
    weight = base_layer._parameters.get("weight")
    if type(weight).__name__ != "Params4bit" or weight.device.type != "cpu" or hasattr(base_layer, "W_q"):
        return None
    if quant.is_packed_for_cpu(weight):
        return None
    read, _ = quant.read_or_reason(base_layer)
    return None if read is None or quant.is_decoded_wrongly(read) else read


def _why_not_weight(weight: object) -> str | None:
    """The reason why the norm of `weight` may have other bits than that of its sum with 0."""
    reason = why_not_plain("the weight", weight)
    if reason is not None:
        return reason
    if weight.dtype not in _DTYPES or weight.dim() < 2 or weight.numel() == 0:
        return f"the weight is {weight.dtype} {tuple(weight.shape)}"
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    if not weight.is_contiguous() and (last is None or not weight.is_contiguous(memory_format=last)):
        return "the weight is not contiguous"  # as their sum would be
    return None


def _row_norms(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The norms (N,) of the rows of weight (N, K) in dtype, as torch.linalg.norm sums them.

    A weight that is quantized, or of another dtype, is taken in blocks of rows on a CPU. A GPU's order of summation
    depends on the number of rows.
    """
    if isinstance(weight, Tensor) and (weight.dtype == dtype or weight.device.type != "cpu"):
        return torch.linalg.norm(weight.to(dtype), dim=1)
    N = weight.shape[0]
    count = max(1, N // _ROWS)
    bounds = [N * block // count for block in range(count + 1)]
    blocks = [torch.linalg.norm(weight[slice(*rows)].to(dtype), dim=1) for rows in itertools.pairwise(bounds)]
    return torch.cat(blocks)
