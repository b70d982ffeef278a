"""QDoRA under PEFT: an enabled model over a quantized base gives what PEFT gives, and no dense weight outlives a GEMM.

The yardstick is stock PEFT in the same dtypes over nn.Linear layers of the same decoded weights (`dense`); exact is
that in float64. Stock PEFT over bitsandbytes is compared with directly where it is right on a CPU.
"""

import contextlib
import copy
import functools
import logging
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")

import dora_kernels
from dora_kernels import disable, enable, ops, options, quant, reuse
from dora_kernels.planning import devices
from dora_kernels.testing import rms_error
from tests.support.peft_problem import assert_as_good, calls, enabled, exact_tensors, layers, tensors, training_step
from tests.support.problem import DEVICE
from tests.support.quantized_problem import ALIGNED, FORMATS, STRADDLING, TRAPPED, build, dense


def inputs(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    up, down = layers(model)
    shapes = ((3, 4, up.in_features), (3, 4, down.out_features))
    return tuple(torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)


def assert_parity(model, dtype=torch.float32, x_dtype=None, autocast=None):
    """Output and every gradient of an enabled copy of `model`, all its layers computed by dora_linear."""
    x, dy = inputs(model, x_dtype or dtype)
    twin = dense(model, dtype)
    ops.calls.clear()
    ours = tensors(enabled(model), x, dy, autocast=autocast)
    assert calls("forward") == calls("backward") == len(layers(model))
    assert_as_good(ours, tensors(twin, x, dy, autocast=autocast), exact_tensors(twin, x, dy, autocast=autocast))


CASES = {
    "float32": {},
    "dropout": {"lora_dropout": 0.5},
    "two adapters": {"adapters": 2},
    "three adapters, two with dropout": {"adapters": 3, "lora_dropout": 0.5},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "bfloat16, dropout": {"dtype": torch.bfloat16, "lora_dropout": 0.5},
    "bfloat16 adapters": {"dtype": torch.bfloat16, "autocast_adapter_dtype": False},
    "autocast": {"autocast": torch.bfloat16},
    "autocast over bfloat16": {"autocast": torch.bfloat16, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize(
    "case, backend",
    [(case, "reference") for case in CASES]
    # the kernels of every format have tests of their own; here it is the way to them
    + [(case, "triton") for case in ("float32", "bfloat16, dropout", "autocast")],
)
def test_output_and_every_gradient(case, backend):
    config = dict(CASES[case])
    autocast = config.pop("autocast", None)
    with options(backend=backend):
        assert_parity(build("nf4", **config), config.get("dtype", torch.float32), autocast=autocast)


@pytest.mark.parametrize("case", ["three adapters, two with dropout", "bfloat16"])
@pytest.mark.parametrize("sizes", [STRADDLING, ALIGNED, TRAPPED], ids=["straddling", "aligned", "trapped"])
@pytest.mark.parametrize("format", FORMATS)
def test_formats_and_shapes(format, sizes, case):
    config = CASES[case]
    assert_parity(build(format, sizes=sizes, **config), config.get("dtype", torch.float32))


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.5}, {"adapters": 2}], ids=str)
@pytest.mark.parametrize("sizes", [STRADDLING, ALIGNED], ids=["straddling", "aligned"])
@pytest.mark.parametrize("format", FORMATS)
def test_stock_peft(format, sizes, settings):
    """Its own layers over the library's own product, in train mode."""
    model = build(format, sizes=sizes, **settings)
    x, dy = inputs(model)
    stock, ours = tensors(copy.deepcopy(model), x, dy), tensors(enabled(model), x, dy)
    assert stock.keys() == ours.keys()
    for name, value in ours.items():
        assert value.dtype == stock[name].dtype and rms_error(value, stock[name]) < 2e-6, name


