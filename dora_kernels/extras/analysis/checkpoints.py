"""Checkpoints on disk: what of a model changed, from dense ones and from PEFT's adapter folders.

Headers are read first, so that what does not fit is refused before anything is computed; a layer's tensors are read
when it is measured. What an adapter means is PEFT's: scaling = alpha / r, or alpha / sqrt(r) if rank-stabilised, with
the layer's own r and alpha where a pattern names it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dora_kernels.extras.analysis.layers import Analysis, Layer, LeftOut, Track, measure
from dora_kernels.extras.analysis.measure import adapter_change, weight_change
from dora_kernels.extras.checkpoint_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_KEPT,
    PREFIX,
    TensorFiles,
    lora_scaling,
    open_model,
)
from dora_kernels.extras.patterns import pattern_values
from dora_kernels.extras.schema import read_config
from dora_kernels.files.reading import shown
from dora_kernels.functional.arguments import check_callable, check_flag, check_path, check_type

FLOATS = ("F16", "BF16", "F32", "F64")
"""safetensors' names of the dtypes of a dense weight."""

UNKNOWN_MEANINGS = (
    "target_parameters",
    "layer_replication",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
)
"""Options of LoraConfig under which the tuned weight is not W + scaling * B A, or is not one."""

MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
"""The ends of a magnitude's key: written by save_pretrained, and in a state dict of one adapter."""

_LORA_A = ".lora_A.weight"


def analyze(
    base: str | Path,
    tuned: Sequence[str | Path],
    targets: str | None = None,
    fan_in_fan_out: bool = False,
    track: Track = iter,
) -> Analysis:
    """The change of every layer of each checkpoint in `tuned`, several of one run or of many, against `base`.

    base: a safetensors file, or a folder with model.safetensors or its shards. tuned: PEFT's adapter folders (LoRA,
    DoRA), and dense checkpoints of which every 2-D weight is compared. targets: a regular expression that is searched
    for in a layer's name. fan_in_fan_out: dense weights are (K, N), as GPT-2's; an adapter's own config says it of
    that adapter. Only one layer is in memory at a time.

    Raises ValueError, before anything is computed, where a checkpoint cannot be read, does not fit the base, or means
    something else than W + scaling * B A; what is left out is named in the result.
    """
    check_path("analyze", "base", base)
    check_type("analyze", "tuned", tuned, (tuple, list), "a list of paths")
    for index, path in enumerate(tuned):
        check_path("analyze", f"tuned[{index}]", path)
    if targets is not None:
        check_type("analyze", "targets", targets, str, "a regular expression, or None")
    check_flag("analyze", "fan_in_fan_out", fan_in_fan_out)
    check_callable("analyze", "track", track)
    if not tuned:
        raise ValueError("analyze: tuned is empty; expected one checkpoint or more")
    try:
        wanted = re.compile(targets or "")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"analyze: targets is {targets!r:.80}: {error}; expected a regular expression") from error
    pretrained = open_model("analyze", Path(base))
    layers: list[Layer] = []
    left_out: list[LeftOut] = []
    for path in map(Path, tuned):
        if os.path.lexists(path / ADAPTER_CONFIG):
            found, skipped = adapter_layers(pretrained, path)
        else:
            found, skipped = dense_layers(pretrained, open_model("analyze", path), fan_in_fan_out)
        found, skipped = ([entry for entry in group if wanted.search(entry.name)] for group in (found, skipped))
        if not found:
            expected = "a layer" if targets is None else f"a layer in whose name {targets!r} is found"
            reasons = "; ".join(dict.fromkeys(entry.reason for entry in skipped)) or "no such layer"
            raise ValueError(f"analyze: {path} has nothing to compare with {base} ({reasons}); expected {expected}")
        layers += found
        left_out += skipped
    return measure(layers, left_out, track)


def dense_layers(base: TensorFiles, tuned: TensorFiles, fan_in_fan_out: bool) -> tuple[list[Layer], list[LeftOut]]:
    """Every 2-D weight that both have."""
    adapters = [key for key in tuned.shapes if ".lora_A." in key]
    if adapters:
        raise ValueError(
            f"analyze: {tuned} holds {shown(adapters[0])}; expected an adapter as its folder with {ADAPTER_CONFIG}"
        )
    layers, left_out = [], []
    for key, shape in tuned.shapes.items():
        name = key.removesuffix(".weight")
        if len(shape) != 2:
            reason = f"{len(shape)}-D tensors are not compared"
        elif key not in base:
            reason = f"not in {base}"
        elif base.shapes[key] != shape:
            reason = f"the shape is {shape}, the base's is {base.shapes[key]}"
        else:
            reason = _why_not_dense(base, key) or _why_not_dense(tuned, key)
        if reason:
            left_out.append(LeftOut(name, str(tuned), reason))
            continue

        def change(key: str = key) -> Any:
            pair = base[key], tuned[key]
            return weight_change(*(w.T if fan_in_fan_out else w for w in pair))

        layers.append(Layer(name, str(tuned), "full", change))
    left_out += [
        LeftOut(key.removesuffix(".weight"), str(tuned), "only in the base")
        for key, shape in base.shapes.items()
        if len(shape) == 2 and key not in tuned
    ]
    return layers, left_out


