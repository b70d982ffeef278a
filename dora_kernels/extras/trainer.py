"""Hugging Face's Trainer: a callback that says between which optimizer steps the adapters stay as they are."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from dora_kernels import reuse
from dora_kernels.functional.arguments import check_flag


class FrozenAdaptersCallback(TrainerCallback):
    """`frozen_adapters` around the micro-batches of each optimizer step: Trainer(..., callbacks=[this()]).

    Opened before the first micro-batch of a step and closed before the optimizer's. keep_merged as there.

    A run that an exception has cut short leaves it open. The first step of the next run closes it, with this callback
    or another; on_train_end() does so at once.
    """

    def __init__(self, *, keep_merged: bool = False) -> None:
        check_flag("FrozenAdaptersCallback", "keep_merged", keep_merged)
        self.keep_merged = keep_merged
        self._scope: reuse.Scope | None = None

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
