"""After serving.merge_model nothing writes an adapter that says less than was trained."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dora_kernels
from dora_kernels.extras import serving
from tests.support import structure_cases
from tests.support.conformance_checks import randomise

peft = pytest.importorskip("peft")

from peft import (  # noqa: E402
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)

LORA = {"use_dora": True, "r": 2, "target_modules": ["0.0", "0.1"]}
KEY = "base_model.model.0.0.lora_A.weight"


def base(convolution=False):
    torch.manual_seed(0)
    last = nn.Conv1d(4, 4, 1, groups=2) if convolution else nn.Linear(8, 8)
    return nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), last)


def trained(mixed=False, convolution=False, config=None, **more):
    """(an enabled PEFT model, an x, its y)."""
    settings = LORA | {"target_modules": ["0.0", "0.1", *(["1"] if convolution else [])]} | more
    model = get_peft_model(base(convolution), config or LoraConfig(**settings), mixed=mixed)
    randomise(model).eval()
    x = torch.randn(2, 4, 8)
    y = model(x)
    assert dora_kernels.enable(model).left_alone == []
    return model, x, y


def refused(save):
    with pytest.raises(ValueError, match=r"serving.merge_model has put this adapter into .*merge_and_unload"):
        save()


PARTS = {
    "the wrapper": lambda model: model,
    "its tuner": lambda model: model.base_model,
    "its base model": lambda model: model.base_model.model,
    "what holds it": lambda model: nn.ModuleDict({"policy": model}),
}
COPIES = {
    "itself": lambda model: model,
    "a deepcopy": copy.deepcopy,
    "a pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("made", COPIES)
@pytest.mark.parametrize("part", PARTS)
def test_no_adapter_is_saved(part, made, tmp_path):
    model, x, y = trained(modules_to_save=["1"])
    saved = tmp_path / "before"
    model.save_pretrained(saved)
    assert serving.merge_model(PARTS[part](model)) == {}
    model = COPIES[made](model)
    torch.testing.assert_close(model(x), y)
    refused(lambda: model.save_pretrained(tmp_path))
    refused(lambda: model.save_pretrained(tmp_path, state_dict=model.state_dict(), safe_serialization=False))
    refused(lambda: get_peft_model_state_dict(model))
    refused(lambda: get_peft_model_state_dict(model.get_base_model()))
    refused(lambda: model.peft_config["default"].save_pretrained(tmp_path))
    refused(lambda: model.disable_adapter().__enter__())
    refused(lambda: model.load_adapter(saved, "default"))
    refused(lambda: set_peft_model_state_dict(model, load_peft_weights(saved)))
    refused(lambda: model.add_adapter("more", LoraConfig(r=2, target_modules=["0.0"])))
    assert not [*tmp_path.glob("adapter*")]
    assert "LoraConfig" in repr(model.peft_config["default"])

    unloaded = model.merge_and_unload()  # the way that the message names
    plain = base()
    assert unloaded.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(unloaded.state_dict())
    torch.testing.assert_close(plain(x), y)
    again = get_peft_model(
        unloaded, LoraConfig(use_dora=True, r=2, target_modules=["0.0", "0.1"], modules_to_save=["1"])
    )
    again.load_adapter(saved, "default")  # its parts are there again
    assert torch.equal(again.base_model.model[0][0].lora_A["default"].weight, load_peft_weights(saved)[KEY])


def test_unload_returns_the_merged_weights_too():
    model, x, y = trained()
    serving.merge_model(model)
    torch.testing.assert_close(model.unload()(x), y)


@pytest.mark.parametrize("part", (lambda model: model.base_model.model[0], lambda model: beside(model)))
def test_a_part_whose_wrapper_could_not_be_told_is_left(part, tmp_path):
    model, x, y = trained()
    with pytest.raises(ValueError, match=r"0(\.0)? is part of a PEFT model whose peft_config is out of reach"):
        serving.merge_model(part(model))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path).eval()(x), y)


def beside(model):
    """A bare part of `model` beside another model that has its configs."""
    other, _, _ = trained()
    return nn.ModuleList([other, model.base_model.model[0]])


def test_a_state_dict_of_the_merged_model_and_of_other_layers_can_be_loaded():
    model, x, y = trained(convolution=True)
    serving.merge_model(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    nn.init.zeros_(model.base_model.model[0][0].weight)
    model.load_state_dict(state)
    torch.testing.assert_close(model(x), y)
    left = {name: value for name, value in state.items() if "lora_" in name}
    assert left
    model.load_state_dict(left, strict=False)


class Fork(nn.Module):
    """As the wrappers in NVlabs/DoRA: one config or a dict, whose bias saving asks for first."""

    def __init__(self, model, by_name):
        super().__init__()
        self.base_model = model
        config = SimpleNamespace(bias="none", r=4)
        self.peft_config = {"default": config} if by_name else config

    def config(self):
        return self.peft_config["default"] if isinstance(self.peft_config, dict) else self.peft_config

    def state_to_save(self):
        bias = self.config().bias
        return {name: value for name, value in self.state_dict().items() if "lora_" in name or bias in name}


@pytest.mark.parametrize("made", COPIES)
@pytest.mark.parametrize("name", ("llm", "llm, magnitude alone", "vl-t5", "llava"))
def test_the_forks_of_nvlabs(name, made):
    layer, x = structure_cases.CASES[name].make(0, torch.float32)
    model = Fork(nn.Sequential(layer), by_name=name == "llava").eval()
    state, y = {**model.state_dict()}, model.base_model(x)
    model.state_to_save()
    assert dora_kernels.enable(model).left_alone == []
    assert serving.merge_model(model) == {}
    model = COPIES[made](model)
    refused(model.state_to_save)
    refused(lambda: model.load_state_dict(state, strict=False))
    assert model.config().r == 4
    torch.testing.assert_close(model.base_model(x), y)


def test_a_mixed_model():
    model, x, y = trained(mixed=True)
    serving.merge_model(model)
    refused(lambda: get_peft_model_state_dict(model))
    torch.testing.assert_close(model(x), y)


def test_what_is_left_is_not_saved_as_if_it_were_all(tmp_path):
    model, x, y = trained(convolution=True)
    (left,) = serving.merge_model(model)
    assert left.endswith("1")
    refused(lambda: model.save_pretrained(tmp_path))
    torch.testing.assert_close(model(x), y)


def test_an_adapter_on_other_layers_and_another_model_s_stay_whole(tmp_path):
    config = LoraConfig(use_dora=True, r=2, target_modules=["0.0", "0.1"])
    model, _, _ = trained(config=config)
    other, x, y = trained(config=config)  # the same object is its config
    model.add_adapter("elsewhere", LoraConfig(r=2, target_modules="1"))
    serving.merge_model(model)
    refused(lambda: model.save_pretrained(tmp_path / "a", selected_adapters=["default"]))
    model.save_pretrained(tmp_path / "b", selected_adapters=["elsewhere"])
    other.save_pretrained(tmp_path / "c")
    again = PeftModel.from_pretrained(base(), tmp_path / "c").eval()
    torch.testing.assert_close(again(x), y)


def test_pefts_own_merge_is_as_it_was(tmp_path):
    model, x, y = trained()
    model.merge_adapter()
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path).eval()(x), y)
    torch.testing.assert_close(model.merge_and_unload()(x), y)


def test_transformers_own_saving(tmp_path):
    """A model with an adapter of its own and no wrapper, and Trainer, through a wrapper."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    lora = {"use_dora": True, "r": 2, "target_modules": ["q_proj"]}
    model = LlamaForCausalLM(config).eval()
    try:
        model.add_adapter(LoraConfig(**lora))
    except ValueError as error:
        pytest.skip(f"this transformers and this PEFT do not know each other: {error}")
    dora_kernels.enable(randomise(model))
    ids = torch.arange(4)[None]
    y = model(ids).logits
    serving.merge_model(model)
    with pytest.raises(Exception, match="active_adapters"):  # it fails itself where no layer of PEFT's is left
        model.save_pretrained(tmp_path / "model")
    assert not [*tmp_path.glob("model/*.safetensors")]
    refused(lambda: model.get_adapter_state_dict("default"))
    model.delete_adapter("default")
    model.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path / "model")(ids).logits, y)

    wrapper = get_peft_model(LlamaForCausalLM(config), LoraConfig(task_type="CAUSAL_LM", **lora))
    dora_kernels.enable(wrapper)
    trainer = Trainer(wrapper, TrainingArguments(tmp_path / "trainer", report_to=[], use_cpu=True))
    serving.merge_model(wrapper.base_model.model)
    refused(lambda: trainer.save_model(tmp_path / "saved"))
    assert not [*tmp_path.glob("saved/adapter*")]
    wrapper.generate(input_ids=torch.ones(1, 2, dtype=torch.long), max_new_tokens=2)


def test_dvora(tmp_path):
    model = get_peft_model(base(), peft.VeraConfig(r=2, target_modules=["0.0"]))
    dora_kernels.to_dvora(model)
    serving.merge_model(model)
    refused(lambda: model.save_pretrained(tmp_path))
