"""Compile kernels in all cores before the GPU is asked anything: for the GPU suite, and tools/tune.py's candidates."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

import specializations
import torch
import triton
from candidates import PRECISIONS, SUBJECTS, candidates
from specializations import TARGETS, Specialization, Target
from triton.compiler import ASTSource

from bench import kernels
from bench.lib.shapes import LayerCase
from dora_kernels.kernels import KERNELS
from dora_kernels.planning import configs

# of shapes.py and roof.py in bench/lib, and of the whole model (a layer under autocast) -> of tools/specializations.py
VARIANTS = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
    "bf16-autocast": "bf16 autocast, fp32 adapters",
    "bf16-fp32": "bf16, fp32 adapters",
}


def card() -> tuple[str, Target | None, int]:
    """The GPU's name, "" without one; what TARGETS has for it; and its shared memory for one program in bytes.

    For a process of its own: one that has asked a GPU anything must not be forked.
    """
    if not torch.cuda.is_available():
        return "", None, 0
    properties = torch.cuda.get_device_properties("cuda")
    name = f"sm_{properties.major}{properties.minor}"
    target = TARGETS.get(properties.gcnArchName.partition(":")[0] if torch.version.hip else name)
    if target is not None:
        target = dataclasses.replace(target, multiprocessors=properties.multi_processor_count)
    return properties.name, target, getattr(properties, "shared_memory_per_block_optin", 65536)


def specializations_of(
    names: Sequence[str], operand_bytes: int, target: Target, shared_limit: int
) -> list[Specialization]:
    """The specialisations that the candidates launch on a target of tools/specializations.py, each once."""
    found: dict[tuple[str, str], Specialization] = {}
    for name in names:
        for job, *sizes in SUBJECTS[name].jobs:
            operands = kernels.KernelOperands.random(LayerCase(*sizes, PRECISIONS[operand_bytes], "meta"))
            default = configs.CONFIGS[target.family, operand_bytes][name]
            for config in candidates(name, default, operand_bytes, shared_limit):
                override = {name: dataclasses.asdict(config)}
                variant = specializations.VARIANTS[VARIANTS[PRECISIONS[operand_bytes]]]
                with specializations.recording(target, variant, override) as recorded, kernels.every_call_by_kernel():
                    kernels.CALLS[job](operands, KERNELS)
                found |= {(specialization.name, specialization.key): specialization for specialization in recorded}
    return list(found.values())


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
    try:
        kernel = build(one)
    except Exception as error:
        return {"ok": False, "error": f"{one.name} {one.tiles()}: {type(error).__name__}: {error}"[:200]}
    try:
        build_launcher(kernel)
    except Exception as error:
        return {"ok": False, "error": f"launcher of {one.name}: {type(error).__name__}: {error}"[:200]}
    return {"ok": True}


def compile_all(wanted: Sequence[Specialization], processes: int, seconds: float = 120) -> list[str]:
    """Compile them side by side into Triton's cache; returns what went wrong. One after another they would take minutes
    of the device's time. A compiler that hangs is killed when the seconds are over.
    """
    done = in_all_cores(_ready, wanted, processes, time.monotonic() + seconds)
    missing = len(wanted) - len(done)
    failed = [found["error"] for _, found in sorted(done.items()) if not found["ok"]]
    return failed + ([f"{missing} kernels were not compiled in {seconds:.0f} s"] if missing else [])
