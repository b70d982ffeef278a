"""merge: a model's checkpoint with an adapter merged into it, for servers that have no DoRA."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dora_kernels.cli import adapter_options, stopping
from dora_kernels.cli.arguments import integer
from dora_kernels.files import writing
from dora_kernels.files.reading import printable

if TYPE_CHECKING:
    from dora_kernels.extras.merging import Checked, MergeReport

CHECKED = 4
"""Tensors that --check compares: of a model of 8B one with PEFT's merge in float64 takes some seconds."""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("merge", help="write a model with an adapter merged into it, as servers want it")
    add = parser.add_argument
    add("base", metavar="BASE", help="the model: a Hugging Face folder (safetensors), or a .safetensors file")
    add("adapter", metavar="ADAPTER", help="a file or a folder of any format that convert reads")
    add("out", metavar="OUT", help="what is written: a folder or a file as BASE is, of the same dtype and shards")
    adapter_options.add(parser)
    add(
        "--check",
        nargs="?",
        type=integer(1, 2**31 - 1),
        const=CHECKED,
        default=0,
        metavar="K",
        help=f"compare K tensors with PEFT's merge in float64 before OUT gets its name (--check alone: {CHECKED})",
    )
    parser.set_defaults(run=run, extra="convert")


def run(arguments: argparse.Namespace) -> int:
    """Merge, and print what was. Returns 0, or 1 where a tensor that was checked is wrong; then there is no OUT."""
    adapter_options.check(arguments, arguments.base, arguments.adapter)
    writing.check_target("merge", "out", arguments.out.rstrip(os.sep))

    from dora_kernels.extras.merging import CheckFailed, merge_checkpoint

    options = {key: value for key, value in vars(arguments).items() if key not in ("run", "command", "extra")}
    start = time.perf_counter()
    with stopping.unwinding(), _bar() as progress:
        try:
            report = merge_checkpoint(**options, progress=progress)
        except CheckFailed as failed:
            result = failed
        else:
            result = None
    if result is not None:
        print(_checks(result.checked))
        print(f"FAILED: {printable(arguments.out)} was not written")
        return 1
    print(_summary(report, time.perf_counter() - start, arguments.out))
    return 0


def _summary(report: MergeReport, seconds: float, out: str) -> str:
    """The layers by kind, what was written and how fast, and what was compared."""
    from dora_kernels.extras.convert import table

    dtypes = ", ".join(f"{count} of {dtype}" for dtype, count in report.dtypes.items())
    lines = [
        table(report.adapters),
        f"{report.format}: {len(report.merged)} tensors merged ({dtypes}), {report.copied} copied",
    ]
    if report.left_out:
        lines.append(f"left out, being weights from before the merge: {printable(', '.join(report.left_out))}")
    if report.check:
        lines.append(_checks(report.check))
    rate = report.bytes / 1e6 / max(seconds, 1e-3)
    lines.append(f"{report.bytes:,} bytes in {seconds:.1f} s, {rate:.0f} MB/s: {printable(out)}")
    return "\n".join(lines)


def _checks(checked: Sequence[Checked]) -> str:
    """A line for each tensor that was compared: its error and the largest that rounding makes."""
    width = max((len(printable(one.name)) for one in checked), default=0)
    lines = []
    for one in checked:
        verdict = "ok" if one.error <= one.most else "DIFFERS"  # of NaN, too
        error = f"{one.error:.2e} of at most {one.most:.2e}"
        lines.append(f"{printable(one.name):<{width}}  {error}  {verdict}, by {one.merge} in float64")
    return "\n".join(lines)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None] | None]:
    """A function that draws how much is done, if stderr is a terminal and rich installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        yield None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    name = TextColumn("{task.description}", markup=False)  # a tensor's name is a stranger's
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn(), name)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading the adapter", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=printable(name))
