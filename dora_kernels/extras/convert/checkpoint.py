"""convert_checkpoint: one file or folder in, one out, and nothing written unless all of it can be kept."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from dora_kernels.extras.convert import files
from dora_kernels.extras.convert.adapter import DoraAdapter, Unrepresentable
from dora_kernels.extras.convert.coding import check_adapter_name, check_layers, decode, encode
from dora_kernels.extras.convert.formats import BIAS, FORMATS, Format
from dora_kernels.extras.convert.names import dotted
from dora_kernels.extras.convert.reading import read_adapters
from dora_kernels.extras.convert.scaling import One
from dora_kernels.files.reading import shown
from dora_kernels.files.writing import claimed
from dora_kernels.functional.arguments import (
    check_choice,
    check_flag,
    check_items,
    check_number,
    check_path,
    check_size,
    described,
)

# the layers whose rows torchtune keeps in another order than Hugging Face's models do
_ROTARY = ("q_proj", "k_proj")


def convert_checkpoint(
    source: str | PathLike[str],
    out: str | PathLike[str],
    source_format: str | None,
    target_format: str,
    *,
    alpha: float | None = None,
    base: str | PathLike[str] | None = None,
    no_bias: bool = False,
    fold: bool = False,
    rename: Sequence[tuple[str, str]] = (),
    heads: tuple[int, int] | None = None,
    same_rows: bool = False,
    allow_nonfinite: bool = False,
    adapter_name: str = "default",
) -> list[DoraAdapter]:
    """Write the adapters of `source` to `out` in another format, and return them as they are written.

    Tensors and scaling are the same to the last bit, and what is written decodes to them: else ValueError, and nothing
    is written. So it is for a layer, a setting or a key that the target has no counterpart of.

    source_format: None for the one that fits, as `read_adapters` finds it. alpha: for a source that does not state
    it. base: the model beneath (safetensors), or no_bias: the caller's word that no adapted layer has a bias; one of
    them is needed between formats that treat a bias differently. With base kohya's names (lora_unet_...) become those
    of its modules, before rename. fold: where the target cannot hold scaling exactly,
    round scaling * lora_B to lora_B's dtype. rename: (pattern, replacement) pairs for re.sub, applied to each module's
    name in turn. heads (query, key and value): between torchtune and the others, reorder the rows of q_proj and k_proj
    as torchtune does for Llama's rotary embedding; same_rows: the caller's word that this model's rows need none.
    allow_nonfinite: convert NaN and infinite values, which are refused by name else. adapter_name: written by llava.
    """
    return converted(
        source,
        out,
        source_format,
        target_format,
        alpha=alpha,
        base=base,
        no_bias=no_bias,
        fold=fold,
        rename=rename,
        heads=heads,
        same_rows=same_rows,
        allow_nonfinite=allow_nonfinite,
        adapter_name=adapter_name,
    )[1]


def converted(
    source: str | PathLike[str],
    out: str | PathLike[str],
    source_format: str | None,
    target_format: str,
    *,
    alpha: float | None,
    base: str | PathLike[str] | None,
    no_bias: bool,
    fold: bool,
    rename: Sequence[tuple[str, str]],
    heads: tuple[int, int] | None,
    same_rows: bool,
    allow_nonfinite: bool,
    adapter_name: str,
) -> tuple[str, list[DoraAdapter]]:
    """`convert_checkpoint`, which returns the format that the source was in besides."""
    for name, path in {"source": source, "out": out, "base": "." if base is None else base}.items():
        check_path("convert", name, path)
    source, out = Path(source), Path(out)
    if source_format is not None:
        check_choice("convert", "source_format", source_format, tuple(FORMATS))
    check_choice("convert", "target_format", target_format, tuple(FORMATS))
    writer = FORMATS[target_format]
    flags = {"no_bias": no_bias, "fold": fold, "same_rows": same_rows, "allow_nonfinite": allow_nonfinite}
    for name, flag in flags.items():
        check_flag("convert", name, flag)
    alpha = None if alpha is None else check_number("convert", "alpha", alpha)
    check_adapter_name(adapter_name)
    check_rename("convert", rename)
    heads = checked_heads("convert", heads, same_rows)
    files.check_out(out)
    with claimed("convert", out):
        name, before = read_adapters(source, source_format, alpha=alpha, allow_nonfinite=allow_nonfinite)
        reader = FORMATS[name]
        keys = None if base is None else set(files.keys_of(Path(base)))
        if keys is not None:
            before = _dotted(before, keys)
        adapters = with_names(before, rename)
        if reader.bias != writer.bias and not no_bias:
            differ = f"{reader.name} {BIAS[reader.bias]} and {writer.name} {BIAS[writer.bias]}"
            _check_bias(differ, before, adapters, base, keys)
        if (reader.name == "torchtune") != (writer.name == "torchtune"):
            adapters = with_rows(adapters, to_torchtune=writer.name == "torchtune", heads=heads, same_rows=same_rows)
        check_layers(writer, adapters)
        adapters = _fitted(writer, adapters, fold)
        checkpoint = encode(writer, adapters, adapter_name)
        again = decode(writer, checkpoint)
        if len(again) != len(adapters) or not all(a.same(b) for a, b in zip(adapters, again, strict=True)):
            raise RuntimeError(f"convert: what is written as {writer.name} does not read back as what it was made of")
        files.save(writer, checkpoint, out)
    return name, adapters


def table(adapters: Sequence[DoraAdapter]) -> str:
    """One line for each kind of layer: how many, their sizes, scaling and dtypes."""
    check_items("table", "adapters", adapters, DoraAdapter, "a DoraAdapter")
    rows = [("layers", "N", "K", "R", "scaling", "lora_A, lora_B", "magnitude")]
    kinds = Counter(
        (
            str(adapter.N),
            "x".join(map(str, adapter.lora_A.shape[1:])),
            str(adapter.R),
            f"{adapter.scaling:.6g}",
            _dtypes(adapter.lora_A, adapter.lora_B),
            "none" if adapter.magnitude is None else _dtypes(adapter.magnitude),
        )
        for adapter in adapters
    )
    rows += [(str(count), *kind) for kind, count in kinds.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _dtypes(*tensors: Tensor) -> str:
    return ", ".join(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors))


def check_rename(function: str, rename: Sequence[tuple[str, str]]) -> None:
    """Raise ValueError unless `rename` is a list of pairs of str."""
    check_items(function, "rename", rename, (tuple, list), "a pair (pattern, replacement)")
    for pair in rename:
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"{function}: rename has {described(pair)}; expected pairs (pattern, replacement) of str")


def checked_heads(function: str, heads: tuple[int, int] | None, same_rows: bool) -> tuple[int, int] | None:
    """`heads` as ints. Raises ValueError unless they are two positive ones, or None; and that beside same_rows."""
    if heads is None:
        return None
    if not isinstance(heads, (tuple, list)) or len(heads) != 2:
        counts = "the numbers of query and of key, value heads"
        raise ValueError(f"{function}: heads is {described(heads)}; expected {counts}")
    query, key = (check_size(function, f"heads[{index}]", count, 1) for index, count in enumerate(heads))
    if same_rows:
        raise ValueError(f"{function}: heads and same_rows are both given; expected one of them")
    return query, key


def with_names(adapters: Sequence[DoraAdapter], rename: Sequence[tuple[str, str]]) -> list[DoraAdapter]:
    """The adapters in the order of their new names. Raises ValueError where two get the same, or one gets none."""
    renamed: dict[str, DoraAdapter] = {}
    for adapter in adapters:
        module = adapter.module
        for pattern, replacement in rename:
            try:
                module = re.sub(pattern, replacement, module)
            except (re.error, IndexError, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"convert: rename is {pattern!r:.80}, {replacement!r:.80}: {error}; expected what re.sub takes"
                ) from error
        if not module or module in renamed:
            raise ValueError(
                f"convert: rename makes {module!r:.80} of {shown(adapter.module)}, "
                f"{'a name that another module has too' if module else 'no name'}; expected one name each"
            )
        renamed[module] = replace(adapter, module=module)
    return [renamed[module] for module in sorted(renamed)]


def _dotted(adapters: Sequence[DoraAdapter], keys: Collection[str]) -> list[DoraAdapter]:
    """By the names of the model beneath, where the adapters have kohya's. Raises ValueError where two become one."""
    result: dict[str, DoraAdapter] = {}
    for adapter, module in zip(adapters, dotted([adapter.module for adapter in adapters], keys), strict=True):
        if module in result:
            raise ValueError(f"convert: base has {shown(module)} for two adapters, one of them {shown(adapter.module)}")
        result[module] = replace(adapter, module=module)
    return [result[module] for module in sorted(result)]


