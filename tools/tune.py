"""Measure tile configurations on this GPU and keep what wins, in dora_kernels/tuned/<gpu>.json.

    python tools/tune.py --seconds 120
    python tools/tune.py --kernel norm merge --operand-bytes 4      # float32 adapters over a bf16 weight
    python tools/tune.py --out /tmp/table.json --fresh

Every candidate is held to the reference before it is timed, against the default of configs.py, at two or three shapes,
interleaved, L2 flushed. A candidate wins where it takes less than 0.97 of the default's time (geometric mean over the
shapes) and loses at none. The file is replaced after every kernel; a later run skips what this commit has finished.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402

from bench import kernels, machine  # noqa: E402
from bench.measure import interleave  # noqa: E402
from bench.shapes import Case  # noqa: E402
from dora_kernels import configs, launch  # noqa: E402
from dora_kernels.configs import Config  # noqa: E402
from dora_kernels.testing import geometric_mean  # noqa: E402

WIN = 0.97
# no shape may pay for the others: two timings of one configuration differ by about this
LOSS = 1.02
ACCUMULATORS = 128  # float32 values of a tile for each thread; above it the tile spills
PRECISIONS = {2: "bf16", 4: "bf16-fp32"}
VARIANTS = {2: "bf16", 4: "bf16, fp32 adapters"}  # of tools/specializations.py


@dataclass(frozen=True)
class Subject:
    """What is tuned: `fields` of configs.Config with their `values`, judged by (call of bench.kernels, M, N, K, R)."""

    fields: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    jobs: tuple[tuple[str, int, int, int, int], ...]


_SCHEDULE = ("num_warps", "num_stages", "waves")
_WEIGHT = ("BLOCK_N", "BLOCK_K", *_SCHEDULE)
_NORM = (
    (32, 128, 4, 3, 2),
    (32, 256, 4, 3, 2),
    (64, 64, 4, 4, 2),
    (64, 128, 4, 2, 2),
    (64, 128, 4, 4, 2),
    (64, 128, 8, 3, 2),
    (64, 128, 4, 3, 4),
    (64, 256, 8, 3, 2),
    (128, 64, 4, 4, 2),
    (128, 128, 8, 3, 1),
    (128, 128, 8, 3, 2),
    (128, 128, 8, 4, 1),
    (128, 256, 8, 3, 1),
)
_MERGE = (
    (32, 128, 4, 2, 1),
    (32, 256, 4, 2, 1),
    (64, 64, 4, 2, 1),
    (64, 128, 4, 2, 1),
    (64, 128, 8, 3, 1),
    (64, 128, 4, 3, 1),
    (64, 256, 8, 2, 1),
    (128, 64, 4, 3, 1),
    (128, 128, 8, 2, 1),
    (128, 128, 8, 3, 1),
    (128, 128, 8, 4, 1),
    (128, 256, 16, 3, 1),
)
# most valuable first
SUBJECTS = {
    "token_sums": Subject(
        ("BLOCK_M", "BLOCK_N", *_SCHEDULE),
        (
            (32, 64, 4, 3, 1),
            (32, 128, 4, 3, 1),
            (32, 128, 8, 4, 1),
            (64, 64, 4, 3, 1),
            (64, 64, 4, 4, 2),
            (64, 128, 4, 3, 1),
            (64, 128, 8, 4, 1),
            (64, 128, 8, 3, 2),
            (64, 256, 8, 3, 1),
            (128, 64, 4, 3, 1),
            (128, 64, 8, 3, 2),
            (128, 128, 8, 2, 1),
        ),
        (
            ("token_sums", 8192, 4096, 4096, 64),
            ("outer_product", 8192, 4096, 4096, 64),
            ("token_sums", 8192, 14336, 4096, 384),
        ),
    ),
    "epilogue": Subject(
        ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
        (
            (32, 128, 4, 2),
            (32, 256, 8, 2),
            (64, 64, 4, 2),
            (64, 128, 4, 2),
            (64, 128, 8, 3),
            (64, 128, 8, 4),
            (64, 256, 8, 2),
            (128, 64, 4, 2),
            (128, 64, 8, 3),
            (128, 128, 8, 2),
            (128, 128, 8, 3),
        ),
        (("epilogue", 8192, 4096, 4096, 64), ("epilogue", 8192, 14336, 4096, 384), ("epilogue", 2048, 4096, 4096, 16)),
    ),
    "merge": Subject(_WEIGHT, _MERGE, (("merge", 16, 4096, 4096, 64), ("merge", 16, 8192, 8192, 16))),
    "norm": Subject(_WEIGHT, _NORM, (("norm", 16, 4096, 4096, 64), ("norm", 16, 8192, 8192, 64))),
    "project": Subject(
        ("BLOCK_M", "BLOCK_K", *_SCHEDULE),
        (
            (64, 64, 4, 4, 1),
            (64, 64, 4, 4, 2),
            (64, 128, 4, 3, 1),
            (64, 128, 4, 4, 2),
            (128, 64, 4, 3, 1),
            (128, 64, 4, 5, 1),
            (128, 64, 8, 4, 1),
            (128, 64, 4, 4, 2),
            (128, 128, 4, 3, 1),
            (128, 128, 8, 3, 1),
            (256, 64, 8, 3, 1),
        ),
        (("project", 8192, 4096, 4096, 64), ("project", 8192, 8192, 8192, 16)),
    ),
    "norm_high_rank": Subject(_WEIGHT, _NORM, (("norm", 16, 8192, 8192, 384), ("norm", 16, 14336, 4096, 384))),
    "merge_high_rank": Subject(_WEIGHT, _MERGE, (("merge", 16, 8192, 8192, 384), ("merge", 16, 14336, 4096, 384))),
}


def candidates(kernel: str, default: Config, operand_bytes: int, shared_limit: int) -> list[Config]:
    """The default, then the subject's other configurations that can fit the device, without repetition."""
    subject = SUBJECTS[kernel]
    configs = [dataclasses.replace(default, **dict(zip(subject.fields, v, strict=True))) for v in subject.values]
    fitting = [config for config in configs if fits(kernel, config, operand_bytes, shared_limit)]
    return list(dict.fromkeys([default, *fitting]))


