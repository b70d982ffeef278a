"""Compile every kernel that the launchers launch, for every GPU that a config ships for; no GPU is needed.

    python tools/compile_kernels.py                                # everything, minutes
    python tools/compile_kernels.py --fast                         # what `make test` runs
    python tools/compile_kernels.py --target sm_120 --kernel norm  # some of it
    python tools/compile_kernels.py --target sm_90 --set epilogue:BLOCK_M=64 --set epilogue:num_warps=4
    python tools/compile_kernels.py --loops --documented           # the table of loops in docs/machine_code.md
    python tools/compile_kernels.py --loops --target sm_90 --rank 64 --call train --shape 512 4096 4096

What is compiled is what calls of the public functions would launch (specializations.py). The table has one row per
kernel, variant, rank and target: the worst of its calls. Exit status 1 where a kernel does not compile, spills
registers in earnest, needs more shared memory than the device has, shares its work out among more programs than fit at
a time, or has atomics that it may not have (atomics.py). Only the first of these is an error to Triton before a launch.
Of the GEMM in Gluon nothing may be spilled, each role keeps to its registers (roles.py), and the products of a warp
group overlap; what runs beside it takes more than half the shared memory of a multiprocessor.
With --loops a second table says what the machine code of each loop consists of (hot_loops.py), and loops on sm_90 that
load as they should not are complained of too.
"""

import argparse
import dataclasses
import multiprocessing
import re
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import atomics
import hot_loops
import machine_code
import resources
import roles
import traffic
import triton
from specializations import (
    CALLS,
    CORE_CALLS,
    QUANTIZED_KINDS,
    VARIANTS,
    Inputs,
    Specialization,
    recording,
)
from targets import TARGETS

from dora_kernels.kernels.hopper.launch import why_not_gluon
from dora_kernels.planning.tiles import Config, GemmConfig

# ptxas spills a few addresses of its own accord, around the loops in the machine code: at 168 or 128 registers it buys
# the next step of occupancy with them (36 to 48 bytes in the kernels here, 64 at the most). A tile that does not fit
# its registers spills more, 84 to 1100 bytes when this was written.
HARMLESS_SPILLS = 64
# 8 is not divisible by 16, which costs the vector loads; up to BLOCK_R there is one chunk, above a loop
RANKS = (8, 64, 384)


SHAPE = (8192, 4096, 4096)  # M, N, K
# whose loads are those of no other call: (variant, rank, call, kernel)
UNLIKE_OTHERS = (
    ("bf16", 64, "unmerge", "merge"),
    ("bf16", 384, "merged", "merge"),
    ("bf16", 100, "train", "merge"),  # rows of lora_B begin at no multiple of 16 bytes
    ("bf16, fp32 adapters", 64, "train", "token_sums"),
    ("fp32 high", 64, "train", "token_sums"),
    ("bf16", 64, "codebook4, K = 4095", "token_sums"),
    ("bf16", 64, "transposed weight", "norm"),
    ("bf16", 384, "int8", "norm"),
    ("fp32", 384, "split", "norm"),  # R is walked
    ("fp32", 384, "dropout", "epilogue"),
    ("bf16, fp32 adapters", 64, "train", "parts"),
    ("fp32", 8, "nf4_torchao", "norm"),
)


@dataclass(frozen=True)
class Compiled:
    """The compiler's figures for a specialisation; `error` is empty if it compiled.

    registers to serialized: as in resources.Usage. programs: how many a multiprocessor holds, and what limits them.
    faults: of its atomics. roles: of each, "" for what none of them does, its name, the registers that it uses and
    those that it may use. loops: the name of each loop, "" for what is outside, and its instructions by kind; those of
    a role are "consumer 0: 1.1". dataclasses.asdict makes JSON of it.
    """

    registers: int = 0
    spills: int = 0
    stack: int = 0
    serialized: bool = False
    shared: int = 0
    error: str = ""
    programs: int = 0
    limited_by: str = ""
    faults: tuple[str, ...] = ()
    roles: tuple[tuple[str, int, int], ...] = ()
    loops: dict[str, dict[str, int]] = field(default_factory=dict)
    loads: tuple[machine_code.Load, ...] = ()
    through_l2: int = 0  # traffic.loaded


