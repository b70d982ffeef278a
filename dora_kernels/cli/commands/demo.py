"""demo: a fine-tuning by stock PEFT and by ours, side by side."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from dora_kernels.cli import stopping
from dora_kernels.cli.arguments import SEED, integer
from dora_kernels.planning.choices import BACKENDS


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "demo", help="fine-tune a small Llama with PEFT DoRA twice, stock and enabled, and compare the runs"
    )
    add = parser.add_argument
    add("--preset", default="tiny", help="model size: tiny, llama-1b (default: %(default)s)")
    add("--method", default="dora", help="dora, dvora (DoRA on VeRA) (default: %(default)s)")
    add("--base", default="dense", help="frozen weights: dense, nf4 (QDoRA) (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    add("--backend", default="auto", choices=BACKENDS, help="default: %(default)s")
    # the losses of a million steps are 8 MB; that many take days
    steps = integer(1, 10**6)
    add("--steps", type=steps, help="fine-tuning steps of each run (default: the preset's)")
    add("--seed", type=SEED, default=0, help="of weights and batches (default: %(default)s)")
    add("--out", default="demo.png", help="where the chart goes (default: %(default)s)")
    parser.set_defaults(run=run, extra="demo")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo. Returns 0, or 1 where it did not show what it promises."""
    from dora_kernels.extras import demo

    names = ("preset", "method", "base", "device", "backend", "steps", "seed", "out")
    settings = demo.Settings(**{name: getattr(arguments, name) for name in names})
    show = importlib.import_module("dora_kernels.extras.demo.show")  # rich, transformers, PEFT: six seconds
    if settings.base == "nf4":
        importlib.import_module("bitsandbytes")
    with stopping.unwinding():
        return show.run(settings)
