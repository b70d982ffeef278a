"""Which layers are claimed by structure, which of them are taken over, and what enable() says of the others."""

import gc
import importlib
import threading
import weakref

import pytest
import torch
from torch import nn

import dora_kernels
from dora_kernels import ops, options
from dora_kernels.adapters.copied import probe
from dora_kernels.adapters.copied.library import CopiedLibrary
from dora_kernels.adapters.libraries import COPIED
from dora_kernels.planning.options import current_options
from tests.support import restated_layers
from tests.support.conformance_checks import randomise
from tests.support.restated_layers import LinearLoRA, Llm, Parallel
from tests.support.structure_cases import CASES, make, only

EDITED = {
    restated_layers.LlmWithEps: "something else than x W^T",
    restated_layers.LlmWithScaledBias: "something else than x W^T",
    restated_layers.LlmWithOneDropout: "in train mode",
    restated_layers.LlmWithEvalGain: "in eval mode",
    restated_layers.LlmWithFlowingNorm: "see dx?lora_A",
    restated_layers.LlmWithGate: "a tensor that is no part of a DoRA layer: gate",
    restated_layers.LlmThatRaises: "could not be checked: RuntimeError: a mask is needed",
}


@pytest.mark.parametrize("cls", EDITED)
def test_an_edited_copy_is_left_alone_and_the_report_says_why(cls):
    layer = randomise(cls(nn.Linear(12, 9), dropout=0.5))
    report = only(layer)
    assert not report.taken_over and type(layer) is cls
    assert EDITED[cls].replace("dx?", "d") in report.reason, report.reason


@pytest.mark.parametrize("cls", [restated_layers.LlmWithEps, restated_layers.LlmWithScaledBias])
def test_an_edited_copy_is_found_out_however_fresh_its_adapter(cls):
    """B = 0 and gain 1: the layer itself computes the same."""
    assert not only(cls(nn.Linear(12, 9), dropout=0.5)).taken_over


def test_an_edited_dropout_is_found_out_before_it_drops():
    layer = restated_layers.LlmWithOneDropout(nn.Linear(12, 9), dropout=0.5)
    layer.lora_dropout.p = 0.0
    assert "in train mode" in only(layer).reason
    layer = randomise(LinearLoRA.patch(nn.Linear(12, 9), dropout=0.0))
    layer.__class__ = type("PatchedLinearLoRA", (restated_layers.LinearLoRAWithDroppedOutput, nn.Linear), {})
    assert "in train mode" in only(layer).reason


def test_a_class_that_changes_nothing_is_taken_over():
    class Mine(Llm.Linear):
        """A subclass of a user's."""

        def merge_into(self, other):
            """Beside the point."""

    assert only(Mine(nn.Linear(12, 9))).taken_over


def test_one_run_tells_for_all_layers_of_a_kind(monkeypatch):
    runs, run = [], probe._run
    monkeypatch.setattr(probe, "_results", {})
    monkeypatch.setattr(probe, "_run", lambda *arguments: runs.append(1) or run(*arguments))
    dora_kernels.enable(nn.Sequential(*(LinearLoRA.patch(nn.Linear(K, 9)) for K in (8, 11, 12))))
    assert len(runs) == 1
    dora_kernels.enable(
        nn.Sequential(LinearLoRA.patch(nn.Linear(8, 9), position="pre"), LinearLoRA.patch(nn.Linear(8, 9)))
    )
    assert len(runs) == 2


def test_another_setting_is_another_kind():
    class Optional(Llm.Linear):
        """Has eps where it is asked for."""

        has_eps = False

        def gain(self):
            return self.weight_m_wdecomp.weight[:, 0] / (
                restated_layers.norms(self.direction()).detach() + self.has_eps * 1e-8
            )

    layers = [Optional(nn.Linear(12, 9)), Optional(nn.Linear(12, 9))]
    layers[1].has_eps = True
    report = dora_kernels.enable(nn.Sequential(*layers))
    assert [layer.taken_over for layer in report.layers] == [True, False]


@pytest.mark.parametrize("name", ["llm, dropout", "automodel, post", "megatron", "fsdp_qlora"])
def test_enable_leaves_no_trace_of_its_run(name, monkeypatch):
    monkeypatch.setattr(probe, "_results", {})
    layer, _ = make(name)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    parameters = dict(layer.named_parameters())
    state = torch.get_rng_state()
    assert only(layer).taken_over
    assert torch.equal(torch.get_rng_state(), state)
    assert not calls and layer.training and current_options().backend == "auto"
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert all(parameters[key] is value for key, value in layer.named_parameters())
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_its_run_is_plain_pytorch_whatever_the_options(monkeypatch):
    monkeypatch.setattr(probe, "_results", {})
    ops.calls.clear()
    with options(backend="triton"):
        assert only(make("llm")[0]).taken_over
    assert {used for _, used in ops.calls} == {"reference"}


