"""torch.onnx.export of layers that are ours, by both exporters: what onnxruntime computes is what eager does.

Stock models are exported beside: where a library's own layer cannot be, ours need not.
"""

import contextlib
import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dora_kernels
from dora_kernels import DoraLinear, dora_linear, merge_weight, weight_norm
from dora_kernels.functional.rescale import rescale
from dora_kernels.quant import QuantizedWeight, flatten_weight
from tests.support.packed_weights import quantized
from tests.support.problem import DEVICE

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("peft")

from dora_kernels.extras.serving import AdapterBank, bank_linear  # noqa: E402
from tests.support import layer_kinds, peft_problem, quantized_problem  # noqa: E402
from tests.support.llama_problem import stock_llama  # noqa: E402

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="onnxruntime's CPU provider is the one that is asked"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

EXPORTERS = ("traced", "dynamo", "a program")
ROUNDING = 1e-6
"""A relative RMS of float32. Each layer's own is about 2e-7, stock or ours."""


def exported(model, inputs, exporter, free=None, **options):
    """The bytes of an ONNX model. free: the names of free dimensions of each input, {dimension: name}."""
    file = io.BytesIO()
    if exporter == "traced":
        names = [f"x{i}" for i in range(len(inputs))]
        axes = None if free is None else dict(zip(names, free, strict=True))
        torch.onnx.export(model, inputs, file, dynamo=False, input_names=names, dynamic_axes=axes, **options)
        return file.getvalue()
    shapes = None
    if free is not None:
        shapes = tuple({dimension: torch.export.Dim.DYNAMIC for dimension in one} for one in free)
        shapes = (shapes,) if isinstance(model, Several) else shapes
    if exporter == "a program":
        with torch.no_grad():
            model = torch.export.export(model, inputs, dynamic_shapes=shapes)
        assert "dora_kernels." in str(model.graph)
        shapes = None
    torch.onnx.export(model, inputs, dynamo=True, verbose=False, dynamic_shapes=shapes, **options).save(file)
    return file.getvalue()


def run(program, inputs):
    session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feed)]


@torch.no_grad()
def errors(program, model, inputs):
    """The relative RMS error against eager of each output; that of zeros is 1."""
    actual, expected = run(program, inputs), layer_kinds.leaves(model(*inputs))
    assert [(y.dtype, y.shape) for y in actual] == [(y.dtype, y.shape) for y in expected]
    return [((a - e).double().norm() / e.double().norm()).item() for a, e in zip(actual, expected, strict=True)]


def assert_eagers(program, model, inputs, limit=ROUNDING):
    found = errors(program, model, inputs)
    assert found and max(found) <= limit, found


class Several(nn.Module):
    """Models side by side, each with an input of its own: an export takes a second, of one layer or of ten."""

    def __init__(self, models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *inputs):
        return tuple(model(x) for model, x in zip(self.models, inputs, strict=True))


def stock_and_ours(names):
    """Several stock models, the same enabled, and their inputs; of the libraries that are here."""
    made = []
    for name in names:
        with contextlib.suppress(pytest.skip.Exception):
            made.append(layer_kinds.pair(name, torch.float32))
    stocks, ours, inputs = zip(*made, strict=True)
    return Several(stocks).eval(), Several(ours).eval(), inputs


# torch.jit.trace takes LyCORIS' tensors, which are attributes and need gradients, for constants
NOT_TRACED = [name for name in layer_kinds.STOCK if name.startswith("lycoris")]
FEW = ("peft", "peft, two adapters", "peft, GPT-2", "peft, conv2d", "peft, embedding", "lycoris")


LIBRARY_LAYERS = [
    *((exporter, FEW) for exporter in EXPORTERS[:2]),
    *(pytest.param(exporter, tuple(layer_kinds.STOCK), marks=pytest.mark.nightly) for exporter in EXPORTERS),
]


