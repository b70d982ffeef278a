"""A call whose signature is known is checked no more, and a pass that nobody watches is called past its operator."""

import itertools
import random
import threading

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dora_kernels
from dora_kernels import ops, options
from dora_kernels.functional import linear
from dora_kernels.functional.rescale import rescale
from dora_kernels.quant import QuantizedWeight
from dora_kernels.types import DoraWeight, Given
from tests.support.problem import BACKENDS, DEVICE, DTYPES, Problem

M, N, K, R = 5, 8, 6, 2


class Subclass(torch.Tensor):
    """A tensor with a meaning of its own, for all that one knows."""


def arguments() -> dict[str, object]:
    """A call of `dora_linear_core` with every tensor that it can be given."""
    problem = Problem.random(M, N, K, R, torch.float32)
    row = torch.ones(N, device=DEVICE)
    return {
        **{name: getattr(problem, name).clone() for name in ("x", "weight", "lora_A", "lora_B", "magnitude", "bias")},
        **{"norm": row, "gain": row.clone(), "merged": problem.weight.clone(), "low": problem.x @ problem.lora_A.T},
        **{"x_dropped": None, "norm_grad": False, "scaling": 0.5},
    }


def ways_to_change(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Tensors that a check or a choice may tell from this one."""
    changed = [tensor.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.int64)]
    changed += [tensor.to("meta"), tensor.to_sparse(), tensor.flatten()[:-1], tensor[None], tensor[..., :-1]]
    changed += [
        tensor.repeat(2, *[1] * (tensor.dim() - 1)),
        tensor.clone().requires_grad_(),
        tensor.as_subclass(Subclass),
    ]
    changed += [torch.nested.nested_tensor([tensor, tensor]), tensor.sum(), tensor[:0]]
    return changed


def quantized(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    q = torch.ones(rows, columns, dtype=torch.int8, device=DEVICE)
    return QuantizedWeight("row8", (rows, columns), dtype, (q, torch.ones(rows, device=DEVICE)))


def outcome(call: dict[str, object]) -> tuple[object, ...]:
    """What a call is found to be: scaling and How, or the error."""
    given = Given(*(call[name] for name in Given._fields))
    layer = DoraWeight(*(call[name] for name in DoraWeight._fields))
    others = (call["bias"], call["x_dropped"], given, call["norm_grad"])
    try:
        return linear.checked("dora_linear", call["x"], layer, *others)[:2]
    except (ValueError, NotImplementedError) as error:
        return type(error).__name__, str(error)


def checked_anew(call: dict[str, object]) -> tuple[object, ...]:
    kept = dict(linear._known)
    linear._known.clear()
    try:
        return outcome(call)
    finally:
        linear._known.update(kept)


def test_what_is_found_by_the_signature_is_what_a_check_finds():
    """Over changes of one to three of a call's arguments, each made beside calls that are known."""
    draw, wrong, known = random.Random(0), 0, 0
    linear._known.clear()
    fine = arguments()
    changes = {name: ways_to_change(value) for name, value in fine.items() if isinstance(value, torch.Tensor)}
    changes |= {"norm_grad": [True, None, 1], "low": [None]}
    changes |= {"scaling": [1, True, None, float("nan"), 1e39, 1e-60], "norm": [None], "gain": [None], "merged": [None]}
    singles = [{name: value} for name, values in changes.items() for value in values]
    singles += [{name: None} for name in ("x", "weight", "lora_A", "lora_B", "magnitude", "bias")]
    singles += [{"low": None, "x_dropped": value} for value in (fine["x"], *ways_to_change(fine["x"]))]
    singles += [{"weight": quantized(*facts)} for facts in ((N, K), (K, N), (N, K, torch.float64))]
    several = [
        {name: draw.choice(changes[name]) for name in draw.sample(sorted(changes), draw.randint(2, 4))}
        for _ in range(100)
    ]
    choices = ({}, {"precision": "exact"}, {"way": "split"}, {"backend": "triton"})
    for change, chosen in itertools.product([{}, *singles, *several], choices):
        call = fine | change
        with options(**chosen), torch.set_grad_enabled(draw.random() < 0.7):
            expected = checked_anew(call)
            assert outcome(call) == expected, change  # by its signature, if another call had the same
            known += expected == outcome(call) and not isinstance(expected[0], str)
        wrong += isinstance(expected[0], str)
    assert wrong > 500 and known > 100
    assert 20 < len(linear._known) < known


def test_the_number_of_tokens_and_scaling_are_no_part_of_it():
    linear._known.clear()
    for rows, scaling in ((1, 0.5), (7, 2.0), (300, 2), (0, -1.0)):
        problem = Problem.random(rows, N, K, R, torch.float32)
        linear.dora_linear_core(problem.x, problem.layer._replace(scaling=scaling))
    assert len(linear._known) == 1


def test_autocast_and_gradients_are_part_of_it():
    linear._known.clear()
    problem = Problem.random(M, N, K, R, torch.float32)
    hows = []
    for autocast, grad in itertools.product((False, True), repeat=2):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast), torch.set_grad_enabled(grad):
            layer = problem.layer._replace(lora_B=problem.lora_B.detach().requires_grad_())
            hows.append(linear.checked("f", problem.x, layer, None, None, Given(), False)[1])
    assert [(how.dtype, how.save_low) for how in hows] == [
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ]


