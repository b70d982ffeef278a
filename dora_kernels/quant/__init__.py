"""Quantized weights: one container for what each library stores, its readers and its decoders."""

from dora_kernels.quant.bitsandbytes_cpu import is_decoded_wrongly, is_packed_for_cpu, unpack_for_cpu
from dora_kernels.quant.formats import DENSE, FORMATS, QuantizedWeight, Weight, flatten_weight, unflatten_weight
from dora_kernels.quant.layouts import layout_check
from dora_kernels.quant.product import frozen_product
from dora_kernels.quant.readers import is_quantized, origin_of, read, read_or_reason, sources

__all__ = [
    "DENSE",
    "FORMATS",
    "QuantizedWeight",
    "Weight",
    "frozen_product",
    "is_decoded_wrongly",
    "is_packed_for_cpu",
    "is_quantized",
    "layout_check",
    "flatten_weight",
    "origin_of",
    "read",
    "read_or_reason",
    "sources",
    "unpack_for_cpu",
    "unflatten_weight",
]
