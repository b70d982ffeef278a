"""Checkpoints to adapters and back: decode and encode, by a format's row; every key is accounted for."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from dora_kernels.extras.convert.adapter import DoraAdapter, check_shapes
from dora_kernels.extras.convert.formats import Checkpoint, Format
from dora_kernels.extras.convert.scaling import Unstated
from dora_kernels.files.reading import shown
from dora_kernels.functional.arguments import check_items, check_number, check_type, described

# what trainers for ComfyUI say in the header where their rows are its: m n(W) / n(W + s B A), as of
# https://github.com/akatsuki-neo/anima-edit/blob/156a6221e4892b14cc24548eb71a869bd46ba6ec/networks/dora.py
_COMFY_HEADERS = {
    "ss_dora_format": "comfyui",
    "ss_dora_scale_format": "comfy_weight_norm",
    "anima_dora_scale_format": "comfy_output_axis_adjusted",
}


def decode(row: Format, checkpoint: Checkpoint, alpha: float | None = None) -> list[DoraAdapter]:
    """The adapters of a checkpoint, by module name; `alpha` where the checkpoint has none.

    Raises ValueError for a key that is not the format's, a tensor that is missing or of another shape, an adapter
    without a magnitude where the format has no plain LoRA beside others, and whatever the format's scaling refuses.
    """
    check_type("convert", "row", row, Format, "one of FORMATS' values")
    check_type("convert", "checkpoint", checkpoint, Checkpoint, "a Checkpoint")
    alpha = None if alpha is None else check_number("convert", "alpha", alpha)
    modules = _sort_keys(row, checkpoint.tensors)
    if not modules:
        raise ValueError(f"convert: the source has no tensors; expected {row.name} adapters")
    mixed = row.mixed and any("magnitude" in tensors for tensors in modules.values())
    for module, tensors in modules.items():
        for part in ("lora_A", "lora_B", "magnitude"):
            if part not in tensors and not (part == "magnitude" and mixed):
                plain = " (a plain LoRA is not converted)" if part == "magnitude" else ""
                key = getattr(row, part)
                raise ValueError(f"convert: {shown(module)} has no {part}; expected a {shown(module)}.{key}{plain}")
        check_shapes(module, tensors["lora_A"], tensors["lora_B"])
    if row.asked is not None and alpha is None:
        key = next((key for key in sorted(checkpoint.tensors) if re.search(rf"\.{row.asked[0]}$", key)), None)
        if key is not None:
            raise Unstated(f"convert: {shown(key)}: {row.asked[1]}")
    ranks = {module: tensors["lora_A"].shape[0] for module, tensors in modules.items()}
    alphas = {module: tensors.get("alpha") for module, tensors in modules.items()}
    scaling = row.scaling.read(alphas, ranks, checkpoint.config, checkpoint.header, alpha)
    adapters = []
    for module, tensors in sorted(modules.items()):
        lora_A, lora_B, magnitude = tensors["lora_A"], tensors["lora_B"], tensors.get("magnitude")
        _check_conv(row, module, lora_A.ndim)
        if magnitude is None:
            adapters.append(DoraAdapter(module, lora_A, lora_B, None, float(scaling[module])))
            continue
        shapes = row.shapes(lora_A.ndim, lora_B.shape[0], lora_A.shape[1])
        axis = next((axis for axis, shape in shapes.items() if shape == tuple(magnitude.shape)), None)
        if axis in row.axes:
            raise ValueError(f"convert: {shown(module)} has {row.axes[axis]}")
        said = next((key for key, value in _COMFY_HEADERS.items() if checkpoint.header.get(key) == value), None)
        if said is not None and axis == "out":
            raise ValueError(
                f"convert: {shown(module)} has a norm over rows, and by the header's {said} that of the base's weight "
                "alone and not of the sum, as ComfyUI takes it; expected one of the sum"
            )
        if axis is None:
            known = [str(shape) for axis, shape in shapes.items() if axis not in row.axes]
            expected = " or ".join(known) or "a layer of more than one row"
            raise ValueError(
                f"convert: {shown(module)}: {row.magnitude} has shape {tuple(magnitude.shape)}; expected {expected}"
            )
        adapters.append(DoraAdapter(module, lora_A, lora_B, magnitude.reshape(-1), float(scaling[module]), axis))
    return adapters


def encode(row: Format, adapters: Sequence[DoraAdapter], adapter_name: str = "default") -> Checkpoint:
    """The checkpoint that decodes to exactly these adapters.

    Raises ValueError where the format has no such layer, and Unrepresentable where it cannot hold the scaling.
    """
    check_type("convert", "row", row, Format, "one of FORMATS' values")
    check_items("convert", "adapters", adapters, DoraAdapter, "a DoraAdapter")
    if not adapters:
        raise ValueError("convert: adapters is empty; expected at least one")
    modules = [adapter.module for adapter in adapters]
    if len(set(modules)) != len(modules):
        raise ValueError(f"convert: adapters are of {described(modules)}; expected modules of different names")
    check_adapter_name(adapter_name)
    check_layers(row, adapters)
    alphas, config, header = row.scaling.write(adapters)
    tensors = {}
    for adapter in adapters:
        shapes = row.shapes(adapter.ndim, adapter.N, adapter.K)
        parts = {
            "lora_A": adapter.lora_A,
            "lora_B": adapter.lora_B,
            "magnitude": None if adapter.magnitude is None else adapter.magnitude.reshape(shapes[adapter.norm_axis]),
            "alpha": alphas.get(adapter.module),
        }
        for part, suffix in row.parts().items():
            if part == "magnitude" and adapter.magnitude is None:
                continue
            tensors[f"{row.prefix}{adapter.module}.{suffix.format(adapter=adapter_name)}"] = parts[part]
    return Checkpoint(tensors, config, header)


def check_layers(row: Format, adapters: Sequence[DoraAdapter]) -> None:
    """Raise ValueError for a layer that the format has no word for."""
    for adapter in adapters:
        _check_conv(row, adapter.module, adapter.ndim)
        if adapter.magnitude is None and not row.mixed:
            raise ValueError(
                f"convert: {shown(adapter.module)} has no magnitude, a plain LoRA among others, which {row.name} has "
                "no word for; expected a magnitude for every layer"
            )
        if adapter.magnitude is not None and adapter.norm_axis in row.axes:
            raise ValueError(f"convert: {shown(adapter.module)} has {row.axes[adapter.norm_axis]}")
        if adapter.magnitude is not None and adapter.norm_axis not in row.shapes(adapter.ndim, adapter.N, adapter.K):
            raise ValueError(
                f"convert: {shown(adapter.module)}: its norm is over each input column (LyCORIS with "
                f"wd_on_out=False), which {row.name} does not know{' of one row' * (adapter.N == 1)}; expected one "
                "over each output row"
            )


def check_adapter_name(adapter_name: str) -> None:
    """Raise ValueError unless this can be an adapter's name in a key."""
    if not isinstance(adapter_name, str) or not re.fullmatch(r"[^.]+", adapter_name):
        raise ValueError(f"convert: adapter_name is {described(adapter_name)}; expected a name without dots")


