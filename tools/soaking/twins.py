"""One model as three: ours, which is enabled, stock PEFT's, and stock PEFT's in float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

import dora_kernels
from soaking.models import Kind, Net

Records = dict[str, Tensor | None]


@dataclass
class Twin:
    """A model that a walk goes on with. Operations ask `ours` for what stock has no word for.

    exact: float64; autocast and casts do nothing to it. scopes: the open `frozen_adapters`. held: what the last
    operation leaves alive, graphs and all. records: what the current operation has computed, by name; dtypes: those it
    computed in beside the model's own.
    """

    model: PeftModel
    kind: Kind
    ours: bool = False
    exact: bool = False
    was_half: bool = False
    scopes: list[contextlib.ExitStack] = field(default_factory=list)
    held: list[object] = field(default_factory=list)
    records: Records = field(default_factory=dict)
    dtypes: list[torch.dtype] = field(default_factory=list)

    def layers(self) -> list[LoraLayer]:
        """PEFT's layers."""
        return [module for module in self.model.modules() if isinstance(module, LoraLayer)]

    @property
    def names(self) -> list[str]:
        """The adapters."""
        return sorted(self.model.peft_config)

    @property
    def active(self) -> list[str]:
        """The active adapters."""
        active = self.model.base_model.active_adapter
        return [active] if isinstance(active, str) else list(active)

    @property
    def merged(self) -> bool:
        """True if some layer is merged."""
        return any(layer.merged for layer in self.layers())

    @property
    def net(self) -> Net:
        """The base model."""
        return next(module for module in self.model.modules() if isinstance(module, Net))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base model."""
        return self.net.shift.dtype

    @property
    def half(self) -> bool:
        """True if the base model or some adapter is half precision, or was before it became the exact twin."""
        return self.was_half or any(parameter.dtype.itemsize == 2 for parameter in self.model.parameters())

    def input_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """`dtype`, or what stands for it in the exact twin."""
        return torch.float64 if self.exact else dtype

    @contextlib.contextmanager
    def backend(self) -> Iterator[None]:
        """The walk's backend, which stock knows nothing of."""
        with dora_kernels.options(backend=self.kind.backend) if self.ours else contextlib.nullcontext():
            yield

    def close(self) -> None:
        """End what outlives an operation."""
        self.held.clear()
        while self.scopes:
            self.scopes.pop().close()

    def copied(self, exact: bool = False) -> Twin:
        """A copy to try an operation on; of a stock twin."""
        twin = Twin(copy.deepcopy(self.model), self.kind, exact=exact, was_half=self.half)
        for copied, parameter in zip(twin.model.parameters(), self.model.parameters(), strict=True):
            copied.grad = None if parameter.grad is None else parameter.grad.clone()  # which deepcopy leaves out
        if exact:
            twin.model.double()
            for layer in twin.layers():
                layer._caches = {key: value.double() for key, value in layer._caches.items()}
        return twin


def described(model: nn.Module) -> dict[str, object]:
    """Everything of a model that is not a number: names, shapes, dtypes, flags, adapters."""
    found: dict[str, object] = {"state dict": list(model.state_dict())}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else (tuple(tensor.grad.shape), tensor.grad.dtype)
        found[name] = (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad, tensor.is_leaf, grad)
    for name, module in model.named_modules():
        found[f"{name}, training"] = module.training
        if isinstance(module, LoraLayer):
            found[f"{name}, adapters"] = (
                sorted(module.lora_A) + sorted(module.lora_embedding_A), list(module.active_adapters),
                list(module.merged_adapters), module.disable_adapters, dict(module.scaling), sorted(module._caches),
                {key: type(variant) for key, variant in module.lora_variant.items()},
            )  # fmt: skip
    if isinstance(model, PeftModel):
        active = model.base_model.active_adapter
        found["active"] = (sorted(model.peft_config), [active] if isinstance(active, str) else list(active))
    return found


def numbers(model: nn.Module) -> Records:
    """Every number of a model: parameters, gradients, buffers, and the norms that PEFT's layers keep."""
    found: Records = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[name] = tensor.detach()
        if tensor.grad is not None:
            found[f"{name}, gradient"] = tensor.grad
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            # ours are float32 also where stock's are half precision
            dtype = module.get_base_layer().weight.dtype
            found |= {f"{name}, {key}": value.to(dtype) for key, value in module._caches.items()}
    return found


def follow(stock: nn.Module, ours: nn.Module) -> None:
    """Give stock the numbers of ours, to the bit. Ours is not touched: what it keeps must be right without help."""
    mine = dict([*ours.named_parameters(), *ours.named_buffers()])
    for name, tensor in [*stock.named_parameters(), *stock.named_buffers()]:
        tensor.data = mine[name].detach().clone()
        tensor.grad = None if mine[name].grad is None else mine[name].grad.detach().clone()
    for layer, twin in zip(stock.modules(), ours.modules(), strict=True):
        if isinstance(layer, LoraLayer):
            layer._caches = {key: value.clone() for key, value in twin._caches.items()}
