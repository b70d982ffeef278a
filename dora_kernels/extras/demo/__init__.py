"""The demo: a small Llama fine-tuned with PEFT DoRA twice from the same start, by stock PEFT and enabled.

Nothing is downloaded. The text is the source of Python's standard library, the model reads bytes, and its base
is trained briefly before it is frozen, so that the fine-tuning starts from a model that has learned something.

Both runs take their steps in turns on the same batches. They share the frozen base weights, with --base nf4 packed to
4 bits by bitsandbytes (QDoRA); each has its own adapters and optimizer. `run` exits 1 unless dora_kernels really
computed every layer and the runs agree.

settings.py has the presets and the options, base.py the model and its text, runs.py the two runs, dvora.py those of
DVoRA, show.py the command. They are imported when one of their names is asked for: the command line looks at its
settings before rich, transformers and matplotlib are imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "COLUMNS",
    "PRESETS",
    "TUNING_TEXT",
    "DemoResult",
    "Preset",
    "Run",
    "Settings",
    "run",
    "sample",
    "standard_library",
    "trained_base",
]

_FILES = {
    "base": ("TUNING_TEXT", "sample", "standard_library", "trained_base"),
    "runs": ("DemoResult", "Run"),
    "settings": ("PRESETS", "Preset", "Settings"),
    "show": ("COLUMNS", "run"),
}

if TYPE_CHECKING:
    from dora_kernels.extras.demo.base import TUNING_TEXT, sample, standard_library, trained_base
    from dora_kernels.extras.demo.runs import DemoResult, Run
    from dora_kernels.extras.demo.settings import PRESETS, Preset, Settings
    from dora_kernels.extras.demo.show import COLUMNS, run


def __getattr__(name: str) -> Any:
    """One of __all__, imported when it is first asked for."""
    for file, names in _FILES.items():
        if name in names:
            value = getattr(importlib.import_module(f"dora_kernels.extras.demo.{file}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