def test_other_threads_keep_their_options_while_it_runs(monkeypatch):
    monkeypatch.setattr(probe, "_results", {})
    seen, computed = [], probe._computed

    def watched(twin, x):
        thread = threading.Thread(target=lambda: seen.append(current_options()))
        thread.start()
        thread.join()
        seen.append(current_options())
        return computed(twin, x)

    monkeypatch.setattr(probe, "_computed", watched)
    with options(backend="triton"):
        assert only(make("llm")[0]).taken_over
        assert current_options().backend == "triton"
    assert [options.backend for options in seen] == ["triton", "reference"] * 2


def test_what_it_remembers_keeps_no_class_alive_and_does_not_grow_for_ever(monkeypatch):
    monkeypatch.setattr(probe, "_results", {})
    monkeypatch.setattr(probe, "REMEMBERED", 3)

    def take_over_one():
        class Mine(Llm.Linear):
            """As users write them, in a function."""

            def forward(self, x):
                return super().forward(x)

        assert only(Mine(nn.Linear(12, 9))).taken_over
        return weakref.ref(Mine)

    mine = take_over_one()
    gc.collect()
    gc.collect()  # what only the class that was taken over kept
    assert mine() is None
    for index in range(5):
        assert only(_with(Llm.Linear(nn.Linear(12, 9)), index=index)).taken_over
    assert len(probe._results) == 3


def test_a_setting_of_the_class_is_one_of_the_layer():
    def eps(layer):
        return layer.has_eps * 1e-8

    class Optional(Llm.Linear):
        """Has eps where a subclass says so."""

        def gain(self):
            return self.weight_m_wdecomp.weight[:, 0] / (restated_layers.norms(self.direction()).detach() + eps(self))

    classes = [type("Mine", (Optional,), {"has_eps": has_eps}) for has_eps in (False, True)]
    assert [only(cls(nn.Linear(12, 9))).taken_over for cls in classes] == [True, False]


def test_enable_in_inference_mode_and_on_the_meta_device(monkeypatch):
    monkeypatch.setattr(probe, "_results", {})
    layer, _ = make("llava")
    with torch.inference_mode():
        assert only(layer).taken_over
    monkeypatch.setattr(probe, "_results", {})
    with torch.device("meta"):
        assert only(Llm.Linear(nn.Linear(12, 9))).taken_over


def broken(change):
    """An Llm.Linear with `change` made to it."""
    layer = Llm.Linear(nn.Linear(12, 9))
    change(layer)
    return layer


