"""analyze: how far fine-tuning moved each layer."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dora_kernels.cli import stopping
from dora_kernels.cli.arguments import regular_expression
from dora_kernels.files import writing
from dora_kernels.files.reading import printable


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "analyze", help="how far fine-tuning moved each layer in magnitude and in direction: the DoRA paper's figure 2"
    )
    add = parser.add_argument
    add("base", metavar="BASE", help="the pretrained model: a safetensors file, or a folder of a model's checkpoint")
    add("tuned", metavar="TUNED", nargs="+", help="PEFT adapter folders (LoRA, DoRA), or dense checkpoints")
    add("--out", default="analysis.png", help="where the scatter goes (default: %(default)s)")
    add("--json", help="where every point, the lines and what was left out go")
    add(
        "--targets",
        type=regular_expression,
        metavar="REGEX",
        help="only layers in whose name this is found (default: all)",
    )
    add("--fan-in-fan-out", action="store_true", help="dense weights are (in, out), as GPT-2's")
    parser.set_defaults(run=run, extra="demo")


def run(arguments: argparse.Namespace) -> int:
    """Analyse, print a table, write the chart and the JSON. Returns 0."""
    _check_paths(arguments)
    for package in ("matplotlib", "safetensors"):  # before the work, not after it
        importlib.import_module(package)
    from dora_kernels.extras import analysis

    with stopping.unwinding(), contextlib.ExitStack() as claims:
        for path in filter(None, (arguments.out, arguments.json)):
            claims.enter_context(writing.claimed("analyze", path))
        with _progress() as track:
            options = {"targets": arguments.targets, "fan_in_fan_out": arguments.fan_in_fan_out}
            result = analysis.analyze(arguments.base, arguments.tuned, **options, track=track)
        print(printable(result, keep="\n"))
        if arguments.json is not None:
            content = {"base": arguments.base} | result.to_json()
            writing.write_text(arguments.json, json.dumps(content, indent=1, allow_nan=False) + "\n")
        analysis.draw(result, arguments.out, f"against {printable(arguments.base)}")
    print(f"Chart: {printable(arguments.out)}")
    return 0


def _check_paths(arguments: argparse.Namespace) -> None:
    """Raise ValueError where a checkpoint is not there, or where an output cannot be, or would take its place."""
    outputs = {name: path for name, path in (("out", arguments.out), ("json", arguments.json)) if path is not None}
    for name, path in outputs.items():
        writing.check_target("analyze", name, path)
    if Path(arguments.out).suffix != ".png":
        raise ValueError(f"analyze: out is {arguments.out!r}; expected a name that ends in .png")
    taken = set()
    for path in (arguments.base, *arguments.tuned):
        if not os.path.exists(path):
            raise ValueError(
                f"analyze: {path or repr(path)} is no checkpoint: it does not exist; expected a file or a folder"
            )
        taken.add(os.path.realpath(path))
        if os.path.isdir(path):
            # what a checkpoint's folder holds, read or not (a tokenizer), is not written over; an earlier chart may be
            with contextlib.suppress(PermissionError):  # which the reader tells of
                taken |= {os.path.realpath(entry) for entry in os.scandir(path) if not entry.name.endswith(".png")}
    for name, path in outputs.items():
        if os.path.realpath(path) in taken:
            found = f"analyze: {name} is {path!r}, which is another argument too, or a file of its folder"
            raise ValueError(f"{found}; expected a file of its own")
        taken.add(os.path.realpath(path))


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Sequence[Any]], Iterable[Any]]]:
    """A function that hands out the layers one by one, with a bar if stderr is a terminal and rich installed."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        yield iter
        return
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        yield lambda layers: progress.track(layers, description="measuring layers")
