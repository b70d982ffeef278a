"""Single files of image models: the names that are read, where alpha is, and what is refused by its kind."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dora_kernels.cli import main
from dora_kernels.extras.convert import FORMATS, convert_checkpoint, decode, encode, read_adapters
from tests.support.convert_problem import K, N, adapter, assert_same, reread, several, written

DOWN_UP = [
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
]
VECTORS = [
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
    "lora_magnitude_vector.default",
    "lora_magnitude_vector.default.weight",
]


def file(path, adapters, names, magnitude, *, alpha=(), header=None, prefix=""):
    """A safetensors file of these keys."""
    tensors = {}
    for a in adapters:
        stem = f"{prefix}{a.module}."
        tensors |= {stem + names[0]: a.lora_A, stem + names[1]: a.lora_B}
        if a.magnitude is not None:
            shape = (-1,) if a.ndim == 2 else (1, -1, *(1,) * (a.ndim - 2))
            if magnitude == "dora_scale":
                shape = (-1, *(1,) * (a.ndim - 1)) if a.norm_axis == "out" else (1, -1, *(1,) * (a.ndim - 2))
            tensors[stem + magnitude] = a.magnitude.reshape(shape)
        if a.module in alpha:
            tensors[stem + "alpha"] = torch.tensor(a.scaling * a.R)
    save_file(tensors, path, header)
    return path


# --- names ---


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "transformer.", "unet.", "text_encoder_2."])
@pytest.mark.parametrize("names", [names for names in DOWN_UP if names[0] != "lora_down.weight"])
@pytest.mark.parametrize("magnitude", VECTORS)
def test_peft_in_one_file(tmp_path, prefix, names, magnitude):
    originals = [adapter("fc", 1.0), adapter("mlp.fc", 1.0, rank=2, seed=1), adapter("mlp.conv", 1.0, kernel=(3, 3))]
    path = file(tmp_path / "file.safetensors", originals, names, magnitude, prefix=prefix)
    kept = "" if prefix == "base_model.model." else prefix  # a model of a pipeline's is a part of its modules' names
    expected = sorted((replace(a, module=kept + a.module) for a in originals), key=lambda a: a.module)
    assert_same(reread(path, "diffusers"), expected)
    if names[0].startswith("lora_A"):
        assert_same(reread(path, "peft", alpha=4.0), [replace(a, scaling=4.0 / a.R) for a in expected])


@pytest.mark.parametrize("names", DOWN_UP)
@pytest.mark.parametrize("axis", ["out", "in"])
def test_dora_scale_by_all_names(tmp_path, names, axis):
    originals = [
        adapter("lora_te1_fc", 0.5, torch.float16, axis=axis),
        adapter("lora_te2_fc", 2.0, torch.bfloat16, rank=3, axis=axis),
        replace(adapter("lora_unet_a", 0.25), magnitude=None),
        adapter("lora_unet_conv", 1.5, kernel=(3, 3), axis=axis, rank=2),
    ]
    path = file(tmp_path / "file", originals, names, "dora_scale", alpha=[a.module for a in originals])
    found, adapters = read_adapters(path)
    assert found == "lycoris"
    assert_same_but_plain(adapters, originals)
    if axis == "in":
        assert_same_but_plain(read_adapters(path, "comfy")[1], originals)


def assert_same_but_plain(ours, theirs):
    assert len(ours) == len(theirs) and all(a.same(b) for a, b in zip(ours, theirs, strict=True))


def test_ai_toolkits_names(tmp_path):
    originals = [adapter("transformer.a", 1.0, torch.bfloat16), adapter("transformer.b", 1.0, rank=3)]
    originals[0] = replace(originals[0], magnitude=originals[0].magnitude.bfloat16())
    plain = replace(adapter("transformer.c", 1.0), magnitude=None)
    path = file(tmp_path / "file", [*originals, plain], DOWN_UP[0], "magnitude")
    found, adapters = read_adapters(path)
    assert found == "ai-toolkit"
    assert_same_but_plain(adapters, [*originals, plain])
    convert_checkpoint(path, tmp_path / "out", None, "lycoris")
    assert_same_but_plain(reread(tmp_path / "out", "lycoris"), [*originals, plain])


def test_ai_toolkits_names_for_stable_diffusion_need_the_rank_as_alpha(tmp_path):
    """With another alpha its layer is y = W x + s B A x + (gain - 1)(W + B A) x, which is no DoRA."""
    path = file(tmp_path / "file", [adapter("lora_unet_a", 1.0)], DOWN_UP[2], "magnitude")
    with pytest.raises(ValueError, match="lora_unet_a.lora_down.weight: ai-toolkit trains with any alpha .*--alpha"):
        read_adapters(path)
    with pytest.raises(ValueError, match=r"alpha is 8.0; expected \[4\], the rank"):
        read_adapters(path, alpha=8.0)
    assert_same(read_adapters(path, alpha=4)[1], [adapter("lora_unet_a", 1.0)])


@pytest.mark.parametrize("names", [DOWN_UP[0], DOWN_UP[2]])
def test_one_part_by_two_names(tmp_path, names):
    path = file(tmp_path / "a", [adapter("a")], names, "dora_scale", alpha="a")
    more = {"a.lora_down.weight": torch.ones(4, K), "a.lora_A.weight": torch.ones(4, K)}
    save_file(load_file(path) | more, tmp_path / "b")
    with pytest.raises(ValueError, match=r"a\.lora_down\.weight: a has a lora_A of another name too"):
        read_adapters(tmp_path / "b", "lycoris")


# --- alpha ---


def metadata(adapters, prefix=""):
    config = {"peft_type": "LORA", "use_dora": True, "r": 4, "lora_alpha": 6, "bias": "none", "lora_dropout": 0.0}
    config |= {"rank_pattern": {a.module.removeprefix(prefix): a.R for a in adapters}, "target_modules": ["fc"]}
    config["alpha_pattern"] = {a.module.removeprefix(prefix): a.scaling * a.R for a in adapters}
    return {prefix + key: value for key, value in config.items()}


def test_alpha_in_diffusers_header(tmp_path):
    originals = [adapter("fc", 1.5), adapter("mlp.gc", 3.0, rank=2)]
    path = file(
        tmp_path / "one",
        originals,
        DOWN_UP[0],
        VECTORS[0],
        header={"lora_adapter_metadata": json.dumps(metadata(originals))},
    )
    assert read_adapters(path)[0] == "diffusers"
    assert_same(read_adapters(path)[1], originals)
    parts = {part: [replace(a, module=f"{part}.{a.module}") for a in originals] for part in ("text_encoder", "unet")}
    parts["unet"] = [adapter(a.module, a.scaling / 4, rank=a.R, seed=5) for a in parts["unet"]]
    fields = {key: value for part, of in parts.items() for key, value in metadata(of, f"{part}.").items()}
    everything = [a for of in parts.values() for a in of]
    header = {"lora_adapter_metadata": json.dumps(fields)}
    path = file(tmp_path / "two", everything, DOWN_UP[0], VECTORS[1], header=header)
    assert_same(read_adapters(path)[1], everything)
    with pytest.raises(ValueError, match="lora_alpha is 6 in the source but --alpha is 3"):
        read_adapters(path, alpha=3)
    header = {"lora_adapter_metadata": json.dumps(metadata(parts["unet"], "unet."))}
    path = file(tmp_path / "three", everything, DOWN_UP[0], VECTORS[1], header=header)
    with pytest.raises(ValueError, match="metadata has no word of text_encoder.fc; expected a config for it"):
        read_adapters(path)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"use_dora": False}, "use_dora is False in the header's lora_adapter_metadata; expected true"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights.*'pissa' in the header's"),
        ({"r": "4"}, "r is '4'; expected an integer"),
        ({"rank_pattern": {"fc": 3}}, "fc: lora_A has rank 4 but the header's lora_adapter_metadata says 3"),
        ({"unet.r": 4}, r"has fields of \['', 'unet.'\]; expected those of one kind"),
    ],
)
def test_a_header_that_says_something_else(tmp_path, change, expected):
    header = {"lora_adapter_metadata": json.dumps(metadata([adapter("fc")]) | change)}
    path = file(tmp_path / "file", [adapter("fc")], DOWN_UP[0], VECTORS[0], header=header)
    with pytest.raises(ValueError, match=expected):
        read_adapters(path)


def test_a_header_that_is_no_json(tmp_path):
    for text, expected in (("{", "expected JSON"), ("[]", "expected a JSON object"), ("[" * 10**6, "expected JSON")):
        header = {"lora_adapter_metadata": text}
        path = file(tmp_path / "file", [adapter("fc")], DOWN_UP[0], VECTORS[0], header=header)
        with pytest.raises(ValueError, match=expected):
            read_adapters(path)
    header = {"lora_adapter_metadata": " " * (17 << 20)}
    path = file(tmp_path / "file", [adapter("fc")], DOWN_UP[0], VECTORS[0], header=header)
    with pytest.raises(ValueError, match="letters; expected at most"):
        read_adapters(path)


def test_alpha_in_tensors_beside_diffusers_names(tmp_path):
    originals = [adapter("unet.fc", 1.5), adapter("unet.gc", 3.0, rank=2)]
    path = file(tmp_path / "all", originals, DOWN_UP[0], VECTORS[0], alpha=("unet.fc", "unet.gc"))
    assert_same(read_adapters(path)[1], originals)
    path = file(tmp_path / "one", originals, DOWN_UP[0], VECTORS[0], alpha=("unet.fc",))
    with pytest.raises(ValueError, match="unet.gc has no alpha but others have"):
        read_adapters(path)
    header = {"lora_adapter_metadata": json.dumps(metadata(originals, "unet."))}
    path = file(tmp_path / "two", originals, DOWN_UP[0], VECTORS[0], alpha=("unet.fc", "unet.gc"), header=header)
    assert_same(read_adapters(path)[1], originals)
    header = {"lora_adapter_metadata": json.dumps(metadata([adapter("unet.fc", 2.0), originals[1]], "unet."))}
    path = file(tmp_path / "three", originals, DOWN_UP[0], VECTORS[0], alpha=("unet.fc", "unet.gc"), header=header)
    with pytest.raises(ValueError, match="say different scalings"):
        read_adapters(path)


def test_no_alpha_is_the_rank_where_every_loader_takes_it_so(tmp_path):
    named = [adapter("transformer.fc", 1.0), adapter("transformer.gc", 1.0, rank=2)]
    path = file(tmp_path / "named", named, DOWN_UP[0], VECTORS[0])
    assert read_adapters(path)[0] == "diffusers"
    assert_same(read_adapters(path)[1], named)
    path = file(tmp_path / "bare", [adapter("fc", 1.0)], DOWN_UP[0], VECTORS[0])
    with pytest.raises(ValueError, match="may be peft, dora_kernels, and states no alpha; .*--from diffusers"):
        read_adapters(path)
    assert_same(read_adapters(path, "diffusers")[1], [adapter("fc", 1.0)])
    assert_same(read_adapters(path, alpha=12)[1], [adapter("fc", 3.0)])
    path = file(tmp_path / "prefixed", [adapter("fc", 1.0)], DOWN_UP[0], VECTORS[0], prefix="base_model.model.")
    with pytest.raises(ValueError, match="may be peft, and states no alpha"):
        read_adapters(path)
    path = file(tmp_path / "kohya", [adapter("lora_unet_fc", 1.0, axis="in")], DOWN_UP[2], "dora_scale")
    with pytest.raises(ValueError, match="may be lycoris, and states no alpha; .* or --from comfy"):
        read_adapters(path)
    assert_same(read_adapters(path, "comfy")[1], [adapter("lora_unet_fc", 1.0, axis="in")])


@pytest.mark.parametrize("prefix, names", [("base_model.model.", DOWN_UP[0]), ("", DOWN_UP[1])])
def test_a_language_models_transformer_is_no_pipelines(tmp_path, prefix, names):
    """GPT-2's and Falcon's modules begin with transformer. too: adapter_model.safetensors without its config."""
    originals = [adapter("transformer.h.0.attn.c_attn"), adapter("transformer.h.0.mlp.c_fc", seed=1)]
    path = file(tmp_path / "adapter_model.safetensors", originals, names, VECTORS[2], prefix=prefix)
    with pytest.raises(ValueError, match="may be peft, and states no alpha"):
        read_adapters(path)
    found, adapters = read_adapters(path, alpha=8)
    assert found == "peft"
    assert_same(adapters, originals)


def test_alphas_in_the_header_of_another_format_are_not_taken_for_the_rank(tmp_path):
    path = written(tmp_path, "dora_kernels", [adapter("transformer.fc", 3.0)])
    with pytest.raises(ValueError, match="the header has dora_alpha, .*expected --from dora_kernels"):
        read_adapters(path, "diffusers")
    assert_same(read_adapters(path)[1], [adapter("transformer.fc", 3.0)])


def test_alpha_of_zero_is_refused_where_readers_differ(tmp_path):
    path = written(tmp_path, "comfy", [adapter("a", axis="in")])
    save_file(load_file(path) | {"a.alpha": torch.tensor(0)}, path)
    with pytest.raises(ValueError, match="a.alpha is 0, which is a scaling of 0 to ComfyUI and of 1"):
        read_adapters(path, "comfy")
    assert read_adapters(path, "lycoris")[1][0].scaling == 1


def test_diffusers_header_is_by_model(tmp_path):
    originals = [adapter("text_encoder.fc", 1.5), adapter("transformer.fc", 0.5, rank=2), adapter("transformer.g", 0.5)]
    path = written(tmp_path, "diffusers", originals)
    header = reread_header(path)
    assert header["text_encoder.lora_alpha"] == 6 and header["transformer.rank_pattern"] == {"^g": 4}
    assert {key.partition(".")[0] for key in header} == {"text_encoder", "transformer"}
    assert_same(read_adapters(path)[1], originals)
    with pytest.raises(ValueError, match="a begins with no model of a pipeline, but others with text_encoder"):
        encode(FORMATS["diffusers"], [*originals, adapter("a")])


def reread_header(path):
    with safe_open(path, "pt") as opened:
        return json.loads(opened.metadata()["lora_adapter_metadata"])


# --- refusals ---


@pytest.mark.parametrize("target", [name for name in FORMATS if name not in ("lycoris", "comfy")])
def test_columns_go_nowhere_else(tmp_path, target):
    path = written(tmp_path, "comfy", several(scaling=1.0, axis="in"))
    with pytest.raises(ValueError, match="its norm is over each input column"):
        convert_checkpoint(path, tmp_path / "out", None, target, no_bias=True)


def test_rows_are_another_function_to_comfyui(tmp_path, capsys):
    path = written(tmp_path, "lycoris", several())
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "comfy"]) == 2
    assert (
        "layers.0.mlp has a norm over rows, which ComfyUI takes of the base's weight alone" in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="ComfyUI takes of the base's weight"):
        read_adapters(path, "comfy")
    wide = adapter("a", axis="in")
    one_row = replace(wide, lora_B=wide.lora_B[:1])  # (1, K) is of as many rows as the weight
    with pytest.raises(ValueError, match="which comfy does not know of one row"):
        encode(FORMATS["comfy"], [one_row])
    path = file(tmp_path / "one", [one_row], DOWN_UP[0], "dora_scale", alpha="a")
    with pytest.raises(ValueError, match=r"dora_scale has shape \(1, 10\); expected a layer of more than one row"):
        read_adapters(path, "comfy")
    assert decode(FORMATS["lycoris"], encode(FORMATS["lycoris"], [one_row]))[0].same(one_row)


@pytest.mark.parametrize("name", ["lycoris", None])
def test_rows_that_a_trainer_made_for_comfyui_are_refused(tmp_path, name):
    """m n(W) / n(W + s B A) and not m, which is for LyCORIS to read: no conversion without the base keeps it."""
    for key, value in (("ss_dora_format", "comfyui"), ("ss_dora_scale_format", "comfy_weight_norm")):
        rows, columns = (adapter("lora_unet_a", axis=axis) for axis in ("out", "in"))
        path = file(tmp_path / "a", [rows], DOWN_UP[2], "dora_scale", alpha=["lora_unet_a"], header={key: value})
        with pytest.raises(ValueError, match=f"lora_unet_a has a norm over rows, and by the header's {key} that of"):
            read_adapters(path, name)
        path = file(tmp_path / "b", [columns], DOWN_UP[2], "dora_scale", alpha=["lora_unet_a"], header={key: value})
        assert_same(read_adapters(path, name)[1], [columns])


def test_rows_without_alpha_are_asked_for_by_format(tmp_path):
    """A file for ComfyUI with alpha in lora_B, whose rows may be over the norm of the base's weight."""
    path = file(tmp_path / "file", [adapter("diffusion_model.a", 1.0)], DOWN_UP[0], "dora_scale")
    for alpha in (None, 4):
        with pytest.raises(ValueError, match="expected --alpha" if alpha is None else "no alpha, .* --from lycoris"):
            read_adapters(path, alpha=alpha)
    assert_same(read_adapters(path, "lycoris", alpha=4)[1], [adapter("diffusion_model.a", 1.0)])


