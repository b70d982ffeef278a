"""Change one operator or constant of the package at a time, and see whether the tests notice.

    python tools/mutate.py --list                                   # every mutant, and what is excluded and why
    python tools/mutate.py --sample 100 --seed 7 --seconds 5400     # as `make nightly` does
    python tools/mutate.py --only passes.py:61                      # the mutants whose line in the list holds that text

A mutant is killed where its tests fail, or do not end in time. Exit status 0 where at least 95% of the mutants tried
were killed and some test runs each of the others, drawn or not; 1 where not; 2 where the tests fail without a mutant.

The tests of a file are those that mutation/subjects.py names. They run once without a mutant, which shows the lines
that each of them runs; a mutant is then tried by those that run its statement, the quick ones first, until one fails.
Where none does it has survived.

Not mutated, because no test should hold them: annotations, decorators, strings, zip's strict, what a `raise` says. What
is excluded besides stands in mutation/excluded.py, by name and with the reason. The tests run on a copy of the checkout
in a temporary folder, in which one expression is different; the rest of the file stays byte for byte what it is.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mutation.changes import Finder, Mutant
from mutation.excluded import EXCLUDED, Excluded
from mutation.running import Copy, Lines, those_that_run
from mutation.subjects import SUBJECTS

from bench.lib import outputs  # noqa: E402
from dora_kernels.files import writing  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ENOUGH = 0.95


def lines_run(tree: Copy, tests: Sequence[str], file: Path | None) -> Lines:
    """The lines that each of the tests runs; from `file` if it fits this source and these tests, else written to it."""
    key = {"digest": tree.digest(), "tests": list(tests)}
    if file is not None and file.exists():
        known = json.loads(file.read_text())
        if known["key"] == key:
            return known["lines"]
    lines = tree.lines(tests)
    if file is not None:
        writing.write_text(file, json.dumps({"key": key, "lines": lines}))
    return lines


@outputs.command("mutate")
def main(
    argv: Sequence[str] | None = None,
    root: Path = ROOT,
    subjects: Mapping[str, Sequence[str]] = SUBJECTS,
    table: Sequence[Excluded] = EXCLUDED,
    patience: float = 30,
) -> int:
    """See the module's docstring. Under a mutant a test has `patience` seconds, and ten times what it takes without."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", type=int, help="how many, drawn from all of them (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further mutant after this time")
    parser.add_argument("--only", metavar="TEXT", help="only mutants whose line in --list holds this text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    parser.add_argument("--lines", type=Path, metavar="FILE", help="keep there, for another draw, what each test runs")
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
    paths = subjects if arguments.lines else {mutant.path for mutant in mutants}
    every = mutants
    if arguments.sample is not None:
        mutants = random.Random(arguments.seed).sample(mutants, min(arguments.sample, len(mutants)))
        print(f"drew {len(mutants)} with seed {arguments.seed}", flush=True)

    outputs.claim("mutate", arguments.json, arguments.lines)
    start, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="mutate_") as folder, Copy(root, Path(folder)) as tree:
        try:
            tests = sorted({test for path in paths for test in subjects[path]})
            lines = lines_run(tree, tests, arguments.lines)
        except RuntimeError as error:
            print(f"the tests fail without a mutant: {' '.join(tests)}\n{error}", file=sys.stderr)
            return 2
        print(f"{len(lines)} tests took {time.monotonic() - start:.0f} s without a mutant", flush=True)
        unrun = [str(mutant) for mutant in every if not those_that_run(mutant, subjects[mutant.path], lines)]
        print("".join(f"no test runs {mutant}\n" for mutant in unrun), end="", flush=True)
        for mutant in mutants:
            if time.monotonic() - start > arguments.seconds:
                break
            rows.append(tree.try_mutant(mutant, subjects[mutant.path], lines, patience))
            print(_told(mutant, rows[-1]), flush=True)
    counts = Counter(row["status"] for row in rows)
    dead = counts["killed"] + counts["timeout"]
    rate = dead / len(rows) if rows else 1.0
    print(f"{dead} of {len(rows)} killed ({rate:.1%}; {counts['timeout']} by the time limit)")
    if len(rows) < len(mutants):
        print(f"out of time, left out: {len(mutants) - len(rows)}")
    if arguments.json:
        excluded = [str(mutant) + f": {reason}" for mutant, reason in reasons.items() if reason]
        report = {"seed": arguments.seed, "rate": rate, "left_out": len(mutants) - len(rows), "rows": rows}
        report |= {"excluded": excluded, "unrun": unrun}
        writing.write_text(arguments.json, json.dumps(report, indent=1) + "\n")
    return 0 if rate >= ENOUGH and not unrun else 1


def _told(mutant: Mutant, row: Mapping[str, object]) -> str:
    """The line that is printed for a mutant that was tried."""
    how = f"{row['status']:<9}{row['seconds']:>6.1f} s {row['tests']:>5} tests  {mutant}"
    return how + (f"  [{row['by']}]" if row["by"] else "")


if __name__ == "__main__":
    sys.exit(main())
