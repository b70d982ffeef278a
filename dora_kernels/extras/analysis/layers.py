"""The parts of an analysis: the layers to measure, those left out and the reason, and the points."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

from dora_kernels.extras.analysis.measure import Change
from dora_kernels.functional.arguments import check_items, check_type

METHODS = ("full", "LoRA", "DoRA")
"""full: a dense tuned weight, whatever it was tuned by; a merged adapter is one."""

NAMES_SHOWN = 3
"""The number of layer names that a line of str(Analysis) shows before it abbreviates."""


@dataclass(frozen=True)
class Layer:
    """A layer to be measured; `measure` reads its tensors, which are let go before the next layer's."""

    name: str
    checkpoint: str
    method: str
    measure: Callable[[], Change]


@dataclass(frozen=True)
class LeftOut:
    """A tensor or layer that is not analysed, and why."""

    name: str
    checkpoint: str
    reason: str


@dataclass(frozen=True)
class Point:
    """One layer of one checkpoint in the scatter. Raises ValueError unless its names are str, and
    its changes numbers."""

    layer: str
    checkpoint: str
    method: str
    delta_magnitude: float
    delta_direction: float

    def __post_init__(self) -> None:
        for name in ("layer", "checkpoint", "method"):
            check_type("Point", name, getattr(self, name), str, "a name")
        for name in ("delta_magnitude", "delta_direction"):
            check_type("Point", name, getattr(self, name), Real, "a number")


@dataclass(frozen=True)
class Trend:
    """The least-squares line delta M = slope * delta D + intercept, and Pearson's correlation.

    None where there is none: fewer than two distinct delta D have no line, and no correlation if all delta M are equal;
    nor is there one whose numbers leave float64.
    """

    count: int
    slope: float | None = None
    intercept: float | None = None
    correlation: float | None = None


def trend(points: Sequence[Point]) -> Trend:
    """The line through `points`."""
    check_items("trend", "points", points, Point, "a Point")
    x, y = [point.delta_direction for point in points], [point.delta_magnitude for point in points]
    if len(set(x)) < 2:
        return Trend(len(points))
    # near 1, so that no square leaves float64: by powers of two, which round nothing
    up_x, up_y = (-math.frexp(max(map(abs, values)))[1] for values in (x, y))
    x, y = [math.ldexp(value, up_x) for value in x], [math.ldexp(value, up_y) for value in y]
    correlation = statistics.correlation(x, y) if len(set(y)) > 1 else None
    line = statistics.linear_regression(x, y)
    try:
        return Trend(len(points), math.ldexp(line.slope, up_x - up_y), math.ldexp(line.intercept, -up_y), correlation)
    except OverflowError:
        return Trend(len(points), correlation=correlation)


@dataclass(frozen=True)
class Analysis:
    """Every point, in the order of the checkpoints, and what was left out."""

    points: list[Point] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def trends(self) -> dict[str, Trend]:
        """method -> the line through its points, for the methods that have one point or more."""
        groups = {method: [point for point in self.points if point.method == method] for method in METHODS}
        return {method: trend(points) for method, points in groups.items() if points}

    def to_json(self) -> dict[str, Any]:
        """{points, trends, left_out}."""
        return {
            "points": [asdict(point) for point in self.points],
            "trends": {method: asdict(line) for method, line in self.trends().items()},
            "left_out": [asdict(entry) for entry in self.left_out],
        }

    def __str__(self) -> str:
        lines = [("method", "points", "slope", "intercept", "correlation")]
        for method, line in self.trends().items():
            numbers = (line.slope, line.intercept, line.correlation)
            lines.append((method, str(line.count), *("none" if n is None else f"{n:.3g}" for n in numbers)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in lines]
        groups: dict[tuple[str, str], list[str]] = {}
        for entry in self.left_out:
            groups.setdefault((entry.checkpoint, entry.reason), []).append(entry.name)
        for (checkpoint, reason), names in groups.items():
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            text.append(f"left out of {checkpoint}: {reason} ({', '.join(names[:NAMES_SHOWN])}{more})")
        return "\n".join(text)


Track = Callable[[Sequence[Layer]], Iterable[Layer]]
"""Hands the layers on one by one, and may show how far it is, as rich.progress.track."""


def measure(layers: Sequence[Layer], left_out: Sequence[LeftOut], track: Track = iter) -> Analysis:
    """Measure one layer after another. A layer whose change is not finite, or that has no direction, is left out."""
    analysis = Analysis([], list(left_out))
    for layer in track(layers):
        try:
            change = layer.measure()
        except ValueError as error:
            analysis.left_out.append(LeftOut(layer.name, layer.checkpoint, str(error)))
            continue
        if change.delta_direction is None:
            reason = "no row has a direction before and after"
            analysis.left_out.append(LeftOut(layer.name, layer.checkpoint, reason))
        else:
            names = (layer.name, layer.checkpoint, layer.method)
            analysis.points.append(Point(*names, change.delta_magnitude, change.delta_direction))
    return analysis