def _check_conv(row: Format, module: str, ndim: int) -> None:
    if ndim > 2 and not row.conv:
        raise ValueError(
            f"convert: {shown(module)}: lora_A has {ndim} dimensions, a convolution's, which {row.name} does not know; "
            "expected (R, K)"
        )


def known_keys(row: Format, tensors: Mapping[str, Tensor]) -> int:
    """The number of keys that the format knows, if only as what is refused, of the first thousand."""
    first = itertools.islice(tensors, 1000)
    return sum(_match(row, key)[0] is not None or _why_refused(row, key) is not None for key in first)


def begins(row: Format, tensors: Mapping[str, Tensor]) -> str:
    """The prefix of the format's that every key begins with, "" where there is none."""
    prefix = row.prefix or row.stripped
    return prefix if prefix and all(key.startswith(prefix) for key in tensors) else ""


def _sort_keys(row: Format, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{module: {part: tensor}}; every key is accounted for, or ValueError."""
    prefix = begins(row, tensors)
    modules: dict[str, dict[str, Tensor]] = {}
    names: dict[str, str] = {}
    for key in sorted(tensors):
        name = key.removeprefix(prefix)
        module, part, adapter = _match(row, name)
        if module is None:
            reason = _why_refused(row, name)
            if reason is not None:
                raise ValueError(f"convert: {shown(key)}: {reason}")
            expected = ", ".join(f"<module>.{suffix}" for suffix in row.parts().values())
            raise ValueError(f"convert: {shown(key)} is no key of {row.name}; expected only {expected}")
        if part in modules.setdefault(module, {}):
            raise ValueError(f"convert: {shown(key)}: {shown(module)} has a {part} of another name too; expected one")
        if adapter:  # a magnitude or an alpha may be by no adapter's name
            names.setdefault(adapter, key)
        if len(names) > 1:
            raise ValueError(f"convert: the source holds adapters {shown(sorted(names))}; expected one")
        modules[module][part] = tensors[key]
    return modules


def _why_refused(row: Format, name: str) -> str | None:
    return next((why for pattern, why in row.refused.items() if re.fullmatch(rf"(.+\.)?{pattern}", name)), None)


@functools.cache
def _pattern(suffix: str) -> re.Pattern[str]:
    suffix = re.escape(suffix).replace(r"\{adapter\}", r"(?P<adapter>[^.]+)")
    return re.compile(rf"(?P<module>.+)\.{suffix}")


def _match(row: Format, name: str) -> tuple[str | None, str, str]:
    """(module, part, adapter's name) of a key; module is None where it is no key of the format."""
    for part, suffix in row.names():
        if match := _pattern(suffix).fullmatch(name):
            return match["module"], part, match.groupdict().get("adapter", "")
    return None, "", ""
