"""The layers that are compared: one function each, from the same tensors to a layer ready to be stepped.

A further provider is one more function and its name in PROVIDERS. `computes` names the function a provider
computes, so that the gate (measure.py) holds each to its own exact result. The order of PROVIDERS is that of capture
into CUDA graphs: what torch.compile makes comes last, for a capture that fails may cost those after it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import peft
import torch
from torch import Tensor, nn

import dora_kernels
from bench.lib import peers
from bench.lib.problem import SCALING, LayerProblem, TimedLayer
from bench.lib.shapes import QUANTIZED, LayerCase


def frozen(problem: LayerProblem) -> TimedLayer:
    """The floor: nn.Linear over the frozen weight."""
    return TimedLayer(_linear(problem), {}, "frozen")


def peft_lora(problem: LayerProblem) -> TimedLayer:
    """PEFT's LoRA layer, unmodified."""
    model = _peft_model(problem, use_dora=False)
    return TimedLayer(_layer_of(model), _trained(model), "lora", module=model)


def peft_dora(problem: LayerProblem) -> TimedLayer:
    """PEFT's DoRA layer, unmodified and eager."""
    model = _peft_model(problem, use_dora=True)
    return TimedLayer(_layer_of(model), _trained(model), "dora", module=model)


def compiled(provider: Provider) -> Provider:
    """The layer of `provider` under torch.compile, for its own shapes alone.

    The first call of each pass compiles, some ten seconds. All layers of a class share the compiler's cache, which
    holds a few shapes and then gives up silently: torch.compiler.reset() before the next case.
    """

    def build(problem: LayerProblem) -> TimedLayer:
        layer = provider(problem)
        layer.forward = torch.compile(layer.forward, dynamic=False)
        return layer

    return build


def peft_dora_compiled(problem: LayerProblem) -> TimedLayer:
    """PEFT's DoRA layer, unmodified, under torch.compile."""
    return compiled(peft_dora)(problem)


def factored_compose(problem: LayerProblem) -> TimedLayer:
    """The published factored norm and elementwise composition, eager."""
    return _peer(problem, peers.factored_compose)


def factored_compose_compiled(problem: LayerProblem) -> TimedLayer:
    """The same under torch.compile, which makes one kernel of the composition, as its authors have."""
    return compiled(factored_compose)(problem)


def axolotl(problem: LayerProblem) -> TimedLayer:
    """Axolotl's formula: the row norm, the vendor's products, an eager rescale, a backward pass by hand."""
    return _peer(problem, peers.RescaledLora.apply)


def ours(problem: LayerProblem, dropout: str | None = None, **options: str) -> TimedLayer:
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
    return TimedLayer(forward if options else layer, _trained(model), computes, ours=True, module=model)


def ours_split(problem: LayerProblem) -> TimedLayer:
    """ours, with base = x @ weight.T and an epilogue; dx through dz."""
    return ours(problem, way="split")


def ours_merged(problem: LayerProblem) -> TimedLayer:
    """ours, through the temporary merged weight, in the backward pass too."""
    return ours(problem, way="merged")


def ours_exact(problem: LayerProblem) -> TimedLayer:
    """ours, with base kept in float32 until the one rounding of y."""
    return ours(problem, precision="exact")


def ours_lora_dropout(problem: LayerProblem) -> TimedLayer:
    """ours, with dropout on the low-rank product alone."""
    return ours(problem, dropout="lora")


Provider = Callable[[LayerProblem], TimedLayer]
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


def providers_of(case: LayerCase, asked: Sequence[str] | None = None) -> dict[str, Provider]:
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

    quantized: those alone that hold the quantized layer, and not its decoded weight.
    """
    if quantized:
        return list(OVER_ANY_BASE)
    return [name for name in PROVIDERS if device_type != "cpu" or name not in COMPILED]


def _peer(problem: LayerProblem, formula: Callable[..., Tensor]) -> TimedLayer:
    """A layer that computes `formula` (peers.py) with leaves of its own."""
    trained = {
        name: getattr(problem, name).detach().clone().requires_grad_() for name in ("lora_A", "lora_B", "magnitude")
    }

    def forward(x: Tensor) -> Tensor:
        return formula(x, problem.weight, *trained.values(), SCALING)

    return TimedLayer(forward, trained, "dora")


def _linear(problem: LayerProblem) -> nn.Linear:
    """nn.Linear over the very weight of `problem`, which all providers share; or a copy of its quantized layer.

    (A copy, because bitsandbytes repacks the weight in place in eval mode on some CPUs.)
    """
    if problem.base is not None:
        return copy.deepcopy(problem.base)
    N, K = problem.weight.shape
    linear = nn.Linear(K, N, bias=False, device="meta")
    linear.weight = nn.Parameter(problem.weight, requires_grad=False)
    if problem.bias is not None:
        linear.bias = nn.Parameter(problem.bias, requires_grad=False)
    return linear


def _peft_model(problem: LayerProblem, use_dora: bool) -> nn.Module:
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