@pytest.mark.parametrize("format", FORMATS)
def test_eval(format):
    """Exact in eval mode too, where bitsandbytes rounds x to 8 bits, or repacks its weight and computes in bfloat16.

    Inside frozen_adapters norm and gain are kept from call to call.
    """
    model = build(format, sizes=ALIGNED, lora_dropout=0.5).eval()
    x, _ = inputs(model)
    expected = dense(model, torch.float32).eval()(x)
    ours = enabled(model)
    before = [quant.read(layer.base_layer).tensors for layer in layers(ours)]
    with torch.no_grad():
        assert rms_error(ours(x), expected) < 2e-6
    with dora_kernels.frozen_adapters(ours):
        assert rms_error(ours(x), expected) < 2e-6
        kept = [reuse.store.by_layer[layer].norm for layer in layers(ours)]
        assert rms_error(ours(x), expected) < 2e-6
        assert all(reuse.store.by_layer[layer].norm is norm for layer, norm in zip(layers(ours), kept, strict=True))
    for layer, tensors_before in zip(layers(ours), before, strict=True):
        assert all(map(torch.equal, quant.read(layer.base_layer).tensors, tensors_before))


def test_reuse_sees_a_weight_that_changed():
    model = enabled(build("nf4", sizes=ALIGNED)).eval()
    x, _ = inputs(model)
    with torch.no_grad(), dora_kernels.frozen_adapters(model):
        first = model(x)
        layers(model)[0].base_layer.weight.quant_state.absmax.add_(3)
        assert rms_error(model(x), dense(model, torch.float32)(x)) < 2e-6 < rms_error(first, model(x))


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_ten_optimizer_steps(format):
    stock = build(format, sizes=ALIGNED, lora_dropout=0.1)
    ours = enabled(stock)
    if format == "int8":
        stock = dense(stock, torch.float32)  # on a CPU PEFT loses the scales of an 8-bit layer in the first step
    x, target = inputs(ours)
    losses = []
    for model in (stock, ours):
        torch.manual_seed(7)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([training_step(model, optimizer, x, target) for _ in range(10)])
    assert losses[0][-1] < 0.9 * losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = enabled(build("nf4", lora_dropout=0.5, adapters=3))
    x, dy = inputs(model)
    plain = tensors(model, x, dy)
    ops.calls.clear()
    checkpointed = tensors(model, x, dy, call=functools.partial(checkpoint, model, use_reentrant=reentrant))
    assert calls("forward") == 4 and calls("backward") == 2
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)


@pytest.mark.parametrize("adapters", [1, 3])
def test_nothing_dense_is_saved(adapters):
    """For the backward pass: the packed weight and activations, and no weight decoded for a product."""
    model = enabled(build("nf4", sizes=(256, 256, 256), adapters=adapters, lora_dropout=0.5))
    x, dy = inputs(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        saved = []
        model(x[0]).backward(dy[0])
    assert saved and max(tensor.nbytes for tensor in saved) <= 256 * 256 // 2


def test_compute_dtype():
    """What a Linear4bit computes in, whatever x is: x is cast to it, and y back to the dtype of x."""
    model = build("nf4", sizes=ALIGNED, settings={"compute_dtype": torch.bfloat16})
    x, dy = inputs(model)
    stock, ours, twin = model, enabled(model), dense(model, torch.float32)
    expected, exact = tensors(stock, x, dy), exact_tensors(twin, x, dy)
    for name, value in tensors(ours, x, dy).items():
        assert value.dtype == expected[name].dtype
        assert rms_error(value, exact[name]) < max(2 * rms_error(expected[name], exact[name]), 2**-7), name
    assert rms_error(ours(x), exact["y"]) > 1e-5  # it is not computed in float32


@contextlib.contextmanager
def cuda_autocast():
    """Autocast to bfloat16 on the device of the tests, and PEFT, which asks for CUDA's, told that it is on."""
    enabled_on = torch.is_autocast_enabled
    with torch.autocast(DEVICE, dtype=torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda *device: enabled_on(*device) if device else True)
        yield


@pytest.mark.parametrize("format", ["nf4", "int8", "hqq"])
def test_no_float32_leaks_under_autocast(format):
    """Under CUDA's autocast PEFT's quantized layers return float32, promoted by the magnitude; nn.Linear does not."""
    model = build(format, dtype=torch.bfloat16)
    ours = enabled(model)
    x, _ = inputs(model, torch.bfloat16)
    with cuda_autocast():
        leaked, y = model(x), ours(x)
    assert leaked.dtype == torch.float32 and y.dtype == torch.bfloat16
    assert rms_error(y, leaked) < 2**-6


def test_dropout_draws_what_peft_draws_under_autocast(monkeypatch):
    """In the dtype of x, where its layers over nn.Linear draw in that of the adapter."""
    model = build("nf4", dtype=torch.bfloat16, lora_dropout=0.3)
    x, _ = inputs(model, torch.bfloat16)
    drawn, dropout = [], torch.nn.functional.dropout
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, *args: drawn.append(x.dtype) or dropout(x, *args))
    for each in (model, enabled(model)):
        with cuda_autocast():
            each.up(x)
    assert drawn == [torch.bfloat16] * 2


