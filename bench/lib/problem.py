"""The tensors that every provider gets, a layer as the instrument sees it, and the passes that are timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dora_kernels
from bench.lib.shapes import PRECISIONS, QUANTIZED, LayerCase, Precision
from dora_kernels import quant
from dora_kernels.reference import dora_linear_ref

# 2 * alpha / R is common, but a power of two would make the product exact and hide a scaling in the wrong place
SCALING = 0.7
DROPOUT_SEED = 7


@dataclass
class LayerProblem:
    """Random tensors of one case: x (M, K), weight (N, K), lora_A (R, K), lora_B (N, R), magnitude (N,), dy (M, N).

    lora_B is not zero, gains are spread over 0.5 to 1.5, and dy is dense: on zeros a product runs faster, and a
    layer without its low-rank part or its gain would look right.
    """

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    dy: Tensor
    precision: Precision
    base: nn.Linear | None = None
    """The layer that `weight` is the decoded weight of, where the base is quantized."""
    dropout: float = 0.0
    drawn_in: torch.dtype | None = None
    """The dtype that a layer draws its mask in: `double` keeps it, and with it the mask."""
    bias: Tensor | None = None
    """(N,), of the layer beneath; bench.host alone gives one."""

    @classmethod
    def random(cls, case: LayerCase, seed: int = 0) -> LayerProblem:
        """The tensors of `case`; the update scaling * B @ A is about a tenth of the weight."""
        precision = (PRECISIONS | QUANTIZED)[case.precision]
        M, N, K, R = case.M, case.N, case.K, case.R
        generator = torch.Generator(case.device).manual_seed(seed)

        def normal(*shape: int, size: float = 1.0) -> Tensor:
            return torch.randn(shape, device=case.device, generator=generator) * size

        weight, base = normal(N, K, size=K**-0.5).to(precision.dtype), None
        if precision.base == "nf4":
            base = _nf4_linear(weight)
            weight = quant.read(base).dequantize()
        lora_A = normal(R, K, size=K**-0.5).to(precision.adapter_dtype)
        lora_B = normal(N, R, size=0.1 * R**-0.5).to(precision.adapter_dtype)
        gain = 0.5 + torch.rand(N, device=case.device, generator=generator)
        merged = torch.addmm(weight.float(), lora_B.float(), lora_A.float(), alpha=SCALING)
        return cls(
            normal(M, K).to(precision.dtype).requires_grad_(),
            weight,
            lora_A,
            lora_B,
            (gain * torch.linalg.vector_norm(merged, dim=1)).to(precision.adapter_dtype),
            normal(M, N).to(precision.dtype),
            precision,
            base,
            case.dropout,
            precision.dtype,
        )

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a forward pass."""
        device_type = self.x.device.type
        return torch.autocast(device_type, dtype=self.precision.dtype, enabled=self.precision.autocast)

    def double(self) -> LayerProblem:
        """The same numbers in float64, where dora_linear_ref is exact."""
        tensors = (self.weight, self.lora_A, self.lora_B, self.magnitude, self.dy)
        x, precision = self.x.detach().double().requires_grad_(), Precision("fp64", torch.float64, torch.float64)
        double = (tensor.double() for tensor in tensors)
        return LayerProblem(x, *double, precision, dropout=self.dropout, drawn_in=self.drawn_in)

    def seed(self) -> None:
        """Set where the masks begin; a layer that is called next draws that of `dropped`."""
        if self.dropout:
            torch.manual_seed(DROPOUT_SEED)

    def dropped(self, x: Tensor) -> Tensor | None:
        """dropout(x) with the mask that a layer draws after `seed`; None without dropout."""
        if not self.dropout:
            return None
        self.seed()
        if x.dtype == self.drawn_in:
            return F.dropout(x, self.dropout)
        kept = F.dropout(torch.ones_like(x, dtype=self.drawn_in), self.dropout) != 0
        return x * kept / (1 - self.dropout)


