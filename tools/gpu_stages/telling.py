"""The summary of a run: the end of each stage, the table of the layer, and the ten most telling numbers last."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.lib import report
from dora_kernels.planning import measured
from gpu_stages.benchmarks import COMPILED, read

FAILURES_SHOWN = 12
TABLE_ROWS = 26
SQUARE = (8192, 4096, 4096, 64)
WIDE = (8192, 14336, 4096, 384)
FEW = (512, 4096, 4096, 64)
Row = dict[str, Any]


def summary(results: Sequence[Row], work: Path, plan: str = "first") -> str:
    """Short enough for the end of a log, the most important last."""
    lines = []
    for result in results:
        state = "skipped" if "skipped" in result else "ok" if result["ok"] else "FAILED"
        notes = [str(result[key]) for key in ("skipped", "reason", "note", "not_kept") if key in result]
        notes += [f"{count} {word}" for word, count in (result.get("counts") or {}).items()]
        notes += [f"{result['rows']} rows"] if "rows" in result else []
        notes += [f"{kernel} {ratio}" for kernel, ratio in result.get("over_default", {}).items()]
        notes += [f"left out: {'; '.join(result['left_out'])}"[:200]] if result.get("left_out") else []
        lines.append(f"{result['stage']:<13}{state:<9}{result['seconds']:>6.0f} s  {', '.join(notes)}")
        failures = result.get("failures") or {}
        lines += [f"    {name}: {(message or '-').splitlines()[0]}"[:200] for name, message in _first(failures.items())]
        lines += [f"    {line[:200]}" for line in _first(result.get("not_measured", ()))]
        lines += [f"    {line}" for line in result.get("told", ())]
    for name in ("head", "layer"):
        rows = read(work / f"{name}.json")["rows"]
        if rows and any(result["stage"] == name for result in results):
            table = report.table(rows).splitlines()
            lines += ["", f"{name}: step times over the frozen linear layer"]
            lines += [*table[:TABLE_ROWS], *table[TABLE_ROWS:][-2:]]
    return "\n".join(lines + ["", *telling(work, plan)])


def _first(items: Iterable[Any]) -> list[Any]:
    return list(items)[:FAILURES_SHOWN]


def telling(work: Path, plan: str) -> list[str]:
    """The most telling numbers of a plan, a line each; what was not measured is a dash."""
    return [f"{name:<54}{_safely(number, work)}" for name, number in NUMBERS[plan].items()]


def _safely(number: Callable[[Path], str], work: Path) -> str:
    try:
        return number(work)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError, AttributeError):
        return "-"


def _each(work: Path, number: Callable[..., str], arguments: Iterable[Any]) -> str:
    return " / ".join(_safely(lambda work, argument=argument: number(work, argument), work) for argument in arguments)


def _rows(work: Path, *names: str, **wanted: Any) -> list[Row]:
    """Rows of the files in order that have these values."""
    rows = [row for name in names for row in read(work / f"{name}.json")["rows"]]
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def _sizes(sizes: tuple[int, int, int, int]) -> Row:
    return dict(zip("MNKR", sizes, strict=True))


def _of(rows: list[Row], read_one: Callable[[Row], float | None], form: str) -> str:
    values = [value for row in rows if (value := read_one(row)) is not None]
    return form.format(values[0]) if values else "-"


def _roof(work: Path) -> Row:
    """Of the facts, else of a benchmark that measured its own."""
    for row in _rows(work, "facts", fact="roofs", ok=True):
        return row["value"]
    return next((meta["roof"] for name in ("kernels", "decisive") if "roof" in (meta := _meta(work, name))), {})


def _meta(work: Path, name: str) -> Row:
    return read(work / f"{name}.json")["meta"]


def _percent(work: Path, kernel: str, sizes: tuple[int, int, int, int] = SQUARE) -> str:
    rows = _rows(work, "kernels", "decisive", kernel=kernel, by="kernel", precision="bf16", **_sizes(sizes))
    return _of(rows, lambda row: row.get("percent_of_roof"), "{:.0f}%")


def _over_library(work: Path, kernel: str) -> str:
    """Our kernel's time over that of the call of the GEMM library, in one table."""
    rows = _rows(work, "kernels", kernel=kernel, precision="bf16", **_sizes(SQUARE))
    ms = {row["by"]: row["ms"]["median"] for row in rows}
    return f"{ms['kernel'] / ms['library']:.2f}"


def _step(work: Path, sizes: tuple[int, int, int, int], over: str) -> str:
    """Our training step over another provider's, by graph."""
    ms = _graphs(work, "layer", sizes) or _graphs(work, "head", sizes)
    return f"{ms['ours'] / ms[over]:.2f}"


def _graphs(work: Path, name: str, sizes: tuple[int, int, int, int] = SQUARE, variant: str = "") -> dict[str, float]:
    """Milliseconds of a training step by graph, by provider."""
    rows = _rows(work, name, step="forward+backward", precision="bf16", variant=variant, **_sizes(sizes))
    return {row["provider"]: row["graph_ms"]["median"] for row in rows if row.get("graph_ms")}


def _steps(work: Path, over: str) -> str:
    return _each(work, lambda work, sizes: _step(work, sizes, over), (SQUARE, WIDE, FEW))


