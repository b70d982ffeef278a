"""Hugging Face's Trainer: a callback that says between which optimizer steps the adapters stay as they are."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn
from transformers import TrainerCallback

from dora_kernels.reuse import frozen_adapters


class FrozenAdaptersCallback(TrainerCallback):
    """`frozen_adapters` around the micro-batches of each optimizer step: Trainer(..., callbacks=[this()]).

    Opened before the first micro-batch of a step and closed before the optimizer's. keep_merged as there.
    """

    def __init__(self, *, keep_merged: bool = False) -> None:
        self.keep_merged = keep_merged
        self._scope = contextlib.ExitStack()

    def on_step_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        """Open the scope."""
        self._scope.close()  # of a step that an exception has cut short
        self._scope.enter_context(frozen_adapters(model, keep_merged=self.keep_merged))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Close it."""
        self._scope.close()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close it: a last step may have had no optimizer's."""
        self._scope.close()
