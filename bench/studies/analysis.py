"""The DoRA paper's figure 2 at a small size: full fine-tuning, LoRA and DoRA of one base, analysed while they train.

    python -m bench.studies.analysis        # bench/results/cpu/analysis.json, in some minutes on two cores

The model, its base training and its text are the demo's. Every linear layer but the head is tuned, on the same batches:
directly, with PEFT's LoRA, and with PEFT's DoRA computed by dora_kernels. What each run saves on the way is analysed as
`python -m dora_kernels analyze` does. JSON {meta, rows}, a row per layer and checkpoint; meta has the lines through
the points of each method, over all the layers and over those of each kind.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import pathlib
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

import peft
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from bench.lib import outputs
from bench.lib.machine import ROOT, device_folder, meta
from bench.lib.report import write
from dora_kernels import adapters
from dora_kernels.extras import demo
from dora_kernels.extras.analysis import Analysis, analyze

TARGETS = "_proj$"
RATES = {"full": 1e-4, "LoRA": 1e-3, "DoRA": 1e-3}
"""Learning rates: the demo's for adapters, and a tenth of it for the weights themselves."""


def model_of(method: str, base: nn.Module, preset: demo.Preset, seed: int) -> nn.Module:
    """A copy of `base` that `method` trains."""
    model = copy.deepcopy(base)
    if method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("_proj.weight"))
        return model
    config = peft.LoraConfig(
        use_dora=method == "DoRA", target_modules="all-linear", r=preset.rank, lora_alpha=2 * preset.rank
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # as in demo.runs.fine_tune
        model = peft.get_peft_model(model, config)
    if method == "DoRA":
        report = adapters.enable(model)
        if report.left_alone or not report.taken_over:
            raise RuntimeError(f"bench.studies.analysis: expected every DoRA layer to be taken over; {report}")
    return model


def run(
    preset: demo.Preset, steps: int, checkpoints: int, seed: int, folder: pathlib.Path, progress: Progress
) -> tuple[Analysis, dict[str, list[float]]]:
    """Train the base and the three runs, save `checkpoints` of each in `folder`, and analyse them all.

    Returns the analysis, with method-step as the checkpoints' names, and method -> the loss at each checkpoint.
    """
    device = torch.device("cpu")
    base = demo.trained_base(preset, device, torch.float32, seed, progress)
    base.save_pretrained(folder / "base")
    batches = demo.sample(demo.standard_library(demo.TUNING_TEXT), preset, steps, seed + 1)
    at = [steps * (number + 1) // checkpoints for number in range(checkpoints)]
    saved, losses = [], {}
    for method, rate in RATES.items():
        tuning = demo.Run(method, model_of(method, base, preset, seed), rate, demo.Settings(device="cpu", steps=steps))
        bar = progress.add_task(method, total=steps, status="")
        for step, ids in enumerate(batches, 1):
            progress.update(bar, advance=1, status=f"loss {tuning.step(ids):.3f}")
            if step in at:
                saved.append(folder / f"{method}-{step}")
                tuning.model.save_pretrained(saved[-1])
        # between two checkpoints, a mean: a batch is not the next
        losses[method] = [sum(tuning.losses[end - at[0] : end]) / at[0] for end in at]
    result = analyze(folder / "base", saved, TARGETS)
    points = [dataclasses.replace(p, checkpoint=pathlib.Path(p.checkpoint).name) for p in result.points]
    return Analysis(points, result.left_out), losses


def lines(result: Analysis) -> dict[str, dict[str, Any]]:
    """ "all", "last checkpoint" and each kind of layer -> method -> the line through its points."""
    last = {point.method: point.checkpoint for point in result.points}
    groups = {"all": result.points, "last checkpoint": [p for p in result.points if p.checkpoint == last[p.method]]}
    for kind in sorted({kind_of(point.layer) for point in result.points}):
        groups[kind] = [point for point in result.points if kind_of(point.layer) == kind]
    return {name: Analysis(points).to_json()["trends"] for name, points in groups.items()}


def kind_of(layer: str) -> str:
    """q_proj of model.layers.0.self_attn.q_proj."""
    return layer.rpartition(".")[2]


@outputs.command("bench.studies.analysis")
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.analysis", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=demo.PRESETS, default="tiny")
    parser.add_argument("--steps", type=int, default=60, help="of each run (default: %(default)s)")
    parser.add_argument("--checkpoints", type=int, default=4, help="of each run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="default: bench/results/cpu/analysis.json")
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.checkpoints <= arguments.steps:
        parser.error(f"checkpoints is {arguments.checkpoints}; expected 1 to {arguments.steps}, the steps")
    device = torch.device("cpu")
    information = meta(device, arguments.commit)
    out = arguments.out or ROOT / "bench" / "results" / device_folder(device) / "analysis.json"
    outputs.claim("bench.studies.analysis", out)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Progress(*demo.COLUMNS, console=Console(stderr=True)) as progress:
        preset, sizes = demo.PRESETS[arguments.preset], (arguments.steps, arguments.checkpoints, arguments.seed)
        result, losses = run(preset, *sizes, pathlib.Path(folder), progress)
    settings = {
        "preset": arguments.preset,
        "steps": arguments.steps,
        "seed": arguments.seed,
        "rates": RATES,
        "rank": preset.rank,
        "loss": losses,
        "seconds": time.monotonic() - start,
        "left_out": [dataclasses.asdict(entry) for entry in result.left_out],
        "trends": lines(result),
    }
    write(out, information | settings, [dataclasses.asdict(point) for point in result.points])
    print(result)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
