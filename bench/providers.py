"""The layers that are compared: one function each, from the same tensors to a layer ready to be stepped.

A further provider is one more function and its name in PROVIDERS. `computes` names the function a provider
computes, so that the gate (measure.py) holds each to its own exact result. The order of PROVIDERS is that of capture
into CUDA graphs: what torch.compile makes comes last, for a capture that fails may cost those after it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dora_kernels
from bench import peers
from bench.shapes import PRECISIONS, QUANTIZED, Case, Precision
from dora_kernels import quant
from dora_kernels.reference import dora_linear_ref

# 2 * alpha / R is common, but a power of two would make the product exact and hide a scaling in the wrong place
SCALING = 0.7
DROPOUT_SEED = 7


@dataclass
class Problem:
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
    """The layer that `weight` is the decoded weight of, where the base is quantised."""
    dropout: float = 0.0
    drawn_in: torch.dtype | None = None
    """The dtype that a layer draws its mask in: `double` keeps it, and with it the mask."""

    @classmethod
    def random(cls, case: Case, seed: int = 0) -> Problem:
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

    def double(self) -> Problem:
        """The same numbers in float64, where dora_linear_ref is exact."""
        tensors = (self.weight, self.lora_A, self.lora_B, self.magnitude, self.dy)
        x, precision = self.x.detach().double().requires_grad_(), Precision("fp64", torch.float64, torch.float64)
        double = (tensor.double() for tensor in tensors)
        return Problem(x, *double, precision, dropout=self.dropout, drawn_in=self.drawn_in)

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
class Layer:
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
        """What the layer trains, and the storage of its weight where it is quantised: there before a step and after."""
        root = self.forward if self.module is None else self.module
        modules = root.modules() if isinstance(root, nn.Module) else ()
        packed = [tensor for module in modules if quant.is_quantized(module) for tensor in quant.read(module).tensors]
        return [*self.trained.values(), *packed]

    def set_mode(self, step: str) -> None:
        """train() before a training pass, eval() before inference: once, and not in what is timed."""
        if self.module is not None:
            self.module.train(step in TRAINING)

    def scope(self, step: str) -> contextlib.AbstractContextManager:
        """What a step runs in: frozen_adapters, where it is named so and the layer is ours."""
        inside = self.ours and step == FROZEN_INFERENCE
        return dora_kernels.frozen_adapters(self.module) if inside else contextlib.nullcontext()


def reference(problem: Problem, computes: str) -> Layer:
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

    return Layer(forward, trained, computes)


def lora_dropout_ref(
    x: Tensor, x_dropped: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float
) -> Tensor:
    """magnitude / norm * (x weight^T + scaling * x_dropped lora_A^T lora_B^T), the norm a constant."""
    norm = torch.linalg.vector_norm(weight + scaling * lora_B @ lora_A, dim=1).detach()
    low = F.linear(x_dropped.to(lora_A.dtype), lora_A)
    return (magnitude / norm * (F.linear(x, weight) + scaling * F.linear(low, lora_B))).to(x.dtype)


def frozen(problem: Problem) -> Layer:
    """The floor: nn.Linear over the frozen weight."""
    return Layer(_linear(problem), {}, "frozen")


def peft_lora(problem: Problem) -> Layer:
    """PEFT's LoRA layer, unmodified."""
    model = _peft_model(problem, use_dora=False)
    return Layer(_layer_of(model), _trained(model), "lora", module=model)


def peft_dora(problem: Problem) -> Layer:
    """PEFT's DoRA layer, unmodified and eager."""
    model = _peft_model(problem, use_dora=True)
    return Layer(_layer_of(model), _trained(model), "dora", module=model)