@pytest.mark.parametrize("format", ["nf4", "int8", "hqq", "torchao int8"])
def test_compiles_without_a_graph_break(format):
    model = enabled(build(format, lora_dropout=0.5))
    x, dy = inputs(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(tensors(model, x, dy, call=compiled), tensors(model, x, dy))


def test_compiles_with_adapters_off():
    model = enabled(build("nf4", sizes=ALIGNED))
    x, _ = inputs(model)
    with model.disable_adapter():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))


# What bitsandbytes does on a CPU is not passed on.


@pytest.fixture
def trapped():
    """An enabled model whose weights bitsandbytes decodes wrongly on this machine."""
    model = build("nf4", sizes=TRAPPED)
    if not quant.is_decoded_wrongly(quant.read(layers(model)[0].base_layer)):
        pytest.skip("bitsandbytes decodes these widths rightly here")
    return model


def test_wrong_decoding_is_reported(trapped):
    x, dy = inputs(trapped)
    stock, exact = tensors(trapped, x, dy), exact_tensors(dense(trapped, torch.float32), x, dy)
    assert rms_error(stock["y"], exact["y"]) > 1e-3  # when bitsandbytes stops doing this, the documentation changes
    report = enable(trapped)
    assert len(report.taken_over) == 2
    assert all("decodes K = " in layer.reason and "wrongly on this CPU" in layer.reason for layer in report.taken_over)
    assert rms_error(tensors(trapped, x, dy)["y"], exact["y"]) < 2e-6


def test_wrong_decoding_is_refused(trapped):
    """What would go to bitsandbytes: its product, and what PEFT merges."""
    model = enabled(trapped)
    x, _ = inputs(model)
    refused = "decodes K = 48 in blocks of 64 wrongly on this CPU; expected a GPU"
    with model.disable_adapter(), pytest.raises(ValueError, match=f"forward: bitsandbytes {refused}"):
        model(x)
    with pytest.raises(ValueError, match=f"merge: bitsandbytes {refused}"):
        model.merge_adapter()


def test_weight_that_was_repacked(caplog, monkeypatch):
    """By stock PEFT in eval mode, before enable or while adapters are off."""
    monkeypatch.setattr(devices, "_logged", set())
    caplog.set_level(logging.WARNING, "dora_kernels")
    model = enabled(build("nf4", sizes=ALIGNED))
    x, dy = inputs(model)
    before = tensors(model, x, dy)
    with torch.no_grad(), model.eval().disable_adapter():
        model(x)
    if not quant.is_packed_for_cpu(layers(model)[0].base_layer.weight):
        pytest.skip("bitsandbytes repacks on CPUs with AVX512_BF16 alone")
    after = tensors(model.train(), x, dy)
    assert "repacked a weight" in caplog.text and len(caplog.messages) == 1
    assert all(rms_error(after[name], before[name]) < 2**-6 for name in before)
    assert not quant.is_packed_for_cpu(layers(model)[0].base_layer.weight)


# The model stays PEFT's.


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "hqq"])
def test_merged_weights_are_peft_s(format):
    """Decoded, merged and quantized again; and the merged model computes with them."""
    stock = build(format, sizes=ALIGNED)
    ours = enabled(stock)
    x, _ = inputs(stock)
    expected = ours(x)
    for model in (stock, ours):
        model.merge_adapter()
    for one, other in zip(layers(stock), layers(ours), strict=True):
        one, other = (quant.read(layer.base_layer).dequantize() for layer in (one, other))
        assert torch.equal(one, other)
    ops.calls.clear()
    assert rms_error(ours(x), expected) < 0.2 and not ops.calls
    ours.unmerge_adapter()
    assert rms_error(ours(x), expected) < 0.3 and calls("forward") == 2


