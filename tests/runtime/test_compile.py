"""torch.compile: our operators are in the graphs, nothing breaks them or recompiles, and the numbers are eager's."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dora_kernels
from dora_kernels import DoraLinear, ops, weight_norm
from dora_kernels.functional.rescale import rescale
from tests.support.compile_problem import Recorder
from tests.support.problem import DEVICE
from tests.support.tuned_tables import entry, forget_tables, pretend_table

pytest.importorskip("peft")

from tests.support.llama_problem import llama, step  # noqa: E402
from tests.support.peft_problem import build, enabled, tensors  # noqa: E402

EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def dora_linears(**settings):
    """Two DoraLinears with what is between them in a model."""
    torch.manual_seed(0)
    model = nn.Sequential(
        DoraLinear(24, 40, rank=5, alpha=7.0, device=DEVICE, **settings),
        nn.Tanh(),
        DoraLinear(40, 20, rank=3, alpha=7.0, bias=False, device=DEVICE, **settings),
    )
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B.weight)
        layer.lora_magnitude_vector.data.mul_(1 + 0.5 * torch.randn(layer.out_features, device=DEVICE).tanh())
    return model


class Rescaled(nn.Module):
    """A DoRA layer in two pieces, as layers over other bases are."""

    def __init__(self, norm_grad):
        super().__init__()
        self.layer, self.norm_grad = dora_linears()[0], norm_grad

    def forward(self, x):
        layer, A, B = self.layer, self.layer.lora_A.weight, self.layer.lora_B.weight
        norm = weight_norm(layer.weight, A, B, layer.scaling, norm_grad=self.norm_grad)
        return rescale(
            F.linear(x, layer.weight), F.linear(x, A), B, layer.lora_magnitude_vector / norm, layer.scaling, layer.bias
        )[..., :20]


# the operators in the forward and in the backward graph
TWO_LAYERS = {"forward": 2}, {"backward": 2}
MODELS = {
    "DoraLinear": (dora_linears, *TWO_LAYERS),
    "DoraLinear, dropout": (lambda: dora_linears(dropout=0.5), *TWO_LAYERS),
    "rescale": (lambda: Rescaled(False), {"norm": 1, "rescale": 1}, {"rescale_backward": 1}),
    "rescale, norm_grad": (
        lambda: Rescaled(True),
        {"norm": 1, "rescale": 1},
        {"norm_backward": 1, "rescale_backward": 1},
    ),
    "peft": (lambda: enabled(build()), *TWO_LAYERS),
    "peft, dropout": (lambda: enabled(build(lora_dropout=0.5)), *TWO_LAYERS),
    "peft, conv1d": (lambda: enabled(build(conv1d=True)), *TWO_LAYERS),
    "peft, two adapters": (lambda: enabled(build(adapters=2)), {"forward": 2, "norm": 2}, {"backward": 2}),
    "peft, bfloat16": (lambda: enabled(build(dtype=torch.bfloat16)), *TWO_LAYERS),
}


def inputs(model, *leading):
    dtype = torch.bfloat16 if any(p.dtype == torch.bfloat16 for p in model.parameters()) else torch.float32
    return torch.randn(*leading, 24, device=DEVICE, dtype=dtype), torch.randn(*leading, 20, device=DEVICE, dtype=dtype)


DAILY = ("DoraLinear, dropout", "rescale, norm_grad", "peft, dropout")


@pytest.mark.parametrize(
    "name", [name if name in DAILY else pytest.param(name, marks=pytest.mark.nightly) for name in MODELS]
)
def test_training_runs_the_operators_at_every_M_without_a_recompile(name):
    """A graph for the first M and one for all others, torch.compile's rule; nothing is recomputed in the backward."""
    make, forward, backward = MODELS[name]
    model, recorder = make(), Recorder()
    compiled = recorder.compile(model)
    for M in (5, 7, 300):
        x, dy = inputs(model, M)
        torch.testing.assert_close(tensors(model, x, dy, call=compiled), tensors(model, x, dy), **EXACT)
    assert recorder.graphs == [("forward", forward), ("backward", backward)] * 2
    assert recorder.frames == 2


@pytest.mark.parametrize("name", ("DoraLinear", "rescale, norm_grad"))
def test_a_free_M_compiles_once(name):
    model, recorder = MODELS[name][0](), Recorder()
    compiled = recorder.compile(model)
    for leading in ((2, 5), (3, 7), (4, 90)):
        x, dy = inputs(model, *leading)
        expected = tensors(model, x, dy)
        for tensor in (x, dy):
            torch._dynamo.mark_dynamic(tensor, (0, 1))

        def call(leaf):
            torch._dynamo.mark_dynamic(leaf, (0, 1))
            return compiled(leaf)

        torch.testing.assert_close(tensors(model, x, dy, call=call), expected, **EXACT)
    assert recorder.frames == 1


