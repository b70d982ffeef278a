"""The demo of DVoRA: the same model and text, fine-tuned twice from a PEFT VeRA model that `to_dvora` converted.

No library has DVoRA to compare with, so the other run is its definition: each layer by `dvora_linear_ref`, in plain
PyTorch and by autograd, with the dense weight + update written out for its norm.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import VeraConfig, get_peft_model
from rich.progress import Progress
from torch import Tensor
from transformers import LlamaForCausalLM

from dora_kernels import adapters, quant
from dora_kernels.adapters.taking import take_over
from dora_kernels.extras.demo import runs
from dora_kernels.extras.demo.settings import PRESETS, Settings
from dora_kernels.extras.dvora import dvora_linear_ref
from dora_kernels.extras.dvora.peft import DvoraVeraLinear, to_dvora, vera_factors

RATE_FACTOR = 10
"""VeRA's rate over the preset's, as in its paper: vectors that start at 0 and 0.1 have further to go."""


class DefinitionLinear(DvoraVeraLinear):
    """A DVoRA layer computed by its definition."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., K) -> (..., N)."""
        name, base = self.active_adapters[0], self.base_layer
        weight = quant.read(base).dequantize(dtype=x.dtype) if quant.is_quantized(base) else base.weight
        return dvora_linear_ref(x, weight, *vera_factors(self, name), self.vera_magnitude_vector[name], base.bias)


class DvoraRun(runs.Run):
    """A fine-tuning whose fresh adapters have lambda_b at zero."""

    zero_at_start = "lambda_b"


class DvoraDemoResult(runs.DemoResult):
    """Two runs of DVoRA, whose operators are those of `rescale`."""

    method = "DVoRA"
    operators = ("rescale", "rescale_backward")


def fine_tune(model: LlamaForCausalLM, settings: Settings, progress: Progress) -> DvoraDemoResult:
    """Fine-tune `model` with DVoRA on every linear layer, by the definition and by dora_kernels, in turns."""
    preset = PRESETS[settings.preset]
    torch.manual_seed(settings.seed)
    config = VeraConfig(target_modules="all-linear", r=settings.rank)
    with warnings.catch_warnings():
        # as in runs.fine_tune
        warnings.simplefilter("ignore", FutureWarning)
        our_model = to_dvora(get_peft_model(model, config))
    plain_model = runs.copy_over(our_model)
    for layer in plain_model.modules():
        if isinstance(layer, DvoraVeraLinear):
            take_over(layer, DefinitionLinear)
    layers = [name for name, layer in our_model.named_modules() if type(layer) is DvoraVeraLinear]
    report = adapters.ModelReport(tuple(adapters.LayerReport(name, "peft", True) for name in layers))
    rate = RATE_FACTOR * preset.rate
    both = (
        DvoraRun("the definition", plain_model, rate, settings),
        DvoraRun("dora_kernels", our_model, rate, settings),
    )
    return runs.compare(DvoraDemoResult, *both, report, settings, progress)
