"""fast_init: a model that starts inside of it is PEFT's own, to the last bit, and PEFT is left as it was."""

import contextlib
import copy
import functools
import inspect
import logging
import threading

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import dora
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses import FakeTensorMode

import dora_kernels
from dora_kernels.extras import starts
from tests.support import llama_problem, quantized_problem
from tests.support.peft_problem import LAST, ConvNet, Net, Tokens
from tests.support.problem import DEVICE

LIBRARY = vars(dora.DoraLinearLayer)["update_layer"]
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def peft_is_as_before():
    starts._log.cache_clear()
    yield
    assert vars(dora.DoraLinearLayer)["update_layer"] is LIBRARY
    assert not starts._open and not starts._depth.get()


@pytest.fixture
def library_calls(monkeypatch):
    """The layers that PEFT's own code has started inside of a context."""
    called = []

    def counted(self, **arguments):
        called.append(type(self).__name__)
        LIBRARY(self, **arguments)

    monkeypatch.setattr(starts, "_by_library", counted)
    return called


def net(kind, dtype):
    """A model for adapters on "up" and "down", or on "up" alone."""
    torch.manual_seed(1)
    if kind == "linear":
        model = Net(sizes=(192, 700, 257))
    elif kind == "transposed":
        model = Net(conv1d=True, sizes=(192, 700, 257))
    elif kind == "embedding":
        model = Tokens()
    elif kind == "scaled embedding":
        model = Tokens(scale=3.0)
    elif kind == "groups":
        model = ConvNet(2, groups=2)
    else:
        dims = int(kind[0])
        model = ConvNet(dims)
        if kind.endswith("last"):
            model = model.to(memory_format=LAST[dims])
    return model.to(DEVICE, dtype)


KINDS = ("linear", "transposed", "1-d", "2-d", "2-d last", "3-d", "3-d last", "groups", "embedding", "scaled embedding")


def config(model, **settings):
    targets = ["up", "down"] if hasattr(model, "down") else ["up"]
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 7, "use_dora": True, "target_modules": targets} | settings)


def started(model, fast, seed=5, autocast_adapter_dtype=False, **settings):
    """A PEFT model over a copy of `model`, and the random state behind its start."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    with starts.fast_init() if fast else contextlib.nullcontext():
        model = peft.get_peft_model(model, config(model, **settings), autocast_adapter_dtype=autocast_adapter_dtype)
    return model, torch.get_rng_state()


def described(model):
    """All that can be said of a model's parameters, in their order, and their bits."""
    return [
        (name, type(p), p.dtype, p.shape, p.stride(), p.device, p.requires_grad, p.is_leaf, p.detach().clone())
        for name, p in model.named_parameters()
    ]


def assert_same(stock, fast):
    expected, actual = described(stock), described(fast)
    assert [one[:-1] for one in actual] == [one[:-1] for one in expected]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one[-1], other[-1], rtol=0, atol=0, equal_nan=True, msg=one[0])


def magnitudes(model):
    return {name: p.detach() for name, p in model.named_parameters() if "magnitude" in name}


# The same bits, in every kind of layer and every dtype.


