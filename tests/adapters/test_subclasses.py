"""Base layers whose class derives from torch's: taken over where torch's methods alone run, else left to the library.

Stock PEFT over the same layer is the oracle: outputs, every gradient, autocast, merging, copies, and what is put on a
class or on an object before and after enable().
"""

import contextlib
import copy
import importlib
import pickle
import warnings
from types import MethodType

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import nn

pytest.importorskip("peft")

from peft import VeraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

import dora_kernels
from dora_kernels.adapters import two_steps
from dora_kernels.adapters.taking import TakenOver
from dora_kernels.testing import rms_error
from tests.support import library_layers
from tests.support.conformance_checks import randomise
from tests.support.peft_problem import adapt, assert_as_good, enabled, exact_tensors, layers, tensors, training_step
from tests.support.problem import DEVICE
from tests.support.restated_layers import DORA


class Sub(nn.Linear):
    """With attributes and methods that no call runs."""

    def __init__(self, K, N, tag="tagged"):
        super().__init__(K, N)
        self.tag, self.register = tag, nn.ModuleDict({"beside": nn.LayerNorm(3)})
        self.register_buffer("steps", torch.tensor(7))

    def reset_parameters(self):
        for parameter in (self.weight, self.bias):
            nn.init.normal_(parameter, std=0.3)

    def extra_repr(self):
        return self.tag


class Mixin:
    """Has nothing to do with a call."""

    def describe(self):
        return "mixed in"


class Mixed(Mixin, Sub):
    """Two levels down, with a mixin first."""


class Falcon(nn.Linear):
    """As transformers' FalconLinear."""

    def forward(self, input):
        product = input @ self.weight.T
        if self.bias is None:
            return product
        return product + self.bias


class SubConv1D(Conv1D):
    """GPT-2's, under another name."""


class SubConv1d(nn.Conv1d):
    """nn.Conv1d."""


class SubConv2d(nn.Conv2d):
    """nn.Conv2d."""


class SubConv3d(nn.Conv3d):
    """nn.Conv3d."""


class Pads(nn.Conv2d):
    """A constructor of its own, which PEFT calls to make lora_A and lora_B."""

    def __init__(self, channels, wide, kernel_size, stride=1, padding=0, **keywords):
        super().__init__(channels, wide, kernel_size, stride, padding, padding_mode="circular", **keywords)


class Steps(nn.Conv2d):
    """A constructor that has lora_B make steps, too."""

    def __init__(self, channels, wide, kernel_size, stride=1, padding=0, **keywords):
        super().__init__(channels, wide, kernel_size, 2, padding, **keywords)


LINEAR = {
    "subclass": lambda K=8, N=6: Sub(K, N),
    "mixin": lambda: Mixed(8, 6),
    "out_proj's": lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(8, 6),
    "falcon": lambda K=8, N=6: Falcon(K, N),
    "falcon, no bias": lambda K=8, N=6: Falcon(K, N, bias=False),
    "gpt2": lambda: SubConv1D(6, 8),
}
CONVOLUTIONS = {
    "conv1d": (lambda: SubConv1d(8, 6, 3, padding=1), (2, 8, 5)),
    "conv2d": (lambda: SubConv2d(8, 6, 3, stride=2), (2, 8, 5, 5)),
    "conv2d 1x1": (lambda: SubConv2d(8, 6, 1), (2, 8, 4, 4)),
    "conv3d": (lambda: SubConv3d(8, 6, 2), (2, 8, 3, 3, 3)),
    "groups": (lambda: SubConv2d(8, 6, 3, groups=2, padding=1), (2, 8, 5, 5)),
}


def model_over(module, dtype=torch.float32, **config):
    """A stock PEFT model over one layer."""
    torch.manual_seed(0)
    settings = {"target_modules": ["0"], "r": 4, "fan_in_fan_out": isinstance(module, Conv1D)} | config
    return adapt(nn.Sequential(module).to(DEVICE, dtype), **settings)


