"""Results on disk and on the terminal: JSON {meta, rows}, and the table of ratios."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

from dora_kernels.files import writing
from dora_kernels.testing import geometric_mean


def write(path: pathlib.Path, meta: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """{meta, rows} as JSON, a row per line, whole or not at all; numbers to 4 digits, inf and NaN as null."""
    lines = ",\n".join(json.dumps(_tidy(row), allow_nan=False) for row in rows)
    text = f'{{"meta": {json.dumps(_tidy(meta), indent=1, allow_nan=False)},\n"rows": [\n{lines}\n]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    writing.write_text(path, text)


def _tidy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tidy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tidy(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Per case and step: the frozen linear in ms, and every provider's median over it and over PEFT DoRA.

    Graph times where frozen, PEFT DoRA and ours all have one, else eager ones; inference by both clocks, for a graph
    computes the norm that eager calls in frozen_adapters keep. A dash where there is no time. The means are of a case's
    first line.
    """
    groups = _by_case(rows)
    names = list(dict.fromkeys(name for group in groups.values() for name in group if name != "frozen"))
    lines = [(*CASE, "clock", "frozen ms", *names, "ours/peft_dora")]
    ratios: dict[str, list[float]] = {"ours/frozen": [], "ours/peft_dora": []}
    for key, group in groups.items():
        compared = [group[name] for name in ("frozen", "peft_dora", "ours") if name in group]
        clocks = ["graph_ms"] if all(row["graph_ms"] for row in compared) else []
        clocks += ["ms"] if not clocks or key[1].startswith("inference") else []
        for clock in clocks:
            median = {name: row[clock]["median"] for name, row in group.items() if row[clock]}

            def over(name: str, base: str, median: dict[str, float] = median) -> float | None:
                return median[name] / median[base] if name in median and base in median else None

            for ratio in ratios:
                value = over(*ratio.split("/")) if clock == clocks[0] else None
                ratios[ratio] += [] if value is None else [value]
            floor = f"{median['frozen']:.3f}" if "frozen" in median else "-"
            cells = [over(name, "frozen") for name in names] + [over("ours", "peft_dora")]
            shown = ["-" if cell is None else f"{cell:.2f}" for cell in cells]
            lines.append((*map(str, key), "graph" if clock == "graph_ms" else "eager", floor, *shown))
    text = aligned(lines)
    text += [f"geometric mean of {name}: {geometric_mean(values):.2f}" for name, values in ratios.items() if values]
    return "\n".join(text)


def memory(rows: Iterable[dict[str, Any]]) -> str:
    """Per case and step: every provider's peak in MiB, a dash where there is none."""
    groups = _by_case(rows)
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    lines = [(*CASE, *names)]
    for key, group in groups.items():
        peaks = [group[name]["peak_bytes"] if name in group else None for name in names]
        lines.append((*map(str, key), *("-" if peak is None else f"{peak / 2**20:.1f}" for peak in peaks)))
    return "\n".join(aligned(lines))


CASE = ("precision", "step", "M", "N", "K", "R", "variant")


def _by_case(rows: Iterable[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    """The row of each provider, by the values of CASE."""
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name, "") for name in CASE), {})[row["provider"]] = row
    return groups


def aligned(lines: list[tuple[str, ...]]) -> list[str]:
    """The lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def problems(rows: Iterable[dict[str, Any]]) -> list[str]:
    """One line for each provider that a case has no time for, or no graph time."""
    lines = [
        f"{row['provider']} M={row['M']} N={row['N']} K={row['K']} R={row['R']} {row['precision']}"
        f"{row.get('variant') and ' ' + row['variant'] or ''}: {reason}"
        for row in rows
        for reason in (row["reason"], row["graph_reason"] and f"CUDA graph: {row['graph_reason']}")
        if reason
    ]
    return list(dict.fromkeys(lines))
