"""The whole-model benchmark, on a model of two layers."""

import json

import pytest
import torch

from bench import model
from bench.model import ModelRow, disagreement

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "deep" / "model.json"
    status = model.main(["--preset", "tiny", "--device", "cpu", "--repeats", "1", "--out", str(path)])
    return status, json.loads(path.read_text())


def test_every_variant_of_the_tiny_model(measured):
    status, content = measured
    assert status == 0 and content["meta"]["left_out"] == [] and "commit" in content["meta"]
    rows = {row["variant"]: row for row in content["rows"]}
    assert tuple(rows) == model.VARIANTS
    for name, row in rows.items():
        assert row["ok"] and row["reason"] is None and row["peak_bytes"] is None
        assert row["seconds"] == row["repeats"][0] > 0
        assert row["tokens_per_second"] == pytest.approx(2 * 128 / row["seconds"], rel=1e-3)
        assert row["adapted_layers"] == (0 if name == "frozen" else 2 * 7)
    assert rows["ours"]["backend"] == "reference" and rows["frozen"]["gradient_norm"] is None


def test_ours_agrees_with_peft_dora_and_nothing_else_does():
    base = model.base_model(model.PRESETS["tiny"], CPU)
    rows = {name: model.measure_variant(base, "tiny", name, CPU, 0, 1) for name in model.VARIANTS}
    assert disagreement(rows["ours"], rows["peft_dora"]) is None
    for name in ("frozen", "peft_lora"):
        assert disagreement(rows[name], rows["peft_dora"]) is not None
        difference = abs(rows[name].loss - rows["peft_dora"].loss) / rows["peft_dora"].loss
        assert difference > model.LOSS_TOLERANCE


def test_a_variant_leaves_the_base_as_it_was():
    base = model.base_model(model.PRESETS["tiny"], CPU)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    first = model.measure_variant(base, "tiny", "frozen", CPU, 0, 1)
    for variant in ("ours", "peft_dora"):
        assert model.measure_variant(base, "tiny", variant, CPU, 0, 1).ok
        assert base.training and not any(parameter.requires_grad for parameter in base.parameters())
        after = base.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert model.measure_variant(base, "tiny", "frozen", CPU, 0, 1).loss == first.loss


def test_a_disagreement_takes_the_times_back(tmp_path, monkeypatch):
    losses = {"peft_dora": 10.0, "ours": 10.1}

    def fake(base, preset, variant, *arguments):
        return ModelRow(
            variant, preset, seconds=1.0, repeats=[1.0], loss=losses[variant], gradient_norm=1.0, tokens_per_second=1.0
        )

    monkeypatch.setattr(model, "measure_variant", fake)
    monkeypatch.setattr(model, "base_model", lambda *arguments: None)
    for order in (("peft_dora", "ours"), ("ours", "peft_dora")):
        theirs, ours = sorted(
            model.run("tiny", order, CPU, tmp_path / "a.json", 60, 1, {}), key=lambda row: row["variant"] == "ours"
        )
        assert theirs["ok"] and not ours["ok"]
        assert ours["seconds"] is None and ours["reason"].startswith("loss is 10.1, PEFT DoRA's is 10.0")
        assert [row["ok"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]].count(False) == 1


def test_a_variant_that_raises_has_a_reason_and_no_time(monkeypatch):
    def adapted(*arguments):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(model, "adapted", adapted)
    row = model.measure_variant(None, "tiny", "ours", CPU, 0, 1)
    assert not row.ok and row.reason == "OutOfMemoryError: too large" and row.seconds is None


def test_what_has_no_time_is_left_out(tmp_path, monkeypatch, capsys):
    now = [0.0]

    def fake(base, preset, variant, device, seconds, repeats, clock):
        assert seconds == pytest.approx((15 - now[0]) / (4 - now[0] / 10))
        now[0] += 10
        return ModelRow(variant, preset, seconds=1.0, tokens_per_second=1.0, loss=1.0)

    monkeypatch.setattr(model, "measure_variant", fake)
    monkeypatch.setattr(model, "base_model", lambda *arguments: None)
    rows = model.run("tiny", model.VARIANTS, CPU, tmp_path / "a.json", 15, 1, {}, clock=lambda: now[0])
    assert [row["variant"] for row in rows] == ["ours", "peft_dora"]
    assert "left out: frozen, peft_lora" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["meta"]["left_out"] == ["frozen", "peft_lora"]


def test_the_large_preset_is_the_published_model():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    preset = model.PRESETS["qwen3-vl-8b"]
    with torch.device("meta"):
        built = Qwen3ForCausalLM._from_config(Qwen3Config(**preset.config), dtype=torch.bfloat16)
    assert 8.1e9 < built.num_parameters() < 8.3e9
    adapted = [name for name, _ in built.named_modules() if name.rpartition(".")[2] in model.LINEARS]
    assert len(adapted) == 252
    assert {parameter.dtype for parameter in built.parameters()} == {torch.bfloat16}


def test_no_gpu_is_exit_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model.main(["--out", str(tmp_path / "model.json")]) == 2
    assert "sees no GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())
