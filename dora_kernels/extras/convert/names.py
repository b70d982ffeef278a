"""Modules' names of kohya's scripts and LyCORIS, which have underscores for dots, by those of the model beneath."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from dora_kernels.files.reading import shown

_PREFIX = re.compile(
    r"(lora|lycoris)_(?P<model>unet|transformer|te[123]?|text_encoder(_[23])?|prior_unet|prior_te)_|lycoris_|lora_"
)
_MOST_PARTS = 64  # of a module's name
# the models of a pipeline of diffusers' that each prefix is of; one of other names may be the model, if no such has it
_MODELS = {
    "unet": ("unet.", "transformer."),
    "transformer": ("transformer.",),
    "te": ("text_encoder.",),
    "te1": ("text_encoder.",),
    "te2": ("text_encoder_2.",),
    "te3": ("text_encoder_3.",),
}


def dotted(modules: Sequence[str], keys: Iterable[str]) -> list[str]:
    """The names of modules by a model, `keys` those of its checkpoint: of each the one that is the same behind the
    prefix (lora_unet_, lora_te1_, lycoris_) but for dots, or else the one that ends so behind a dot. A module of
    another kind of name keeps it.

    Raises ValueError where none is it, or several are.
    """
    matches = {module: _PREFIX.match(module) for module in modules if "." not in module}
    ends = {module: module[match.end() :] for module, match in matches.items() if match}
    if not ends:
        return list(modules)
    found: dict[str, list[str]] = {end: [] for end in ends.values()}
    for key in sorted(keys):
        name = key.removesuffix(".weight")
        parts = name.split(".") if name != key else []
        for start in range(len(parts)) if len(parts) < _MOST_PARTS else ():
            if (end := "_".join(parts[start:])) in found:
                found[end].append(name)
    return [_one(module, matches[module], found[ends[module]]) if module in ends else module for module in modules]


def _one(module: str, match: re.Match[str], found: list[str]) -> str:
    """The one of the names that `module` is, of a model of its prefix and whole where there are such."""
    end, models = module[match.end() :], _MODELS.get(match["model"] or "", ())
    found = [name for name in found if name.startswith(models)] or found
    found = [name for name in found if end in {_flat(name.removeprefix(start)) for start in ("", *models)}] or found
    if len(found) != 1:
        several = f"may be {' or '.join(shown(name) for name in found[:3])}" if found else "is none of its modules"
        raise ValueError(
            f"convert: {shown(module)} {several}, with underscores for dots; expected one of the model's in base, "
            "or no base"
        )
    return found[0]


def _flat(name: str) -> str:
    return name.replace(".", "_")
