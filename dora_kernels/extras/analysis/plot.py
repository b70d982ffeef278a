"""The figure: a panel for each method, delta M against delta D, with the line through its points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dora_kernels.extras.analysis.layers import METHODS, Analysis
from dora_kernels.functional.arguments import check_path, check_type

MARKERS = "os^DvPX*<>"
"""One for each checkpoint of a method, in the order given; of the eleventh on, the last."""

COLOURS = 10
"""At most so many kinds of layer have a colour each; of more, all have the same."""


def draw(analysis: Analysis, path: str | Path, title: str | None = None) -> None:
    """Write a PNG. A marker is a checkpoint, a colour a kind of layer (the last part of its name).

    The same analysis gives the same bytes. Raises ValueError unless the arguments are of these types.
    """
    check_type("draw", "analysis", analysis, Analysis, "an Analysis")
    check_path("draw", "path", path)
    if title is not None:
        check_type("draw", "title", title, str, "a title, or None")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    trends = analysis.trends()
    kinds = sorted({point.layer.rpartition(".")[2] for point in analysis.points})
    colours = {kind: f"C{number if len(kinds) <= COLOURS else 0}" for number, kind in enumerate(kinds)}
    panels = [method for method in METHODS if method in trends] or list(METHODS)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(2 + 4 * len(panels), 4), layout="constrained", squeeze=False
    )
    for axis, method in zip(axes[0], panels, strict=True):
        points = [point for point in analysis.points if point.method == method]
        checkpoints = list(dict.fromkeys(point.checkpoint for point in points))
        for point in points:
            marker = MARKERS[min(checkpoints.index(point.checkpoint), len(MARKERS) - 1)]
            style = {"color": colours[point.layer.rpartition(".")[2]], "marker": marker, "markersize": 5, "alpha": 0.7}
            axis.plot(point.delta_direction, point.delta_magnitude, **style)
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
        figure.legend(handles, kinds, loc="outside right center", fontsize="small")
    if title is not None:
        figure.suptitle(title)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
