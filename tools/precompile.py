"""Compile kernels in all cores before the GPU is asked anything: for the GPU suite, and tools/tune.py's candidates.

Of the candidates, those that spill or do not fit are not tried: `judge`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import compile_kernels
import specializations
import torch
import triton
from candidates import PRECISIONS, SUBJECTS, candidates
from specializations import TARGETS, Specialization, Target

from bench import kernels
from bench.lib.shapes import LayerCase
from dora_kernels.kernels import KERNELS
from dora_kernels.planning.tiles import CONFIGS, Config

# of shapes.py and roof.py in bench/lib, and of the whole model (a layer under autocast) -> of tools/specializations.py
VARIANTS = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
    "bf16-autocast": "bf16 autocast, fp32 adapters",
    "bf16-fp32": "bf16, fp32 adapters",
}


TOKENS = 8192  # of the steps that are compiled with a candidate


def card() -> tuple[str, Target | None]:
    """The GPU's name, "" without one; and what TARGETS has for it, with its own sizes.

    For a process of its own: one that has asked a GPU anything must not be forked.
    """
    if not torch.cuda.is_available():
        return "", None
    properties = torch.cuda.get_device_properties("cuda")
    name = f"sm_{properties.major}{properties.minor}"
    target = TARGETS.get(properties.gcnArchName.partition(":")[0] if torch.version.hip else name)
    if target is not None:
        limit = getattr(properties, "shared_memory_per_block_optin", target.shared_limit)
        target = dataclasses.replace(target, multiprocessors=properties.multi_processor_count, shared_limit=limit)
    return properties.name, target


class Trial(NamedTuple):
    """A configuration of a subject, for operands of so many bytes on a target."""

    subject: str
    config: Config
    operand_bytes: int
    target: Target


def candidates_of(names: Iterable[str], operand_bytes: int, target: Target) -> list[Trial]:
    """The candidates of tools/tune.py, of each subject the default first."""
    defaults = CONFIGS[target.family, operand_bytes]
    found = ((name, config) for name in names for config in candidates(name, defaults[name], target.name))
    return [Trial(name, config, operand_bytes, target) for name, config in found]


def launched_by(candidate: Trial) -> list[Specialization]:
    """The specialisations that a candidate's kernels are compiled for: by the calls that judge it, and by training
    steps of their sizes, which have variants of their own.
    """
    name, config, operand_bytes, target = candidate
    variant = specializations.VARIANTS[VARIANTS[PRECISIONS[operand_bytes]]]
    found: dict[tuple[str, str], Specialization] = {}
    for job, *sizes in SUBJECTS[name].jobs:
        operands = kernels.KernelOperands.random(LayerCase(*sizes, PRECISIONS[operand_bytes], "meta"))
        inputs = specializations.Inputs.of(variant, TOKENS, *sizes[1:])
        with specializations.recording(target, variant, {name: dataclasses.asdict(config)}) as recorded:
            with kernels.every_call_by_kernel():
                kernels.CALLS[job](operands, KERNELS)
            names = {one.name for one in recorded}
            specializations.step(inputs)
            specializations.step(inputs, drop=True)
        found |= {(one.name, one.key): one for one in recorded if one.name in names}
    return list(found.values())


def build(specialization: Specialization) -> Any:
    """The compiled kernel, from Triton's cache where it is there."""
    options = specialization.options
    # which Triton 3.6 asks instead of the options
    with mock.patch.object(triton.knobs.compilation, "instrumentation_mode", options.instrumentation_mode):
        return triton.compile(specialization.source(), target=specialization.target.gpu, options=options.__dict__)


def build_launcher(kernel: Any) -> None:
    """Build the launcher of a compiled kernel's signature: up to Triton 3.6 a C compiler makes it, at the first launch
    otherwise.
    """
    triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)


FORK = multiprocessing.get_context("fork")
Done = dict[str, Any]  # "ok", and "error" where it is not
# inherited by the forked workers: a Specialization cannot be pickled, and not every compiler's error can
_work: tuple[Callable[[Any], Done], Sequence[Any]] = (lambda item: {}, ())


def _work_on(index: int) -> Done:
    function, items = _work
    try:
        return function(items[index])
    except Exception as error:  # whatever the compiler raises
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}


def in_all_cores(function: Callable[[Any], Done], items: Sequence[Any], processes: int, end: float) -> dict[int, Done]:
    """function(item) by the item's index, of those that are done at `end`; a worker that dies takes the rest with it.

    The workers are forked from this process, which must not have asked a GPU anything.
    """
    global _work
    _work = function, items
    done: dict[int, Done] = {}
    pool = concurrent.futures.ProcessPoolExecutor(processes, FORK)
    futures = {pool.submit(_work_on, index): index for index in range(len(items))}
    try:
        for future in concurrent.futures.as_completed(futures, max(0, end - time.monotonic())):
            try:
                done[futures[future]] = future.result()
            except concurrent.futures.BrokenExecutor as error:
                done[futures[future]] = {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
    except concurrent.futures.TimeoutError:
        pass
    finally:
        for future in futures:
            future.cancel()
        pool.shutdown(wait=False)
        if len(done) < len(futures):
            for worker in multiprocessing.active_children():  # the end of this process would wait for them
                worker.kill()
    return done


@dataclass
class Judged:
    """A subject's candidates, the default first, and those that are not tried, with the reason.

    Of the former what the compiler says of each kernel: registers of a thread, bytes spilled, bytes of shared memory,
    programs that a multiprocessor holds.
    """

    tried: dict[Config, dict[str, tuple[int, int, int, int]]]
    refused: dict[Config, str]


def _compile_candidate(candidate: Trial) -> Done:
    """Compile all that it launches into Triton's cache, launchers included; the worst of each kernel's figures."""
    usage: dict[str, tuple[int, int, int, int]] = {}
    wrong: dict[str, None] = {}
    for one in launched_by(candidate):
        found = compile_kernels.compile_ahead(one)
        wrong[compile_kernels.verdict(found, one)] = None
        registers, spills, shared, programs = usage.get(one.name, (0, 0, 0, found.programs))
        most = max(registers, found.registers), max(spills, found.spills), max(shared, found.shared)
        usage[one.name] = *most, min(programs, found.programs)
        with contextlib.suppress(Exception):  # it is built at the first launch else; there may be no driver here
            build_launcher(build(one))
    error = "; ".join(filter(None, wrong))
    return {"ok": not error, "error": error, "usage": usage}


def judge(wanted: Sequence[Trial], processes: int, seconds: float) -> dict[str, Judged]:
    """Subject -> its candidates, compiled side by side: one after another they would take minutes of the device's time.

    Tried are those that compile in these seconds, spill nothing and fit the target: any target, by construction. The
    default stays, whatever it is: others are timed against it.
    """
    done = in_all_cores(_compile_candidate, wanted, processes, time.monotonic() + seconds)
    subjects: dict[str, Judged] = {}
    for index, candidate in enumerate(wanted):
        judged = subjects.setdefault(candidate.subject, Judged({}, {}))
        found = done.get(index, {"ok": False, "error": f"not compiled in {seconds:.0f} s"})
        if found["ok"] or not judged.tried:
            judged.tried[candidate.config] = found.get("usage", {})
        else:
            judged.refused[candidate.config] = found["error"]
    return subjects