def test_no_more_signatures_are_kept_than_said(monkeypatch):
    monkeypatch.setattr(linear, "KEPT", 3)
    for rank in range(1, 12):
        problem = Problem.random(M, N, K, rank, torch.float32)
        linear.dora_linear_core(problem.x, problem.layer)
        assert len(linear._known) <= 3


class Recorder(TorchDispatchMode):
    """The operators of this package that a dispatch mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "dora_kernels":
            self.seen.append(operator._schema.name)
        return operator(*args, **(kwargs or {}))


def step(problem: Problem, **named) -> list[torch.Tensor]:
    """y and the gradients of a training step."""
    leaves = [getattr(problem, name).detach().requires_grad_() for name in ("x", "lora_A", "lora_B", "magnitude")]
    x, *adapter = leaves
    y = linear.dora_linear_core(x, DoraWeight(problem.weight, *adapter, 0.5), problem.bias, **named)[0]
    return [y.detach(), *torch.autograd.grad(y, leaves, problem.dy)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("dropped", (False, True))
@pytest.mark.parametrize("norm_grad", (False, True))
def test_a_pass_and_its_operator_give_the_same_bits(backend, dtypes, dropped, norm_grad):
    problem = Problem.random(33, 24, 18, 3, *dtypes)
    named = {"x_dropped": problem.x * 2 if dropped else None, "norm_grad": norm_grad}
    before = ops.calls.copy()
    with options(backend=backend):
        direct = step(problem, **named)
        with Recorder() as recorder:
            by_operator = step(problem, **named)
    assert recorder.seen == ["dora_kernels::forward", "dora_kernels::backward"]
    assert all(map(torch.equal, direct, by_operator)) and all(result.abs().sum() > 0 for result in direct)
    assert ops.calls - before == {("forward", backend): 2, ("backward", backend): 2}


def test_a_backward_pass_alone_is_seen_by_who_watches_it():
    problem = Problem.random(M, N, K, R, torch.float32)
    y = linear.dora_linear_core(problem.x.requires_grad_(), problem.layer)[0]
    with Recorder() as recorder:
        y.sum().backward()
    assert recorder.seen == ["dora_kernels::backward"]


FORWARD, BACKWARD = {"dora_kernels::forward", "DoraLinearFunction"}, {"dora_kernels::backward"}
CPU = [torch.profiler.ProfilerActivity.CPU]


def profiled_names(profile):
    return {event.name for event in profile.events()}


def one_pass(problem):
    """A training step as a user makes it."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (problem.x, *problem.layer[1:4])]
    return dora_kernels.dora_linear(leaves[0], problem.weight, *leaves[1:], 0.7)


PROFILERS = {
    "torch.profiler": lambda: torch.profiler.profile(activities=CPU),
    "torch.autograd.profiler": lambda: torch.autograd.profiler.profile(use_kineto=True),
    "of a schedule": lambda: torch.profiler.profile(activities=CPU, schedule=lambda step: RECORDING),
}
RECORDING = torch.profiler.ProfilerAction.RECORD


