"""Compile every kernel that the launchers launch, for every GPU that a config ships for; no GPU is needed.

    python tools/compile_kernels.py                                # everything, minutes
    python tools/compile_kernels.py --fast                         # what `make test` runs
    python tools/compile_kernels.py --target sm_120 --kernel norm  # some of it
    python tools/compile_kernels.py --target sm_90 --set epilogue:BLOCK_M=64 --set epilogue:num_warps=4

Nothing about a kernel is restated here: the public functions run on meta tensors, and where Triton's JIT would
compile, the specialisation that it chose (types, constexprs, divisibility, num_warps) is recorded instead, then
compiled ahead of time. The table has one row per kernel, variant, rank and target: the worst of its calls. Exit
status 1 where a kernel does not compile, spills registers in earnest, or needs more shared memory than the device
has. Only the first of these is an error to Triton before a launch.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import dora_kernels
from dora_kernels import functional, launch, ops


@dataclass(frozen=True)
class Target:
    """A GPU: whose configs it takes (launch.py), and its shared memory for one program in bytes."""

    name: str
    family: str
    shared_limit: int
    multiprocessors: int

    @property
    def gpu(self) -> GPUTarget:
        """What Triton compiles for."""
        if self.name.startswith("gfx"):
            return GPUTarget("hip", self.name, 64)
        return GPUTarget("cuda", int(self.name.removeprefix("sm_")), 32)


# shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", less the 1 KiB that
# the driver keeps; CDNA3 and CDNA4 ISA guides, LDS per workgroup
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "sm_80", 166912, 108),
        Target("sm_86", "sm_120", 101376, 84),
        Target("sm_89", "sm_120", 101376, 128),
        Target("sm_90", "sm_90", 232448, 132),
        Target("sm_100", "sm_100", 232448, 148),
        Target("sm_120", "sm_120", 101376, 170),
        Target("gfx942", "gfx942", 65536, 304),
        Target("gfx950", "gfx942", 163840, 256),
    )
}


@dataclass(frozen=True)
class Variant:
    """The dtypes of a call. autocast: as inside torch.autocast(dtype); precision: torch's float32 matmul setting."""

    base: torch.dtype
    adapter: torch.dtype
    autocast: torch.dtype | None = None
    precision: str = "highest"


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
VARIANTS = {
    "bf16": Variant(_BF16, _BF16),
    "fp16": Variant(_FP16, _FP16),
    "fp32": Variant(_FP32, _FP32),
    "fp32 high": Variant(_FP32, _FP32, precision="high"),
    "bf16, fp32 adapters": Variant(_BF16, _FP32),
    "bf16, fp32 adapters, high": Variant(_BF16, _FP32, precision="high"),
    "bf16 autocast, fp32 adapters": Variant(_BF16, _FP32, autocast=_BF16),
}
# ptxas spills a few addresses of its own accord, around the loops in the machine code: at 168 or 128 registers it buys
# the next step of occupancy with them (36 to 48 bytes in the kernels here, 64 at the most). A tile that does not fit
# its registers spills more, 84 to 1100 bytes when this was written.
HARMLESS_SPILLS = 64
# 8 is not divisible by 16, which costs the vector loads; up to BLOCK_R there is one chunk, above a loop
RANKS = (8, 64, 384)


