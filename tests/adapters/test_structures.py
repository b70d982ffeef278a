"""Layers known by structure: each restated layer (restated_layers.py) is taken over, and computes what it did."""

import copy
import io

import pytest
import torch
from torch import nn

import dora_kernels
from dora_kernels import ops
from dora_kernels.testing import check_layer, rms_error
from tests.support.conformance_checks import CHECKS, DEVICE, Case, randomise
from tests.support.restated_layers import DORA, Llava, Llm
from tests.support.structure_cases import CASES, make, only


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_conformance(name, check):
    CHECKS[check](CASES[name], "reference", seed=len(name))


@pytest.mark.parametrize("name", CASES)
def test_conformance_with_the_kernels(name):
    CHECKS["parity"](CASES[name], "triton", seed=len(name))


class LlavaThatMerges(Llava.Linear):
    """Has the two methods, as the library's own does, and can undo nothing."""

    def merge(self):
        self.merged = True

    def unmerge(self):
        raise RuntimeError("no adapter to take out")


@pytest.mark.parametrize("name", [*CASES, "llava that merges"])
def test_check_layer(name):
    """What users call to see for themselves."""
    layer = LlavaThatMerges(nn.Linear(12, 9), dropout=0.5) if name == "llava that merges" else make(name)[0]
    ops.calls.clear()
    report = check_layer(layer).raise_if_failed()
    assert {name for name, _ in ops.calls} & {"forward", "rescale"}
    checks = {row.check: row for row in report.rows}
    assert {"train, accuracy", "eval, accuracy"} <= checks.keys()
    if name == "llava that merges":
        assert (
            "cannot: RuntimeError: no adapter" in checks["unmerge, accuracy"].reason
            and checks["unmerge, accuracy"].ok is None
        )


def test_check_layer_sees_a_call_that_went_to_the_library():
    report = check_layer(make("fsdp_qlora")[0], make("fsdp_qlora")[1][0])
    assert [row.reason for row in report.failures] == ["every call went to the layer's own library"] * 2


@pytest.mark.parametrize("kind", ["nf4", "hqq"])
def test_fsdp_qlora_over_a_quantised_weight(kind):
    problem = pytest.importorskip("tests.support.quantized_problem")

    def build(shapes, dtype):
        linear = nn.Linear(64, 24, bias=kind == "hqq")
        magnitude = linear.weight.detach().norm(dim=1)
        base = getattr(problem, kind)(linear, dtype)
        base.compute_dtype = dtype
        layer = DORA(base, magnitude, dtype=dtype).to(DEVICE)
        return nn.Sequential(randomise(layer)), torch.randn(2, 5, 64, device=DEVICE, dtype=dtype)

    def exact(model):
        (layer,) = model
        dense = nn.Linear(64, 24, bias=layer.base_layer.bias is not None, device=DEVICE).requires_grad_(False)
        dense.weight.data = layer.decoded()
        if dense.bias is not None:
            dense.bias.data = layer.base_layer.bias.data
        twin = DORA(dense, layer.magnitude_layer.magnitude).to(DEVICE)
        for name in ("magnitude_layer", "dora_layer"):
            getattr(twin, name).load_state_dict(getattr(layer, name).state_dict())
        return nn.Sequential(twin).double()

    quantized = Case(build, exact)
    CHECKS["parity"](quantized, "reference", 0)
    model, x = quantized.make(0)
    assert only(model[0]).taken_over
    y, (weight, bias) = model(x), model[0].merged_weight_and_bias()
    assert rms_error(nn.functional.linear(x, weight, bias), y.detach().double()) < 1e-5
    CHECKS["training"](quantized, "reference", 0)


def test_a_layer_that_learns_the_magnitude_alone_in_a_scope():
    layer, x = make("llm, magnitude alone")
    assert only(layer).taken_over and layer.adapter_operands() is None
    with dora_kernels.frozen_adapters(layer):  # has no norm of an A and a B to make
        layer.eval()
        assert torch.equal(layer(x), layer(x))


def test_a_layer_that_merges_itself_in_eval_mode_still_does():
    stock = randomise(Llm.Linear(nn.Linear(12, 9), merge_weights=True))
    ours, x = copy.deepcopy(stock), torch.randn(4, 12)
    assert only(ours).taken_over
    before = ours(x)
    for layer in (stock, ours):
        layer.eval()
    assert ours.merged and torch.equal(ours.weight, stock.weight)
    ops.calls.clear()
    assert torch.equal(ours(x), stock(x)) and not ops.calls
    assert rms_error(ours(x), before.double()) < 1e-5
    assert only(ours).taken_over  # merged as it is
    with pytest.raises(ValueError, match="norm_and_gain: the Linear has no adapter to read: the layer is merged"):
        ours.norm_and_gain()


