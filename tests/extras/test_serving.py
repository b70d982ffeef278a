"""Several adapters in one batch against a loop over them, and whole models merged against themselves unmerged."""

import sys
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dora_kernels
from dora_kernels import DoraLinear, dora_linear, ops, options
from dora_kernels.adapters.frozen import frozen_like
from dora_kernels.extras import serving
from dora_kernels.extras.serving import AdapterBank, bank_linear, merge_model, norms_and_gains
from dora_kernels.testing import compare
from tests.support.problem import BACKENDS, DEVICE, DTYPES, Problem

RANKS = (6, 20, 1)


def bank_of(M, N, K, dtype=torch.float32, adapter_dtype=None):
    """A problem, and three adapters of its weight: two of DoRA and, last, one of LoRA."""
    problems = [Problem.random(M, N, K, R, dtype, adapter_dtype, seed=seed) for seed, R in enumerate(RANKS)]
    adapters = [[p.lora_A, p.lora_B, p.magnitude, 0.5 + seed] for seed, p in enumerate(problems)]
    adapters[-1][2] = None
    return problems[0], adapters


def loop(x, weight, adapters, index, bias):
    """Row by row, with dora_linear."""
    rows = []
    for row, e in zip(x, index.tolist(), strict=True):
        if e == -1:
            rows.append(F.linear(row, weight, bias))
            continue
        lora_A, lora_B, magnitude, scaling = adapters[e]
        if magnitude is None:
            magnitude = torch.linalg.vector_norm(weight.double() + scaling * (lora_B.double() @ lora_A.double()), dim=1)
        rows.append(dora_linear(row, weight, lora_A, lora_B, magnitude, scaling, bias))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_against_a_loop(dtypes, bias, backend):
    problem, adapters = bank_of(70, 40, 36, *dtypes)
    bias = problem.bias if bias else None
    index = torch.randint(-1, 3, (70,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert set(index.tolist()) == {-1, 0, 1, 2}
    with options(backend=backend):
        bank = AdapterBank.of(problem.weight, adapters)
        before = ops.calls["bank_epilogue", backend]
        actual = bank_linear(problem.x, problem.weight, bank, index, bias)
        assert ops.calls["bank_epilogue", backend] == before + 1
    wide = [[t.double() if isinstance(t, torch.Tensor) else t for t in adapter] for adapter in adapters]
    exact = loop(problem.x.double(), problem.weight.double(), wide, index, None if bias is None else bias.double())
    with options(backend="reference"):
        yardstick = loop(problem.x, problem.weight, adapters, index, bias)
    assert actual.dtype == problem.x.dtype
    comparison = compare("y", actual, yardstick, exact)
    assert comparison.ok, comparison


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_one_adapter_a_sequence(dtype, backend):
    problem, adapters = bank_of(60, 40, 36)
    x, index = problem.x.view(4, 15, 36), torch.tensor([2, -1, 0, 2], dtype=dtype, device=DEVICE)
    with options(backend=backend):
        bank = AdapterBank.of(problem.weight, adapters)
        sequences = bank_linear(x, problem.weight, bank, index)
        tokens = bank_linear(x, problem.weight, bank, index[:, None].expand(4, 15))
    assert sequences.shape == (4, 15, 40) and torch.equal(sequences, tokens)
    assert len({tuple(sequence[0].tolist()) for sequence in sequences}) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_reach_each_other(backend):
    """An adapter of inf and NaN beside the others, in the same tile; and an index outside the bank."""
    problem, adapters = bank_of(8, 40, 36)
    index = torch.tensor([0, 1, 2, -1, 0, 1, 3, -7], device=DEVICE)
    with options(backend=backend):
        healthy = bank_linear(problem.x, problem.weight, AdapterBank.of(problem.weight, adapters), index)
        broken = AdapterBank.of(
            problem.weight, [adapters[0], (*(t * torch.inf for t in adapters[1][:3]), 1.0), adapters[2]]
        )
        actual = bank_linear(problem.x, problem.weight, broken, index)
    mine, outside = index != 1, (index < 0) | (index >= 3)
    assert torch.equal(actual[mine], healthy[mine]) and not actual[~mine].isfinite().any()
    torch.testing.assert_close(healthy[outside], F.linear(problem.x, problem.weight)[outside])


def test_one_row_and_a_bias_that_requires_grad():
    problem, adapters = bank_of(3, 40, 36)
    bank, index = AdapterBank.of(problem.weight, adapters), torch.tensor([1, 1, 1], device=DEVICE)
    bias = nn.Parameter(problem.bias.detach().clone())
    with torch.no_grad():
        rows = bank_linear(problem.x, problem.weight, bank, index, bias)
        row = bank_linear(problem.x[0], problem.weight, bank, index[0], bias)
    assert row.shape == (40,)
    torch.testing.assert_close(row, rows[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_takes_of_each_operand_what_its_dtype_holds(backend):
    """Of x, the weight and the adapters; the bank has been made outside, as a server makes it."""
    problem, adapters = bank_of(8, 40, 36)
    index = torch.tensor([0, 1, 2, -1, 0, 1, 2, 2], device=DEVICE)
    bank = AdapterBank.of(problem.weight, adapters)
    rounded = [problem.x, problem.weight, bank.lora_A, bank.lora_B]
    rounded = [tensor.bfloat16().float() for tensor in rounded]
    with options(backend=backend), torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = bank_linear(problem.x, problem.weight, bank, index, problem.bias)
        narrow = replace(bank, lora_A=rounded[2], lora_B=rounded[3])
        assert torch.equal(actual, bank_linear(*rounded[:2], narrow, index, problem.bias))
        half = bank_linear(problem.x.bfloat16(), problem.weight, bank, index, problem.bias)
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, half)
    exact = bank_linear(problem.x, problem.weight, bank, index, problem.bias)
    torch.testing.assert_close(actual.float(), exact, rtol=0.02, atol=0.02 * exact.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_narrower_than_x_are_widened(backend):
    problem, adapters = bank_of(8, 40, 36, torch.float32, torch.bfloat16)
    index = torch.tensor([0, 1, 2, -1, 0, 1, 2, 2], device=DEVICE)
    bank = AdapterBank.of(problem.weight, adapters)
    wide = replace(bank, lora_A=bank.lora_A.float(), lora_B=bank.lora_B.float())
    with options(backend=backend):
        actual, expected = (bank_linear(problem.x, problem.weight, either, index) for either in (bank, wide))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bank_of_one(backend):
    """And, of four tokens or one, an output of one element."""
    for M, N in ((4, 40), (1, 1)):
        problem, adapters = bank_of(M, N, 36)
        index = torch.tensor([0, -1, 0, -1][:M], device=DEVICE)
        expected = loop(problem.x, problem.weight, adapters, index, None)
        with options(backend=backend):
            bank = AdapterBank.of(problem.weight, adapters[:1])
            torch.testing.assert_close(bank_linear(problem.x, problem.weight, bank, index), expected)


def test_a_gradient_is_refused_whatever_it_is_wanted_of():
    problem, adapters = bank_of(4, 40, 36)
    bank, index = AdapterBank.of(problem.weight, adapters), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    for name in ("lora_A", "lora_B"):
        wanted = replace(bank, **{name: getattr(bank, name).clone().requires_grad_()})
        with pytest.raises(ValueError, match="bank_linear: a gradient is wanted"):
            bank_linear(problem.x, problem.weight, wanted, index)
        with torch.no_grad():
            bank_linear(problem.x, problem.weight, wanted, index)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    problem, adapters = bank_of(3, 40, 36)
    with options(backend=backend):
        bank = AdapterBank.of(problem.weight, adapters)
        y = bank_linear(problem.x[:0], problem.weight, bank, torch.zeros(0, dtype=torch.int64, device=DEVICE))
    assert y.shape == (0, 40)


def test_the_norm_is_computed_once():
    problem, adapters = bank_of(8, 40, 36)
    bank = AdapterBank.of(problem.weight, adapters)
    before = sum(count for (name, _), count in ops.calls.items() if name == "norm")
    bank_linear(problem.x, problem.weight, bank, torch.zeros(8, dtype=torch.int64, device=DEVICE))
    assert sum(count for (name, _), count in ops.calls.items() if name == "norm") == before
    assert len(bank) == 3 and bank.lora_A.shape == (60, 36) and bank.lora_B.shape == (3, 40, 20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)), ids=str)
def test_opcheck(dtypes, backend):
    problem, adapters = bank_of(8, 40, 36, *dtypes)
    bank = AdapterBank.of(problem.weight, adapters)
    low = F.linear(problem.x.to(dtypes[1]), bank.lora_A)
    index = torch.tensor([0, 1, 2, -1, 0, 1, 2, 2], device=DEVICE)
    arguments = (problem.dy, low, bank.lora_B, bank.gain, bank.scaling, problem.bias, index, backend)
    torch.library.opcheck(ops.bank_epilogue, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (
            {"index": torch.zeros(7, dtype=torch.int64)},
            r"index is torch.int64 of shape \(7,\) but x has shape \(8, 36\)",
        ),
        ({"index": torch.zeros(8)}, "index is torch.float32"),
        ({"index": torch.zeros(8, dtype=torch.int64, device="meta")}, "index is on meta but x is on cpu"),
        ({"x": torch.zeros(8, 35)}, r"x has shape \(8, 35\) but weight has shape \(40, 36\)"),
        ({"x": torch.zeros(8, 36).double()}, "x is torch.float64 but weight is torch.float32"),
        ({"x": torch.zeros(8, 36, requires_grad=True)}, "a gradient is wanted"),
        ({"bias": torch.zeros(40, requires_grad=True)}, "a gradient is wanted"),
        ({"x": torch.zeros(36), "index": torch.zeros(36, dtype=torch.int64)}, r".* expected integers of shape \(\)$"),
        ({"weight": torch.zeros(41, 36)}, r"lora_B has shape \(40, 20\) but weight has shape \(41, 36\)"),
        ({"bias": torch.zeros(39)}, r"bias has shape \(39,\)"),
        ({"bank": None}, "bank is None; expected an AdapterBank"),
    ),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.skipif(DEVICE == "cuda", reason="the tensors are made on the CPU")
def test_bad_input(change, message):
    problem, adapters = bank_of(8, 40, 36)
    good = {"x": problem.x, "weight": problem.weight, "bank": AdapterBank.of(problem.weight, adapters)}
    good["index"] = torch.zeros(8, dtype=torch.int64)
    bank_linear(**good)
    with pytest.raises(ValueError, match=f"bank_linear: {message}"):
        bank_linear(**(good | change))


def test_adapters_that_do_not_fit():
    problem, adapters = bank_of(8, 40, 36)
    for wrong, message in (
        ([], "adapters is empty"),
        ([adapters[0], (adapters[0][0].double(), adapters[0][1].double(), None, 1.0)], "adapter 1 is torch.float64"),
        ([(adapters[0][0], adapters[1][1], None, 1.0)], r"adapter 0: lora_B has shape \(40, 20\)"),
        ([(*adapters[0][:2], adapters[0][2][1:], 1.0)], r"adapter 0: magnitude has shape \(39,\)"),
    ):
        with pytest.raises(ValueError, match=f"AdapterBank.of: {message}"):
            AdapterBank.of(problem.weight, wrong)


def outputs(model, x):
    with torch.no_grad():
        return model.eval()(x)


def two_layers(adapter_seed=0):
    """DoraLinear layers: one with a bias and one without, adapters away from their start."""
    torch.manual_seed(adapter_seed)
    layers = nn.Sequential(
        DoraLinear(24, 40, 5, 7.0, device=DEVICE), nn.Tanh(), DoraLinear(40, 20, 3, 2.0, bias=False, device=DEVICE)
    )
    return randomised(nn.Sequential(layers))


def randomised(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(0.5 + torch.rand_like(parameter))
            elif "lora_B" in name or "bias" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def peft_models():
    """name -> (stock PEFT model, x): linear layers, GPT-2's, convolutions, embeddings."""
    peft = pytest.importorskip("peft")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    modules = {
        "linear": (nn.Linear(24, 40), torch.randn(7, 24)),
        "conv1d of GPT-2": (Conv1D(40, 24), torch.randn(7, 24)),
        "convolution": (nn.Conv2d(6, 8, 3, stride=2, padding=1), torch.randn(2, 6, 9, 7)),
        "embedding": (nn.Embedding(50, 24, padding_idx=3), torch.randint(50, (2, 9))),
    }
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=["0"])
    for name, (module, x) in modules.items():
        yield name, randomised(peft.get_peft_model(nn.Sequential(module), config)).to(DEVICE), x.to(DEVICE)


def test_a_model_of_ours_merged():
    model, x = two_layers(), torch.randn(7, 24, device=DEVICE)
    expected, norms = outputs(model, x), norms_and_gains(model)
    assert list(norms) == ["0.0", "0.2"]
    layer = model[0][0]
    norm = torch.linalg.vector_norm(layer.weight + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight, dim=1)
    torch.testing.assert_close(norms["0.0"], (norm, layer.lora_magnitude_vector / norm))
    before = layer.weight.clone()
    assert merge_model(model) == {}
    assert [type(module) for module in model[0]] == [nn.Linear, nn.Tanh, nn.Linear]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(outputs(model, x), expected)
    assert torch.equal(layer.weight, before)  # the new weight is another one


def test_a_layer_that_is_merged_already():
    model, x = two_layers(), torch.randn(7, 24, device=DEVICE)
    expected, norms = outputs(model, x), norms_and_gains(model)
    model[0][0].merge()
    assert torch.equal(torch.stack(norms_and_gains(model)["0.0"]), torch.stack(norms["0.0"]))
    assert merge_model(model, progress=True) == {}
    torch.testing.assert_close(outputs(model, x), expected)


def test_a_layer_under_two_names_stays_one():
    model, x = two_layers(), torch.randn(7, 24, device=DEVICE)
    model.again = nn.ModuleDict({"first": model[0][0]})
    expected, norms = outputs(model[0], x), norms_and_gains(model)
    assert list(norms) == ["0.0", "again.first", "0.2"] and norms["0.0"] is norms["again.first"]
    assert merge_model(model) == {}
    assert type(model[0][0]) is nn.Linear and model.again["first"] is model[0][0]
    torch.testing.assert_close(outputs(model[0], x), expected)


@pytest.mark.parametrize("progress", (False, True))
def test_a_layer_is_let_go_before_the_next_is_merged(progress, monkeypatch):
    model = two_layers()
    first, alive = weakref.ref(model[0][0]), []
    monkeypatch.setattr(serving, "frozen_like", lambda *a: alive.append(first() is not None) or frozen_like(*a))
    assert merge_model(model, progress=progress) == {}
    assert alive == [True, False]


def test_a_bar_is_shown_on_request(monkeypatch):
    """By default nothing is, and rich is not needed."""
    model = two_layers()
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    for function in (norms_and_gains, merge_model):
        with pytest.raises(ValueError, match=f"{function.__name__}: progress is True but .* expected rich"):
            function(model, progress=True)
        function(model)


def test_merged_in_inference_mode():
    model = two_layers()
    with torch.inference_mode():
        assert merge_model(model) == {}
    assert not any(parameter.is_inference() for parameter in model.parameters())
    x = torch.randn(7, 24, device=DEVICE, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", ("linear", "conv1d of GPT-2", "convolution", "embedding"))
def test_a_peft_model_merged(name):
    model, x = next((model, x) for found, model, x in peft_models() if found == name)
    expected, base = outputs(model, x), type(model.base_model.model[0].base_layer)
    report = dora_kernels.enable(model)
    assert len(report.taken_over) == 1, report
    (pair,) = norms_and_gains(model).values()
    assert pair[0].shape == pair[1].shape and (pair[1] - 1).abs().max() > 0.1
    old = model.base_model.model[0].base_layer.weight.clone()
    layer = model.base_model.model[0]
    assert merge_model(model) == {}
    assert type(model.base_model.model[0]) is base
    torch.testing.assert_close(outputs(model, x), expected)
    assert torch.equal(layer.base_layer.weight, old)


def hooked(how):
    """A PEFT model whose base layer has accelerate's hook, put on it before or after enable(), or put on and off."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = next((model, x) for found, model, x in peft_models() if found == "linear")
    expected, layer = outputs(model, x), model.base_model.model[0]
    if how == "after":
        dora_kernels.enable(model)
    hooks.add_hook_to_module(layer.base_layer, hooks.AlignDevicesHook(DEVICE, io_same_device=True))
    if how == "removed":
        hooks.remove_hook_from_module(layer.base_layer)
    dora_kernels.enable(model)
    return model, layer.base_layer, x, expected


@pytest.mark.parametrize("how", ("before", "after", "removed"))
def test_hooks_of_accelerate_stay_and_call_the_new_layer(how):
    model, base, x, expected = hooked(how)
    assert (outputs(model.base_model.model[0].base_layer, x) - expected).abs().max() > 0.1
    assert merge_model(model) == {}
    frozen = model.base_model.model[0]
    assert frozen is not base and hasattr(frozen, "_hf_hook") == (how != "removed")
    torch.testing.assert_close(outputs(model, x), expected)
    if how != "removed":
        frozen._hf_hook.pre_forward = lambda module, x: ((2 * x,), {})  # it is called, and with the new layer
        torch.testing.assert_close(outputs(model, x), F.linear(2 * x, frozen.weight, frozen.bias))


@pytest.mark.parametrize("base", ("offloaded", "replaced"))
def test_a_replaced_forward_is_not_carried_over(base):
    """Offloaded weights are accelerate's to bring: it would bring those without the adapter."""
    weight, linear = torch.randn(20, 24, device=DEVICE), nn.Linear(24, 20, device=DEVICE)
    frozen_like(linear, weight, None)
    if base == "offloaded":
        hooks = pytest.importorskip("accelerate.hooks")
        hooks.add_hook_to_module(linear, hooks.AlignDevicesHook(DEVICE, offload=True))
    else:
        linear.forward = lambda x: x
    with pytest.raises(ValueError, match="frozen_layer: the forward of Linear was replaced on the instance"):
        frozen_like(linear, weight, None)


def test_what_hangs_on_the_new_layer_is_its_own():
    base, calls = nn.Linear(24, 20, device=DEVICE), []
    base.register_forward_hook(lambda *_: calls.append(1))
    base.register_buffer("before", torch.zeros(1, device=DEVICE))
    frozen = frozen_like(base, torch.randn(20, 24, device=DEVICE), None)
    frozen(torch.zeros(1, 24, device=DEVICE))
    assert len(calls) == 1 and "before" in frozen._buffers
    frozen.register_forward_hook(lambda *_: calls.append(2))
    frozen.register_buffer("after", torch.zeros(1))
    assert len(base._forward_hooks) == 1 and "after" not in base._buffers


def test_what_cannot_be_replaced_is_named():
    """Two active adapters: no one norm."""
    from tests.support import peft_problem

    model = peft_problem.enabled(peft_problem.build(adapters=2))
    with pytest.raises(ValueError, match="norm_and_gain: 2 adapters are active"):
        norms_and_gains(model)


def test_nothing_to_merge():
    for function in (merge_model, norms_and_gains):
        with pytest.raises(ValueError, match=f"{function.__name__}: model has no DoRA layer of ours"):
            function(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="merge_model: model is a DoraLinear itself"):
        merge_model(two_layers()[0][0])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("rows", ((3,), (2, 3)))
def test_a_bank_in_a_trace(rows):
    weight, x = torch.randn(6, 8), torch.randn(*rows, 8)
    adapters = [(torch.randn(2, 8), torch.randn(6, 2), torch.rand(6), 1.0) for _ in range(2)]
    bank, index = serving.AdapterBank.of(weight, adapters), torch.arange(rows[0]) % 2
    with torch.no_grad():
        traced = torch.jit.trace(lambda x, index: serving.bank_linear(x, weight, bank, index), (x, index))
        assert torch.equal(traced(2 * x, 1 - index), serving.bank_linear(2 * x, weight, bank, 1 - index))
        more, which = torch.cat((x, -x, x)), torch.cat((index, 1 - index, index))
        torch.testing.assert_close(traced(more, which), serving.bank_linear(more, weight, bank, which))
        with pytest.raises(ValueError, match="index is torch.int64 of shape"):
            torch.jit.trace(lambda x, index: serving.bank_linear(x, weight, bank, index), (x, index[:1]))
