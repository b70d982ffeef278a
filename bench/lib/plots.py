"""The plots of docs/figures/, from bench/results/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.lib.results import cases, load
from dora_kernels.extras import analysis
from dora_kernels.files import writing


def points(data: dict[str, Any]) -> analysis.Analysis:
    """The analysis whose points the rows are."""
    return analysis.Analysis([analysis.Point(**row) for row in data["rows"]])


def plot_names(results: Path) -> dict[str, str]:
    """file name -> title of every plot of speed that there is data for."""
    names = {}
    for device in load(results, "layer"):
        names[f"{device}-speed"] = f"{device}: speed over PEFT DoRA"
        names[f"{device}-tokens"] = f"{device}: step over the frozen linear layer"
    for device in load(results, "kernels"):
        names[f"{device}-roofline"] = f"{device}: each kernel against its roof"
    return names


def draw(results: Path, folder: Path) -> list[Path]:
    """Write the plots; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def save(figure: Any, name: str) -> None:
        path = folder / f"{name}.png"
        # no date and no version in the file: the same results give the same bytes
        with writing.replacing(path) as made:
            figure.savefig(made, format="png", dpi=110, metadata={"Software": None})
        pyplot.close(figure)
        written.append(path)

    def lines(data: dict[str, Any], over: str, under: str, label: str) -> Any:
        """A panel per precision, a line per layer: milliseconds of `over` by those of `under`, against M."""
        panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
        for (precision, N, K, R, M), times in cases(data["rows"], "forward+backward").items():
            layers = panels.setdefault(precision, {})
            layers.setdefault(f"{N} x {K}, R = {R}", []).append((M, times[over] / times[under]))
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(1.5 + 4 * len(panels), 4), layout="constrained", sharey=True, squeeze=False
        )
        names = list(dict.fromkeys(name for layers in panels.values() for name in layers))
        for axis, (precision, layers) in zip(axes[0], panels.items(), strict=True):
            for name, points in layers.items():
                style = {"color": f"C{names.index(name) % 10}", "marker": "os^D"[names.index(name) // 10 % 4]}
                axis.plot(*zip(*sorted(points), strict=True), label=name, **style)
            axis.axhline(1, color="black", linewidth=0.8)
            tokens = sorted({M for points in layers.values() for M, _ in points})
            axis.set(title=precision, xlabel="tokens M", xscale="log")
            axis.set_xticks(tokens, map(str, tokens))
            axis.minorticks_off()
        axes[0, 0].set(ylabel=label, ylim=(0, None))
        handles = dict(pair for axis in axes[0] for pair in zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize="x-small")
        figure.suptitle(f"{data['meta']['device']}: forward and backward of one layer")
        return figure

    for device, data in load(results, "layer").items():
        save(lines(data, "peft_dora", "ours", "speed over PEFT DoRA"), f"{device}-speed")
        save(lines(data, "ours", "frozen", "time over the frozen linear layer"), f"{device}-tokens")

    for device, data in load(results, "kernels").items():
        rows = [row for row in data["rows"] if row.get("ok", True) and row.get("percent_of_roof")]
        figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(rows) + 1.2), layout="constrained")
        labels = [f"{row['kernel']} {row['N']}x{row['K']} R={row['R']} M={row['M']}" for row in rows]
        axes.barh(labels, [row["percent_of_roof"] for row in rows])
        axes.axvline(100, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set(xlabel="percent of the measured roof", title=data["meta"]["device"])
        save(figure, f"{device}-roofline")

    for device, data in load(results, "analysis").items():
        written.append(folder / f"{device}-analysis.png")
        analysis.draw(points(data), written[-1], f"{data['meta']['preset']} Llama, rank {data['meta']['rank']}")
    return written