@pytest.mark.parametrize(
    ("name", "mode"),
    (
        ("DoraLinear", torch.inference_mode),
        ("rescale", torch.no_grad),
        ("peft, dropout", torch.no_grad),
        ("peft", torch.enable_grad),
    ),
)
def test_eval(name, mode):
    """A write that nothing announces is seen too: no norm is kept from call to call in a compiled graph."""
    make, forward, _ = MODELS[name]
    model, recorder = make().eval(), Recorder()
    compiled = recorder.compile(model)
    x, _ = inputs(model, 5)
    with mode():
        before = model(x)
        torch.testing.assert_close(compiled(x), before, **EXACT)
        for parameter_name, parameter in model.named_parameters():
            if "magnitude" in parameter_name:
                parameter.data.mul_(2)
        model.train().eval()  # for eager's sake, which keeps norm and gain
        assert not torch.equal(model(x), before)
        torch.testing.assert_close(compiled(x), model(x), **EXACT)
    assert recorder.frames == 1
    assert recorder.graphs[0] == ("inference" if mode is not torch.enable_grad else "forward", forward)


def test_a_training_run_compiles_once():
    """Optimizer steps, which reuse/ counts, do not recompile; nor do going to eval and back, each compiled once."""
    start, runs, recorder = enabled(build(lora_dropout=0.1)), [], Recorder()
    x, target = torch.randn(8, 24, device=DEVICE), torch.randn(8, 20, device=DEVICE)
    for compiles in (False, True):
        model = copy.deepcopy(start)
        call = recorder.compile(model) if compiles else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(7)
        for epoch in range(2):
            for _ in range(3):
                optimizer.zero_grad()
                F.mse_loss(call(x), target).backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                runs.append((epoch, F.mse_loss(call(x), target)))
            model.train()
    torch.testing.assert_close(runs[2:], runs[:2], **EXACT)
    assert runs[0][1] > runs[1][1]
    assert recorder.frames == 2


def test_options_are_guarded():
    model, recorder = enabled(build()).eval(), Recorder()
    compiled, (x, _) = recorder.compile(model), inputs(model, 5)
    compiled(x)
    with dora_kernels.options(way="split", precision="exact"):
        torch.testing.assert_close(compiled(x), model(x), **EXACT)
    compiled(x)
    assert recorder.frames == 2


@pytest.fixture
def measured_sizes(monkeypatch, tmp_path):
    """All tensors are on a GPU on which a merged weight has won where N is 40, and one GEMM elsewhere."""
    times = {"split": 100.0, "merged": 80.0, "fused": 90.0}
    entries = [entry(N=40, K=24, R=5, forward=times), entry(N=20, K=40, R=3, forward=times | {"fused": 70.0})]
    pretend_table(monkeypatch, tmp_path, *entries)
    yield
    forget_tables()


@pytest.fixture
def kept(monkeypatch):
    """What each forward pass keeps, in order."""
    found, run = [], ops.run_forward
    monkeypatch.setattr(ops, "run_forward", lambda call: found.append(call.how.save) or run(call))
    return found


@pytest.mark.parametrize("table", (False, True), ids=("no table", "a table"))
def test_what_was_measured_is_chosen_as_eager_chooses_it(table, kept, request):
    """Read while Dynamo traces; another M does not recompile for it, as it does not without."""
    if table:
        request.getfixturevalue("measured_sizes")
    model, recorder = dora_linears().half(), Recorder()
    compiled = recorder.compile(model)
    for M in (5, 7, 300):
        x, dy = (tensor.half() for tensor in inputs(model, M))
        torch.testing.assert_close(tensors(model, x, dy, call=compiled), tensors(model, x, dy), **EXACT)
    assert kept == (["z_merged", "z_gemm"] if table else ["base", "base"]) * 6
    assert recorder.graphs == [("forward", {"forward": 2}), ("backward", {"backward": 2})] * 2
    assert recorder.frames == 2


def test_weights_of_free_sizes_are_looked_up_as_well(measured_sizes, kept):
    """As arguments of a compiled function they are symbols from the second on, and no constants."""
    recorder, frames = Recorder(), []
    compiled = recorder.compile(dora_kernels.dora_linear, dynamic=True)
    for N in (40, 200, 300, 400):
        layer = [torch.randn(size, device=DEVICE).half() for size in ((N, 24), (5, 24), (N, 5), (N,))]
        x, layer[3] = torch.randn(7, 24, device=DEVICE).half(), layer[3].abs().requires_grad_()
        torch.testing.assert_close(compiled(x, *layer, 0.5), dora_kernels.dora_linear(x, *layer, 0.5), **EXACT)
        frames.append(recorder.frames)
    assert kept == ["z_merged"] * 2 + ["base"] * 6
    assert frames[1] == frames[0] + 1 and frames[1:] == frames[1:2] * 3  # again for all that nothing speaks for


