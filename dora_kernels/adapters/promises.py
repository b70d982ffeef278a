"""What still says that a model has an adapter when `serving.merge_model` has put it into the weights.

A PEFT model, its tuner and its base model share a dict of configs. With it begin PEFT's save_pretrained and
get_peft_model_state_dict, transformers' and diffusers' own saving, disable_adapter and load_adapter. Of an adapter that
is merged away they would write an empty file, or leave it on. So its config is replaced by one that raises where they
ask for its `bias`: each of them does, and neither forward, generate nor merge_and_unload do.
"""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any, NoReturn

from torch import nn

CONFIGS = "peft_config"
"""The attribute of a model with the configs by adapter name."""

PARTS = "adapter_layer_names"
"""The attribute of PEFT's layers that names those which hold their parts by adapter name."""


class Merged:
    """A config of an adapter that is merged away: as it was, but for what saving begins with."""

    @property
    def bias(self) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(
            "save_pretrained: serving.merge_model has put this adapter into the weights, and nothing is left of it to "
            "be saved, switched off or mixed with another; expected to save what model.merge_and_unload() returns"
        )

    def __repr__(self) -> str:
        return f"<{type(self).__bases__[-1].__name__} of an adapter that serving.merge_model has merged>"

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return _rebuild, (type(self).__bases__[-1],), vars(self)


class Promises:
    """The configs of the adapters of a model's layers, whichever part of the model that is."""

    def __init__(self, model: nn.Module) -> None:
        # a wrapper holds the model and not the model the wrapper, so all that live are asked: 0.3 s of 500,000 objects
        are_asked = any(hasattr(module, PARTS) for module in model.modules())
        others = (other for other in (gc.get_objects() if are_asked else ()) if issubclass(type(other), nn.Module))
        holders = {id(holder): holder for holder in (*model.modules(), *others) if _configs(holder)}
        # by id: a layer is let go once it is merged
        self._held = [(_configs(holder), {id(part) for part in holder.modules()}) for holder in holders.values()]

    def withdraw(self, layer: nn.Module) -> None:
        """Make the configs say that the adapters of `layer` are not to be had any more."""
        names = {name for part in getattr(layer, PARTS, ()) for name in getattr(layer, part, ())}
        for configs, modules in self._held:
            if id(layer) in modules:
                for name in names & configs.keys():
                    configs[name] = _merged(configs[name])


def _configs(module: nn.Module) -> dict[str, Any] | None:
    configs = vars(module).get(CONFIGS)
    return configs if isinstance(configs, dict) else None


def _merged(config: Any) -> Any:
    """A copy of `config`, which may be another model's too, that says it is merged."""
    if isinstance(config, Merged):
        return config
    merged = copy.copy(config)
    merged.__class__ = _class_over(type(config))
    return merged


_made: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()


def _class_over(cls: type) -> type:
    made = _made.get(cls)
    if made is None:
        made = _made[cls] = type(f"Merged{cls.__name__}", (Merged, cls), {"__module__": __name__})
    return made


def _rebuild(cls: type) -> Merged:
    made = _class_over(cls)
    return made.__new__(made)