KINDS = {
    "hada_w1_a": "LoHa",
    "hada_t2": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w2_b": "LoKr",
    "oft_blocks": "OFT",
    "oft_R.weight": "OFT",
    "boft_R": "OFT",
    "a1.weight": "GLoRA",
    "on_input": "IA3",
    "lora_mid.weight": "Tucker",
    "diff": "whole weight",
    "set_weight": "whole weight",
    "diff_b": "bias or norm",
    "w_norm": "bias or norm",
    "b_norm": "bias or norm",
    "reshape_weight": "another shape",
    "bias_indices": "trained bias",
    "scalar": "factor beside alpha",
    "lora_embedding_A": "embedding",
    "lora_embedding_B.default": "embedding",
    "lora_B.bias": "lora_bias",
    "lora_up.bias": "lora_bias",
    "base_layer.weight": "adapter's part alone",
    "modules_to_save.default.weight": "saved whole",
}


@pytest.mark.parametrize("name", ["peft", "lycoris", "comfy", "diffusers", "ai-toolkit"])
@pytest.mark.parametrize("key", KINDS)
def test_other_kinds_are_refused_by_what_they_are(tmp_path, name, key):
    axis = "in" if name == "comfy" else "out"
    tensors = dict(encode(FORMATS[name], [adapter("transformer.fc", 1.0, axis=axis)]).tensors)
    other = f"{FORMATS[name].prefix}transformer.gc.{key}"
    save_file(tensors | {other: torch.ones(N)}, tmp_path / "file")
    with pytest.raises(ValueError, match=rf"{other}: .*{KINDS[key]}"):
        read_adapters(tmp_path / "file", name)
    with pytest.raises(ValueError, match=rf"which is nearest: {other}: .*{KINDS[key]}"):
        read_adapters(tmp_path / "file")


def test_a_magnitude_without_a_shape_is_not_guessed(tmp_path):
    """As diffusers' convert_state_dict_to_kohya writes it, of one axis: https://github.com/Comfy-Org/ComfyUI/issues/12938."""
    path = written(tmp_path, "lycoris", [adapter("a")])
    tensors = load_file(path)
    save_file(tensors | {"a.dora_scale": tensors["a.dora_scale"].flatten()}, path)
    with pytest.raises(ValueError, match=r"dora_scale has shape \(6,\); expected \(6, 1\) or \(1, 10\)"):
        read_adapters(path, "lycoris")