def adapter_layers(base: TensorFiles, folder: Path) -> tuple[list[Layer], list[LeftOut]]:
    """Every linear layer that the adapter in `folder` changes."""
    config = _adapter_config(folder)
    if not os.path.lexists(folder / ADAPTER_WEIGHTS):
        raise ValueError(f"analyze: {folder} has no {ADAPTER_WEIGHTS}; expected the adapter as safetensors")
    adapter = TensorFiles("analyze", folder / ADAPTER_WEIGHTS, [folder / ADAPTER_WEIGHTS])
    stems = [key.removesuffix(_LORA_A) for key in adapter.shapes if key.endswith(_LORA_A)]
    names = {stem: stem.removeprefix(PREFIX) for stem in stems}
    ranks, alphas = (
        pattern_values("analyze", f"{shown(folder / ADAPTER_CONFIG)}: {field}", config[field], names.values(), default)
        for field, default in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"]))
    )
    known, layers, left_out = set(), [], []
    for stem, name in names.items():
        key_A, key_B = stem + _LORA_A, f"{stem}.lora_B.weight"
        shape_A = adapter.shapes[key_A]
        magnitudes = [stem + end for end in MAGNITUDES if stem + end in adapter]
        keys = (key_A, key_B, *magnitudes)
        known |= set(keys)
        if len(shape_A) != 2:
            left_out.append(LeftOut(name, str(folder), f"a convolution: lora_A has shape {shape_A}"))
            continue
        shape_B = adapter.shapes.get(key_B)
        key = _base_key(base, f"{name}.weight")
        if key is None:
            raise ValueError(
                f"analyze: {base} has no {shown(name)}.weight, which {folder} changes; expected the adapter's base"
            )
        if reason := _why_not_dense(base, key):
            raise ValueError(f"analyze: {shown(key)} of {base}: {reason}; expected a base that is not quantized")
        N, K = base.shapes[key][:: -1 if config["fan_in_fan_out"] else 1]
        R, scaling = ranks[name], lora_scaling(alphas[name], ranks[name], config["use_rslora"])
        if shape_A != (R, K) or shape_B != (N, R):
            raise ValueError(
                f"analyze: {shown(name)} of {folder} has lora_A {shape_A} and lora_B {shape_B}; "
                f"expected {(R, K)} and {(N, R)} for rank {R} over the base's weight {(N, K)}"
            )
        if bool(magnitudes) != config["use_dora"]:
            has = "a magnitude" if magnitudes else "no magnitude"
            raise ValueError(
                f"analyze: {shown(name)} of {folder} has {has}; expected use_dora={config['use_dora']} to be right"
            )
        if magnitudes and (len(magnitudes) > 1 or math.prod(adapter.shapes[magnitudes[0]]) != N):
            shapes = " and ".join(str(adapter.shapes[magnitude]) for magnitude in magnitudes)
            raise ValueError(f"analyze: {shown(name)} of {folder} has a magnitude of shape {shapes}; expected {(N,)}")
        for part in keys:
            if adapter.dtypes[part] not in FLOATS:
                raise ValueError(
                    f"analyze: {shown(part)} of {folder} is stored as {adapter.dtypes[part]}; expected "
                    f"{', '.join(FLOATS)}"
                )

        def change(key: str = key, keys: tuple[str, ...] = keys, s: float = scaling) -> Any:
            weight = base[key].T if config["fan_in_fan_out"] else base[key]
            lora_A, lora_B, *magnitude = (adapter[k] for k in keys)
            return adapter_change(weight, lora_A, lora_B, s, *(m.flatten() for m in magnitude))

        layers.append(Layer(name, str(folder), "DoRA" if magnitudes else "LoRA", change))
    for key in adapter.shapes.keys() - known:
        stem = key.removesuffix(".lora_magnitude_vector").partition(".lora_embedding_")[0]
        embedding = f"{stem}.lora_embedding_A" in adapter
        reason = "an embedding" if embedding else "not lora_A, lora_B or magnitude of a linear layer"
        left_out.append(LeftOut(key.removeprefix(PREFIX), str(folder), reason))
    return layers, sorted(left_out, key=lambda entry: entry.name)


def _adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json with PEFT's defaults; ValueError where the adapter is not W + scaling * B A."""
    read = read_config("analyze", folder / ADAPTER_CONFIG)
    if read.get("peft_type") != "LORA":
        raise ValueError(
            f"analyze: {folder} has peft_type {read.get('peft_type')!r:.80}; expected 'LORA', with or without DoRA"
        )
    initial = read.get("init_lora_weights", True)
    if initial not in BASE_KEPT:
        raise ValueError(
            f"analyze: {folder} has init_lora_weights {initial!r:.80}, which changes the base weight; expected an "
            "adapter converted to plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for option in UNKNOWN_MEANINGS:
        if read.get(option):
            raise ValueError(f"analyze: {folder} has {option} {read[option]!r:.80}; expected plain LoRA or DoRA")
    flags = {name: bool(read.get(name)) for name in ("use_dora", "use_rslora", "fan_in_fan_out")}
    return {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}} | read | flags


def _base_key(base: TensorFiles, key: str) -> str | None:
    """`key`, or the one key that is it but for a prefix: a model with a head has one that the bare model lacks."""
    if key in base:
        return key
    shorter = (key[place + 1 :] for place, letter in enumerate(key) if letter == ".")
    found = [*base.ending_with(f".{key}"), *(other for other in shorter if other in base)]
    return found[0] if len(found) == 1 else None


def _why_not_dense(checkpoint: TensorFiles, key: str) -> str | None:
    """The reason why a tensor is not the weight itself."""
    if checkpoint.dtypes[key] not in FLOATS:
        return f"it is stored as {checkpoint.dtypes[key]}"
    if len(checkpoint.shapes[key]) != 2:
        return f"its shape is {checkpoint.shapes[key]}"
    return None
