"""The tensor of each adapted layer: by its name, with a prefix more or less, or with underscores for its dots."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from dora_kernels.files.reading import shown

_WEIGHT = ".weight"
_KOHYA = re.compile(r"(lora|lycoris)_(unet|te\d?|transformer|prior_unet|prior_te|text_encoder\d?)_|lycoris_|lora_")
"""The words that kohya's sd-scripts, LyCORIS and others put before a module with underscores."""
_COMPARED = 2000


def match(modules: Sequence[str], keys: Iterable[str]) -> dict[str, str]:
    """{module: key}: the module's weight among the base's keys, one each.

    All modules as they are; or all with one and the same prefix put before or taken off; else, where none has a dot,
    against the base's names with underscores. Raises ValueError for a module that matches nothing, or two keys.
    """
    names = {key.removesuffix(_WEIGHT): key for key in keys if key.endswith(_WEIGHT)}
    found = _with_a_prefix(modules, {name: [key] for name, key in names.items()})
    if found is None and not any("." in module for module in modules):
        flat: dict[str, list[str]] = {}
        for name, key in names.items():
            flat.setdefault(name.replace(".", "_"), []).append(key)
        stripped = {_KOHYA.sub("", module, count=1) if _KOHYA.match(module) else module: module for module in modules}
        if len(stripped) == len(modules):
            found = _with_a_prefix(list(stripped), flat)
            found = found and {stripped[module]: key for module, key in found.items()}
    if found is None:
        raise _unmatched(modules, names)
    taken: dict[str, str] = {}
    for module, key in found.items():
        if key in taken:
            raise ValueError(f"merge: {shown(taken[key])} and {shown(module)} both are {shown(key)}; expected one")
        taken[key] = module
    return found


def _with_a_prefix(modules: Sequence[str], names: Mapping[str, list[str]]) -> dict[str, str] | None:
    """{module: key} as `match` gives them; None where no prefix serves for all modules."""
    changed = list(modules)
    if not all(module in names for module in modules):
        served = []
        for put, off in _prefixes(min(modules, key=len), names):
            changed = [put + module.removeprefix(off) for module in modules]
            if all(module.startswith(off) for module in modules) and all(name in names for name in changed):
                served.append(changed)
        if not served:
            return None
        if len(served) > 1:
            two = " and ".join(sorted(shown(changed[0]) for changed in served)[:2])
            raise ValueError(f"merge: {shown(modules[0])} may be {two}; expected --rename to say which")
        changed = served[0]
    for module, name in zip(modules, changed, strict=True):
        if len(names[name]) > 1:
            two = " and ".join(map(shown, names[name][:2]))
            raise ValueError(f"merge: {shown(module)} may be {two}; expected --rename to say which")
    return {module: names[name][0] for module, name in zip(modules, changed, strict=True)}


def _prefixes(module: str, names: Mapping[str, list[str]]) -> list[tuple[str, str]]:
    """(what is put before, what is taken off), one of them empty, by which the module would be one of the names."""
    dot = "." if any("." in name for name in names) else "_"
    put = {name[: -len(module)] for name in names if name.endswith(f"{dot}{module}")}
    off = {module[: at + 1] for at, letter in enumerate(module) if letter == dot and module[at + 1 :] in names}
    return [(prefix, "") for prefix in sorted(put)] + [("", prefix) for prefix in sorted(off)]


def _unmatched(modules: Sequence[str], names: Mapping[str, str]) -> ValueError:
    """The error for the first module that matches nothing, though others may."""
    ends = {name.rpartition(".")[2] for name in names}
    missing = next(
        (module for module in modules if module not in names and module.rpartition(".")[2] not in ends), None
    )
    missing = missing or next((module for module in modules if module not in names), modules[0])
    last = missing.rpartition(".")[2]
    like = [name for name in names if name.rpartition(".")[2] == last] or list(names)
    near = difflib.get_close_matches(missing, like[:_COMPARED], 1, 0.0)
    nearest = f"; the nearest is {shown(names[near[0]])}" if near else ""
    return ValueError(
        f"merge: {shown(missing)} is no layer of the base{nearest}; expected its modules' names, or --rename"
    )
