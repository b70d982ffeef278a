"""Each layer finds its own tensor, and what cannot be merged right is refused by name, before anything is written."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from dora_kernels.extras.convert import FORMATS
from dora_kernels.extras.convert.files import load
from dora_kernels.extras.merging import merge_checkpoint, output
from dora_kernels.extras.merging.matching import match
from tests.support.merge_problem import (
    INDEX,
    adapter_of,
    exact_merge,
    merge_arguments,
    random,
    tensors_of,
    write_adapter,
    write_base,
)

TEXT = "model.language_model"
LAYERS = ["layers.0.q_proj", "layers.0.up_proj", "layers.1.q_proj", "layers.10.q_proj"]


def weights(*names):
    return [f"{name}.weight" for name in names]


@pytest.mark.parametrize(
    "modules, names",
    [
        (LAYERS, LAYERS),
        (LAYERS, [f"model.{name}" for name in LAYERS]),
        (LAYERS, [f"a.b.{name}" for name in LAYERS]),
        ([f"model.{name}" for name in LAYERS], LAYERS),
        ([f"a.b.{name}" for name in LAYERS], LAYERS),
        (["q_proj"], ["layers.q_proj"]),
        (
            ["model.language_model.layers.0.fc", "lm_head"],
            ["language_model.model.layers.0.fc", "language_model.lm_head"],
        ),
        (
            ["model.language_model.layers.0.fc", "model.visual.fc", "lm_head"],
            ["model.layers.0.fc", "visual.fc", "lm_head"],
        ),
        (["model.vision_model.fc", f"{TEXT}.layers.0.a"], ["vision_model.fc", "language_model.model.layers.0.a"]),
        (["model.vision_tower.fc", "model.multi_modal_projector.a"], ["vision_tower.fc", "multi_modal_projector.a"]),
        (["lora_unet_down_blocks_0_to_q"], ["down_blocks.0.to_q"]),
        (["lycoris_proj_out", "lycoris_transformer_blocks_0_q"], ["proj_out", "transformer_blocks.0.q"]),
        (["lora_te1_text_model_fc_1"], ["text_model.fc_1"]),
        (
            ["lora_unet_mid_fc1", "lora_unet_mid_fc2"],
            ["model.diffusion_model.mid.fc1", "model.diffusion_model.mid.fc2"],
        ),
        (["lycoris_blocks_0_q"], ["blocks.0.q"]),
        (["lora_transformer_a_b", "lora_transformer_a_c"], ["a_b", "a.c"]),
    ],
)
def test_names_that_are_told(modules, names):
    others = [
        "other.weight",
        "model.norm.weight",
        f"{names[0]}.bias",
        f"{names[0]}_extra.weight",
        "vision.layers.7.weight",
    ]
    assert match(modules, [*others, *weights(*names)]) == dict(zip(modules, weights(*names), strict=True))
    assert match(modules[::-1], [*weights(*names), *others]) == dict(zip(modules, weights(*names), strict=True))


@pytest.mark.parametrize(
    "modules, names, text",
    [
        (LAYERS, LAYERS[1:], "layers.0.q_proj matches no weight of the base, and the nearest is layers.1"),
        (
            LAYERS,
            [f"model.{name}" for name in LAYERS[:-1]],
            "matches no weight of the base, and the nearest is model.la",
        ),
        (
            LAYERS,
            [f"{tower}.{name}" for tower in "ab" for name in LAYERS],
            "layers.0.q_proj may be a.*q_proj and b.*q_proj",
        ),
        ([*LAYERS, "pooler.dense"], [f"bert.{name}" for name in LAYERS], "pooler.dense matches no weight of the base"),
        (["layers.0.w1"], LAYERS, "layers.0.w1 matches no weight of the base, and the nearest is layers.0"),
        (
            ["lm_head"],
            ["model.embed_tokens"],
            "lm_head matches no weight of the base, or is tied to the embedding there",
        ),
        (
            ["lora_unet_a_b"],
            ["a.b", "a_b"],
            "lora_unet_a_b may be a.b.weight and a_b.weight in the base; expected --rename",
        ),
        (["model.visual.a"], ["visual.a", "model.visual_.a"], None),
        (["a.visual.fc"], ["b.visual.fc"], "matches no weight"),  # another's, whatever follows
        (["a"], [], "a matches no weight of the base; expected"),
        (["language_model.lm_head", "lm_head"], ["lm_head"], "both are lm_head.weight; expected one"),
    ],
)
def test_names_that_are_not(modules, names, text):
    if text is None:
        assert match(modules, weights(*names)) == {modules[0]: f"{names[0]}.weight"}
        return
    with pytest.raises(ValueError, match=f"^merge: .*{text}") as error:
        match(modules, weights(*names))
    assert "\n" not in str(error.value)


def test_names_of_strangers_take_no_time():
    keys = weights(*(f"{i}.a" for i in range(30_000)))
    with pytest.raises(ValueError, match="^merge: x.none.a matches no weight"):
        match([*(f"x.{i}.a" for i in range(12_000)), "x.none.a"], keys)
    with pytest.raises(ValueError, match="^merge: y.0 matches no weight"):
        match(["a", *(f"y.{i}" for i in range(12_000))], keys)


def refused(tmp_path, text, **changed):
    """The merge raises this ValueError in one line, and has written nothing."""
    with pytest.raises(ValueError, match=f"^merge: .*({text})") as error:
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **changed)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.fixture
def unwritten(monkeypatch):
    def write(self, made):
        raise AssertionError("began to write")

    monkeypatch.setattr(output.Writer, "write", write)


LINEAR = random(6, 10, seed=0, dtype=torch.bfloat16)


@pytest.mark.usefixtures("unwritten")
@pytest.mark.parametrize(
    "tensors, config, text",
    [
        (
            {"a.weight": LINEAR},
            {"quantization_config": {"quant_method": "fp8"}},
            "quantized: .* a quantization_config of fp8",
        ),
        ({"a.weight": LINEAR}, {"compression_config": {"format": "x"}}, "quantized: .* has a compression_config"),
        ({"a.weight": LINEAR}, {"text_config": {"quantization_config": {"quant_method": "awq"}}}, "of awq"),
        ({"a.weight": LINEAR, "a.weight_scale": LINEAR[:1]}, {}, "quantized: it has a.weight_scale"),
        ({"a.weight": LINEAR, "a.weight.absmax": LINEAR[:1]}, {}, "quantized: it has a.weight.absmax"),
        ({"a.weight": LINEAR.to(torch.int8), "a.SCB": LINEAR[:1]}, {}, "quantized: it has a.SCB"),
        ({"a.qweight": LINEAR, "a.scales": LINEAR[:1]}, {}, "quantized: it has a.qweight"),
        ({"a.weight": LINEAR.to(torch.int8)}, {}, "a.weight is I8"),
        ({"a.weight": LINEAR.to(torch.float8_e4m3fn)}, {}, "a.weight is F8_E4M3"),
        ({"a.weight": LINEAR.to(torch.int64)}, {}, "a.weight is I64"),
        ({"a.weight": LINEAR.to(torch.complex64)}, {}, "a.weight is C64"),
        ({"a.weight": LINEAR[:5]}, {}, r"a.weight has shape \(5, 10\) but .* lora_B is \(6, 4\) and lora_A \(4, 10\)"),
        ({"a.weight": LINEAR[:, :9]}, {}, r"a.weight has shape \(6, 9\)"),
        ({"a.weight": LINEAR.reshape(2, 3, 10)}, {}, r"a.weight has shape \(2, 3, 10\)"),  # experts in one tensor
        ({"a.weight": LINEAR.reshape(-1)}, {}, r"a.weight has shape \(60,\)"),
        (
            {"a.weight": LINEAR.T.contiguous()},
            {},
            r"a.weight has shape \(10, 6\), that of the adapter's layer transposed",
        ),
        ({"b.weight": LINEAR}, {}, "a matches no weight of the base, and the nearest is b.weight"),
        ({"a.bias": LINEAR}, {}, "a matches no weight of the base"),
    ],
)
def test_bases_that_cannot_be_merged_into(tmp_path, tensors, config, text):
    write_base(tmp_path / "base", {key: tensor.clone() for key, tensor in tensors.items()}, **config)
    write_adapter(tmp_path / "adapter", [adapter_of("a", LINEAR)])
    refused(tmp_path, text)


@pytest.mark.usefixtures("unwritten")
@pytest.mark.parametrize(
    "config, is_refused",
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": None}, True),  # the class' default, and the bytes are equal
        ({"tie_word_embeddings": False}, False),
    ],
)
def test_a_head_that_is_the_embedding(tmp_path, config, is_refused):
    write_base(tmp_path / "base", {"lm_head.weight": LINEAR, "model.embed_tokens.weight": LINEAR.clone()}, **config)
    write_adapter(tmp_path / "adapter", [adapter_of("lm_head", LINEAR)])
    if is_refused:
        refused(tmp_path, "lm_head.weight is the embedding, too, as (tie_word|their equal)")
        return
    with pytest.raises(AssertionError, match="began to write"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_a_head_of_its_own_is_merged_where_nothing_is_stated(tmp_path):
    other = LINEAR.clone()
    other[-1, -1] += 1
    write_base(
        tmp_path / "base",
        {"lm_head.weight": LINEAR, "model.embed_tokens.weight": other, "embed_more.weight": other[:3].clone()},
        tie_word_embeddings=None,
    )
    write_adapter(tmp_path / "adapter", [adapter_of("lm_head", LINEAR)])
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.merged == ("lm_head.weight",) and torch.equal(
        tensors_of(tmp_path / "out")["model.embed_tokens.weight"], other
    )


@pytest.mark.usefixtures("unwritten")
def test_a_bias_that_may_be_multiplied_or_not(tmp_path):
    adapter = adapter_of("a", LINEAR)
    write_base(tmp_path / "base", {"a.weight": LINEAR, "a.bias": LINEAR[:, 0].clone()})
    write_adapter(tmp_path / "adapter", [adapter], "megatron-bridge")
    refused(tmp_path, "a.bias: megatron-bridge's gain multiplies a layer's bias or not")
    shutil.rmtree(tmp_path / "base"), (tmp_path / "adapter").unlink()
    write_base(tmp_path / "base", {"a.weight": LINEAR, "a.bias": LINEAR[0].clone()})
    write_adapter(tmp_path / "adapter", [replace(adapter, scaling=1.0)], "fsdp_qlora")
    refused(tmp_path, r"a.bias is BF16 of shape \(10,\)", source_format="fsdp_qlora")


@pytest.mark.usefixtures("unwritten")
def test_folders_that_are_no_checkpoint(tmp_path):
    base = write_base(tmp_path / "base", {"a.weight": LINEAR}, torch_dtype="x")
    write_adapter(tmp_path / "adapter", [adapter_of("a", LINEAR)])
    good = (base / "model.safetensors").read_bytes()
    (base / INDEX).write_text(json.dumps({"weight_map": {"a.weight": "model.safetensors"}}))
    refused(tmp_path, "base holds model.safetensors and model.safetensors.index.json")
    (base / "model.safetensors").rename(base / "other.safetensors")
    refused(tmp_path, "base/model.safetensors cannot be read: No such file")
    (base / INDEX).write_text(json.dumps({"weight_map": {"a.weight": "other.safetensors", "b": "other.safetensors"}}))
    refused(tmp_path, "other.safetensors has no b")
    (base / INDEX).write_text(json.dumps({"weight_map": {"a.weight": "../adapter"}}))
    refused(tmp_path, "model.safetensors.index.json: weight_map")
    (base / INDEX).unlink()
    (base / "pytorch_model.bin").touch()
    refused(tmp_path, "base holds no model.safetensors and no index of one")
    (base / "snapshots").mkdir()
    refused(tmp_path, "or its index, which a folder in .*base/snapshots has")
    for content in (good[:-1], good + b"1", good[:100], b"", b"\xff" * 50):
        (base / "model.safetensors").write_bytes(content)
        refused(tmp_path, "model.safetensors cannot be read")
    (base / "model.safetensors").unlink()
    os.mkfifo(base / "model.safetensors")
    refused(tmp_path, "model.safetensors is a pipe or a device")
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").write_bytes(good)
    (base / "config.json").write_text("[1]")
    refused(tmp_path, "config.json: it is .*; expected a JSON object")
    (base / "config.json").write_text("{}")
    os.mkfifo(base / "pipe")
    refused(tmp_path, "pipe is a pipe or a device")
    (base / "pipe").unlink()
    (base / "loop").symlink_to(".")
    refused(tmp_path, "loop is a link to a folder")
    (base / "loop").unlink()
    (base / "gone").symlink_to("nowhere")
    refused(tmp_path, "gone cannot be read: No such file")
    (base / "gone").unlink()
    (base / "adapter_config.json").write_text("{}")
    refused(tmp_path, "base is an adapter")
    shutil.rmtree(base)
    refused(tmp_path, "base does not exist")


@pytest.mark.usefixtures("unwritten")
@pytest.mark.parametrize(
    "field, value",
    [("init_lora_weights", "pissa"), ("modules_to_save", ["lm_head"]), ("bias", "all"), ("lora_bias", True)]
    + [("target_parameters", ["mlp.experts.down_proj"]), ("layer_replication", [[0, 1]]), ("use_bdlora", {"a": 1})],
)
def test_adapters_that_change_more_than_their_layers(tmp_path, field, value):
    write_base(tmp_path / "base", {"a.weight": LINEAR})
    write_adapter(tmp_path / "adapter", [adapter_of("a", LINEAR)], "peft")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    refused(tmp_path, field)


@pytest.mark.usefixtures("unwritten")
def test_adapters_that_are_not_finite_or_hold_more(tmp_path):
    write_base(tmp_path / "base", {"a.weight": LINEAR})
    adapter = adapter_of("a", LINEAR)
    adapter.lora_A[1, 2] = float("nan")
    write_adapter(tmp_path / "adapter", [adapter])
    refused(tmp_path, "a.lora_A.weight has 1 of 40 values that are NaN or infinite")
    tensors = tensors_of(write_adapter(tmp_path / "more", [adapter_of("a", LINEAR)], "peft"))
    config = (tmp_path / "more" / "adapter_config.json").read_text()
    (tmp_path / "adapter").unlink()
    for more, text in [
        ("embed.lora_embedding_A", "an embedding's adapter"),
        ("lm_head.weight", "lm_head.weight"),
        ("a.lora_B.bias", "lora_bias"),
    ]:
        shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text(config)
        save_file(tensors | {f"base_model.model.{more}": LINEAR}, tmp_path / "adapter" / "adapter_model.safetensors")
        refused(tmp_path, text)


def test_nan_where_it_is_allowed(tmp_path):
    weight = LINEAR.clone()
    weight[2, 3] = float("nan")
    write_base(tmp_path / "base", {"a.weight": weight})
    adapter = adapter_of("a", LINEAR)
    adapter.lora_B[4, 0] = float("inf")
    write_adapter(tmp_path / "adapter", [adapter])
    with pytest.raises(ValueError, match="NaN or infinite"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    adapter.lora_B[4, 0] = 1
    (tmp_path / "adapter").unlink()
    write_adapter(tmp_path / "adapter", [adapter])
    with pytest.raises(ValueError, match="^merge: a.weight: the norm of row 2 is nan; expected .*--allow-nonfinite"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", allow_nonfinite=True, check=1)
    found = tensors_of(tmp_path / "out")["a.weight"]
    assert found[2].isnan().all() and found[[0, 1, 3, 4, 5]].isfinite().all()


def conv1d(tmp_path, squares, straight=False, **config):
    """GPT-2's layers as PEFT saves their adapter, over a base of this config.json; returns PEFT's merge in float64."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_inner=8 if squares else 24, vocab_size=11))
    targets = ["c_proj"] if squares else ["c_attn", "c_fc", "c_proj"]
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    targets += ["lm_head"] * straight
    model = get_peft_model(model, LoraConfig(r=2, use_dora=True, target_modules=targets, fan_in_fan_out=not straight))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tensors = {name.replace(".base_layer", ""): tensor for name, tensor in model.base_model.model.state_dict().items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if "lora" not in name}
    write_base(tmp_path / "base", tensors, **config)
    merged = model.double().merge_and_unload().state_dict()
    return {name: merged[name] for name in tensors if name.removesuffix(".weight").endswith(tuple(targets))}


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize("model_type", ["gpt2", "of somebody", None])
def test_what_is_stored_with_its_inputs_first_is_told_by_whatever_tells_it(tmp_path, squares, straight, model_type):
    """PEFT writes the fan_in_fan_out of the layer that came last: false where that is GPT-2's lm_head."""
    expected = conv1d(tmp_path, squares, straight, model_type=model_type)
    if straight and model_type != "gpt2":
        # shapes say one thing of c_attn, the adapter another; squares alone would be merged along the wrong side
        if squares:
            pytest.skip("nothing tells, as in PEFT's own file")
        refused(tmp_path, "transposed|square")
        return
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", check=4)
    found = tensors_of(tmp_path / "out")
    assert len(expected) == (2 if squares else 4) + straight
    for name, tensor in expected.items():
        assert (found[name].double() - tensor).norm() < 1e-6 * tensor.norm()


