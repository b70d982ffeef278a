"""dora_kernels: DoRA linear layers at the cost of the frozen linear layer beneath them.

`dora_linear` is the layer as a function, `DoraLinear` as a module, and `enable(model)` puts it under the DoRA layers
that a model already has. README.md has the map of the rooms.
"""

from dora_kernels.adapters import disable, enable, to_dvora
from dora_kernels.dvora import DvoraLinear, VeraProjection, dvora_linear
from dora_kernels.functional import dora_linear, merge_weight, weight_norm
from dora_kernels.launch import options
from dora_kernels.modules import DoraLinear
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
