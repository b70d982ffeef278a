"""PEFT's `lora.Embedding`: a row of the weight per token, scaled column by column, so the norm is over the vocabulary.

The base layer is called as it is. low is the lookup in lora_A^T; the rescale follows, in one pass.
"""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import Embedding, LoraLayer
from torch import Tensor, nn

from dora_kernels.adapters.peft.adapter import EMBEDDING, PeftAdapter
from dora_kernels.adapters.peft.layer import TakenOverLayer, read_weight
from dora_kernels.adapters.reading import class_name
from dora_kernels.functional.rescale import rescale
from dora_kernels.reference import gain_of
from dora_kernels.types import DoraWeight


class DoraKernelsEmbedding(TakenOverLayer, Embedding):
    """Over `lora.Embedding`: N is the width of the embedding, K the size of the vocabulary."""

    family = EMBEDDING

    @classmethod
    def read_base(cls, layer: LoraLayer) -> tuple[Tensor | None, str | None]:
        """The weight (K, N) and None, or the reason why PEFT must compute over this base layer."""
        base = layer.base_layer
        if not isinstance(base, nn.Embedding):
            return None, f"the base layer is a {class_name(base)}; expected nn.Embedding"
        weight, reason = read_weight(base)
        if reason is None and base.max_norm is not None:
            reason = "the base layer has a max_norm, which is applied to lora_A in place too"
        if reason is None and base.sparse:
            reason = "the base layer has sparse gradients"
        if reason is None and getattr(layer, "tp_layer", None) is not None:
            reason = "the layer is tensor parallel"
        return weight, reason

    def operands(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, str | None]:
        return x, weight, None

    def dora_forward(self, x: Tensor, operand: Tensor, weight: Tensor, adapters: list[PeftAdapter]) -> Tensor:
        """x: (...) tokens -> (..., N), of the dtype of the base layer's output.

        Adapters nest: y = g2 * (g1 * (base + d1) + d2), d = embed_scale * scaling * A^T[x] B^T. PEFT has no
        dropout here. A base layer with a forward of its own may return fewer dimensions; then its output is repeated.
        """
        base = self.base_layer(x)
        result = base
        if len(adapters) > 1:  # not rounded in between, as PEFT's is not
            result = base.to(torch.promote_types(base.dtype, adapters[0].magnitude.weight.dtype))
        embed_scale = self._get_embed_scale()  # the base layer's own, which its output has already
        norms = self.norms(weight, adapters)
        for i, adapter in enumerate(adapters):
            _, lora_A, lora_B, magnitude, scaling = adapter.over(weight)
            low = self._embed(x, lora_A.T)
            if embed_scale is not None:
                low = low * embed_scale.to(low.dtype)
            if result.shape[:-1] != low.shape[:-1]:  # Whisper has one row of positions for all the batch
                shape = torch.broadcast_shapes(result.shape[:-1], low.shape[:-1])
                result, low = (tensor.expand(*shape, tensor.shape[-1]) for tensor in (result, low))
            result = rescale(result, low, lora_B, gain_of(magnitude, norms[i]), scaling)
        return result.to(base.dtype)

    def drops_otherwise(self) -> bool:
        """False: PEFT has no dropout here."""
        return False

    def as_matrices(self, weight: Tensor, adapter: PeftAdapter) -> DoraWeight:
        return adapter.over(weight.T)

    def shaped(self, rows: Tensor) -> Tensor:
        return rows.T.contiguous()
