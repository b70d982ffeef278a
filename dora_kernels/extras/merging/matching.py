"""The tensor of each adapted layer: by its name, with a prefix more or less, or as it is spelled elsewhere."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from dora_kernels.files.reading import shown

HEADS = ("lm_head", "embed_out", "output_projection", "decoder")
"""transformers' names of the layer that may share its weight with the embedding."""
_WEIGHT = ".weight"
_KOHYA = re.compile(r"(lora|lycoris)_(unet|te\d?|transformer|prior_unet|prior_te|text_encoder\d?)_|lycoris_|lora_")
"""The words that kohya's sd-scripts, LyCORIS and others put before a module with underscores."""
_MODULES = (
    (re.compile(r"^language_model\.lm_head$"), "lm_head"),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^(vision_tower|multi_modal_projector|visual)\."), r"model.\1."),
    (re.compile(r"^model\.layers\."), "model.language_model.layers."),
)
"""transformers renames the tensors of models that see: modules have other names than most of their checkpoints
(https://github.com/huggingface/transformers/blob/main/src/transformers/conversion_mapping.py)."""
_COMPARED = 2000

Names = Mapping[str, Sequence[str]]


def match(modules: Sequence[str], keys: Iterable[str]) -> dict[str, str]:
    """{module: key}: the weight of each module among the base's keys, no two the same.

    All modules are looked for as they are; then with one prefix put before all or taken off; by transformers' names for
    the parts of models that see; and, where none has a dot, against the base's names with underscores. Raises
    ValueError for a module that matches nothing, or two keys.
    """
    names = {key.removesuffix(_WEIGHT): key for key in keys if key.endswith(_WEIGHT)}
    plain = _spelled(names, lambda name: name)
    found = _found(modules, list(modules), plain) or _prefixed(modules, list(modules), plain, ".")
    if found is None:
        found = _found(modules, [_in_transformers(module) for module in modules], _spelled(names, _in_transformers))
    if found is None and not any("." in module for module in modules):
        spelled = [_KOHYA.sub("", module, count=1) if _KOHYA.match(module) else module for module in modules]
        flat = _spelled(names, lambda name: name.replace(".", "_"))
        found = _found(modules, spelled, flat) or _prefixed(modules, spelled, flat, "_")
    if found is None:
        raise _unmatched(modules, names)
    taken: dict[str, str] = {}
    for module, key in found.items():
        if key in taken:
            raise ValueError(f"merge: {shown(taken[key])} and {shown(module)} both are {shown(key)}; expected one")
        taken[key] = module
    return found


def _spelled(names: Mapping[str, str], spell: Callable[[str], str]) -> Names:
    result: dict[str, list[str]] = {}
    for name, key in names.items():
        result.setdefault(spell(name), []).append(key)
    return result


def _in_transformers(name: str) -> str:
    for pattern, replacement in _MODULES:
        name, times = pattern.subn(replacement, name)
        if times:
            break
    return name


def _found(modules: Sequence[str], spelled: Sequence[str], names: Names) -> dict[str, str] | None:
    """{module: key} by its spelling; None unless all are there. Raises ValueError where one may be two keys."""
    if not all(name in names for name in spelled):
        return None
    for module, name in zip(modules, spelled, strict=True):
        if len(names[name]) > 1:
            raise _ambiguous(module, names[name])
    return {module: names[name][0] for module, name in zip(modules, spelled, strict=True)}


def _prefixed(modules: Sequence[str], spelled: Sequence[str], names: Names, dot: str) -> dict[str, str] | None:
    """{module: key} with one prefix before all, or taken off all; None where none serves."""
    first = min(spelled, key=len)
    put = {name[: -len(first)] for name in names if name.endswith(dot + first)}
    off = {first[: at + 1] for at, letter in enumerate(first) if letter == dot and first[at + 1 :] in names}
    # by generators: of 10^5 prefixes most fail with the first module
    before = [prefix for prefix in put if all(prefix + name in names for name in spelled)]
    begun = [prefix for prefix in off if all(name.startswith(prefix) for name in spelled)]
    after = [prefix for prefix in begun if all(name[len(prefix) :] in names for name in spelled)]
    ways = [[prefix + name for name in spelled] for prefix in before]
    ways += [[name[len(prefix) :] for name in spelled] for prefix in after]
    if len(ways) > 1:
        raise _ambiguous(modules[0], sorted(way[0] for way in ways))
    return _found(modules, ways[0], names) if ways else None


def _ambiguous(module: str, keys: Sequence[str]) -> ValueError:
    two = " and ".join(map(shown, keys[:2]))
    return ValueError(f"merge: {shown(module)} may be {two} in the base; expected --rename to say which")


def _unmatched(modules: Sequence[str], names: Mapping[str, str]) -> ValueError:
    """The error for one module that matches nothing: of a kind that the base lacks, if there is such a one."""
    kinds = {_last(name) for name in names}
    missing = [module for module in modules if module not in names] or list(modules)
    module = next((module for module in missing if _last(module) not in kinds), missing[0])
    alike = [name for name in names if _last(name) == _last(module)] or list(names)
    near = difflib.get_close_matches(module, alike[:_COMPARED], 1, 0.0)
    nearest = f", and the nearest is {shown(names[near[0]])}" if near else ""
    tied = ", or is tied to the embedding there" if _last(module) in HEADS else ""
    return ValueError(
        f"merge: {shown(module)} matches no weight of the base{tied}{nearest}; expected the base's names, or --rename"
    )


def _last(name: str) -> str:
    return name.rpartition(".")[2]