def test_torchtunes_rows_are_put_in_order(tmp_path):
    weight = random(16, 10, seed=0)
    adapter = adapter_of("layers.0.attn.q_proj", weight)
    rows = torch.arange(16).view(2, 2, 4).transpose(1, 2).reshape(-1)  # two heads: halves, and then pairs
    theirs = replace(adapter, lora_B=adapter.lora_B[rows], magnitude=adapter.magnitude[rows])
    write_base(tmp_path / "base", {"model.layers.0.self_attn.q_proj.weight": weight})
    write_adapter(tmp_path / "adapter", [theirs], "torchtune")
    rename = [("attn", "self_attn")]
    refused(tmp_path, "torchtune keeps the rows of q_proj in another order", rename=rename)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rename=rename, heads=(2, 1))
    found = tensors_of(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"]
    exact = exact_merge(weight, adapter)
    assert (found.double() - exact).norm() < 1e-6 * exact.norm()


def test_what_peft_saves_of_the_base_is_found_by_the_new_name(tmp_path):
    weight, bias = random(6, 10, seed=3), random(6, seed=4)
    tensors = {"model.embed.weight": -weight, "model.output.weight": weight, "model.output.bias": bias}
    write_base(tmp_path / "base", tensors)
    file = write_adapter(tmp_path / "adapter", [adapter_of("lm_head", weight)], "peft") / "adapter_model.safetensors"
    saved = load_file(file)
    beneath = {f"base_model.model.lm_head.base_layer.{part}": it for part, it in (("weight", weight), ("bias", bias))}
    rename = [("lm_head", "output")]
    for wrong in ("weight", "bias"):
        key = f"base_model.model.lm_head.base_layer.{wrong}"
        save_file(saved | beneath | {key: beneath[key] + 1e-3}, file)
        refused(tmp_path, f"model.output.{wrong} is saved beside the adapter with other values", rename=rename)
    save_file(saved | {"base_model.model.other.base_layer.weight": weight}, file)
    refused(tmp_path, "other.base_layer.weight is beneath no adapter", rename=rename)
    save_file(saved | beneath, file)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rename=rename)
    assert torch.equal(tensors_of(tmp_path / "out")["model.output.bias"], bias)


def test_any_format_that_convert_reads(tmp_path):
    arguments = merge_arguments(tmp_path)
    weight = tensors_of(arguments["base"])["layers.0.weight"]
    for name in FORMATS:
        axis = "in" if name == "comfy" else "out"
        adapter = replace(adapter_of("layers.0", weight, axis=axis), scaling=1.0)
        exact = exact_merge(weight, adapter)
        write_adapter(tmp_path / name, [adapter], name)
        assert load(FORMATS[name], tmp_path / name)
        settings = {"source_format": name, "same_rows": True}
        merge_checkpoint(arguments["base"], tmp_path / name, tmp_path / f"out-{name}", **settings)
        found = tensors_of(tmp_path / f"out-{name}")["layers.0.weight"]
        assert (found.double() - exact).norm() < 1e-6 * exact.norm()
