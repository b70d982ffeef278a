"""The figure: a panel for each method, delta M against delta D, with the line through its points."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from dora_kernels.extras.analysis.layers import METHODS, Analysis, Point
from dora_kernels.files import writing
from dora_kernels.files.reading import printable
from dora_kernels.functional.arguments import check_path, check_type

MARKERS = "os^DvPX*<>"
"""One for each checkpoint of a method, in the order given; of the eleventh on, the last."""

COLOURS = 10
"""At most so many kinds of layer have a colour each; of more, all have the same."""

LONGEST_KIND, LONGEST_TITLE = 40, 80
"""Characters. Of longer names the middle is left out."""


def draw(analysis: Analysis, path: str | Path, title: str | None = None) -> None:
    """Write a PNG. A marker is a checkpoint, a colour a kind of layer (the last part of its name).

    The same analysis gives the same bytes. Raises ValueError unless the arguments are of these types, and
    where no file can be written to path.
    """
    check_type("draw", "analysis", analysis, Analysis, "an Analysis")
    check_path("draw", "path", path)
    if title is not None:
        check_type("draw", "title", title, str, "a title, or None")
    writing.check_target("draw", "path", path)
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    trends = analysis.trends()
    kinds = sorted({_kind(point) for point in analysis.points})
    colours = {kind: f"C{number if len(kinds) <= COLOURS else 0}" for number, kind in enumerate(kinds)}
    panels = [method for method in METHODS if method in trends] or list(METHODS)
    figure = Figure(figsize=(2 + 4 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, method in zip(axes[0], panels, strict=True):
        points = [point for point in analysis.points if point.method == method]
        markers: dict[str, str] = {}
        # one artist for all points of a look: with one for each, the 33,333 of a mixture of experts took 16 s, not 0.3
        looks: dict[tuple[str, str], list[Point]] = {}
        for point in points:
            marker = markers.setdefault(point.checkpoint, MARKERS[min(len(markers), len(MARKERS) - 1)])
            looks.setdefault((marker, colours[_kind(point)]), []).append(point)
        for (marker, colour), group in looks.items():
            style = {"color": colour, "marker": marker, "markersize": 5, "alpha": 0.7, "linestyle": ""}
            x, y = ([getattr(point, name) for point in group] for name in ("delta_direction", "delta_magnitude"))
            axis.plot(x, y, **style)
        label = method
        if method in trends and trends[method].slope is not None:
            line, x = trends[method], sorted(point.delta_direction for point in points)
            ends = [x[0], x[-1]]
            axis.plot(ends, [line.slope * end + line.intercept for end in ends], color="black", linewidth=1)
            label += f": slope {line.slope:.2g}"
            label += "" if line.correlation is None else f", correlation {line.correlation:.2f}"
        axis.set(title=label, xlabel="delta D", ylabel="delta M")
        axis.ticklabel_format(axis="both", style="sci", scilimits=(-2, 3))
        axis.title.set_fontsize("medium")
    if 1 < len(kinds) <= COLOURS:
        handles: list[Any] = [Line2D([], [], color=colours[kind], marker="o", linestyle="") for kind in kinds]
        # a label that begins with an underscore is left out, and one with dollars is TeX: the names are put in later
        legend = figure.legend(handles, [""] * len(kinds), loc="outside right center", fontsize="small")
        for text, kind in zip(legend.get_texts(), kinds, strict=True):
            text.set(text=_drawn(kind, LONGEST_KIND), parse_math=False)
    if title is not None:
        figure.suptitle(_drawn(title, LONGEST_TITLE), parse_math=False)
    with writing.replacing(path) as made, matplotlib.rc_context({"text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")  # a box stands for it
        figure.savefig(made, format="png", dpi=110, metadata={"Software": None})


def _kind(point: Point) -> str:
    """The last part of a layer's name."""
    return point.layer.rpartition(".")[2]


def _drawn(name: str, longest: int) -> str:
    """A name as it is drawn: on one line, of characters that a font can have, without its middle where it is long."""
    name = printable(name)
    half = longest // 2 - 1
    return name if len(name) <= longest else f"{name[:half]}...{name[-half:]}"
