"""The mutation check itself, on a toy: what it changes, what it calls killed, and when it is not content."""

import ast
import dataclasses
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import mutate  # noqa: E402
from mutation import subjects  # noqa: E402
from mutation.changes import Finder  # noqa: E402
from mutation.excluded import EXCLUDED, Excluded  # noqa: E402
from mutation.running import Copy, those_that_run  # noqa: E402

TOY = '''\
"""A toy; the 1 in a docstring stays."""

BLOCK = 64  # only speed


def add(a: int | float, b=0):
    if a is None:
        raise ValueError(f"a is {a!r}" + "; expected a number")
    return (a  +  b)  # odd spaces stay


def scale(x, by=3):
    return 2 * (x - by)


def down(n):
    while n > 0:
        n -= 1
    return n
'''
# nothing holds scale
TESTS = """\
import pytest
from dora_kernels import toy

def test_add():
    assert toy.add(1, 5) == 6 and toy.add(1) == 1
    with pytest.raises(ValueError):
        toy.add(None)

def test_down():
    assert toy.down(3) == 0
"""


@pytest.fixture
def toy(tmp_path):
    """The root of a checkout with one file and one test."""
    for path, text in {"dora_kernels/__init__.py": "", "dora_kernels/toy.py": TOY, "tests/test_toy.py": TESTS}.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


TOY_PATH = "dora_kernels/toy.py"
SUBJECTS = {TOY_PATH: ("tests/test_toy.py",)}


def all_of_them(*arguments):
    """In place of Copy.lines: one test, that runs in a process of its own."""
    return {"tests/test_toy.py::test": (1.0, {})}


def run(root, *arguments, excluded=()):
    """(exit status, report) of the tool on the toy."""
    path = root / "report.json"
    status = mutate.main([*arguments, "--json", str(path)], root, SUBJECTS, excluded, patience=3)
    return status, json.loads(path.read_text())


def test_what_is_changed():
    source = TOY.encode()
    found = Finder("toy.py", source).found
    assert [(mutant.function, mutant.change) for mutant in found] == [
        ("", "64 -> 65"),
        ("add", "0 -> 1"),
        ("add", "a is None -> (a is not None)"),
        ("add", "a + b -> (a - b)"),
        ("scale", "3 -> 4"),
        ("scale", "2 * (x - by) -> (2 / (x - by))"),
        ("scale", "2 -> 3"),
        ("scale", "x - by -> (x + by)"),
        ("down", "n > 0 -> (n >= 0)"),
        ("down", "0 -> 1"),
        ("down", "n -= 1 -> n += 1"),
        ("down", "1 -> 0"),
    ]
    for mutant in found:
        changed = mutant.apply(source)
        ast.parse(changed)
        tail = len(source) - mutant.end
        assert changed[: mutant.start] == source[: mutant.start] and changed[-tail:] == source[-tail:]
        assert changed != source


@pytest.mark.parametrize(
    ("expression", "changes"),
    (
        ("x & y | z", ["x & y | z -> (x & y & z)", "x & y -> (x | y)"]),
        ("a and b or c", ["a and b or c -> ((a and b) and c)", "a and b -> (a or b)"]),
        ("not a", ["not a -> (a)"]),
        ("a < b <= c", ["a < b <= c -> (a <= b <= c)", "a < b <= c -> (a < b < c)"]),
        ("max(a, 1)", ["max(a, 1) -> min(a, 1)", "1 -> 0"]),
        ("tl.minimum(a, b)", ["tl.minimum(a, b) -> tl.maximum(a, b)"]),
        ("x.to(d).T", ["x.to(d) -> x"]),
        ("zip(a, strict=True)", []),
        ("a if b else c", ["b -> (not b)"]),
        ("f(flag=True, scale=-1.0)", ["True -> False", "-1.0 -> (1.0)", "1.0 -> 0.0"]),
        ("0 + 0", ["0 + 0 -> (0 - 0)", "0 -> 1", "0 -> 1 (2)"]),
        ("'é' + x", ["'é' + x -> ('é' - x)"]),
    ),
)  # fmt: skip
def test_each_kind_of_change(expression, changes):
    source = f"é = {expression}\n".encode()  # ast counts bytes
    found = Finder("toy.py", source).found
    assert [mutant.change for mutant in found] == changes
    assert {mutant.apply(source).decode() for mutant in found}.isdisjoint({source.decode()})
    for mutant in found:
        ast.parse(mutant.apply(source))


# of the toy's mutants these are tried below
TRIED = ("a + b", "2 -> 3", "n -= 1")


@pytest.fixture
def few():
    """Excludes the other mutants of the toy."""
    found = Finder("dora_kernels/toy.py", TOY.encode()).found
    others = [mutant for mutant in found if not mutant.change.startswith(TRIED)]
    return [Excluded(other.path, other.function, "", (other.change,), "only speed") for other in others]


def test_killed_survived_and_excluded(toy, few, capsys):
    before = {path: path.read_bytes() for path in toy.rglob("*") if path.is_file()}
    status, report = run(toy, excluded=few)
    outcome = [(row["original"], row["status"], row["tests"], row["by"]) for row in report["rows"]]
    killed = ("a + b", "killed", 1, "tests/test_toy.py::test_add")
    assert outcome == [killed, ("2", "survived", 0, None), ("n -= 1", "timeout", 1, None)]
    assert report["unrun"] == ["dora_kernels/toy.py:13 (scale)  2 -> 3"]
    assert len(report["excluded"]) == 9 and all(line.endswith(": only speed") for line in report["excluded"])
    assert status == 1 and report["rate"] == pytest.approx(2 / 3)
    assert "2 of 3 killed (66.7%; 1 by the time limit)" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in toy.rglob("*") if path.is_file() and path.suffix != ".json"}


