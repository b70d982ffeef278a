"""An enabled model stays PEFT's in all but the arithmetic: adapters, copies, files; and enable() says what it did."""

import contextlib
import copy
import logging
import pickle
import runpy
import subprocess
import sys

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from accelerate import cpu_offload  # noqa: E402
from accelerate.hooks import attach_execution_device_hook, remove_hook_from_module  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.helpers import DoraCaching  # noqa: E402
from peft.tuners.lora import dora  # noqa: E402
from peft.tuners.lora.layer import Linear as LoraLinear  # noqa: E402

import dora_kernels  # noqa: E402
from dora_kernels import ops  # noqa: E402
from dora_kernels.adapters.peft import adapter  # noqa: E402
from dora_kernels.adapters.peft.linear import DoraKernelsLinear  # noqa: E402
from dora_kernels.planning import devices  # noqa: E402
from dora_kernels.testing import rms_error  # noqa: E402
from tests.support.peft_problem import Net, build, calls, enabled, layers, randomise  # noqa: E402
from tests.support.problem import DEVICE  # noqa: E402

# Adapter management: whatever is done to stock PEFT and to an enabled model gives the same outputs.

ACTIONS = {
    "switch": lambda model: model.set_adapter("second"),
    "both, other order": lambda model: model.base_model.set_adapter(["second", "default"]),
    "eval": lambda model: model.eval(),
    "scale": lambda model: [layer.set_scale("default", 0.3) for layer in layers(model)],
    "delete": lambda model: model.delete_adapter("second"),
    "disabled and enabled": lambda model: (set_adapters_on(model, False), set_adapters_on(model, True)),
    "merged and unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
}


def set_adapters_on(model, on):
    (model.base_model.enable_adapter_layers if on else model.base_model.disable_adapter_layers)()


@pytest.mark.parametrize("action", ACTIONS)
def test_still_ours_after(action):
    stock = build(adapters=2)
    ours = enabled(stock)
    for model in (stock, ours):
        ACTIONS[action](model)
    x = torch.randn(5, 24, device=DEVICE)
    before = build(adapters=2)(x)
    ops.calls.clear()
    assert rms_error(ours(x), stock(x)) < 1e-5
    assert calls("forward") == 2
    if action not in ("eval", "disabled and enabled", "merged and unmerged"):
        assert rms_error(before, stock(x)) > 1e-2  # the action does something


def call_with_arguments(model, x):
    return model.up(x, adapter_names=None)


def call_with_caching(model, x):
    model.eval()
    with DoraCaching():
        model(x)
        return model(x)


def call_with_mixed_dtypes(model, x):
    for layer in layers(model):
        layer.lora_B["default"].bfloat16()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        return model(x)


def call_with_hooks(model, x):
    seen = []
    handle = layers(model)[0].lora_A["default"].register_forward_hook(lambda *args: seen.append(args))
    y = model.up(x)
    handle.remove()
    assert seen
    return y


