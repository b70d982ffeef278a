"""How the tests import torchtune, whose own file of the DoRA layer is all that they need of it.

torchtune 0.6.1 is the last release. Importing the package loads its data sets, models and downloads, with a dozen
requirements more; and torchao has since moved the module `torchao.dtypes.nf4tensor`, which the layer imports. So
`torchtune` and `torchtune.modules` are packages here whose __init__ is not run, and the module has its old name too.
The layer, its package `torchtune.modules.peft` and `torchtune.modules.low_precision` are torchtune's files, unchanged.
"""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest


def import_dora_linear() -> type:
    """torchtune's DoRALinear; the test file is skipped where torchtune or torchao is not installed."""
    spec = importlib.util.find_spec("torchtune")
    if spec is None:
        pytest.skip("torchtune is not installed", allow_module_level=True)
    nf4_tensor = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    if "torchtune" not in sys.modules:
        sys.modules["torchao.dtypes.nf4tensor"] = nf4_tensor
        (folder,) = spec.submodule_search_locations
        for name, path in {"torchtune": folder, "torchtune.modules": f"{folder}/modules"}.items():
            package = ModuleType(name)
            package.__path__ = [path]
            sys.modules[name] = package
    return importlib.import_module("torchtune.modules.peft.dora").DoRALinear
