"""dora_kernels: DoRA linear layers at the cost of the frozen linear layer beneath them.

`dora_linear` is the layer as a function, `DoraLinear` as a module, and `enable(model)` puts it under the DoRA layers
that a model already has. docs/internals.md has the map.

The extras are imported when they are first asked for: `dora_kernels.serving`, `.parallel`, `.trainer`, `.analysis`,
`.convert`, `.demo`, and `.dvora` with its `DvoraLinear`, `VeraProjection`, `dvora_linear` and `to_dvora`.
"""

import importlib
from typing import TYPE_CHECKING, Any

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

_EXTRA_MODULES = ("analysis", "convert", "demo", "dvora", "parallel", "serving", "trainer")
_EXTRA_NAMES = ("DvoraLinear", "VeraProjection", "dvora_linear", "to_dvora")
"""Of dora_kernels.extras.dvora."""

if TYPE_CHECKING:
    # "as": for type checkers the names are this package's, too
    from dora_kernels.extras import analysis as analysis
    from dora_kernels.extras import convert as convert
    from dora_kernels.extras import demo as demo
    from dora_kernels.extras import dvora as dvora
    from dora_kernels.extras import parallel as parallel
    from dora_kernels.extras import serving as serving
    from dora_kernels.extras import trainer as trainer
    from dora_kernels.extras.dvora import DvoraLinear, VeraProjection, dvora_linear, to_dvora


def __getattr__(name: str) -> Any:
    """A module or a name of the extras."""
    if name in _EXTRA_MODULES:
        value: Any = importlib.import_module(f"dora_kernels.extras.{name}")
    elif name in _EXTRA_NAMES:
        value = getattr(importlib.import_module("dora_kernels.extras.dvora"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The names that are here or in __all__. help() imports what is listed, and some extras need further packages."""
    return sorted({*globals(), *__all__})
