"""The figures of README.md and docs/{performance,correctness,scaling}.md, between their markers, and docs/figures/.

    python -m bench.figures            # regenerate
    python -m bench.figures --check    # exit status 1 where the text is not what the results say

Every measured number comes from bench/results/<device>/*.json; a device or a benchmark without a file has no figure.
The predictions in docs/performance.md come from the cost model of dora_kernels/planning/costs.py.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.lib import host_tables, outputs
from bench.lib.machine import ROOT
from bench.lib.plots import draw, plot_names, points
from bench.lib.results import COMPARED, cases, heading, load
from bench.studies import dropout, evaluation, predictions, scaling, shared
from dora_kernels.extras import analysis
from dora_kernels.files import writing
from dora_kernels.testing import geometric_mean

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
INFERENCE = ("inference", "inference+frozen_adapters")
HEADLINE_PRECISION = "bf16"
COLUMNS = 110  # of the README
NOTHING = "Nothing has been measured yet: `bench/results/` is empty."
NO_GPU = (
    "No GPU has run this yet: there is no measured GPU figure, and the constants in `costs.py` and the tile sizes in\n"
    "`configs.py` are predictions from bytes, FLOPs and ahead-of-time compilation."
)
STATUS = (
    "**No GPU has run the kernels yet.** They run in Triton's interpreter, in the tests, and compile ahead of time for "
    "every GPU that has a configuration, with at most 64 bytes spilled; on a CPU the package runs plain PyTorch. "
    "What is said of speed on a GPU is a prediction. Small eager steps are as long as the host takes; its part was "
    "measured without a GPU ([docs/performance.md](docs/performance.md#the-hosts-part))."
)

# the sign of the slope of delta M over delta D in figure 2 of the DoRA paper
SIGNS_IN_THE_PAPER = {"full": -1, "LoRA": 1, "DoRA": -1}


def headline(results: Path) -> str:
    """The README's table: a training step in bf16 over the frozen linear layer, on GPUs alone where there are any."""
    layers = load(results, "layer")
    parts = []
    for device, data in ({name: data for name, data in layers.items() if name != "cpu"} or layers).items():
        groups: dict[int, list[dict[str, float]]] = {}
        for (precision, _, _, _, M), times in cases(data["rows"], "forward+backward").items():
            if precision == HEADLINE_PRECISION and set(COMPARED) <= times.keys():
                groups.setdefault(M, []).append(times)
        lines = [
            "| tokens | frozen layer | PEFT LoRA | PEFT DoRA | dora_kernels | dora_kernels / PEFT DoRA |",
            "| --- " * 6 + "|",
        ]
        for M, group in groups.items():
            means = [geometric_mean([times[name] / times["frozen"] for times in group]) for name in COMPARED]
            ratio = geometric_mean([times["ours"] / times["peft_dora"] for times in group])
            lines.append("| " + " | ".join((str(M), "1", *(f"{number:.2f}" for number in (*means, ratio)))) + " |")
        meta, counts = data["meta"], {len(group) for group in groups.values()}
        caption = (
            f"Time of forward and backward of one layer over that of the frozen linear layer beneath it, in "
            f"{HEADLINE_PRECISION}: geometric means of {' or '.join(map(str, sorted(counts)))} shapes and ranks on "
            f"**{meta['device']}** ({device}), torch {meta['torch']}, PEFT {meta['peft']}, {meta['date'][:10]} "
            "([all cases and precisions](docs/performance.md#one-layer))."
        )
        parts.append("\n".join([textwrap.fill(caption, COLUMNS), "", *lines]))
    if all(device == "cpu" for device in layers):
        parts.append(textwrap.fill(STATUS, COLUMNS))
    return "\n\n".join(parts)


