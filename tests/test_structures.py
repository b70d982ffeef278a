"""Layers known by structure: each restated layer (structures.py) is taken over, and what only looks like one is not."""

import copy
import importlib
import io

import pytest
import torch
from torch import nn

import dora_kernels
from dora_kernels import launch, ops
from dora_kernels.adapters import STRUCTURES, probe
from dora_kernels.testing import rms_error
from tests import structures
from tests.conformance import CHECKS, DEVICE, Case, randomise
from tests.structures import DORA, DoRALinear, LinearLoRA, Llava, Llm, Parallel


def case(make, bias=True, **more):
    """A Case of one layer, made of an nn.Linear of random sizes, with an x of three dimensions."""

    def build(shapes, dtype):
        K, N = shapes.randrange(9, 40), shapes.randrange(9, 40)
        linear = nn.Linear(K, N, bias=bias).requires_grad_(False)
        layer = nn.Sequential(randomise(make(linear)).to(DEVICE, dtype))
        return layer, torch.randn(2, shapes.randrange(3, 9), K, device=DEVICE, dtype=dtype)

    return Case(build, **more)


def first(model, x):
    """y of a layer that returns its bias beside it."""
    return model(x)[0]


CASES = {
    "llm": case(Llm.Linear),
    "llm, dropout": case(lambda linear: Llm.Linear(linear, dropout=0.5)),
    "llm, norm_grad": case(lambda linear: Llm.Linear(linear, dora_simple=False), bias=False),
    "llm, magnitude alone": case(lambda linear: Llm.Linear(linear, Wdecompose=True, dropout=0.3)),
    "vl-t5 simple": case(structures.DoraLinear_simple),
    "vl-t5": case(structures.DoraLinear),
    "llava": case(lambda linear: Llava.Linear(linear, dropout=0.5)),
    "fsdp_qlora": case(lambda linear: DORA(linear, linear.weight.norm(dim=1))),
    "fsdp_qlora, no bias": case(lambda linear: DORA(linear, linear.weight.norm(dim=1)), bias=False),
    "megatron": case(lambda linear: DoRALinear(Parallel(linear), dropout=0.5), call=first),
    "megatron, layer norm": case(lambda linear: DoRALinear(structures.LayerNormParallel(linear)), call=first),
    "megatron, added bias": case(lambda linear: DoRALinear(Parallel(linear, adds_bias=True), dropout=0.5), call=first),
    "automodel": case(LinearLoRA.patch),
    "automodel, post": case(lambda linear: LinearLoRA.patch(linear, dropout=0.5)),
    "automodel, pre": case(lambda linear: LinearLoRA.patch(linear, dropout=0.5, position="pre"), bias=False),
}


def only(layer):
    """What enable() says of `layer`, which it finds once."""
    (report,) = dora_kernels.enable(nn.Sequential(layer)).layers
    return report


def make(name, seed=0):
    """The layer of a case in train mode, as it is in its library, and an x."""
    model, x = CASES[name].make(seed)
    return model[0], x


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_conformance(name, check):
    CHECKS[check](CASES[name], "reference", seed=len(name))


@pytest.mark.parametrize("name", CASES)
def test_conformance_with_the_kernels(name):
    CHECKS["parity"](CASES[name], "triton", seed=len(name))


@pytest.mark.parametrize("kind", ["nf4", "hqq"])
def test_fsdp_qlora_over_a_quantised_weight(kind):
    problem = pytest.importorskip("tests.quantized_problem")

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
        twin = DORA(dense, layer.magnitude_layer.magnitude)
        for name in ("magnitude_layer", "dora_layer"):
            getattr(twin, name).load_state_dict(getattr(layer, name).state_dict())
        return nn.Sequential(twin).double()

    quantised = Case(build, exact)
    CHECKS["parity"](quantised, "reference", 0)
    model, x = quantised.make(0)
    assert only(model[0]).taken_over
    y, (weight, bias) = model(x), model[0].merged_weight_and_bias()
    assert rms_error(nn.functional.linear(x, weight, bias), y.detach().double()) < 1e-5
    CHECKS["training"](quantised, "reference", 0)


