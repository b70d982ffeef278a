"""The tables of bench.host's rows, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.lib.report import aligned

STOCK = "PEFT DoRA"
IN_SCOPE = " in frozen_adapters"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each row, with its time over that of PEFT's DoRA layer in the same step."""
    stock = {_compared(row): row["us"] for row in rows if row["provider"] == STOCK}
    lines = [("case", "step", "planned M", "provider", "us", "least", f"over {STOCK}", "Triton", "library")]
    for row in rows:
        over = f"{row['us'] / stock[_compared(row)]:.2f}" if _compared(row) in stock else "-"
        where = (row["case"], row["step"], str(row["planned"]["M"]), row["provider"])
        numbers = (f"{row['us']:.0f}", f"{row['least_us']:.0f}", over, f"{row['triton']}")
        lines.append((*where, *numbers, str(len(row["library"]))))
    return "\n".join(aligned(lines))


def _compared(row: dict[str, Any]) -> tuple[str, str]:
    """The key that a row shares with the row it is compared with: in a scope PEFT's own layer reuses nothing."""
    return row["case"], row["step"].removesuffix(IN_SCOPE)


def launcher_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each of our launchers in a training step, and one for all of them."""
    lines = [("case", "launcher in a step", "launches", "us", "of these Triton's JIT", "compiled kernels")]
    for case in dict.fromkeys(row["case"] for row in rows):
        group = [row for row in rows if row["case"] == case]
        total = {name: sum(row[name] for row in group) for name in ("launches", "us", "jit_us", "kernel_us")}
        for row in (*group, {"launcher": "all"} | total):
            times = [f"{row[name]:.1f}" for name in ("us", "jit_us", "kernel_us")]
            lines.append((case, row["launcher"], str(row["launches"]), *times))
    return "\n".join(aligned(lines))