def compile_ahead(specialization: Specialization, loops: bool = False) -> Compiled:
    """Compile to the target's binary and read its resource usage; with `loops`, on CUDA, what its loops consist of."""
    try:
        kernel = triton.compile(
            specialization.source(), target=specialization.target.gpu, options=specialization.options.__dict__
        )
    except Exception as error:  # whatever the compiler raises, it belongs into the table
        return Compiled(error=_told(error))
    usage, shared = resources.usage(kernel, specialization), kernel.metadata.shared
    # of a kernel with roles the metadata counts the warps of all of them
    programs, limited_by = specialization.target.resident(usage.registers, shared, kernel.metadata.num_warps)
    compiled = Compiled(**dataclasses.asdict(usage), shared=shared, programs=programs, limited_by=limited_by)
    if "cubin" not in kernel.asm:
        work, (programs, *_) = specialization.work, specialization.grid
        whole = work is None or work.blocks % programs == 0
        return dataclasses.replace(compiled, faults=tuple(atomics.amd_faults(kernel.asm["amdgcn"], whole)))
    if not (loops or specialization.in_gluon() or re.search(r"\b(?:atom|red)\.", kernel.asm["ptx"])):
        return compiled
    code = machine_code.instructions(resources.sass(kernel))
    compiled = dataclasses.replace(compiled, faults=tuple(atomics.faults(code)))
    if specialization.in_gluon():
        through_l2 = traffic.of_gemm(specialization)
        return dataclasses.replace(compiled, **_by_role(code, usage.registers), through_l2=through_l2)
    if not loops:
        return compiled
    return dataclasses.replace(
        compiled,
        loops={loop.name: dict(loop.counts()) for loop in machine_code.loops(code)},
        loads=tuple(machine_code.loads(kernel.asm["ptx"], specialization.pointers())),
        through_l2=traffic.loaded(specialization, kernel.asm["ttir"]),
    )


def _told(error: Exception) -> str:
    """The line of a compiler's error that says most: what ptxas calls fatal, or the last one that says anything."""
    lines = [line.strip() for line in str(error).splitlines() if re.search(r"\w", line)] or [type(error).__name__]
    return next((line for line in lines if "fatal" in line), lines[-1])[:160]


def _by_role(code: list[machine_code.Instruction], launched: int) -> dict[str, Any]:
    """The roles and the loops of a Compiled."""
    found = roles.roles(code, launched)
    parts = ((role.name, loop) for role in found if role.name for loop in machine_code.loops(role.code))
    return {
        "roles": tuple((role.name, role.registers, role.limit) for role in found),
        "loops": {f"{name}: {loop.name}".removesuffix(": "): dict(loop.counts()) for name, loop in parts},
    }


@dataclass(frozen=True)
class Job:
    """One specialisation to compile, with the row of the table that it belongs to."""

    variant: str
    rank: int
    call: str
    specialization: Specialization
    shape: tuple[int, int, int] = SHAPE


def jobs_for(
    targets: list[str],
    variants: list[str],
    ranks: tuple[int, ...],
    calls: tuple[str, ...] = (),
    overrides: dict[str, dict] | None = None,
    shape: tuple[int, int, int] = SHAPE,
) -> list[Job]:
    """The jobs, each specialisation once. No calls: all of them for bf16, else CORE_CALLS."""
    jobs: dict[tuple, Job] = {}
    for target in targets:
        for variant in variants:
            for rank in ranks:
                for call in calls or (CALLS if variant == "bf16" else CORE_CALLS):
                    with recording(TARGETS[target], VARIANTS[variant], overrides) as recorded:
                        CALLS[call](Inputs.of(VARIANTS[variant], *shape, R=rank))
                    for specialization in recorded:
                        key = (target, specialization.name, specialization.key, specialization.beside)
                        jobs.setdefault(key, Job(variant, rank, call, specialization, shape))
    return list(jobs.values())


