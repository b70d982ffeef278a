"""torch.onnx.export of layers that are ours, by both exporters: what onnxruntime computes is what eager does.

Stock models are exported beside: where a library's own layer cannot be, ours need not.
"""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dora_kernels import DoraLinear, dora_linear, merge_weight, weight_norm
from dora_kernels.functional.rescale import rescale
from tests.support.problem import DEVICE

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("peft")

from dora_kernels.extras.serving import AdapterBank, bank_linear  # noqa: E402
from tests.support import layer_kinds  # noqa: E402

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
    """Several stock models, the same enabled, and their inputs."""
    stocks, ours, inputs = zip(*(layer_kinds.pair(name, torch.float32) for name in names), strict=True)
    return Several(stocks).eval(), Several(ours).eval(), inputs


# torch.jit.trace takes LyCORIS' tensors, which are attributes and need gradients, for constants
NOT_TRACED = [name for name in layer_kinds.STOCK if name.startswith("lycoris")]
FEW = ("peft", "peft, two adapters", "peft, GPT-2", "peft, conv2d", "peft, embedding", "lycoris")
PROGRAMS = [pytest.param("a program", marks=pytest.mark.nightly)]


@pytest.mark.parametrize("names", [FEW, pytest.param(tuple(layer_kinds.STOCK), marks=pytest.mark.nightly)], ids=len)
@pytest.mark.parametrize("exporter", EXPORTERS)
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