@dataclass(frozen=True)
class Inputs:
    """The arguments of dora_linear as meta tensors, all but weight wanting a gradient."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    bias: Tensor

    @classmethod
    def of(cls, variant: Variant, M: int, N: int, K: int, R: int) -> "Inputs":
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

        base, adapter = variant.base, variant.adapter
        return cls(
            x=empty(M, K, dtype=base),
            weight=empty(N, K, dtype=base).detach(),
            lora_A=empty(R, K, dtype=adapter),
            lora_B=empty(N, R, dtype=adapter),
            magnitude=empty(N, dtype=adapter),
            bias=empty(N, dtype=base),
        )

    def adapter(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.lora_A, self.lora_B, self.magnitude


def step(inputs: Inputs, *, scaling: float = 0.5, bias: bool = True, drop: bool = False, **arguments) -> None:
    """One forward and backward pass. arguments: norm_grad of dora_linear, way and precision of options."""
    norm_grad = arguments.pop("norm_grad", False)
    with dora_kernels.options(**arguments):
        y = functional.dora_linear_core(
            inputs.x,
            inputs.weight,
            *inputs.adapter(),
            scaling,
            inputs.bias if bias else None,
            x_dropped=inputs.x * 1.0 if drop else None,
            norm_grad=norm_grad,
        )
        y.backward(torch.empty_like(y))


def _frozen(inputs: Inputs) -> Inputs:
    return dataclasses.replace(inputs, magnitude=inputs.magnitude.detach(), bias=inputs.bias.detach())


def _transposed(inputs: Inputs) -> Inputs:
    return dataclasses.replace(inputs, weight=inputs.weight.new_empty(inputs.weight.shape[::-1]).T)


def _few_tokens(inputs: Inputs) -> Inputs:
    return dataclasses.replace(inputs, x=inputs.x.new_empty(16, inputs.x.shape[1]).requires_grad_())


def _inference(inputs: Inputs) -> None:
    with torch.no_grad():
        for way in ("split", "merged"):
            with dora_kernels.options(way=way):
                dora_kernels.dora_linear(inputs.x, inputs.weight, *inputs.adapter(), 0.5, inputs.bias)
        dora_kernels.weight_norm(inputs.weight, inputs.lora_A, inputs.lora_B, 0.5)
        dora_kernels.merge_weight(inputs.weight, *inputs.adapter(), 0.5)


# by name, in the order in which a specialisation that several of them share is attributed
CALLS: dict[str, Callable[[Inputs], None]] = {
    "train": step,
    "few tokens": lambda inputs: step(_few_tokens(inputs)),
    "no bias": lambda inputs: step(inputs, bias=False),
    "split": lambda inputs: step(inputs, way="split"),
    "merged": lambda inputs: step(inputs, way="merged"),
    "exact": lambda inputs: step(inputs, precision="exact"),
    "dropout": lambda inputs: step(inputs, drop=True),
    "norm_grad": lambda inputs: step(inputs, norm_grad=True),
    "frozen magnitude": lambda inputs: step(_frozen(inputs)),
    "transposed weight": lambda inputs: step(_transposed(inputs)),
    "inference": _inference,
}
# what the variants other than bf16 are compiled for: flags and dtypes hardly meet
CORE_CALLS = ("train", "few tokens", "split", "dropout", "norm_grad")


@dataclass(frozen=True)
class Specialization:
    """What Triton's JIT would have compiled at a launch."""

    kernel: JITFunction
    key: str
    target: Target
    signature: dict[str, str]
    constexprs: dict
    attrs: dict
    options: object

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def tiles(self) -> str:
        """BLOCK_M=64 BLOCK_N=128 warps=4 stages=3"""
        names = list(self.signature)
        blocks = {names[path[0]]: value for path, value in self.constexprs.items()}
        sizes = [f"{name}={value}" for name, value in blocks.items() if name.startswith("BLOCK_")]
        return " ".join([*sizes, f"warps={self.options.num_warps}", f"stages={self.options.num_stages}"])


