"""The tiles of a weight as it is stored: what can be loaded ahead. tests/quant/test_quantized.py has the numbers."""

import pytest
import torch

from dora_kernels.planning.configs import Config
from tests.support.packed_weights import quantized

kernels = pytest.importorskip("dora_kernels.kernels")


def test_what_a_norm_loads_ahead():
    """Nothing where the weight is not loaded in whole vectors, or is looked up number by number."""

    def stages(weight):
        return kernels.stored_weight.weight_stages(weight, Config(num_stages=3))

    def stored(kind):
        return quantized(kind, 32, 96, torch.bfloat16)

    dense = torch.empty(32, 96)
    assert stages(dense) == stages(stored("int8")) == stages(stored("nf4_torchao")) == 3
    assert stages(dense.T) is stages(dense[:, :90].contiguous()) is None
    assert stages(stored("codebook4")) is stages(stored("hqq4 axis 1")) is None
