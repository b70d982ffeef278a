"""Norms and gains of layers, reused while nothing that they depend on can have changed.

store.py keeps them and says when reuse is safe; kept.py compares the tensors of two calls; regions.py finds the
checkpoint that runs a call again; layers.py has the functions that layers call; scope.py has `frozen_adapters`;
constants.py keeps what depends on frozen tensors alone; sharing.py makes one x lora_A^T for several layers.
"""

from dora_kernels.reuse.constants import constant_reusing
from dora_kernels.reuse.layers import dora_linear_reusing, norm_reusing, weight_norm_reusing
from dora_kernels.reuse.scope import Scope, frozen_adapters, hold_adapters, mode_set
from dora_kernels.reuse.store import forget, invalidate

__all__ = [
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
