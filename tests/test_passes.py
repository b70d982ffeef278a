"""What the passes ask the planner, the steps and the operators for: choices that hardly show in the numbers."""

import inspect
import itertools

import pytest
import torch

import dora_kernels
from dora_kernels import gemm, ops, passes
from dora_kernels.functional import linear
from dora_kernels.planning import costs, measured, plan
from dora_kernels.pytorch import PYTORCH
from dora_kernels.quant import flatten_weight
from dora_kernels.types import Call, DoraWeight, Given, How, Needs, Saved
from tests.support.problem import BACKENDS, DEVICE, GRADIENTS, TOLERANCE, Problem
from tests.support.tuned_tables import H200, entry, forget_tables, pretend_table


@pytest.fixture
def asked(monkeypatch):
    """(function, arguments, keywords) of every question to the planner."""
    questions = []

    def recording(name):
        function = getattr(plan, name)

        def recorded(*arguments, **keywords):
            questions.append((name, arguments, keywords))
            return function(*arguments, **keywords)

        monkeypatch.setattr(plan, name, recorded)

    for name in ("forward_way", "dx_way", "beside", "saved_tensor", "intermediate"):
        recording(name)
    return questions


def test_the_planner_is_told_the_sizes_of_the_call(asked):
    problem = Problem.random(3, 40, 36, 6, torch.bfloat16)
    problem.ours("reference")
    problem.ours("reference", needs=())
    shape = costs.Shape(M=3, N=40, K=36, R=6, itemsize=2)
    questions = {name: (arguments, keywords) for name, arguments, keywords in asked}
    assert questions["saved_tensor"][0] == ("auto", torch.bfloat16, "reference", problem.x.device, (40, 36, 6))
    assert questions["forward_way"][0][:3] == ("auto", False, shape)
    assert questions["dx_way"][0][:2] == ("auto", shape)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """What was measured on the GPU that all tensors are on, at the sizes of this file."""
    forward = {"split": 100.0, "fused": 80.0, "merged": 90.0}
    backward = {"none": 100.0, "all": 80.0}
    found = entry(N=40, K=36, R=6, forward=forward, inference=forward, backward=backward)
    pretend_table(monkeypatch, tmp_path, found)
    yield measured.table_of(H200.name)
    forget_tables()


@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_the_planner_is_told_what_was_measured(backend, table, asked):
    """Where the kernels may be taken: PyTorch's steps were not measured."""
    problem = Problem.random(3, 40, 36, 6, torch.float16)
    kept, told = ("fused", table) if backend == "auto" else ("split", measured.NOTHING)
    problem.ours(backend)
    answers = {name: (arguments, keywords) for name, arguments, keywords in asked}
    assert answers["intermediate"][0][0] == kept
    problem.ours(backend, needs=())
    ways = [arguments for name, arguments, _ in asked if name == "forward_way"]
    assert [arguments[4] for arguments in ways] == [told]
    problem.ours(backend, way="merged")
    besides = [(arguments[0], *arguments[3:], keywords) for name, arguments, keywords in asked if name == "beside"]
    assert besides[-1] == ("merged", told, {"adapters_are_wider": False})
    Problem.random(3, 40, 36, 6, torch.float16, torch.float32).ours(backend, way="merged")
    assert [keywords for name, _, keywords in asked if name == "beside"][-1] == {"adapters_are_wider": True}


@pytest.mark.parametrize(
    ("needs", "expected"),
    (
        (GRADIENTS, [("token_sums", "project", "outer_product")]),
        (("x", "lora_A"), [("project", "outer_product")]),
        (("x", "magnitude"), [("token_sums",)]),
        (("x",), [()]),
    ),
    ids=str,
)
def test_only_what_is_wanted_runs_beside_dx(needs, expected, table, monkeypatch):
    """Without any of it dx is the GEMM library's, as where nothing was measured."""
    forked = []
    monkeypatch.setattr(ops, "PYTORCH", PYTORCH._replace(fork=lambda beside, *read: forked.append(beside)))
    Problem.random(4096, 40, 36, 6, torch.float16).ours("auto", needs=needs)
    assert forked == expected


