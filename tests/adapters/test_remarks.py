"""What the report of enable says of magnitudes that may not train as their owner thinks, whoever computes the layer."""

import copy

import pytest
import torch
from torch import nn

import dora_kernels
from dora_kernels.adapters.report import LayerReport, ModelReport
from tests.support.layer_kinds import QUANTIZED, STOCK, pair, some
from tests.support.problem import DEVICE

peft = pytest.importorskip("peft")

NAMES = {"magnitude", "dora_scale", "weight_m_wdecomp", "weight_m", "weight_magnitude", "lora_magnitude"}
NAMES.add("lora_magnitude_vector")
LAYERS = [*STOCK, *QUANTIZED]
ONE_OF_EACH = ("peft, two adapters", "peft, embedding", "nf4", "torchtune", "lycoris", "llm", "llava", "megatron")
HALF = {torch.bfloat16: 512, torch.float16: 4096}


def magnitudes(model):
    """The magnitudes of `model`, by name."""
    named = {name: p for name, p in model.named_parameters() if not NAMES.isdisjoint(name.split("."))}
    assert named
    return named


def factors(model):
    """The other parameters of the adapters."""
    words = ("lora_", "linear_in", "linear_out")
    others = {name: p for name, p in model.named_parameters() if name not in magnitudes(model)}
    return {name: p for name, p in others.items() if any(word in name for word in words)}


def remarks(model):
    """All of the report, by the name of the layer."""
    report = dora_kernels.enable(model)
    assert len(report)
    return {layer.name: layer.remarks for layer in report.layers}


def within(name, layers):
    """(layer, the rest of a parameter's name)."""
    return next((layer, name.removeprefix(f"{layer}.")) for layer in layers if name.startswith(f"{layer}."))


def set_dtypes(parameters, dtype):
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)  # as TRL casts the adapters of QLoRA


def expected(model, text, named):
    """A remark on each parameter of `named`, and nothing on other layers."""
    layers = {name: [] for name in remarks(model)}
    for name in named:
        layer, rest = within(name, layers)
        layers[layer].append(text(rest))
    return {layer: tuple(texts) for layer, texts in layers.items()}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", some(LAYERS, *ONE_OF_EACH))
def test_a_trained_magnitude_in_half_precision_is_named(name, dtype):
    _, model, _ = pair(name, torch.float32)
    assert not any(remarks(model).values())
    set_dtypes(magnitudes(model).values(), dtype)
    found = remarks(model)
    text = (
        f"{{}} is trained in {dtype}, where a step under 1/{HALF[dtype]} of a number is lost; expected float32, or an "
        "optimizer that keeps float32 copies"
    )
    assert found == expected(model, text.format, magnitudes(model)) and any(found.values())
    for parameter in magnitudes(model).values():
        parameter.requires_grad_(False)
    assert not any("is trained in" in remark for layer in remarks(model).values() for remark in layer)
    for parameter in factors(model).values():
        parameter.requires_grad_(False)
    assert not any(remarks(model).values())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_is_said_of_half_precision_is_so(dtype):
    """A step under that part of a number is lost at every number, and twice that is not at some."""
    numbers = torch.linspace(1, 2, 5001, dtype=torch.float64).to(dtype).double().unique()
    for share, lost in ((1 / HALF[dtype], True), (2.01 / HALF[dtype], False)):
        moved = (numbers + 0.999 * numbers * share).to(dtype).double() != numbers
        assert (not moved.any()) if lost else moved.any()


@pytest.mark.parametrize(("dtype", "moves"), ((torch.float32, True), (torch.bfloat16, False)))
def test_no_step_of_adamw_moves_a_magnitude_in_half_precision(dtype, moves):
    """The fact behind the remark: ten steps of 1e-4, each of them forward and backward through the layer."""
    torch.manual_seed(0)
    config = peft.LoraConfig(use_dora=True, r=2, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 48)).to(DEVICE), config)
    (magnitude,) = magnitudes(model).values()
    set_dtypes([magnitude], dtype)
    (said,) = remarks(model).values()
    assert bool(said) is not moves
    before = magnitude.detach().clone()
    assert before.min() > 1e-4 * 512
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(8, 64, device=DEVICE)).pow(2).mean().backward()
        assert magnitude.grad.abs().min() > 0
        optimizer.step()
    assert (magnitude != before).sum() == (magnitude.numel() if moves else 0)


