"""DoRA layers of torchtune and of LyCORIS for the tests, each of the library's own class.

torchtune 0.6.1 is the last release. Importing the package loads its data sets, models and downloads, with a dozen
requirements more; and torchao has since moved the module `torchao.dtypes.nf4tensor`, which the layer imports. So
`torchtune` and `torchtune.modules` are packages here whose __init__ is not run, and the module has its old name too.
The layer, its package `torchtune.modules.peft` and `torchtune.modules.low_precision` are torchtune's files, unchanged.
"""

import copy
import importlib
import importlib.util
import sys
from unittest import mock

import pytest
import torch
from torch import nn

from tests.support.conformance_checks import randomise
from tests.support.problem import DEVICE


def import_dora_linear():
    """torchtune's DoRALinear; the test file is skipped where torchtune or torchao is not installed."""
    if "torchtune" not in sys.modules:
        if importlib.util.find_spec("torchtune") is None:
            pytest.skip("torchtune is not installed", allow_module_level=True)
        nf4_tensor = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
        sys.modules["torchao.dtypes.nf4tensor"] = nf4_tensor
        for name in ("torchtune", "torchtune.modules"):
            sys.modules[name] = importlib.util.module_from_spec(importlib.util.find_spec(name))
    return importlib.import_module("torchtune.modules.peft.dora").DoRALinear


def torchtune_layer(N, K, R, dtype=torch.float32, **arguments):
    """A DoRALinear as torchtune trains it: the base frozen, the magnitude made from the weights, then moved."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as torchtune builds its models
    try:
        with torch.device(DEVICE):
            layer = import_dora_linear()(K, N, R, 5.0, **arguments)
    finally:
        torch.set_default_dtype(default)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in layer.adapter_params())
    layer.lora_b.weight.data.copy_(0.1 * torch.randn_like(layer.lora_b.weight))
    layer.initialize_dora_magnitude()
    return randomise(layer)


def torchtune_in_float64(layer):
    """A copy, dense: torchao's NF4 has no float64."""
    dense = copy.deepcopy(layer)
    if layer._quantize_base:
        dense.weight = nn.Parameter(layer.weight.get_original_weight(), requires_grad=False)
        dense._quantize_base = False
    return dense.double()


class Wrapped(nn.Module):
    """A layer and the LoConModule over it, as a training script has them: the layer is called, the module computes."""

    def __init__(self, layer, dtype=torch.float32, algorithm=None, **arguments):
        super().__init__()
        from lycoris.modules.locon import LoConModule

        settings = {"weight_decompose": True, "lora_dim": 3, "alpha": 2.0} | arguments
        self.layer = layer.requires_grad_(False)
        self.adapter = (algorithm or LoConModule)("adapter", layer, **settings)
        self.adapter.apply_to()
        self.to(DEVICE, dtype)
        self.eps = None
        if algorithm is None:
            self.adapter.lora_up.weight.data.copy_(0.3 * torch.randn_like(self.adapter.lora_up.weight))
            randomise(self)

    def forward(self, x):
        with mock.patch.object(torch, "finfo", self.finfo if self.eps else torch.finfo):
            return self.layer(x)

    def finfo(self, dtype):
        return mock.Mock(eps=self.eps)

    def in_float64(self):
        """The same layer exactly: the eps that LyCORIS adds to a norm is that of dora_scale's dtype."""
        exact = copy.deepcopy(self).double()
        exact.eps = torch.finfo(self.adapter.dora_scale.dtype).eps
        return exact
