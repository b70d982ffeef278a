"""The time and memory in which DoRA adapters start on a model of 8B shapes: PEFT's own, and inside of starts.fast_init.

    python -m bench.starts                          # bench/results/cpu/starts.json, five minutes of two idle cores
    python -m bench.starts --case bf16 --repeats 5

Llama-3-8B's seven linear layers in each of its 32 blocks, or of fewer, without embeddings. Layers of one shape read the
same numbers, so that 32 blocks take their time and 0.3 GB. Times are process time on one thread, for others may be
running: the median over interleaved repeats, and the least. A case has a process of its own: what an allocator keeps
of another one halves its time (page faults) and doubles its peak. Of the time, "magnitudes" is that of PEFT's
DoraLinearVariant.init, which makes them. Peaks are VmHWM over what was resident before. Every magnitude that starts
inside is compared with PEFT's: the same bits, or the row is not ok.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import math
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import peft
import torch
from peft.tuners.lora import variants
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import dora_kernels
from bench.lib import outputs
from bench.lib.machine import ROOT, meta
from bench.lib.report import aligned, write
from dora_kernels.extras import starts

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "nf4": torch.bfloat16,
}
"""The dtypes of the weights; nf4 is bitsandbytes' Linear4bit over bf16."""

WAYS = {"peft": contextlib.nullcontext, "fast_init": starts.fast_init}
STARTS = ("get_peft_model", "add_adapter", "from_pretrained", "low_cpu_mem_usage")
"""The last is from_pretrained(..., low_cpu_mem_usage=True)."""


@dataclass(frozen=True)
class StartCase:
    """A model, its adapters and the ways to start them that are measured."""

    precision: str = "bf16"
    blocks: int = 2
    rank: int = 16
    hidden: int = 4096
    intermediate: int = 14336
    starts: tuple[str, ...] = STARTS[:1]


CASES = {
    "bf16": StartCase(blocks=32, starts=("get_peft_model", "from_pretrained", "low_cpu_mem_usage")),
    "bf16, 8 blocks": StartCase(blocks=8),
    "bf16, 2 blocks": StartCase(starts=STARTS),
    "bf16, rank 64": StartCase(rank=64),
    "bf16, rank 256": StartCase(rank=256),
    "fp16": StartCase("fp16"),
    "fp32": StartCase("fp32"),
    "nf4": StartCase("nf4"),
}


def model_of(case: StartCase, numbers: dict[tuple[int, ...], Tensor]) -> nn.Module:
    """A Llama whose parameters are views of `numbers`: it has, or gets, one of each shape."""
    heads = case.hidden // 128 or 1
    config = LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.blocks,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    layers: dict[tuple[int, ...], nn.Module] = {}
    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            shape = tuple(parameter.shape)
            if shape not in numbers:
                numbers[shape] = torch.empty(shape, dtype=DTYPES[case.precision]).normal_(std=0.02)
            setattr(module, key, nn.Parameter(numbers[shape].view(shape), requires_grad=False))
        if case.precision == "nf4" and type(module) is nn.Linear and not name.endswith("lm_head"):
            shape = module.weight.shape
            if shape not in layers:
                layers[shape] = _nf4(module)
            model.set_submodule(name, copy.copy(layers[shape]))  # a layer of its own, with the same weight
            model.get_submodule(name)._parameters = dict(layers[shape]._parameters)
    model.is_loaded_in_4bit = case.precision == "nf4"  # PEFT chooses its layers by it
    return model


def _nf4(linear: nn.Linear) -> nn.Module:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16
    )
    layer.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


@dataclass
class StartCost:
    """Of one start: process time, that of the magnitudes, and the peak over what was resident before, in bytes."""

    seconds: float = math.nan
    magnitudes: float = 0.0
    peak: int | None = None


@contextlib.contextmanager
def measured(cost: StartCost) -> Iterator[None]:
    """Fill in `cost` of what is done inside."""
    init = variants.DoraLinearVariant.init

    def timed(*arguments: Any, **named: Any) -> None:
        start = time.process_time()
        init(*arguments, **named)
        cost.magnitudes += time.process_time() - start

    before = _resident_after_a_reset()
    with mock.patch.object(variants.DoraLinearVariant, "init", staticmethod(timed)):
        start = time.process_time()
        yield
        cost.seconds = time.process_time() - start
    if before is not None:
        cost.peak = max(0, _status("VmHWM") - before)