def x_and_dy(model, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    with torch.no_grad():
        y = model(x)
    return x, torch.randn(y.shape, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers_are_taken_over(name, dtype, adapters):
    model = model_over(LINEAR[name](), dtype, adapters=adapters)
    x, dy = x_and_dy(model, 5, 7, 8, dtype=dtype)
    ours = enabled(model)
    assert_as_good(tensors(ours, x, dy), tensors(model, x, dy), exact_tensors(model, x, dy))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_taken_over(name):
    make, shape = CONVOLUTIONS[name]
    model = model_over(make())
    x, dy = x_and_dy(model, *shape)
    assert_as_good(tensors(enabled(model), x, dy), tensors(model, x, dy), exact_tensors(model, x, dy))


@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("name", ["subclass", "falcon"])
def test_autocast(name, adapters, bias):
    """Falcon's bias is added after the product, and the output is as wide as it: nn.Linear's is that of autocast."""
    if bias is None and name == "subclass":
        pytest.skip("it has a bias")
    module = LINEAR["falcon, no bias" if bias is None else name](40, 30)
    model = model_over(module, adapters=adapters)
    if bias is not None:
        module.bias.data = module.bias.data.to(bias)
    module.requires_grad_(False)
    x, dy = torch.randn(9, 16, 40, device=DEVICE), torch.randn(9, 16, 30, device=DEVICE)
    ours = enabled(model)
    stock = tensors(model, x, dy, autocast=torch.bfloat16)
    assert stock["y"].dtype == (torch.float32 if name == "falcon" and bias == torch.float32 else torch.bfloat16)
    exact = exact_tensors(model, x, dy, autocast=torch.bfloat16)
    found = tensors(ours, x, dy, autocast=torch.bfloat16)
    assert layers(ours)[0].read_call(x)[1] is None
    assert_as_good(found, stock, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_of_falcon_that_is_wider_than_its_product(dtype):
    module = Falcon(8, 6)
    model = model_over(module, dtype)
    module.bias.data = module.bias.data.double()
    x, dy = x_and_dy(model, 5, 8, dtype=dtype)
    stock, ours = model(x), enabled(model)(x)
    assert ours.dtype == stock.dtype == torch.float64
    torch.testing.assert_close(ours, stock, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dropout", ["adapter", "lora"])
@pytest.mark.parametrize("name", ["subclass", "falcon"])
def test_dropout(name, dropout):
    """With "adapter" PEFT's meaning; with "lora" our own, which without a mask's randomness is the same."""
    model = model_over(LINEAR[name](), torch.float64, lora_dropout=0.4)
    x, dy = x_and_dy(model, 5, 8, dtype=torch.float64)
    ours = copy.deepcopy(model)
    assert dora_kernels.enable(ours, dropout=dropout).taken_over
    if dropout == "lora":
        model.eval()
        ours.eval()
    found, stock = tensors(ours, x, dy), tensors(model, x, dy)
    for key, value in found.items():
        torch.testing.assert_close(value, stock[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["subclass", "falcon"])
def test_training_and_kept_norms(name):
    stock = model_over(LINEAR[name](), torch.float64)
    ours = enabled(stock)
    x, target = torch.randn(9, 8, dtype=torch.float64, device=DEVICE), torch.randn(9, 6, device=DEVICE).double()
    losses = []
    for model in (stock, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([training_step(model, optimizer, x, target) for _ in range(4)])
    assert losses[0][0] - losses[0][-1] > 1e-3 and losses[1] == pytest.approx(losses[0], rel=1e-9)
    with torch.no_grad(), dora_kernels.frozen_adapters(ours.eval()):
        for _ in range(3):
            torch.testing.assert_close(ours(x), stock.eval()(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [*LINEAR, *CONVOLUTIONS])
def test_merging_copies_and_disable_keep_the_class(name):
    make = LINEAR.get(name) or CONVOLUTIONS[name][0]
    shape = (3, 8) if name in LINEAR else CONVOLUTIONS[name][1]
    stock = model_over(make(), torch.float64)
    x, _ = x_and_dy(stock, *shape, dtype=torch.float64)
    expected = stock(x)
    ours = enabled(stock)
    layer, cls = layers(ours)[0], type(layers(stock)[0].base_layer)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(layers(twin)[0]) is type(layer) and type(layers(twin)[0].base_layer) is cls
        torch.testing.assert_close(twin(x), expected, rtol=1e-10, atol=1e-10)
    if name != "groups":  # PEFT does not merge a convolution in groups, nor do we
        frozen = copy.deepcopy(layer).frozen_layer()
        assert type(frozen) is cls and getattr(frozen, "tag", None) == getattr(layer.base_layer, "tag", None)
        torch.testing.assert_close(frozen(x), expected, rtol=1e-10, atol=1e-10)
        merged = [copy.deepcopy(model).merge_and_unload() for model in (stock, ours)]
        assert type(merged[1][0]) is cls
        torch.testing.assert_close(merged[1](x), merged[0](x), rtol=1e-10, atol=1e-10)
        layer.merge()
        torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-10)
        layer.unmerge()
    dora_kernels.disable(ours)
    assert type(layer) is type(layers(stock)[0])
    torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["subclass", "falcon", "conv2d"])
def test_compiles_without_a_graph_break(name):
    shape = (3, 8) if name in LINEAR else CONVOLUTIONS[name][1]
    ours = enabled(model_over((LINEAR.get(name) or CONVOLUTIONS[name][0])()))
    x, dy = x_and_dy(ours, *shape)
    torch.compiler.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(tensors(ours, x, dy, call=compiled), tensors(ours, x, dy))
    torch.compiler.reset()  # the next file compiles the same functions, which Dynamo does a few times only


@pytest.mark.parametrize("name", ["subclass", "falcon", "conv2d"])
def test_a_compiled_model_sees_a_forward_that_is_put_on_an_object_later(name):
    """As the library's compiled model does: what is put there is then called, and what is taken away is not."""
    shape = (3, 8) if name in LINEAR else CONVOLUTIONS[name][1]
    stock = model_over((LINEAR.get(name) or CONVOLUTIONS[name][0])(), torch.float64)
    ours, (x, _) = enabled(stock), x_and_dy(stock, *shape, dtype=torch.float64)
    before = stock(x)
    torch.compiler.reset()
    compiled = torch.compile(ours, backend="aot_eager")  # PEFT's own forward breaks the graph
    torch.testing.assert_close(compiled(x), before, rtol=1e-10, atol=1e-10)
    for model in (stock, ours):
        base = layers(model)[0].base_layer
        base.forward = MethodType(lambda self, x: 2 * type(self).forward(self, x), base)
    assert not torch.allclose(stock(x), before)
    torch.testing.assert_close(compiled(x), stock(x), rtol=1e-10, atol=1e-10)
    del layers(ours)[0].base_layer.forward
    torch.testing.assert_close(compiled(x), before, rtol=1e-10, atol=1e-10)
    torch.compiler.reset()


class Doubles(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


def twice(self, x):
    return 2 * nn.functional.linear(x, self.weight, self.bias)


def convolved_twice(self, x, weight, bias):
    return 2 * nn.Conv2d._conv_forward(self, x, weight, bias)


def made(cls, **members):
    """A class over `cls` with these members."""
    return type(f"Made{cls.__name__}", (cls,), members)


class TwiceMixin:
    """Changes what a call computes, by a method that comes before nn.Linear's."""

    def __call__(self, x):
        return 2 * super().__call__(x)


def parametrized(module):
    parametrize.register_parametrization(layers(module)[0].base_layer, "weight", Doubles())


def on_instance(name, value):
    def change(model):
        base = layers(model)[0].base_layer
        setattr(base, name, value.__get__(base))

    return change


def class_of_base(**members):
    def change(model):
        base = layers(model)[0].base_layer
        base.__class__ = made(type(base), **members)

    return change


def mixed_in(mixin):
    def change(model):
        base = layers(model)[0].base_layer
        base.__class__ = type("MadeOfTwo", (mixin, type(base)), {})

    return change


def doubled_attribute(self, name):
    value = object.__getattribute__(self, name)
    return 2 * value if name == "bias" and value is not None else value


def doubled_missing(self, name):
    return 2 * nn.Module.__getattr__(self, name) if name == "weight" else nn.Module.__getattr__(self, name)


def hooked(function):
    def change(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated
            function(layers(model)[0].base_layer)

    return change


CHANGES = {
    "forward": (class_of_base(forward=twice), "forward is not nn.Linear's own"),
    "a mixin's forward": (mixed_in(type("Twice", (), {"forward": twice})), "forward is not nn.Linear's own"),
    "a mixin's __call__": (mixed_in(TwiceMixin), "__call__ is not nn.Module's own"),
    "_call_impl": (class_of_base(_call_impl=twice), "_call_impl is not nn.Module's own"),
    "__getattr__": (class_of_base(__getattr__=doubled_missing), "__getattr__ is not nn.Module's own"),
    "__getattribute__": (class_of_base(__getattribute__=doubled_attribute), "__getattribute__ is not nn.Module's own"),
    "a weight of the class": (
        class_of_base(weight=property(lambda self: 2 * self._parameters["weight"])),
        "weight is an attribute of the class",
    ),
    "a bias of the class": (
        class_of_base(bias=property(lambda self: 2 * self._parameters["bias"])),
        "bias is an attribute of the class",
    ),
    "a parametrization": (parametrized, "weight is an attribute of the class"),
    "weight_norm": (hooked(nn.utils.weight_norm), ""),
    "spectral_norm": (hooked(nn.utils.spectral_norm), ""),
    "forward of the object": (on_instance("forward", twice), "the forward of base_layer was replaced"),
    "_call_impl of the object": (on_instance("_call_impl", twice), "the _call_impl of the base layer was replaced"),
}
"""name -> (what is done to the base layer of a model, a part of the reason)."""


def is_ours(model, x):
    """True if our operators compute a call with x."""
    layer = layers(model)[0]
    return isinstance(layer, TakenOver) and layer.read_call(x)[1] is None


def answer(model, x):
    """y, or the error's type: PEFT cannot compute some of these layers."""
    try:
        return model(x)
    except (AttributeError, RuntimeError) as error:
        return type(error)


def assert_same_answer(ours, stock, x):
    for _ in range(2):
        found, expected = answer(ours, x), answer(stock, x)
        if isinstance(expected, type):
            assert found is expected
        else:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("first", [False, True], ids=["before enable", "after enable"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_runs_other_code_is_left_to_the_library(name, first):
    """Changed before enable(), which gives the reason, or after a call that was ours."""
    change, reason = CHANGES[name]
    torch.manual_seed(1)
    stock = model_over(nn.Linear(8, 6), torch.float64)
    ours, x = copy.deepcopy(stock), torch.randn(3, 8, dtype=torch.float64, device=DEVICE)
    if first:
        dora_kernels.enable(ours)
        assert_same_answer(ours, stock, x)
        if name == "_call_impl of the object":
            pytest.skip("it is looked at when a layer is judged anew")
    for model in (stock, ours):
        torch.manual_seed(2)
        change(model)
    if not first:
        (report,) = dora_kernels.enable(ours).layers
        assert not report.taken_over and reason in report.reason, report.reason
    assert not is_ours(ours, x)
    assert_same_answer(ours, stock, x)


@contextlib.contextmanager
def patched(cls, name, value):
    """cls.name = value, until it is over."""
    own = name in vars(cls)
    before = getattr(cls, name)
    setattr(cls, name, value)
    try:
        yield
    finally:
        setattr(cls, name, before) if own else delattr(cls, name)


PATCHES = {
    "Sub.forward": (lambda: Sub(8, 6), Sub, "forward", twice),
    "Sub.__call__": (lambda: Sub(8, 6), Sub, "__call__", twice),
    "nn.Linear.forward": (lambda: nn.Linear(8, 6), nn.Linear, "forward", twice),
    "nn.Linear.forward under Sub": (lambda: Sub(8, 6), nn.Linear, "forward", twice),
    "nn.Linear.forward under Falcon": (lambda: Falcon(8, 6), nn.Linear, "forward", twice),
    "Falcon.forward": (lambda: Falcon(8, 6), Falcon, "forward", twice),
    "nn.Conv2d.forward": (
        lambda: nn.Conv2d(8, 6, 1),
        nn.Conv2d,
        "forward",
        lambda self, x: 2 * self._conv_forward(x, self.weight, self.bias),
    ),
    "nn.Conv2d._conv_forward": (lambda: SubConv2d(8, 6, 1), nn.Conv2d, "_conv_forward", None),
    "SubConv2d._conv_forward": (lambda: SubConv2d(8, 6, 3), SubConv2d, "_conv_forward", convolved_twice),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_class_that_is_patched(name):
    """Before enable() and after, torch's own class too; and then it is ours again."""
    make, cls, attribute, function = PATCHES[name]
    if function is None:  # not around itself
        own = nn.Conv2d._conv_forward

        def function(self, *arguments):
            return 2 * own(self, *arguments)

    stock = model_over(make(), torch.float64)
    x = torch.randn(*((2, 8, 3, 3) if "Conv" in name else (3, 8)), dtype=torch.float64, device=DEVICE)
    unchanged = stock(x)
    with patched(cls, attribute, function):
        late = copy.deepcopy(stock)
        (report,) = dora_kernels.enable(late).layers
        assert not report.taken_over and f"{attribute} is not" in report.reason or "expected one" in report.reason
        expected = stock(x)
        torch.testing.assert_close(late(x), expected)
    ours = enabled(stock)
    for _ in range(2):
        torch.testing.assert_close(ours(x), unchanged, rtol=1e-10, atol=1e-10)
        assert is_ours(ours, x)
        with patched(cls, attribute, function):
            torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-10)
            assert not is_ours(ours, x)
    assert (expected - unchanged).abs().max() > 0.1


def seamless(self, x, weight, bias):
    """As image tools make tiles: the padding is done here."""
    x = nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
    return nn.functional.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_whose_object_convolves_otherwise(kernel):
    """Before enable(), and after a call that was ours. A 1x1 convolution is a product of ours, which would skip it."""
    stock = model_over(nn.Conv2d(8, 6, kernel, padding=(kernel - 1) // 2), torch.float64)
    function = seamless if kernel == 3 else convolved_twice
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, device=DEVICE)
    ours, late = enabled(stock), copy.deepcopy(stock)
    ours(x)
    assert is_ours(ours, x)
    for model in (stock, ours, late):
        on_instance("_conv_forward", function)(model)
    (report,) = dora_kernels.enable(late).layers
    assert "the _conv_forward of the base layer was replaced on the instance" in report.reason
    for model in (ours, late):
        torch.testing.assert_close(model(x), stock(x), rtol=1e-10, atol=1e-10)


def test_a_convolution_with_a_forward_of_its_own():
    """As CogVideoX's, which splits large inputs, and the heads of Parakeet, which transpose."""
    cls = made(nn.Conv1d, forward=lambda self, x: nn.Conv1d.forward(self, x.transpose(1, 2)).transpose(1, 2))
    stock = model_over(cls(8, 6, 1))
    (report,) = dora_kernels.enable(stock).layers
    assert "whose forward is not nn.Conv1d's own" in report.reason


def test_a_convolution_whose_constructor_makes_other_factors():
    stock = model_over(Steps(8, 6, 1), torch.float64)
    ours = copy.deepcopy(stock)
    (report,) = dora_kernels.enable(ours).layers
    assert "makes another lora_B than that of torch's class" in report.reason
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64, device=DEVICE)
    assert answer(ours, x) is answer(stock, x) is RuntimeError
    (report,) = dora_kernels.enable(model_over(Pads(8, 6, 3))).layers
    assert "makes another lora_A than that of torch's class" in report.reason


class Positions(nn.Embedding):
    """As Whisper's: the places of the tokens, without a batch."""

    def forward(self, x):
        return self.weight[torch.arange(x.shape[-1], device=x.device)]


class OneBatch(nn.Embedding):
    """The places of the tokens, in a batch of one."""

    def forward(self, x):
        return super().forward(torch.arange(x.shape[-1], device=x.device))[None]


class Normed(nn.Embedding):
    """As Inkling's: a norm over the embedding."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.norm = nn.LayerNorm(sizes[1])

    def forward(self, x):
        return self.norm(super().forward(x))


def gemma(tokens, width):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(tokens, width, 0, embed_scale=7.0)


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("make", [Positions, OneBatch, Normed, gemma], ids=lambda make: make.__name__)
def test_embeddings_with_a_forward_of_their_own_are_called(make, adapters):
    """What they return may have fewer dimensions than x."""
    stock = model_over(make(11, 6), torch.float64, adapters=adapters)
    ours, results = enabled(stock), []
    ids = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for model in (stock, ours):
        y = model(ids)
        y.pow(2).sum().backward()
        trained = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
        results.append({"y": y.detach()} | trained)
    assert is_ours(ours, ids) and results[0]["y"].shape == (3, 5, 6)
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-10, atol=1e-10)
        assert value.abs().sum() > 0


FORWARDS = {
    "x @ self.weight.T": False,
    "x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias": True,
    "x @ self.weight.t() + self.bias if self.bias is not None else x @ self.weight.t()": True,
    "x.matmul(self.weight.mT) if self.bias is None else self.bias + x.matmul(self.weight.mT)": True,
    "x @ self.weight if self.bias is None else x @ self.weight + self.bias": False,
    "x @ self.weight.T.T if self.bias is None else x @ self.weight.T.T + self.bias": False,
    "x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias + self.bias": False,
    "x @ self.weight.T if self.bias is None else x @ self.weight.T + 2 * self.bias": False,
    "x @ self.weight.T if self.bias is None or self.training else x @ self.weight.T + self.bias": False,
    "x @ self.weight.T if self.bias is None else x @ (self.weight.T + self.bias)": False,
    "x @ self.weight.T if self.bias is None or x.ndim > 4 else x @ self.weight.T + self.bias": False,
    "x @ self.weight.T if self.bias is None or not x else x @ self.weight.T + self.bias": False,
    "x.float() @ self.weight.T if self.bias is None else x.float() @ self.weight.T + self.bias": False,
    "x @ self.weight.T if self.bias is None else torch.add(x @ self.weight.T, self.bias)": False,
    "x @ self.weight.T if self.bias is None or FLAG else x @ self.weight.T + self.bias": False,
    "x @ T if self.bias is None else x @ T + self.bias": False,
    "matmul(x, self.weight.T) if self.bias is None else matmul(x, self.weight.T) + self.bias": False,
    "nn.functional.linear(x, self.weight, self.bias)": False,
    "super().forward(x)": False,
    "(lambda: x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias)()": False,
}
"""Expressions of x and self, and whether they are x @ W.T, and then + bias. The first forgets the bias."""


def doubled_product(x, weight):
    return 2 * x @ weight if isinstance(x, torch.Tensor) else x @ weight


@pytest.mark.parametrize("expression", FORWARDS)
def test_the_forward_that_is_known_by_what_it_does(expression):
    namespace = {"nn": nn, "torch": torch, "T": torch.ones(8, 8), "FLAG": False, "matmul": doubled_product}
    exec(f"class Written(nn.Linear):\n    def forward(self, x):\n        return {expression}", namespace)
    module = namespace["Written"](8, 8)
    assert two_steps.is_two_steps(module) == FORWARDS[expression]
    stock = model_over(module, torch.float64)
    assert len(dora_kernels.enable(copy.deepcopy(stock)).taken_over) == FORWARDS[expression]
    if FORWARDS[expression]:
        x, dy = x_and_dy(stock, 3, 8, dtype=torch.float64)
        for key, value in tensors(enabled(stock), x, dy).items():
            torch.testing.assert_close(value, tensors(stock, x, dy)[key], rtol=1e-10, atol=1e-10)


class InPlace(nn.Linear):
    """Adds in place, so in the product's dtype."""

    def forward(self, x):
        y = x @ self.weight.T
        if self.bias is not None:
            y += self.bias
        return y


class Writes(nn.Linear):
    """Changes itself."""

    def forward(self, x):
        y = x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias
        self.bias = None
        return y


class Catches(nn.Linear):
    """Goes on where something is no tensor."""

    def forward(self, x):
        try:
            x = -x
        except TypeError:
            pass
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class CatchesAll(nn.Linear):
    """The same, and names nothing."""

    def forward(self, x):
        try:
            x = -x
        finally:
            return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias  # noqa: B012


class Stores(nn.Linear):
    """Leaves x behind for somebody."""

    def forward(self, x):
        global t
        t = x
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Defaults(nn.Linear):
    """Has an argument of its own."""

    def forward(self, x, *, bias=None):
        return x @ self.weight.T if self.bias is bias else x @ self.weight.T + self.bias


def test_forwards_that_are_not_known():
    others = (InPlace, Writes, Catches, CatchesAll, Stores, Defaults, Sub, nn.Linear)
    assert not any(two_steps.is_two_steps(cls(8, 6)) for cls in others)
    assert not two_steps.is_two_steps(nn.Identity()) and not two_steps.is_two_steps(SubConv1D(6, 8))


def test_another_base_layer_is_judged_again():
    """A layer that was taken over as Falcon's, or as nn.Linear's, over the other one later."""
    for first, second in ((Falcon, Sub), (Sub, Falcon)):
        stock = model_over(first(8, 6), torch.float64)
        ours, x = enabled(stock), torch.randn(3, 8, dtype=torch.float64, device=DEVICE)
        ours(x)
        layers(ours)[0].base_layer.__class__ = second
        assert not is_ours(ours, x)
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-10, atol=1e-10)
        assert dora_kernels.enable(ours).taken_over
        assert is_ours(ours, x)
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-10, atol=1e-10)


def fsdp_qlora(base):
    """The copied layer over `base`; a base layer that is called."""
    layer = DORA(base, base.weight.norm(dim=1))
    base.requires_grad_(False)
    return randomise(nn.Sequential(layer)).to(DEVICE, torch.float64)


def lycoris(base):
    pytest.importorskip("lycoris")
    return randomise(library_layers.Wrapped(base, torch.float64, lora_dim=2, bypass_mode=False)).to(DEVICE)


@pytest.mark.parametrize("base", [Sub, Mixed, SubConv2d])
@pytest.mark.parametrize("library", [fsdp_qlora, lycoris])
def test_the_base_layers_of_other_libraries(library, base):
    """A subclass is taken over; one that computes otherwise, or is patched later, is the library's."""
    if base is SubConv2d and library is fsdp_qlora:
        pytest.skip("it has linear layers alone")
    stock = library(base(8, 6, 3) if base is SubConv2d else base(8, 6))
    ours = copy.deepcopy(stock)
    (report,) = dora_kernels.enable(ours).layers
    assert report.taken_over, report.reason
    x = torch.randn(*((2, 8, 5, 5) if base is SubConv2d else (2, 3, 8)), dtype=torch.float64, device=DEVICE)
    expected = stock(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-9, atol=1e-9)
    (layer,) = (module for module in ours.modules() if isinstance(module, TakenOver))
    assert layer.read_call(x)[1] is None
    forward = convolved_twice if base is SubConv2d else twice
    with patched(base, "_conv_forward" if base is SubConv2d else "forward", forward):
        assert "own" in layer.read_call(x)[1]
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-9, atol=1e-9)
        # LyCORIS keeps the bound forward that the wrapped layer had
        assert torch.allclose(stock(x), expected) == (library is lycoris and base is not SubConv2d)
        (report,) = dora_kernels.enable(copy.deepcopy(stock)).layers
        assert not report.taken_over


def test_dvora_over_a_subclass():
    """to_dvora takes it, and refuses one that computes otherwise, then and at a call."""
    model = get_peft_model(nn.Sequential(Sub(8, 6)), VeraConfig(r=4, target_modules=["0"])).double().to(DEVICE)
    x = torch.randn(3, 8, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    stock = copy.deepcopy(model)
    model = dora_kernels.to_dvora(model)
    torch.testing.assert_close(model(x), stock(x), rtol=1e-9, atol=1e-9)  # a fresh magnitude
    with patched(Sub, "forward", twice):
        with pytest.raises(ValueError, match="whose forward is not nn.Linear's own"):
            model(x)
        with pytest.raises(ValueError, match="whose forward is not nn.Linear's own"):
            dora_kernels.to_dvora(stock)


def falcon_model(dtype, **config):
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    settings = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4} | config
    names = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    model = FalconForCausalLM(FalconConfig(**settings)).to(DEVICE, dtype)
    return adapt(model, target_modules=names, r=3, lora_alpha=5)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_transformers_falcon(bias):
    """Eight of eight layers; loss and gradients, a training step, autocast, generation and kept norms, as stock."""
    stock = falcon_model(torch.float64, bias=bias)
    ours, losses = enabled(stock), []
    assert len(layers(ours)) == 8
    ids = torch.randint(50, (2, 7), device=DEVICE)
    for model in (stock, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        steps = []
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        losses.append(steps)
    assert losses[1] == pytest.approx(losses[0], rel=1e-10) and losses[0][-1] < losses[0][0] - 1e-3
    for (name, ours_p), stock_p in zip(ours.named_parameters(), stock.parameters(), strict=True):
        if ours_p.requires_grad:
            torch.testing.assert_close(ours_p.grad, stock_p.grad, rtol=1e-7, atol=1e-10, msg=name)
    with torch.no_grad(), dora_kernels.frozen_adapters(ours.eval()):
        for _ in range(2):
            torch.testing.assert_close(ours(ids).logits, stock.eval()(ids).logits, rtol=1e-9, atol=1e-9)
    ours, stock = ours.float(), stock.float()
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        found, expected = ours(ids).logits, stock(ids).logits
    assert found.dtype == expected.dtype
    assert rms_error(found.double(), expected.double()) < 0.02
    merged = [copy.deepcopy(model).merge_and_unload()(ids).logits for model in (stock, ours)]
    torch.testing.assert_close(merged[1], merged[0], rtol=1e-4, atol=1e-5)


TRANSFORMERS = {
    # class: its module, positional and keyword arguments, and the method that it has of its own
    "EsmFoldLinear": ("esm.modeling_esmfold", (8, 6), {}, None),
    "FalconLinear": ("falcon.modeling_falcon", (8, 6), {}, None),
    "Llama4Router": ("llama4.modeling_llama4", None, {}, "forward"),
    "ParakeetEncoderCTCHead": ("parakeet.modeling_parakeet", (8, 6, 1), {}, "forward"),
    "Conv2dSamePadding": ("perceiver.modeling_perceiver", (8, 6, 3), {}, "forward"),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_classes_of_transformers(name):
    """Those without a forward of their own, and Falcon's, are taken over; the others are left, with the reason."""
    place, arguments, keywords, other = TRANSFORMERS[name]
    cls = getattr(importlib.import_module(f"transformers.models.{place}"), name)
    if arguments is None:
        config = importlib.import_module("transformers").Llama4TextConfig(
            hidden_size=8, num_local_experts=6, num_experts_per_tok=2
        )
        arguments = (config,)
    stock = model_over(cls(*arguments, **keywords), torch.float64)
    (report,) = dora_kernels.enable(copy.deepcopy(stock)).layers
    assert report.taken_over == (other is None)
    if other is not None:
        assert f"{name}, whose {other} is not" in report.reason
        return
    x, dy = x_and_dy(stock, 3, 8, dtype=torch.float64)
    found, expected = tensors(enabled(stock), x, dy), tensors(stock, x, dy)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-10)
