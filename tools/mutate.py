"""Change one operator or constant of the package at a time, and see whether the tests notice.

    python tools/mutate.py --list                                   # every mutant, and what is excluded and why
    python tools/mutate.py --sample 100 --seed 7 --seconds 5400     # as `make nightly` does
    python tools/mutate.py --only passes.py:61                      # the mutants whose line in the list holds that text

A mutant is killed where its tests fail, or do not end in time. Exit status 0 where at least 95% of the mutants tried
were killed, 1 where fewer were, 2 where the tests fail without a mutant.

Not mutated, because no test should hold them: annotations, decorators, strings, what a `raise` says. What is excluded
besides stands in EXCLUDED, by name and with the reason. The tests run on a copy of the checkout in a temporary folder,
in which one expression is different; the rest of the file stays byte for byte what it is.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENOUGH = 0.95
COPIED = ("dora_kernels", "tests", "tools", "bench", "pyproject.toml")
# What is mutated -> the tests that must notice, the most likely first: pytest stops at the first failure
_KERNELS = (
    "tests/test_kernels.py",
    "tests/test_bounds.py",
    "tests/test_accumulation.py",
    "tests/test_passes.py",
    "tests/test_addresses.py",
    "tests/test_compile_kernels.py::test_every_kernel_compiles",
    "tests/test_compile_kernels.py::test_norm_and_gain_are_rounded_to_nearest",
    "tests/test_nonfinite.py",
    "tests/test_functional.py",
)
SUBJECTS: dict[str, tuple[str, ...]] = {
    "dora_kernels/kernels/backward.py": _KERNELS,
    "dora_kernels/kernels/common.py": _KERNELS,
    "dora_kernels/kernels/forward.py": _KERNELS,
    "dora_kernels/kernels/norm.py": _KERNELS,
    "dora_kernels/kernels/weight.py": _KERNELS,
    "dora_kernels/autograd.py": (
        "tests/test_passes.py",
        "tests/test_functional.py",
        "tests/test_ops.py",
        "tests/test_shared_inputs.py",
        "tests/test_second_derivatives.py",
    ),
    "dora_kernels/derivatives.py": ("tests/test_second_derivatives.py", "tests/test_second_derivatives_of_layers.py"),
    "dora_kernels/functional.py": (
        "tests/test_passes.py",
        "tests/test_functional.py",
        "tests/test_fallback.py",
        "tests/test_ops.py",
        "tests/test_modules.py",
        "tests/test_reuse.py",
    ),
    "dora_kernels/passes.py": (
        "tests/test_passes.py",
        "tests/test_functional.py",
        "tests/test_ops.py",
        "tests/test_reuse.py",
        "tests/test_nonfinite.py",
    ),
    "dora_kernels/reference.py": (
        "tests/test_reference.py",
        "tests/test_passes.py",
        "tests/test_nonfinite.py",
        "tests/test_functional.py",
        "tests/test_kernels.py",
    ),
}


@dataclass(frozen=True)
class Excluded:
    """Mutants that no test can or should kill: in a function of a file ("" is the top level), on a line that holds
    `source`, whose change is one of `changes`, or whose original or (with an arrow) change begins with one.
    """

    path: str
    function: str
    source: str
    changes: tuple[str, ...]
    reason: str

    def covers(self, mutant: Mutant) -> bool:
        """Whether it is this row that excludes a mutant."""
        same = (self.path, self.function) == (mutant.path, mutant.function) and self.source in mutant.source
        return same and (mutant.change in self.changes or mutant.original.startswith(self.changes))


_BACKWARD, _FORWARD, _NORM, _WEIGHT = (
    f"dora_kernels/kernels/{name}.py" for name in ("backward", "forward", "norm", "weight")
)
_DIFFERENTIABLE, _REFERENCE = "dora_kernels/autograd.py", "dora_kernels/reference.py"
_MASKED = "what is loaded outside the mask is not stored, and not summed over"
_NO_QUOTIENT = "the quotient of a row whose norm is 0 is not used; another row is divided by its norm, which is 1"
_NO_TENSOR = "strides, a rank or a scaling of a tensor that is not there"
_INT64 = "the other operand is int64 already; each of the two alone is enough"
_CAST = "Triton promotes, and casts to what it stores to, by itself"
_AUTOGRAD = "autograd casts a gradient to the dtype of what it is the gradient of, by itself"
_TILES = "which of two tables of tiles, or a loop of one step: speed"
_SPLITS = "into how many parts a sum is split: speed, and the order of the sum"
_SPEED = "which of two ways to the same numbers: speed"
_NO_STATISTICS = "a batch norm that takes no statistics leaves them and their momentum alone"
_BETA = "beta times zeros"
EXCLUDED = (
    Excluded(_BACKWARD, "_token_sums_kernel", "tl.load(gain_ptr", ("0.0 -> 1.0",), _MASKED),
    Excluded(_BACKWARD, "_finish_sums_kernel", "tl.load(", ("0.0 -> 1.0",), _MASKED),
    Excluded(_BACKWARD, "_outer_of_scaled", "tl.load(", ("0.0 -> 1.0",), _MASKED),
    Excluded(_FORWARD, "_project_kernel", "tl.load(scale_ptr", ("0.0 -> 1.0",), _MASKED),
    Excluded(_FORWARD, "_finish_project_kernel", "tl.load(", ("0.0 -> 1.0",), _MASKED),
    Excluded(_FORWARD, "_epilogue_kernel", "tl.load(", ("0.0 -> 1.0",), _MASKED),
    Excluded(_NORM, "_finish_norm_kernel", "tl.load(", ("0.0 -> 1.0",), _MASKED),
    Excluded(_WEIGHT, "_merge_kernel", "tl.load(", ("0.0 -> 1.0",), _MASKED),
    Excluded(_BACKWARD, "_finish_sums_kernel", "divisor =", ("0 -> 1", "1.0 -> 0.0"), _NO_QUOTIENT),
    Excluded(_NORM, "gain_of", "divisor =", ("0 -> 1", "1.0 -> 0.0"), _NO_QUOTIENT),
    Excluded(_REFERENCE, "gain_ref", "torch.where(norm == 0, 1, norm)", ("0 -> 1 (3)", "1 -> 0"), _NO_QUOTIENT),
    Excluded(_REFERENCE, "token_sums_ref", "torch.where(norm == 0, 1, norm)", ("0 -> 1 (3)", "1 -> 0"), _NO_QUOTIENT),
    Excluded(_BACKWARD, "token_sums", "is None else", ("0 -> 1", "0 -> 1 (2)"), _NO_TENSOR),
    Excluded(_FORWARD, "epilogue", "(0, 0) if", ("0 -> 1", "0 -> 1 (2)"), _NO_TENSOR),
    Excluded(_FORWARD, "epilogue", "0 if bias is None else", ("0 -> 1",), _NO_TENSOR),
    Excluded(_NORM, "norm", "0 if magnitude is None else", ("0 -> 1",), _NO_TENSOR),
    Excluded(_WEIGHT, "merge", "(0, 0) if", ("0 -> 1", "0 -> 1 (2)"), _NO_TENSOR),
    Excluded(_WEIGHT, "merge", "R = 0 if lora_A is None else", ("0 -> 1",), _NO_TENSOR),
    Excluded(_WEIGHT, "dense", "None, None, None, 0.0", ("0.0",), _NO_TENSOR),
    Excluded(_BACKWARD, "_token_sums_kernel", "split = tl.", ("tl.program_id(2).to",), _INT64),
    Excluded(_BACKWARD, "_token_sums_kernel", "offs_m = m +", ("tl.arange(0, BLOCK_M).to",), _INT64),
    Excluded(_FORWARD, "_project_kernel", "split = tl.", ("tl.program_id(1).to",), _INT64),
    Excluded(_FORWARD, "_project_kernel", "offs_k = k +", ("tl.arange(0, BLOCK_K).to",), _INT64),
    Excluded(_NORM, "_norm_kernel", "split = tl.", ("tl.program_id(1).to",), _INT64),
    Excluded(_WEIGHT, "direction_tile", "offs_k = k +", ("tl.arange(0, BLOCK_K).to",), _INT64),
    Excluded(_WEIGHT, "_merge_kernel", "offs_k = k +", ("tl.arange(0, BLOCK_K).to",), _INT64),
    Excluded(_WEIGHT, "_merge_kernel", "k = tl.", ("tl.program_id(1).to(tl.int64) -> tl.program_id(1)",), _INT64),
    Excluded(_BACKWARD, "_token_sums_kernel", "dot +=", ("columns.to(ACC_DTYPE) -> columns",), _CAST),
    Excluded(_BACKWARD, "_token_sums_kernel", "dot +=", ("kept.to(ACC_DTYPE) -> kept",), _CAST),
    Excluded(_BACKWARD, "_token_sums_kernel", "scaled = gain", ("columns.to(ACC_DTYPE) -> columns",), _CAST),
    Excluded(_BACKWARD, "_token_sums_kernel", "tl.store(", ("scaled.to(",), _CAST),
    Excluded(_BACKWARD, "_finish_sums_kernel", "lora_B = lora_B", ("lora_B.to(ACC_DTYPE) -> lora_B",), _CAST),
    Excluded(_BACKWARD, "_finish_sums_kernel", "any_infinite =", ("is_infinite.to(tl.int32) -> is_infinite",), _CAST),
    Excluded(
        _BACKWARD, "_finish_sums_kernel", "any_infinite =", ("tl.max(is_infinite.to(tl.int32), axis=0) > 0 ->",), _SPEED
    ),
    Excluded(_BACKWARD, "_outer_of_scaled", "tl.load(", ("tl.load(",), _CAST),
    Excluded(_BACKWARD, "_finish_sums_kernel", "tl.store(", ("(scaling * outer).to(",), _CAST),
    Excluded(_BACKWARD, "_finish_sums_kernel", "tl.store(", ("dmagnitude.to(", "total.to("), _CAST),
    Excluded(_FORWARD, "_project_kernel", "factor = scale", ("factor.to(ACC_DTYPE) -> factor",), _CAST),
    Excluded(_FORWARD, "_project_kernel", "tl.store(", ("acc.to(",), _CAST),
    Excluded(_FORWARD, "_finish_project_kernel", "tl.store(", ("acc.to(",), _CAST),
    Excluded(_FORWARD, "_epilogue_kernel", "y += tl.load(bias_ptr", ("tl.load(",), _CAST),
    Excluded(_FORWARD, "_epilogue_kernel", "y += residual", ("residual.to(ACC_DTYPE) -> residual",), _CAST),
    Excluded(_FORWARD, "_epilogue_kernel", "tl.store(", ("y.to(",), _CAST),
    Excluded(_WEIGHT, "direction_tile", "w = weight_tile(", ("weight_tile(",), _CAST),
    Excluded(_WEIGHT, "_merge_kernel", "tl.store(", ("merged.to(",), _CAST),
    Excluded(_DIFFERENTIABLE, "DoraLinear.backward", ".to(ctx.dropped_dtype)", ("dx_dropped.to(",), _AUTOGRAD),
    Excluded(_FORWARD, "project", "if splits > 1:", ("splits > 1", "1 -> 0"), "a sum of one part is that part"),
    Excluded(_FORWARD, "epilogue", "ONE_CHUNK=", ("R <=",), _TILES),
    Excluded(_NORM, "norm", "ONE_CHUNK=", ("R <=",), _TILES),
    Excluded(_WEIGHT, "merge", "ONE_CHUNK=", ("R <=",), _TILES),
    Excluded(_BACKWARD, "_partial_sums", "how.split(", ("blocks_r * blocks_n",), _SPLITS),
    Excluded(_REFERENCE, "", "_BLOCK_BYTES_ELSEWHERE =", ("256",), "how large a block of rows is: memory"),
    Excluded(
        _REFERENCE,
        "_scale_columns",
        "if matrix.device.type",
        ("matrix.device.type == \"cpu\" -> (matrix.device.type != 'cpu')",),
        _SPEED,
    ),
    Excluded(_REFERENCE, "_column_sums", "if half and", ('columns.device.type == "cpu"',), _SPEED),
    Excluded(_REFERENCE, "_column_sums", "wanted = [False", ("False",), "makes a gradient that is not used: speed"),
    Excluded(_REFERENCE, "_scale_columns", "statistics =", ("0 -> 1", "0 -> 1 (2)"), _NO_STATISTICS),
    Excluded(_REFERENCE, "_scale_columns", "torch.native_batch_norm(", ("0.0 -> 1.0",), _NO_STATISTICS),
    Excluded(_REFERENCE, "product_onto_low_rank", "beta=0", ("0 -> 1",), _BETA),
)


@dataclass(frozen=True)
class Mutant:
    """One change: `source[start:end]`, which is `original`, becomes `mutated`; in bytes, as ast counts."""

    path: str
    line: int
    function: str
    source: str  # the line, or its first
    original: str
    mutated: str
    nth: int  # of the same changes on this line
    start: int
    end: int

    @property
    def change(self) -> str:
        return f"{self.original} -> {self.mutated}" + (f" ({self.nth})" if self.nth > 1 else "")

    def __str__(self) -> str:
        return f"{self.path}:{self.line} ({self.function or 'top level'})  {self.change}"

    def apply(self, source: bytes) -> bytes:
        """The file with the change."""
        return source[: self.start] + self.mutated.encode() + source[self.end :]


_BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
_BINARY |= {ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
_COMPARISON = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
_COMPARISON |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
_BOOLEAN = {ast.And: ast.Or, ast.Or: ast.And}
_NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}


def changed(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions that may stand in place of `node`, each with one difference at its top."""

    def another(**fields: object) -> ast.expr:
        other = copy.copy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return other

    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        yield another(op=_BINARY[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield another(op=_BOOLEAN[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node.operand
    elif isinstance(node, ast.Compare):
        for place, op in enumerate(node.ops):
            yield another(ops=[*node.ops[:place], _COMPARISON[type(op)](), *node.ops[place + 1 :]])
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = node.value
        yield another(value=type(value)(not value if value in (0, 1) else value + 1))
    elif isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr == "to":
            yield function.value
        elif isinstance(function, ast.Name) and function.id in _NAMES:
            yield another(func=ast.Name(_NAMES[function.id]))
        elif isinstance(function, ast.Attribute) and function.attr in _NAMES:
            yield another(func=ast.Attribute(function.value, _NAMES[function.attr]))


def _negated(test: ast.expr) -> Iterator[ast.expr]:
    """`not` before a condition that has no operator of its own to change."""
    if not isinstance(test, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
        yield ast.UnaryOp(ast.Not(), test)


class Finder(ast.NodeVisitor):
    """Collects the mutants of one file, in the order of the source."""

    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source = path, source
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.functions: list[str] = []
        self.seen: Counter[tuple[int, str, str]] = Counter()
        self.found: list[Mutant] = []
        self.visit(ast.parse(source))

    def _add(self, node: ast.AST, mutated: str) -> None:
        start = self.lines[node.lineno - 1] + node.col_offset
        end = self.lines[node.end_lineno - 1] + node.end_col_offset
        line = self.source.splitlines()[node.lineno - 1].decode().strip()
        original = " ".join(self.source[start:end].decode().split())
        key = (node.lineno, original, mutated)
        self.seen[key] += 1
        names = (".".join(self.functions), line, original, mutated, self.seen[key])
        self.found.append(Mutant(self.path, node.lineno, *names, start, end))

    def visit(self, node: ast.AST) -> None:
        for other in changed(node):
            # parentheses: what stands around may bind tighter than the new operator
            text = ast.unparse(other)
            self._add(node, text if isinstance(node, (ast.Constant, ast.Call)) else f"({text})")
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            for other in _negated(node.test):
                self._add(node.test, f"({ast.unparse(other)})")
        super().visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in _BINARY:
            other = copy.copy(node)
            other.op = _BINARY[type(node.op)]()
            self._add(node, ast.unparse(other))
        self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.functions.append(node.name)
        for child in (*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body):
            self.visit(child)
        self.functions.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.functions.append(node.name)
        for child in node.body:
            self.visit(child)
        self.functions.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        """What it says is not held by tests."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """A message; and ast does not say where in the source its parts are (before Python 3.12)."""


class Copy:
    """A copy of the checkout in which the tests run."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
            elif (root / name).exists():
                shutil.copy(root / name, folder / name)

    def run(self, tests: Sequence[str], seconds: float) -> tuple[str, float, str]:
        """("passed", "failed" or "timeout", seconds, the last lines of the output) of pytest -x."""
        paths = os.pathsep.join(filter(None, (str(self.folder), os.environ.get("PYTHONPATH"))))
        # bytecode is known by size and second, which two mutants of one file may share
        environment = os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", *tests]
        start = time.monotonic()
        process = subprocess.Popen(
            command, cwd=self.folder, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=seconds)
            state = "passed" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            output, state = "", "timeout"
        finally:
            if process.poll() is None:  # after Ctrl-C too: it has a session of its own
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        return state, time.monotonic() - start, "\n".join(output.splitlines()[-5:])

    def try_mutant(self, mutant: Mutant, tests: Sequence[str], seconds: float) -> dict[str, object]:
        """The row of the report for one mutant; the copy is whole again afterwards."""
        path = self.folder / mutant.path
        source = path.read_bytes()
        path.write_bytes(mutant.apply(source))
        try:
            state, took, output = self.run(tests, seconds)
        finally:
            path.write_bytes(source)
        by = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        status = {"passed": "survived", "failed": "killed", "timeout": "timeout"}[state]
        return asdict(mutant) | {"status": status, "seconds": round(took, 1), "by": by[1] if by else None}


def main(
    argv: Sequence[str] | None = None,
    root: Path = ROOT,
    subjects: dict[str, tuple[str, ...]] = SUBJECTS,
    table: Sequence[Excluded] = EXCLUDED,
    patience: float = 60,
) -> int:
    """See the module's docstring. A mutant's tests have `patience` seconds and three times what they take without."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", type=int, help="how many, drawn from all of them (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further mutant after this time")
    parser.add_argument("--only", metavar="TEXT", help="only mutants whose line in --list holds this text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    arguments = parser.parse_args(argv)

    found = [mutant for path in subjects for mutant in Finder(path, (root / path).read_bytes()).found]
    found = [mutant for mutant in found if arguments.only is None or arguments.only in str(mutant)]
    reasons = {mutant: next((row.reason for row in table if row.covers(mutant)), "") for mutant in found}
    mutants = [mutant for mutant in found if not reasons[mutant]]
    print(f"{len(found)} mutants, {len(found) - len(mutants)} of them excluded", flush=True)
    if arguments.list:
        for mutant in found:
            print(str(mutant) + (f"  [excluded: {reasons[mutant]}]" if reasons[mutant] else ""))
        return 0
    if arguments.sample is not None:
        mutants = random.Random(arguments.seed).sample(mutants, min(arguments.sample, len(mutants)))
        print(f"drew {len(mutants)} with seed {arguments.seed}", flush=True)

    start, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="mutate_") as folder:
        tree = Copy(root, Path(folder))
        tests = sorted({test for mutant in mutants for test in subjects[mutant.path]})
        state, took, output = tree.run(tests, 1800)
        if state != "passed":
            print(f"the tests fail without a mutant: {' '.join(tests)}\n{output}", file=sys.stderr)
            return 2
        for mutant in mutants:
            if time.monotonic() - start > arguments.seconds:
                break
            row = tree.try_mutant(mutant, subjects[mutant.path], patience + 3 * took)
            rows.append(row)
            print(f"{row['status']:<9}{row['seconds']:>6.1f} s  {mutant}", flush=True)
    counts = Counter(row["status"] for row in rows)
    dead = counts["killed"] + counts["timeout"]
    rate = dead / len(rows) if rows else 1.0
    print(f"{dead} of {len(rows)} killed ({rate:.1%}; {counts['timeout']} by the time limit)")
    if len(rows) < len(mutants):
        print(f"out of time, left out: {len(mutants) - len(rows)}")
    if arguments.json:
        excluded = [str(mutant) + f": {reason}" for mutant, reason in reasons.items() if reason]
        report = {"seed": arguments.seed, "rate": rate, "left_out": len(mutants) - len(rows), "rows": rows}
        arguments.json.write_text(json.dumps(report | {"excluded": excluded}, indent=1) + "\n")
    return 0 if rate >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
