"""bench.studies.evaluation on a small layer: what it measures is right, and what it prints."""

import json

import pytest
import torch

from bench.studies import evaluation
from dora_kernels import DoraLinear


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(evaluation, "N", 48)
    monkeypatch.setattr(evaluation, "K", 64)


def test_a_row_for_each_way():
    rows = evaluation.measure("fp32", 3, 0.01)
    assert [row["way"] for row in rows] == list(evaluation.WAYS) and all(row["ms"]["runs"] >= 7 for row in rows)
    assert len(evaluation.table(rows).splitlines()) == 3


def test_what_another_commit_took_is_a_column(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    files = [tmp_path / "before.json", tmp_path / "after.json"]
    arguments = ["--precision", "fp32", "bf16", "--tokens", "1", "3", "--seconds", "0.01", "--out"]
    assert evaluation.main([*arguments, str(files[0])]) == 0
    written = json.loads(files[0].read_text())
    written["meta"]["commit"] = "0123456789abcdef"
    files[0].write_text(json.dumps(written))
    assert evaluation.main([*arguments, str(files[1]), "--before", str(files[0])]) == 0
    before, after = (json.loads(file.read_text())["rows"] for file in files)
    assert len(before) == 12 and len(after) == 16
    added = [row for row in after if row["way"] == "alone at 0123456789"]
    assert [row["ms"] for row in added] == [row["ms"] for row in before if row["way"] == "alone"]
    assert "| alone at 0123456789 | over frozen |" in capsys.readouterr().out
    assert all(f"{row['ms']['minimum']:.3g} ms" in evaluation.table(after) for row in after)


def test_nothing_is_timed_of_a_wrong_layer(monkeypatch):
    forward = DoraLinear.forward
    monkeypatch.setattr(DoraLinear, "forward", lambda layer, x: torch.mul(forward(layer, x), 1.01))
    with pytest.raises(RuntimeError, match="bench.studies.evaluation: bf16 M=3: first: error"):
        evaluation.measure("bf16", 3, 0.01)