def compiled(provider: Provider) -> Provider:
    """The layer of `provider` under torch.compile, for its own shapes alone.

    The first call of each pass compiles, some ten seconds. All layers of a class share the compiler's cache, which
    holds a few shapes and then gives up silently: torch.compiler.reset() before the next case.
    """

    def build(problem: Problem) -> Layer:
        layer = provider(problem)
        layer.forward = torch.compile(layer.forward, dynamic=False)
        return layer

    return build


def peft_dora_compiled(problem: Problem) -> Layer:
    """PEFT's DoRA layer, unmodified, under torch.compile."""
    return compiled(peft_dora)(problem)


def factored_compose(problem: Problem) -> Layer:
    """The published factored norm and elementwise composition, eager."""
    return _peer(problem, peers.factored_compose)


def factored_compose_compiled(problem: Problem) -> Layer:
    """The same under torch.compile, which makes one kernel of the composition, as its authors have."""
    return compiled(factored_compose)(problem)


def axolotl(problem: Problem) -> Layer:
    """Axolotl's formula: the row norm, the vendor's products, an eager rescale, a backward pass by hand."""
    return _peer(problem, peers.RescaledLora.apply)


def ours(problem: Problem, dropout: str | None = None, **options: str) -> Layer:
    """The layer of peft_dora after dora_kernels.enable(dropout=dropout), as the planner has it."""
    model = _peft_model(problem, use_dora=True)
    report = dora_kernels.enable(model, dropout=dropout)
    if not report.taken_over or report.left_alone:
        raise RuntimeError(f"ours: {report}")
    layer = _layer_of(model)

    def forward(x: Tensor) -> Tensor:
        with dora_kernels.options(**options):
            return layer(x)

    computes = "dora_lora_dropout" if dropout == "lora" else "dora"
    return Layer(forward if options else layer, _trained(model), computes, ours=True, module=model)


def ours_split(problem: Problem) -> Layer:
    """ours, with base = x @ weight.T and an epilogue; dx through dz."""
    return ours(problem, way="split")


def ours_merged(problem: Problem) -> Layer:
    """ours, through the temporary merged weight, in the backward pass too."""
    return ours(problem, way="merged")


def ours_exact(problem: Problem) -> Layer:
    """ours, with base kept in float32 until the one rounding of y."""
    return ours(problem, precision="exact")


def ours_lora_dropout(problem: Problem) -> Layer:
    """ours, with dropout on the low-rank product alone."""
    return ours(problem, dropout="lora")


Provider = Callable[[Problem], Layer]
PROVIDERS: dict[str, Provider] = {
    "frozen": frozen,
    "peft_lora": peft_lora,
    "peft_dora": peft_dora,
    "ours": ours,
    "ours_split": ours_split,
    "ours_merged": ours_merged,
    "ours_exact": ours_exact,
    "axolotl": axolotl,
    "factored_compose": factored_compose,
    "peft_dora_compiled": peft_dora_compiled,
    "factored_compose_compiled": factored_compose_compiled,
}
COMPILED = ("peft_dora_compiled", "factored_compose_compiled")


OVER_ANY_BASE = ("frozen", "peft_lora", "peft_dora", "ours")
WITH_DROPOUT = {name: PROVIDERS[name] for name in OVER_ANY_BASE} | {"ours_lora_dropout": ours_lora_dropout}
"""Those that drop, and frozen; of a case with dropout alone."""


def providers_of(case: Case, asked: Sequence[str] | None = None) -> dict[str, Provider]:
    """The providers of a case: those asked for, in that order but the compiled ones last; None: default_providers.

    A case with dropout has those alone that drop, and where ours is asked for, ours in the other meaning beside it.
    """
    names = list(asked or default_providers(case.device, case.precision in QUANTIZED))
    if case.dropout:
        names += ["ours_lora_dropout"] if "ours" in names else []
        return {name: WITH_DROPOUT[name] for name in names if name in WITH_DROPOUT}
    return {name: PROVIDERS[name] for name in sorted(names, key=lambda name: name in COMPILED)}