EDITED = {
    structures.LlmWithEps: "something else than x W^T",
    structures.LlmWithScaledBias: "something else than x W^T",
    structures.LlmWithOneDropout: "in train mode",
    structures.LlmWithFlowingNorm: "see dx?lora_A",
    structures.LlmWithGate: "a tensor that is no part of a DoRA layer: gate",
    structures.LlmThatRaises: "could not be checked: RuntimeError: a mask is needed",
}


@pytest.mark.parametrize("cls", EDITED)
def test_an_edited_copy_is_left_alone_and_the_report_says_why(cls):
    layer = randomise(cls(nn.Linear(12, 9), dropout=0.5))
    report = only(layer)
    assert not report.taken_over and type(layer) is cls
    assert EDITED[cls].replace("dx?", "d") in report.reason, report.reason


@pytest.mark.parametrize("cls", [structures.LlmWithEps, structures.LlmWithScaledBias])
def test_an_edited_copy_is_found_out_however_fresh_its_adapter(cls):
    """B = 0 and gain 1: the layer itself computes the same."""
    assert not only(cls(nn.Linear(12, 9), dropout=0.5)).taken_over


def test_an_edited_dropout_is_found_out_before_it_drops():
    layer = randomise(LinearLoRA.patch(nn.Linear(12, 9), dropout=0.0))
    layer.__class__ = type("PatchedLinearLoRA", (structures.LinearLoRAWithDroppedOutput, nn.Linear), {})
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
                structures.norms(self.direction()).detach() + self.has_eps * 1e-8
            )

    layers = [Optional(nn.Linear(12, 9)), Optional(nn.Linear(12, 9))]
    layers[1].has_eps = True
    report = dora_kernels.enable(nn.Sequential(*layers))
    assert [layer.taken_over for layer in report.layers] == [True, False]


@pytest.mark.parametrize("name", ["llm, dropout", "automodel, post", "megatron"])
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
    assert not calls and layer.training and launch.current_options().backend == "auto"
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert all(parameters[key] is value for key, value in layer.named_parameters())
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_enable_in_inference_mode_and_on_the_meta_device(monkeypatch):
    monkeypatch.setattr(probe, "_results", {})
    layer, _ = make("llava")
    with torch.inference_mode():
        assert only(layer).taken_over
    monkeypatch.setattr(probe, "_results", {})
    with torch.device("meta"):
        assert only(Llm.Linear(nn.Linear(12, 9))).taken_over


def broken(change):
    """A layer of each kind of break, by what is wrong with it."""
    layer = Llm.Linear(nn.Linear(12, 9))
    change(layer)
    return layer


LEFT_ALONE = {
    "fan_in_fan_out is set": lambda: broken(lambda layer: setattr(layer, "fan_in_fan_out", True)),
    "weight_m_wdecomp has shape (1, 9)": lambda: broken(
        lambda layer: setattr(layer, "weight_m_wdecomp", nn.Linear(9, 1, bias=False))
    ),
    "lora_B has shape (9, 3)": lambda: broken(lambda layer: setattr(layer, "lora_B", nn.Linear(3, 9, bias=False))),
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
    """How many layers of `model` each structure claims."""
    files = (importlib.import_module(f"dora_kernels.adapters.{name}") for name in STRUCTURES)
    return [len(list(file.layers(model))) for file in files]


def test_layers_of_packages_are_not_claimed():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(use_dora=True, target_modules=["0"]))
    assert claimed(model) == [0] * len(STRUCTURES)
    assert [layer.library for layer in dora_kernels.enable(model).layers] == ["peft"]
    assert claimed(model) == [0] * len(STRUCTURES)


def test_layers_of_torchtune_are_not_claimed():
    libraries = pytest.importorskip("tests.libraries")
    assert claimed(libraries.torchtune_layer(8, 8, 4)) == [0] * len(STRUCTURES)


@pytest.mark.parametrize("name", CASES)
def test_each_layer_is_claimed_once(name):
    assert sorted(claimed(make(name)[0])) == [0, 0, 0, 0, 1]


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
    ours, x = make("automodel")
    assert only(ours).taken_over
    with pytest.raises(RuntimeError, match="dtype"):
        ours(x.bfloat16())
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
