"""Variants of the package's GEMM for Hopper, and the launch of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_kernels.kernels.hopper import launch
from dora_kernels.planning.tiles import GEMMS, GemmConfig

CONFIG = GEMMS["sm_90"]["forward"]
GROUP_M = CONFIG.GROUP_M


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
