"""The resources of a compiled kernel: registers, bytes that it spills, shared memory; and its machine code."""

import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton
from specializations import Specialization


@dataclass(frozen=True)
class Usage:
    """Of a thread: registers as it is launched, bytes of spill stores and loads, bytes of stack.

    serialized: the compiler says that it waits for each product of a warp group before it starts another.
    """

    registers: int
    spills: int
    stack: int = 0
    serialized: bool = False


def usage(kernel, specialization: Specialization) -> Usage:
    """The resources of a kernel that triton.compile has compiled for the specialisation's target."""
    return _of_cuda(kernel, specialization) if "cubin" in kernel.asm else _of_hip(kernel)


def _of_hip(kernel) -> Usage:
    """From the metadata in the assembly.

    Spilled scalar registers are left out: they go to lanes of a vector register, not to memory.
    """

    def count(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", kernel.asm["amdgcn"]).group(1))

    return Usage(count("vgpr_count"), 4 * count("vgpr_spill_count"))


def _of_cuda(kernel, specialization: Specialization) -> Usage:
    """A kernel with no stack frame has no spills; of one in Gluon ptxas is asked for its warnings, too."""
    found = of_cubin(kernel, triton.knobs.nvidia.cuobjdump.path, "-res-usage")
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", found).groups())
    if stack == 0 and not specialization.in_gluon():
        return Usage(registers, 0)
    log = _log_of_ptxas(kernel, specialization.target.gpu.arch)
    spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
    # "Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    return Usage(registers, spills, stack, bool(re.search(r"wgmma.*serialized", log)))


def _log_of_ptxas(kernel, capability: int) -> str:
    """The words of ptxas as it assembles the kernel once more: a kernel from the cache comes without."""
    nvidia = triton.knobs.nvidia
    ptxas = nvidia.ptxas_blackwell.path if capability >= 100 else nvidia.ptxas.path
    arch = re.search(r"\.target (\w+)", kernel.asm["ptx"]).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        return _output(ptxas, "-v", "--regAllocOptLevel=2", f"--gpu-name={arch}", file.name, "-o", "/dev/null")


def sass(kernel) -> str:
    """The machine code of the kernel, by nvdisasm."""
    return of_cubin(kernel, triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf")


def of_cubin(kernel, *command: str) -> str:
    """The output of a command for the kernel's binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return _output(*command, file.name)


def _output(*command: str) -> str:
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout
