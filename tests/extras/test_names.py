"""The names of the extras are found in dora_kernels, and are imported when they are asked for."""

import ast
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dora_kernels

# what each module of the extras needs beyond the package's own requirements
NEEDS = {
    "convert": "safetensors",
    "demo": "rich",
    "merging": "safetensors",
    "starts": "peft",
    "trainer": "transformers",
}
MODULES = ("analysis", "convert", "demo", "dvora", "merging", "parallel", "serving", "starts", "trainer")
OF_DVORA = ("DvoraLinear", "VeraProjection", "dvora_linear", "to_dvora")
OPTIONAL = ("lycoris", "matplotlib", "peft", "rich", "safetensors", "torchtune", "transformers")


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_the_extras(name):
    pytest.importorskip(NEEDS.get(name, "torch"))
    assert getattr(dora_kernels, name) is importlib.import_module(f"dora_kernels.extras.{name}")
    namespace = {}
    exec(f"from dora_kernels import {name}", namespace)
    assert namespace[name] is getattr(dora_kernels, name)


@pytest.mark.parametrize("name", OF_DVORA)
def test_a_name_of_dvora(name):
    assert getattr(dora_kernels, name) is getattr(dora_kernels.dvora, name)
    assert name in dora_kernels.__all__ and name in dora_kernels.dvora.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dora_kernels' has no attribute 'surprise'"):
        _ = dora_kernels.surprise


def test_type_checkers_see_the_names_where_they_are():
    tree = ast.parse(Path(dora_kernels.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    places = {alias.name: f"{node.module}.{alias.name}" for node in block.body for alias in node.names}
    expected = {name: f"dora_kernels.extras.{name}" for name in MODULES}
    for name, module in (dora_kernels._CORE | dora_kernels._EXTRAS).items():
        expected[name] = f"dora_kernels.{module}.{name}"
    assert places == expected and set(expected) - set(MODULES) == set(dora_kernels.__all__)


@pytest.mark.parametrize(
    "command, lazy",
    [
        (["-m", "dora_kernels", "--help"], True),
        (["-mdora_kernels", "--help"], True),
        (["-m", "dora_kernels.planning.choices"], False),
        (["-c", "import dora_kernels"], False),
    ],
)
def test_the_command_line_alone_imports_no_torch(command, lazy):
    """Whoever imports the package finds the operators, as an exported program does that is loaded next."""
    done = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "dora_kernels" in imported
    assert {"torch", "dora_kernels.ops"} & imported == (set() if lazy else {"torch", "dora_kernels.ops"})


WITHOUT_OPTIONAL_PACKAGES = f"""
import json, pickle, pydoc, sys, torch
sys.modules.update(dict.fromkeys({OPTIONAL}))
import dora_kernels
said = {{"at first": sorted(name for name in sys.modules if name.startswith("dora_kernels.extras."))}}
from dora_kernels import *
said["missing"] = [name for name in dora_kernels.__all__ if name not in globals()]
said["after a star"] = sorted({{name.split(".")[2] for name in sys.modules if name.startswith("dora_kernels.extras.")}})
said["help"] = pydoc.render_doc(dora_kernels)
said["dir"] = dir(dora_kernels)
try:
    from dora_kernels import trainer
except ImportError as error:
    said["trainer"] = str(error)
said["y"] = pickle.load(sys.stdin.buffer)(torch.ones(4)).tolist()
print(json.dumps(said))
"""


def test_without_any_optional_package():
    """import *, help(), dir() and pickle.load work in a process of its own, and import no more than they must."""
    layer = dora_kernels.DvoraLinear(4, 3, dora_kernels.VeraProjection(4, 3, 2))
    command = [sys.executable, "-c", WITHOUT_OPTIONAL_PACKAGES]
    said = json.loads(subprocess.run(command, input=pickle.dumps(layer), capture_output=True, check=True).stdout)
    assert said["at first"] == [] and said["missing"] == [] and said["after a star"] == ["dvora"]
    assert "to_dvora" in said["help"] and set(said["dir"]) >= set(dora_kernels.__all__)
    assert "transformers" in said["trainer"]
    torch.testing.assert_close(torch.tensor(said["y"]), layer(torch.ones(4)))
