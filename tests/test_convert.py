"""Checkpoints from library to library: the same to the last bit, or refused, and nothing written then."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import dora_kernels
from dora_kernels.cli import main
from dora_kernels.convert import FORMATS, Checkpoint, DoraAdapter, convert_checkpoint, decode, encode
from dora_kernels.convert.adapter import alpha_of, same_bits
from dora_kernels.convert.files import load, save

N, K, R = 6, 10, 4
PAIRS = [(source, target) for source in FORMATS for target in FORMATS]
MIXED = ("peft", "lycoris", "dora_kernels")  # formats in which layers may differ in rank and alpha


def adapter(module="layers.0.mlp.w1", scaling=2.0, dtype=torch.float32, seed=0, kernel=(), rank=R, axis="out"):
    """A random adapter with lora_B of the weight's size and gains far from 1."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    magnitude = 3 * normal(N if axis == "out" else K).abs() + 1
    return DoraAdapter(
        module,
        normal(rank, K, *kernel),
        normal(N, rank, *(1,) * len(kernel)),
        magnitude.float(),  # another dtype than lora_A's, where that is not float32
        scaling,
        axis,
    )


def several(dtype=torch.float32, scaling=2.0):
    names = ("layers.0.mlp.w1", "layers.0.mlp", "layers.10.mlp.w1", "layers.2.mlp.w1")
    return [adapter(name, scaling, dtype, seed) for seed, name in enumerate(sorted(names))]


def written(tmp_path, name, adapters):
    path = tmp_path / f"as-{name}"
    save(FORMATS[name], encode(FORMATS[name], adapters), path)
    return path


def reread(path, name, alpha=None):
    return decode(FORMATS[name], load(FORMATS[name], path), alpha)


def assert_same(ours, theirs):
    assert [a.module for a in ours] == [b.module for b in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.scaling == b.scaling and a.norm_axis == b.norm_axis
        for name in ("lora_A", "lora_B", "magnitude"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y), (a.module, name)


# --- every pair of formats ---


@pytest.mark.parametrize("source, target", PAIRS)
def test_every_pair_there_and_back(tmp_path, source, target):
    originals = several(torch.bfloat16)
    if "fsdp_qlora" in (source, target):  # its scaling is 1: a power of two goes into lora_B without rounding
        originals = [replace(a, lora_B=a.lora_B * 2, scaling=1.0) for a in originals]
    there, back = tmp_path / "there", tmp_path / "back"
    path = written(tmp_path, source, originals)
    convert_checkpoint(path, there, source, target, no_bias=True)
    assert_same(reread(there, target), originals)
    convert_checkpoint(there, back, target, source, no_bias=True)
    assert_same(reread(back, source), originals)


@pytest.mark.parametrize("target", MIXED)
@pytest.mark.parametrize("source", MIXED)
def test_ranks_and_alphas_by_layer(tmp_path, source, target):
    originals = [adapter("a", 2.0), adapter("b.a", 0.5, seed=1), adapter("c", 16 / 12, seed=2, rank=12)]
    convert_checkpoint(written(tmp_path, source, originals), tmp_path / "there", source, target)
    assert_same(reread(tmp_path / "there", target), originals)


@pytest.mark.parametrize("kernel", [(3,), (1, 1), (3, 2), (2, 1, 3)])
@pytest.mark.parametrize("source, target", [("peft", "lycoris"), ("lycoris", "peft")])
def test_convolutions_where_both_have_them(tmp_path, source, target, kernel):
    originals = [adapter("conv", kernel=kernel), adapter("linear", seed=1)]
    convert_checkpoint(written(tmp_path, source, originals), tmp_path / "there", source, target)
    assert_same(reread(tmp_path / "there", target), originals)


def test_lycoris_keeps_its_norm_over_columns(tmp_path):
    originals = [adapter("linear", axis="in"), adapter("linear_out", seed=1)]
    path = written(tmp_path, "lycoris", originals)
    assert load_file(path)["linear.dora_scale"].shape == (1, K)
    convert_checkpoint(path, tmp_path / "there", "lycoris", "lycoris", rename=[("^linear", "fc")])
    assert_same(
        reread(tmp_path / "there", "lycoris"), [replace(a, module=a.module.replace("linear", "fc")) for a in originals]
    )


# --- what the libraries make of the tensors ---


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
}
SHAPES = {"nvlabs": (N, 1), "llava": (N, 1), "lycoris": (N, 1)}


