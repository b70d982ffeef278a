"""One layer step, every provider, side by side: a grid of cases into JSON {meta, rows}, and a table of ratios.

    python -m bench.layer                         # the core grid, into bench/results/<gpu>/layer.json
    python -m bench.layer --grid cpu --device cpu # the grid of bench/results/cpu/layer.json
    python -m bench.layer --grid decode           # 1 to 16 tokens, inference, into layer-decode.json; also: full
    python -m bench.layer --grid qdora            # over a 4-bit base, into layer-qdora.json: QLoRA, QDoRA and ours
    python -m bench.layer --grid core --case 1-4 6 10             # some of a grid, by their numbers
    python -m bench.layer --case 8192x4096x4096x64:bf16 dropout shared   # by name; dropout 0.05; q, k and v of one x
    python -m bench.layer --shape 14336x4096 --tokens 8192 --rank 384 --provider frozen peft_dora ours
    python -m bench.layer --device cpu --shape 1024x1024 --tokens 64 512 --rank 8 64 --precision fp32 bf16

Inference is timed plain, and as "inference+frozen_adapters" in that scope, where alone ours keeps the norm from one
eager call to the next; a CUDA graph computes it at every replay, in the scope or not.
The file is overwritten, and written after every step of a case: a run that is cut short leaves what it has measured. A
case of which something is missing stands in left_out, with what. Launches are counted after all timing, because
torch.profiler slows down what follows it; COUNT_SECONDS are kept for that.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench.lib import outputs
from bench.lib.machine import ROOT, conditions, device_folder, meta
from bench.lib.problem import FROZEN_INFERENCE, PASSES
from bench.lib.providers import PROVIDERS, providers_of
from bench.lib.report import memory, problems, table, write
from bench.lib.shapes import GRIDS, PRECISIONS, QUANTIZED, LayerCase, dropout_case, sizes_of
from bench.lib.siblings import LLAMA, SharedCase
from bench.lib.steps import HOST_TOKENS, Found, StepRow, count_launches, measure_case, measure_shared
from dora_kernels.planning import costs

# without --grid: what is not named of --shape, --tokens, --rank and --precision (a GPU without any: the core grid)
DEFAULT_GPU = {"shape": [(4096, 4096)], "tokens": [8192, 512], "rank": [64, 16], "precision": ["bf16", "bf16-autocast"]}
DEFAULT_CPU = {"shape": [(1024, 1024)], "tokens": [512, 64], "rank": [64, 8], "precision": ["fp32", "bf16"]}


def grid(
    shapes: Iterable[tuple[int, int]],
    tokens: Iterable[int],
    ranks: Iterable[int],
    precisions: Iterable[str],
    device: str,
) -> list[LayerCase]:
    """Every combination, precisions changing slowest and ranks fastest; shapes are (N, K)."""
    shapes, tokens, ranks = list(shapes), list(tokens), list(ranks)
    return [
        LayerCase(M, N, K, R, precision, device)
        for precision in precisions
        for N, K in shapes
        for M in tokens
        for R in ranks
    ]


Counts = dict[tuple[str, str], "float | None"]
# kept for counting launches: a case takes about 1.5 s, most of it the profiler's start (a guess, no GPU has run it)
COUNT_SECONDS = 6


def run(
    cases: Sequence[LayerCase | SharedCase],
    out: pathlib.Path,
    measure: Callable[[Any, Found], list[StepRow]],
    seconds: float,
    information: dict[str, Any],
    clock: Callable[[], float] = time.monotonic,
    count: Callable[[LayerCase], Counts] | None = None,
    conditions: Callable[[], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Measure the cases in order into `out`, written as rows come; once `seconds` are over the rest is left out.

    measure(case, found): all rows of a case; calls found as measure_case does. A case that raises RuntimeError is left
    out, too. count: the launches of a case, which go into its rows, as long as there is time: COUNT_SECONDS are kept.
    conditions: the device's, kept in meta for the end of each case.
    """
    end = clock() + seconds
    counting = min(COUNT_SECONDS, seconds / 4) if count else 0
    rows: dict[LayerCase | SharedCase, list[dict[str, Any]]] = {}
    left_out = {case: str(case) for case in cases}
    information = information | ({"conditions": {}} if conditions else {})

    def save() -> None:
        write(out, information | {"left_out": list(left_out.values())}, _flat(rows))

    for case in left_out.copy():
        if clock() >= end - counting:
            print(f"out of time, left out: {'; '.join(left_out.values())}", flush=True)
            break
        print(case, flush=True)

        def found(measured: list[StepRow], missing: list[str], case: LayerCase | SharedCase = case) -> None:
            if missing:
                rows[case] = [asdict(row) for row in measured]
                left_out[case] = f"{case}: {', '.join(missing)}"
                save()

        try:
            rows[case] = [asdict(row) for row in measure(case, found)]
        except RuntimeError as error:  # too little memory for the problem, or what measure_shared holds back
            print(f"{case}: {type(error).__name__}: {error}"[:500], flush=True)
            continue  # it stays among what is left out
        if conditions:
            information["conditions"][str(case)] = conditions()
        del left_out[case]
        save()
        gc.collect()
    for case in _telling(case for case in rows if isinstance(case, LayerCase)) if count else ():
        if clock() >= end:
            break
        try:
            counts = count(case)
        except RuntimeError as error:
            print(f"launches of {case}: {type(error).__name__}: {error}"[:500], flush=True)
            continue
        for row in rows[case]:
            row["launches"] = counts.get((row["provider"], row["step"])) if row["ok"] else None
        save()
    return _flat(rows)


