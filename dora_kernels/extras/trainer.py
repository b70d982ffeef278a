"""Hugging Face's Trainer: a callback that says between which optimizer steps the adapters stay as they are, and names
the magnitudes that the optimizer does not have."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from dora_kernels import reuse
from dora_kernels.adapters import training
from dora_kernels.adapters.report import shown
from dora_kernels.functional.arguments import check_flag, check_model
from dora_kernels.planning.devices import logger


class FrozenAdaptersCallback(TrainerCallback):
    """`frozen_adapters` around the micro-batches of each optimizer step: Trainer(..., callbacks=[this()]).

    Opened before the first micro-batch of a step and closed before the optimizer's. keep_merged as there.

    When training begins, a warning is logged that names the magnitudes which require a gradient and are in no group of
    the optimizer. An optimizer with parameters of its own making (FSDP1's flat ones, DeepSpeed's) cannot be asked.

    A run that an exception has cut short leaves it open. The first step of the next run closes it, with this callback
    or another; on_train_end() does so at once.
    """

    def __init__(self, *, keep_merged: bool = False) -> None:
        check_flag("FrozenAdaptersCallback", "keep_merged", keep_merged)
        self.keep_merged = keep_merged
        self._scope: reuse.Scope | None = None

    def on_train_begin(self, *_: Any, model: nn.Module, **others: Any) -> None:
        """Log the magnitudes that nobody trains. Raises ValueError unless model is an nn.Module."""
        check_model("on_train_begin", model)
        left_out = _in_no_group(model, others.get("optimizer"))
        if left_out:
            logger.warning(
                f"dora_kernels: {len(left_out)} magnitudes require a gradient and are in no group of the optimizer: "
                f"{shown(left_out)}; expected them in one, or frozen"
            )

    def on_step_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        """Open the scope."""
        self._close()  # that of another model
        self._scope = reuse.hold_adapters(model, keep_merged=self.keep_merged)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Close it."""
        self._close()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close it: a last step may have had no optimizer's."""
        self._close()

    def _close(self) -> None:
        if self._scope is not None:
            self._scope.close()
            self._scope = None


def _in_no_group(model: nn.Module, optimizer: Any) -> list[str]:
    """The names of the trained magnitudes of `model` that `optimizer` does not have.

    None where it has no parameter of the model's: then it trains what stands for them. accelerate's wrapper has the
    groups of what it wraps.
    """
    groups = getattr(optimizer, "param_groups", None) or ()
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    if trained.isdisjoint(map(id, model.parameters())):
        return []
    return [name for name, magnitude in training.trained_magnitudes(model) if id(magnitude) not in trained]
