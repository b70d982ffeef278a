"""The demo's command: what it prints, its table and its chart."""

from __future__ import annotations

import matplotlib
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dora_kernels.extras.demo import dvora, runs
from dora_kernels.extras.demo.base import pack, trained_base
from dora_kernels.extras.demo.runs import DemoResult, mean
from dora_kernels.extras.demo.settings import METHODS, PRESETS, WARM_UP_STEPS, Settings
from dora_kernels.files import writing
from dora_kernels.files.reading import printable
from dora_kernels.planning import devices

COLUMNS = (
    TextColumn("{task.description:<24}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[status]}"),
)
"""Of a progress bar: every task has a status."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let it be an error like any other: rich would exit with 1."""
        raise  # BrokenPipeError, which rich has caught where it calls this


def run(settings: Settings) -> int:
    """Run the demo. Returns 0, or 1 where it did not show what it promises."""
    with writing.claimed("demo", settings.out):
        return _run(settings, _Console())


def _run(settings: Settings, console: Console) -> int:
    preset = PRESETS[settings.preset]
    device, dtype = settings.torch_device, settings.dtype
    console.print(
        f"Llama with {preset.layers} blocks of width {preset.hidden}, "
        f"{METHODS[settings.method]} rank {settings.rank}, "
        f"{preset.batch} x {preset.sequence} bytes per step,\n"
        f"{str(dtype).removeprefix('torch.')} on {devices.device_facts(device).name}"
        + (", over a base in NF4" if settings.base == "nf4" else "")
    )
    with Progress(*COLUMNS, console=console) as progress:
        model = trained_base(preset, device, dtype, settings.seed, progress)
        if settings.base == "nf4":
            pack(model)
        result = (dvora if settings.method == "dvora" else runs).fine_tune(model, settings, progress)
    console.print(result_table(result))
    draw(result, settings.out)
    console.print(f"Chart: {escape(printable(settings.out))}", soft_wrap=True)
    failures = result.failures()
    for failure in failures:
        console.print(f"[bold red]FAILED[/] {escape(failure)}", soft_wrap=True)
    if not failures:
        passed = f"every layer was taken over, and the losses are those of {result.stock.name}"
        console.print(f"[bold green]passed[/] {passed}", soft_wrap=True)
    return 1 if failures else 0


def result_table(result: DemoResult) -> Table:
    """The numbers of both runs side by side."""
    stock, ours = result.stock, result.ours
    table = Table(title=f"{result.method} fine-tuning, {len(ours.losses)} steps")
    table.add_column("")
    table.add_column(stock.name, justify="right")
    table.add_column(ours.name, justify="right")
    table.add_row("layers taken over", "", f"{len(result.report.taken_over)} of {result.layers}")
    for op in result.operators:
        table.add_row(f"{op} op calls", "", f"{result.calls_of(op)} of {result.expected_calls}")
    table.add_row("backend", "", ", ".join(sorted({backend for _, backend in result.calls})))
    table.add_row("loss, first epoch", f"{stock.first_loss:.5f}", f"{ours.first_loss:.5f}")
    table.add_row("loss, last epoch", f"{stock.last_loss:.5f}", f"{ours.last_loss:.5f}")
    table.add_row("largest |loss difference|", "", f"{result.largest_difference:.1e}")
    norms = (f"{mean(run.adapter_norms()):.4f}" for run in (stock, ours))
    table.add_row(f"mean |{ours.zero_at_start}| at end (0 at start)", *norms)
    table.add_row("time per step (median)", *(f"{run.step_seconds * 1e3:.1f} ms" for run in (stock, ours)))
    table.add_row(f"  {stock.name} / dora_kernels", "", f"{stock.step_seconds / ours.step_seconds:.2f} x")
    bits = 8 * result.weight_bytes / result.weight_elements
    table.add_row("frozen linear weights, shared", "", f"{result.weight_bytes / 2**20:.2f} MiB, {bits:.2f} bits each")
    if ours.peak_bytes:
        peaks = (f"{run.peak_bytes / 2**20:.0f} MiB" for run in (stock, ours))
        table.add_row("peak GPU memory of a step", *peaks)
    return table


def draw(result: DemoResult, out: str) -> None:
    """Write a PNG of both loss curves and both runs' step times."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, times) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for run, style in ((result.stock, {"linewidth": 5, "alpha": 0.4}), (result.ours, {"linewidth": 1.2})):
        losses.plot(run.losses, label=run.name, **style)
        steps = range(WARM_UP_STEPS, len(run.seconds))
        milliseconds = [1e3 * seconds for seconds in run.seconds[WARM_UP_STEPS:]]
        times.plot(steps, milliseconds, ".", label=f"{run.name}, median {run.step_seconds * 1e3:.1f} ms")
    losses.set(title=f"largest difference {result.largest_difference:.1e}", xlabel="step", ylabel="loss")
    times.set(title="time per step", xlabel="step", ylabel="ms", ylim=(0, None))
    losses.legend()
    times.legend()
    with writing.replacing(out) as made:
        figure.savefig(made, dpi=120, format="png")
    pyplot.close(figure)
