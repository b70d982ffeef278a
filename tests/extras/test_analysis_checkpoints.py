"""The analysis of checkpoints on disk and of live models, against the weights that PEFT itself merges."""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from dora_kernels import adapters, quant
from dora_kernels.cli import main
from dora_kernels.extras import analysis


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.q_proj = nn.Linear(12, 16)
        self.k_proj = nn.Linear(16, 10, bias=False)
        self.conv = nn.Conv1d(1, 2, 3)
        self.gpt = Conv1D(6, 10)

    def forward(self, x):
        return self.gpt(self.k_proj(self.q_proj(self.embed(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])


LINEARS = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "k_proj")]


def net(seed=0):
    torch.manual_seed(seed)
    return Net().double()


def save(model, folder, shards=1):
    """A folder as transformers writes it: one file, or shards and their index."""
    folder.mkdir()
    tensors = model if isinstance(model, dict) else model.state_dict()
    tensors = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {key: f"model-{number % shards}.safetensors" for number, key in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({key: tensors[key] for key in tensors if weight_map[key] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def adapted(seed=0, size=0.3, **config):
    """A PEFT model with A, B and magnitudes that are no longer those of the start."""
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "k_proj"], **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net(), peft.LoraConfig(**config), autocast_adapter_dtype=False)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) * 3 + 0.3)
            elif "lora_" in name:
                parameter.copy_(size * torch.randn_like(parameter))
    return model


def expected(model, names):
    """layer -> (delta M, delta D), from the weights that PEFT merges."""
    before, merged = net(), model.merge_and_unload()
    result = {}
    for name in names:
        pair = [module.get_submodule(name) for module in (before, merged)]
        w, v = (m.weight.detach().T if isinstance(m, Conv1D) else m.weight.detach() for m in pair)
        magnitude = (v.norm(dim=1) - w.norm(dim=1)).abs().mean().item()
        direction = (1 - torch.cosine_similarity(v, w, dim=1)).mean().item()
        result[name] = pytest.approx(magnitude, rel=1e-9), pytest.approx(direction, rel=1e-9)
    return result


def measured(result):
    return {point.layer: (point.delta_magnitude, point.delta_direction) for point in result.points}


@pytest.fixture
def base(tmp_path):
    return save(net(), tmp_path / "base")


CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        # the first that fits a whole part of the name counts; sorted, as save_pretrained writes them
        "rank_pattern": {"layers.0.q_proj": 7, r"layers\.1\.k_proj": 5, "q_proj": 2},
        "alpha_pattern": {"0.q_proj": 11, "_proj": 90, "k_proj": 1},
    },
    "both": {"use_rslora": True, "rank_pattern": {"layers.1.q_proj": 8}, "alpha_pattern": {"layers.1.q_proj": 2}},
    "gpt": {"target_modules": ["gpt"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("use_dora", (False, True))
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_adapters_saved_by_peft(base, tmp_path, config, use_dora):
    model = adapted(use_dora=use_dora, **config)
    model.save_pretrained(tmp_path / "adapter")
    live = analysis.analyze_model(model)
    result = analysis.analyze(base, [tmp_path / "adapter"])
    names = ["layers.0.gpt", "layers.1.gpt"] if "fan_in_fan_out" in config else LINEARS
    assert measured(result) == expected(model, names)
    assert {point.method for point in result.points} == {"DoRA" if use_dora else "LoRA"}
    assert not result.left_out and not live.left_out
    assert measured(live) == {name: pytest.approx(values, rel=1e-9) for name, values in measured(result).items()}
    assert {point.method for point in live.points} == {point.method for point in result.points}


def test_a_dense_checkpoint_from_shards(base, tmp_path):
    tuned = net()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = tuned.state_dict()
    state["extra.weight"], state["layers.1.embed.weight"] = torch.ones(2, 2), torch.ones(12, 12)
    del state["layers.0.k_proj.weight"]
    result = analysis.analyze(base, [save(state, tmp_path / "tuned", shards=3)])
    before = net()
    assert {point.layer for point in result.points} == {
        "layers.0.embed", "layers.0.q_proj", "layers.0.gpt", "layers.1.q_proj", "layers.1.k_proj", "layers.1.gpt",
    }  # fmt: skip
    for point in result.points:
        w, v = (model.get_submodule(point.layer).weight.detach() for model in (before, tuned))
        magnitude = (v.norm(dim=1) - w.norm(dim=1)).abs().mean().item()
        direction = (1 - torch.cosine_similarity(v, w, dim=1)).mean().item()
        assert (point.method, point.delta_magnitude) == ("full", pytest.approx(magnitude, rel=1e-9))
        assert point.delta_direction == pytest.approx(direction, rel=1e-9)
    reasons = {entry.name: entry.reason for entry in result.left_out}
    assert "(12, 12)" in reasons["layers.1.embed"] and "only in the base" in reasons["layers.0.k_proj"]
    assert (
        "not in" in reasons["extra"] and "1-D" in reasons["layers.0.q_proj.bias"] and "3-D" in reasons["layers.0.conv"]
    )
    named = set(reasons) | {point.layer for point in result.points}
    assert named == {key.removesuffix(".weight") for key in {*state, *before.state_dict()}}


def test_targets_and_transposed_weights(base, tmp_path):
    tuned = net(1)
    folder = save(tuned, tmp_path / "tuned")
    result = analysis.analyze(base / "model.safetensors", [folder], targets=r"0\.gpt|bias", fan_in_fan_out=True)
    (point,) = result.points
    w, v = (model.layers[0].gpt.weight.detach().T for model in (net(), tuned))
    assert point.delta_magnitude == pytest.approx((v.norm(dim=1) - w.norm(dim=1)).abs().mean().item(), rel=1e-9)
    assert result.left_out and all("bias" in entry.name for entry in result.left_out)
    live = analysis.analyze_model(tuned, net())
    assert measured(live)["layers.0.gpt"] == pytest.approx(measured(result)["layers.0.gpt"])
    assert "layers.0.conv" in {entry.name for entry in live.left_out}


def test_a_base_saved_without_its_head_has_shorter_names(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    state = {f"model.{key}": tensor for key, tensor in net().state_dict().items()}
    longer = analysis.analyze(save(state, tmp_path / "longer"), [tmp_path / "adapter"])
    assert measured(longer) == expected(model, LINEARS)


def test_what_is_not_linear_is_named(base, tmp_path):
    kinds = ["q_proj", "conv", "embed"]
    model = adapted(target_modules=kinds, use_dora=True, modules_to_save=["k_proj"])
    model.save_pretrained(tmp_path / "adapter")
    for result in (analysis.analyze(base, [tmp_path / "adapter"]), analysis.analyze_model(model)):
        assert {point.layer for point in result.points} == {"layers.0.q_proj", "layers.1.q_proj"}
        reasons = {entry.name: entry.reason for entry in result.left_out}
        assert any("conv" in name for name in reasons) and any("embed" in name for name in reasons)
    on_disk = analysis.analyze(base, [tmp_path / "adapter"]).left_out
    assert any("k_proj" in entry.name for entry in on_disk)
    assert "a convolution" in {entry.reason.partition(":")[0] for entry in on_disk}
    assert {e.reason for e in on_disk if "embed" in e.name} == {"an embedding"}


def test_a_diverged_layer_is_named_and_the_others_are_measured(base, tmp_path):
    state = net(1).state_dict()
    state["layers.0.q_proj.weight"][0, 0] = torch.inf
    state["layers.1.q_proj.weight"].zero_()
    result = analysis.analyze(base, [save(state, tmp_path / "tuned")], targets="_proj$")
    assert {point.layer for point in result.points} == {"layers.0.k_proj", "layers.1.k_proj"}
    reasons = {entry.name: entry.reason for entry in result.left_out}
    assert "not finite" in reasons["layers.0.q_proj"] and "direction" in reasons["layers.1.q_proj"]


def test_refusals_come_before_any_work(base, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(analysis.checkpoints.TensorFiles, "__getitem__", never)
    adapted(use_dora=True).save_pretrained(tmp_path / "adapter")
    good = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")

    def refused(match, config=None, tensors=None, base=base, **options):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(good | (config or {})))
        save_file(weights | (tensors or {}), tmp_path / "adapter" / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=f"^analyze: .*{match}"):
            analysis.analyze(base, [tmp_path / "adapter"], **options)

    first = "base_model.model.layers.0.q_proj"
    refused("peft_type 'IA3'; expected 'LORA'", {"peft_type": "IA3"})
    refused("init_lora_weights 'pissa'", {"init_lora_weights": "pissa"})
    refused("rank_pattern is .* expected {pattern: number}", {"rank_pattern": {"(": 4}})
    refused("adapter_config.json: alpha_pattern is \\[4\\]; expected a JSON object", {"alpha_pattern": [4]})
    refused("target_parameters", {"target_parameters": ["experts.gate_up_proj"]})
    refused("lora_A \\(3, 16\\) and .* for rank 4", {"r": 4})
    refused("has a magnitude; expected use_dora=False", {"use_dora": False})
    refused("magnitude of shape \\(15,\\)", None, {f"{first}.lora_magnitude_vector": torch.ones(15)})
    refused("lora_A \\(3, 13\\)", None, {f"{first}.lora_A.weight": torch.ones(3, 13)})
    refused("lora_B \\(17, 3\\)", None, {f"{first}.lora_B.weight": torch.ones(17, 3)})
    refused("over the base's weight \\(16, 10\\)", {"fan_in_fan_out": True})
    refused("nothing to compare .* 'nowhere' is found", targets="nowhere")
    refused("targets is '\\('", targets="(")

    state = net().state_dict()
    del state["layers.1.k_proj.weight"]
    refused("has no layers.1.k_proj.weight, which", base=save(state, tmp_path / "missing"))
    state = net().state_dict() | {"layers.1.k_proj.weight": torch.ones(80, 1, dtype=torch.uint8)}
    refused("stored as U8; expected a base that is not quantized", base=save(state, tmp_path / "quantized"))
    refused("is an adapter; expected the checkpoint of a model", base=tmp_path / "adapter")
    refused("is no checkpoint; expected a safetensors file", base=tmp_path)
    refused("cannot be read", base=tmp_path / "adapter" / "adapter_config.json")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "model.safetensors.index.json").write_text('{"weight_map": {"w": "gone.safetensors"}}')
    refused("gone.safetensors cannot be read", base=tmp_path / "index")
    with pytest.raises(ValueError, match="^analyze: .* holds .*lora_A.* expected an adapter as its folder"):
        analysis.analyze(base, [tmp_path / "adapter" / "adapter_model.safetensors"])
    with pytest.raises(ValueError, match="tuned is empty"):
        analysis.analyze(base, [])
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no adapter_model.safetensors"):
        analysis.analyze(base, [tmp_path / "adapter"])


def test_live_layers_that_cannot_be_read_are_named():
    model = adapted(use_dora=True)
    adapters.enable(model)  # changes nothing
    before = measured(analysis.analyze_model(model))
    adapters.disable(model)
    assert before == measured(analysis.analyze_model(model)) and set(before) == set(LINEARS)
    model.merge_adapter()
    with pytest.raises(ValueError, match="^analyze_model: .*merged"):
        analysis.analyze_model(model)
    model.unmerge_adapter()
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    result = analysis.analyze_model(model)
    assert {entry.name for entry in result.left_out} == {"layers.0.q_proj", "layers.1.q_proj"}
    moved = adapted()
    moved.peft_config["default"].init_lora_weights = "olora"  # which PEFT refuses to do in float64
    with pytest.raises(ValueError, match="^analyze_model: .*init_lora_weights is 'olora'"):
        analysis.analyze_model(moved)
    with pytest.raises(ValueError, match="^analyze_model: .*expected PEFT LoRA layers"):
        analysis.analyze_model(net())


def test_a_live_quantised_base():
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    linear = nn.Sequential(Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32).to("cpu"))
    model = peft.get_peft_model(linear, peft.LoraConfig(use_dora=True, target_modules=["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        layer.lora_magnitude_vector["default"].weight.mul_(2)
    (point,) = analysis.analyze_model(model).points
    parts = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    weight = quant.read(layer.base_layer).dequantize()
    change = analysis.adapter_change(weight, *parts, layer.lora_magnitude_vector["default"].weight)
    assert (point.delta_magnitude, point.delta_direction) == (change.delta_magnitude, change.delta_direction)


def test_the_command(base, tmp_path, capsys):
    runs = []
    for step in (1, 2):
        for use_dora in (False, True):
            runs.append(str(tmp_path / f"{'dora' if use_dora else 'lora'}-{step}"))
            adapted(seed=step, size=0.1 * step, use_dora=use_dora).save_pretrained(runs[-1])
        runs.append(str(save(net(step), tmp_path / f"full-{step}", shards=2)))
    sharded = save(net(), tmp_path / "sharded", shards=2)
    out, file = tmp_path / "chart.png", tmp_path / "points.json"
    arguments = ["analyze", str(sharded), *runs, "--out", str(out), "--json", str(file), "--targets", "_proj$"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert all(method in printed.out for method in analysis.layers.METHODS) and "left out" not in printed.out
    content = json.loads(file.read_text())
    assert len(content["points"]) == len(runs) * len(LINEARS)
    assert {p["checkpoint"] for p in content["points"]} == set(runs)
    assert {name: line["count"] for name, line in content["trends"].items()} == {"full": 8, "LoRA": 8, "DoRA": 8}
    assert all(-1 <= line["correlation"] <= 1 for line in content["trends"].values())
    assert out.read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again.png"
    analysis.draw(analysis.analyze(sharded, runs, targets="_proj$"), again, f"against {sharded}")
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "chart.pdf"], "expected a name that ends in .png"),
        (["--out", "nowhere/chart.png"], "out is 'nowhere/chart.png'"),
        (["--json", "nowhere/points.json"], "json is 'nowhere/points.json'"),
        ([], "is no checkpoint"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", "base", "tuned", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
