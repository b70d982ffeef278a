"""Refusals of what a model can no longer do once `serving.merge_model` has put its adapters into the weights.

A PEFT model, its tuner and its base model share a dict of configs; the forks of NVlabs/DoRA have one config. Their
save_pretrained and get_peft_model_state_dict, transformers' and diffusers' own saving, disable_adapter and load_adapter
of another adapter begin with it. For a merged adapter they would write an empty file, or leave it on. So its config is
replaced by one that raises when it is asked for its `bias`: all of these ask, and neither forward nor generate nor
merge_and_unload does. Loading the adapter again asks for nothing, and skips what finds no place: a hook refuses it.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from dora_kernels.adapters.taking import TakenOver

CONFIGS = "peft_config"
"""The attribute of a model with the configs by adapter name, or with the one config."""

PARTS = "adapter_layer_names"
"""The attribute of PEFT's layers that names those which hold their parts by adapter name."""

MESSAGE = (
    "serving.merge_model has put this adapter into the weights, and nothing is left of it to be saved, loaded, "
    "switched off or mixed with another; expected to go on with what model.merge_and_unload() returns or, where "
    "transformers added the adapter itself, after model.delete_adapter()"
)


class Merged:
    """The config of an adapter that is merged away: as it was, but for `bias`, which saving asks for first."""

    @property
    def bias(self) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(MESSAGE)

    def __repr__(self) -> str:
        return f"<{type(self).__bases__[-1].__name__} of an adapter that serving.merge_model has merged>"

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return _rebuild, (type(self).__bases__[-1],), vars(self)


class Promises:
    """The configs of the adapters of a model's layers.

    Raises ValueError where a layer of PEFT's has none in `model`: a wrapper around it would go on with its promise.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = [_Held(module) for module in model.modules() if _configs(module) is not None]
        for name, module in model.named_modules():
            if isinstance(module, TakenOver) and hasattr(module, PARTS):
                if not any(id(module) in held.paths for held in self._held):
                    raise ValueError(
                        f"merge_model: {name} is part of a PEFT model whose {CONFIGS} is out of reach; expected the "
                        f"model that has it: PEFT's wrapper, or its base model"
                    )

    def withdraw(self, layer: nn.Module) -> None:
        """Make the configs say that the adapters of `layer` are gone."""
        for held in self._held:
            held.withdraw(layer)


class _Held:
    """The configs that one module has of the adapters inside it."""

    def __init__(self, holder: nn.Module) -> None:
        self.holder = holder
        # by id: a layer is let go once it is merged
        self.paths: dict[int, list[str]] = {}
        for path, module in holder.named_modules(remove_duplicate=False):
            self.paths.setdefault(id(module), []).append(path)
        self.gone: set[str] = set()

    def withdraw(self, layer: nn.Module) -> None:
        """Promises.withdraw for this module, if `layer` is inside it."""
        if id(layer) not in self.paths:
            return
        configs = _configs(self.holder)
        if isinstance(configs, dict):
            configs.update({name: _merged(configs[name]) for name in _adapters(layer) & configs.keys()})
        else:
            setattr(self.holder, CONFIGS, _merged(configs))
        if not self.gone:
            self.holder.register_load_state_dict_pre_hook(functools.partial(_refuse, self.gone))
        parts = {*layer._modules, *layer._parameters, *layer._buffers}
        self.gone.update(f"{path}.{part}" for path in self.paths[id(layer)] for part in parts)


def _refuse(gone: set[str], module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Raises ValueError where load_state_dict has numbers for a part of a merged layer that is not there again.

    They may have the adapter's name or not: PEFT puts it into the keys of layers that it finds.
    """
    for key in state:
        names = key.removeprefix(prefix).split(".") if key.startswith(prefix) else ()
        for path in itertools.accumulate(names, "{}.{}".format):
            if path in gone and not _has(module, path):
                raise ValueError(f"load_state_dict: {key}: {MESSAGE}")


def _has(module: nn.Module, path: str) -> bool:
    *names, last = path.split(".")
    for name in names:
        module = module._modules.get(name)
        if module is None:
            return False
    return any(last in parts for parts in (module._modules, module._parameters, module._buffers))


def _adapters(layer: nn.Module) -> set[str]:
    """The names of the adapters that a layer has parts of; a fork's does not say in which, so in any dict."""
    parts = [getattr(layer, part, ()) for part in getattr(layer, PARTS, ())]
    if not hasattr(layer, PARTS):
        parts = [part for part in layer.children() if isinstance(part, (nn.ModuleDict, nn.ParameterDict))]
    return {name for part in parts for name in part}


def _configs(module: nn.Module) -> Any:
    """The configs by adapter name, or the one config; None where there is neither."""
    configs = vars(module).get(CONFIGS)
    return configs if isinstance(configs, dict) or hasattr(configs, "__dict__") else None


def _merged(config: Any) -> Any:
    """A copy of `config`, which may be another model's too, that says it is merged."""
    if isinstance(config, Merged):
        return config
    merged = _rebuild(type(config))
    vars(merged).update(vars(config))
    return merged


_made: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()


def _rebuild(cls: type) -> Merged:
    """A config of a class over `cls`, without a value."""
    made = _made.get(cls)
    if made is None:
        made = _made[cls] = type(f"Merged{cls.__name__}", (Merged, cls), {"__module__": __name__})
    return made.__new__(made)