def test_merged_after_it_was_repacked():
    """Or PEFT would decode a scrambled weight."""
    model = enabled(build("nf4", sizes=ALIGNED)).eval()
    x, _ = inputs(model)
    expected = model(x)
    with torch.no_grad(), model.disable_adapter():
        model(x)
    model.merge_adapter()
    assert rms_error(model(x), expected) < 0.2


@pytest.mark.parametrize("format", FORMATS)
def test_disable_gives_every_layer_back(format):
    model = build(format, sizes=ALIGNED, adapters=2)
    classes = [type(layer) for layer in layers(model)]
    state = copy.deepcopy(model.state_dict()) if format != "hqq" else None
    report = enable(model)
    assert report == enable(model) and [layer.reason for layer in report.taken_over] == ["", ""]
    assert all(issubclass(type(layer), cls) for layer, cls in zip(layers(model), classes, strict=True))
    assert state is None or list(model.state_dict()) == list(state)
    assert disable(model).taken_over == [] and [type(layer) for layer in layers(model)] == classes
    x, _ = inputs(model)
    ops.calls.clear()
    model(x)
    assert not ops.calls


def test_copies_are_ours_and_independent():
    model = enabled(build("nf4"))
    x, _ = inputs(model)
    twin = copy.deepcopy(model)
    expected = model(x)
    assert torch.equal(twin(x), expected)
    assert [type(layer) for layer in layers(twin)] == [type(layer) for layer in layers(model)]
    assert pickle.loads(pickle.dumps(type(layers(twin)[0]))) is type(layers(twin)[0])
    with torch.no_grad():
        layers(twin)[0].base_layer.weight.quant_state.absmax.add_(3)
    assert torch.equal(model(x), expected) and not torch.equal(twin(x), expected)


def dynamic_torchao(layer):
    quantization = pytest.importorskip("torchao.quantization")
    layer.base_layer = torch.nn.Linear(64, 128)
    quantization.quantize_(layer.base_layer, quantization.Int8DynamicActivationInt8WeightConfig())


LEFT_ALONE = {
    "has_fp16_weights=True": ("int8", lambda layer: setattr(layer.base_layer.weight, "has_fp16_weights", True)),
    "not quantized yet": ("nf4", lambda layer: setattr(layer.base_layer.weight, "quant_state", None)),
    "base_layer has hooks": ("nf4", lambda layer: layer.base_layer.register_forward_hook(lambda *args: None)),
    "packed as 8bit_u8": ("hqq", lambda layer: layer.base_layer.meta.update(packing="8bit_u8")),
    "expected HQQLinear": ("hqq", lambda layer: setattr(layer, "base_layer", torch.nn.Linear(64, 128))),
    "quantize or scale x too": ("torchao int8", dynamic_torchao),
}


@pytest.mark.parametrize("before", [False, True], ids=["stock", "enabled before"])
@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_left_alone(reason, before):
    format, change = LEFT_ALONE[reason]
    model = build(format, sizes=ALIGNED)
    cls = type(layers(model)[0])
    if before:
        enable(model)
    change(layers(model)[0])
    report = enable(model)
    assert len(report.taken_over) == 1 and reason in report.left_alone[0].reason
    assert type(layers(model)[0]) is cls


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_call_goes_to_peft(format):
    stock = build(format, sizes=ALIGNED)
    ours = enabled(stock)
    x, _ = inputs(stock)
    ops.calls.clear()
    with stock.disable_adapter(), ours.disable_adapter():
        assert torch.equal(stock(x), ours(x))
    assert not ops.calls


def test_double_x_goes_to_peft():
    model = enabled(build("int8"))
    x, _ = inputs(model, torch.float64)
    ops.calls.clear()
    model.up(x)
    assert not ops.calls