def test_disabled_adapters_are_the_library_s_affair():
    layer, x = make("megatron")
    assert only(layer).taken_over
    layer._adapter_enabled = False
    assert torch.equal(layer(x)[0], layer.to_wrap(x)[0])
    llava, x = make("llava")
    assert only(llava).taken_over
    llava.disable_adapters = True
    assert torch.equal(llava(x), nn.functional.linear(x, llava.weight, llava.bias))


@pytest.mark.parametrize("name", CASES)
def test_norm_gain_and_the_merged_layer(name):
    layer, x = make(name)
    layer.eval()
    assert only(layer).taken_over
    if name == "megatron, layer norm":  # the frozen layer beneath sees what the layer norm makes of x
        layer.to_wrap.layer_norm_weight.data.fill_(1)
        normed = nn.functional.layer_norm(x, x.shape[-1:])
    else:
        normed = x
    with torch.no_grad():
        y = layer(x)
        y, bias = y if isinstance(y, tuple) else (y, None)
        norm, gain = layer.norm_and_gain()
        weight, merged_bias = layer.merged_weight_and_bias()
    assert rms_error(weight.norm(dim=1), (gain * norm).abs().double()) < 1e-5
    if bias is not None:
        y = y + bias
    merged = nn.functional.linear(normed, weight, merged_bias)
    assert rms_error(merged, y.double()) < 1e-5
    parameters = [parameter.data_ptr() for parameter in layer.parameters()]
    assert weight.data_ptr() not in parameters
    assert merged_bias is None or merged_bias.data_ptr() not in parameters


@pytest.mark.parametrize("name", ["llm", "vl-t5", "llava", "fsdp_qlora", "megatron"])
def test_save_and_load_the_module(name):
    """But for Automodel, whose classes cannot be imported."""
    layer, x = make(name)
    layer.eval()
    assert only(layer).taken_over
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(layer)
    y, again = layer(x), loaded(x)
    assert torch.equal(*((y, again) if name != "megatron" else (y[0], again[0])))


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("llm, dropout", torch.float32),
        ("llava", torch.float32),
        ("llava", torch.bfloat16),
        ("automodel, post", torch.float32),
    ],
)
def test_autocast(name, dtype):
    """Half-precision products, and an output of the dtype that the library's has."""
    stock, x = CASES[name].make(0)
    x = x.to(dtype)
    ours = copy.deepcopy(stock)
    assert only(ours[0]).taken_over
    results = []
    for model in (stock, ours):
        torch.manual_seed(0)
        ops.calls.clear()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            results.append(model(x))
    assert ops.calls
    assert results[0].dtype == results[1].dtype == x.dtype
    assert rms_error(results[1], results[0].double()) < 2e-2


def test_a_call_that_the_library_would_refuse_goes_there():
    for name in ("llm", "automodel"):
        ours, x = make(name)
        assert only(ours).taken_over
        with pytest.raises(RuntimeError, match="dtype"):
            ours(x.bfloat16())
        with pytest.raises(TypeError, match="positional argument"):
            ours(x, 1)
    for ours, x in (make("automodel"), make("vl-t5")):
        for parameter in (parameter for parameter in ours.parameters() if not parameter.requires_grad):
            parameter.data = parameter.data.bfloat16()  # under adapters in float32
        assert only(ours).taken_over
        with pytest.raises(RuntimeError, match="dtype"):
            ours(x.bfloat16())
    for name in ("fsdp_qlora", "megatron"):
        ours, x = make(name)
        assert only(ours).taken_over
        y, of_two_dimensions = ours.eval()(x), ours(x[0])
        y, of_two_dimensions = (y, of_two_dimensions) if name == "fsdp_qlora" else (y[0], of_two_dimensions[0])
        assert of_two_dimensions.shape == (1, *y[0].shape)


@pytest.mark.parametrize("how", ["autocast", "float32 magnitude"])
def test_fsdp_qlora_returns_what_the_library_returns_where_dtypes_differ(how):
    stock, x = CASES["fsdp_qlora"].make(0, torch.float32 if how == "autocast" else torch.bfloat16)
    if how != "autocast":
        stock[0].magnitude_layer.float()
    ours = copy.deepcopy(stock)
    assert only(ours[0]).taken_over
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=how == "autocast"):
        assert ours(x).dtype == stock(x).dtype and torch.equal(ours(x), stock(x))


@pytest.mark.parametrize("name", ["llm, dropout", "llm, magnitude alone", "vl-t5", "llava", "automodel, pre"])
def test_compiles_into_one_graph(name):
    layer, x = make(name)
    assert only(layer).taken_over
    layer.eval()
    expected = layer(x)
    torch._dynamo.reset()
    assert rms_error(torch.compile(layer, backend="eager", fullgraph=True)(x), expected.detach().double()) < 1e-5
