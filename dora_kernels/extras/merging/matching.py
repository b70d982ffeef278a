"""The tensor of each adapted layer: by its name, with a prefix more or less, or as it is spelled elsewhere."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from dora_kernels.extras.convert.names import behind_prefix
from dora_kernels.files.reading import shown

HEADS = ("lm_head", "embed_out", "output_projection", "decoder")
"""transformers' names of the layer that may share its weight with the embedding."""
_WEIGHT = ".weight"
_MODULES = (
    (re.compile(r"^language_model\.lm_head$"), "lm_head"),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^(vision_tower|vision_model|visual|audio_tower|multi_modal_projector)\."), r"model.\1."),
    (re.compile(r"^model\.layers\."), "model.language_model.layers."),
)
"""transformers renames the tensors of models that see: modules have other names than most of their checkpoints
(https://github.com/huggingface/transformers/blob/main/src/transformers/conversion_mapping.py)."""
_COMPARED, _GUESSES = 2000, 4

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
        flat = _spelled(names, lambda name: name.replace(".", "_"))
        ends = [[end for end, _ in behind_prefix(module)] or [module] for module in modules]
        found = _found(modules, [of[0] for of in ends], flat) or _found(modules, [of[-1] for of in ends], flat)
        found = found or _prefixed(modules, [of[0] for of in ends], flat, "_")
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
    changes = _changes(min(spelled, key=len), names, dot)
    # by a generator: of 10^5 prefixes most fail with the first module
    served = [change for change in changes if all(_changed(name, change) in names for name in spelled)]
    if len(served) > 1:
        raise _ambiguous(modules[0], sorted(str(_changed(spelled[0], change)) for change in served))
    return _found(modules, [str(_changed(name, served[0])) for name in spelled], names) if served else None


def _changes(module: str, names: Iterable[str], dot: str) -> list[tuple[str, str]]:
    """(what is taken off, what is put before), one of them empty, that make one of the names of a module."""
    put = {name[: -len(module)] for name in names if name.endswith(dot + module)}
    known = set(names)
    off = {module[: at + 1] for at, letter in enumerate(module) if letter == dot and module[at + 1 :] in known}
    return [("", prefix) for prefix in sorted(put)] + [(prefix, "") for prefix in sorted(off)]


def _changed(name: str, change: tuple[str, str]) -> str | None:
    off, put = change
    return put + name[len(off) :] if name.startswith(off) else None


def _ambiguous(module: str, keys: Sequence[str]) -> ValueError:
    two = " and ".join(map(shown, keys[:2]))
    return ValueError(f"merge: {shown(module)} may be {two} in the base; expected --rename to say which")


def _unmatched(modules: Sequence[str], names: Mapping[str, str]) -> ValueError:
    """The error for one module that matches nothing, by the prefix with which most of the others match."""
    guesses = [("", ""), *_changes(modules[0], names, ".")[:_GUESSES], *_changes(modules[-1], names, ".")[:_GUESSES]]
    best = max(guesses, key=lambda change: sum(_changed(module, change) in names for module in modules))
    module = next((module for module in modules if _changed(module, best) not in names), modules[0])
    alike = [name for name in names if _last(name) == _last(module)] or list(names)
    near = difflib.get_close_matches(_changed(module, best) or module, alike[:_COMPARED], 1, 0.0)
    nearest = f", and the nearest is {shown(names[near[0]])}" if near else ""
    tied = ", or is tied to the embedding there" if _last(module) in HEADS else ""
    return ValueError(
        f"merge: {shown(module)} matches no weight of the base{tied}{nearest}; expected the base's names, or --rename"
    )


def _last(name: str) -> str:
    return name.rpartition(".")[2]