def documented_jobs(overrides: dict[str, dict] | None = None) -> list[Job]:
    """The kernels of hot_loops.DOCUMENTED, each with the grid of its case."""
    return [
        job
        for case in hot_loops.DOCUMENTED
        for job in jobs_for(["sm_90"], [case.variant], (case.rank,), (case.call,), overrides, case.shape)
        if hot_loops.short(job.specialization.name) in case.kernels
    ]


def fast_jobs(overrides: dict[str, dict] | None = None) -> list[Job]:
    """Each kernel, format and shape of loop on sm_90; dots on sm_120 and gfx942."""
    jobs = jobs_for(["sm_90"], ["bf16"], (64,), ("train", "few tokens", "fused", "bank", "grouped"), overrides)
    # what PEFT calls with, in one chunk of R and in several, where shared memory is scarcest
    small = jobs_for(["sm_120", "gfx942"], ["bf16 autocast, fp32 adapters"], (64, 384), ("train",), overrides)
    jobs += [job for job in small if "DTYPES" in job.specialization.signature]
    stored = jobs_for(["sm_90"], ["bf16"], (64,), QUANTIZED_KINDS, overrides)
    jobs += list({job.call: job for job in stored if job.specialization.name == "_norm_kernel"}.values())
    # and in every shape of loop that hot_loops.py judges
    other_ranks = jobs_for(["sm_90"], ["bf16"], (8, 384), ("train",), overrides)
    jobs += [job for job in other_ranks if "DTYPES" in job.specialization.signature]
    for variant, rank, call, kernel in UNLIKE_OTHERS:
        found = jobs_for(["sm_90"], [variant], (rank,), (call,), overrides)
        jobs += [job for job in found if hot_loops.short(job.specialization.name) == kernel]
    return jobs


def verdict(compiled: Compiled, specialization: Specialization) -> str:
    """ "" where the kernel can run as it should."""
    target, work = specialization.target, specialization.work
    if compiled.error:
        return f"does not compile: {compiled.error}"
    if compiled.shared > target.shared_limit:
        return "over the limit"
    if specialization.in_gluon() and compiled.stack:
        return f"a stack of {compiled.stack} bytes, and {compiled.spills} bytes of spills"
    if compiled.spills > HARMLESS_SPILLS:
        return "spills"
    if specialization.in_gluon() and not compiled.roles:
        return "no role has registers of its own: the compiler has ignored setmaxnreg"
    if compiled.serialized:
        return "each product waits for the one before it: wgmma is serialized"
    for name, registers, limit in compiled.roles:
        if registers > limit:
            return f"{name or 'setting up'} takes {registers} registers of {limit}"
    if specialization.beside and target.has_room_for_two(compiled.shared):
        return f"beside the GEMM of dx, and {compiled.shared} bytes of shared memory leave room for a second program"
    if work and work.waves > compiled.programs:
        return f"waves={work.waves}, and a multiprocessor holds {compiled.programs} ({compiled.limited_by})"
    return "; ".join(compiled.faults)


_worklist: list[Job] = []  # inherited by the forked workers: a Specialization cannot be pickled


def _compile_job(index: int, loops: bool) -> Compiled:
    return compile_ahead(_worklist[index].specialization, loops)


def compile_all(jobs: list[Job], processes: int = 1, loops_on: Collection[str] = ()) -> list[tuple[Job, Compiled]]:
    """The jobs with their results, in order. loops_on: the targets whose machine code is read, 0.2 s a kernel."""
    wanted = [job.specialization.target.name in loops_on for job in jobs]
    if processes == 1:
        return [(job, compile_ahead(job.specialization, loops)) for job, loops in zip(jobs, wanted, strict=True)]
    _worklist[:] = jobs
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return list(zip(jobs, pool.starmap(_compile_job, enumerate(wanted), chunksize=1), strict=True))


HEADER = ("kernel", "variant", "R", "target", "registers", "spills", "shared", "limit", "", "tiles", "call")


