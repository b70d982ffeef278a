"""What the libraries make of converted tensors: their formulas, and their own classes where they are installed."""

import importlib.util
import json
import math
import re
import shlex
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import dora_kernels
from dora_kernels.extras.convert import FORMATS, Checkpoint, DoraAdapter, convert_checkpoint, decode, encode
from dora_kernels.extras.convert.adapter import alpha_of, same_bits
from dora_kernels.extras.convert.files import load, save
from tests.support.convert_problem import MIXED, ONE, ROWS, WEIGHTS, K, N, R, adapter, assert_same, reread, written


def _gain(magnitude, weight, lora_A, lora_B, scaling, eps=0.0):
    norm = (weight + scaling * lora_B @ lora_A).pow(2).sum(1).sqrt()
    return magnitude.reshape(-1) / (norm + eps)


def _peft(t, config, header, x, weight):
    """NVlabs', Automodel's and PEFT's layer by its own keys, names replaced by the caller."""
    scaling = config["lora_alpha"] / config["r"]
    gain = _gain(t["m"], weight, t["A"], t["B"], scaling)
    return (
        F.linear(x, weight) + (gain - 1) * F.linear(x, weight) + gain * F.linear(F.linear(x, t["A"]), t["B"]) * scaling
    )


def _torchtune(t, config, header, x, weight):
    scaling = config["lora_alpha"] / config["r"]
    base = F.linear(x, weight)
    gain = _gain(t["m"], weight, t["A"], t["B"], scaling)
    return (gain - 1) * base + gain * F.linear(F.linear(x, t["A"]), t["B"]) * scaling + base


def _fsdp_qlora(t, config, header, x, weight):
    result = F.linear(x, weight) + F.linear(F.linear(x, t["A"]), t["B"])
    return result / (weight + t["B"] @ t["A"]).norm(p=2, dim=1) * t["m"]


def _lycoris(t, config, header, x, weight):
    merged = weight + t["B"] @ t["A"] * (float(t["alpha"]) / t["A"].shape[0])
    eps = torch.finfo(torch.float32).eps
    new = merged * ((t["m"] / (merged.norm(dim=1, keepdim=True) + eps) - 1) + 1)
    return F.linear(x, weight) + F.linear(x, new - weight)


def _megatron(t, config, header, x, weight):
    scaling = json.loads(header["dora_alpha"])["fc"] / t["A"].shape[0]
    gain = _gain(t["m"], weight, t["A"], t["B"], scaling)
    return gain * (F.linear(x, weight) + scaling * F.linear(F.linear(x, t["A"]), t["B"]))


def _diffusers(t, config, header, x, weight):
    return _peft(t, json.loads(header["lora_adapter_metadata"]), header, x, weight)


def _ai_toolkit(t, config, header, x, weight):
    """toolkit/models/DoRA.py, apply_dora: beside the layer's output and that of the product."""
    base, lora = F.linear(x, weight), F.linear(F.linear(x, t["A"]), t["B"])
    gain = _gain(t["m"], weight, t["A"], t["B"], 1.0)
    return base + lora + (gain - 1) * F.linear(x, weight + t["B"] @ t["A"])


