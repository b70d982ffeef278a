"""Whatever leaves a file goes through dora_kernels/files/writing.py: whole, or not there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("dora_kernels", "bench", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
# scratch files in temporary folders, streams, and writing.py itself
OTHERS = {
    "dora_kernels/cli/streams.py": {"open"},  # /dev/null
    "dora_kernels/files/claims.py": {"open"},
    "dora_kernels/files/writing.py": {"write_text", "fdopen"},
    "dora_kernels/extras/convert/files.py": {"write_text", "save_file"},  # into the folder that `creating` gives
    "dora_kernels/extras/merging/output.py": {"open"},  # likewise
    "dora_kernels/extras/analysis/plot.py": {"savefig"},  # these too
    "dora_kernels/extras/demo/show.py": {"savefig"},
    "bench/lib/plots.py": {"savefig"},
    "bench/starts.py": {"write_text"},  # /proc/self/clear_refs, which forgets the peak of memory
    "tools/gpu_stages/saving.py": {"write_bytes", "open"},
    "tools/changed_kernel.py": {"write_text"},
    "tools/gpu_stages/running.py": {"open"},  # the log of a command while it runs
    "tools/guard_pages.py": {"fdopen", "dump"},  # a pipe
    "tools/mutation/plugin.py": {"write_text"},
    "tools/mutation/running.py": {"write_text", "write_bytes"},
    "tools/peft_suite.py": {"write_text"},
    "tools/resources.py": {"NamedTemporaryFile"},
}
WRITES = {"write_text", "write_bytes", "savefig", "save_file", "dump", "to_csv"}
OPENS = {"open", "fdopen", "NamedTemporaryFile"}


def writers(source: str) -> set[str]:
    """The calls that write a file by their name, or open one for it, and are not files/writing.py's."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        whole = ast.unparse(node.func)
        name = whole.rpartition(".")[2]
        strings = [part.value for part in (*node.args, *(keyword.value for keyword in node.keywords))
                   if isinstance(part, ast.Constant) and isinstance(part.value, str)]  # fmt: skip
        opens = name in OPENS and any(set(mode) <= set("rwaxbt+") and set(mode) & set("wax+") for mode in strings)
        if (name in WRITES and whole != "writing.write_text") or opens or whole in ("torch.save", "NamedTemporaryFile"):
            found.add(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_written_by_one_module(path):
    name = str(path.relative_to(ROOT))
    assert writers(path.read_text()) <= OTHERS.get(name, set())


def test_no_exception_is_left_over():
    for name, allowed in OTHERS.items():
        assert writers((ROOT / name).read_text()) | {"NamedTemporaryFile"} >= allowed, name


def test_ways_to_write_are_known():
    source = 'path.write_text("a")\nwriting.write_text(path, "a")\nopen(path)\npath.open("wb")\nopen(path, mode="a")\n'
    assert writers(source) == {"write_text", "open"}
    assert writers('writing.write_text(path, "a")\nopen(path, "rb")') == set()


@pytest.mark.parametrize("path", [path for path in SOURCES if not path.is_relative_to(ROOT / "dora_kernels")], ids=str)
def test_every_command_that_writes_says_when_it_cannot(path):
    """A main that has a result written is one of bench/lib/outputs.py's, and claims its file."""
    source = path.read_text()
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    if functions and re.search('"--(out|json)"', source):
        decorators = [ast.unparse(node) for node in functions[0].decorator_list]
        assert any(name.startswith("outputs.command(") for name in decorators) and "outputs.claim(" in source
