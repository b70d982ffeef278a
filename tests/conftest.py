"""Without a GPU the kernels run in Triton's interpreter, which has to be chosen before triton is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def poison(monkeypatch):
    """Fresh memory is NaN, so that an element that nobody writes or that is read too early shows."""
    empty = torch.Tensor.new_empty

    def poisoned(self, *arguments, **keywords):
        tensor = empty(self, *arguments, **keywords)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