@pytest.mark.parametrize("profiler", PROFILERS)
def test_a_profiler_sees_the_operators_by_name(profiler):
    problem = Problem.random(M, N, K, R, torch.float32)
    one_pass(problem).sum().backward()  # which goes past them
    with PROFILERS[profiler]() as profile:
        y = one_pass(problem)
        with torch.profiler.record_function("the backward pass"):
            y.sum().backward()
    events = getattr(profile, "events", None) or (lambda: profile.function_events)
    names = [event.name for event in events()]
    assert FORWARD | BACKWARD | {"DoraLinearFunctionBackward", "the backward pass"} <= set(names)
    assert names.count("dora_kernels::forward") == names.count("dora_kernels::backward") == 1


def test_a_profiler_that_starts_between_the_passes_sees_the_second():
    problem = Problem.random(M, N, K, R, torch.float32)
    y = one_pass(problem)
    with torch.profiler.profile(activities=CPU) as profile:
        y.sum().backward()
    assert BACKWARD < profiled_names(profile) and not FORWARD & profiled_names(profile)
    with torch.profiler.profile(activities=CPU) as profile:
        y = one_pass(problem)
    ops.calls.clear()
    y.sum().backward()
    assert FORWARD < profiled_names(profile) and not BACKWARD & profiled_names(profile)
    assert ops.calls.total() == 1


@pytest.mark.parametrize("where", ("here", "in another thread"))
def test_a_profiler_of_all_threads_sees_the_operators(where):
    """To torch._C._autograd._profiler_enabled it is on in no thread."""
    problem = Problem.random(M, N, K, R, torch.float32)

    def step():
        one_pass(problem).sum().backward()

    threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(activities=CPU, experimental_config=threads) as profile:
        if where == "here":
            step()
        else:
            thread = threading.Thread(target=step)
            thread.start()
            thread.join()
    assert FORWARD | BACKWARD <= profiled_names(profile)


@pytest.mark.skipif(not torch.profiler.itt.is_available(), reason="a torch without Intel's ITT")
def test_observers_of_record_functions_see_the_operators(monkeypatch):
    """emit_nvtx pushes a range for each; here that of Intel's, which needs no GPU, says what is observed."""
    problem = Problem.random(M, N, K, R, torch.float32)
    called = []
    for name in ("forward", "backward"):
        run = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *flat, name=name, run=run: called.append(name) or run(*flat))
    with torch.autograd.profiler.emit_itt():
        one_pass(problem).sum().backward()
    assert called == ["forward", "backward"]
    one_pass(problem).sum().backward()
    assert called == ["forward", "backward"]