@pytest.mark.parametrize("name", some([n for n in LAYERS if "alone" not in n], *ONE_OF_EACH))
def test_a_magnitude_that_is_frozen_under_trained_factors_is_named(name):
    """As what trains the parameters with "lora" in their names freezes it."""
    _, model, _ = pair(name, torch.float32)
    for parameter in magnitudes(model).values():
        parameter.requires_grad_(False)
    both = factors(model)
    found = remarks(model)
    assert any(found.values())
    for kept in both:  # of each pair but one
        for parameter in both.values():
            parameter.requires_grad_(False)
        both[kept].requires_grad_()
        layer, rest = within(kept, found)
        (remark,) = remarks(model)[layer]
        assert remark.endswith(f" is frozen, while {rest} are trained; expected it to be trained, too")
        assert remark.split()[0] in {within(name, found)[1] for name in magnitudes(model)}
    for parameter in both.values():
        parameter.requires_grad_(False)
    assert not any(remarks(model).values())
    for parameter in magnitudes(model).values():
        parameter.requires_grad_()
    assert not any(remarks(model).values())  # magnitudes alone may be trained


def linear(**arguments):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    config = peft.LoraConfig(use_dora=True, r=2, target_modules=["0", "1"])
    return peft.get_peft_model(model, config, **arguments)


def test_a_layer_that_is_left_alone_trains_no_better():
    model = linear()
    model.base_model.model[0].base_layer.weight.requires_grad_()
    set_dtypes(magnitudes(model).values(), torch.bfloat16)
    report = dora_kernels.enable(model)
    left, ours = report.layers
    assert not left.taken_over and left.reason == "the base weight requires a gradient" and ours.reason == ""
    assert left.remarks == ours.remarks and len(left.remarks) == 1
    assert not any(layer.remarks for layer in dora_kernels.disable(model).layers)


@pytest.mark.parametrize(("part", "name"), (("lora_magnitude_vector", "magnitude"), ("lora_A", "lora_A")))
def test_a_part_that_has_no_weight_is_no_error(part, name):
    """Of what was put in its place nothing is known; the other layer's remark stays."""
    model = linear()
    set_dtypes(magnitudes(model).values(), torch.bfloat16)
    getattr(model.base_model.model[0], part)["default"] = nn.Sequential()
    left, ours = dora_kernels.enable(model).layers
    assert not left.taken_over and f"{name} is a torch.nn.modules.container.Sequential" in left.reason
    assert ours.taken_over and len(ours.remarks) == 1 and len(left.remarks) == (part == "lora_A")


def test_an_adapter_that_is_not_active_is_not_trained():
    """PEFT freezes all of it."""
    model = linear()
    model.add_adapter("other", peft.LoraConfig(use_dora=True, r=2, target_modules=["0", "1"]))
    set_dtypes(magnitudes(model).values(), torch.bfloat16)
    assert [len(texts) for texts in remarks(model).values()] == [1, 1]
    assert all("default" in text and "other" not in text for texts in remarks(model).values() for text in texts)


def test_an_adapter_that_peft_loads_for_inference_or_for_training(tmp_path):
    model = linear()
    set_dtypes(magnitudes(model).values(), torch.bfloat16)
    model.save_pretrained(tmp_path)
    for trained in (False, True):
        base = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).bfloat16()
        loaded = {"is_trainable": trained, "autocast_adapter_dtype": False}
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **loaded)
        assert all(bool(texts) is trained for texts in remarks(again).values())
        again = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=trained)  # which makes them float32
        assert not any(remarks(again).values())


def test_of_a_view_into_a_flat_parameter_nothing_is_known():
    """FSDP1 puts them where the parameters were; they all require a gradient if one does."""
    model = linear()
    layer = model.base_model.model[0]
    part = layer.lora_magnitude_vector["default"]
    flat = nn.Parameter(part.weight.detach().clone().bfloat16())
    del part.weight
    part.weight = flat[:]
    assert [bool(texts) for texts in remarks(model).values()] == [False, False]


def test_the_lines_of_the_report():
    model = linear()
    set_dtypes(magnitudes(model).values(), torch.bfloat16)
    model.base_model.model[1].lora_magnitude_vector["default"].weight.requires_grad_(False)
    assert str(dora_kernels.enable(model)) == (
        "taken over 2 of 2 DoRA layers\n"
        "  1 may not train as meant: lora_magnitude_vector.default.weight is trained in torch.bfloat16, where a step "
        "under 1/512 of a number is lost; expected float32, or an optimizer that keeps float32 copies "
        "(base_model.model.0)\n"
        "  1 may not train as meant: lora_magnitude_vector.default.weight is frozen, while lora_A.default.weight and "
        "lora_B.default.weight are trained; expected it to be trained, too (base_model.model.1)"
    )
    many = ModelReport(tuple(LayerReport(f"l{i}", "peft", False, "so", remarks=("thus",)) for i in range(5)))
    assert str(many).splitlines()[1:] == [
        "  5 left to peft: so (l0, l1, l2 and 2 more)",
        "  5 may not train as meant: thus (l0, l1, l2 and 2 more)",
    ]
