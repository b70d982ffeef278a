"""The plan: each tensor that is merged, and by which adapter; refused, if it is, before anything is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_kernels.extras.convert import FORMATS, DoraAdapter
from dora_kernels.extras.convert.adapter import same_bits
from dora_kernels.extras.merging.adapters import AdapterFile
from dora_kernels.extras.merging.base import DTYPES, Base, Shard, Stored, blocks_of, same_bytes
from dora_kernels.extras.merging.matching import HEADS, match
from dora_kernels.files.reading import shown

_CONV1D = {
    "gpt2": ("c_attn", "q_attn", "c_proj", "c_fc"),
    "decision_transformer": ("c_attn", "q_attn", "c_proj", "c_fc"),
    "imagegpt": ("c_attn", "q_attn", "c_proj", "c_fc"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
    "clvp": ("c_proj", "c_fc"),
}
"""By model_type, the layers of transformers' that are its Conv1D, whose weight is (K, N)."""
_PARTS = ("weight_scale", "weight_scale_inv", "weight_packed", "qweight", "qzeros", "scales", "SCB", "g_idx")
_OF_A_WEIGHT = ("absmax", "quant_map", "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
_PACKED = re.compile(rf"\.({'|'.join(_PARTS)}|weight\.({'|'.join(_OF_A_WEIGHT)}))$")
"""Parts of a quantized weight: of compressed-tensors, fine-grained FP8, GPTQ, AWQ, and bitsandbytes."""


@dataclass(frozen=True, eq=False)
class Planned:
    """One tensor that is merged. bias: the layer's own where the gain multiplies it, too."""

    adapter: DoraAdapter
    shard: Shard
    entry: Stored
    transposed: bool
    bias: tuple[Shard, Stored] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.entry.dtype]


def plan(base: Base, read: AdapterFile) -> list[Planned]:
    """The jobs, in the order of the adapters. Raises ValueError for what cannot be merged."""
    _check_config(base)
    adapters = read.layers
    try:
        found = match([adapter.module for adapter in adapters], base.entries)
    except ValueError:
        _check_packed(base, *base.entries)
        raise
    for key in found.values():
        _check_dtype(base, key, base.entries[key][1])
    for (module, part), tensor in read.beneath.items():
        _check_beneath(base, found[module], part, tensor)
    layouts = {adapter.module: _is_across(adapter, base.entries[found[adapter.module]][1]) for adapter in adapters}
    told = {layouts[adapter.module] for adapter in adapters if adapter.ndim == 2}
    jobs = []
    for adapter in adapters:
        key = found[adapter.module]
        shard, entry = base.entries[key]
        _check_tie(base, key, entry)
        transposed = _is_transposed(base, key, layouts[adapter.module], told, read.fan_in_fan_out)
        jobs.append(Planned(adapter, shard, entry, transposed, _bias(base, read.format, key)))
    return jobs


def _check_config(base: Base) -> None:
    """Raise ValueError where config.json says that the model is quantized."""
    if base.config is None:
        return
    inner = base.config.text_config if isinstance(base.config.text_config, Mapping) else {}
    for field in ("quantization_config", "compression_config"):
        stated = getattr(base.config, field) or inner.get(field)
        if stated:
            method = stated.get("quant_method") if isinstance(stated, Mapping) else None
            by = f" of {shown(method)}" if method else ""
            raise ValueError(
                f"merge: {shown(base.path)} is quantized: config.json has a {field}{by}; expected the model before that"
            )


def _check_packed(base: Base, *keys: str) -> None:
    """Raise ValueError where one of the keys is a part of a quantized weight."""
    packed = next((key for key in keys if _PACKED.search(key) and key in base.entries), None)
    if packed is not None:
        raise ValueError(f"merge: {shown(base.path)} is quantized: it has {shown(packed)}; expected floating point")


def _check_dtype(base: Base, key: str, entry: Stored) -> None:
    module = key.removesuffix(".weight")
    _check_packed(base, *(f"{module}.{part}" for part in _PARTS), *(f"{key}.{part}" for part in _OF_A_WEIGHT))
    if entry.dtype not in DTYPES:
        raise ValueError(f"merge: {shown(key)} is {entry.dtype}; expected {', '.join(DTYPES)}")
    copies = [shard.path.name for shard in base.shards if any(other.key == key for other in shard.entries)]
    if len(copies) > 1:
        raise ValueError(f"merge: {shown(key)} is in {shown(copies[0])} and in {shown(copies[1])}; expected one")


