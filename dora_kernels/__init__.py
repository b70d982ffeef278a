"""dora_kernels: DoRA linear layers at the cost of the frozen linear layer beneath them.

`dora_linear` is the layer as a function, `DoraLinear` as a module, and `enable(model)` puts it under the DoRA layers
that a model already has. docs/internals.md has the map.

The extras are imported when they are first asked for: `dora_kernels.serving`, `.starts`, `.parallel`, `.trainer`,
`.analysis`, `.convert`, `.merging`, `.demo`, and `.dvora` with its `DvoraLinear`, `VeraProjection`, `dvora_linear` and
`to_dvora`.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

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

_CORE = {
    "DoraLinear": "modules",
    "disable": "adapters",
    "dora_linear": "functional.linear",
    "enable": "adapters",
    "frozen_adapters": "reuse",
    "invalidate": "reuse",
    "merge_weight": "functional.weight",
    "options": "planning.options",
    "weight_norm": "functional.weight",
}
"""The names of the core, and the module of each."""

_EXTRAS = dict.fromkeys(("DvoraLinear", "VeraProjection", "dvora_linear", "to_dvora"), "extras.dvora")
_EXTRA_MODULES = ("analysis", "convert", "demo", "dvora", "merging", "parallel", "serving", "starts", "trainer")

if TYPE_CHECKING:
    # "as": for type checkers the names are this package's, too
    from dora_kernels.adapters import disable as disable
    from dora_kernels.adapters import enable as enable
    from dora_kernels.extras import analysis as analysis
    from dora_kernels.extras import convert as convert
    from dora_kernels.extras import demo as demo
    from dora_kernels.extras import dvora as dvora
    from dora_kernels.extras import merging as merging
    from dora_kernels.extras import parallel as parallel
    from dora_kernels.extras import serving as serving
    from dora_kernels.extras import starts as starts
    from dora_kernels.extras import trainer as trainer
    from dora_kernels.extras.dvora import DvoraLinear, VeraProjection, dvora_linear, to_dvora
    from dora_kernels.functional.linear import dora_linear as dora_linear
    from dora_kernels.functional.weight import merge_weight as merge_weight
    from dora_kernels.functional.weight import weight_norm as weight_norm
    from dora_kernels.modules import DoraLinear as DoraLinear
    from dora_kernels.planning.options import options as options
    from dora_kernels.reuse import frozen_adapters as frozen_adapters
    from dora_kernels.reuse import invalidate as invalidate


def __getattr__(name: str) -> Any:
    """A name of the core or of the extras, or a module of the extras, imported when it is first asked for."""
    if name in _EXTRA_MODULES:
        value: Any = importlib.import_module(f"dora_kernels.extras.{name}")
    elif module := _CORE.get(name) or _EXTRAS.get(name):
        value = getattr(importlib.import_module(f"dora_kernels.{module}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The names that are here or in __all__. help() imports what is listed, and some extras need further packages."""
    return sorted({*globals(), *__all__})


def _is_run_by_its_name() -> bool:
    """True while Python looks for the command line, for `python -m dora_kernels`: sys.argv[0] is "-m" just then."""
    return sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] in ("dora_kernels", "-mdora_kernels")


if not _is_run_by_its_name():
    # All of the core, whatever is asked for: an exported program finds the operators after `import dora_kernels`, and
    # FlopCounterMode their FLOPs. The command line says what is wrong with its arguments first: torch takes 1.2 s.
    for _name in _CORE:
        __getattr__(_name)
    del _name
    importlib.import_module("dora_kernels.flops")
