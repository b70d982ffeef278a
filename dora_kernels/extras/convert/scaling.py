"""The ways in which a format stores alpha and computes scaling from it: a small class for each.

read(module -> alpha tensor or None, module -> R, config, header, alpha) gives each module's scaling; `alpha` is what
the caller says beside the file. write(adapters) gives tensors by module, config and header. Both raise ValueError, and
write raises Unrepresentable where the format computes no alpha / R that is exactly the scaling.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dora_kernels.extras.checkpoint_files import BASE_KEPT, lora_scaling
from dora_kernels.extras.convert.adapter import DTYPES, DoraAdapter, Unrepresentable, alpha_of
from dora_kernels.extras.patterns import pattern_values, whole
from dora_kernels.extras.schema import AdapterConfig, HeaderAlphas, HeaderConfig, is_number, parsed
from dora_kernels.files.reading import shown

Written = tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# fields of adapter_config.json that say nothing of what a trained adapter computes
_SILENT = {
    "auto_mapping",
    "base_model_name_or_path",
    "dora_simple",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_FILE = "adapter_config.json"
# the models of diffusers' pipelines that may have an adapter
_COMPONENT = re.compile(r"(unet|transformer(_2|_ref)?|text_encoder(_[23])?|connectors|text_conditioner)\.")
# an adapter's name in a key, which PEFT has in memory alone
_NAMED = re.compile(r"\.lora_[AB]\.[^.]+\.weight$")
_READ = {"peft_type", "use_dora", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}


class Unstated(ValueError):
    """An alpha that neither the source nor the caller says."""


@dataclass(frozen=True)
class One:
    """No alpha at all: scaling is 1. is_rank: the caller may say alpha, but no other than R."""

    is_rank: bool = False

    def read(self, tensors, ranks, config, header, alpha) -> dict[str, float]:
        if alpha is not None and not (self.is_rank and set(ranks.values()) == {alpha}):
            if self.is_rank:
                raise ValueError(
                    f"convert: alpha is {alpha}; expected {shown(sorted(set(ranks.values())))}, the rank, for with "
                    "another the norm is of a sum without alpha / R, which is no DoRA"
                )
            raise ValueError(f"convert: alpha is {alpha}; expected none, for in this format scaling is always 1")
        return dict.fromkeys(ranks, 1.0)

    def write(self, adapters: Sequence[DoraAdapter]) -> Written:
        for adapter in adapters:
            if adapter.scaling != 1:
                raise Unrepresentable(f"convert: {shown(adapter.module)}: scaling is {adapter.scaling!r}; expected 1")
        return {}, {}, {}


@dataclass(frozen=True)
class InTensor:
    """A 0-d tensor `alpha` beside each module's weights, float32 as LyCORIS makes it; its 0 means R.

    lenient: where there is none it is R, as ComfyUI, InvokeAI and kohya's scripts have it, of which the first two
    multiply by 0 and the last take R where it is 0: that is refused. LyCORIS reads no file without it.
    """

    lenient: bool = False

    def supposes(self, modules: Sequence[str], tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:
        """True where a module's alpha is R for want of a tensor."""
        return self.lenient and any(f"{module}.alpha" not in tensors for module in modules)

    def read(self, tensors, ranks, config, header, alpha) -> dict[str, float]:
        scaling = {}
        for module, rank in ranks.items():
            tensor = tensors[module]
            if tensor is not None and (tensor.numel() != 1 or tensor.dtype not in (*DTYPES, *_INTEGERS)):
                raise ValueError(
                    f"convert: {shown(module)}: alpha is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                    "expected one number"
                )
            stated = None if tensor is None else float(tensor)
            if self.lenient and stated is None and alpha is None:
                stated = rank
            value = _stated(stated, alpha, f"{module}.alpha")
            if self.lenient and not value:
                raise ValueError(
                    f"convert: {shown(module)}.alpha is 0, which is a scaling of 0 to ComfyUI and of 1 to LyCORIS and "
                    "kohya's scripts; expected another"
                )
            scaling[module] = (value or rank) / rank
        return scaling

    def write(self, adapters: Sequence[DoraAdapter]) -> Written:
        tensors = {}
        for adapter in adapters:
            tensor = torch.tensor(adapter.scaling * adapter.R, dtype=torch.float64).float()
            if float(tensor) / adapter.R != adapter.scaling:
                raise Unrepresentable(
                    f"convert: {shown(adapter.module)}: no float32 alpha makes alpha / {adapter.R} exactly "
                    f"{adapter.scaling!r}; expected such a scaling, or --fold to round it into lora_B"
                )
            tensors[adapter.module] = tensor
        return tensors, {}, {}