class _Driver:
    """As much of a Triton driver as JITFunction.run asks for before it compiles."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return self.target.name  # the key of the JIT's cache of backends

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target.gpu


@contextlib.contextmanager
def recording(target: Target, variant: Variant, overrides: dict[str, dict] | None = None) -> Iterator[list]:
    """Inside, launches on meta tensors as on `target` compile nothing; the list yielded gets a Specialization each.

    overrides: kernel -> fields of launch.Config to replace.
    """
    if launch.interpreting():
        raise RuntimeError("recording: TRITON_INTERPRET is set, which leaves nothing to compile; expected it unset")
    recorded: list[Specialization] = []
    run, config_for = JITFunction.run, launch.config_for

    def run_warmup(self, *args, grid, warmup, **kwargs):
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def record(self, key, signature, device, constexprs, options, attrs, warmup):
        recorded.append(Specialization(self, key, target, signature, constexprs, attrs, options))

    def config_with_overrides(kernel, facts, operand):
        return dataclasses.replace(config_for(kernel, facts, operand), **(overrides or {}).get(kernel, {}))

    facts = launch.DeviceFacts(target.name, target.family, target.multiprocessors)
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (JITFunction, "run", run_warmup),
            (JITFunction, "_do_compile", record),
            (launch, "device_facts", lambda device: facts),
            (launch, "config_for", config_with_overrides),
            # meta tensors would take the fake implementations, and autocast does not know the meta device
            *((ops, name, getattr(ops, f"_{name}")) for name in ("norm", "merge", "forward", "backward")),
            (torch, "autocast", lambda *device_type, **options: contextlib.nullcontext()),
            (torch, "is_autocast_enabled", lambda *device_type: variant.autocast is not None),
            (torch, "get_autocast_dtype", lambda device_type: variant.autocast),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        active, precision = triton.runtime.driver._active, torch.get_float32_matmul_precision()
        triton.runtime.driver.set_active(_Driver(target))
        torch.set_float32_matmul_precision(variant.precision)
        try:
            yield recorded
        finally:
            triton.runtime.driver.set_active(active)
            torch.set_float32_matmul_precision(precision)


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a specialisation; `error` is empty where it compiled."""

    registers: int = 0
    spills: int = 0
    shared: int = 0
    error: str = ""


def compile_ahead(specialization: Specialization) -> Compiled:
    """Compile to the target's binary and read its resource usage."""
    source = ASTSource(specialization.kernel, specialization.signature, specialization.constexprs, specialization.attrs)
    try:
        kernel = triton.compile(source, target=specialization.target.gpu, options=specialization.options.__dict__)
    except Exception as error:  # whatever the compiler raises, it belongs into the table
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return Compiled(error=lines[-1].strip()[:160])
    registers, spills = _hip_usage(kernel) if "amdgcn" in kernel.asm else _cuda_usage(kernel, specialization)
    return Compiled(registers, spills, kernel.metadata.shared)


