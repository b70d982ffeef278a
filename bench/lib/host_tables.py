"""The tables of bench.host's rows: for a terminal, and for docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.lib.report import aligned

STOCK = "PEFT DoRA"
LAUNCHING = (STOCK, "enabled PEFT layer")
"""The providers whose launches are shown: ours all have the same, or one more."""
IN_SCOPE = " in frozen_adapters"
Row = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """A line for each row, with its time and its instructions over those of PEFT's DoRA layer in the same step."""
    lines = [("case", "step", "provider", "us", "least", f"over {STOCK}", "instructions", "over", "Triton", "library")]
    for row in rows:
        counted, least = row.get("instructions"), f"{row['least_us']:.0f}"
        instructions = (f"{counted / 1e3:.0f}k" if counted else "-", _over(rows, row, "instructions"))
        launches = (str(row["triton"]), str(len(row["library"])))
        where = (row["case"], row["step"], row["provider"])
        lines.append((*where, f"{row['us']:.0f}", least, _over(rows, row, "us"), *instructions, *launches))
    return "\n".join(aligned(lines))


def _over(rows: Sequence[Row], row: Row, what: str) -> str:
    """A row's number over that of PEFT's DoRA layer in the same step: in a scope that layer reuses nothing."""
    key = row["case"], row["step"].removesuffix(IN_SCOPE), STOCK
    for stock in rows:
        if (stock["case"], stock["step"], stock["provider"]) == key and stock.get(what) and row.get(what):
            return f"{row[what] / stock[what]:.2f}"
    return "-"


def launcher_table(rows: Sequence[Row]) -> str:
    """A line for each of our launchers in a training step, and one for all of them; "" without any."""
    if not rows:
        return ""
    lines = [("case", "launcher in a step", "launches", "us", "by Triton's JIT alone", "compiled kernels alone")]
    for case in dict.fromkeys(row["case"] for row in rows):
        group = [row for row in rows if row["case"] == case]
        total = {name: sum(row[name] for row in group) for name in ("launches", "us", "jit_us", "kernel_us")}
        for row in (*group, {"launcher": "all"} | total):
            times = [f"{row[name]:.1f}" for name in ("us", "jit_us", "kernel_us")]
            lines.append((case, row["launcher"], str(row["launches"]), *times))
    return "\n".join(aligned(lines))


def markdown(rows: Sequence[Row]) -> str:
    """A line for each case and step, a column for each provider: us (over PEFT's DoRA; its instructions over those).

    And the launches, Triton's and the library's together, of PEFT's DoRA and of ours.
    """
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["step"]), {})[row["provider"]] = row
    lines = [f"| case | step | {' | '.join(providers)} | launches |", "| --- " * (3 + len(providers)) + "|"]
    for key, group in groups.items():
        cells = [_cell(rows, group[name]) if name in group else "" for name in providers]
        launches = [str(group[name]["triton"] + len(group[name]["library"])) for name in LAUNCHING if name in group]
        lines.append(f"| {' | '.join([*key, *cells, ', '.join(launches)])} |")
    return "\n".join(lines)


def _cell(rows: Sequence[Row], row: Row) -> str:
    ratios = [_over(rows, row, what) for what in ("us", "instructions") if row.get(what)]
    return f"{row['us']:.0f} ({'; '.join(ratios)})"
