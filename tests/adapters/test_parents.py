"""The report names the layers whose weight a parent reads past them, and no others."""

import functools
from types import MethodType

import pytest
import torch
from torch import nn

import dora_kernels
from dora_kernels.adapters import parents
from tests.support.conformance_checks import randomise

peft = pytest.importorskip("peft")


def reported(model, *targets, **config):
    """(the PEFT model, what enable() says of each layer by the end of its name)."""
    model = randomise(peft.get_peft_model(model, peft.LoraConfig(use_dora=True, r=2, target_modules=[*targets])))
    return model, {layer.name.removeprefix("base_model.model."): layer for layer in dora_kernels.enable(model).layers}


def encoder_layer(cls=nn.TransformerEncoderLayer):
    return cls(16, 2, 32, 0.0, batch_first=True)


class Renamed(nn.TransformerEncoderLayer):
    """torch's forward."""


class Calls(nn.TransformerEncoderLayer):
    """A forward of its own around torch's."""

    def forward(self, src, *arguments, **keywords):
        return super().forward(src, *arguments, **keywords)


class Slow(nn.TransformerEncoderLayer):
    """A forward that calls its layers."""

    def forward(self, src):
        assert self.linear1.weight.dtype == src.dtype and isinstance(self.linear2.weight, torch.Tensor)
        return src + self.linear2(torch.relu(self.linear1(src)))


@pytest.mark.parametrize("cls", (nn.TransformerEncoderLayer, Renamed, Calls))
def test_torchs_encoder_reads_its_layers_and_skips_their_adapters(cls):
    model, layers = reported(
        nn.TransformerEncoder(encoder_layer(cls), 2, enable_nested_tensor=False), "linear1", "linear2"
    )
    assert len(layers) == 4 and all(layer.taken_over for layer in layers.values())
    assert {layer.reason for layer in layers.values()} == {
        f"{cls.__name__}.forward can read this weight past the layer, and no adapter is applied where that is done"
    }
    if cls is nn.TransformerEncoderLayer:  # which is so
        x = torch.randn(1, 4, 16)
        with torch.no_grad():
            y = model.eval()(x)
            with model.disable_adapter():
                assert torch.equal(model(x), y)
            assert not torch.allclose(model.train()(x), y, atol=1e-2)


def test_no_remark_where_the_layers_are_called():
    _, layers = reported(encoder_layer(Slow), "linear1", "linear2")
    _, others = reported(nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32), 1), "linear1")
    assert [layer.reason for layer in (*layers.values(), *others.values())] == ["", "", ""]


class CallsToo(nn.MultiheadAttention):
    """A forward that calls out_proj after torch's, which reads its weight."""

    def forward(self, *arguments, **keywords):
        y, *more = super().forward(*arguments, **keywords)
        return self.out_proj(y), *more


class Own(nn.MultiheadAttention):
    """A forward that calls out_proj."""

    def forward(self, x):
        return self.out_proj(nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)[..., : x.shape[-1]])


REACHED = {
    "alone": lambda: nn.MultiheadAttention(16, 2),
    "encoder layer": encoder_layer,
    "encoder": lambda: nn.TransformerEncoder(encoder_layer(), 1, enable_nested_tensor=False),
    "decoder layer": lambda: nn.TransformerDecoderLayer(16, 2, 32),
    "replaced out_proj": lambda: replaced(nn.MultiheadAttention(16, 2)),
}


def replaced(attention):
    attention.out_proj = nn.Linear(16, 16)
    return attention


@pytest.mark.parametrize("reached", REACHED)
def test_torchs_attention_never_calls_out_proj(reached):
    """Its layer is left alone, by whatever way the attention is reached; stock PEFT's adapter does nothing there."""
    model, layers = reported(REACHED[reached](), "out_proj")
    for layer in layers.values():
        assert not layer.taken_over
        assert "MultiheadAttention.forward reads this weight and never calls the layer" in layer.reason
        assert ("TransformerEncoderLayer.forward can read it, too" in layer.reason) == ("encoder" in reached)
    assert len(layers) == (2 if reached == "decoder layer" else 1)
    if reached == "alone":
        x, attention = torch.randn(4, 1, 16), model.base_model.model
        with model.disable_adapter():
            without = attention(x, x, x)[0]
        assert torch.equal(attention(x, x, x)[0], without)


@pytest.mark.parametrize("cls", [CallsToo, Own])
def test_an_attention_that_calls_out_proj(cls):
    """The layer is torch's NonDynamicallyQuantizableLinear, with the forward of nn.Linear."""
    _, layers = reported(cls(16, 2), "out_proj")
    assert layers["out_proj"].taken_over
    assert layers["out_proj"].reason == (
        ""
        if cls is Own
        else "CallsToo.forward can read this weight past the layer, and no adapter is applied where that is done"
    )