def test_what_no_test_runs_fails_without_being_drawn(toy, monkeypatch):
    monkeypatch.setattr(Copy, "lines", lambda *arguments: {"tests/test_toy.py::test": (1.0, {TOY_PATH: [9]})})
    status, report = run(toy, "--sample", "0")
    assert status == 1 and report["rate"] == 1.0 and report["rows"] == []
    assert {line.partition("(")[2].partition(")")[0] for line in report["unrun"]} == {"add", "scale", "down"}


@pytest.mark.parametrize(("killed", "expected"), ((95, 0), (94, 1)))
def test_95_of_100_are_enough(killed, expected, toy, monkeypatch):
    (toy / "dora_kernels" / "toy.py").write_text("".join(f"x = {number}\n" for number in range(2, 102)))
    states = iter(["failed"] * killed + ["passed"] * (100 - killed))
    monkeypatch.setattr(Copy, "lines", all_of_them)
    monkeypatch.setattr(Copy, "run", lambda *arguments: (next(states), 1.0, ""))
    assert run(toy)[0] == expected


def test_a_drawn_sample_is_the_same_for_the_same_seed(toy, monkeypatch):
    monkeypatch.setattr(Copy, "lines", all_of_them)
    monkeypatch.setattr(Copy, "run", lambda *arguments: ("passed", 1.0, ""))
    drawn = [[row["start"] for row in run(toy, "--sample", "4", "--seed", seed)[1]["rows"]] for seed in ("1", "1", "5")]
    assert len(set(drawn[0])) == 4 and drawn[0] == drawn[1] != drawn[2]


def test_out_of_time_and_a_list_run_nothing(toy, capsys, monkeypatch):
    monkeypatch.setattr(Copy, "lines", all_of_them)
    monkeypatch.setattr(Copy, "run", lambda *arguments: ("passed", 1.0, ""))
    _, report = run(toy, "--seconds", "0", "--sample", "3")
    assert report["rows"] == [] and report["left_out"] == 3
    assert mutate.main(["--list", "--only", "(scale)"], toy, SUBJECTS, ()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-5] == "4 mutants, 0 of them excluded"
    assert lines[-1].strip() == "dora_kernels/toy.py:13 (scale)  x - by -> (x + by)"


def test_tests_that_fail_anyway_say_nothing_about_mutants(toy, capsys):
    (toy / "tests" / "test_toy.py").write_text("def test(): assert False\n")
    assert mutate.main(["--sample", "1"], toy, SUBJECTS, ()) == 2
    assert "the tests fail without a mutant" in capsys.readouterr().err


def test_every_exclusion_still_excludes_something():
    found = [mutant for path in subjects.SUBJECTS for mutant in Finder(path, (ROOT / path).read_bytes()).found]
    assert len(found) > 500
    for row in EXCLUDED:
        for change in row.changes:
            one = dataclasses.replace(row, changes=(change,))
            assert row.reason and any(one.covers(mutant) for mutant in found), one
    assert len(set(EXCLUDED)) == len(EXCLUDED)
    assert all((ROOT / test.partition("::")[0]).exists() for tests in subjects.SUBJECTS.values() for test in tests)


def test_which_tests_try_a_mutant(toy):
    path = "dora_kernels/toy.py"
    plus, constant = (
        next(mutant for mutant in Finder(path, TOY.encode()).found if mutant.change.startswith(change))
        for change in ("a + b", "64")
    )
    lines = {
        "tests/test_a.py::slow": (9.0, {path: [7, 9]}),
        "tests/test_a.py::raises": (1.0, {path: [7, 8]}),
        "tests/test_a.py::quick": (2.0, {path: [7, 9]}),
        "tests/test_a.py::process": (3.0, {}),
        "tests/test_b.py::cheap[1]": (4.0, {path: [9]}),
        "tests/test_c.py::compiles[1]": (5.0, {"dora_kernels/other.py": [9]}),
        "tests/test_c.py::other": (5.0, {path: [9]}),
    }
    mapped = ("tests/test_a.py", "tests/test_b.py", "tests/test_c.py::compiles")
    named = [name.partition("::")[2] for name in those_that_run(plus, mapped, lines)]
    assert named == ["quick", "cheap[1]", "slow", "process", "compiles[1]"]
    # a line of the top level is in every test
    assert len(those_that_run(constant, mapped, lines)) == 6


def test_every_file_is_mutated_or_it_says_why_not():
    reasons = subjects.NOT_MUTATED
    for path in (ROOT / "dora_kernels").rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        left_out = any(name == prefix or prefix.endswith("/") and name.startswith(prefix) for prefix in reasons)
        assert (name in subjects.SUBJECTS) != left_out, name
    assert all((ROOT / name).exists() for name in (*reasons, *subjects.SUBJECTS))


ANSWERS_AT_ONCE = """
import json, os, sys
os.setsid()
for line in sys.stdin:
    open(json.loads(line)[1], "w").close()
    sys.stdout.write(f"{os.getpid()}\\n0\\n")
    sys.stdout.flush()
"""


def test_a_run_that_ends_before_it_is_waited_for_has_ended(toy, tmp_path):
    """Its process and its status come in one piece."""
    tree = Copy(toy, tmp_path / "copy")
    (tree.folder / "mutation_server.py").write_text(ANSWERS_AT_ONCE)
    with tree:
        state, seconds, _ = tree.run([], seconds=5)
    assert state == "passed" and seconds < 5