@pytest.mark.parametrize("name", FORMATS)
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

    return peft.PeftModel.from_pretrained(Small(), str(path)).eval()(x)


@pytest.mark.parametrize("name", FORMATS)
def test_a_saved_peft_model_comes_back(tmp_path, name):
    model, x = peft_model(["fc1"], r=2, lora_alpha=8), torch.randn(2, 2, 6, 6)
    model.save_pretrained(tmp_path / "saved")
    convert_checkpoint(tmp_path / "saved", tmp_path / "there", "peft", name, no_bias=True)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", name, "peft", no_bias=True)
    exact = model(x)
    assert (exact - Small()(x)).abs().max() > 0.1
    error = (peft_outputs(tmp_path / "back", x) - exact).abs().max()
    assert error <= (1e-5 if name == "fsdp_qlora" else 0)  # which folds the scaling into lora_B


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"fc1": 6}, "alpha_pattern": {"fc2$": 5, "conv": 7}},
        {"r": 9, "use_rslora": True, "rank_pattern": {"^fc1": 4}},
    ],
    ids=("patterns", "rslora"),
)
def test_peft_patterns_and_rslora_come_back(tmp_path, name, config):
    targets = ["fc1", "fc2"] if name == "dora_kernels" else ["conv", "fc1", "fc2"]
    if name == "dora_kernels":
        config = {
            key: {k: v for k, v in value.items() if k != "conv"} if isinstance(value, dict) else value
            for key, value in config.items()
        }
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


def library(name, *attributes):
    """Attributes of a library's module, or a skip that says why not."""
    import importlib

    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        pytest.skip(f"{name} cannot be imported: {error}")
    return [getattr(module, attribute) for attribute in attributes]


def test_torchtunes_own_layer_loads_and_agrees(tmp_path):
    (DoRALinear,) = library("torchtune.modules.peft", "DoRALinear")
    a = adapter("fc", scaling=3 / R)
    path = written(tmp_path, "torchtune", [a])
    config = json.loads((path / "adapter_config.json").read_text())
    layer = DoRALinear(K, N, config["r"], config["lora_alpha"])
    missing, unexpected = torch.nn.ModuleDict({"fc": layer}).load_state_dict(load_file(path / FOLDER), strict=False)
    assert not unexpected and missing == ["fc.weight"]
    layer, x = layer.double(), torch.randn(3, K, dtype=torch.float64)
    tensors = (tensor.double() for tensor in (layer.weight, a.lora_A, a.lora_B, a.magnitude))
    exact = dora_kernels.dora_linear(x, *(tensor.detach() for tensor in tensors), a.scaling)
    assert (layer(x) - exact).abs().max() <= 1e-13 * exact.abs().max()
    state = {f"fc.{name}": value for name, value in layer.float().state_dict().items() if name != "weight"}
    assert_same(decode(FORMATS["torchtune"], Checkpoint(state), alpha=3), [a])