PEFT_FC = "base_model.model.fc."
LIBRARIES = {  # keys of A, B, m (and alpha), spelled out here once more, and the layer
    "peft": (PEFT_FC, ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"), _peft),
    "torchtune": ("fc.", ("lora_a.weight", "lora_b.weight", "magnitude"), _torchtune),
    "nvlabs": (PEFT_FC, ("lora_A.weight", "lora_B.weight", "weight_m_wdecomp.weight"), _peft),
    "llava": (PEFT_FC, ("lora_A.default.weight", "lora_B.default.weight", "weight_m_wdecomp.default.weight"), _peft),
    "fsdp_qlora": (
        "fc.",
        ("dora_layer.lora_A.weight", "dora_layer.lora_B.weight", "magnitude_layer.magnitude"),
        _fsdp_qlora,
    ),
    "lycoris": ("fc.", ("lora_down.weight", "lora_up.weight", "dora_scale", "alpha"), _lycoris),
    "megatron-bridge": (
        "fc.adapter.",
        ("linear_in.weight", "linear_out.weight", "weight_magnitude"),
        _megatron,
    ),
    "automodel": ("fc.", ("lora_A.weight", "lora_B.weight", "lora_magnitude"), _peft),
    "dora_kernels": ("fc.", ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"), _megatron),
    "diffusers": ("fc.", ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"), _diffusers),
    "ai-toolkit": ("fc.", ("lora_A.weight", "lora_B.weight", "magnitude"), _ai_toolkit),
}
SHAPES = {"nvlabs": (N, 1), "llava": (N, 1), "lycoris": (N, 1)}


@pytest.mark.parametrize("name", ROWS)
def test_the_library_computes_what_ours_does(tmp_path, name):
    """In float64, by the library's own keys and its own formula: catches a key, a transpose or an alpha that is not."""
    ours = adapter("fc", scaling=4.0, dtype=torch.float64, rank=2)
    source = written(tmp_path, "dora_kernels", [ours])
    convert_checkpoint(source, tmp_path / "out", "dora_kernels", name, no_bias=True)
    checkpoint = load(FORMATS[name], tmp_path / "out")
    prefix, keys, layer = LIBRARIES[name]
    tensors = dict(zip(("A", "B", "m", "alpha"), (checkpoint.tensors[prefix + key] for key in keys), strict=False))
    assert set(checkpoint.tensors) == {prefix + key for key in keys}
    assert tuple(tensors["m"].shape) == SHAPES.get(name, (N,))
    random = torch.Generator().manual_seed(7)
    weight = torch.randn(N, K, generator=random, dtype=torch.float64)
    x = torch.randn(5, K, generator=random, dtype=torch.float64)
    tensors["m"] = tensors["m"].double()
    exact = dora_kernels.dora_linear(x, weight, ours.lora_A, ours.lora_B, ours.magnitude.double(), ours.scaling)
    assert _gain(ours.magnitude.double(), weight, ours.lora_A, ours.lora_B, ours.scaling).sub(1).abs().min() > 1e-2
    error = (layer(tensors, checkpoint.config, checkpoint.header, x, weight) - exact).abs().max()
    # LyCORIS' eps is 1.2e-7 beside norms of 10 and more
    assert error <= exact.abs().max() * (1e-7 if name == "lycoris" else 1e-13)


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = torch.nn.Conv2d(2, 3, 3)
        self.fc1 = torch.nn.Linear(3 * 4 * 4, 8, bias=False)
        self.fc2 = torch.nn.Linear(8, 5)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(self.conv(x).flatten(1))))


def peft_model(targets, **config):
    import peft

    settings = {"r": 2, "lora_alpha": 3} | config
    model = peft.get_peft_model(Small(), peft.LoraConfig(use_dora=True, target_modules=targets, **settings))
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) + (2 if "magnitude" in name else 0)
    return model.eval()


def peft_outputs(path, x):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of keys that are missing, and of patterns that match nothing
        model = peft.PeftModel.from_pretrained(Small(), str(path))
    return model.eval()(x)


@pytest.mark.parametrize("name", ROWS)
def test_a_saved_peft_model_comes_back(tmp_path, name):
    model, x = peft_model(["fc1"], r=2, lora_alpha=8), torch.randn(2, 2, 6, 6)
    model.save_pretrained(tmp_path / "saved")
    convert_checkpoint(tmp_path / "saved", tmp_path / "there", "peft", name, no_bias=True)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", name, "peft", no_bias=True)
    exact = model(x)
    assert (exact - Small()(x)).abs().max() > 0.1
    error = (peft_outputs(tmp_path / "back", x) - exact).abs().max()
    assert error <= (1e-5 if name in ONE else 0)  # which folds the scaling into lora_B


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"fc1": 6}, "alpha_pattern": {"fc2$": 5}},  # each matches the end of a name
        {"r": 9, "use_rslora": True, "rank_pattern": {"^fc1": 4}},
    ],
    ids=("patterns", "rslora"),
)
def test_peft_patterns_and_rslora_come_back(tmp_path, name, config):
    targets = ["fc1", "fc2"] + ["conv"] * (name != "dora_kernels")
    model, x = peft_model(targets, **config), torch.randn(2, 2, 6, 6)
    model.save_pretrained(tmp_path / "saved")
    for a in reread(tmp_path / "saved", "peft"):
        assert a.scaling == model.get_submodule(f"base_model.model.{a.module}").scaling["default"]
    convert_checkpoint(tmp_path / "saved", tmp_path / "there", "peft", name)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", name, "peft")
    assert torch.equal(peft_outputs(tmp_path / "back", x), model(x))


def test_peft_writes_rslora_where_nothing_else_is_exact(tmp_path):
    originals = [adapter("a", 16 / math.sqrt(5), rank=5), adapter("b", 2.0)]
    assert alpha_of(originals[0].scaling, 5) is None
    path = written(tmp_path, "peft", originals)
    assert json.loads((path / "adapter_config.json").read_text())["use_rslora"] is True
    assert_same(reread(path, "peft"), originals)


def test_dora_linear_loads_its_own(tmp_path):
    a = adapter("fc", scaling=4.0)
    layer = dora_kernels.DoraLinear(K, N, R, alpha=a.scaling * R, bias=False)
    path = written(tmp_path, "dora_kernels", [a])
    missing, unexpected = torch.nn.ModuleDict({"fc": layer}).load_state_dict(load_file(path), strict=False)
    assert not unexpected and missing == ["fc.weight"]
    assert layer.scaling == a.scaling and torch.equal(layer.lora_magnitude_vector, a.magnitude)