@pytest.mark.parametrize(
    "exporter, names", LIBRARY_LAYERS, ids=lambda value: value if isinstance(value, str) else len(value)
)
def test_library_layers(exporter, names):
    """After a call in eval mode, which has kept norms where that is asked for."""
    traced = exporter == "traced"
    stock, ours, inputs = stock_and_ours([name for name in names if not (traced and name in NOT_TRACED)])
    with torch.no_grad():
        ours(*inputs)
    program = exported(ours, inputs, exporter)
    assert_eagers(program, ours, inputs)
    assert_eagers(program, stock, inputs)
    if traced:
        assert_eagers(exported(stock, inputs, exporter), stock, inputs)


@pytest.mark.nightly
@pytest.mark.parametrize("name", NOT_TRACED)
def test_what_stock_cannot_be_exported_as(name):
    stock, ours, x = layer_kinds.pair(name, torch.float32)
    for model in (stock.eval(), ours.eval()):
        with pytest.raises(RuntimeError, match="Cannot insert a Tensor that requires grad as a constant"):
            exported(model, (x,), "traced")


class Own(nn.Module):
    """All that a user's own module may call."""

    def __init__(self, bank=True):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.dvora = layer(), layer_kinds.dvora_linear()[0]
        self.merged = layer()
        self.merged.merge()
        factors = (self.layer.weight.detach(), self.layer.lora_A.weight, self.layer.lora_B.weight)
        self.bank = None
        if bank:
            scaling, gain = torch.tensor([0.5, 2.0]), torch.rand(2, 20) + 0.5
            lora_A, lora_B = (torch.stack([factor, factor.flip(0)]).detach() for factor in factors[1:])
            self.bank = AdapterBank(lora_A.flatten(0, 1), lora_B, gain, scaling)

    def forward(self, x, wide):
        layer = self.layer
        adapter = (layer.weight.detach(), layer.lora_A.weight, layer.lora_B.weight)
        magnitude, scaling = layer.lora_magnitude_vector, layer.scaling
        norm = weight_norm(*adapter, scaling, norm_grad=True)
        made = [
            layer(x),
            self.dvora(wide),
            self.merged(x),
            dora_linear(x, *adapter, magnitude, scaling, layer.bias, norm_grad=True),
            rescale(F.linear(x, adapter[0]), F.linear(x, adapter[1]), adapter[2], magnitude / norm, scaling),
            F.linear(x, merge_weight(*adapter, magnitude, scaling)),
            norm,
        ]
        if self.bank is not None:
            with torch.no_grad():
                index = torch.arange(x.shape[0]) % 3 - 1
                made.append(bank_linear(x.detach(), adapter[0], self.bank, index, layer.bias.detach()))
        return tuple(made)


def layer(N=20, K=24):
    torch.manual_seed(N)
    made = DoraLinear(K, N, rank=5, alpha=7.0).eval()
    with torch.no_grad():
        nn.init.normal_(made.lora_B.weight)
        made.lora_magnitude_vector.mul_(1 + 0.5 * torch.randn(N).tanh())
        made.weight[4], made.lora_B.weight[4] = 0, 0  # a row whose norm is 0
    return made


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_own_layers_and_functions(exporter):
    """With free batch and length: M is 15 where it was 6."""
    model = Own().eval()
    inputs = (torch.randn(2, 3, 24), torch.randn(2, 3, 48))
    free = ({0: "batch", 1: "length"},) * 2
    program = exported(model, inputs, exporter, free)
    for sizes in ((2, 3), (3, 5)):
        assert_eagers(program, model, (torch.randn(*sizes, 24), torch.randn(*sizes, 48)))


def of_parameters(program, values):
    """`program` with other values for its initialisers, by the names that the model's parameters have."""
    graph = onnx.load_from_string(program)
    held = {one.name: one for one in graph.graph.initializer}
    assert values.keys() <= held.keys()
    for name, value in values.items():
        assert tuple(held[name].dims) == value.shape
        held[name].CopyFrom(onnx.numpy_helper.from_array(value.numpy(), name))
    return graph.SerializeToString()