@pytest.mark.parametrize("M", (1, 3, 300))
def test_what_has_won_is_made_and_kept_at_every_number_of_tokens(M, table, monkeypatch):
    made, forward = [], ops.run_forward
    monkeypatch.setattr(ops, "run_forward", lambda call: made.append((call.how.save, forward(call))) or made[-1][1])
    problem = Problem.random(M, 40, 36, 6, torch.float16)
    problem.ours("auto")
    (save, results) = made[0]
    double = problem.to(torch.float64)
    z = double.x @ (double.weight + double.scaling * double.lora_B @ double.lora_A).T
    assert save == "z_gemm" and _relative(results.intermediate, z) < 0.01


@pytest.mark.parametrize(
    ("dtypes", "arguments", "expected"),
    (
        ((torch.float32,), {}, {"needs_base": False, "adapters_are_wider": False}),
        ((torch.bfloat16, torch.float32), {}, {"needs_base": False, "adapters_are_wider": True}),
        ((torch.float32,), {"precision": "exact"}, {"needs_base": True, "adapters_are_wider": False}),
        ((torch.float32,), {"dropout": 0.4}, {"needs_base": True, "adapters_are_wider": False}),
    ),
    ids=("plain", "wider", "exact", "dropout"),
)
@pytest.mark.parametrize("needs", (GRADIENTS, ("x",)), ids=("saving", "saving nothing"))
def test_the_planner_is_told_what_a_call_asks_for(needs, dtypes, arguments, expected, asked):
    problem = Problem.random(3, 40, 36, 6, *dtypes, dropout=arguments.get("dropout", 0.0))
    problem.ours("reference", precision=arguments.get("precision", "auto"), needs=needs)
    answers = {name: keywords for name, _, keywords in asked if name not in ("dx_way", "beside")}
    decided = "saved_tensor" if needs == GRADIENTS else "forward_way"
    assert answers == {decided: expected, "intermediate": expected}


def test_a_device_that_is_no_cpu_is_not_planned_for_as_one():
    assert passes._device_model(torch.empty(0, device="meta")) is costs.DEVICES["NVIDIA H200"]
    if DEVICE == "cpu":
        assert passes._device_model(torch.empty(0)) is costs.DEVICES["cpu"]


def test_dx_is_not_planned_where_it_is_not_wanted(asked):
    Problem.random(3, 40, 36, 6, torch.float32).ours("reference", needs=("lora_B",))
    assert [name for name, *_ in asked] == ["forward_way", "intermediate"]


@pytest.mark.parametrize("norm_grad", (False, True))
@pytest.mark.parametrize("way", ("split", "merged"))
def test_a_forward_pass_keeps_what_the_backward_pass_needs_and_no_more(way, norm_grad, monkeypatch):
    """For every choice of what requires a gradient, with autograd and without."""
    problem = Problem.random(3, 8, 6, 2, torch.float32)
    flags = []

    def recorded(call):
        flags.append(call.how)
        return forward(call)

    forward = ops.run_forward
    monkeypatch.setattr(ops, "run_forward", recorded)
    for grad, needs_A, needs_B, needs_magnitude in itertools.product((False, True), repeat=4):
        problem.lora_A.requires_grad_(needs_A)
        problem.lora_B.requires_grad_(needs_B)
        problem.magnitude.requires_grad_(needs_magnitude)
        with torch.set_grad_enabled(grad), dora_kernels.options(backend="reference", way=way):
            linear.dora_linear_core(problem.x.requires_grad_(), problem.layer, norm_grad=norm_grad)
        needs_dot = grad and (needs_magnitude or (norm_grad and (needs_A or needs_B)))
        keep = ("base" if way == "split" else "z_merged") if needs_dot else ""
        asked = flags[-1].save, flags[-1].save_low
        assert asked == (keep, (grad and needs_B) or keep == "base"), (grad, needs_A, needs_B)


