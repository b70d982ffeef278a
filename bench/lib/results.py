"""Readers of bench/results/: a benchmark's files by device, times by case, and the heading of a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMPARED = ("peft_lora", "peft_dora", "ours")

Rows = list[dict[str, Any]]


def load(results: Path, name: str) -> dict[str, dict[str, Any]]:
    """device folder -> the JSON of one benchmark, for the devices that have it."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(results.glob(f"*/{name}.json"))}


def cases(
    rows: Rows, step: str, clock: str | None = None, variant: str = ""
) -> dict[tuple[Any, ...], dict[str, float]]:
    """(precision, N, K, R, M) -> provider -> milliseconds, in the order measured.

    clock: "graph_ms" or "ms"; by default CUDA graph times where every provider compared has one, else eager ones: both
    sides of a ratio use one clock. variant: of the rows that have one (shapes.LayerCase.variant).
    """
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["step"] == step and row["ok"] and row.get("variant", "") == variant:
            key = tuple(row[name] for name in ("precision", "N", "K", "R", "M"))
            groups.setdefault(key, {})[row["provider"]] = row
    result = {}
    for key, group in groups.items():
        compared = [group[name] for name in ("frozen", *COMPARED) if name in group]
        by_graph = all(row.get("graph_ms") for row in compared)
        one = clock or ("graph_ms" if by_graph else "ms")
        times = {name: row[one]["median"] for name, row in group.items() if row.get(one)}
        if {"frozen", "peft_dora", "ours"} <= times.keys():
            result[key] = times
    return result


def heading(device: str, data: dict[str, Any]) -> str:
    """The device, the versions, the commit and the date of a measurement."""
    meta = data["meta"]
    commit = (meta["commit"] or "unknown")[:10] + (" and changes" if meta.get("dirty") else "")
    return (
        f"**{meta['device']}** ({device}), torch {meta['torch']}, triton {meta['triton']}, PEFT {meta['peft']}, "
        f"commit `{commit}`, {meta['date'][:10]}"
    )