class FunctionRecorder(TorchFunctionMode):
    """The functions of torch that a function mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_function_mode_sees_the_operator_and_nothing_of_its_pass():
    problem = Problem.random(M, N, K, R, torch.float32)
    with FunctionRecorder() as recorder:
        y = linear.dora_linear_core(problem.x, problem.layer)[0]
    assert torch.equal(y, linear.dora_linear_core(problem.x, problem.layer)[0])
    assert recorder.seen.count("dora_kernels.forward.default") == 1
    assert not [name for name in recorder.seen if "new_empty" in name or "matmul" in name]


def test_a_tensor_with_a_meaning_of_its_own_goes_to_the_operator(monkeypatch):
    problem = Problem.random(M, N, K, R, torch.float32)
    monkeypatch.setattr(ops, "run_forward", None)
    with pytest.raises(TypeError):
        linear.dora_linear_core(problem.x, problem.layer)
    called = []
    monkeypatch.setattr(ops, "forward", lambda *flat: called.append(flat) or [problem.dy, None, None, None, None])
    linear.dora_linear_core(problem.x.as_subclass(Subclass), problem.layer)
    weight = nn.Parameter(problem.weight, requires_grad=False)
    weight.__class__ = type("Named", (nn.Parameter,), {})
    linear.dora_linear_core(problem.x, problem.layer._replace(weight=weight))
    assert len(called) == 2


def negative_view(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as torch has the imaginary part of a conjugate: in memory with the other sign."""
    view = torch.complex(tensor, -tensor).conj().imag
    assert view.is_neg() and torch.equal(view, tensor)
    return view


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("x", "weight", "lora_A", "lora_B", "magnitude", "bias", "dy", "x_dropped"))
def test_what_torch_negates_as_it_is_read(name, backend):
    problem = Problem.random(33, 24, 18, 3, torch.float32)
    given = {"x_dropped": problem.x} if name == "x_dropped" else {}
    with options(backend=backend):
        expected = step(problem, **given)
        if given:
            given = {name: negative_view(problem.x)}
        else:
            setattr(problem, name, negative_view(getattr(problem, name)))
        results = step(problem, **given)
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_a_conjugate(backend):
    """Autograd hands on one that torch negates as it is read."""
    problem = Problem.random(33, 24, 18, 3, torch.float32)
    lora_B = problem.lora_B.requires_grad_()
    with options(backend=backend):
        y = linear.dora_linear_core(problem.x, problem.layer)[0]
        (expected,) = torch.autograd.grad(y, lora_B, -problem.dy, retain_graph=True)
        spectrum = torch.complex(torch.zeros_like(y), y).conj()
        (result,) = torch.autograd.grad(spectrum, lora_B, torch.complex(problem.dy, problem.dy))
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_zeros_without_memory(backend, monkeypatch):
    problem = Problem.random(33, 24, 18, 3, torch.float32)
    problem.dy = torch._efficientzerotensor(problem.dy.shape, device=DEVICE)
    called, backward = [], ops.backward
    monkeypatch.setattr(ops, "backward", lambda *flat: called.append(flat[0]) or backward(*flat))
    with options(backend=backend):
        _, *gradients = step(problem)
    assert len(called) == 1 and not any(gradient.any() for gradient in gradients)


CALLS = {
    "weight_norm": lambda problem, x, A, B, m: dora_kernels.weight_norm(problem.weight, A, B, 0.5),
    "weight_norm, norm_grad": lambda problem, x, A, B, m: dora_kernels.weight_norm(
        problem.weight, A, B, 0.5, norm_grad=True
    ),
    "rescale": lambda problem, x, A, B, m: rescale(x @ problem.weight.T, x @ A.T, B, m, 0.5, problem.bias),
}
OPERATORS = {
    "weight_norm": ["norm"],
    "weight_norm, norm_grad": ["norm", "norm_backward"],
    "rescale": ["rescale", "rescale_backward"],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_the_other_functions_give_the_same_bits_past_their_operators(name, backend, monkeypatch):
    problem = Problem.random(33, 24, 18, 3, torch.float32)

    def step() -> list[torch.Tensor]:
        leaves = [getattr(problem, one).detach().requires_grad_() for one in ("x", "lora_A", "lora_B", "magnitude")]
        result = CALLS[name](problem, *leaves)
        if not result.requires_grad:
            return [result]
        gradients = torch.autograd.grad(result.square().sum(), leaves, allow_unused=True)
        return [result.detach(), *(one for one in gradients if one is not None)]

    with options(backend=backend):
        with Recorder() as recorder:
            by_operator = step()
        for operator in OPERATORS[name]:
            monkeypatch.setattr(ops, operator, None)
        direct = step()
    assert recorder.seen == [f"dora_kernels::{operator}" for operator in OPERATORS[name]]
    assert len(direct) == len(by_operator) and all(map(torch.equal, direct, by_operator))
    assert all(result.abs().sum() > 0 for result in direct)


@pytest.mark.parametrize("name", CALLS)
def test_the_other_functions_take_what_torch_negates_as_it_is_read(name):
    problem = Problem.random(33, 24, 18, 3, torch.float32)
    x, lora_A, lora_B, magnitude = problem.x, problem.lora_A, problem.lora_B, problem.magnitude
    with options(backend=BACKENDS[-1]):
        expected = CALLS[name](problem, x, lora_A, lora_B, magnitude)
        result = CALLS[name](problem, x, lora_A, negative_view(lora_B), magnitude)
    torch.testing.assert_close(result, expected)