def fits(kernel: str, config: Config, operand_bytes: int, shared_limit: int) -> bool:
    """Whether the accumulator tile fits the registers and the tiles in flight the shared memory, by an estimate from
    below: a launch may still refuse.
    """
    R = config.BLOCK_R
    if kernel == "project":
        accumulators, loaded = config.BLOCK_M * R, config.BLOCK_K * (2 * config.BLOCK_M + operand_bytes * R)
    elif kernel == "token_sums":
        accumulators = config.BLOCK_N * max(R, config.BLOCK_M)  # the products with base stand beside the sums
        loaded = config.BLOCK_M * (2 * 2 * config.BLOCK_N + operand_bytes * R)
    elif kernel == "epilogue":
        accumulators, loaded = config.BLOCK_M * config.BLOCK_N, operand_bytes * R * (config.BLOCK_M + config.BLOCK_N)
    else:
        accumulators, loaded = config.BLOCK_N * config.BLOCK_K, operand_bytes * R * config.BLOCK_K
    return accumulators <= ACCUMULATORS * 32 * config.num_warps and loaded * config.num_stages <= shared_limit


# config -> seconds (any unit) at each job of the subject; None where it was wrong or refused
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


def read_table(path: Path) -> dict[str, Any]:
    """The table so far; an empty one where there is none or it is broken."""
    empty: dict[str, Any] = {"meta": {}, "configs": {}, "measured": {}}
    try:
        table = json.loads(path.read_text())
        return empty | {name: dict(table[name]) for name in empty}
    except (OSError, ValueError, KeyError, TypeError):
        return empty


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Whole or not at all, also where two GPUs of one name are tuned side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(table, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


Measure = Callable[[str, int, Sequence[Config]], Times]


def tune(
    names: Sequence[str],
    operand_bytes: int,
    defaults: dict[str, Config],
    shared_limit: int,
    measure: Measure,
    path: Path,
    information: dict[str, Any],
    seconds: float,
    fresh: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Tune the kernels in order until `seconds` are over; returns those left out. `path` is replaced after each."""
    end = clock() + seconds
    table = read_table(path)
    table["meta"] = information
    size = str(operand_bytes)
    configs, measured = (table[part].setdefault(size, {}) for part in ("configs", "measured"))
    commit = information.get("commit")
    for place, name in enumerate(names):
        if not fresh and commit and measured.get(name, {}).get("commit") == commit:
            print(f"{name}: finished before", flush=True)
            continue
        if clock() >= end:
            print(f"out of time, left out: {', '.join(names[place:])}", flush=True)
            return list(names[place:])
        default = defaults[name]
        times = measure(name, operand_bytes, candidates(name, default, operand_bytes, shared_limit))
        try:
            best, ratio = choose(default, times)
        except ValueError as error:
            print(f"{name}: {error}", flush=True)
            continue
        configs.pop(name, None)
        if best != default:
            configs[name] = fields_of(best)
        tried = sum(found is not None for found in times.values())
        measured[name] = {"commit": commit, "tried": tried, "over_default": round(ratio, 4)}
        write_table(path, table)
        print(f"{name}: {tried} of {len(times)} candidates, {ratio:.3f} of the default's time", flush=True)
    return []


def fields_of(config: Config) -> dict[str, int]:
    """The fields that are set."""
    return {name: value for name, value in dataclasses.asdict(config).items() if value is not None}


@contextlib.contextmanager
def _overriding() -> Iterator[dict[str, Config]]:
    """Inside, config_for gives what is in the dict yielded, else configs.CONFIGS: never the table of an earlier run."""
    overrides: dict[str, Config] = {}

    def config_for(kernel: str, facts: launch.DeviceFacts, operand: torch.dtype) -> Config:
        return overrides.get(kernel) or configs.CONFIGS[facts.target, operand.itemsize][kernel]

    with mock.patch.object(configs, "config_for", config_for):
        yield overrides


def measure_on(device: torch.device, seconds: float = 0.4, rounds: tuple[int, int] = (10, 30)) -> Measure:
    """Check and time candidates on `device`; `seconds` of timing for each job and kernel."""

    def measure(kernel: str, operand_bytes: int, configs: Sequence[Config]) -> Times:
        times: Times = {config: [] for config in configs}
        for job, *sizes in SUBJECTS[kernel].jobs:
            case = Case(*sizes, PRECISIONS[operand_bytes], device.type)
            steps, _ = kernels.steps_for(case)
            operands = kernels.Operands.random(case)
            checker = kernels.Checker(operands)
            calls = {}
            with _overriding() as overrides, kernels.every_call_by_kernel():
                for config in [config for config in configs if times[config] is not None]:
                    overrides[kernel] = config
                    try:
                        wrong = kernels.failure(checker.comparisons(job, steps))
                    except Exception as error:  # too much shared memory, say
                        wrong = f"{type(error).__name__}: {error}"[:200]
                    if wrong:
                        times[config] = None
                        print(f"{kernel}: {fields_of(config)} at {case}: {wrong}", flush=True)
                        continue

                    def call(config=config, overrides=overrides, job=job, operands=operands, steps=steps):
                        overrides[kernel] = config
                        return kernels.CALLS[job](operands, steps)

                    calls[config] = call
                del checker
                timings = interleave(calls, kernels.stopwatch_of(device), seconds, rounds) if calls else {}
            for config, timing in timings.items():
                times[config].append(timing.median)
            del operands, calls
            gc.collect()
        return times

    return measure


def precompile(names: Sequence[str], operand_bytes: int, defaults: dict[str, Config], shared_limit: int) -> int:
    """Compile all candidates side by side into Triton's cache; returns how many. One after another they would take
    minutes of the device's time.
    """
    import compile_kernels
    import specializations

    from dora_kernels.kernels import KERNELS

    major, minor = torch.cuda.get_device_capability()
    found = specializations.TARGETS[f"sm_{major}{minor}"]
    count = torch.cuda.get_device_properties("cuda").multi_processor_count
    target = dataclasses.replace(found, multiprocessors=count)
    variant = VARIANTS[operand_bytes]
    jobs: dict[tuple[str, str], Any] = {}
    for name in names:
        for job, *sizes in SUBJECTS[name].jobs:
            operands = kernels.Operands.random(Case(*sizes, PRECISIONS[operand_bytes], "meta"))
            for config in candidates(name, defaults[name], operand_bytes, shared_limit):
                override = {name: dataclasses.asdict(config)}
                with (
                    specializations.recording(target, specializations.VARIANTS[variant], override) as recorded,
                    kernels.every_call_by_kernel(),
                ):
                    kernels.CALLS[job](operands, KERNELS)
                for specialization in recorded:
                    jobs.setdefault(
                        (specialization.name, specialization.key),
                        compile_kernels.Job(variant, sizes[-1], name, specialization),
                    )
    compile_kernels.compile_all(list(jobs.values()), processes=max(2, (os.cpu_count() or 2) - 1))
    return len(jobs)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where kernels were left out, 2 without a GPU that there are configurations for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernel", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--operand-bytes", type=int, choices=PRECISIONS, default=2)
    parser.add_argument("--seconds", type=float, default=120, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="default: dora_kernels/tuned/<gpu>.json")
    parser.add_argument("--fresh", action="store_true", help="do not skip what this commit has finished")
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"tune: torch {torch.__version__} sees no GPU; expected one", file=sys.stderr)
        return 2
    start, device = time.monotonic(), torch.device("cuda", torch.cuda.current_device())
    facts = launch.device_facts(device)
    if not facts.target:
        print(f"tune: no kernel configuration is known for {facts.name}; expected one in configs.py", file=sys.stderr)
        return 2
    operand_bytes, names = arguments.operand_bytes, [name for name in SUBJECTS if name in arguments.kernel]
    defaults = configs.CONFIGS[facts.target, operand_bytes]
    shared_limit = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 65536)
    try:
        compiled = precompile(names, operand_bytes, defaults, shared_limit)
        print(f"compiled {compiled} specialisations in {time.monotonic() - start:.0f} s", flush=True)
    except Exception as error:  # only the time of the first calls is lost
        print(f"compiling ahead failed: {type(error).__name__}: {error}"[:300], flush=True)
    information = machine.meta(device, arguments.commit)
    path = arguments.out or configs.tuned_path(facts.name)
    left = arguments.seconds - (time.monotonic() - start)
    measure = measure_on(torch.device(device.type))
    fresh = arguments.fresh
    left_out = tune(names, operand_bytes, defaults, shared_limit, measure, path, information, left, fresh)
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
