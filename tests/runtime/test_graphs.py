"""CUDA graphs: nothing in a pass asks for a value on the device, or for a size that depends on one; passes replay."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dora_kernels import DoraLinear, options, passes
from dora_kernels.pytorch import PYTORCH
from dora_kernels.types import Call, Epilogue, Given, How, Needs, Saved
from tests.support.problem import BACKENDS, DEVICE, Problem, core, two_pieces

EXACT = {"rtol": 0, "atol": 0}
# what waits for the device, or makes a size of what it finds there; a CUDA graph can hold neither
SYNCHRONISING = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_static", "masked_select", "unique_dim", "_unique2",
    "equal", "bincount", "repeat_interleave",
}  # fmt: skip


class NoSync(TorchDispatchMode):
    """Raises on every operator that a CUDA graph cannot hold, and counts the others."""

    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in SYNCHRONISING, f"{function} waits for the device"
        moves = name in ("_to_copy", "copy_") and any(
            t.device.type not in (DEVICE, "meta") for t in args if isinstance(t, torch.Tensor)
        )
        waits = not ((kwargs or {}).get("non_blocking") and args[0].is_pinned()) if moves else False
        assert not waits, f"{function} moves between devices and waits for it"
        self.seen += 1
        return function(*args, **(kwargs or {}))


def test_the_mode_sees_a_wait():
    with NoSync() as mode, pytest.raises(AssertionError, match="waits for the device"):
        assert torch.ones(3, device=DEVICE).isfinite().all()
    assert mode.seen > 0


@pytest.mark.parametrize("norm_grad", (False, True))
@pytest.mark.parametrize("dropout", (0.0, 0.5))
@pytest.mark.parametrize("function", (core, two_pieces), ids=("dora_linear", "rescale"))
def test_what_surrounds_the_operators_waits_for_nothing(function, dropout, norm_grad):
    """Validation, dtypes and autograd, forward and backward: the mode sees our operators as one each."""
    problem = Problem.random(17, 40, 36, 6, torch.float32, dropout=dropout)
    with NoSync() as mode:
        problem.run(function, norm_grad=norm_grad)
    assert mode.seen > 5


ARGUMENTS = [
    (way, precision, dtype, norm_grad, dropout)
    for way, precision in (("split", "auto"), ("merged", "auto"), ("split", "exact"))
    for dtype in (torch.float32, torch.bfloat16)
    for norm_grad, dropout in ((False, 0.5), (True, 0.0))
]


def run_steps(steps, problem, way, exact, norm_grad):
    """passes.forward and passes.backward themselves, under whatever mode is on."""
    dtype, dropped, layer = problem.weight.dtype, problem.x_dropped is not None, problem.layer
    save = "z_merged" if way == "merged" and not dropped else "base"
    how = How(dtype, dtype, way, save, "auto", save_low=True, exact=exact, dropped=dropped, norm_grad=norm_grad)
    call = Call(problem.x, problem.x_dropped, layer, problem.bias, Given(), how)
    _, norm, gain, low, made = passes.forward(steps, call)
    seen = problem.x_dropped if dropped else problem.x
    saved = Saved(seen, norm, gain, low, made, None, problem.magnitude.dtype, dtype)
    passes.backward(steps, problem.dy, saved, layer, how, Needs(True, dropped, True, True, True, True))
    B = problem.lora_B
    steps.epilogue(problem.dy, low, B, gain, problem.bias, problem.scaling, dtype)
    operands = Epilogue(problem.dy, low, B, gain, problem.scaling)
    passes.rescale_backward(steps, problem.dy, operands, False, [True] * 5, B.dtype)
    passes.norm_backward(steps, norm, norm, layer, dtype, [True, True])
    layers = ([tensor, tensor] for tensor in layer[:4])
    steps.grouped_norm(*layers, [problem.scaling, 0.5])
    index, scaling = torch.zeros(len(problem.dy), dtype=torch.int64, device=B.device), gain.new_ones(1)
    steps.bank_epilogue(problem.dy, low, B[None], gain[None], scaling, problem.bias, index)


@pytest.mark.parametrize(("way", "precision", "dtype", "norm_grad", "dropout"), ARGUMENTS, ids=str)
def test_the_launchers_wait_for_nothing(way, precision, dtype, norm_grad, dropout):
    """The code between kernels: on a GPU as it runs there, on a CPU around the interpreter, whose reads are hidden."""
    from dora_kernels.kernels import KERNELS

    problem = Problem.random(17, 40, 36, 6, dtype, dropout=dropout)
    with NoSync() as mode, torch.no_grad(), hidden_interpreter():
        run_steps(KERNELS, problem, way, precision == "exact", norm_grad)
    assert mode.seen > 20


@contextlib.contextmanager
def hidden_interpreter():
    """Triton's interpreter reads memory by operators of its own: each launch of a kernel leaves the mode."""
    if DEVICE == "cuda":
        yield
        return
    from torch.utils._python_dispatch import _disable_current_modes
    from triton.runtime.interpreter import GridExecutor

    launched = GridExecutor.__call__

    def call(self, *args, **kwargs):
        with _disable_current_modes():
            return launched(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", call)
        yield


@pytest.mark.parametrize(("way", "precision", "dtype", "norm_grad", "dropout"), ARGUMENTS, ids=str)
def test_the_reference_waits_for_nothing_off_the_cpu(way, precision, dtype, norm_grad, dropout):
    """On meta, which has no values to wait for: what the reference does only on a CPU is not done."""
    problem = Problem.random(17, 40, 36, 6, dtype, dropout=dropout)
    for name, value in vars(problem).items():
        if isinstance(value, torch.Tensor):
            setattr(problem, name, value.to("meta"))
    with NoSync() as mode, torch.no_grad():
        run_steps(PYTORCH, problem, way, precision == "exact", norm_grad)
    assert mode.seen > 20


# Captured and replayed, on a GPU alone.

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: CUDA graphs")


def captured(function):
    """(the graph, what function() returned while captured), after the warm-up on another stream that capture needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def layers_on_gpu(dropout=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(
        DoraLinear(96, 160, rank=5, alpha=7.0, dropout=dropout, device=DEVICE),
        nn.Tanh(),
        DoraLinear(160, 64, rank=3, alpha=7.0, device=DEVICE),
    )
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    return model


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", (True, False))
def test_forward_and_backward_replay(training, backend):
    """With other inputs and other weights than those of the capture: the norm is in the graph."""
    model, x = layers_on_gpu().train(training), torch.randn(33, 96, device=DEVICE, requires_grad=True)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run():
        y = model(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, *parameters])

    with options(backend=backend):
        graph, results = captured(run)
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            for parameter in parameters:
                parameter.mul_(1.25)
        graph.replay()
        torch.testing.assert_close(list(results), list(run()), **EXACT)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dropout", (0.0, 0.1))
def test_a_whole_training_step_replays(dropout):
    """Forward, loss, backward and AdamW in one graph; the loss falls as it does in eager."""
    losses = []
    for replays in (False, True):
        model = layers_on_gpu(dropout)
        x, target = torch.randn(64, 96, device=DEVICE), torch.randn(64, 64, device=DEVICE)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, capturable=True)

        def training_step(model=model, optimizer=optimizer, x=x, target=target):
            optimizer.zero_grad(set_to_none=False)
            loss = F.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
            return loss

        if replays:
            graph, loss = captured(training_step)  # after three eager steps of warm-up
            for _ in range(20):
                graph.replay()
        else:
            for _ in range(23):
                loss = training_step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.1 if dropout else 1e-3)


@pytest.mark.gpu
@needs_gpu
def test_make_graphed_callables():
    model = layers_on_gpu()
    x = torch.randn(33, 96, device=DEVICE, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), x)
    graphed = torch.cuda.make_graphed_callables(layers_on_gpu(), (x.detach().clone().requires_grad_(),))
    torch.testing.assert_close(torch.autograd.grad(graphed(x).square().sum(), x), expected, **EXACT)


def test_no_norm_is_kept_while_a_graph_is_captured(monkeypatch):
    from dora_kernels import reuse

    tensor = torch.ones(3, device=DEVICE)
    assert reuse.store.can_keep((tensor,), tensor.device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not reuse.store.can_keep((tensor,), torch.device("cuda"))


def test_no_compiler_is_asked_about_a_stream():
    """On a GPU Dynamo has to pass through this in every layer, and cannot trace a question about the stream."""
    from dora_kernels import reuse

    def function(x):
        return x + 1 if reuse.store.can_keep((x,), torch.device("cuda")) else x + 2

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))