def _resident_after_a_reset() -> int | None:
    """Bytes resident now, from which on the system counts the peak; None where it cannot be told to."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free and resident would be taken for nothing
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (AttributeError, OSError):
        return None


def _status(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def run(case: StartCase, way: str, numbers: dict[tuple[int, ...], Tensor], folder: pathlib.Path) -> dict[str, Any]:
    """start -> (its cost, the magnitudes), of one way. The first run saves the adapter in `folder`, to be loaded."""
    config = peft.LoraConfig(r=case.rank, use_dora=True, target_modules="all-linear")
    found = {}

    def start(name: str, call: Callable[[], Any]) -> Any:
        cost = StartCost()
        torch.manual_seed(0)
        with WAYS[way](), measured(cost):
            made = call()
        found[name] = cost, [p.detach() for key, p in model.named_parameters() if "magnitude" in key]
        return made

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_of(case, numbers)
        tuned = start("get_peft_model", lambda: peft.get_peft_model(model, config))
        if "add_adapter" in case.starts:
            start("add_adapter", lambda: tuned.add_adapter("second", config))
        for name in STARTS[2:]:
            if name in case.starts:
                if not any(folder.iterdir()):
                    tuned.save_pretrained(folder, selected_adapters=["default"])
                model = model_of(case, numbers)
                more = {name: True} if name == "low_cpu_mem_usage" else {}
                start(name, lambda: peft.PeftModel.from_pretrained(model, folder, **more))  # noqa: B023 (called here)
    return found


@dataclass
class CostsTaken:
    """The costs of one start by one way, of each repeat; not ok where a magnitude has other bits than PEFT's."""

    costs: list[StartCost] = field(default_factory=list)
    ok: bool = True


def measure(name: str, case: StartCase, repeats: int) -> list[dict[str, Any]]:
    """A row for each start and way of the case, on one thread."""
    torch.set_num_threads(1)
    numbers: dict[tuple[int, ...], Tensor] = {}
    taken = {(start, way): CostsTaken() for start in case.starts for way in WAYS}
    with tempfile.TemporaryDirectory() as saved:
        for _ in range(repeats):
            results = {way: run(case, way, numbers, pathlib.Path(saved)) for way in WAYS}
            for (start, way), group in taken.items():
                cost, magnitudes = results[way][start]
                group.costs.append(cost)
                expected = results["peft"][start][1]
                group.ok &= len(magnitudes) == len(expected) > 0
                group.ok &= all(torch.equal(*pair) for pair in zip(magnitudes, expected, strict=True))
    rows = []
    for (start, way), group in taken.items():
        seconds = [cost.seconds for cost in group.costs]
        peaks = [cost.peak for cost in group.costs if cost.peak is not None]
        of_case = {key: value for key, value in asdict(case).items() if key != "starts"}
        rows.append(
            {"case": name, **of_case, "start": start, "way": way, "ok": group.ok}
            | {"seconds": statistics.median(seconds), "least": min(seconds)}
            | {"magnitudes": statistics.median(cost.magnitudes for cost in group.costs)}
            | {"peak_mib": statistics.median(peaks) / 2**20 if peaks else None}
        )
    return rows


def measure_enable(case: StartCase, repeats: int) -> float:
    """The median process time of enable(model), on one thread."""
    torch.set_num_threads(1)
    seconds = []
    with warnings.catch_warnings(), starts.fast_init():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=case.rank, use_dora=True, target_modules="all-linear")
        model = peft.get_peft_model(model_of(case, {}), config)
    for _ in range(repeats):
        start = time.process_time()
        dora_kernels.enable(model)
        seconds.append(time.process_time() - start)
        dora_kernels.disable(model)
    return statistics.median(seconds)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each start of each case: seconds of both ways, their ratio, and both peaks in MiB."""
    lines = [("case", "start", "peft s", "of magnitudes", "fast_init s", "ratio", "peft MiB", "fast_init MiB")]
    pairs = zip(rows[::2], rows[1::2], strict=True)  # the ways are next to each other
    for theirs, ours in pairs:
        peaks = ["-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}" for row in (theirs, ours)]
        ratio = "" if theirs["ok"] and ours["ok"] else " (not the same bits)"
        seconds = f"{theirs['seconds']:.2f}", f"{theirs['magnitudes']:.2f}", f"{ours['seconds']:.2f}"
        ratio = f"{theirs['seconds'] / ours['seconds']:.1f}{ratio}"
        lines.append((theirs["case"], theirs["start"], *seconds, ratio, *peaks))
    return "\n".join(aligned(lines))


@outputs.command("bench.starts")
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 where a start inside of fast_init has other bits than PEFT's."""
    parser = argparse.ArgumentParser(prog="python -m bench.starts", description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3, help="of every start (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "bench" / "results" / "cpu" / "starts.json")
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error(f"repeats is {arguments.repeats}; expected 1 or more")
    outputs.claim("bench.starts", arguments.out)
    rows: list[dict[str, Any]] = []
    information = meta(torch.device("cpu"), arguments.commit) | {"threads": 1, "repeats": arguments.repeats}
    load = [os.getloadavg()[0]]
    with (
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
        Progress(console=Console(stderr=True)) as progress,
    ):
        for name in progress.track(arguments.case, description="starts"):
            rows += pool.apply(measure, (name, CASES[name], arguments.repeats))
            load.append(os.getloadavg()[0])
        enabling = pool.apply(measure_enable, (CASES[arguments.case[0]], arguments.repeats))
    information |= {"load": load, "enable_seconds": enabling}
    write(arguments.out, information, rows)
    print(table(rows))
    print(f"enable: {information['enable_seconds']:.3f} s\n{arguments.out}")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
