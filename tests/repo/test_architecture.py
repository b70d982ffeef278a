"""Imports go one way, and what must not appear in the package does not."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dora_kernels"
# The order in which the package is read and imported: a file may import from its own room and those above it
ORDER = (
    "files",
    "reference",
    "quant",
    "types",
    "planning",
    "gemm",
    "pytorch",
    "kernels",
    "passes",
    "ops",
    "flops",
    "decompositions",
    "functional",
    "reuse",
    "modules",
    "adapters",
    "testing",
    "extras",
    "cli",
    "__init__",
    "__main__",
)
# ops.py hands the steps to passes.py, which must not know whose they are; neither implementation leans on the other
FORBIDDEN_PAIRS = {("passes", "kernels"), ("passes", "pytorch"), ("kernels", "pytorch")}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> set[str]:
    """Everything that is imported from the package, as dotted names below it; a name may be that of a module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dora_kernels":
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("dora_kernels.") for name in names if name.startswith("dora_kernels.")}


def imported_rooms(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(tree)} & set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room, tree = room_of(path), ast.parse(path.read_text())
    assert room in ORDER, f"{room} has no place in the order of rooms"
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree)), "relative import"
    for other in imported_rooms(tree) - {room}:
        assert ORDER.index(other) < ORDER.index(room), f"{room} imports {other}"
        assert (room, other) not in FORBIDDEN_PAIRS, f"{room} imports {other}"


def test_no_two_modules_import_each_other():
    """Inside of a room, too."""
    dotted = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES
    }
    imports = {}
    for name, path in dotted.items():
        found = imported_modules(ast.parse(path.read_text()))
        imports[name] = {one if one in dotted else one.rpartition(".")[0] for one in found} & set(dotted) - {name}
    while imports:
        leaves = {name for name, others in imports.items() if not others & set(imports)}
        assert leaves, f"a circle among {sorted(imports)}"
        imports = {name: others for name, others in imports.items() if name not in leaves}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_must_not_appear(path):
    for node in ast.walk(ast.parse(path.read_text())):
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        # autotune cannot run without a GPU and corrupts in-place kernels; make_block_ptr is gone from Triton's main
        # triton.cdiv takes 1.4 us on the host, where configs.ceil_div takes 0.02
        assert name not in ("triton.autotune", "tl.make_block_ptr", "triton.cdiv"), f"{name} at line {node.lineno}"


def environment_uses(tree: ast.AST) -> tuple[set[int], set[int]]:
    """The lines that read the environment, and those that assign to os.environ[...]."""
    written = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
    }
    reads, writes = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            reads |= {node.lineno for alias in node.names if alias.name in ("environ", "getenv")}
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
            (writes if id(node) in written else reads).add(node.lineno)
    return reads, writes


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_one_file_reads_the_environment(path):
    """planning/choices.py. planning/devices.py sets TRITON_INTERPRET, which Triton reads when it is imported."""
    reads, writes = environment_uses(ast.parse(path.read_text()))
    name = str(path.relative_to(PACKAGE))
    assert not reads or name == "planning/choices.py"
    assert not writes or name == "planning/devices.py"


def test_uses_of_the_environment_are_told_apart():
    source = 'import os\nfrom os import environ\nos.environ["A"] = os.getenv("B")\nos.environ.get("A")\n'
    assert environment_uses(ast.parse(source)) == ({2, 3, 4}, {3})


def test_the_order_has_no_empty_rooms():
    assert {room_of(path) for path in MODULES} == set(ORDER)


def test_what_importing_the_package_does_not_import():
    others = (
        "peft",
        "torchtune",
        "lycoris",
        "transformers",
        "matplotlib",
        "rich",
        "safetensors",
        "pydantic",
        "regex",
        "diffusers",
        "onnx",
        "onnxscript",
        "torch.utils.flop_counter",
        "dora_kernels.extras",
    )
    code = f"import sys, dora_kernels; print(*set({others!r}) & set(sys.modules), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True"
