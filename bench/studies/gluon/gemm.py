"""Variants of the package's GEMM for Hopper: the launch of one, and its compilation where there is no GPU.

python -m bench.studies.gluon.gemm      # registers, stack and shared memory of every variant on sm_90; needs no GPU
"""

from __future__ import annotations

import dataclasses
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

from dora_kernels.kernels.hopper import launch
from dora_kernels.kernels.hopper.launch import why_not_gluon
from dora_kernels.planning.configs import SHARED
from dora_kernels.planning.tiles import GEMMS, GemmConfig

CONFIG = GEMMS["sm_90"]["forward"]
GROUP_M = CONFIG.GROUP_M
SHARED_LIMIT = SHARED["sm_90"]


@dataclass(frozen=True)
class GemmVariant:
    """A build of the kernel. both: z is written beside y. adapter: with low, lora, gain and bias; without them it
    computes what cuBLAS does.
    """

    config: GemmConfig = CONFIG
    nn: bool = False
    both: bool = True
    adapter: bool = True

    def dtypes(self) -> dict[str, torch.dtype | None]:
        """Of the kernel's tensors, in order; None for one that is absent."""
        half, of_adapter = torch.bfloat16, torch.bfloat16 if self.adapter else None
        given = {"x": half, "weight": half, "low": of_adapter, "lora": of_adapter, "y": half}
        given["z"] = half if self.both else None
        return given | {"gain": torch.float32 if self.adapter else None, "bias": of_adapter}


VARIANTS = {
    "two outputs": GemmVariant(),
    "two outputs, 3 stages, 4 slots": GemmVariant(dataclasses.replace(CONFIG, stages=3, slots=4)),
    "two outputs, 3 stages, wide slots": GemmVariant(dataclasses.replace(CONFIG, stages=3, parts=2)),
    "two outputs, one consumer": GemmVariant(dataclasses.replace(CONFIG, consumers=1)),
    "one output": GemmVariant(both=False),
    "dx": GemmVariant(nn=True, both=False, adapter=False),
    "dx, two outputs": GemmVariant(nn=True),
}


def launcher(
    variant: GemmVariant,
    x: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    z: Tensor | None = None,
    low: Tensor | None = None,
    lora: Tensor | None = None,
    programs: int | None = None,
    group_m: int = GROUP_M,
    scaling: float = 1.0,
) -> Callable[[], None]:
    """A function that launches the variant on these tensors. programs: of the launch, default one a multiprocessor.

    Raises ValueError where the kernel could not be right.
    """
    if reason := launch.why_not_gemm(x, weight, low, lora, gain, bias, y, z, nn=variant.nn):
        raise ValueError(f"launcher: {reason}")
    if variant.both != (z is not None):
        raise ValueError(f"launcher: z is {'absent' if z is None else 'given'}; expected otherwise for {variant}")
    config = dataclasses.replace(variant.config, GROUP_M=group_m)
    programs = programs or torch.cuda.get_device_properties(x.device).multi_processor_count

    def run() -> None:
        launch.launch(config, variant.nn, x, weight, low, lora, y, z, gain, bias, scaling, programs)

    return run


def compile_ahead(variant: GemmVariant) -> Any:
    """The variant compiled for sm_90, no GPU needed. Triton 3.6 finds it in its cache when it is launched there."""
    from triton.experimental.gluon._runtime import GluonASTSource

    names = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    signature, constants = {}, {}
    for (name, block), dtype in zip(
        launch.blocks(variant.config, variant.nn).items(), variant.dtypes().values(), strict=True
    ):
        if dtype is None:
            constants[name] = None
        signature[name] = (
            "constexpr" if dtype is None else f"tensordesc<{names[dtype]}{list(block)},{launch.layout(block, dtype)!r}>"
        )
    signature |= dict.fromkeys(("M", "N", "K", "R"), "i32") | {"scaling": "fp32", "group_m": "i32"}
    options = launch.constants(variant.config, variant.nn)
    constants |= {name: options.pop(name) for name in list(options) if name.isupper()}
    signature |= {name: "constexpr" for name in constants if name not in signature}
    places = {name: (place,) for place, name in enumerate(signature)}
    source = GluonASTSource(launch.kernel(), signature, {places[name]: value for name, value in constants.items()}, {})
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