class Functional(nn.Module):
    """Multiplies with a submodule's weight, by a method, two levels down."""

    def __init__(self):
        super().__init__()
        self.proj, self.called = nn.ModuleDict({"inner": nn.Linear(8, 8)}), nn.Linear(8, 8)
        self.holder = nn.Module()
        self.holder.deep = nn.Linear(8, 8)

    def forward(self, x):
        return self.called(self.product(x))

    def product(self, x):
        return nn.functional.linear(x, self.holder.deep.weight)

    def reset_parameters(self):
        nn.init.zeros_(self.called.weight)  # not when it is called


def test_somebody_s_own_parent():
    _, layers = reported(Functional(), "deep", "called", "inner")
    assert layers["holder.deep"].reason.startswith("Functional.product can read this weight past the layer")
    assert [layers[name].reason for name in ("called", "proj.inner")] == ["", ""]


class Asks(nn.Module):
    """Wants no number of the weights that it names."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x = x.to(self.a.weight.data.dtype).to(self.b.weight).type_as(self.c.weight)
        if self.a.weight is None or None is not self.b.weight.detach():
            return x
        assert getattr(self.a.weight, "dtype", None) == x.dtype and len(self.b.weight) == 8
        assert torch.zeros_like(self.c.weight).shape == self.c.weight.detach().shape
        return self.c(self.b(self.a(x)))


class Uses(Asks):
    """The same words, for numbers."""

    def forward(self, x):
        x = x @ self.a.weight.data.to(x.dtype)
        x = x + getattr(self.b.weight, "T") * (self.c.weight.detach() == 0)  # noqa: B009
        return x


def test_facts_about_a_weight_are_no_use_of_it():
    assert parents.uses(Asks).read == {}
    assert parents.uses(Uses).read.keys() == {"a", "b", "c"}


def own_method(parent):
    def forward(self, x):
        return nn.functional.linear(x, self.c.weight)

    return MethodType(forward, parent)


def own_function(parent):
    return lambda x: nn.functional.linear(x, parent.c.weight)


def own_function_of_lines(parent):
    def forward(x):
        return nn.functional.linear(x, parent.c.weight)

    return forward


def around_it(parent):
    before = own_method(parent)

    def forward(*arguments):
        return before(*arguments)

    return forward


def partial(parent):
    def forward(module, x):
        return nn.functional.linear(x, module.c.weight)

    return functools.partial(forward, parent)


def through_another(parent):
    parent.product = own_method(parent)
    return MethodType(lambda self, x: self.product(x), parent)


PATCHES = (own_method, own_function, own_function_of_lines, around_it, partial, through_another)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_a_forward_on_the_instance(patch):
    parent = Asks()
    parent.forward = patch(parent)
    model, layers = reported(nn.ModuleDict({"parent": parent, "other": Asks()}), "c")
    assert "Asks." in layers["parent.c"].reason and "past the layer" in layers["parent.c"].reason
    assert layers["other.c"].reason == ""
    del parent.forward
    assert not any(layer.reason for layer in dora_kernels.enable(model).layers)


def test_a_class_that_is_patched_after_the_first_enable():
    cls = type("Patched", (Asks,), {})
    model, layers = reported(cls(), "c")
    assert layers["c"].reason == ""
    cls.forward = Uses.forward
    (layer,) = dora_kernels.enable(model).layers
    assert layer.reason.startswith("Patched.forward can read")


def test_lycoris_wraps_what_the_parent_holds():
    locon = pytest.importorskip("lycoris.modules.locon")
    model = nn.Module()
    model.layer = encoder_layer()
    wraps = {"one": model.layer.linear1, "two": model.layer.linear2}
    for name, wrapped in wraps.items():
        setattr(model, name, locon.LoConModule(name, wrapped, lora_dim=2, weight_decompose=True))
        getattr(model, name).apply_to()
    model.layer.requires_grad_(False)
    report = dora_kernels.enable(model)
    assert len(report.taken_over) == 2
    assert all("TransformerEncoderLayer.forward can read" in layer.reason for layer in report.layers)


def test_parents_in_transformers():
    modeling = pytest.importorskip("transformers.models.wavlm.modeling_wavlm")
    assert {"q_proj", "k_proj", "v_proj", "out_proj"} <= parents.uses(modeling.WavLMAttention).read.keys()
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
    from transformers.models.t5.modeling_t5 import T5DenseActDense  # asks wo.weight for its dtype

    assert not any(parents.uses(cls).read for cls in (LlamaAttention, LlamaMLP, T5DenseActDense))


def test_a_parent_without_source():
    namespace = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x @ self.proj.weight.T", namespace)
    assert parents.uses(namespace["Made"]).read == {}
