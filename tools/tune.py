"""Measure tile configurations on this GPU and keep what wins, in dora_kernels/planning/tuned/<gpu>.json.

    python tools/tune.py --seconds 120
    python tools/tune.py --kernel norm merge --operand-bytes 6      # float32 adapters over a bf16 weight
    python tools/tune.py --out /tmp/table.json --fresh

The candidates are compiled first; one that spills, or does not fit this GPU, is not tried. Every other one is held to
the reference before it is timed, against the default of tiles.py, at two or three shapes, interleaved, L2 flushed.
A candidate wins where it takes less than 0.97 of the default's time (geometric mean over the shapes) and loses at none.
Ranks up to configs.HIGH_RANK and above it are apart, as in configs.py: what is best at one of 16 and 64 is nearly so at
the other, and no tile is at 64 and at 384. The times of all candidates are kept, so that another rule can be applied
without the card. The file is replaced after every kernel, but for the part of bench.studies.ways; a later run skips
what this commit has finished.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import precompile  # noqa: E402
import torch  # noqa: E402
from candidates import PRECISIONS, SUBJECTS  # noqa: E402
from precompile import Judged  # noqa: E402

from bench import kernels  # noqa: E402
from bench.lib import machine, outputs, tuned  # noqa: E402
from bench.lib.measure import interleave, stopwatch_of  # noqa: E402
from bench.lib.shapes import LayerCase  # noqa: E402
from dora_kernels.planning import configs  # noqa: E402
from dora_kernels.planning.tiles import Config  # noqa: E402
from dora_kernels.testing import geometric_mean  # noqa: E402

WIN = 0.97
# the part of the seconds in which candidates have to be compiled; those that are not are not tried
COMPILING = 0.5
# no shape may pay for the others: two timings of one configuration differ by about this
LOSS = 1.02

# config -> seconds at each job of the subject; None where it was wrong or refused
Times = dict[Config, "list[float] | None"]


def choose(default: Config, times: Times) -> tuple[Config, float]:
    """(the configuration to use, its time over the default's): the default itself unless another wins.

    Raises ValueError where the default has no times: nothing can be said then.
    """
    base = times[default]
    if not base:
        raise ValueError(f"choose: the default {default} was wrong or refused; expected times")
    best, least = default, WIN
    for config, measured in times.items():
        ratios = [time / reference for time, reference in zip(measured or (), base, strict=bool(measured))]
        if ratios and max(ratios) <= LOSS and geometric_mean(ratios) < least:
            best, least = config, geometric_mean(ratios)
    return best, least if best != default else 1.0


Measure = Callable[[str, int, Sequence[Config]], Times]


def tune(
    candidates: dict[str, Judged],
    operand_bytes: int,
    measure: Measure,
    path: Path,
    information: dict[str, Any],
    seconds: float,
    fresh: bool = False,
    clock: Callable[[], float] = time.monotonic,
    device: torch.device | None = None,
) -> list[str]:
    """Tune the kernels in order, with the candidates of each that are tried, until `seconds` are over; returns those
    left out. `path` is replaced after each.

    device: whose conditions are kept for the end of each kernel.
    """
    end = clock() + seconds
    table = {"configs": {}, "measured": {}} | tuned.read(path) | {"meta": information}
    size = str(operand_bytes)
    configs, measured = (table[part].setdefault(size, {}) for part in ("configs", "measured"))
    commit = information.get("commit")
    for place, (name, judged) in enumerate(candidates.items()):
        if not fresh and commit and measured.get(name, {}).get("commit") == commit:
            print(f"{name}: finished before", flush=True)
            continue
        if clock() >= end:
            left_out = list(candidates)[place:]
            print(f"out of time, left out: {', '.join(left_out)}", flush=True)
            return left_out
        default = next(iter(judged.tried))
        times = measure(name, operand_bytes, list(judged.tried))
        measured[name] = record = {
            "jobs": [f"{job} {'x'.join(map(str, sizes))}" for job, *sizes in SUBJECTS[name].jobs],
            "times": [[fields_of(config), found] for config, found in times.items()],
            "compiled": [[fields_of(config), found] for config, found in judged.tried.items()],
            "refused": [[fields_of(config), why] for config, why in judged.refused.items()],
            "conditions": machine.conditions(device) if device else {},
        }
        try:
            best, ratio = choose(default, times)
        except ValueError as error:
            print(f"{name}: {error}", flush=True)
            tuned.write(path, table)
            continue
        configs.pop(name, None)
        if best != default:
            configs[name] = fields_of(best)
        tried = sum(found is not None for found in times.values())
        record |= {"commit": commit, "tried": tried, "over_default": round(ratio, 4)}
        tuned.write(path, table)
        print(f"{name}: {tried} of {len(times)} candidates, {ratio:.3f} of the default's time", flush=True)
    return []


def fields_of(config: Config) -> dict[str, int]:
    """The fields that are set."""
    return {name: value for name, value in dataclasses.asdict(config).items() if value is not None}


@contextlib.contextmanager
def _choosing(kernel: str) -> Iterator[Callable[[Config], None]]:
    """Inside, `kernel` has the configuration chosen last, all else that of tiles.CONFIGS: never of an earlier run's
    table. Each choice is a function of its own, by which launch plans are kept: going back to one finds its plans.
    """
    default_for = configs.config_for

    @functools.cache
    def choice(config: Config) -> Callable[..., Config]:
        return lambda name, *arguments: config if name == kernel else default_for(name, *arguments)

    untuned = mock.patch.object(configs, "tuned_configs", lambda name, target: {})
    with untuned, mock.patch.object(configs, "config_for", lambda *asked: default_for(*asked)):
        yield lambda config: setattr(configs, "config_for", choice(config))


def measure_on(device: torch.device, seconds: float = 0.4, rounds: tuple[int, int] = (10, 30)) -> Measure:
    """Check and time candidates on `device`; `seconds` of timing for each job and kernel."""

    def measure(kernel: str, operand_bytes: int, configs: Sequence[Config]) -> Times:
        times: Times = {config: [] for config in configs}
        for job, *sizes in SUBJECTS[kernel].jobs:
            case = LayerCase(*sizes, PRECISIONS[operand_bytes], device.type)
            steps, _ = kernels.steps_for(case)
            operands = kernels.KernelOperands.random(case)
            checker = kernels.Checker(operands)
            calls = {}
            with _choosing(kernel) as choose, kernels.every_call_by_kernel():
                for config in [config for config in configs if times[config] is not None]:
                    choose(config)
                    try:
                        wrong = kernels.failure(checker.comparisons(job, steps))
                    except Exception as error:
                        wrong = f"{type(error).__name__}: {error}"[:200]
                    if wrong:
                        times[config] = None
                        print(f"{kernel}: {fields_of(config)} at {case}: {wrong}", flush=True)
                        continue

                    def call(config=config, choose=choose, job=job, operands=operands, steps=steps):
                        choose(config)
                        return kernels.TIMED[job](operands, steps)

                    calls[config] = call
                del checker
                timings = interleave(calls, stopwatch_of(device), seconds, rounds) if calls else {}
            for config, timing in timings.items():
                times[config].append(float(f"{1e-3 * timing.median:.4g}"))
            del operands, calls
            gc.collect()
        return times

    return measure


@outputs.command("tune")
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where kernels were left out, 2 without a GPU that there are configurations for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernel", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--operand-bytes", type=int, choices=PRECISIONS, default=2)
    parser.add_argument("--seconds", type=float, default=120, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="default: dora_kernels/planning/tuned/<gpu>.json")
    parser.add_argument("--fresh", action="store_true", help="do not skip what this commit has finished")
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as one:
        gpu, target = one.submit(precompile.card).result()
    if not gpu:
        print(f"tune: torch {torch.__version__} sees no GPU; expected one", file=sys.stderr)
        return 2
    if target is None:
        print(f"tune: no kernel configuration is known for {gpu}; expected one in tiles.py", file=sys.stderr)
        return 2
    path = arguments.out or configs.tuned_path(gpu)
    outputs.claim("tune", path)  # another run's entries would be lost
    operand_bytes, names = arguments.operand_bytes, [name for name in SUBJECTS if name in arguments.kernel]
    wanted = precompile.candidates_of(names, operand_bytes, target)
    processes = max(2, (os.cpu_count() or 2) - 1)
    candidates = precompile.judge(wanted, processes, arguments.seconds * COMPILING)
    print(f"compiled {len(wanted)} candidates in {time.monotonic() - start:.0f} s")
    for name, judged in candidates.items():
        for config, why in judged.refused.items():
            print(f"{name}: {fields_of(config)} is not tried: {why}", flush=True)
    device = torch.device("cuda", torch.cuda.current_device())
    information = machine.meta(device, arguments.commit)
    left = arguments.seconds - (time.monotonic() - start)
    settings = {"fresh": arguments.fresh, "device": device}
    left_out = tune(
        candidates, operand_bytes, measure_on(torch.device(device.type)), path, information, left, **settings
    )
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