@pytest.mark.nightly
def test_enable_after_compile_is_seen():
    """Not in one graph: PEFT's own DoRA forward breaks it in every layer."""
    model, recorder = build(), Recorder()
    compiled, (x, dy) = torch.compile(model, backend=recorder), inputs(model, 5)
    stock = tensors(model, x, dy, call=compiled)
    assert not any(operators for _, operators in recorder.graphs)
    recorder.graphs.clear()
    dora_kernels.enable(model)
    torch.testing.assert_close(tensors(model, x, dy, call=compiled), stock, rtol=1e-4, atol=1e-5)
    assert recorder.graphs == [("forward", {"forward": 2}), ("backward", {"backward": 2})]
    dora_kernels.disable(model)
    torch.testing.assert_close(tensors(model, x, dy, call=compiled), stock, **EXACT)


@contextlib.contextmanager
def merged(model):
    model.merge_adapter()
    yield
    model.unmerge_adapter()


@pytest.mark.parametrize("state", ("disabled", "merged"))
def test_what_is_peft_s_is_compiled_as_peft_s(state):
    model, recorder = enabled(build()), Recorder()
    compiled, (x, _) = recorder.compile(model), inputs(model, 5)
    with model.disable_adapter() if state == "disabled" else merged(model):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled(x), model(x), **EXACT)
    assert [graph for kind, graph in recorder.graphs if kind != "backward"] == [{}, {"forward": 2}]


def ids(*size):
    return torch.randint(64, size, generator=torch.Generator().manual_seed(3)).to(DEVICE)


def assert_steps_agree(actual, expected, tolerance=1e-4):
    """To the rounding of float32: around our layers torch.compile computes some of a model in another order."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype
        error = torch.linalg.vector_norm(value - expected[name]) / torch.linalg.vector_norm(expected[name])
        assert error < tolerance, (name, error)


def test_a_transformers_model_in_one_graph():
    model, recorder = llama(lora_dropout=0.1), Recorder()
    compiled = recorder.compile(model)
    for size in ((2, 8), (3, 11)):
        tokens = ids(*size)
        torch._dynamo.mark_dynamic(tokens, (0, 1))
        assert_steps_agree(step(model, tokens, compiled), step(model, tokens))
    assert recorder.graphs == [("forward", {"forward": 7}), ("backward", {"backward": 7})]
    assert recorder.frames == 1


@pytest.mark.nightly
def test_layers_compiled_one_by_one_share_graphs():
    """As transformers and diffusers do it; the first is apart because its input needs no gradient."""
    model, recorder = llama(layers=3), Recorder()
    expected = step(model, ids(2, 8))
    for layer in model.base_model.model.model.layers:
        layer.compile(backend=recorder, fullgraph=True)
    assert_steps_agree(step(model, ids(2, 8)), expected)
    assert recorder.graphs == [("forward", {"forward": 7})] * 2 + [("backward", {"backward": 7})] * 2


def skip_without_a_compiler():
    from torch._inductor import cpp_builder, exc

    if DEVICE == "cpu":
        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            pytest.skip("inductor needs a C++ compiler, and there is none")


def ran(operator):
    return sum(count for (name, _), count in ops.calls.items() if name == operator)


def test_inductor():
    skip_without_a_compiler()
    model = dora_linears()[:2]
    compiled = torch.compile(model, backend="inductor", fullgraph=True, dynamic=True)
    for M in (5, 9):
        x, dy = torch.randn(M, 24, device=DEVICE), torch.randn(M, 40, device=DEVICE)
        expected = tensors(model, x, dy)
        ops.calls.clear()
        torch.testing.assert_close(tensors(model, x, dy, call=compiled), expected, rtol=1e-5, atol=1e-5)
        assert ran("forward") == ran("backward") == 1


@pytest.mark.nightly
def test_inductor_on_a_transformers_model():
    skip_without_a_compiler()
    model = llama(lora_dropout=0.0)
    compiled = torch.compile(model, backend="inductor", fullgraph=True, dynamic=True)
    for size in ((2, 8), (3, 11)):
        expected = step(model, ids(*size))
        ops.calls.clear()
        assert_steps_agree(step(model, ids(*size), compiled), expected)
        assert ran("forward") == ran("backward") == 7


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: CUDA graphs")
def test_reduce_overhead():
    """inductor's CUDA graphs: replayed from the third call on."""
    model = enabled(build())
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(5):
        x, dy = inputs(model, 64)
        expected = tensors(model, x, dy)
        torch.compiler.cudagraph_mark_step_begin()
        actual = {name: value.clone() for name, value in tensors(model, x, dy, call=compiled).items()}
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