def _ways(work: Path, name: str) -> str:
    """The fastest way of a pass at the square layer, and its time over that of the way taken without a measurement."""
    us = {row["way"]: row["us"] for row in _rows(work, "ways", **{"pass": name}, **_sizes(SQUARE)) if "us" in row}
    before = measured.PARTS[name][0]
    best = min(us, key=lambda way: us[way])
    return f"{best} {us[best] / us[before]:.3f}"


def _merged_wins(work: Path) -> str:
    """The M at which the pass through the merged weight is the faster one."""
    found = {}
    for row in _rows(work, "decisive", section="merged_against_split"):
        found.setdefault(f"N={row['N']} R={row['R']}", {})[row["M"]] = row["ms"]["merged"] < row["ms"]["split"]
    shown = [f"{name}: {[M for M, wins in sorted(of.items()) if wins]}" for name, of in found.items()]
    return "; ".join(shown) or "-"


def _host(work: Path) -> str:
    rows = _rows(work, "decisive", section="host_cost", call="layer, forward+backward")
    return _of(rows, lambda row: row["us"], "{:.0f} us")


def _model(work: Path) -> str:
    seconds = {row["variant"]: row["seconds"] for row in _rows(work, "model", ok=True)}
    return " / ".join(f"{seconds['ours'] / seconds[over]:.2f}" for over in ("frozen", "peft_lora", "peft_dora"))


def _dropout(work: Path) -> str:
    """A training step at dropout 0.05 over one without: on all that the adapter adds, on the low-rank product alone."""
    with_it, without = _graphs(work, "layer", variant="dropout 0.05"), _graphs(work, "layer")
    return " / ".join(f"{with_it[name] / without['ours']:.2f}" for name in ("ours", "ours_lora_dropout"))


def _shared(work: Path) -> str:
    """The step of q, k and v that share the low-rank product over the step of the three apart, by graph."""
    shared = _rows(work, "layer", provider="ours_shared")[0]
    apart = _rows(work, "layer", provider="ours", variant=shared["variant"])[0]
    return f"{shared['graph_ms']['median'] / apart['graph_ms']['median']:.2f}"


def _compiled(work: Path) -> str:
    """Our eager layer's step over what torch.compile makes of others, by graph, each in a run of its own."""

    def over(work: Path, provider: str) -> str:
        ms = _graphs(work, provider)
        return f"{ms['ours'] / ms[provider]:.2f}"

    return _each(work, over, COMPILED)


def _memory(work: Path) -> str:
    peaks = {row["variant"]: row["peak_bytes"] for row in _rows(work, "model", ok=True)}
    return " / ".join(f"{peaks[name] / 2**30:.1f} GiB" for name in ("ours", "peft_lora", "peft_dora"))


def _tuned(work: Path) -> str:
    measured = json.loads((work / "tuned.json").read_text())["measured"]["2"]
    ratios = {kernel: found.get("over_default") for kernel, found in measured.items()}
    return ", ".join(f"{kernel} {'-' if ratio is None else f'{ratio:.2f}'}" for kernel, ratio in ratios.items())


_FIRST: dict[str, Callable[[Path], str]] = {
    "copy, TB/s": lambda work: f"{_roof(work)['bandwidth'] / 1e12:.2f}",
    "bf16 matmul, TFLOP/s": lambda work: f"{_roof(work)['matmul']['bf16'] / 1e12:.0f}",
    "% of roof: norm / merge / epilogue / token_sums": lambda work: _each(
        work, _percent, ("norm", "merge", "epilogue", "token_sums")
    ),
    "% of roof: norm at R = 384": lambda work: _percent(work, "norm", WIDE),
    "project / outer_product over the GEMM library": lambda work: _each(
        work, _over_library, ("project", "outer_product")
    ),
    "step over frozen, square / R = 384 / 512 tokens": lambda work: _steps(work, "frozen"),
    "step over PEFT DoRA, the same": lambda work: _steps(work, "peft_dora"),
    "forward / inference / backward by the fastest way": lambda work: _each(
        work, _ways, ("forward", "inference", "backward")
    ),
    "host, forward+backward": _host,
    "merged beats split at M": _merged_wins,
}
_SECOND: dict[str, Callable[[Path], str]] = {
    "tuned over default": _tuned,
    "step over frozen, square / R = 384 / 512 tokens": lambda work: _steps(work, "frozen"),
    "step over PEFT LoRA, the same": lambda work: _steps(work, "peft_lora"),
    "step over PEFT DoRA, the same": lambda work: _steps(work, "peft_dora"),
    "dropout 0.05 over none, on the adapter / its product": _dropout,
    "shared inputs over apart": _shared,
    "ours over compiled PEFT DoRA / published kernels": _compiled,
    "model: ours over frozen / PEFT LoRA / PEFT DoRA": _model,
    "model: peak of ours / PEFT LoRA / PEFT DoRA": _memory,
    "bf16 matmul, TFLOP/s (in the first run)": _FIRST["bf16 matmul, TFLOP/s"],
}
NUMBERS = {"first": _FIRST, "second": _SECOND, "all": _SECOND | _FIRST}