def _check_beneath(base: Base, key: str, part: str, saved: Tensor) -> None:
    """Raise ValueError unless a tensor that the adapter has of its base is that of this one, in its own dtype.

    PEFT saves it of a head that is adapted, in the dtype of training (https://github.com/huggingface/peft, function
    get_peft_model_state_dict). Where it is another the adapter was trained over another model.
    """
    key = key.removesuffix("weight") + part
    shape = tuple(saved.shape)
    shard, entry = base.entries.get(key, (None, None))
    if shard is None or entry is None or entry.dtype not in DTYPES or entry.shape != shape:
        held = "has no such tensor" if entry is None else f"is {entry.dtype} of shape {entry.shape}"
        raise ValueError(
            f"merge: {shown(key)} is saved beside the adapter with shape {shape}, but the base's {held}; expected the "
            "base that it was trained over, whose vocabulary may have been resized before"
        )
    done, saved = 0, saved.detach().resolve_neg().reshape(-1)
    for block in blocks_of(shard, entry):
        if not same_bits(block.to(saved.dtype), saved[done : done + len(block)]):
            raise ValueError(
                f"merge: {shown(key)} is saved beside the adapter with other values than the base's; expected the base "
                "that it was trained over"
            )
        done += len(block)


def _is_across(adapter: DoraAdapter, entry: Stored) -> bool | None:
    """False of a weight (N, K, *kernel), True of one that is stored (K, N), None where it may be either."""
    shape = (adapter.N, *adapter.lora_A.shape[1:])
    straight, across = entry.shape == shape, adapter.ndim == 2 and entry.shape == shape[::-1]
    if straight and across:
        return None
    if straight or across:
        return across
    raise ValueError(
        f"merge: {shown(entry.key)} has shape {entry.shape} but the adapter's lora_B is "
        f"{tuple(adapter.lora_B.shape)} and lora_A {tuple(adapter.lora_A.shape)}; expected {shape}"
    )


def _is_transposed(
    base: Base, key: str, layout: bool | None, layouts: set[bool | None], fan_in_fan_out: bool | None
) -> bool:
    """True where the weight is stored (K, N). layouts: those that shapes tell, of all layers.

    What adapter_config.json says of fan_in_fan_out PEFT changes layer by layer, and saves what the last layer had.
    """
    names = _CONV1D.get(base.config.model_type or "") if base.config is not None else None
    known = None if names is None else key.removesuffix(".weight").rpartition(".")[2] in names
    if layout is None and known is not None:
        return known
    if layout is None and bool(fan_in_fan_out) is False and True not in layouts:
        return False
    if layout is None and fan_in_fan_out and False not in layouts:
        return True
    if layout is None:
        raise ValueError(
            f"merge: {shown(key)} is square, fan_in_fan_out is {fan_in_fan_out} in adapter_config.json, and the other "
            "layers are stored the other way; expected a config.json in the base that tells the model's type"
        )
    if layout and not known and not fan_in_fan_out:
        raise ValueError(
            f"merge: {shown(key)} has shape {base.entries[key][1].shape}, that of the adapter's layer transposed; "
            "expected that shape only of GPT-2's Conv1D, or with fan_in_fan_out in adapter_config.json"
        )
    return layout


def _bias(base: Base, name: str, key: str) -> tuple[Shard, Stored] | None:
    """The layer's bias where it has one, and the format's gain multiplies it."""
    bias = key.removesuffix(".weight") + ".bias"
    kind = FORMATS[name].bias
    if kind == "unscaled" or bias not in base.entries:
        return None
    if kind == "either":
        raise ValueError(
            f"merge: {shown(bias)}: {name}'s gain multiplies a layer's bias or not, layer by layer; expected adapted "
            "layers without a bias"
        )
    shard, entry = base.entries[bias]
    if entry.dtype not in DTYPES or entry.shape != base.entries[key][1].shape[:1]:
        expected = f"{', '.join(DTYPES)} and shape {base.entries[key][1].shape[:1]}"
        raise ValueError(f"merge: {shown(bias)} is {entry.dtype} of shape {entry.shape}; expected {expected}")
    return shard, entry


def _check_tie(base: Base, key: str, entry: Stored) -> None:
    """Raise ValueError where the tensor is the model's embedding as well: both would have to be the merged one.

    PEFT writes to the parameter that they share, and so the embedding is wrong by its merge_and_unload.
    """
    if key.removesuffix(".weight").rpartition(".")[2] not in HEADS:
        return
    config = base.config
    text = config.text_config if config is not None else None
    stated = [config.tie_word_embeddings if config is not None else None]
    stated.append(text.get("tie_word_embeddings") if isinstance(text, Mapping) else None)
    # where nothing is stated the model has its class' default, which may be either
    alike = [other for name, other in base.entries.items() if "embed" in name or name.endswith("wte.weight")]
    same = False not in stated and any(same_bytes(base.entries[key], other) for other in alike)
    if True in stated or same:
        told = "tie_word_embeddings in config.json says" if True in stated else "their equal bytes tell"
        raise ValueError(
            f"merge: {shown(key)} is the embedding, too, as {told}; expected a base that was saved with two of them, "
            "and tie_word_embeddings false"
        )