@pytest.mark.parametrize("dtype", (*HALF, torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_starts_with_the_same_bits(kind, dtype, library_calls):
    model = net(kind, dtype)
    stock, state = started(model, fast=False)
    fast, state_of_fast = started(model, fast=True)
    assert_same(stock, fast)
    assert torch.equal(state, state_of_fast)
    assert not library_calls
    # and they are the norms, by the definition
    for name, magnitude in magnitudes(fast).items():
        base = fast.get_submodule(name.partition(".lora_magnitude")[0]).base_layer
        weight = base.weight.detach().double()
        if kind in ("transposed", "embedding", "scaled embedding") and type(base) is not nn.Linear:
            weight = weight.T
        exact = weight.flatten(1).norm(dim=1)
        assert exact.min() > 0
        torch.testing.assert_close(magnitude.flatten().double(), exact, rtol=8 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("threads", (1, 2, 4))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("shape", ((1, 70000), (2, 40001), (3, 5), (257, 700), (1030, 300)), ids=str)
def test_any_size_and_number_of_threads(shape, dtype, threads):
    """A row may be summed in pieces, by several threads, where there are few rows; of the bases by blocks, too."""
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for adapter_dtype in {dtype, torch.float32}:
            assert_started_alike(weight, adapter_dtype)
            assert_started_alike(weight.T.contiguous(), adapter_dtype, fan_in_fan_out=True)
    finally:
        torch.set_num_threads(before)


def start(base, lora_A, lora_B, scaling, fast, cls=dora.DoraLinearLayer, fan_in_fan_out=False, **more):
    """The magnitude of one layer."""
    layer = cls(fan_in_fan_out)
    with starts.fast_init() if fast else contextlib.nullcontext():
        layer.update_layer(base_layer=base, lora_A=lora_A, lora_B=lora_B, scaling=scaling, **more)
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad
    return layer.weight.detach()


def over(weight):
    """A layer with this weight."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


def assert_started_alike(weight, adapter_dtype=None, **more):
    N, K = weight.T.shape if more.get("fan_in_fan_out") else weight.shape
    lora_A = torch.randn(3, K, generator=torch.Generator().manual_seed(1)).to(weight.device, adapter_dtype)
    arguments = over(weight), lora_A, torch.zeros(N, 3).to(lora_A), 1.75
    stock, fast = (start(*arguments, fast=fast, **more) for fast in (False, True))
    assert type(fast) is type(stock) and fast.dtype == stock.dtype and torch.equal(fast, stock)
    assert fast.shape == (N,) and (fast > 0).all()


# Initialisations whose product is not 0: PEFT's own.

INITIALISATIONS = ("gaussian", "eva", "pissa", "pissa_niter_4", "olora", "orthogonal", False)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_initialisations(initialisation, dtype, library_calls):
    settings = {"init_lora_weights": initialisation}
    if initialisation == "eva":
        settings["eva_config"] = peft.EvaConfig(rho=1.0)
    model = Net(sizes=(64, 128, 32)).to(DEVICE, dtype)
    stock, state = started(model, fast=False, **settings)
    fast, state_of_fast = started(model, fast=True, **settings)
    assert_same(stock, fast)
    assert torch.equal(state, state_of_fast)
    assert len(library_calls) == (0 if initialisation in ("gaussian", "eva") else 2)


# Quantized bases.


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("format", quantized_problem.FORMATS)
@pytest.mark.parametrize("sizes", (quantized_problem.STRADDLING, (64, 576, 320)), ids=str)
def test_quantized_bases(format, dtype, sizes, library_calls):
    torch.manual_seed(1)
    model = Net(sizes=sizes)
    model.up = quantized_problem.FORMATS[format](model.up, dtype)
    model.down = quantized_problem.FORMATS[format](model.down, dtype)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = format in ("nf4", "fp4"), format == "int8"
    stock, state = started(model, fast=False)
    fast, state_of_fast = started(model, fast=True)
    assert_same_magnitudes(stock, fast)
    assert torch.equal(state, state_of_fast)
    assert not library_calls


def assert_same_magnitudes(stock, fast):
    expected, actual = magnitudes(stock), magnitudes(fast)
    assert list(actual) == list(expected) and expected
    for name, one in actual.items():
        assert one.dtype == expected[name].dtype and torch.equal(one, expected[name]), name
        assert (one > 0).all()


def test_a_width_that_bitsandbytes_decodes_wrongly_is_left_to_it(monkeypatch, library_calls):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(starts.quant, "is_decoded_wrongly", lambda weight: True)
    base = quantized_problem.nf4(nn.Linear(48, 96), torch.float32)
    decoded = []

    def dequantize(module, real=dora.dequantize_module_weight):
        decoded.append(module)
        return real(module)

    monkeypatch.setattr(dora, "dequantize_module_weight", dequantize)
    lora_A, lora_B = torch.ones(3, 48), torch.zeros(96, 3)
    stock, fast = (start(base, lora_A, lora_B, 2.0, fast=fast) for fast in (False, True))
    assert torch.equal(stock, fast) and len(decoded) == 2 and not library_calls


# What else starts adapters.


def test_adapters_that_are_loaded(tmp_path, library_calls):
    model = net("linear", torch.bfloat16)
    trained, _ = started(model, fast=False)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3)).to(parameter))
    trained.save_pretrained(tmp_path / "all")
    trained.save_pretrained(tmp_path / "some")
    file = tmp_path / "some" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.down.lora_magnitude_vector"]
    save_file(tensors, file, {"format": "pt"})

    def loaded(fast, folder, **settings):
        torch.manual_seed(5)
        with starts.fast_init() if fast else contextlib.nullcontext():
            wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / folder, **settings)
            wrapped.load_adapter(tmp_path / folder, "second", **settings)
            wrapped.add_adapter("third", config(model, r=7))
        return wrapped

    for folder in ("all", "some"):
        with pytest.warns(UserWarning, match="missing") if folder == "some" else contextlib.nullcontext():
            stock, fast = loaded(False, folder), loaded(True, folder)
        assert_same(stock, fast)
        assert len(magnitudes(fast)) == 6
    # a magnitude that the file lacks is that of a fresh adapter
    down = fast.base_model.model.down
    norm = torch.linalg.norm(down.base_layer.weight.detach(), dim=1)
    assert torch.equal(down.lora_magnitude_vector["default"].weight.detach(), norm.float())
    assert not library_calls
    # PEFT makes no norm at all on the meta device
    assert_same(loaded(False, "all", low_cpu_mem_usage=True), loaded(True, "all", low_cpu_mem_usage=True))
    assert set(library_calls) == {"DoraLinearLayer"}


def test_a_model_that_is_loaded_with_its_adapter(tmp_path, library_calls):
    tuned = llama_problem.stock_llama(target_modules=["q_proj", "down_proj"])
    tuned.get_base_model().config.save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM(tuned.get_base_model().config)
    base.save_pretrained(tmp_path / "base")
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "adapter")
    stock = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with starts.fast_init():
        fast = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_same(stock, fast)
    saved = {name: p for name, p in tuned.named_parameters() if "magnitude" in name}
    assert all(torch.equal(p.cpu(), saved[name].cpu()) for name, p in magnitudes(fast).items())
    assert not library_calls


def test_the_layer_is_gathered_and_the_magnitude_placed(monkeypatch):
    """As PEFT does for ZeRO-3, and for ephemeral_gpu_offload."""
    gathered = []

    @contextlib.contextmanager
    def gather(parameters):
        gathered.append(list(parameters))
        yield

    monkeypatch.setattr(dora, "gather_params_ctx", gather)
    base = nn.Linear(5, 6)
    magnitude = start(base, torch.ones(2, 5), torch.zeros(6, 2), 1.0, fast=True, place_on_cpu=True)
    assert magnitude.device.type == "cpu"
    # a tensor that is elsewhere, and that nothing can move
    monkeypatch.setattr(starts, "_norm_of_base", lambda *_: (torch.ones(6, device="meta"), None))
    arguments = base, torch.ones(2, 5), torch.zeros(6, 2), 1.0
    assert start(*arguments, fast=True).is_meta
    with pytest.raises(NotImplementedError):
        start(*arguments, fast=True, place_on_cpu=True)
    assert [one is other for one, other in zip(gathered[0], base.parameters(), strict=True)] == [True, True]


# What must be PEFT's own.

A, B = torch.full((3, 40), 0.5), torch.zeros(30, 3)
WEIGHT = torch.linspace(-1, 1, 1200).view(30, 40)


def with_one(tensor, value):
    tensor = tensor.clone()
    tensor[1, 2] = value
    return tensor


CALLS = {
    "lora_A is nan": (WEIGHT, with_one(A, torch.nan), B, 1.0),
    "lora_A is inf": (WEIGHT, with_one(A, torch.inf), B, 1.0),
    "lora_B is nan": (WEIGHT, A, with_one(B, torch.nan), 1.0),
    "lora_B is tiny": (WEIGHT, 1e30 * A, with_one(B, 1e-30), 1.0),
    "scaling is inf": (WEIGHT, A, B, torch.inf),
    "scaling is nan": (WEIGHT, A, B, torch.nan),
    "scaling is huge": (WEIGHT.bfloat16(), A.bfloat16(), B.bfloat16(), 1e39),
    "scaling is a tensor": (WEIGHT, A, B, torch.tensor(torch.inf)),
    "adapters of two dtypes": (WEIGHT, A, B.bfloat16(), 1.0),
    "the weight is a view": (WEIGHT[:, ::2], A[:, ::2].contiguous(), B, 1.0),
    "lora_A is a view": (WEIGHT, A.T.contiguous().T, B, 1.0),
    "the weight is broadcast": (WEIGHT[:1], A, B, 1.0),
    "there is no column": (WEIGHT[:, :0], A[:, :0], B, 1.0),
    "complex": (WEIGHT.cfloat(), A.cfloat(), B.cfloat(), 1.0),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_left_to_the_library(call, library_calls):
    weight, *adapter = CALLS[call]
    outcome = []
    for fast in (False, True):
        try:
            outcome.append(start(over(weight), *adapter, fast=fast))
        except RuntimeError as error:
            outcome.append(str(error))
    if isinstance(outcome[0], str):
        assert outcome[0] == outcome[1]
    else:
        torch.testing.assert_close(*outcome, rtol=0, atol=0, equal_nan=True)
    assert library_calls


KERNELS = torch.linspace(-1, 1, 216).view(6, 4, 3, 3)


@pytest.mark.parametrize("shape", ((2, 4, 1, 1), (5, 4, 3, 3)), ids=str)
def test_a_convolution_that_its_adapter_does_not_fit(shape, library_calls):
    with pytest.raises(RuntimeError, match="shape"):
        arguments = over(KERNELS), torch.ones(shape), torch.zeros(6, 2, 1, 1), 1.0
        start(*arguments, fast=True, cls=dora.DoraConv2dLayer)
    assert library_calls


def test_a_convolution_below_an_adapter_of_another_dtype(library_calls):
    arguments = over(KERNELS.bfloat16()), torch.ones(2, 4, 3, 3), torch.zeros(6, 2, 1, 1), 1.0
    stock, fast = (start(*arguments, fast=fast, cls=dora.DoraConv2dLayer) for fast in (False, True))
    assert fast.dtype == stock.dtype == torch.float32 and torch.equal(fast, stock)
    assert not library_calls


def test_a_weight_that_is_not_finite():
    weight = with_one(with_one(WEIGHT, torch.nan), torch.inf).clone()
    weight[3, 3] = torch.nan
    stock, fast = (start(over(weight), A, B, 1.0, fast=fast) for fast in (False, True))
    torch.testing.assert_close(stock, fast, rtol=0, atol=0, equal_nan=True)
    assert stock[1].isinf() and stock[3].isnan()


def test_subclasses_modes_and_autocast_are_left_to_the_library(library_calls):
    class Other(dora.DoraLinearLayer):
        def get_weight_norm(self, *arguments, **named):
            return 2 * super().get_weight_norm(*arguments, **named)

    class Marked(torch.Tensor):
        pass

    base = over(WEIGHT)
    plain = start(base, A, B, 1.0, fast=True)
    assert not library_calls
    assert torch.equal(start(base, A, B, 1.0, fast=True, cls=Other), 2 * plain)
    start(base, A.as_subclass(Marked), B, 1.0, fast=True)
    start(over(WEIGHT.as_subclass(Marked)), A, B, 1.0, fast=True)
    assert start(over(WEIGHT.to("meta")), A.to("meta"), B.to("meta"), 1.0, fast=True).is_meta
    with torch.autocast(DEVICE, torch.bfloat16):
        start(base.to(DEVICE), A.to(DEVICE), B.to(DEVICE), 1.0, fast=True)
    with FakeTensorMode() as mode:
        start(over(mode.from_tensor(WEIGHT)), mode.from_tensor(A), mode.from_tensor(B), 1.0, fast=True)
    assert len(library_calls) == 6


# The library is left as it was.


def test_it_is_in_place_in_the_context_alone():
    assert inspect.signature(starts._update_layer).parameters.keys() == inspect.signature(LIBRARY).parameters.keys()
    with dora_kernels.starts.fast_init():
        assert vars(dora.DoraLinearLayer)["update_layer"] is starts._update_layer
        with starts.fast_init():
            pass
        assert vars(dora.DoraLinearLayer)["update_layer"] is starts._update_layer
    assert vars(dora.DoraLinearLayer)["update_layer"] is LIBRARY

    @starts.fast_init()
    def decorated():
        return vars(dora.DoraLinearLayer)["update_layer"]

    assert decorated() is starts._update_layer
    with pytest.raises(KeyError), starts.fast_init(), starts.fast_init():
        raise KeyError
    assert vars(dora.DoraLinearLayer)["update_layer"] is LIBRARY


def test_contexts_that_end_in_another_order():
    first, second = starts.fast_init(), starts.fast_init()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert vars(dora.DoraLinearLayer)["update_layer"] is starts._update_layer and starts._depth.get() == 1
    second.__exit__(None, None, None)


def test_another_thread_gets_the_librarys_own(library_calls):
    inside, done, seen = threading.Event(), threading.Event(), []

    def other():
        inside.wait(20)
        start(over(WEIGHT), A, B, 1.0, fast=False)
        seen.append(list(library_calls))
        with starts.fast_init():
            start(over(WEIGHT), A, B, 1.0, fast=False)
            done.set()
            first_left.wait(20)
            # the thread that put ours in place is gone, and this one is still inside
            start(over(WEIGHT), A, B, 1.0, fast=False)
        seen.append(list(library_calls))

    first_left, thread = threading.Event(), threading.Thread(target=other)
    thread.start()
    with starts.fast_init():
        inside.set()
        assert done.wait(20)
        start(over(WEIGHT), A, B, 1.0, fast=False)
    assert vars(dora.DoraLinearLayer)["update_layer"] is starts._update_layer
    first_left.set()
    thread.join()
    assert seen == [["DoraLinearLayer"]] * 2


def test_many_threads_leave_the_library_as_it_was():
    def enter():
        for _ in range(50):
            with starts.fast_init():
                pass

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def other_update_layer(self, *, base_layer, lora_A, lora_B, scaling, place_on_cpu=False):
    self.weight = nn.Parameter(torch.full((lora_B.shape[0],), 3.0))


@functools.wraps(LIBRARY)
def wrapped_update_layer(self, **arguments):
    other_update_layer(self, **arguments)


@functools.wraps(vars(dora.DoraLinearLayer)["get_weight_norm"])
def wrapped_norm(self, weight, *arguments, **named):
    return torch.full_like(weight[:, 0], 3.0)


@pytest.mark.parametrize(
    "cls, name, method",
    (
        (dora.DoraLinearLayer, "update_layer", other_update_layer),
        (dora.DoraLinearLayer, "update_layer", wrapped_update_layer),
        (dora.DoraLinearLayer, "get_weight_norm", wrapped_norm),
        (dora._DoraConvNdLayer, "get_weight_norm", wrapped_norm),
        (dora.DoraLinearLayer, "_cache_clear", lambda self: None),
    ),
)
def test_a_method_that_is_not_known_is_left_in_place(cls, name, method, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(cls, name, method)
        with caplog.at_level(logging.WARNING, "dora_kernels"):
            for _ in range(2):
                with starts.fast_init():
                    assert vars(cls)[name] is method
                    magnitude = start(over(WEIGHT), A, B, 1.0, fast=False)
        if cls is dora.DoraLinearLayer and name != "_cache_clear":
            assert (magnitude == 3).all()
    (record,) = caplog.records
    assert "peft.tuners.lora.dora" in record.message and name in record.message


def test_a_release_without_the_class_is_left_alone(monkeypatch, caplog):
    monkeypatch.delattr(dora, "_DoraConvNdLayer")
    with starts.fast_init():
        assert vars(dora.DoraLinearLayer)["update_layer"] is LIBRARY
    assert len(caplog.records) == 1


def test_what_wraps_it_meanwhile_stays():
    """It is called on after the context, and then goes on to PEFT's."""
    context = starts.fast_init()
    context.__enter__()
    ours = vars(dora.DoraLinearLayer)["update_layer"]

    def around(self, **arguments):
        ours(self, **arguments)
        self.weight.data.mul_(2)

    dora.DoraLinearLayer.update_layer = around
    try:
        context.__exit__(None, None, None)
        assert vars(dora.DoraLinearLayer)["update_layer"] is around
        doubled = start(over(WEIGHT), A, B, 1.0, fast=False)
        assert torch.equal(doubled, start(over(WEIGHT), A, B, 1.0, fast=True))
    finally:
        dora.DoraLinearLayer.update_layer = LIBRARY
    assert torch.equal(doubled, 2 * start(over(WEIGHT), A, B, 1.0, fast=False))


def test_a_reason_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, "dora_kernels"):
        for _ in range(3):
            start(over(WEIGHT), A, B + 1, 1.0, fast=True)
    assert [record.message for record in caplog.records] == [
        "fast_init: PEFT starts some adapters in its own way: lora_B @ lora_A is not 0"
    ]


# And nothing dense is made.


@pytest.mark.parametrize("quantized", (False, True))
def test_nothing_dense_is_made(quantized):
    N, K = 2048, 1024
    linear = nn.Linear(K, N, bias=False)
    if quantized:
        pytest.importorskip("bitsandbytes")
    base = quantized_problem.nf4(linear, torch.float32) if quantized else linear
    lora_A, lora_B = torch.ones(4, K), torch.zeros(N, 4)
    largest = {}
    for fast in (False, True):
        with torch.profiler.profile(profile_memory=True) as profile:
            start(base, lora_A, lora_B, 1.0, fast=fast)
        largest[fast] = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest[False] >= 4 * N * K
    assert largest[True] <= (4 * N * K / 2 if quantized else 16 * N)
