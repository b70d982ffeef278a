"""The host's side of kernel.py: its variants, the launch of one, and its compilation where there is no GPU.

    python -m bench.studies.gluon.gemm      # registers, stack and shared memory of every variant on sm_90; needs no GPU

Gluon is an experimental part of Triton whose names change: it is imported only inside the functions that need it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
GROUP_M = 8
SHARED_LIMIT = 232_448  # bytes of a program on sm_90
# of a thread. All 12 warps are launched alike; then the producer's four give up what the eight consumers take
PRODUCER_REGISTERS, CONSUMER_REGISTERS, LAUNCH_REGISTERS = 24, 240, 168


@dataclass(frozen=True)
class GemmVariant:
    """The build of a kernel: nn and both as in kernel.py, and the shared memory of its two ends.

    stages: buffers of 48 KiB for the loads. slots: buffers for the stores of each consumer, of its rows by a part of
    256 / parts columns. consumers: two of 4 warps, or one of 8.
    """

    nn: bool = False
    both: bool = True
    stages: int = 4
    slots: int = 2
    parts: int = 4
    consumers: int = 2

    @property
    def warps(self) -> int:
        """Of a consumer; the compiler adds the other roles'."""
        return 8 // self.consumers

    def blocks(self) -> dict[str, tuple[list[int], torch.dtype]]:
        """The block that each descriptor moves, and its dtype, in the order of the kernel's arguments."""
        left, right = [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N] if self.nn else [BLOCK_N, BLOCK_K]
        out = [BLOCK_M // self.consumers, BLOCK_N // self.parts]
        matrices = {"x": left, "weight": right, "low": left, "lora": right, "y": out, "z": out}
        vectors = {"gain": ([BLOCK_N], torch.float32), "bias": ([BLOCK_N], torch.bfloat16)}
        return {name: (block, torch.bfloat16) for name, block in matrices.items()} | vectors

    def constants(self) -> dict[str, Any]:
        """The kernel's constexpr arguments."""
        return {
            "STAGES": self.stages,
            "SLOTS": self.slots,
            "PARTS": self.parts,
            "BOTH": self.both,
            "CONSUMERS": self.consumers,
            "NN": self.nn,
            "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
            "CONSUMER_REGISTERS": CONSUMER_REGISTERS,
        }


VARIANTS = {
    "two outputs": GemmVariant(),
    "two outputs, 3 stages, 4 slots": GemmVariant(stages=3, slots=4),
    "two outputs, 3 stages, wide slots": GemmVariant(stages=3, parts=2),
    "two outputs, one consumer": GemmVariant(consumers=1),
    "one output": GemmVariant(both=False),
    "dx": GemmVariant(nn=True, both=False),
    "dx, two outputs": GemmVariant(nn=True),
}


def why_not_gluon() -> str | None:
    """The reason that this Triton cannot compile the kernel's source, or None."""
    try:
        import bench.studies.gluon.kernel  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"Triton {triton.__version__}: {type(error).__name__}: {error}"
    return None


def layout_of(block: list[int], dtype: torch.dtype) -> Any:
    """The layout in shared memory of a block that the copy engine moves: swizzled if it has two dimensions."""
    from triton.experimental.gluon import language as gl

    if len(block) == 1:
        return gl.NVMMASharedLayout(0, 8 * dtype.itemsize, rank=1)
    return gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)


def launcher(
    variant: GemmVariant,
    x: Tensor,
    weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    y: Tensor,
    z: Tensor | None = None,
    low: Tensor | None = None,
    lora: Tensor | None = None,
    programs: int | None = None,
    group_m: int = GROUP_M,
) -> Callable[[], None]:
    """A function that launches the variant on these tensors: gain float32, all else bf16; no low: the base GEMM alone.

    programs: of the launch, default one a multiprocessor. Descriptors are made once, here. Raises ValueError where the
    kernel could not be right.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from bench.studies.gluon.kernel import gemm_kernel

    (M, K), N = x.shape, weight.shape[1 if variant.nn else 0]
    R = 0 if low is None else low.shape[1]
    if K <= variant.stages * BLOCK_K:
        raise ValueError(f"launcher: a reduction of {K}; expected more than {variant.stages} steps of {BLOCK_K}")
    if variant.both != (z is not None) or (low is None) != (lora is None):
        raise ValueError(f"launcher: z or lora does not go with {variant} and low; expected both or neither")
    # what is absent is never moved, but every descriptor needs a tensor
    given = {"x": x, "weight": weight, "low": x if low is None else low, "lora": weight if lora is None else lora}
    given |= {"y": y, "z": y if z is None else z, "gain": gain, "bias": bias}
    shapes = {"weight": (K, N) if variant.nn else (N, K), "y": (M, N), "z": (M, N), "gain": (N,), "bias": (N,)}
    shapes |= {"low": (M, R), "lora": (R, N) if variant.nn else (N, R)} if R else {}
    for name, shape in shapes.items():
        if tuple(given[name].shape) != shape:
            raise ValueError(f"launcher: {name} has shape {tuple(given[name].shape)}; expected {shape}")
    descriptors = []
    for name, (block, dtype) in variant.blocks().items():
        tensor = given[name]
        if tensor.dtype != dtype:
            raise ValueError(f"launcher: {name} is {tensor.dtype}; expected {dtype}")
        layout = layout_of(block, dtype)
        descriptors.append(TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout))
    tiles = -(-M // BLOCK_M) * -(-N // BLOCK_N)
    programs = programs or torch.cuda.get_device_properties(x.device).multi_processor_count
    options = variant.constants() | {"num_warps": variant.warps, "maxnreg": LAUNCH_REGISTERS}

    def launch() -> None:
        gemm_kernel[(min(programs, tiles),)](*descriptors, M, N, K, R, group_m, **options)

    return launch


def compile_ahead(variant: GemmVariant) -> Any:
    """The variant compiled for sm_90, no GPU needed. Triton 3.6 finds it in its cache when it is launched there."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from bench.studies.gluon.kernel import gemm_kernel

    names = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    signature = {
        name: f"tensordesc<{names[dtype]}{block},{layout_of(block, dtype)!r}>"
        for name, (block, dtype) in variant.blocks().items()
    }
    signature |= dict.fromkeys(("M", "N", "K", "R", "group_m"), "i32") | dict.fromkeys(variant.constants(), "constexpr")
    places = {name: (place,) for place, name in enumerate(signature)}
    constants = {places[name]: value for name, value in variant.constants().items()}
    source = GluonASTSource(gemm_kernel, signature, constants, {})
    options = {"num_warps": variant.warps, "maxnreg": LAUNCH_REGISTERS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers of a thread at launch, bytes of stack (what is spilled lies there), and bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = (triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        usage = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {"registers": int(registers), "stack": int(stack), "shared": compiled.metadata.shared}


def main(variants: dict[str, GemmVariant] = VARIANTS) -> int:
    """Prints a line for every variant; 1 where one has a stack or does not fit, 2 without Gluon."""
    if reason := why_not_gluon():
        print(f"bench.studies.gluon.gemm: {reason}", file=sys.stderr)
        return 2
    bad = 0
    for name, variant in variants.items():
        found = resources(compile_ahead(variant))
        bad += found["stack"] > 0 or found["shared"] > SHARED_LIMIT
        print(f"{name:<34}", *(f"{key} {value:>6}" for key, value in found.items()), f"of {SHARED_LIMIT}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
