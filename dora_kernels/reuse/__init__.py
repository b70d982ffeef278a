"""norm and gain of a layer, kept while nothing that they depend on can have changed, and used again.

store.py says when that is safe, regions.py which checkpoint runs a call again, layers.py is what layers call, scope.py
is `frozen_adapters`; constants.py keeps what is computed of frozen tensors alone.
"""

from dora_kernels.reuse.constants import constant_reusing
from dora_kernels.reuse.layers import dora_linear_reusing, norm_reusing, weight_norm_reusing
from dora_kernels.reuse.scope import Operands, Scope, frozen_adapters, hold_adapters, mode_set
from dora_kernels.reuse.store import forget, invalidate

__all__ = [
    "Operands",
    "Scope",
    "constant_reusing",
    "dora_linear_reusing",
    "forget",
    "frozen_adapters",
    "hold_adapters",
    "invalidate",
    "mode_set",
    "norm_reusing",
    "weight_norm_reusing",
]
