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
from typing import Any

import compile_kernels
import specializations
import torch
import triton
from candidates import PRECISIONS, SUBJECTS, candidates
from compile_kernels import Compiled, verdict
from specializations import TARGETS, Specialization, Target
from triton.compiler import ASTSource

from bench import kernels
from bench.lib.shapes import LayerCase
from dora_kernels.kernels import KERNELS
from dora_kernels.planning import configs
from dora_kernels.planning.configs import Config

# of shapes.py and roof.py in bench/lib, and of the whole model (a layer under autocast) -> of tools/specializations.py
VARIANTS = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
    "bf16-autocast": "bf16 autocast, fp32 adapters",
    "bf16-fp32": "bf16, fp32 adapters",
}


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


# (subject, candidate) -> what its jobs launch
Launched = dict[tuple[str, Config], list[Specialization]]


def launched_by(names: Sequence[str], operand_bytes: int, target: Target) -> Launched:
    """The specialisations that each candidate of tools/tune.py launches on a target of tools/specializations.py."""
    found: Launched = {}
    variant = specializations.VARIANTS[VARIANTS[PRECISIONS[operand_bytes]]]
    for name in names:
        default = configs.CONFIGS[target.family, operand_bytes][name]
        for job, *sizes in SUBJECTS[name].jobs:
            operands = kernels.KernelOperands.random(LayerCase(*sizes, PRECISIONS[operand_bytes], "meta"))
            for config in candidates(name, default, target.name):
                override = {name: dataclasses.asdict(config)}
                with specializations.recording(target, variant, override) as recorded, kernels.every_call_by_kernel():
                    kernels.CALLS[job](operands, KERNELS)
                found.setdefault((name, config), []).extend(recorded)
    return found


def each_once(recorded: Iterable[Specialization]) -> dict[tuple[str, str], Specialization]:
    """(kernel, key) -> the specialisation."""
    return {(one.name, one.key): one for one in recorded}


def build(specialization: Specialization) -> Any:
    """The compiled kernel, from Triton's cache where it is there."""
    source = ASTSource(specialization.kernel, specialization.signature, specialization.constexprs, specialization.attrs)
    return triton.compile(source, target=specialization.target.gpu, options=specialization.options.__dict__)


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
    for future in futures:
        future.cancel()
    pool.shutdown(wait=False)
    if len(done) < len(futures):
        for worker in multiprocessing.active_children():  # the end of this process would wait for them
            worker.kill()
    return done


def _ready(one: Specialization) -> Done:
    compiled = compile_kernels.compile_ahead(one)
    if compiled.error:
        return {"ok": False, "error": f"{one.name} {one.tiles()}: {compiled.error}"}
    with contextlib.suppress(Exception):  # it is built at the first launch else, or fails there; there may be no driver
        build_launcher(build(one))
    return {"ok": True, "compiled": compiled}


def compile_all(wanted: Sequence[Specialization], processes: int, seconds: float = 120) -> list[Compiled]:
    """Compile them side by side into Triton's cache: the compiler's figures, in order, with `error` where it failed.

    One after another they would take minutes of the device's time. A compiler that hangs is killed when the seconds are
    over.
    """
    done = in_all_cores(_ready, wanted, processes, time.monotonic() + seconds)
    late = {"ok": False, "error": f"not compiled in {seconds:.0f} s"}
    found = [done.get(index, late) for index in range(len(wanted))]
    return [one["compiled"] if one["ok"] else Compiled(error=one["error"]) for one in found]


@dataclass
class Judged:
    """A subject's candidates, the default first, and those that are not tried, with the reason.

    Of the former what the compiler says of each kernel: registers of a thread, bytes spilled, bytes of shared memory,
    programs that a multiprocessor holds.
    """

    tried: dict[Config, dict[str, tuple[int, int, int, int]]]
    refused: dict[Config, str]


def judge(launched: Launched, compiled: dict[tuple[str, str], Compiled]) -> dict[str, Judged]:
    """Subject -> its candidates. Tried are those that compile, spill nothing and fit the target: any, by construction.

    The default stays, whatever it is: others are timed against it.
    """
    subjects: dict[str, Judged] = {}
    for (name, config), recorded in launched.items():
        judged = subjects.setdefault(name, Judged({}, {}))
        usage: dict[str, tuple[int, int, int, int]] = {}
        wrong = []
        for one in recorded:
            found = compiled[one.name, one.key]
            wrong += [why] if (why := verdict(found, one)) and why not in wrong else []
            # the worst of what a kernel is compiled for
            registers, spills, shared, programs = usage.get(one.name, (0, 0, 0, found.programs))
            most = max(registers, found.registers), max(spills, found.spills), max(shared, found.shared)
            usage[one.name] = *most, min(programs, found.programs)
        if wrong and judged.tried:
            judged.refused[config] = "; ".join(wrong)
        else:
            judged.tried[config] = usage
    return subjects
