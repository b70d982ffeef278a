"""bench/starts.py: what it measures is PEFT's start and ours, of the model that it says."""

import json

import pytest
import torch
from peft.tuners.lora import dora, variants

from bench import starts as bench
from dora_kernels.extras import starts

TINY = {"blocks": 2, "rank": 3, "hidden": 256, "intermediate": 192}


@pytest.fixture(autouse=True)
def peft_is_as_before():
    before = vars(dora.DoraLinearLayer)["update_layer"], vars(variants.DoraLinearVariant)["init"]
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    assert before == (vars(dora.DoraLinearLayer)["update_layer"], vars(variants.DoraLinearVariant)["init"])


@pytest.mark.parametrize("precision", bench.DTYPES)
def test_every_start_by_both_ways(precision, monkeypatch):
    ours = []

    def norm_of_base(layer, *arguments, real=starts._norm_of_base):
        ours.append(layer)
        return real(layer, *arguments)

    monkeypatch.setattr(starts, "_norm_of_base", norm_of_base)
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    rows = bench.measure("tiny", bench.StartCase(precision, starts=bench.STARTS, **TINY), repeats=2)
    assert [(row["start"], row["way"]) for row in rows] == [(s, way) for s in bench.STARTS for way in bench.WAYS]
    assert all(row["ok"] and 0 < row["least"] <= row["seconds"] for row in rows)
    # low_cpu_mem_usage makes no norm, so that it is PEFT's own inside as well
    assert len(ours) == 2 * 3 * 14
    assert all(0 < row["magnitudes"] < row["seconds"] for row in rows)
    assert "tiny" in bench.table(rows) and "not the same" not in bench.table(rows)


def test_layers_of_one_shape_read_the_same_numbers():
    numbers = {}
    model = bench.model_of(bench.StartCase("bf16", **TINY), numbers)
    projections = [module.weight for name, module in model.named_modules() if name.endswith("_proj")]
    assert len(projections) == 14 and {weight.dtype for weight in projections} == {torch.bfloat16}
    assert len({weight.data_ptr() for weight in projections}) == len({weight.shape for weight in projections}) == 4
    again = bench.model_of(bench.StartCase("bf16", **TINY), numbers)
    assert again.model.layers[1].mlp.up_proj.weight.data_ptr() == numbers[192, 256].data_ptr()
    assert not numbers[192, 256].isnan().any() and numbers[192, 256].float().std() > 0.01


def test_other_bits_are_not_ok(monkeypatch):
    def other(layer, *arguments, real=starts._norm_of_base):
        norm, reason = real(layer, *arguments)
        return norm * 1.01, reason

    monkeypatch.setattr(starts, "_norm_of_base", other)
    rows = bench.measure("tiny", bench.StartCase("fp32", **TINY), repeats=1)
    assert [row["ok"] for row in rows] == [True, False]
    assert "not the same bits" in bench.table(rows)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "CASES", {"tiny": bench.StartCase("fp32", **TINY)})
    assert bench.main(["--case", "tiny", "--repeats", "1", "--out", str(tmp_path / "starts.json")]) == 0
    written = json.loads((tmp_path / "starts.json").read_text())
    assert written["meta"]["threads"] == 1 and written["meta"]["enable_seconds"] > 0
    assert [row["way"] for row in written["rows"]] == list(bench.WAYS)
    assert "enable" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["--case", "tiny", "--repeats", "0"])
