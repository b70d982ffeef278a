"""dora_kernels: DoRA linear layers at the cost of the frozen linear layer beneath them.

`dora_linear` is the layer as a function, `DoraLinear` as a module, and `enable(model)` puts it under the DoRA layers
that a model already has. docs/internals.md has the map.
"""

import importlib
from typing import Any

from dora_kernels.adapters import disable, enable
from dora_kernels.functional.linear import dora_linear
from dora_kernels.functional.weight import merge_weight, weight_norm
from dora_kernels.modules import DoraLinear
from dora_kernels.planning.options import options
from dora_kernels.reuse import frozen_adapters, invalidate

__version__ = "0.1.0"

__all__ = [
    "DoraLinear",
    "DvoraLinear",
    "VeraProjection",
    "disable",
    "dora_linear",
    "dvora_linear",
    "enable",
    "frozen_adapters",
    "invalidate",
    "merge_weight",
    "options",
    "to_dvora",
    "weight_norm",
]

_DVORA = "dora_kernels.extras.dvora"
# Names of the extras, imported when they are first asked for -> where they are; the folders themselves are names, too
_EXTRAS = {
    "DvoraLinear": _DVORA,
    "VeraProjection": _DVORA,
    "dvora_linear": _DVORA,
    "to_dvora": f"{_DVORA}.peft",
}
_EXTRA_MODULES = ("analysis", "convert", "demo", "dvora", "parallel", "serving", "trainer")


def __getattr__(name: str) -> Any:
    """A name of the extras: `dora_kernels.serving`, `dora_kernels.DvoraLinear`."""
    if name in _EXTRA_MODULES:
        value: Any = importlib.import_module(f"dora_kernels.extras.{name}")
    elif name in _EXTRAS:
        value = getattr(importlib.import_module(_EXTRAS[name]), name)
    else:
        raise AttributeError(f"module 'dora_kernels' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXTRAS, *_EXTRA_MODULES})