def default_providers(device_type: str, quantized: bool = False) -> list[str]:
    """All, but on a CPU not those that torch.compile takes longer over than the whole measurement.

    quantized: those alone that hold the quantised layer, and not its decoded weight.
    """
    if quantized:
        return list(OVER_ANY_BASE)
    return [name for name in PROVIDERS if device_type != "cpu" or name not in COMPILED]


def forward(layer: Layer, problem: Problem) -> dict[str, Tensor]:
    """y of a training forward pass: what the backward pass needs is saved."""
    with problem.autocast():
        return {"y": layer.forward(problem.x)}


def forward_backward(layer: Layer, problem: Problem) -> dict[str, Tensor]:
    """y, the gradient of x, and the gradient of each trained tensor, by name."""
    y = forward(layer, problem)["y"]
    leaves = {"x": problem.x} | layer.trained
    gradients = torch.autograd.grad(y, list(leaves.values()), problem.dy)
    return {"y": y} | dict(zip(leaves, gradients, strict=True))


def inference(layer: Layer, problem: Problem) -> dict[str, Tensor]:
    """y without a graph; the layer is in eval mode (Layer.set_mode)."""
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


def _peer(problem: Problem, formula: Callable[..., Tensor]) -> Layer:
    """A layer that computes `formula` (peers.py) with leaves of its own."""
    trained = {
        name: getattr(problem, name).detach().clone().requires_grad_() for name in ("lora_A", "lora_B", "magnitude")
    }

    def forward(x: Tensor) -> Tensor:
        return formula(x, problem.weight, *trained.values(), SCALING)

    return Layer(forward, trained, "dora")


def _linear(problem: Problem) -> nn.Linear:
    """nn.Linear over the very weight of `problem`, which all providers share; or a copy of its quantised layer.

    (A copy, because bitsandbytes repacks the weight in place in eval mode on some CPUs.)
    """
    if problem.base is not None:
        return copy.deepcopy(problem.base)
    N, K = problem.weight.shape
    linear = nn.Linear(K, N, bias=False, device="meta")
    linear.weight = nn.Parameter(problem.weight, requires_grad=False)
    return linear


def _nf4_linear(weight: Tensor) -> nn.Linear:
    """bitsandbytes' Linear4bit of `weight`, as transformers loads it with double quantisation."""
    import bitsandbytes

    N, K = weight.shape
    linear = bitsandbytes.nn.Linear4bit(K, N, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
    linear.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=linear)
    return linear.to(weight.device)


def _peft_model(problem: Problem, use_dora: bool) -> nn.Module:
    """A PEFT model of one adapted layer that holds the tensors of `problem`."""
    R = problem.lora_A.shape[0]
    settings = {"r": R, "lora_alpha": SCALING * R, "lora_dropout": problem.dropout}
    config = peft.LoraConfig(**settings, target_modules=["layer"], use_dora=use_dora)
    net = nn.ModuleDict({"layer": _linear(problem)})
    net.is_loaded_in_4bit = problem.base is not None  # as transformers tells PEFT
    model = peft.get_peft_model(
        net,
        config,
        autocast_adapter_dtype=problem.precision.adapter_dtype == torch.float32,
    )
    with torch.no_grad():
        for name, parameter in _trained(model).items():
            tensor = getattr(problem, name)
            if (parameter.dtype, parameter.shape) != (tensor.dtype, tensor.shape):
                raise RuntimeError(f"PEFT's {name} is {parameter.dtype}; expected {tensor.dtype}")
            parameter.copy_(tensor)
    return model.train()


def _layer_of(model: nn.Module) -> nn.Module:
    return model.get_submodule("base_model.model.layer")


def _trained(model: nn.Module) -> dict[str, Tensor]:
    layer = _layer_of(model)
    trained = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
    if "default" in layer.lora_magnitude_vector:
        trained["magnitude"] = layer.lora_magnitude_vector["default"].weight
    return trained