def _check_bias(
    differ: str,
    before: Sequence[DoraAdapter],
    after: Sequence[DoraAdapter],
    base: str | PathLike[str] | None,
    keys: Collection[str] | None,
) -> None:
    """Raise ValueError unless the model beneath, by either's names, has no bias in any adapted layer."""
    if keys is None:
        raise ValueError(
            f"convert: {differ}, and adapters do not tell whether there is one; "
            "expected --no-bias where no adapted layer has a bias, or --base, the model's safetensors, to look"
        )
    names = {adapter.module for adapter in before}, {adapter.module for adapter in after}
    known = max(names, key=lambda modules: sum(f"{module}.weight" in keys for module in modules))
    for module in sorted(known):
        if f"{module}.weight" not in keys:
            raise ValueError(
                f"convert: {base} has no {shown(module)}.weight; expected the model beneath the adapters, or --no-bias"
            )
        if f"{module}.bias" in keys:
            raise ValueError(f"convert: {shown(module)} has a bias in {base}; expected none, for {differ}")


def with_rows(
    adapters: Sequence[DoraAdapter], to_torchtune: bool, heads: tuple[int, int] | None, same_rows: bool
) -> list[DoraAdapter]:
    """lora_B and magnitude of q_proj and k_proj with their rows in the target's order.

    A head's rows are D / 2 rotary pairs: Hugging Face has their first halves and then their second ones, torchtune
    each pair together.
    """
    result = []
    for adapter in adapters:
        kind = next((kind for kind in _ROTARY if adapter.module.endswith(kind)), None)
        if kind is None or same_rows:
            result.append(adapter)
            continue
        if heads is None:
            raise ValueError(
                f"convert: {shown(adapter.module)}: torchtune keeps the rows of {kind} in another order for "
                "Llama and its like; expected --heads, the numbers of query and of key and value heads, to reorder "
                "them, or --same-rows where this model's need none"
            )
        count = heads[_ROTARY.index(kind)]
        if adapter.N % (2 * count):
            raise ValueError(
                f"convert: {shown(adapter.module)} has {adapter.N} rows but {count} heads; expected "
                "a multiple of 2 * heads"
            )
        half = adapter.N // (2 * count)
        shape = (count, 2, half) if to_torchtune else (count, half, 2)
        rows = torch.arange(adapter.N).view(shape).transpose(1, 2).reshape(-1)
        magnitude = None if adapter.magnitude is None else adapter.magnitude[rows]
        result.append(replace(adapter, lora_B=adapter.lora_B[rows], magnitude=magnitude))
    return result


def _fitted(writer: Format, adapters: Sequence[DoraAdapter], fold: bool) -> list[DoraAdapter]:
    """The adapters with a scaling that the format can hold, folded into lora_B where it has to be."""
    if isinstance(writer.scaling, One):
        return [adapter.folded(rounding=fold) for adapter in adapters]
    try:
        writer.scaling.write(adapters)
    except Unrepresentable:
        if not fold:
            raise
        return [adapter.folded(rounding=True) for adapter in adapters]
    return list(adapters)