def layer_summary(device: str, data: dict[str, Any]) -> str:
    """One layer's training step over the frozen linear layer: geometric means by precision and number of tokens."""
    groups: dict[tuple[str, int], list[dict[str, float]]] = {}
    for (precision, _, _, _, M), times in cases(data["rows"], "forward+backward").items():
        groups.setdefault((precision, M), []).append(times)
    lines = [
        f"{heading(device, data)}: forward and backward of one layer, time over the frozen linear layer's, geometric "
        "means over shapes and ranks ([each of them](figures/layer.md)).",
        "",
        "| precision | M | cases | PEFT LoRA | PEFT DoRA | ours | ours over PEFT DoRA | at its worst |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (precision, M), group in groups.items():
        means = [
            f"{geometric_mean([times[name] / times['frozen'] for times in group]):.2f}"
            if all(name in times for times in group)
            else ""
            for name in COMPARED
        ]
        ratios = [times["ours"] / times["peft_dora"] for times in group]
        cells = (precision, M, len(group), *means, f"{geometric_mean(ratios):.2f}", f"{max(ratios):.2f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def layer_table(device: str, data: dict[str, Any]) -> str:
    """One layer's training step over the frozen linear layer, a line per case."""
    lines = [
        f"{heading(device, data)}.",
        "",
        "| precision | N x K | R | M | frozen | PEFT LoRA | PEFT DoRA | ours | ours over PEFT DoRA |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (precision, N, K, R, M), times in cases(data["rows"], "forward+backward").items():
        over = [f"{times[name] / times['frozen']:.2f}" if name in times else "" for name in COMPARED]
        ratio = times["ours"] / times["peft_dora"]
        cells = (precision, f"{N} x {K}", R, M, f"{times['frozen']:.3g} ms", *over, f"{ratio:.2f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def inference_table(device: str, data: dict[str, Any]) -> str:
    """One layer's inference over the frozen linear layer: plain and inside frozen_adapters, by graph and eager."""
    lines = [
        f"{heading(device, data)}.",
        "",
        "| step | clock | precision | N x K | R | M | frozen | PEFT LoRA | PEFT DoRA | ours | ours over PEFT DoRA |",
        "| --- " * 11 + "|",
    ]
    for step, (name, clock) in itertools.product(INFERENCE, {"graph": "graph_ms", "eager": "ms"}.items()):
        for (precision, N, K, R, M), times in cases(data["rows"], step, clock).items():
            over = [f"{times[who] / times['frozen']:.2f}" if who in times else "" for who in COMPARED]
            cells = (step, name, precision, f"{N} x {K}", R, M, f"{times['frozen']:.3g} ms", *over)
            lines.append(f"| {' | '.join(map(str, cells))} | {times['ours'] / times['peft_dora']:.2f} |")
    return "\n".join(lines)


def variants_list(device: str, data: dict[str, Any]) -> str:
    """Training steps with dropout and of layers that share x, over the frozen layers: a line each; "" without any."""
    lines = []
    for variant in dict.fromkeys(row.get("variant", "") for row in data["rows"]):
        for (precision, N, K, R, M), times in cases(data["rows"], "forward+backward", variant=variant).items():
            over = [f"{who} {ms / times['frozen']:.2f}" for who, ms in times.items() if who != "frozen"]
            if variant:
                case = f"{variant}, {precision}, {M} tokens, {N} x {K}, R = {R}: frozen {times['frozen']:.3g} ms"
                lines.append(f"- {case}; over it {', '.join(over)}")
    return "\n".join([f"{heading(device, data)}:", "", *lines]) if lines else ""


def layer_page(results: Path) -> str:
    """docs/figures/layer.md: every case of every device."""
    layers = load(results, "layer")
    parts = [
        "# One layer, forward and backward: time over the frozen linear layer",
        "Written by `python -m bench.figures`.",
        *(layer_table(device, data) for device, data in layers.items()),
    ]
    variants = list(filter(None, (variants_list(device, data) for device, data in layers.items())))
    parts += ["## With dropout, and several layers of one x", *variants] if variants else []
    parts += [
        "## Inference",
        "Ours keeps norm and gain from one eager call to the next inside `frozen_adapters` alone; rows up to\n"
        "`5912622fac` were measured when it did so outside, too. A CUDA graph computes them at every replay.",
        *(inference_table(device, data) for device, data in layers.items()),
    ]
    return "\n\n".join(parts) + "\n"


def model_table(device: str, data: dict[str, Any]) -> str:
    """The whole model's training steps as a Markdown table."""
    meta = data["meta"]
    lines = [f"**{meta['device']}** ({device}), whole model:", "", "| variant | seconds | tokens/s | peak GiB |"]
    lines.append("| --- | --- | --- | --- |")
    for row in data["rows"]:
        if row.get("seconds"):
            seconds = row["seconds"]["median"] if isinstance(row["seconds"], dict) else row["seconds"]
            peak = f"{row['peak_bytes'] / 2**30:.1f}" if row.get("peak_bytes") else ""
            tokens = f"{row['tokens_per_second']:.0f}" if row.get("tokens_per_second") else ""
            lines.append(f"| {row['variant']} | {seconds:.3g} | {tokens} | {peak} |")
    return "\n".join(lines)


def analysis_summary(device: str, data: dict[str, Any]) -> str:
    """The finding of the magnitude and direction analysis in a sentence, and its plot."""
    result = points(data)
    last = {point.method: point.checkpoint for point in result.points}
    at_the_end = analysis.Analysis(
        [point for point in result.points if point.checkpoint == last[point.method]]
    ).trends()
    found, agrees = [], []
    for method, line in result.trends().items():
        slope, correlation, end = line.slope or 0.0, line.correlation or 0.0, at_the_end[method].correlation or 0.0
        name = "full fine-tuning" if method == "full" else method
        found.append(
            f"{'up' if slope > 0 else 'down' if slope < 0 else 'level'} for {name} (correlation {correlation:.2f}; "
            f"{end:.2f} within the last checkpoint)"
        )
        agrees += [name] if slope * SIGNS_IN_THE_PAPER[method] > 0 else []
    layers = len({point.layer for point in result.points})
    checkpoints = len({point.checkpoint for point in result.points}) // len(last)
    return (
        f"{heading(device, data)}: what tuning does to the {layers} linear layers of the demo's small Llama, "
        f"{checkpoints} checkpoints a method. The line of the change of magnitude (delta M) over that of direction "
        f"(delta D) slopes {', '.join(found)}. In the paper, on large models, it slopes up for LoRA and down for full "
        f"fine-tuning and DoRA; the sign here is the paper's for: {', '.join(agrees) or 'none of them'}.\n\n"
        f"![{device}: change of magnitude against change of direction](figures/{device}-analysis.png)"
    )


def figures(results: Path) -> str:
    """Layers, models and the analysis: the Markdown of docs/performance.md."""
    layers, models = load(results, "layer"), load(results, "model")
    parts = [layer_summary(device, data) for device, data in layers.items()]
    parts += [model_table(device, data) for device, data in models.items()]
    if layers:
        parts += [f"![{title}](figures/{name}.png)" for name, title in plot_names(results).items()]
    parts += [analysis_summary(device, data) for device, data in load(results, "analysis").items()]
    if all(device == "cpu" for device in layers):
        parts.insert(0, NO_GPU)
    return "\n\n".join(parts) if parts else NOTHING


def error_tables(results: Path) -> str:
    """The errors of ours, PyTorch and PEFT, a line for each dtype and tensor (tools/measure_errors.py)."""
    tables = []
    for device, data in load(results, "errors").items():
        how = "in Triton's interpreter" if device == "cpu" else "compiled"
        lines = [
            f"{heading(device, data)}, {data['meta']['configurations']} random layers, seed {data['meta']['seed']}: "
            f"geometric means of the error; in brackets the largest ratio of one layer. The kernels ran {how}.",
            "",
            "| weight-adapter | tensor | PyTorch | PEFT | ours, reference | ours, kernels | reference over PEFT | "
            "kernels over PEFT |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in data["rows"]:
            numbers = [f"{row[who]:.2e}" for who in ("pytorch", "peft", "reference", "kernels")]
            ratios = [
                f"{row[f'{who}_over_peft']:.2f} ({row[f'{who}_over_peft_worst']:.2f})"
                for who in ("reference", "kernels")
            ]
            lines.append(f"| {' | '.join((row['dtype'], row['tensor'], *numbers, *ratios))} |")
        tables.append("\n".join(lines))
    tables += [errors_by_way(device, data) for device, data in load(results, "errors-by-way").items()]
    return "\n\n".join(tables) or NOTHING


def errors_by_way(device: str, data: dict[str, Any]) -> str:
    """The errors of the kernels each way and of PyTorch at high ranks, a line for each dtype and tensor."""
    ranks = list(dict.fromkeys(row["R"] for row in data["rows"]))
    lines = [
        f"{heading(device, data)}, high ranks, {data['meta']['configurations']} random layers of each, seed "
        f"{data['meta']['seed']}: geometric means of the error, PyTorch / the kernels split / merged; in brackets "
        "merged over split.",
        "",
        f"| weight-adapter | tensor | {' | '.join(f'R = {R}' for R in ranks)} |",
        "| --- " * (2 + len(ranks)) + "|",
    ]
    groups: dict[tuple[str, str], list[str]] = {}
    for row in data["rows"]:
        numbers = " / ".join(f"{row[who]:.2e}" for who in ("pytorch", "split", "merged"))
        groups.setdefault((row["dtype"], row["tensor"]), []).append(f"{numbers} ({row['merged'] / row['split']:.2f})")
    return "\n".join([*lines, *(f"| {' | '.join((*key, *cells))} |" for key, cells in groups.items())])


def replaced(text: str, markdown: str, name: str = "figures") -> str:
    """`text` with `markdown` between the markers `name`; ValueError where they are not there once each, in order."""
    begin, end = BEGIN.replace("figures", name), END.replace("figures", name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"figures: the text has not one {begin} before one {end}; expected both")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{markdown}\n{end}{rest.split(end)[1]}"


@outputs.command("bench.figures")
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 with --check where a text differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    arguments = parser.parse_args(argv)
    results = ROOT / "bench" / "results"
    folder = ROOT / "docs" / "figures"
    contents = {
        ROOT / "README.md": headline(results),
        ROOT / "docs" / "performance.md": f"{predictions.ratios_table()}\n\n{predictions.steps_table()}",
        ROOT / "docs" / "correctness.md": error_tables(results),
        ROOT / "docs" / "scaling.md": scaling.section(),
    }
    texts = {path: replaced(path.read_text(), markdown) for path, markdown in contents.items()}
    performance, measured = ROOT / "docs" / "performance.md", load(results, "shared")
    shared_inputs = shared.section(
        {
            f"{heading(device, data)}, threads: {data['meta']['threads']}": data["rows"]
            for device, data in measured.items()
        }
    )
    texts[performance] = replaced(texts[performance], shared_inputs, "shared inputs")
    texts[performance] = replaced(texts[performance], figures(results), "one layer")
    texts[performance] = replaced(texts[performance], predictions.nf4_table(), "4-bit base")
    ways = predictions.ways_table(load(results, "ways").values())
    texts[performance] = replaced(texts[performance], ways, "ways")
    tables = {"dropout": dropout.table, "evaluation": evaluation.table, "host": host_tables.markdown}
    for name, table in tables.items():
        parts = [
            f"{heading(device, data)}, threads: {data['meta']['threads']}:\n\n{table(data['rows'])}"
            for device, data in load(results, name).items()
        ]
        texts[performance] = replaced(texts[performance], "\n\n".join(parts) or NOTHING, name)
    texts[folder / "layer.md"] = layer_page(results)
    if arguments.check:
        return int(any(not path.exists() or text != path.read_text() for path, text in texts.items()))
    outputs.claim("bench.figures", *texts)
    for path, text in texts.items():
        writing.write_text(path, text)
    for path in draw(results, folder):
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