@pytest.fixture
def torchtunes(monkeypatch):
    """Imports a file of torchtune alone: all of 0.6.1, the last release, needs data sets and an older torchao."""

    def imported(name):
        if "torchtune" not in sys.modules:
            spec = importlib.util.find_spec("torchtune")
            if spec is None:
                pytest.skip("torchtune is not installed")
            nf4_tensor = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
            monkeypatch.setitem(sys.modules, "torchao.dtypes.nf4tensor", nf4_tensor)
            for package in ("torchtune", "torchtune.modules"):
                stub = ModuleType(package)
                stub.__path__ = [
                    spec.submodule_search_locations[0] + package.removeprefix("torchtune").replace(".", "/")
                ]
                monkeypatch.setitem(sys.modules, package, stub)
        return importlib.import_module(name)

    return imported


def test_torchtunes_own_layer_loads_and_agrees(tmp_path, torchtunes):
    DoRALinear = torchtunes("torchtune.modules.peft.dora").DoRALinear
    a = adapter("fc", scaling=3 / R)
    path = written(tmp_path, "torchtune", [a])
    config = json.loads((path / "adapter_config.json").read_text())
    layer = DoRALinear(K, N, config["r"], config["lora_alpha"])
    missing, unexpected = torch.nn.ModuleDict({"fc": layer}).load_state_dict(load_file(path / WEIGHTS), strict=False)
    assert not unexpected and missing == ["fc.weight"]
    layer, x = layer.double(), torch.randn(3, K, dtype=torch.float64)
    tensors = (tensor.double() for tensor in (layer.weight, a.lora_A, a.lora_B, a.magnitude))
    exact = dora_kernels.dora_linear(x, *(tensor.detach() for tensor in tensors), a.scaling)
    assert (layer(x) - exact).abs().max() <= 1e-13 * exact.abs().max()
    state = {f"fc.{name}": value for name, value in layer.float().state_dict().items() if name != "weight"}
    assert_same(decode(FORMATS["torchtune"], Checkpoint(state), alpha=3), [a])


def test_torchtune_orders_rows_as_we_do(tmp_path, torchtunes):
    """Its own converter of base weights is what lora_B's rows have to follow."""
    hf_to_tune = torchtunes("torchtune.models.convert_weights").hf_to_tune
    for kind, rows in (("q_proj", 16), ("k_proj", 8)):
        weight = torch.arange(rows * 16.0).view(rows, 16)
        key = f"model.layers.0.self_attn.{kind}.weight"
        (theirs,) = hf_to_tune({key: weight}, num_heads=2, num_kv_heads=1, dim=16).values()
        ours = DoraAdapter(f"layers.0.attn.{kind}", torch.ones(16, 16), weight, weight[:, 0], 1.0)
        path, there, back = (tmp_path / f"{kind}-{name}" for name in ("path", "there", "back"))
        save(FORMATS["peft"], encode(FORMATS["peft"], [ours]), path)
        convert_checkpoint(path, there, "peft", "torchtune", no_bias=True, heads=(2, 1))
        (moved,) = reread(there, "torchtune")
        assert torch.equal(moved.lora_B, theirs) and torch.equal(moved.magnitude, theirs[:, 0])
        assert not torch.equal(theirs, weight)
        convert_checkpoint(there, back, "torchtune", "peft", no_bias=True, heads=(2, 1))
        assert_same(reread(back, "peft"), [ours])


def test_the_documented_names_are_torchtunes(torchtunes):
    names = torchtunes("torchtune.models.convert_weights")._FROM_HF
    page = (Path(__file__).parents[2] / "docs" / "convert.md").read_text()
    words = shlex.split(re.search(r"python -m dora_kernels convert saved/.*?\n\n", page, re.DOTALL)[0])
    rename = [(words[i + 1], words[i + 2]) for i, word in enumerate(words) if word == "--rename"]
    linear = {k: v for k, v in names.items() if re.search(r"(_proj|lm_head)\.weight$", k)}
    assert len(linear) == 8
    for theirs, tuned in linear.items():
        for pattern, replacement in rename:
            theirs = re.sub(pattern, replacement, theirs)
        assert theirs == tuned


@pytest.mark.parametrize("wd_on_out", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_lycoris_own_layer_writes_what_is_read(kind, wd_on_out):
    LoConModule = pytest.importorskip("lycoris.modules.locon", exc_type=ImportError).LoConModule
    base = torch.nn.Linear(K, N) if kind == "linear" else torch.nn.Conv2d(K, N, 3)
    layer = LoConModule("fc", base, lora_dim=R, alpha=3, weight_decompose=True, wd_on_out=wd_on_out)
    state = {f"fc.{name}": value.detach() for name, value in layer.state_dict().items()}
    (a,) = decode(FORMATS["lycoris"], Checkpoint(state))
    assert a.norm_axis == ("out" if wd_on_out else "in") and a.scaling == layer.scale == 3 / R
    again = encode(FORMATS["lycoris"], [a]).tensors
    assert set(again) == set(state) and all(same_bits(again[key], state[key]) for key in state)