SITUATIONS = [
    *((exporter, "inside") for exporter in EXPORTERS),
    ("traced", "warm"),
    *(pytest.param(exporter, "warm", marks=pytest.mark.nightly) for exporter in EXPORTERS[1:]),
]


@pytest.mark.parametrize("exporter, situation", SITUATIONS)
def test_the_program_follows_its_weights(exporter, situation):
    """Nothing that was kept is in it: norm and gain are made of the weights, which keep their names."""
    model, inputs = (
        Several([layer(), *stock_and_ours(["peft"])[1].models]).eval(),
        (torch.randn(3, 24), torch.randn(3, 8)),
    )
    plain = {"do_constant_folding": False} if exporter == "traced" else {"optimize": False}
    with torch.no_grad():
        scope = dora_kernels.frozen_adapters(model) if situation == "inside" else contextlib.nullcontext()
        with scope:
            before = model(*inputs)
            program = exported(model, inputs, exporter, **plain)
        values = {name: 1.5 * p.detach() + 0.1 for name, p in model.named_parameters()}
        twin = copy.deepcopy(model)
        for name, p in twin.named_parameters():
            p.copy_(values[name])
        assert not torch.allclose(twin(*inputs)[0], before[0], rtol=0.1)
    assert_eagers(of_parameters(program, values), twin, inputs)
    assert_eagers(program, model, inputs)


class Quantized(nn.Module):
    """dora_linear over a quantized weight whose parts are buffers."""

    def __init__(self, weight):
        super().__init__()
        torch.manual_seed(0)
        tensors, self.format, self.numbers, self.dtype = flatten_weight(weight)
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"part{i}", tensor)
        (N, K), self.count = weight.shape, len(tensors)
        self.shape = N, K
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(3, K)), nn.Parameter(torch.randn(N, 3) / K)
        self.magnitude = nn.Parameter(torch.rand(N) + 0.5)

    def forward(self, x):
        parts = tuple(getattr(self, f"part{i}") for i in range(self.count))
        weight = QuantizedWeight(self.format, self.shape, self.dtype, parts, tuple(self.numbers))
        return dora_linear(x, weight, self.lora_A, self.lora_B, self.magnitude, 0.7)


@pytest.mark.parametrize("exporter", ("traced", "dynamo"))
def test_quantized_weights(exporter):
    """Of more elements than an exporter folds, and than are decoded in a block; a codebook is refused by name."""
    models = [Quantized(quantized(kind, 520, 512)) for kind in ("int8", "hqq4 axis 0", "hqq4 axis 1")]
    inputs = (torch.randn(3, 512),) * 3
    assert_eagers(exported(Several(models).eval(), inputs, exporter), Several(models), inputs)
    with pytest.raises(Exception) as raised:
        exported(Quantized(quantized("codebook4", 12, 16)).eval(), (torch.randn(3, 16),), exporter)
    assert "weight is codebook4, whose decoder writes in place; expected a dense weight" in messages(raised.value)


def messages(error):
    return str(error) + (messages(error.__cause__) if error.__cause__ else "")


@pytest.mark.parametrize("exporter", ("traced", "dynamo"))
def test_half_precision(exporter):
    """float32 adapters over a float16 weight, and all in float16: as near to eager as a rounding."""
    stocks = [peft_problem.build(torch.float16, autocast_adapter_dtype=wide).eval() for wide in (True, False)]
    ours = Several([peft_problem.enabled(stock) for stock in stocks]).eval()
    inputs = (torch.randn(5, 24, dtype=torch.float16),) * 2
    assert_eagers(exported(ours, inputs, exporter), ours, inputs, 1e-3)
    if exporter == "traced":
        stock = Several(stocks).eval()
        assert_eagers(exported(stock, inputs, exporter), stock, inputs, 2e-3)