def _telling(cases: Iterable[LayerCase]) -> list[LayerCase]:
    """First those that launch what no earlier one does, as far as dtypes, dropout, rank and few tokens decide it."""
    kinds: dict[tuple, list[LayerCase]] = {}
    for case in cases:
        tokens = (case.M > 16) + (case.M > HOST_TOKENS)
        kinds.setdefault((case.precision, case.variant, case.R >= costs.SKINNY_RANK, tokens), []).append(case)
    return [case for group in itertools.zip_longest(*kinds.values()) for case in group if case is not None]


def _flat(rows: dict[Any, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for group in rows.values() for row in group]


@outputs.command("bench.layer")
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where a provider failed the gate, 2 where the device is not there."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.device != "auto":
        device = torch.device(arguments.device)
    gpu = device.type == "cuda"
    if gpu and not torch.cuda.is_available():
        print("bench.layer: --device cuda but torch sees no GPU; expected a GPU, or --device cpu", file=sys.stderr)
        return 2
    steps = arguments.step or (DECODE_STEPS if arguments.grid == "decode" else list(PASSES))

    def measure(case: LayerCase | SharedCase, found: Found) -> list[StepRow]:
        if isinstance(case, SharedCase):
            return measure_shared(case, device, arguments.step_seconds, arguments.rounds)
        timing = (arguments.step_seconds, arguments.rounds, arguments.host or None, found)
        return measure_case(case, providers_of(case, arguments.provider), steps, *timing)

    def count(case: LayerCase) -> Counts:
        return count_launches(case, providers_of(case, arguments.provider), steps)

    file = "layer.json" if arguments.grid in (None, "core", "cpu") else f"layer-{arguments.grid}.json"
    out = arguments.out or ROOT / "bench" / "results" / device_folder(device) / file
    outputs.claim("bench.layer", out)
    try:
        cases = cases_of(arguments, device.type)
    except ValueError as error:
        parser.error(str(error))
    information = meta(device, arguments.commit)
    gc.freeze()  # what is imported by now is not garbage: a collection before each peak took as long as a step's timing
    counting = {"count": count} if gpu and not arguments.no_launches else {}
    if gpu:
        counting["conditions"] = functools.partial(conditions, device)
    rows = run(cases, out, measure, arguments.seconds, information, **counting)
    print(f"\ntimes over the frozen linear layer on {information['device']}")
    print(table(rows))
    print("\npeak memory of a step, MiB")
    print(memory(rows))
    failed = problems(rows)
    if failed:
        print("not measured\n" + "\n".join(failed))
    return 0 if all(row["ok"] for row in rows) else 1


DECODE_STEPS = ["inference", FROZEN_INFERENCE]


def cases_of(arguments: argparse.Namespace, device: str) -> list[LayerCase | SharedCase]:
    """A named grid or some of its cases, or the product of the axes; ValueError where both are asked for."""
    default = DEFAULT_GPU if device == "cuda" else DEFAULT_CPU
    named = [name for name in default if getattr(arguments, name)]
    if arguments.grid is not None or arguments.case or (device == "cuda" and not named):
        if named:
            asked = f"--grid {arguments.grid}" if arguments.grid else "--case"
            raise ValueError(f"{asked} with --{named[0]}; expected one or the other")
        cases = GRIDS[arguments.grid or "core"](device)
        return [case for text in arguments.case for case in _selected(text, cases, device)] if arguments.case else cases
    axes = {name: getattr(arguments, name) or values for name, values in default.items()}
    return grid(axes["shape"], axes["tokens"], axes["rank"], axes["precision"], device)


def _selected(text: str, cases: list[LayerCase], device: str) -> list[LayerCase | SharedCase]:
    """The cases that an argument of --case means: "3", "1-4", "8192x4096x4096x64:bf16", "dropout", "shared"."""
    if text == "dropout":
        return [dropout_case(device)]
    if text == "shared":
        return [SharedCase("q, k, v", "bf16", 64, 16) if device == "cpu" else LLAMA]
    try:
        if "x" in text:
            sizes, precision = sizes_of(text)
            case = LayerCase(*sizes, precision or "bf16", device)
            if case.precision in PRECISIONS | QUANTIZED:
                return [case]
        else:
            first, _, last = text.partition("-")
            if 1 <= int(first) <= int(last or first) <= len(cases):
                return cases[int(first) - 1 : int(last or first)]
    except ValueError:
        pass
    raise ValueError(
        f"--case {text}; expected 1 to {len(cases)}, a range of these, MxNxKxR:precision, dropout or shared"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.layer", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--grid", choices=GRIDS, help="a named grid, in place of the four axes (default on a GPU: core)"
    )
    parser.add_argument(
        "--case",
        nargs="+",
        metavar="CASE",
        help="of the grid by number, 3 or 1-4; by name, MxNxKxR:precision; dropout; shared",
    )
    parser.add_argument("--shape", nargs="+", type=_shape, metavar="NxK", help="weight shapes")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M")
    parser.add_argument("--rank", nargs="+", type=int, metavar="R")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS | QUANTIZED)
    parser.add_argument(
        "--provider", nargs="+", choices=PROVIDERS, help="default: all, without the compiled ones on a CPU"
    )
    parser.add_argument("--step", nargs="+", choices=PASSES, help="default: all; of --grid decode those of inference")
    parser.add_argument("--seconds", type=float, default=540, help="for the whole run (default: %(default)s)")
    parser.add_argument(
        "--step-seconds", type=float, default=1.0, help="timing per case and step (default: %(default)s)"
    )
    parser.add_argument("--no-launches", action="store_true", help="do not count them, at the end, with a profiler")
    parser.add_argument("--host", action="store_true", help=f"host_us for more than {HOST_TOKENS} tokens, too")
    parser.add_argument("--rounds", nargs=2, type=int, default=(5, 100), metavar=("LEAST", "MOST"))
    parser.add_argument("--out", type=pathlib.Path, help="default: bench/results/<gpu>/layer.json")
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    return parser


def _shape(text: str) -> tuple[int, int]:
    N, _, K = text.partition("x")
    return int(N), int(K)


if __name__ == "__main__":
    sys.exit(main())