LEFT_ALONE = {
    "fan_in_fan_out is set": lambda: broken(lambda layer: setattr(layer, "fan_in_fan_out", True)),
    "weight_m_wdecomp has shape (1, 9)": lambda: broken(
        lambda layer: setattr(layer, "weight_m_wdecomp", nn.Linear(9, 1, bias=False))
    ),
    "lora_B has shape (9, 3)": lambda: broken(lambda layer: setattr(layer, "lora_B", nn.Linear(3, 9, bias=False))),
    "lora_A is torch.bfloat16 and lora_B is torch.float32": lambda: broken(lambda layer: layer.lora_A.bfloat16()),
    "lora_A has a bias": lambda: broken(lambda layer: setattr(layer, "lora_A", nn.Linear(12, 4))),
    "lora_A has hooks": lambda: broken(lambda layer: layer.lora_A.register_forward_hook(lambda *_: None)),
    "the base weight requires a gradient": lambda: broken(lambda layer: layer.weight.requires_grad_()),
    "scaling is a torch.Tensor": lambda: broken(lambda layer: setattr(layer, "scaling", torch.ones(()))),
    "lora_dropout is a AlphaDropout": lambda: broken(lambda layer: setattr(layer, "lora_dropout", nn.AlphaDropout())),
    "the layer's forward was replaced": lambda: broken(lambda layer: setattr(layer, "forward", lambda x: x)),
    "the active adapter 'second' has no lora_A": lambda: _with(make("llava")[0], active_adapter="second"),
    "Wdecompose is set": lambda: _with(make("llava")[0], Wdecompose=True),
    "dropout_position is 'both'": lambda: _with(make("automodel")[0], dropout_position="both"),
    "it is not built as the library builds it": lambda: broken(lambda layer: delattr(layer, "dora_simple")),
    "adapter has hooks": lambda: _megatron(lambda adapter: adapter.register_forward_hook(lambda *_: None)),
    "the norm has scaling 2": lambda: _with(make("megatron")[0], scaling=2),
    "an attribute that would be hidden: norm": lambda: broken(lambda layer: setattr(layer, "norm", nn.Identity())),
    "linear_out has hooks": lambda: _megatron(
        lambda adapter: adapter.linear_out.register_forward_hook(lambda *_: None)
    ),
    "magnitude_layer is wrapped": lambda: _with(make("fsdp_qlora")[0], magnitude_layer=Wrapped()),
    "super_fwd is set": lambda: _with(make("automodel")[0], super_fwd=torch.tanh),
    "the layer is tensor-parallel": lambda: _megatron(
        lambda adapter: setattr(adapter.config, "tensor_model_parallel_size", 2)
    ),
    "the layer is sequence-parallel": lambda: _megatron(
        lambda adapter: setattr(adapter.config, "sequence_parallel", True)
    ),
    "an activation, SiLU": lambda: _megatron(lambda adapter: setattr(adapter, "activation", nn.SiLU())),
    "dropout_position is 'post'": lambda: _megatron(lambda adapter: setattr(adapter, "dropout_position", "post")),
    "it is an expert's layer": lambda: _megatron(lambda adapter: setattr(adapter, "is_expert", True)),
    "base_layer is a torch.nn.modules.linear.Bilinear": lambda: _with(
        make("fsdp_qlora")[0], base_layer=nn.Bilinear(9, 9, 9)
    ),
}


class Wrapped(nn.Module):
    """As FSDP wraps a magnitude_layer: its parameters are found, and may have no storage."""

    def __init__(self):
        super().__init__()
        self._fsdp_wrapped_module = nn.Identity()
        self.magnitude = nn.Parameter(torch.ones(21))


def _with(layer, **attributes):
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def _megatron(change):
    layer = make("megatron")[0]
    change(layer.adapter)
    return layer


@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_what_is_not_known_is_left_alone_and_the_report_says_why(reason):
    layer = LEFT_ALONE[reason]()
    cls = type(layer)
    report = only(layer)
    assert not report.taken_over and type(layer) is cls
    assert reason in report.reason, report.reason


def test_sharded_weights_of_megatron_do_not_fit():
    layer = make("megatron")[0]
    layer.adapter.linear_in.weight = nn.Parameter(layer.adapter.linear_in.weight[:2].detach())
    assert "lora_B has shape" in only(layer).reason


class LoraOnly(nn.Linear, Llm.LoraLayer):
    """As early LoRA libraries have it."""

    def __init__(self):
        super().__init__(8, 8)
        self.lora_A, self.lora_B, self.scaling = nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False), 1.0


class Linear(nn.Linear):
    """Only the name is a library's."""

    weight_m_wdecomp = None


def test_nothing_else_is_claimed():
    lora = LinearLoRA.patch(nn.Linear(8, 8), use_dora=False)
    others = [nn.Linear(8, 8), LoraOnly(), Linear(8, 8), lora, nn.Bilinear(2, 2, 2), Parallel(nn.Linear(2, 2))]
    assert len(dora_kernels.enable(nn.Sequential(*others))) == 0


def claimed(model):
    """How many layers of `model` each library claims."""
    files = (importlib.import_module(f"dora_kernels.adapters.copied.{name}") for name in COPIED)
    return [len(list(CopiedLibrary(file.STRUCTURES).layers(model))) for file in files]


def test_layers_of_packages_are_not_claimed():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(use_dora=True, target_modules=["0"]))
    assert claimed(model) == [0] * len(COPIED)
    assert [layer.library for layer in dora_kernels.enable(model).layers] == ["peft"]
    assert claimed(model) == [0] * len(COPIED)


def test_layers_of_torchtune_are_not_claimed():
    library_layers = pytest.importorskip("tests.support.library_layers")
    assert claimed(library_layers.torchtune_layer(8, 8, 4)) == [0] * len(COPIED)


@pytest.mark.parametrize("name", CASES)
def test_each_layer_is_claimed_once(name):
    assert sorted(claimed(make(name)[0])) == [0, 0, 0, 0, 1]