def call_with_lora_adapter(model, x):
    model.add_adapter("lora", LoraConfig(target_modules=["up", "down"], init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            parameter.data.fill_(0.1)
    model.base_model.set_adapter(["default", "lora"])
    return model(x)


def call_after(change):
    def call(model, x):
        change(model)
        return model(x)

    return call


def set_on_layers(**values):
    return lambda model: [setattr(layer, *item) for layer in layers(model) for item in values.items()]


def require_grad_of_base(model):
    for layer in layers(model):
        layer.base_layer.requires_grad_()


def add_bias_to_lora_b(model):
    for layer in layers(model):
        layer.lora_B["default"].bias = nn.Parameter(torch.ones(layer.out_features, device=DEVICE))


HANDED_TO_PEFT = {
    "": call_after(lambda model: set_adapters_on(model, False)),
    " ": call_after(lambda model: [layer.set_adapter([]) for layer in layers(model)]),
    "arguments beyond x": call_with_arguments,
    "DoraCaching": call_with_caching,
    "lora_A has hooks": call_with_hooks,
    "plain LoRA": call_with_lora_adapter,
    "lora_A and lora_B differ in dtype": call_with_mixed_dtypes,
    "fewer than two dimensions": lambda model, x: model.up(x[0]),
    "base weight requires a gradient": call_after(require_grad_of_base),
    "scaling is a tensor": call_after(set_on_layers(scaling={"default": torch.tensor(0.5)})),
    "casting of the input is disabled": call_after(set_on_layers(cast_input_dtype_enabled=False)),
    "has a bias": call_after(add_bias_to_lora_b),
}


@pytest.mark.parametrize("reason", HANDED_TO_PEFT)
def test_call_goes_to_peft(reason, caplog, monkeypatch):
    """What we do not compute gives PEFT's result bit for bit, and one line in the log for each reason."""
    monkeypatch.setattr(devices, "_logged", set())
    caplog.set_level(logging.WARNING, "dora_kernels")
    stock = build()
    ours = enabled(stock)
    x = torch.randn(5, 24, device=DEVICE)
    ops.calls.clear()
    results = [HANDED_TO_PEFT[reason](model, x) for model in (stock, ours)]
    assert torch.equal(*results) and not calls("forward")
    messages = [record.getMessage() for record in caplog.records if record.name == "dora_kernels"]
    assert len(messages) == (1 if reason.strip() else 0)
    assert all(reason in message for message in messages)


def test_errors_are_peft_s():
    model = enabled(build(dtype=torch.bfloat16))
    x = torch.randn(5, 24, device=DEVICE)
    with pytest.raises(RuntimeError, match="dtype"):
        model(x)
    with pytest.raises(RuntimeError, match="dtype"), torch.autocast(DEVICE, dtype=torch.bfloat16):
        model(x.double())
    with pytest.raises(ValueError, match="DoRA"):
        model.eval()(torch.randn(2, 24, device=DEVICE, dtype=torch.bfloat16), adapter_names=["default", "default"])


@pytest.mark.parametrize("part", ["base weight", "weight of the adapter"])
def test_weights_on_another_device(part, caplog, monkeypatch):
    """What PEFT makes of it is its own affair: an error, or a move by a hook."""
    monkeypatch.setattr(devices, "_logged", set())
    model = enabled(build())
    (model.up.base_layer if part == "base weight" else model.up.lora_magnitude_vector["default"]).to("meta")
    ops.calls.clear()
    with contextlib.suppress(RuntimeError, NotImplementedError):
        model.up(torch.randn(5, 24, device=DEVICE))
    assert not ops.calls
    assert len(caplog.messages) == 1 and part in caplog.text and "on meta" in caplog.text


def test_caching_is_for_eval():
    model = enabled(build())
    ops.calls.clear()
    with DoraCaching():
        model(torch.randn(5, 24, device=DEVICE))
    assert calls("forward") == 2


def test_stale_cache_is_cleared():
    """A call of ours invalidates what DoraCaching kept, as a call of PEFT's own does."""
    model = enabled(build()).eval()
    x = torch.randn(5, 24, device=DEVICE)
    call_with_caching(model, x)
    randomise(model, seed=1)
    expected = model(x)
    with DoraCaching():
        assert rms_error(model(x), expected) < 1e-5


def test_a_merged_layer_is_its_base_layer():
    ours = enabled(build())
    x = torch.randn(5, 24, device=DEVICE)
    expected = ours.eval()(x)
    ours.merge_adapter()
    ops.calls.clear()
    assert torch.equal(ours(x), ours.base_model.model(x)) and not ops.calls
    assert torch.equal(ours.up(x), ours.up.base_layer(x)) and rms_error(ours(x), expected) < 1e-5


# The model stays PEFT's: state dict, copies, files, report.


def test_state_dict_and_round_trip():
    stock = build(adapters=2)
    ours = enabled(stock)
    state = ours.state_dict()
    assert list(state) == list(stock.state_dict())
    assert [name for name, _ in ours.named_buffers()] == []
    fresh = enabled(build(adapters=2))
    randomise(fresh, seed=1)
    fresh.load_state_dict(state)
    x = torch.randn(5, 24, device=DEVICE)
    assert torch.equal(fresh(x), ours(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_ours_and_independent(copied):
    model = enabled(build())
    twin = copied(model)
    assert {type(layer) for layer in layers(twin)} == {DoraKernelsLinear}
    x = torch.randn(5, 24, device=DEVICE)
    expected = model(x)
    assert torch.equal(twin(x), expected)
    randomise(twin, seed=1)
    assert torch.equal(model(x), expected) and not torch.equal(twin(x), expected)


def test_save_and_load(tmp_path):
    model = enabled(build())
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)  # build() made its base from this seed, and gave it a bias
    loaded = PeftModel.from_pretrained(Net().to(DEVICE), tmp_path)
    loaded.up.base_layer.bias.data.copy_(model.up.base_layer.bias)
    x = torch.randn(5, 24, device=DEVICE)
    assert rms_error(loaded(x), model(x)) < 1e-5
    assert len(dora_kernels.enable(loaded).taken_over) == 2
    ops.calls.clear()
    assert rms_error(loaded(x), model(x)) < 1e-5 and calls("forward") == 4


def test_enable_is_idempotent_and_disable_undoes_it():
    model = build()
    report = dora_kernels.enable(model)
    assert report == dora_kernels.enable(model)
    assert len(report) == 2 and report.left_alone == []
    assert [layer.name for layer in report.taken_over] == ["base_model.model.up", "base_model.model.down"]
    assert str(report) == "taken over 2 of 2 DoRA layers"
    assert {type(layer) for layer in layers(model)} == {DoraKernelsLinear}
    undone = dora_kernels.disable(model)
    assert undone == dora_kernels.disable(model) and len(undone.left_alone) == len(undone) == 2
    assert {type(layer) for layer in layers(model)} == {LoraLinear}
    ops.calls.clear()
    model(torch.randn(5, 24, device=DEVICE))
    assert not ops.calls
    assert dora_kernels.enable(model) == report


def test_disable_says_why_a_layer_was_never_ours():
    model = build()
    layers(model)[0].base_layer.requires_grad_()
    dora_kernels.enable(model)
    reasons = {layer.name: layer.reason for layer in dora_kernels.disable(model).layers}
    assert reasons == {
        "base_model.model.up": "the base weight requires a gradient",
        "base_model.model.down": "disable(model) was called",
    }


def test_enable_again_after_add_adapter():
    model = build(target_modules=["up"])
    assert len(dora_kernels.enable(model)) == 1
    model.add_adapter("second", LoraConfig(use_dora=True, target_modules=["down"]))
    assert len(dora_kernels.enable(model).taken_over) == 2


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.embedding = nn.Embedding(8, 8)
        self.conv = nn.Conv2d(2, 2, 3)
        self.lora_only = nn.Linear(8, 8)
        self.special = SpecialLinear(8, 8)


class SpecialLinear(nn.Linear):
    """As a quantized layer is: a subclass whose weight need not be what forward multiplies with."""

    def forward(self, x):
        return super().forward(x)


def test_report_names_every_layer_and_why():
    names = ["dense", "embedding", "conv", "special"]
    model = get_peft_model(Mixed(), LoraConfig(use_dora=True, target_modules=names))
    model.add_adapter("plain", LoraConfig(target_modules=["lora_only", "dense"]))
    report = dora_kernels.enable(model)
    found = {layer.name.removeprefix("base_model.model."): layer for layer in report.layers}
    assert list(found) == names and {layer.library for layer in report.layers} == {"peft"}
    assert all(found[name].taken_over and found[name].reason == "" for name in ("dense", "embedding", "conv"))
    assert "SpecialLinear" in found["special"].reason
    lines = str(report).splitlines()
    assert lines[0] == "taken over 3 of 4 DoRA layers" and len(lines) == 2


class Wrapper(nn.Module):
    """As FSDP1 wraps: it has a weight, which must not be read."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.weight = module.weight


class QuantizedTensor(torch.Tensor):
    """As torchao quantizes: nn.Linear itself, over a tensor whose storage is something else."""


def quantized(tensor):
    return nn.Parameter(tensor.as_subclass(QuantizedTensor), requires_grad=False)


def wrap_lora_a(layer):
    layer.lora_A["default"] = Wrapper(layer.lora_A["default"])


LEFT_ALONE = {
    "base weight requires a gradient": lambda layer: layer.base_layer.requires_grad_(),
    "lora_A is a": wrap_lora_a,
    "has a bias": lambda layer: setattr(layer.lora_B["default"], "bias", nn.Parameter(torch.ones(40))),
    "forward was replaced": lambda layer: setattr(layer, "forward", lambda x: x),
    "forward of base_layer was replaced": lambda layer: setattr(layer.base_layer, "forward", lambda x: x),
    "base_layer has hooks": lambda layer: layer.base_layer.register_forward_hook(lambda *args: None),
    "torch.int8": lambda layer: setattr(
        layer.base_layer, "weight", nn.Parameter(torch.ones(40, 24, dtype=torch.int8), requires_grad=False)
    ),
    "the base weight is a tests.adapters.test_peft_model.QuantizedTensor, not a plain tensor": lambda layer: setattr(
        layer.base_layer, "weight", quantized(torch.ones(40, 24))
    ),
    "a weight of the adapter is a tests.adapters.test_peft_model.QuantizedTensor, not a plain tensor": lambda layer: (
        setattr(layer.lora_A["default"], "weight", quantized(torch.ones(5, 24)))
    ),
    "expected nn.Linear, or Conv1D with fan_in_fan_out": lambda layer: setattr(layer, "fan_in_fan_out", True),
}


@pytest.mark.parametrize("before", [False, True], ids=["stock", "enabled before"])
@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_left_alone(reason, before):
    model = build()
    if before:
        dora_kernels.enable(model)
    LEFT_ALONE[reason](model.up)
    report = dora_kernels.enable(model)
    assert len(report.taken_over) == 1 and reason in report.left_alone[0].reason
    assert type(model.up) is LoraLinear and reason in str(report)


def test_adapter_that_stays_with_peft_is_named():
    model = build(adapters=2)
    model.up.lora_A["second"] = Wrapper(model.up.lora_A["second"])
    first, other = dora_kernels.enable(model).layers
    assert first.taken_over and "'second'" in first.reason and other.reason == ""


def test_unknown_signature(monkeypatch):
    def forward(self, x, *, lora_A, lora_B, scaling, base_layer, base_result=None, adapter_name="", eps=0.0):
        raise AssertionError("not called")

    monkeypatch.setattr(dora.DoraLinearLayer, "forward", forward)
    report = dora_kernels.enable(build())
    assert len(report.left_alone) == 2 and f"PEFT {peft.__version__} has unknown arguments" in str(report)


@pytest.mark.parametrize("version", ["0.18.1", "0.9.0"])
def test_old_peft(monkeypatch, version):
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(ImportError, match=rf"PEFT {version} is installed; expected 0.19 or newer"):
        runpy.run_path(adapter.__file__)


def test_model_without_dora():
    assert str(dora_kernels.enable(nn.Linear(3, 3))) == "no DoRA layer found"
    model = get_peft_model(Net(), LoraConfig(target_modules=["up"]))
    assert len(dora_kernels.enable(model)) == 0 and type(model.up) is LoraLinear


def test_peft_is_imported_only_for_its_models():
    code = (
        "import sys, torch, dora_kernels; dora_kernels.enable(torch.nn.Linear(2, 2)); "
        "assert not {'peft', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# accelerate replaces forward on the instance: on every module of a model with a device_map.


@pytest.mark.parametrize("hooked_first", [True, False])
def test_device_map(hooked_first):
    model = build()
    x = torch.randn(5, 24, device=DEVICE)
    expected = model(x)
    if hooked_first:
        attach_execution_device_hook(model, DEVICE)
    assert len(dora_kernels.enable(model).taken_over) == 2
    if not hooked_first:
        attach_execution_device_hook(model, DEVICE)
    assert hasattr(model.up.base_layer, "_hf_hook") and hasattr(model.up, "_hf_hook")
    ops.calls.clear()
    assert rms_error(model(x), expected) < 1e-5 and calls("forward") == 2
    remove_hook_from_module(model, recurse=True)
    assert len(dora_kernels.enable(model).taken_over) == 2
    assert rms_error(model(x), expected) < 1e-5 and calls("forward") == 4
    dora_kernels.disable(model)
    assert torch.equal(model(x), expected) and calls("forward") == 4


@pytest.mark.parametrize("enabled_first", [True, False])
def test_offloaded_weights_go_to_peft(enabled_first):
    """PEFT's DoRA cannot read an offloaded weight; it must be PEFT that says so."""
    model = build()
    if enabled_first:
        dora_kernels.enable(model)
    cpu_offload(model, execution_device=DEVICE)
    assert model.up.base_layer.weight.is_meta
    if not enabled_first:
        assert len(dora_kernels.enable(model).left_alone) == 2
    ops.calls.clear()
    with pytest.raises(NotImplementedError, match="meta tensor"):
        model(torch.randn(5, 24, device=DEVICE))
    assert not ops.calls
