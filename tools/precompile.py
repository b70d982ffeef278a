"""Compile the candidates of tools/tune.py in all cores before the GPU is asked anything."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
from collections.abc import Sequence

import specializations
import torch
import triton
from candidates import PRECISIONS, SUBJECTS, candidates
from specializations import TARGETS, Specialization, Target
from triton.compiler import ASTSource

from bench import kernels
from bench.shapes import Case
from dora_kernels import configs
from dora_kernels.kernels import KERNELS

VARIANTS = {2: "bf16", 4: "bf16, fp32 adapters"}  # of tools/specializations.py


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
            operands = kernels.Operands.random(Case(*sizes, PRECISIONS[operand_bytes], "meta"))
            default = configs.CONFIGS[target.family, operand_bytes][name]
            for config in candidates(name, default, operand_bytes, shared_limit):
                override = {name: dataclasses.asdict(config)}
                variant = specializations.VARIANTS[VARIANTS[operand_bytes]]
                with specializations.recording(target, variant, override) as recorded, kernels.every_call_by_kernel():
                    kernels.CALLS[job](operands, KERNELS)
                found |= {(specialization.name, specialization.key): specialization for specialization in recorded}
    return list(found.values())


_worklist: list[Specialization] = []  # inherited by the forked workers: a Specialization cannot be pickled


def _build(index: int) -> str:
    """Compile a specialisation into Triton's cache, and the launcher of its signature; "" or what went wrong."""
    one = _worklist[index]
    try:
        source = ASTSource(one.kernel, one.signature, one.constexprs, one.attrs)
        kernel = triton.compile(source, target=one.target.gpu, options=one.options.__dict__)
    except Exception as error:  # whatever the compiler raises
        return f"{one.name} {one.tiles()}: {type(error).__name__}: {error}"[:200]
    try:  # up to Triton 3.6 a C compiler makes one for each signature, at the first launch otherwise
        triton.runtime.driver.active.launcher_cls(source, kernel.metadata)
    except Exception as error:
        return f"launcher of {one.name}: {type(error).__name__}: {error}"[:200]
    return ""


def compile_all(wanted: Sequence[Specialization], processes: int) -> list[str]:
    """Compile them side by side into Triton's cache; returns what went wrong. One after another they would take minutes
    of the device's time.
    """
    _worklist[:] = wanted
    failed = []
    with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        for one, future in [(one, pool.submit(_build, index)) for index, one in enumerate(wanted)]:
            try:
                failed += filter(None, [future.result()])
            except concurrent.futures.BrokenExecutor:  # a compiler that ends its process takes the rest with it
                failed.append(f"{one.name} {one.tiles()}: not compiled, a process has died")
    return failed
