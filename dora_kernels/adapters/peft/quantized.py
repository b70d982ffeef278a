"""PEFT's DoRA layers over quantized weights: bitsandbytes' 4 and 8 bits, HQQ's 4 bits, torchao's 8 bits.

Imported only for a model that has such layers, and their libraries with it. Merging stays PEFT's: it decodes, merges
and quantizes again.

The library's own product is never called for a layer that is taken over: its weight is read as it is stored. So 8-bit
layers of bitsandbytes multiply with the decoded weight everywhere, and not with x rounded to 8 bits too.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available, is_hqq_available
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor

from dora_kernels import quant
from dora_kernels.adapters.classes import LINEAR, Product, product_of, why_not_product
from dora_kernels.adapters.peft.bitsandbytes_cpu import refuse_wrong_decoding, unpack, wrong_decoding
from dora_kernels.adapters.peft.linear import TakenOverLinear
from dora_kernels.adapters.reading import AUTOCAST_DTYPES, class_name, why_not_bypass
from dora_kernels.quant import QuantizedWeight


class TakenOverQuantized(TakenOverLinear):
    """TakenOverLinear, with a base layer that `quant.read` knows."""

    base_product: ClassVar[Product]
    """Subclasses count that leave its methods alone, but with `exact`: of a class that quant.read knows by its name."""

    exact: ClassVar[bool] = False
    base_kind = "quantized"

    def reread_base(self, weight: None) -> tuple[QuantizedWeight | None, str | None]:
        return quant.read_or_reason(self.base_layer)

    @classmethod
    def read_base(cls, layer: LoraLayer) -> tuple[QuantizedWeight | None, str | None]:
        base = layer.base_layer
        if cls.exact and type(base) is not cls.base_product.cls:
            return None, f"the base layer is a {class_name(base)}; expected {cls.base_product}"
        reason = why_not_product("the base layer", base, cls.base_product)
        if reason is not None:
            return None, reason
        weight, reason = quant.read_or_reason(base)
        return weight, reason or why_not_bypass("base_layer", base)


class DoraKernelsTorchaoLinear(TakenOverQuantized, TorchaoLoraLinear):
    """Over TorchaoLoraLinear: nn.Linear with a weight-only int8 or float8 tensor of torchao's."""

    base_product = LINEAR


CLASSES: dict[type[LoraLayer], type[TakenOverLinear]] = {TorchaoLoraLinear: DoraKernelsTorchaoLinear}
"""The class that takes over each of PEFT's."""

if is_hqq_available():
    from hqq.core.quantize import HQQLinear
    from peft.tuners.lora.hqq import HqqLoraLinear

    class DoraKernelsHqqLinear(TakenOverQuantized, HqqLoraLinear):
        """Over HqqLoraLinear."""

        base_product = product_of(HQQLinear)  # whose backends are forwards of its own
        exact = True
        draws_in_adapter_dtype = False

    CLASSES[HqqLoraLinear] = DoraKernelsHqqLinear

if is_bnb_available():
    import bitsandbytes as bnb
    from peft.tuners.lora.bnb import Linear8bitLt

    class DoraKernelsLinear8bitLt(TakenOverQuantized, Linear8bitLt):
        """Over PEFT's Linear8bitLt, which computes in the dtype of x."""

        base_product = product_of(bnb.nn.Linear8bitLt, "forward")
        exact = True
        draws_in_adapter_dtype = False

        def base_operands(self, x: Tensor, weight: QuantizedWeight) -> tuple[Tensor, QuantizedWeight, str | None]:
            return _operands(x, weight, x.dtype)

    CLASSES[Linear8bitLt] = DoraKernelsLinear8bitLt

if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    class DoraKernelsLinear4bit(TakenOverQuantized, Linear4bit):
        """Over PEFT's Linear4bit, which computes in the compute_dtype of its base layer.

        On a CPU bitsandbytes decodes some widths wrongly, and repacks a weight in eval mode. PEFT's and bitsandbytes'
        results for the first are refused; the second is unpacked first.
        """

        base_product = product_of(bnb.nn.Linear4bit, "forward")  # LinearNF4 and LinearFP4 have no other
        draws_in_adapter_dtype = False

        @classmethod
        def read_base(cls, layer: LoraLayer) -> tuple[QuantizedWeight | None, str | None]:
            """The weight and None, or the reason; a repacked weight is unpacked first, once."""
            try:
                unpack(layer.base_layer)
            except ValueError as error:
                return None, str(error).removeprefix("read: ")
            return super().read_base(layer)

        def reread_base(self, weight: None) -> tuple[QuantizedWeight | None, str | None]:
            return self.read_base(self)  # as it may have been packed since

        @classmethod
        def remarks(cls, weight: QuantizedWeight) -> list[str]:
            """A remark where bitsandbytes decodes wrongly: a fresh magnitude is the norm of what PEFT has decoded."""
            wrong = wrong_decoding(weight)
            return [] if wrong is None else [f"{wrong}, and PEFT takes a fresh magnitude from that"]

        def base_operands(self, x: Tensor, weight: QuantizedWeight) -> tuple[Tensor, QuantizedWeight, str | None]:
            base = self.base_layer
            compute_dtype = base.compute_dtype or x.dtype
            if not base.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16):
                compute_dtype = x.dtype  # as bitsandbytes settles it in a layer's first call
            return _operands(x, weight, compute_dtype)

        def library_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """PEFT's forward. Raises ValueError if bitsandbytes' product is wrong on this machine."""
            self._refuse_wrong_decoding("forward")
            return super().library_forward(x, *args, **kwargs)

        def merge(self, *args: Any, **kwargs: Any) -> None:
            """PEFT's. Raises ValueError where bitsandbytes decodes this weight wrongly on this machine."""
            self._refuse_wrong_decoding("merge")
            super().merge(*args, **kwargs)

        def unmerge(self) -> None:
            """PEFT's. Raises ValueError as merge."""
            self._refuse_wrong_decoding("unmerge")
            super().unmerge()

        def _refuse_wrong_decoding(self, function: str) -> None:
            refuse_wrong_decoding(function, self.read_base(self)[0])

    CLASSES[Linear4bit] = DoraKernelsLinear4bit


def _operands(
    x: Tensor, weight: QuantizedWeight, compute_dtype: torch.dtype
) -> tuple[Tensor, QuantizedWeight, str | None]:
    """x and weight in compute_dtype, or under autocast in its dtype, to which bitsandbytes decodes."""
    if x.dtype not in AUTOCAST_DTYPES:
        return x, weight, f"x is {x.dtype}"
    if torch.is_autocast_enabled(x.device.type):
        return x, weight.rounded_to(torch.get_autocast_dtype(x.device.type)), None
    return x.to(compute_dtype), weight.rounded_to(compute_dtype), None