def _hip_usage(kernel) -> tuple[int, int]:
    """(vector registers, bytes of them spilled by a thread) from the metadata in the assembly.

    Spilled scalar registers are left out: they go to lanes of a vector register, not to memory.
    """

    def count(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", kernel.asm["amdgcn"]).group(1))

    return count("vgpr_count"), 4 * count("vgpr_spill_count")


def _cuda_usage(kernel, specialization: Specialization) -> tuple[int, int]:
    """(registers, bytes of spill stores and loads of a thread). A kernel with no stack frame has no spills."""
    nvidia = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(nvidia.cuobjdump.path, "-res-usage", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    if stack == "0":
        return int(registers), 0
    capability = specialization.target.gpu.arch
    ptxas = nvidia.ptxas_blackwell.path if capability >= 100 else nvidia.ptxas.path
    arch = re.search(r"\.target (\w+)", kernel.asm["ptx"]).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        log = _output(ptxas, "-v", "--regAllocOptLevel=2", f"--gpu-name={arch}", file.name, "-o", "/dev/null")
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    return int(registers), sum(map(int, spills))


def _output(*command: str) -> str:
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout


@dataclass(frozen=True)
class Job:
    """One specialisation to compile, with the row of the table that it belongs to."""

    variant: str
    rank: int
    call: str
    specialization: Specialization


def jobs_for(
    targets: list[str],
    variants: list[str],
    ranks: tuple[int, ...],
    calls: tuple[str, ...] = (),
    overrides: dict[str, dict] | None = None,
) -> list[Job]:
    """What there is to compile, each specialisation once. No calls: all of them for bf16, else CORE_CALLS."""
    jobs: dict[tuple, Job] = {}
    for target in targets:
        for variant in variants:
            for rank in ranks:
                for call in calls or (CALLS if variant == "bf16" else CORE_CALLS):
                    with recording(TARGETS[target], VARIANTS[variant], overrides) as recorded:
                        CALLS[call](Inputs.of(VARIANTS[variant], M=8192, N=4096, K=4096, R=rank))
                    for specialization in recorded:
                        key = (target, specialization.name, specialization.key)
                        jobs.setdefault(key, Job(variant, rank, call, specialization))
    return list(jobs.values())


def verdict(compiled: Compiled, target: Target) -> str:
    """ "" where the kernel can run as it should."""
    if compiled.error:
        return f"does not compile: {compiled.error}"
    if compiled.shared > target.shared_limit:
        return "over the limit"
    return "spills" if compiled.spills > HARMLESS_SPILLS else ""


_worklist: list[Job] = []  # inherited by the forked workers: a Specialization cannot be pickled


def _compile_job(index: int) -> Compiled:
    return compile_ahead(_worklist[index].specialization)


def compile_all(jobs: list[Job], processes: int = 1) -> list[tuple[Job, Compiled]]:
    """The jobs with their results, in order."""
    if processes == 1:
        return [(job, compile_ahead(job.specialization)) for job in jobs]
    _worklist[:] = jobs
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return list(zip(jobs, pool.map(_compile_job, range(len(jobs)), chunksize=1), strict=True))


HEADER = ("kernel", "variant", "R", "target", "registers", "spills", "shared", "limit", "", "tiles", "call")


def print_table(results: list[tuple[Job, Compiled]], every: bool = False) -> list[str]:
    """Print each row's worst specialisation (`every`: all of them); returns what there is to complain of."""
    rows: dict[tuple, list[tuple]] = {}
    complaints: dict[str, None] = {}  # a dict keeps the order and drops what is said twice
    for job, compiled in results:
        specialization, target = job.specialization, job.specialization.target
        complaint = verdict(compiled, target)
        if complaint:
            complaints[f"{specialization.name} ({job.variant}, R={job.rank}) on {target.name}: {complaint}"] = None
        row = (specialization.name, job.variant, job.rank, target.name)
        row += (compiled.registers, compiled.spills, compiled.shared, target.shared_limit)
        row += (complaint or "ok", specialization.tiles(), job.call)
        rows.setdefault(row if every else row[:4], []).append(row)

    def badness(row: tuple) -> tuple:
        return row[HEADER.index("")] != "ok", *(row[HEADER.index(name)] for name in ("spills", "shared", "registers"))

    lines = [HEADER, *(tuple(map(str, max(rows[key], key=badness))) for key in sorted(rows))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return list(complaints)


def _override(text: str) -> tuple[str, str, int]:
    match = re.fullmatch(r"(\w+):(\w+)=(\d+)", text)
    if not match or match[2] not in {field.name for field in dataclasses.fields(launch.Config)}:
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
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--every", action="store_true", help="a row per specialisation")
    parser.add_argument("--fast", action="store_true", help="each kernel once on sm_90, dots on sm_120 and gfx942")
    options = parser.parse_args(arguments)
    overrides: dict[str, dict] = {}
    for kernel, field, value in options.set:
        overrides.setdefault(kernel, {})[field] = value

    start = time.perf_counter()
    if options.fast:
        jobs = jobs_for(["sm_90"], ["bf16"], (64,), ("train", "few tokens"), overrides)
        jobs = list({job.specialization.name: job for job in jobs}.values())
        # what PEFT calls with, in one chunk of R and in several, where shared memory is scarcest
        small = jobs_for(["sm_120", "gfx942"], ["bf16 autocast, fp32 adapters"], (64, 384), ("train",), overrides)
        jobs += [job for job in small if "DOT_PRECISION" in job.specialization.signature]
    else:
        jobs = jobs_for(
            options.target or list(TARGETS),
            options.variant or list(VARIANTS),
            tuple(options.rank or RANKS),
            tuple(options.call or ()),
            overrides,
        )
    jobs = [job for job in jobs if options.kernel in job.specialization.name]
    complaints = print_table(compile_all(jobs, options.jobs), options.every)
    print(f"{len(jobs)} specialisations in {time.perf_counter() - start:.0f} s, {len(complaints)} complaints")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints or not jobs else 0


if __name__ == "__main__":
    sys.exit(main())