@dataclass
class TimedLayer:
    """One provider's layer: x -> y, the tensors it trains by name, and what it computes: frozen, lora, dora or
    dora_lora_dropout (dropout on the low-rank product alone).

    ours: the call must have run in dora_kernels' own operators; a call handed back to PEFT is no measurement.
    module: what train() and eval() are called on, where the layer knows the difference.
    """

    forward: Callable[[Tensor], Tensor]
    trained: dict[str, Tensor]
    computes: str
    ours: bool = False
    module: nn.Module | None = None

    def held(self) -> list[Tensor]:
        """Tensors that exist before and after a step: those that the layer trains, and its quantized weight's."""
        root = self.forward if self.module is None else self.module
        modules = root.modules() if isinstance(root, nn.Module) else ()
        packed = [tensor for module in modules if quant.is_quantized(module) for tensor in quant.read(module).tensors]
        return [*self.trained.values(), *packed]

    def set_mode(self, step: str) -> None:
        """train() before a training pass, eval() before inference: once, and not in what is timed."""
        if self.module is not None:
            self.module.train(step in TRAINING)

    def scope(self, step: str) -> contextlib.AbstractContextManager:
        """The context of a step: frozen_adapters if the step is named so and the layer is ours."""
        inside = self.ours and step == FROZEN_INFERENCE
        return dora_kernels.frozen_adapters(self.module) if inside else contextlib.nullcontext()


def reference(problem: LayerProblem, computes: str) -> TimedLayer:
    """The definition in the dtypes of `problem`: "lora" is DoRA with gain 1, "frozen" is that with lora_B = 0."""
    lora_A, lora_B, magnitude = (
        tensor.detach().clone().requires_grad_() for tensor in (problem.lora_A, problem.lora_B, problem.magnitude)
    )
    trained = {"lora_A": lora_A, "lora_B": lora_B, "magnitude": magnitude}
    norm = None
    if not computes.startswith("dora"):
        norm = magnitude = torch.ones_like(problem.magnitude)
        del trained["magnitude"]
    if computes == "frozen":
        lora_B, trained = torch.zeros_like(problem.lora_B), {}

    def forward(x: Tensor) -> Tensor:
        x_dropped = problem.dropped(x)
        if computes == "dora_lora_dropout":
            return lora_dropout_ref(x, x_dropped, problem.weight, lora_A, lora_B, magnitude, SCALING)
        return dora_linear_ref(x, problem.weight, lora_A, lora_B, magnitude, SCALING, x_dropped=x_dropped, norm=norm)

    return TimedLayer(forward, trained, computes)


def lora_dropout_ref(
    x: Tensor, x_dropped: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float
) -> Tensor:
    """magnitude / norm * (x weight^T + scaling * x_dropped lora_A^T lora_B^T), the norm a constant."""
    norm = torch.linalg.vector_norm(weight + scaling * lora_B @ lora_A, dim=1).detach()
    low = F.linear(x_dropped.to(lora_A.dtype), lora_A)
    return (magnitude / norm * (F.linear(x, weight) + scaling * F.linear(low, lora_B))).to(x.dtype)


def forward(layer: TimedLayer, problem: LayerProblem) -> dict[str, Tensor]:
    """y of a training forward pass: what the backward pass needs is saved."""
    with problem.autocast():
        return {"y": layer.forward(problem.x)}


def forward_backward(layer: TimedLayer, problem: LayerProblem) -> dict[str, Tensor]:
    """y, the gradient of x, and the gradient of each trained tensor, by name."""
    y = forward(layer, problem)["y"]
    leaves = {"x": problem.x} | layer.trained
    gradients = torch.autograd.grad(y, list(leaves.values()), problem.dy)
    return {"y": y} | dict(zip(leaves, gradients, strict=True))


def inference(layer: TimedLayer, problem: LayerProblem) -> dict[str, Tensor]:
    """y without a graph; the layer is in eval mode (set_mode)."""
    with torch.no_grad():
        return forward(layer, problem)


FROZEN_INFERENCE = "inference+frozen_adapters"
"""Inside dora_kernels.frozen_adapters, where ours keeps norm and gain; what others do for plain inference."""
PASSES = {
    "forward": forward,
    "forward+backward": forward_backward,
    "inference": inference,
    FROZEN_INFERENCE: inference,
}
TRAINING = ("forward", "forward+backward")


def _nf4_linear(weight: Tensor) -> nn.Linear:
    """bitsandbytes' Linear4bit of `weight`, as transformers loads it with double quantization."""
    import bitsandbytes

    N, K = weight.shape
    linear = bitsandbytes.nn.Linear4bit(K, N, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
    linear.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=linear)
    return linear.to(weight.device)