SAVED = {
    "base": ((torch.float32,), {"way": "split"}, "base"),
    "base, wider adapters": ((torch.bfloat16, torch.float32), {}, "base"),
    "base, unrounded": ((torch.bfloat16,), {"precision": "exact"}, "base"),
    "base, dropout": ((torch.bfloat16,), {"dropout": 0.4}, "base"),
    "z_merged": ((torch.float32,), {}, "z_merged"),
    "z_gemm": ((torch.bfloat16,), {"way": "fused"}, "z_gemm"),
    "z_gemm, float32": ((torch.float32,), {"way": "fused"}, "z_gemm"),
    "z_gemm or base": ((torch.bfloat16,), {}, {"reference": "z_gemm", "triton": "base"}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SAVED)
def test_what_is_saved_is_what_the_record_says(kind, backend, monkeypatch):
    """And the backward pass goes by the record: with a wrong one dmagnitude is wrong."""
    dtypes, arguments, expected = SAVED[kind]
    on_gpu = {"reference": "base", "triton": "base"}
    expected = expected if isinstance(expected, str) else (expected if DEVICE == "cpu" else on_gpu)[backend]
    problem = Problem.random(33, 40, 36, 6, *dtypes, dropout=arguments.get("dropout", 0.0))
    made, forward, backward = [], ops.run_forward, ops.run_backward
    monkeypatch.setattr(ops, "run_forward", lambda call: made.append(forward(call)) or made[-1])
    records, wrong = [], {}

    def recorded(dy, saved, layer, how, needs):
        records.append(how.save)
        for record in ("base",) if "dropout" in arguments else ("base", "z_gemm", "z_merged"):
            wrong[record] = backward(dy, saved, layer, how._replace(save=record), needs).magnitude
        return backward(dy, saved, layer, how, needs)

    monkeypatch.setattr(ops, "run_backward", recorded)
    options = {name: value for name, value in arguments.items() if name != "dropout"}
    results, exact = problem.ours(backend, **options), problem.exact()
    assert records == [expected]

    double = problem.to(torch.float64)
    seen = double.x if problem.x_dropped is None else double.x_dropped
    tensors = {"base": seen @ double.weight.T}
    tensors["z"] = tensors["base"] + double.scaling * seen @ double.lora_A.T @ double.lora_B.T
    saved, name = made[0].intermediate, expected.partition("_")[0]
    assert saved.dtype == (torch.float32 if kind == "base, unrounded" else dtypes[0])
    assert _relative(saved, tensors[name]) < 0.01 < 0.1 < _relative(saved, tensors["z" if name == "base" else "base"])

    assert _relative(results["magnitude"], exact["magnitude"]) < 0.01
    for record, dmagnitude in wrong.items():
        if (record == "base") != (expected == "base"):
            assert _relative(dmagnitude, exact["magnitude"]) > 0.1, record


def _relative(actual, exact):
    """|actual - exact| / |exact|, of the whole tensors."""
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("save", ("z", "low"))
def test_a_record_of_something_else_is_refused(save):
    problem = Problem.random(5, 12, 10, 3, torch.float32)
    how = How(torch.float32, torch.float32, "auto", save, "reference")
    expected = f"keep is '{save}'; expected 'base' or 'z_gemm' or 'z_merged', or nothing"
    with pytest.raises(ValueError, match=expected):
        ops.forward(*ops.flatten_forward(Call(problem.x, None, problem.layer, None, Given(), how)))
    with pytest.raises(ValueError, match=expected):
        ops.backward(*backward_arguments(problem, how))


def backward_arguments(problem, how, intermediate=True):
    row = torch.ones(12, device=DEVICE)
    tensor = problem.dy if intermediate else None
    saved = Saved(problem.x, row, row, None, tensor, None, torch.float32, torch.float32)
    return ops.flatten_backward(problem.dy, saved, problem.layer, how, Needs(*[True, False] * 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("save", ("z_gemm", "z_merged"))
@pytest.mark.parametrize("asked", ({"exact": True}, {"dropped": True}), ids=str)
def test_a_tensor_that_the_call_cannot_make_is_not_saved(asked, save, backend):
    """Where base is needed for itself, z would be that of another x, or rounded."""
    problem = Problem.random(5, 12, 10, 3, torch.float32, dropout=0.4)
    how = How(torch.float32, torch.float32, "auto", save, backend, **asked)
    x_dropped = problem.x_dropped if "dropped" in asked else None
    with pytest.raises(ValueError, match=f"keep is '{save}'; expected 'base', or nothing"):
        ops.forward(*ops.flatten_forward(Call(problem.x, x_dropped, problem.layer, None, Given(), how)))
    if "dropped" in asked:
        with pytest.raises(ValueError, match=f"keep is '{save}'; expected 'base', or nothing"):
            ops.backward(*backward_arguments(problem, how))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("save", "intermediate"), (("", True), ("", False), ("base", False), ("z_gemm", False)))
def test_dmagnitude_is_not_made_of_nothing(save, intermediate, backend):
    problem = Problem.random(5, 12, 10, 3, torch.float32)
    how = How(torch.float32, torch.float32, "auto", save, backend)
    with pytest.raises(ValueError, match=f"dmagnitude is wanted, and keep is '{save}'; expected what its forward"):
        ops.backward(*backward_arguments(problem, how, intermediate))


@pytest.mark.parametrize(
    "subset", (("lora_A",), ("lora_B",), ("magnitude",), ("lora_A", "lora_B"), ("x", "bias")), ids=str
)
@pytest.mark.parametrize("way", ("split", "merged"))
def test_any_subset_of_gradients_through_the_norm(way, subset):
    problem = Problem.random(17, 40, 36, 6)
    actual, exact = problem.ours("reference", way, norm_grad=True, needs=subset), problem.exact(norm_grad=True)
    for name in actual:
        torch.testing.assert_close(actual[name], exact[name], **TOLERANCE)


def test_the_norm_is_a_constant_unless_it_is_asked_for():
    """The public function's default, and its switch."""
    problem = Problem.random(5, 12, 10, 3)
    for arguments in ({}, {"norm_grad": False}, {"norm_grad": True}):
        actual, exact = problem.run(dora_kernels.dora_linear, **arguments), problem.exact(**arguments)
        for name in actual:
            torch.testing.assert_close(actual[name], exact[name], **TOLERANCE)


@pytest.mark.parametrize("norm_grad", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_the_operators_results_have_the_dtypes_of_what_they_are_gradients_of(dtype, norm_grad):
    """Autograd would convert them in silence."""
    problem = Problem.random(5, 12, 10, 3, dtype)
    norm = torch.ones(12, device=DEVICE)
    low, base = problem.x @ problem.lora_A.T, problem.x @ problem.weight.T
    results = ops.backward(
        problem.dy, problem.x, *flatten_weight(problem.weight), problem.lora_A, problem.lora_B, norm, norm, low, base,
        None, 0.75, dtype, "auto", "base", False, norm_grad, [True, False, True, True, True, True],
        dtype, torch.float32, "reference",
    )  # fmt: skip
    dx, _, dA, dB, dmagnitude, dbias, _ = (result.dtype for result in results)
    assert (dx, dA, dB, dmagnitude, dbias) == (dtype,) * 4 + (torch.float32,)


@pytest.mark.parametrize("way", ("split", "merged"))
@pytest.mark.parametrize("dropout", (0.0, 0.4))
@pytest.mark.parametrize("norm_grad", (False, True))
def test_under_autocast_every_operand_is_in_autocasts_dtype(norm_grad, dropout, way, monkeypatch):
    """A step that got a float32 operand would be more exact, and slower than what was asked for."""
    wide = []

    def recorded(name, function):
        parameters = list(inspect.signature(function).parameters)

        def step(*arguments, **keywords):
            given = dict(zip(parameters, arguments)) | keywords  # noqa: B905
            tensors = {
                key: value for key, value in given.items() if isinstance(value, torch.Tensor) and value.dim() == 2
            }
            # what a step writes has the dtype of its gradient
            wide.extend((name, key) for key in tensors.keys() - {"dB"} if tensors[key].dtype != torch.bfloat16)
            bias = given.get("bias")
            wide.extend([(name, "bias")] if bias is not None and bias.dtype != torch.bfloat16 else [])
            return function(*arguments, **keywords)

        return step

    functions = {name: function for name, function in PYTORCH._asdict().items() if callable(function)}
    steps = PYTORCH._replace(**{name: recorded(name, function) for name, function in functions.items()})
    monkeypatch.setattr(ops, "PYTORCH", steps)
    problem = Problem.random(5, 12, 10, 3, torch.float32, dropout=dropout)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        results = problem.ours("reference", way, norm_grad=norm_grad)
    assert wide == [] and results["y"].dtype == torch.bfloat16


def test_autocast_leaves_float64_alone_and_says_so():
    problem = Problem.random(5, 12, 10, 3)
    arguments = (problem.lora_A, problem.lora_B, problem.magnitude, 0.75)
    for x, weight in ((problem.x.double(), problem.weight.float()), (problem.x.float(), problem.weight.double())):
        with (
            torch.autocast(DEVICE, dtype=torch.bfloat16),
            pytest.raises(ValueError, match="autocast leaves float64 alone"),
        ):
            dora_kernels.dora_linear(x, weight, *arguments)


def test_a_scaling_of_minus_infinity_is_refused():
    problem = Problem.random(5, 12, 10, 3)
    for scaling in (float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=f"scaling is {scaling}; expected a finite"):
            dora_kernels.weight_norm(problem.weight, problem.lora_A, problem.lora_B, scaling)


@pytest.mark.parametrize("scaled", (False, True))
@pytest.mark.parametrize("other", (False, True), ids=("one dtype", "two dtypes"))
@pytest.mark.parametrize("answer", (False, True), ids=("library", "kernel"))
def test_the_planner_decides_between_the_kernel_and_the_library(answer, other, scaled, monkeypatch):
    kernels = pytest.importorskip("dora_kernels.kernels")
    problem = Problem.random(5, 12, 10, 3, torch.bfloat16, torch.float32 if other else torch.bfloat16)
    asked, used = [], []
    for name in ("project", "outer_product"):
        monkeypatch.setattr(gemm, name, lambda *_, name=name: used.append(name))
    for name in ("project_by_kernel", "outer_by_kernel"):
        monkeypatch.setattr(plan, name, lambda *given, **keywords: asked.append((*given[:4], keywords)) or answer)
    counters = torch.zeros(1, dtype=torch.int32, device=DEVICE) if scaled else None
    kernels.project(problem.x, problem.lora_A, counters=counters)
    kernels.outer_product(problem.lora_B, problem.dy.T, 1.0, torch.float32)
    # the kernel is launched by the sums over the tokens, which ask again
    low = (5, 10, 3, 2, {"same_dtype": not other, "counted": scaled})
    dB = (12, 5, 3, 2, {"same_dtype": not other, "beside": False})
    assert asked == [low] + (1 + answer) * [dB]
    assert used == ([] if answer else ["project", "outer_product"])


def test_what_is_given_is_not_returned():
    """norm and gain that a caller keeps: an operator must not return what it was given."""
    problem = Problem.random(5, 12, 10, 3)
    exact = problem.exact()
    norm = torch.linalg.vector_norm(problem.weight + 0.75 * problem.lora_B @ problem.lora_A, dim=1)
    gain = problem.magnitude / norm
    for way, keep, given in itertools.product(("split", "merged"), (False, True), (None, gain)):
        needs = GRADIENTS if keep else ()
        results = problem.run(
            lambda *arguments, given=given, way=way: _and_check(arguments, Given(norm, given), gain, way), needs=needs
        )
        for name in results:
            torch.testing.assert_close(results[name], exact[name], **TOLERANCE)


def _and_check(arguments, given, gain, way):
    x, *layer, bias = arguments
    with dora_kernels.options(backend="reference", way=way):
        y, new_norm, new_gain = linear.dora_linear_core(x, DoraWeight(*layer), bias, given=given)
    torch.testing.assert_close((new_norm, new_gain), (given.norm, gain), **TOLERANCE)
    return y
