"""bench.studies.dropout: nothing is timed that is wrong."""

import pytest
import torch

from bench.lib.measure import Timing
from bench.studies import dropout
from tests.support.problem import DEVICE

CASE = dropout.DropoutCase("bf16", 33, 24, 20, 3)


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    monkeypatch.setattr(dropout, "interleave", lambda steps, *_: {way: Timing.of([2.0]) for way in steps})


def test_a_case():
    rows = dropout.measure(CASE, torch.device(DEVICE), 0)
    assert [row["way"] for row in rows] == list(dropout.WAYS)
    assert "| bf16 | 33 | 24 x 20 | 3 | 2 ms | 1.00 | 1.00 |" in dropout.table(rows)


@pytest.mark.parametrize("way", dropout.WAYS)
@pytest.mark.parametrize("name", ("y", "dx", "lora_B.weight"))
def test_wrong_numbers_are_not_timed(name, way, monkeypatch):
    step = dropout.DropoutProblem.step

    def wrong(self, asked):
        results = step(self, asked)
        return {key: value * (1.05 if key == name and asked == way else 1) for key, value in results.items()}

    monkeypatch.setattr(dropout.DropoutProblem, "step", wrong)
    with pytest.raises(RuntimeError, match=f"bench.studies.dropout: .* {way}: .*{name}"):
        dropout.measure(CASE, torch.device(DEVICE), 0)
