"""Kohya's names with underscores, by the names of the model beneath: one or refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dora_kernels.cli import main
from dora_kernels.extras.convert import convert_checkpoint
from dora_kernels.extras.convert.names import dotted
from tests.support.convert_problem import adapter, assert_same, reread, several, written

# of Stable Diffusion XL, as diffusers has it, and of its single file
UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", "down_blocks.1.resnets.0.conv1", "conv_in"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc1"
SINGLE = "model.diffusion_model.input_blocks.4.1.proj_in", "conditioner.embedders.0.transformer.text_model.x"


def model(path, modules):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{module}.{part}": torch.ones(1) for module in modules for part in ("weight", "bias")}, path)
    return path


def flat(prefix, module):
    return f"{prefix}_{module.replace('.', '_')}"


def test_a_pipelines_models(tmp_path):
    base = tmp_path / "base"
    model(base / "unet" / "diffusion_pytorch_model.safetensors", UNET)
    for folder in ("text_encoder", "text_encoder_2"):
        model(base / folder / "model.safetensors", TEXT)
    (base / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    expected = {flat("lora_unet", module): f"unet.{module}" for module in UNET}
    expected |= {flat("lora_te1", module): f"text_encoder.{module}" for module in TEXT}
    expected |= {flat("lora_te2", module): f"text_encoder_2.{module}" for module in TEXT}
    originals = [adapter(name, seed=seed) for seed, name in enumerate(expected)]
    path = written(tmp_path, "lycoris", originals)
    convert_checkpoint(path, tmp_path / "out", "lycoris", "diffusers", base=base)
    dotted = {expected[a.module]: a for a in originals}
    for b in reread(tmp_path / "out", "diffusers"):
        assert torch.equal(b.lora_B, dotted.pop(b.module).lora_B)
    assert not dotted


def test_one_model_and_a_single_file(tmp_path):
    path = written(
        tmp_path, "lycoris", [adapter(flat("lora_unet", UNET[0])), adapter(flat("lycoris", UNET[1]), seed=1)]
    )
    convert_checkpoint(path, tmp_path / "one", None, "peft", base=model(tmp_path / "base" / "a.safetensors", UNET))
    assert [a.module for a in reread(tmp_path / "one", "peft")] == sorted(UNET[:2])
    path.unlink()
    path = written(
        tmp_path, "lycoris", [adapter("lora_unet_input_blocks_4_1_proj_in"), adapter("lora_te1_text_model_x")]
    )
    convert_checkpoint(path, tmp_path / "two", None, "peft", base=model(tmp_path / "single.safetensors", SINGLE))
    assert [a.module for a in reread(tmp_path / "two", "peft")] == sorted(SINGLE)


def test_the_whole_name_comes_before_an_end(tmp_path):
    base = model(tmp_path / "base.safetensors", ("block.0.fc", "deep.block.0.fc"))
    path = written(tmp_path, "lycoris", [adapter("lora_unet_block_0_fc")])
    convert_checkpoint(path, tmp_path / "o", None, "peft", base=base)
    assert reread(tmp_path / "o", "peft")[0].module == "block.0.fc"


FLUX = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q", "proj_out"


@pytest.mark.parametrize("where", ["", "transformer."])
@pytest.mark.parametrize("prefix", ["lycoris", "lora_unet", "lora_transformer"])
def test_a_model_whose_own_names_begin_as_a_prefix_goes_on(tmp_path, where, prefix):
    """SimpleTuner's files of LyCORIS over Flux: lycoris_transformer_blocks_0_attn_to_q."""
    names = [where + module for module in FLUX]
    assert dotted([flat(prefix, module) for module in FLUX], [f"{name}.weight" for name in names]) == names
    others = ["text_encoder.blocks.0.attn.to_q.weight", *(f"{name}.weight" for name in names)]
    assert dotted([flat(prefix, FLUX[0])], others) == names[:1]


def test_a_prefix_says_which_model_of_a_pipeline(tmp_path):
    names = [f"{encoder}.text_model.layers.0.fc" for encoder in ("text_encoder", "text_encoder_2")]
    path = written(tmp_path, "lycoris", [adapter("lora_te1_layers_0_fc"), adapter("lora_te2_layers_0_fc", 0.5)])
    convert_checkpoint(path, tmp_path / "o", None, "peft", base=model(tmp_path / "base.safetensors", names))
    assert [(a.module, a.scaling) for a in reread(tmp_path / "o", "peft")] == [(names[0], 2.0), (names[1], 0.5)]


@pytest.mark.parametrize(
    "modules, expected",
    [
        (("a.b_c", "a_b.c"), "lora_unet_a_b_c may be a.b_c or a_b.c, with underscores for dots"),
        (("x.a.b.c", "y.z.a.b.c"), "lora_unet_a_b_c may be x.a.b.c or y.z.a.b.c"),
        (("a.b.d", "za.b.c"), "lora_unet_a_b_c is none of its modules"),
    ],
)
def test_what_is_not_one_is_refused(tmp_path, capsys, modules, expected):
    path = written(tmp_path, "lycoris", [adapter("lora_unet_a_b_c")])
    base = model(tmp_path / "base.safetensors", modules)
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "peft", "--base", str(base)]) == 2
    assert expected in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "peft"]) == 0  # the name stays


def test_two_names_of_one_module(tmp_path):
    path = written(tmp_path, "lycoris", [adapter("lora_unet_a_b"), adapter("lycoris_a_b")])
    with pytest.raises(ValueError, match="base has a.b for two adapters, one of them lycoris_a_b"):
        convert_checkpoint(path, tmp_path / "o", None, "peft", base=model(tmp_path / "base.safetensors", ["a.b"]))


def test_other_names_are_left_alone(tmp_path):
    path = written(tmp_path, "lycoris", several())
    convert_checkpoint(path, tmp_path / "o", None, "peft", base=model(tmp_path / "base.safetensors", ["a.b"]))
    assert_same(reread(tmp_path / "o", "peft"), several())


def test_biases_are_looked_for_by_the_models_names(tmp_path, capsys):
    path = written(tmp_path, "lycoris", [adapter("lora_unet_a_b")])
    base = model(tmp_path / "base.safetensors", ["a.b"])
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "torchtune", "--base", str(base)]) == 2
    assert "a.b has a bias" in capsys.readouterr().err
