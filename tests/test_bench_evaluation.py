"""bench.evaluation on a small layer: what it measures is right, and what it prints."""

import pytest
import torch

from bench import evaluation
from dora_kernels import DoraLinear


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(evaluation, "N", 48)
    monkeypatch.setattr(evaluation, "K", 64)


def test_a_row_for_each_way():
    rows = evaluation.measure("fp32", 3, 0.01)
    assert [row["way"] for row in rows] == list(evaluation.WAYS) and all(row["ms"]["runs"] >= 7 for row in rows)
    assert len(evaluation.table(rows).splitlines()) == 3


def test_nothing_is_timed_of_a_wrong_layer(monkeypatch):
    forward = DoraLinear.forward
    monkeypatch.setattr(DoraLinear, "forward", lambda layer, x: torch.mul(forward(layer, x), 1.01))
    with pytest.raises(RuntimeError, match="bench.evaluation: bf16 M=3: first: error"):
        evaluation.measure("bf16", 3, 0.01)