def test_dvora_in_peft_is_exported_by_one_and_refused_by_the_other():
    model, x = layer_kinds.ENABLED["to_dvora"]()
    assert_eagers(exported(model.eval(), (x,), "dynamo"), model, (x,))
    with pytest.raises(
        ValueError, match="torch.jit.trace is recording, so the call is PEFT's, and PEFT computes no DVoRA"
    ):
        exported(model, (x,), "traced")


@pytest.mark.nightly
def test_autocast():
    """Around torch.export, whose program is handed over, or around a trace.

    Around the exporter of programs it is an error: a later pass of it runs float32 products again, in bfloat16.
    """
    model, x = layer(), torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model(x)
        with pytest.raises(torch.onnx.OnnxExporterError, match="does not agree with type promotion rule"):
            exported(model, (x,), "dynamo")
        program = torch.export.export(model, (x,))
        traced = exported(model, (x,), "traced")
    for made in (traced, exported(program, (x,), "dynamo")):
        evaluator = onnx.reference.ReferenceEvaluator(onnx.load_from_string(made))
        (y,) = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
        y = torch.from_numpy(y.astype("float64"))
        assert (y - expected.double()).norm() <= 1e-2 * expected.double().norm()


@pytest.mark.nightly
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_merged_and_disabled_layers(exporter):
    """What is then the library's, among layers that are not."""
    models = [peft_problem.enabled(peft_problem.build()).eval() for _ in range(4)]
    models[1].base_model.merge_adapter()
    models[2].base_model.disable_adapter_layers()
    dora_kernels.serving.merge_model(models[3])
    model, inputs = Several(models).eval(), (torch.randn(5, 24),) * 4
    assert_eagers(exported(model, inputs, exporter), model, inputs)


@pytest.mark.nightly
@pytest.mark.parametrize("exporter", ("dynamo", "a program"))
@pytest.mark.parametrize("format", ("hqq", "torchao int8"))
def test_quantized_layers(format, exporter):
    """HQQ's layer is none that torch.jit.trace takes, bitsandbytes' none that torch.export does: stock ones, either."""
    pytest.importorskip({"hqq": "hqq", "torchao int8": "torchao"}[format])
    stock = quantized_problem.build(format, sizes=(640, 1024, 512)).eval()
    ours, inputs = peft_problem.enabled(stock).eval(), (torch.randn(5, 640),)
    assert_eagers(exported(ours, inputs, exporter), ours, inputs)
    assert_eagers(exported(stock, inputs, "dynamo"), stock, inputs)


class Language(nn.Module):
    """The first output of a language model as a function of its tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids)[0]


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    return peft_problem.adapt(transformers.BertModel(config), target_modules=["query", "key", "value", "dense"])


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, use_cache=False)
    model = transformers.GPT2LMHeadModel(config)
    return peft_problem.adapt(model, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "make, exporter",
    [(stock_llama, "dynamo"), (stock_llama, "a program"), (bert, "traced"), (bert, "dynamo"), (gpt2, "dynamo")],
)
def test_language_models_with_free_batch_and_length(make, exporter):
    """Llama's and GPT-2's masks have an operator that the tracing exporter does not know, of stock models, too."""
    stock = make().eval()
    model, ids = Language(peft_problem.enabled(stock)).eval(), torch.randint(64, (2, 8))
    free = ({0: "batch", 1: "length"},)
    for one, way in ((model, exporter), (Language(stock).eval(), "traced" if exporter == "traced" else "dynamo")):
        program = exported(one, (ids,), way, free)
        for sizes in ((2, 8), (3, 11), (1, 5)):
            assert_eagers(program, one, (torch.randint(64, sizes),), 2e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("opset", (18, 21, 23))
def test_opsets(opset):
    stock, ours, inputs = stock_and_ours(FEW)
    assert_eagers(exported(ours, inputs, "dynamo", opset_version=opset), ours, inputs)
    if opset < 21:
        names = [name for name in FEW if name not in NOT_TRACED]
        stock, ours, inputs = stock_and_ours(names)
        assert_eagers(exported(ours, inputs, "traced", opset_version=opset), ours, inputs)