@dataclass(frozen=True)
class InHeader:
    """Nothing in the library's own state dict. Files written here carry {module: alpha} in the safetensors header."""

    uniform: bool = False
    header: ClassVar[str] = "dora_alpha"

    def read(self, tensors, ranks, config, header, alpha) -> dict[str, float]:
        text = header.get(self.header, "{}")
        if len(text) > HeaderAlphas.most_bytes:
            raise ValueError(
                f"convert: the header's {self.header} has {len(text)} letters; expected at most "
                f"{HeaderAlphas.most_bytes}"
            )
        alphas = parsed("convert", f"the header's {self.header}", text, HeaderAlphas).root
        unknown = sorted(set(alphas) - set(ranks))
        if unknown:
            raise ValueError(
                f"convert: the header has an alpha for {shown(unknown)}, which have no adapter in the file"
            )
        return {module: _stated(alphas.get(module), alpha, f"{module}.alpha") / rank for module, rank in ranks.items()}

    def write(self, adapters: Sequence[DoraAdapter]) -> Written:
        if self.uniform:
            _uniform(adapters)
        return {}, {}, {self.header: json.dumps({adapter.module: _alpha_of(adapter) for adapter in adapters})}


@dataclass(frozen=True)
class InConfig:
    """r and lora_alpha of adapter_config.json, the same for every layer; scaling = lora_alpha / r."""

    peft_type: str = "LORA"

    def read(self, tensors, ranks, config, header, alpha) -> dict[str, float]:
        _check_config(config, self.peft_type, ("rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"))
        _check_ranks(ranks, dict.fromkeys(ranks, config.get("r")))
        value = _stated(config.get("lora_alpha"), alpha, "lora_alpha")
        return {module: value / rank for module, rank in ranks.items()}

    def write(self, adapters: Sequence[DoraAdapter]) -> Written:
        rank, alpha = _uniform(adapters)
        config = {"peft_type": self.peft_type, "use_dora": True, "r": rank, "lora_alpha": alpha, "bias": "none"}
        return {}, config | {"target_modules": [adapter.module for adapter in adapters]}, {}


@dataclass(frozen=True)
class InPeftConfig:
    """PEFT's adapter_config.json: lora_alpha / r or, with use_rslora, / sqrt(r); patterns name layers of their own."""

    def read(self, tensors, ranks, config, header, alpha) -> dict[str, float]:
        if not config and alpha is None:
            raise Unstated("convert: there is no adapter_config.json; expected PEFT's folder, or --alpha")
        if not config:
            return {module: alpha / rank for module, rank in ranks.items()}
        return _peft_scaling(ranks, config, alpha)

    def write(self, adapters: Sequence[DoraAdapter]) -> Written:
        use_rslora = False
        alphas = [alpha_of(adapter.scaling, adapter.R) for adapter in adapters]
        if None in alphas:
            use_rslora = True
            alphas = [alpha_of(adapter.scaling, math.sqrt(adapter.R)) for adapter in adapters]
        if None in alphas:
            first = next(adapter for adapter in adapters if alpha_of(adapter.scaling, adapter.R) is None)
            raise Unrepresentable(
                f"convert: {shown(first.module)}: no lora_alpha makes lora_alpha / {first.R} exactly "
                f"{first.scaling!r}, and "
                "none for every layer / sqrt(r); expected such a scaling, or --fold to round it into lora_B"
            )
        r = Counter(adapter.R for adapter in adapters).most_common(1)[0][0]
        lora_alpha = Counter(alphas).most_common(1)[0][0]
        config = {
            "peft_type": "LORA",
            "use_dora": True,
            "r": r,
            "lora_alpha": lora_alpha,
            "use_rslora": use_rslora,
            "rank_pattern": {whole(adapter.module): adapter.R for adapter in adapters if adapter.R != r},
            "alpha_pattern": {
                whole(adapter.module): alpha
                for adapter, alpha in zip(adapters, alphas, strict=True)
                if alpha != lora_alpha
            },
            "target_modules": [adapter.module for adapter in adapters],
            "bias": "none",
            "lora_dropout": 0.0,
            "inference_mode": True,
        }
        return {}, config, {}