def print_table(results: list[tuple[Job, Compiled]], every: bool = False) -> list[str]:
    """Print each row's worst specialisation (`every`: all of them); returns what there is to complain of."""
    rows: dict[tuple, list[tuple]] = {}
    complaints: dict[str, None] = {}  # a dict keeps the order and drops what is said twice
    for job, compiled in results:
        specialization, target = job.specialization, job.specialization.target
        complaint = verdict(compiled, specialization)
        if complaint:
            complaints[f"{specialization.name} ({job.variant}, R={job.rank}) on {target.name}: {complaint}"] = None
        row = (specialization.name, job.variant, job.rank, target.name)
        row += (compiled.registers, compiled.spills, compiled.shared, target.shared_limit)
        row += (complaint or "ok", specialization.tiles() + _of_roles(compiled), job.call)
        rows.setdefault(row if every else row[:4], []).append(row)

    def badness(row: tuple) -> tuple:
        return row[HEADER.index("")] != "ok", *(row[HEADER.index(name)] for name in ("spills", "shared", "registers"))

    lines = [HEADER, *(tuple(map(str, max(rows[key], key=badness))) for key in sorted(rows))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return list(complaints)


def _of_roles(compiled: Compiled) -> str:
    """The registers of each role that does something, out of those that it may use."""
    return "".join(f", {name} {registers}/{limit}" for name, registers, limit in compiled.roles if name)


def _override(text: str) -> tuple[str, str, int]:
    match = re.fullmatch(r"(\w+):(\w+)=(\d+)", text)
    kind = GemmConfig if match and match[1] == "gemm" else Config
    if not match or match[2] not in {field.name for field in dataclasses.fields(kind)}:
        raise argparse.ArgumentTypeError(f"{text!r}; expected kernel:FIELD=VALUE, such as norm:BLOCK_K=64")
    return match[1], match[2], int(match[3])


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="default: all")
    parser.add_argument("--rank", action="append", type=int, help=f"default: {RANKS}")
    parser.add_argument("--call", action="append", choices=list(CALLS), help="default: all for bf16")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--set", action="append", type=_override, default=[], metavar="KERNEL:FIELD=VALUE")
    parser.add_argument("--shape", nargs=3, type=int, default=SHAPE, metavar=("M", "N", "K"))
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--every", action="store_true", help="a row per specialisation, and for code outside of loops")
    parser.add_argument("--loops", action="store_true", help="what loops consist of (default: on sm_90)")
    parser.add_argument("--documented", action="store_true", help="with --loops: the rows of docs/machine_code.md")
    parser.add_argument(
        "--fast", action="store_true", help="each kernel and format on sm_90, dots on sm_120 and gfx942"
    )
    options = parser.parse_args(arguments)
    overrides: dict[str, dict] = {}
    for kernel, field_name, value in options.set:
        overrides.setdefault(kernel, {})[field_name] = value

    start = time.perf_counter()
    if options.documented:
        jobs = documented_jobs(overrides)
    elif options.fast:
        jobs = fast_jobs(overrides)
    else:
        jobs = jobs_for(
            options.target or list(TARGETS),
            options.variant or list(VARIANTS),
            tuple(options.rank or RANKS),
            tuple(options.call or ()),
            overrides,
            tuple(options.shape),
        )
    jobs = [job for job in jobs if options.kernel in job.specialization.name]
    loops_on = options.target or ("sm_90",)
    results = compile_all(jobs, options.jobs, loops_on if options.loops else ())
    complaints = print_table(results, options.every)
    left_out = why_not_gluon()
    if left_out:
        print(f"left out, and nothing beside it: gemm_kernel, for {left_out}")
    if options.loops:
        hot_loops.print_loops(results, options.every)
        filtered = options.target or options.variant or options.rank or options.call or options.kernel
        complaints += hot_loops.complaints(results, everything=not (filtered or options.documented))
    print(f"{len(jobs)} specialisations in {time.perf_counter() - start:.0f} s, {len(complaints)} complaints")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints or not (jobs or left_out) else 0


if __name__ == "__main__":
    sys.exit(main())
