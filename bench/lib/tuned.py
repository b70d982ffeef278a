"""The table of what was measured on a GPU, tuned/<gpu>.json of dora_kernels/planning: who writes it keeps the rest.

    python -m bench.lib.tuned FILE ...       # enters tables that stages have left into the package's, part by part

"configs" and "measured" are of tools/tune.py, "ways" of bench.studies.ways. Of a table that is entered a part replaces
the package's, but "ways" shape by shape.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.lib import outputs
from dora_kernels.files import writing
from dora_kernels.planning import configs, measured

Table = dict[str, Any]
PARTS: dict[str, type] = {"meta": dict, "configs": dict, "measured": dict, "ways": list}


def read(path: Path) -> Table:
    """The parts of the table in a file that are what they should be: none where it is missing or broken."""
    try:
        table = json.loads(path.read_text())
        return {name: table[name] for name, kind in PARTS.items() if isinstance(table.get(name), kind)}
    except (OSError, ValueError, AttributeError):
        return {}


def write(path: Path, table: Table) -> None:
    """Whole or not at all. Who has read the table before holds it (outputs.claim), or loses what came meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writing.write_text(path, json.dumps(table, indent=1, allow_nan=False) + "\n")


def with_entries(ways: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of `ways`, and `new` in the place of those of the same shape."""

    def shape(entry: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(entry.get(name) for name in "MNKR")

    replaced = {shape(entry) for entry in new}
    return [entry for entry in ways if shape(entry) not in replaced] + list(new)


def won(name: str, us: dict[str, float]) -> str:
    """The way of a pass that took least, and its time over that of the one which is taken where nothing was measured;
    where it is that one, the next one's.
    """
    before = measured.PARTS[name][0]
    best, second = sorted(us, key=lambda way: us[way])[:2]
    over = f"{100 * (us[second if best == before else best] / us[before] - 1):+.1f}% of {us[before]:.0f} us"
    return f"{name} {best} ({second} {over})" if best == before else f"{name} {best} {over}"


def enter(path: Path) -> Path:
    """Enter the parts of the table in a file into the package's of the same GPU; returns the path of that."""
    new = read(path)
    package = configs.tuned_path(new["meta"]["device"])
    package.parent.mkdir(parents=True, exist_ok=True)
    with writing.claimed("tuned", package):
        known = read(package)
        ways = with_entries(known.get("ways", ()), new.get("ways", ()))
        write(package, known | new | ({"ways": ways} if ways else {}))
    return package


@outputs.command("bench.lib.tuned")
def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring; returns 0, or 1 where a file is no table of a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.lib.tuned", description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    for path in parser.parse_args(argv).files:
        device = read(path).get("meta", {}).get("device")
        if device is None:
            print(f"bench.lib.tuned: {path} is no table; expected what a stage has left", file=sys.stderr)
            return 1
        outputs.claim("bench.lib.tuned", configs.tuned_path(device))
        print(f"{path} -> {enter(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