@dataclass(frozen=True)
class InMetadata:
    """diffusers' `lora_adapter_metadata` in the safetensors header, PEFT's config as JSON: of one model; or of several
    of a pipeline's, whose names begin the fields as they begin the modules. Else `<module>.alpha`, else alpha is R.

    The loaders of diffusers 0.42 take R where nothing states alpha, whatever it was in training (get_peft_kwargs in
    utils/peft_utils.py).
    """

    header: ClassVar[str] = "lora_adapter_metadata"

    def supposes(self, modules: Sequence[str], tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:
        """True where alpha is R for want of a word, and not even the keys are those that diffusers alone writes.

        PEFT's own begin with base_model.model. (transformer. is a GPT-2's own then) or have an adapter's name.
        """
        stated = self.header in header or any(key.endswith(".alpha") for key in tensors)
        return not stated and not all(component(key) and not _NAMED.search(key) for key in tensors)

    def read(self, tensors, ranks, config, header, alpha) -> dict[str, float]:
        scaling = self._of_header(ranks, header[self.header], alpha) if self.header in header else None
        if any(tensor is not None for tensor in tensors.values()):
            for module, tensor in tensors.items():
                if tensor is None:
                    raise ValueError(
                        f"convert: {shown(module)} has no alpha but others have; expected one for each, for diffusers "
                        "takes the commonest of the others'"
                    )
            by_tensor = InTensor(lenient=True).read(tensors, ranks, config, header, alpha)
            if scaling not in (None, by_tensor):
                raise ValueError(
                    f"convert: the header's {self.header} and the tensors named alpha say different scalings; expected "
                    "one of them"
                )
            return by_tensor
        if scaling is not None:
            return scaling
        if InHeader.header in header:
            raise ValueError(
                f"convert: the header has {InHeader.header}, for another format, which diffusers does not read; "
                "expected --from dora_kernels"
            )
        return {module: 1.0 if alpha is None else alpha / rank for module, rank in ranks.items()}

    def _of_header(self, ranks: Mapping[str, int], text: str, alpha: float | None) -> dict[str, float]:
        where = f"the header's {self.header}"
        if len(text) > HeaderConfig.most_bytes:
            raise ValueError(f"convert: {where} has {len(text)} letters; expected at most {HeaderConfig.most_bytes}")
        fields = parsed("convert", where, text, HeaderConfig).root
        parts: dict[str, dict[str, Any]] = {}
        for key, value in fields.items():
            name, dot, field = key.rpartition(".")
            parts.setdefault(f"{name}{dot}", {})[field] = value
        if "" in parts and len(parts) > 1:
            raise ValueError(f"convert: {where} has fields of {shown(sorted(parts))}; expected those of one kind")
        scaling = {}
        for module in ranks:
            if not any(module.startswith(part) for part in parts):
                raise ValueError(f"convert: {where} has no word of {shown(module)}; expected a config for it")
        for part, config in parts.items():
            within = {m.removeprefix(part): rank for m, rank in ranks.items() if m.startswith(part)}
            read = parsed("convert", where, json.dumps(config), AdapterConfig)
            config = {name: value for name, value in read if name in read.model_fields_set}
            if within:
                scaling |= {part + m: value for m, value in _peft_scaling(within, config, alpha, where).items()}
        return scaling

    def write(self, adapters: Sequence[DoraAdapter]) -> Written:
        parts: dict[str, list[DoraAdapter]] = {}
        for adapter in adapters:
            part = component(adapter.module)
            parts.setdefault(part, []).append(replace(adapter, module=adapter.module.removeprefix(part)))
        if "" in parts and len(parts) > 1:
            other = next(part for part in parts if part)
            raise ValueError(
                f"convert: {shown(parts[''][0].module)} begins with no model of a pipeline, but others with {other}; "
                "expected --rename to have all of them or none so, for diffusers reads those alone"
            )
        fields = {f"{part}{key}": v for part, of in parts.items() for key, v in InPeftConfig().write(of)[1].items()}
        return {}, {}, {self.header: json.dumps(fields, indent=2, sort_keys=True)}


def component(module: str) -> str:
    """The name of a pipeline's model, with its dot, that a module begins with in diffusers' files; "" where none."""
    match = _COMPONENT.match(module)
    return match[0] if match else ""


def _peft_scaling(
    ranks: Mapping[str, int], config: Mapping[str, Any], alpha: float | None, where: str = _FILE
) -> dict[str, float]:
    if not config.get("use_dora"):
        raise ValueError(f"convert: use_dora is {config.get('use_dora')} in {where}; expected true")
    _check_config(config, "LORA", where=where)
    # PEFT's own defaults
    r, lora_alpha = config.get("r", 8), _stated(config.get("lora_alpha", 8), alpha, "lora_alpha")
    _check_ranks(ranks, pattern_values("convert", "rank_pattern", config.get("rank_pattern"), ranks, r), where)
    alphas = pattern_values("convert", "alpha_pattern", config.get("alpha_pattern"), ranks, lora_alpha)
    use_rslora = bool(config.get("use_rslora"))
    return {module: lora_scaling(alphas[module], rank, use_rslora) for module, rank in ranks.items()}


def _stated(stated: float | None, given: float | None, name: str) -> float:
    """The alpha that the file states or the caller gives; ValueError where neither does, or they differ."""
    if stated is None and given is None:
        raise Unstated(f"convert: the source has no {shown(name)}; expected --alpha, the value it was trained with")
    if stated is not None and given is not None and stated != given:
        raise ValueError(
            f"convert: {shown(name)} is {stated!r:.80} in the source but --alpha is {given}; expected no --alpha"
        )
    value = given if stated is None else stated
    if not is_number(value):
        raise ValueError(f"convert: {shown(name)} is {value!r:.80}; expected a number that float64 holds")
    return value


def _check_config(config: Mapping[str, Any], peft_type: str, never: Sequence[str] = (), where: str = _FILE) -> None:
    """Raise ValueError for a field of adapter_config.json that changes what an adapter computes, and is not read here.

    fan_in_fan_out says how the base stores its weight, and the adapter's tensors are the same either way.
    """
    if config.get("peft_type", peft_type) != peft_type:
        raise ValueError(f"convert: peft_type is {config['peft_type']!r:.80} in {where}; expected {peft_type}")
    if config.get("use_dora") is False:
        raise ValueError(f"convert: use_dora is false in {where}; expected a DoRA adapter")
    allowed = {
        "bias": ("none",),
        "fan_in_fan_out": (True, False),
        "init_lora_weights": BASE_KEPT,
    }
    for field, value in config.items():
        read = field in _SILENT or (field in _READ and field not in never)
        if read or value in allowed.get(field, ()) and field not in never:
            continue
        if value not in (None, False, [], {}):
            raise ValueError(
                f"convert: {shown(field)} is {value!r:.80} in {where}, which a conversion cannot keep; "
                f"expected {' or '.join(map(repr, allowed[field])) if field in allowed else 'it unset'}"
            )


def _check_ranks(ranks: Mapping[str, int], stated: Mapping[str, int | None], where: str = _FILE) -> None:
    for module, rank in ranks.items():
        if stated[module] not in (None, rank):
            raise ValueError(
                f"convert: {shown(module)}: lora_A has rank {rank} but {where} says {stated[module]}; expected the same"
            )


def _alpha_of(adapter: DoraAdapter) -> int | float:
    alpha = alpha_of(adapter.scaling, adapter.R)
    if alpha is None:
        raise Unrepresentable(
            f"convert: {shown(adapter.module)}: no alpha makes alpha / {adapter.R} exactly {adapter.scaling!r}; "
            "expected such a scaling, or --fold to round it into lora_B"
        )
    return alpha


def _uniform(adapters: Sequence[DoraAdapter]) -> tuple[int, int | float]:
    """The one rank and the one alpha of all layers."""
    first = adapters[0]
    for adapter in adapters:
        if (adapter.R, adapter.scaling) != (first.R, first.scaling):
            raise Unrepresentable(
                f"convert: {shown(adapter.module)} has rank {adapter.R} and scaling {adapter.scaling!r} but "
                f"{shown(first.module)} {first.R} and {first.scaling!r}; "
                "expected the same, for the target has one of each for all layers"
            )
    return first.R, _alpha_of(first)
