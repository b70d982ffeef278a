"""Layers that read the same x, as PEFT models: a case's tensors, and both ways of enabling them, checked."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dora_kernels
from bench.lib.measure import failure
from dora_kernels import ops
from dora_kernels.testing import Comparison, compare

BLOCKS = {
    "q, k, v": (1024, {"q_proj": 1024, "k_proj": 256, "v_proj": 256}),
    "gate, up": (1024, {"gate_proj": 2816, "up_proj": 2816}),
    "q, k, v of Llama-3.1-8B": (4096, {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024}),
}
"""Of each block: in features, and out features by name. bench.studies.shared measures the first two by default."""

PRECISIONS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "bf16-autocast": (torch.float32, torch.bfloat16),
}
"""The dtype of x, weight and adapters; autocast's."""

WAYS = {"apart": False, "shared": True}


class Siblings(nn.Module):
    """Linear layers that are called with one x."""

    def __init__(self, features: int, widths: dict[str, int]) -> None:
        super().__init__()
        for name, width in widths.items():
            self.add_module(name, nn.Linear(features, width, bias=False))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.children()]


@dataclass(frozen=True)
class SharedCase:
    """One block with M tokens at rank R."""

    block: str
    precision: str
    M: int
    R: int

    def __str__(self) -> str:
        return f"{self.block} M={self.M} R={self.R} {self.precision}"


LLAMA = SharedCase("q, k, v of Llama-3.1-8B", "bf16", 8192, 64)


class SharedProblem:
    """A case's tensors: the stock model, x, and a dy for each layer."""

    def __init__(self, case: SharedCase, device: torch.device) -> None:
        import peft  # not for those who read the tables only

        torch.manual_seed(0)
        dtype, self.autocast = PRECISIONS[case.precision]
        features, widths = BLOCKS[case.block]
        config = peft.LoraConfig(use_dora=True, target_modules=list(widths), r=case.R, lora_alpha=2 * case.R)
        block = Siblings(features, widths).to(device, dtype)
        self.model = peft.get_peft_model(block, config, autocast_adapter_dtype=False).train()
        for name, parameter in self.model.named_parameters():
            if "magnitude" in name:
                parameter.data.mul_(1 + 0.3 * torch.randn_like(parameter).tanh())
            elif "lora_B" in name:
                nn.init.normal_(parameter, std=0.5 / case.R)
        self.x = torch.randn(1, case.M, features, device=device).to(dtype).requires_grad_()
        self.dys = [torch.randn(1, case.M, width, device=device).to(dtype) for width in widths.values()]

    def enabled(self, fuse_shared_inputs: bool) -> nn.Module:
        """A copy of the model, taken over, with the same base weights."""
        model = copy.deepcopy(self.model)
        report = dora_kernels.enable(model, fuse_shared_inputs=fuse_shared_inputs)
        if report.left_alone or any(bool(layer.shares_with) != fuse_shared_inputs for layer in report.layers):
            raise RuntimeError(
                f"bench.lib.siblings: expected every layer to be taken over, and to share if asked; {report}"
            )
        return model

    def frozen(self) -> nn.Module:
        """The layers without adapters."""
        return copy.deepcopy(self.model).unload()

    def forward(self, model: nn.Module) -> list[Tensor]:
        device = self.x.device.type
        autocast = contextlib.nullcontext() if self.autocast is None else torch.autocast(device, self.autocast)
        with autocast:
            return model(self.x)

    def step(self, model: nn.Module) -> dict[str, Tensor]:
        """y of each layer, dx, and the gradients of the adapters by name."""
        ys = self.forward(model)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        dys = [dy.to(y.dtype) for y, dy in zip(ys, self.dys, strict=True)]
        gradients = torch.autograd.grad(ys, [self.x, *trained.values()], dys)
        return {f"y{at}": y for at, y in enumerate(ys)} | dict(zip(("dx", *trained), gradients, strict=True))

    def exact(self) -> dict[str, Tensor]:
        """A step of stock PEFT in float64."""
        twin = copy.copy(self)
        twin.model, twin.autocast = copy.deepcopy(self.model).double(), None
        twin.x, twin.dys = self.x.detach().double().requires_grad_(), [dy.double() for dy in self.dys]
        return twin.step(twin.model)


Comparing = Callable[[dict[str, Tensor]], list[Comparison]]


def checked(case: SharedCase, device: torch.device) -> tuple[SharedProblem, dict[str, nn.Module], Comparing]:
    """The problem, the model of each way, and what compares a step's results with stock PEFT in float64.

    Raises RuntimeError where a model is not good enough, or does not do what the name of its way says.
    """
    problem = SharedProblem(case, device)
    models = {way: problem.enabled(fused) for way, fused in WAYS.items()}
    exact, yardstick = problem.exact(), problem.step(problem.model)

    def comparisons(results: dict[str, Tensor]) -> list[Comparison]:
        return [compare(name, results[name], yardstick[name], exact[name], problem.autocast) for name in exact]

    for way, model in models.items():
        before = ops.calls.copy()
        results = problem.step(model)
        shared = sum(count for (name, _), count in (ops.calls - before).items() if name == "shared_low")
        reason = failure(comparisons(results))
        if reason is not None or shared != WAYS[way]:
            raise RuntimeError(
                f"bench.lib.siblings: {case} {way}: {reason or f'the product was shared {shared} times'}"
            )
    return problem, models, comparisons