def test_torchtune_orders_rows_as_we_do(tmp_path):
    """Its own converter of base weights is what lora_B's rows have to follow."""
    (hf_to_tune,) = library("torchtune.models.convert_weights", "hf_to_tune")
    for kind, rows, heads in (("q_proj", 16, 2), ("k_proj", 8, 1)):
        weight = torch.arange(rows * 16.0).view(rows, 16)
        key = f"model.layers.0.self_attn.{kind}.weight"
        theirs = next(iter(hf_to_tune({key: weight}, num_heads=2, num_kv_heads=1, dim=16).values()))
        a = DoraAdapter(f"layers.0.{kind}", torch.ones(16, 2), weight, torch.arange(float(rows)), 1.0)
        a = replace(a, lora_A=torch.ones(16, 16))
        there, back = tmp_path / f"there-{kind}", tmp_path / f"back-{kind}"
        path = tmp_path / f"source-{kind}"
        save(FORMATS["peft"], encode(FORMATS["peft"], [a]), path)
        convert_checkpoint(path, there, "peft", "torchtune", no_bias=True, heads=(2, 1))
        assert torch.equal(reread(there, "torchtune")[0].lora_B, theirs) and not torch.equal(weight, theirs), heads
        convert_checkpoint(there, back, "torchtune", "peft", no_bias=True, heads=(2, 1))
        assert_same(reread(back, "peft"), [a])


