"""Groups of PEFT's linear layers that read the same x, found by their names in the module that calls them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from dora_kernels.adapters.peft.linear import TakenOverLinear

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, CLIP, Whisper
    ("query", "key", "value"),  # BERT, RoBERTa, ViT
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("q", "k", "v"),  # T5
    ("wq", "wk", "wv"),  # Meta's Llama
    ("to_q", "to_k", "to_v"),  # diffusers
    ("add_q_proj", "add_k_proj", "add_v_proj"),  # the text of SD3 and FLUX in diffusers
    ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek-V2, V3
    ("gate_proj", "up_proj"),  # the MLP of Llama and most after it
    ("w1", "w3"),  # Meta's Llama, Mixtral
    ("wi_0", "wi_1"),  # T5 v1.1
)
"""Names of siblings; of an attention the query comes first."""

CROSS = re.compile(r"cross|encoder_attn|encdec|attn2")
"""Part of the name of an attention, or of the module around it, whose query reads another x than key and value."""


def groups(model: nn.Module) -> Iterator[list[tuple[str, TakenOverLinear]]]:
    """(name, layer) of the taken over layers of `model` that are called with one x, two or more at a time."""
    for path, parent in model.named_modules():
        cross = CROSS.search(".".join(path.split(".")[-2:]).lower()) is not None
        for names in SIBLINGS:
            found = [(name, getattr(parent, name, None)) for name in names]
            layers = {name: layer for name, layer in found if isinstance(layer, TakenOverLinear)}
            if cross and len(names) == 3:
                layers.pop(names[0], None)
            # an attention of another width of keys and values is a cross-attention, whatever it is called
            widths = {layer.in_features for layer in layers.values()}
            if len(layers) > 1 and len(widths) == 1:
                yield [(f"{path}.{name}" if path else name, layer) for name, layer in layers.items()]
