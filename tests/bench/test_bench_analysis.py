"""The analysis benchmark at a size that takes a second."""

import dataclasses
import json
import math

import pytest

from bench.studies import analysis
from dora_kernels.extras import demo
from tests.support import micro_demo

MICRO = dataclasses.replace(micro_demo.MICRO, rank=4)


def test_three_runs_of_one_base(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(demo.PRESETS, "micro", MICRO)
    out = tmp_path / "analysis.json"
    more = ["--out", str(out), "--commit", "a copy"]
    assert analysis.main(["--preset", "micro", "--steps", "4", "--checkpoints", "2", *more]) == 0
    data = json.loads(out.read_text())
    meta, rows = data["meta"], data["rows"]
    assert {row["checkpoint"] for row in rows} == {f"{m}-{step}" for m in ("full", "LoRA", "DoRA") for step in (2, 4)}
    assert len(rows) == 6 * 7 and meta["left_out"] == []
    assert all(0 < row["delta_magnitude"] and 0 < row["delta_direction"] < 1 for row in rows)
    assert set(meta["trends"]) == {"all", "last checkpoint", *(row["layer"].split(".")[-1] for row in rows)}
    assert {name: line["count"] for name, line in meta["trends"]["all"].items()} == dict.fromkeys(analysis.RATES, 14)
    assert meta["trends"]["last checkpoint"]["DoRA"]["count"] == 7 and meta["trends"]["q_proj"]["LoRA"]["count"] == 2
    assert set(meta["loss"]) == set(analysis.RATES) and all(map(math.isfinite, sum(meta["loss"].values(), [])))
    assert meta["commit"] and "DoRA" in capsys.readouterr().out


def test_more_checkpoints_than_steps(capsys):
    with pytest.raises(SystemExit):
        analysis.main(["--steps", "2", "--checkpoints", "3"])
    assert "checkpoints is 3" in capsys.readouterr().err
