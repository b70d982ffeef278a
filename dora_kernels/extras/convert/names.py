"""Modules' names of kohya's scripts and LyCORIS, which have underscores for dots, by those of the model beneath."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from dora_kernels.files.reading import shown

# before a module's name, of kohya's sd-scripts, OneTrainer and LyCORIS. A LyCORIS of one model has the short one, also
# where that model's names begin so: lycoris_transformer_blocks_0_... is Flux' transformer_blocks.0
_PREFIXES = (
    re.compile(r"(lora|lycoris)_(?P<model>unet|transformer|te\d?|text_encoder(_?\d)?|prior_unet|prior_te)_"),
    re.compile(r"(lora|lycoris)_(?P<model>)"),
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
    "te4": ("text_encoder_4.",),
}


def behind_prefix(module: str) -> list[tuple[str, str]]:
    """(what follows the prefix, the word in it for a model) for each prefix that a name may begin with; dotted ones
    have none."""
    matches = [prefix.match(module) for prefix in _PREFIXES] if "." not in module else []
    return [(module[match.end() :], match["model"]) for match in matches if match]


def dotted(modules: Sequence[str], keys: Iterable[str]) -> list[str]:
    """The names of modules by a model, `keys` those of its checkpoint: of each the one that is the same behind the
    prefix (lora_unet_, lora_te1_, lycoris_) but for dots, or else the one that ends so behind a dot. A module of
    another kind of name keeps it.

    Raises ValueError where none is it, or several are.
    """
    ends = {module: behind_prefix(module) for module in modules}
    found: dict[str, list[str]] = {end: [] for options in ends.values() for end, _ in options}
    if not found:
        return list(modules)
    for key in sorted(keys):
        name = key.removesuffix(".weight")
        parts = name.split(".") if name != key else []
        for start in range(len(parts)) if len(parts) < _MOST_PARTS else ():
            if (end := "_".join(parts[start:])) in found:
                found[end].append(name)
    return [_one(module, ends[module], found) if ends[module] else module for module in modules]


def _one(module: str, ends: Sequence[tuple[str, str]], found: Mapping[str, Sequence[str]]) -> str:
    """The one of the names that `module` is, of a model of its prefix and whole where there are such."""
    options = [(end, _MODELS.get(model, ())) for end, model in ends]
    of_models = [[name for name in found[end] if name.startswith(models)] for end, models in options]
    whole = (
        [name for name in names or found[end] if _is_whole(name, end, models)]
        for (end, models), names in zip(options, of_models, strict=True)
    )
    anywhere = (found[end] for end, _ in reversed(options))
    names = next(filter(None, (*whole, *of_models, *anywhere)), [])
    if len(names) != 1:
        several = f"may be {' or '.join(shown(name) for name in names[:3])}" if names else "is none of its modules"
        raise ValueError(
            f"convert: {shown(module)} {several}, with underscores for dots; expected one of the model's in base, "
            "or no base"
        )
    return names[0]


def _is_whole(name: str, end: str, models: tuple[str, ...]) -> bool:
    return any(name.removeprefix(start).replace(".", "_") == end for start in ("", *models))