@pytest.mark.parametrize("wd_on_out", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_lycoris_own_layer_writes_what_is_read(kind, wd_on_out):
    (LoConModule,) = library("lycoris.modules.locon", "LoConModule")
    base = torch.nn.Linear(K, N) if kind == "linear" else torch.nn.Conv2d(K, N, 3)
    layer = LoConModule("fc", base, lora_dim=R, alpha=3, weight_decompose=True, wd_on_out=wd_on_out)
    state = {f"fc.{name}": value.detach() for name, value in layer.state_dict().items()}
    (a,) = decode(FORMATS["lycoris"], Checkpoint(state))
    assert a.norm_axis == ("out" if wd_on_out else "in") and a.scaling == layer.scale == 3 / R
    again = encode(FORMATS["lycoris"], [a]).tensors
    assert set(again) == set(state) and all(same_bits(again[key], state[key]) for key in state)


FOLDER = "adapter_model.safetensors"


# --- scaling ---


@given(alpha=st.floats(1e-3, 1e4), rank=st.integers(1, 256))
def test_alpha_of_finds_an_alpha_wherever_one_was(alpha, rank):
    for divisor in (rank, math.sqrt(rank)):
        found = alpha_of(alpha / divisor, divisor)
        assert found is not None and found / divisor == alpha / divisor


@given(alpha=st.integers(1, 1 << 20), rank=st.integers(1, 256))
def test_alpha_of_gives_the_integer_back(alpha, rank):
    found = alpha_of(alpha / rank, rank)
    assert found == alpha and isinstance(found, int)


@given(scaling=st.floats(1e-3, 1e3), rank=st.integers(1, 256))
def test_alpha_of_is_exact_or_nothing(scaling, rank):
    found = alpha_of(scaling, rank)
    assert found is None or found / rank == scaling
    if found is None:
        guess = scaling * rank
        for step in (-math.inf, math.inf):
            near = guess
            for _ in range(20):
                near = math.nextafter(near, step)
                assert near / rank != scaling


@given(alpha=st.floats(2**-10, 1e4, width=32), rank=st.integers(1, 64))
def test_lycoris_alpha_comes_back(alpha, rank):
    a = adapter(scaling=alpha / rank, rank=rank)
    assert decode(FORMATS["lycoris"], encode(FORMATS["lycoris"], [a]))[0].scaling == alpha / rank


def test_lycoris_alpha_of_zero_means_the_rank():
    tensors = dict(encode(FORMATS["lycoris"], [adapter("fc")]).tensors) | {"fc.alpha": torch.tensor(0.0)}
    assert decode(FORMATS["lycoris"], Checkpoint(tensors))[0].scaling == 1


@pytest.mark.parametrize("scaling", [0.25, 8.0, -2.0])
def test_a_power_of_two_folds_exactly(tmp_path, scaling):
    originals = several(torch.bfloat16, scaling)
    path = written(tmp_path, "lycoris", originals)
    convert_checkpoint(path, tmp_path / "there", "lycoris", "fsdp_qlora", no_bias=True)
    for a, b in zip(originals, reread(tmp_path / "there", "fsdp_qlora"), strict=True):
        assert b.scaling == 1 and torch.equal(b.lora_B.double(), a.lora_B.double() * scaling)


def test_fold_rounds_once(tmp_path):
    originals = several(torch.bfloat16, 16 / 12)
    path = written(tmp_path, "lycoris", [replace(a, scaling=1.5) for a in originals])
    convert_checkpoint(path, tmp_path / "there", "lycoris", "fsdp_qlora", no_bias=True, fold=True)
    for a, b in zip(originals, reread(tmp_path / "there", "fsdp_qlora"), strict=True):
        assert torch.equal(b.lora_B, (a.lora_B.double() * 1.5).bfloat16())


def test_fold_is_left_alone_where_scaling_fits(tmp_path):
    originals = several()
    convert_checkpoint(written(tmp_path, "lycoris", originals), tmp_path / "there", "lycoris", "peft", fold=True)
    assert_same(reread(tmp_path / "there", "peft"), originals)


# --- the command, and what it takes ---


def test_the_command_converts_and_says_what(tmp_path, capsys):
    path = written(tmp_path, "peft", several(torch.bfloat16))
    arguments = [str(path), str(tmp_path / "out.safetensors"), "--from", "peft", "--to", "lycoris"]
    rename = ["--rename", r"^layers\.", "lora_unet_", "--rename", r"\.", "_"]
    assert main(["convert", *arguments, *rename]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["4", "6", "10", "4", "2", "bfloat16", "float32"]
    assert lines[-1] == f"peft to lycoris: 4 layers in {tmp_path / 'out.safetensors'}"
    assert "lora_unet_10_mlp_w1.dora_scale" in load_file(tmp_path / "out.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["as-peft", "out.safetensors"]


def test_the_command_names_every_format(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert ", ".join(FORMATS) in " ".join(capsys.readouterr().out.split())


def test_without_safetensors_the_command_says_so():
    code = "import sys; sys.modules['safetensors'] = None\nfrom dora_kernels.cli import main\n"
    code += "sys.exit(main(['convert', 'a', 'b', '--from', 'peft', '--to', 'lycoris']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2 and "dora-kernels[convert]" in result.stderr


def test_torch_files_are_read(tmp_path):
    originals = several()
    for name, file in (("torchtune", "adapter_model.pt"), ("nvlabs", "adapter_model.bin")):
        folder = written(tmp_path, name, originals)
        torch.save(load_file(folder / FOLDER), folder / file)
        if name == "nvlabs":
            (folder / FOLDER).unlink()
        else:  # torchtune writes PEFT's names beside its own
            save_file({"x.lora_A.weight": torch.ones(1)}, folder / FOLDER)
        assert_same(reread(folder, name), originals)
        assert_same(reread(folder / file, name), originals)


def test_alpha_is_taken_where_the_source_has_none(tmp_path):
    a = adapter()
    for name in ("torchtune", "automodel", "megatron-bridge", "dora_kernels", "lycoris"):
        tensors = {key: t for key, t in encode(FORMATS[name], [a]).tensors.items() if not key.endswith("alpha")}
        save_file(dict(tensors), tmp_path / f"{name}.safetensors")
        assert_same(reread(tmp_path / f"{name}.safetensors", name, alpha=8.0), [a])
        with pytest.raises(ValueError, match="--alpha"):
            reread(tmp_path / f"{name}.safetensors", name)


def test_a_model_without_biases_is_looked_at(tmp_path):
    path = written(tmp_path, "peft", [adapter("model.fc")])
    (tmp_path / "base").mkdir()
    save_file({"model.fc.weight": torch.ones(1), "other.bias": torch.ones(1)}, tmp_path / "base" / "1.safetensors")
    convert_checkpoint(path, tmp_path / "a", "peft", "torchtune", base=tmp_path / "base")
    # by the target's names too
    save_file({"fc.weight": torch.ones(1)}, tmp_path / "fc.safetensors")
    rename = [("^model.", "")]
    convert_checkpoint(path, tmp_path / "b", "peft", "torchtune", base=tmp_path / "fc.safetensors", rename=rename)


# --- refusals ---


def refuses(tmp_path, capsys, expected, path, source, target, *options):
    before = sorted(tmp_path.rglob("*"))
    arguments = [str(path), str(tmp_path / "out"), "--from", source, "--to", target, *map(str, options)]
    assert main(["convert", *arguments]) == 2
    message = capsys.readouterr().err
    for part in [expected] if isinstance(expected, str) else expected:
        assert part in message, message
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


@pytest.mark.parametrize("target", [name for name in FORMATS if name not in ("peft", "lycoris")])
def test_refuses_convolutions_elsewhere(tmp_path, capsys, target):
    path = written(tmp_path, "peft", [adapter("conv", kernel=(3, 3))])
    refuses(tmp_path, capsys, ("conv", "dimensions"), path, "peft", target, "--no-bias")


@pytest.mark.parametrize("target", [name for name in FORMATS if name != "lycoris"])
def test_refuses_a_norm_over_columns_elsewhere(tmp_path, capsys, target):
    path = written(tmp_path, "lycoris", [adapter("fc", axis="in")])
    refuses(tmp_path, capsys, ("fc", "wd_on_out"), path, "lycoris", target, "--no-bias")


@pytest.mark.parametrize("source, target", PAIRS)
def test_refuses_a_bias_it_cannot_know(tmp_path, capsys, source, target):
    scaled = {"torchtune", "fsdp_qlora"}
    if (source in scaled) == (target in scaled):
        pytest.skip("the same bias in both")
    path = written(tmp_path, source, [adapter("fc", 1.0)])
    refuses(tmp_path, capsys, ("bias", "--no-bias", "--base"), path, source, target)
    save_file({"fc.weight": torch.ones(1), "fc.bias": torch.ones(1)}, tmp_path / "base.safetensors")
    refuses(tmp_path, capsys, "fc has a bias", path, source, target, "--base", tmp_path / "base.safetensors")
    save_file({"gc.weight": torch.ones(1)}, tmp_path / "else.safetensors")
    refuses(tmp_path, capsys, "has no fc.weight", path, source, target, "--base", tmp_path / "else.safetensors")


@pytest.mark.parametrize("target", ["torchtune", "nvlabs", "llava", "megatron-bridge", "automodel"])
def test_refuses_two_scalings_where_there_is_one(tmp_path, capsys, target):
    path = written(tmp_path, "peft", [adapter("a"), adapter("b", 0.5)])
    refuses(tmp_path, capsys, ("b has rank", "0.5"), path, "peft", target, "--no-bias")
    path = written(tmp_path, "lycoris", [adapter("a"), adapter("b", rank=8)])
    refuses(tmp_path, capsys, "b has rank 8", path, "lycoris", target, "--no-bias", "--fold")


def test_refuses_layers_of_which_one_alone_is_rslora(tmp_path, capsys):
    originals = [adapter("a", 16 / math.sqrt(5), rank=5), adapter("b", 8 / 10, rank=10)]
    assert alpha_of(originals[0].scaling, 5) is None and alpha_of(originals[1].scaling, math.sqrt(10)) is None
    a, b = (
        written(tmp_path, "peft", [original])
        and load(FORMATS["peft"], (tmp_path / "as-peft").rename(tmp_path / original.module))
        for original in originals
    )
    assert (a.config["use_rslora"], b.config["use_rslora"]) == (True, False)
    with pytest.raises(ValueError, match="a: no lora_alpha makes lora_alpha / 5 exactly"):
        encode(FORMATS["peft"], originals)


def test_refuses_a_scaling_that_has_no_alpha(tmp_path, capsys):
    root = 16 / math.sqrt(8)  # exact as alpha / 8 in float64, and in no float32
    path = written(tmp_path, "peft", [adapter("a", root, rank=8)])
    refuses(tmp_path, capsys, ("a: no float32 alpha", "--fold"), path, "peft", "lycoris")
    convert_checkpoint(path, tmp_path / "folded", "peft", "lycoris", fold=True)
    assert reread(tmp_path / "folded", "lycoris")[0].scaling == 1
    path = written(tmp_path, "torchtune", [adapter("a", 1.5)])
    refuses(tmp_path, capsys, ("a: scaling 1.5", "--fold"), path, "torchtune", "fsdp_qlora")


def test_refuses_a_fold_that_leaves_the_range(tmp_path, capsys):
    tiny = replace(adapter("a", 2.0**-10, torch.float16), lora_B=torch.full((N, R), 2.0**-15 * 1.5).half())
    path = written(tmp_path, "torchtune", [tiny, adapter("b", 2.0**-10, torch.float16)])
    refuses(tmp_path, capsys, "a: scaling", path, "torchtune", "fsdp_qlora")
    huge = replace(adapter("a", 4.0, torch.float16), lora_B=torch.full((N, R), 3e4).half())
    save(FORMATS["torchtune"], encode(FORMATS["torchtune"], [huge]), tmp_path / "huge")
    refuses(tmp_path, capsys, "overflows", tmp_path / "huge", "torchtune", "fsdp_qlora", "--fold")


def test_refuses_torchtunes_rows_without_a_word(tmp_path, capsys):
    path = written(tmp_path, "peft", [adapter("layers.0.q_proj")])
    for options, expected in (
        ((), ("q_proj", "--heads", "--same-rows")),
        (("--heads", 2, 1), "6 rows but 2 heads"),
        (("--heads", 0, 1), "0 heads"),
        (("--heads", 1, 1, "--same-rows"), "expected one of them"),
    ):
        refuses(tmp_path, capsys, expected, path, "peft", "torchtune", "--no-bias", *options)
    convert_checkpoint(path, tmp_path / "same", "peft", "torchtune", no_bias=True, same_rows=True)
    assert_same(reread(tmp_path / "same", "torchtune"), reread(path, "peft"))
    convert_checkpoint(path, tmp_path / "ours", "peft", "dora_kernels")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda t, row: t | {"extra.thing": torch.ones(1)}, ("extra.thing", "is no key of")),
        (lambda t, row: t | {f"{row.prefix}a.weight": torch.ones(1)}, ("a.weight", "is no key of")),
        (lambda t, row: {k: v for k, v in t.items() if v.numel() != N}, ("has no magnitude", "plain LoRA")),
        (lambda t, row: {k: v for k, v in t.items() if v.shape != (N, R)}, "has no lora_B"),
        (lambda t, row: {k: v for k, v in t.items() if v.shape != (R, K)}, "has no lora_A"),
        (lambda t, row: {k: v[:-1] if v.numel() == N else v for k, v in t.items()}, "has shape"),
        (lambda t, row: {k: v[:, :-1] if v.shape == (N, R) else v for k, v in t.items()}, "lora_B (6, 3)"),
        (lambda t, row: {k: v.char() if v.shape == (R, K) else v for k, v in t.items()}, "torch.int8"),
        (lambda t, row: {}, "no tensors"),
    ],
    ids=("unknown", "base weight", "plain", "no B", "no A", "magnitude", "rank", "dtype", "empty"),
)
def test_refuses_what_is_no_adapter(tmp_path, capsys, name, change, expected):
    row = FORMATS[name]
    checkpoint = encode(row, [adapter("a", 1.0)])
    save(row, replace(checkpoint, tensors=change(dict(checkpoint.tensors), row)), tmp_path / "broken")
    refuses(tmp_path, capsys, expected, tmp_path / "broken", name, "lycoris", "--no-bias")


@pytest.mark.parametrize(
    "name, key, expected",
    [
        ("peft", "base_model.model.a.lora_embedding_A", "embedding"),
        ("peft", "base_model.model.a.lora_B.bias", "lora_bias"),
        ("lycoris", "a.lora_mid.weight", "Tucker"),
        ("llava", "base_model.model.b.lora_A.other.weight", "expected one"),
    ],
)
def test_refuses_parts_without_counterpart(tmp_path, capsys, name, key, expected):
    checkpoint = encode(FORMATS[name], [adapter("a")])
    tensors = dict(checkpoint.tensors) | {key: torch.ones(2, 2)}
    save(FORMATS[name], replace(checkpoint, tensors=tensors), tmp_path / "source")
    refuses(tmp_path, capsys, expected, tmp_path / "source", name, "dora_kernels")


@pytest.mark.parametrize(
    "name, field, value, expected",
    [
        ("peft", "use_dora", False, "use_dora"),
        ("peft", "use_dora", None, "use_dora"),  # as torchtune writes it
        ("peft", "peft_type", "LOHA", "LOHA"),
        ("peft", "bias", "all", "bias"),
        ("peft", "lora_bias", True, "lora_bias"),
        ("peft", "init_lora_weights", "pissa", "pissa"),
        ("peft", "modules_to_save", ["head"], "modules_to_save"),
        ("peft", "layer_replication", [[0, 2]], "layer_replication"),
        ("peft", "something_new", 3, "something_new"),
        ("peft", "rank_pattern", {"a": 3}, "rank 4 but"),
        ("peft", "lora_alpha", "8", "expected a number"),
        ("torchtune", "use_rslora", True, "use_rslora"),
        ("torchtune", "alpha_pattern", {"a": 3}, "alpha_pattern"),
        ("torchtune", "use_dora", False, "use_dora"),
        ("torchtune", "r", 3, "rank 4 but"),
        ("nvlabs", "peft_type", "LORA", "expected DORA"),
        ("nvlabs", "fan_in_fan_out", True, "fan_in_fan_out"),
        ("nvlabs", "Wdecompose_target_modules", ["b"], "Wdecompose_target_modules"),
    ],
)
def test_refuses_settings_without_counterpart(tmp_path, capsys, name, field, value, expected):
    path = written(tmp_path, name, [adapter("a")])
    config = json.loads((path / "adapter_config.json").read_text()) | {field: value}
    (path / "adapter_config.json").write_text(json.dumps(config))
    refuses(tmp_path, capsys, expected, path, name, "dora_kernels", "--no-bias")


def test_refuses_paths_and_options_that_cannot_be(tmp_path, capsys):
    path = written(tmp_path, "lycoris", [adapter("a"), adapter("b")])
    refuse = lambda expected, *rest: refuses(tmp_path, capsys, expected, *rest)  # noqa: E731
    refuse("does not exist", tmp_path / "none", "lycoris", "peft")
    refuse("'lora'", path, "lora", "peft")
    refuse("expected no --alpha", path, "lycoris", "peft", "--alpha", 3)
    refuse("a name that another module has", path, "lycoris", "peft", "--rename", "[ab]", "c")
    refuse("no name", path, "lycoris", "peft", "--rename", "a", "")
    refuse("expected what re.sub takes", path, "lycoris", "peft", "--rename", "(", "c")
    refuse("without dots", path, "lycoris", "llava", "--adapter-name", "a.b")
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage")
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    (tmp_path / "folder").mkdir()
    refuse("cannot be read", tmp_path / "garbage.safetensors", "lycoris", "peft")
    refuse("cannot be read", tmp_path / "garbage.pt", "lycoris", "peft")
    refuse("holds none of", tmp_path / "folder", "peft", "lycoris")
    torch.save({"a": 3}, tmp_path / "numbers.pt")
    refuse("expected a state dict", tmp_path / "numbers.pt", "torchtune", "lycoris")
    refuse(
        "scaling is always 1",
        written(tmp_path, "fsdp_qlora", [adapter("a", 1.0)]),
        "fsdp_qlora",
        "torchtune",
        "--alpha",
        3,
    )
    (tmp_path / "out").mkdir()
    refuse("out exists", path, "lycoris", "peft")
    assert main(["convert", str(path), str(tmp_path / "no" / "where"), "--from", "lycoris", "--to", "peft"]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, capsys):
    from dora_kernels.convert import files

    path = written(tmp_path, "lycoris", [adapter("a")])

    def full(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "save_file", full)
    refuses(tmp_path, capsys, "no space left", path, "lycoris", "peft")
