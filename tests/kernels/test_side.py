"""What runs beside the GEMM of dx: the same results in every order that streams allow, nothing freed before its time.

On a CPU the streams are a model's (tests/support/stream_model.py), and dx is torch's product, as on a pretended GPU.
"""

import collections
import contextlib
import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import dora_kernels
from dora_kernels import ops, passes, reference
from dora_kernels.planning import devices, measured, plan
from dora_kernels.planning.devices import DeviceFacts
from dora_kernels.types import Gradients, How, Needs, Saved
from tests.support.problem import DEVICE, EXACT_DTYPE, Problem
from tests.support.racing_threads import in_threads
from tests.support.step_problem import SHAPES, close

kernels = pytest.importorskip("dora_kernels.kernels")

from dora_kernels.kernels import side as side_module  # noqa: E402
from dora_kernels.kernels.side import Side  # noqa: E402
from tests.support.stream_model import CaptureError, ModelStream, StreamModel  # noqa: E402

modelled = pytest.mark.skipif(not devices.interpreting(), reason="a GPU has streams of its own")
BESIDE = {name: steps for name, steps in measured.BESIDE.items() if steps}
LOW_RANK, TOKEN_SUMS = BESIDE["low rank"], BESIDE["token sums"]
# two blocks of two steps in the interpreter's tiles, for each of the sums: all four programs finish some
SIZES = 34, 48, 64, 5
NEEDS = Needs(True, False, True, True, True, True)
STEPS = kernels.KERNELS
HAS_GEMM = DEVICE == "cuda" and not torch.cuda.get_device_name().startswith("Pretended")
if not HAS_GEMM:
    STEPS = STEPS._replace(dx=lambda dy, merged, side=None: dy @ merged)


@pytest.fixture(autouse=True)
def streams_of_this_test():
    side_module._streams.clear()
    yield
    side_module._streams.clear()


@pytest.fixture
def takes_everything(monkeypatch):
    if not HAS_GEMM:
        monkeypatch.setattr(side_module.hopper, "why_not_gemm", lambda *tensors, nn: None)


@pytest.fixture(scope="module")
def problem():
    return Problem.random(*SIZES, EXACT_DTYPE)


@pytest.fixture(scope="module")
def inputs(problem):
    return saved_by_forward(problem)


def saved_by_forward(problem: Problem) -> Saved:
    gain, norm = problem.magnitude.abs() + 0.5, problem.magnitude.abs() + 1
    low, base = problem.x @ problem.lora_A.T, problem.x @ problem.weight.T
    return Saved(problem.x, norm, gain, low, base, None, problem.magnitude.dtype, problem.bias.dtype)


# A thread's choice of what runs beside dx: threads that patched plan.beside at a time would leave a patch behind.
_own = threading.local()


@pytest.fixture(scope="module", autouse=True)
def own_beside():
    with mock.patch.object(plan, "beside", lambda *asked, **named: _own.beside):
        yield


def backward(problem: Problem, saved: Saved, beside: tuple[str, ...], steps=STEPS, norm_grad=False) -> Gradients:
    """A backward pass with these steps beside dx."""
    dtype = problem.weight.dtype
    how = How(dtype, dtype, "merged", "base", "triton", norm_grad=norm_grad)
    _own.beside = beside
    return passes.backward(steps, problem.dy, saved, problem.layer, how, NEEDS)


@pytest.fixture(scope="module")
def expected(problem, inputs):
    """For each of BESIDE the gradients, without a model: on a CPU torch's streams do nothing."""
    with mock.patch.object(side_module.hopper, "why_not_gemm", lambda *tensors, nn: None):
        return {name: backward(problem, inputs, beside) for name, beside in BESIDE.items()}


def pairs(one: Gradients, other: Gradients) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, left, right in zip(Gradients._fields, one, other, strict=True):
        assert (left is None) == (right is None), name
        if left is not None:
            yield name, left, right


@modelled
def test_steps_beside_are_the_steps_alone(problem, inputs, expected):
    alone = backward(problem, inputs, ())
    for actual in expected.values():
        for _, left, right in pairs(actual, alone):
            close(left, right)


def wrong_in(model: StreamModel, run: Callable[[], Gradients], expected: Gradients) -> list[str]:
    """What is wrong with a backward pass in a model, the bits of its results or what the model has seen of it."""
    found = []
    with model.entered():
        main = model.current_stream()
        gradients = run()
        if model.unjoined(main):
            found.append("unjoined")
        main.synchronize()
        with torch.utils._python_dispatch._disable_current_modes():
            if not all(torch.equal(actual, right) for _, actual, right in pairs(gradients, expected)):
                found.append("results")
        del gradients
    if model.races():
        found.append("races")
    dx = next(one for one in model.launched if one.name == "mm")
    beside = [one for one in model.launched if one.stream is not main]
    if not beside or any(one.is_before(dx) or dx.is_before(one) for one in beside):
        found.append("not beside dx")
    return found


@modelled
@pytest.mark.parametrize("norm_grad", (False, True), ids=("", "norm_grad"))
@pytest.mark.parametrize("name", BESIDE)
def test_every_order_gives_the_same_bits(name, norm_grad, problem, inputs, expected, takes_everything):
    right = backward(problem, inputs, BESIDE[name], norm_grad=True) if norm_grad else expected[name]
    for seed in range(1 if norm_grad else 4):
        model = StreamModel(seed, fills=bool(seed % 2))
        assert not wrong_in(model, lambda: backward(problem, inputs, BESIDE[name], norm_grad=norm_grad), right)
        kernels_beside = [(one.name, one.grid) for one in model.launched if one.stream is model.pool[0]]
        names = {
            "token_sums": "_token_sums_kernel",
            "project": "_project_kernel",
            "outer_product": "_token_sums_kernel",
        }
        assert kernels_beside == [(names[step], (4,)) for step in BESIDE[name]]


class Unforked(Side):
    def launch(self, plan, grid, arguments):
        self._held.append(arguments)
        with self._streams.stream(self._side):
            plan.launch(grid, *arguments)


class ForkedOnce(Side):
    """As an event recorded by `fork` would do it."""

    def __init__(self, device):
        super().__init__(device)
        self._side.wait_stream(self._main)

    launch = Unforked.launch


class Unjoined(Side):
    def join(self):
        self._held.clear()


class LetsGo(Side):
    """Of what the launches were given, before the main stream waits for them."""

    def join(self):
        if self._held:
            self._held.clear()
            self._main.wait_stream(self._side)


class HoldsNothing(Side):
    def launch(self, plan, grid, arguments):
        super().launch(plan, grid, arguments)
        self._held[:] = [()]


class OnMain(Side):
    def launch(self, plan, grid, arguments):
        plan.launch(grid, *arguments)


class AfterDx(Side):
    """dx first: launches wait for it, and may be given what was freed behind it."""


FAULTS = {
    Unforked: "races",
    ForkedOnce: "races",  # between a launch and what fills its memory
    Unjoined: "unjoined",
    LetsGo: "races",
    HoldsNothing: "races",
    OnMain: "not beside dx",
    AfterDx: "not beside dx",
}


@modelled
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_seen(fault, problem, inputs, expected, takes_everything, monkeypatch):
    """The test above can fail. Of what is freed too early no order shows it: a kernel is done at once in the model."""
    monkeypatch.setattr(side_module, "Side", fault)
    steps, made = STEPS, []

    def dx_and_fork(beside, dy, merged, *read):
        made.append(dy @ merged)
        return STEPS.fork(beside, dy, merged, *read)

    if fault is AfterDx:
        steps = STEPS._replace(fork=dx_and_fork, dx=lambda dy, merged, side: made.pop())
    found, wanted = set(), {FAULTS[fault]} | ({"results"} if fault in (Unforked, ForkedOnce, Unjoined) else set())
    for seed in range(60):
        run = lambda: backward(problem, inputs, BESIDE["all"], steps)  # noqa: E731
        model = StreamModel(seed, fills=True)
        model.haste, model.eagerness[model.default] = 2.0, (0.05, 10.0)[seed % 2]
        found |= set(wrong_in(model, run, expected["all"]))
        if wanted <= found:
            return
    raise AssertionError(f"{found} in all orders; expected {wanted}")


@contextlib.contextmanager
def interrupted(model: StreamModel, at: int, error: type[BaseException]) -> Iterator[None]:
    """The `at`-th time that memory is allocated, something is launched, or a stream waits, an exception is raised."""
    count = [0]

    def counting(function):
        def wrapped(*arguments):
            count[0] += 1
            if count[0] == at:
                raise error("interrupted")
            return function(*arguments)

        return wrapped

    with (
        mock.patch.multiple(model, _allocate=counting(model._allocate), put=counting(model.put)),
        mock.patch.object(ModelStream, "wait_event", counting(ModelStream.wait_event)),
    ):
        yield


@modelled
def test_an_exception_frees_nothing_before_its_time(problem, inputs, takes_everything):
    """At every step of a pass; in `join` itself, it is the end of the side that joins it."""
    for at in itertools.count(1):
        error, model = (torch.OutOfMemoryError, KeyboardInterrupt)[at % 2], StreamModel(at)
        with model.entered():
            main, over = model.current_stream(), True
            with interrupted(model, at, error):
                try:
                    backward(problem, inputs, BESIDE["all"])
                except error:
                    over = False
            assert not model.unjoined(main), at
        assert not model.races(), at
        if over:
            break
    assert at > 12


@modelled
def test_a_stream_has_one_side(takes_everything, problem, inputs, expected):
    """Two of the user's streams and the default one, each of them twice: three sides, each forked thrice and joined."""
    model = StreamModel(0)
    waits = mock.patch.object(ModelStream, "wait_event", autospec=True, side_effect=ModelStream.wait_event)
    with model.entered(), waits as waited:
        users = model.default, model.new_stream(), model.new_stream()
        for user in (*users, *users):
            with model.on(user):
                backward(problem, inputs, BESIDE["all"])
    of = {
        user: {one.stream for one in model.launched if one.known.get(user) and one.grid} - set(users) for user in users
    }
    sides = [side_module._streams[user] for user in users]
    assert len(set(sides)) == 3 and list(of.values()) == [{side} for side in sides]
    assert not model.races()
    assert model.given_out == 2 + 3
    counts = collections.Counter(call.args[0] for call in waited.call_args_list)
    assert counts == dict.fromkeys(users, 2) | dict.fromkeys(sides, 6)


@modelled
def test_a_side_may_be_somebody_elses_stream(problem, inputs, expected, takes_everything):
    """torch gives out the streams of its pool in turn: here one is every side, and a main stream as well."""
    for seed in range(2):
        side_module._streams.clear()
        model, made = StreamModel(seed, pool=1), []
        with model.entered():
            users = model.new_stream(), model.default
            for user in (*users, users[0]):
                with model.on(user):
                    made.append(backward(problem, inputs, BESIDE["all"]))
            for user in users:
                user.synchronize()
            with torch.utils._python_dispatch._disable_current_modes():
                for gradients in made:
                    assert all(torch.equal(actual, right) for _, actual, right in pairs(gradients, expected["all"]))
            made.clear()
        assert not model.races()


@modelled
@pytest.mark.parametrize("of_its_own", (False, True), ids=("one stream", "two streams"))
def test_threads(of_its_own, problem, inputs, expected, takes_everything):
    wrong: list[str] = []
    model = StreamModel(3)

    def work(user: ModelStream) -> None:
        with model.on(user), model:
            for _ in range(3):
                gradients = backward(problem, inputs, BESIDE["all"])
                user.synchronize()
                with torch.utils._python_dispatch._disable_current_modes():
                    pairs_of = pairs(gradients, expected["all"])
                    wrong.extend(name for name, actual, right in pairs_of if not torch.equal(actual, right))

    with model.entered():
        users = (model.default, model.new_stream() if of_its_own else model.default)
        in_threads(*(functools.partial(work, user) for user in users))
    assert not wrong and not model.races()
    assert len(side_module._streams) == 1 + of_its_own


@modelled
@pytest.mark.parametrize("checkpointed", (False, True))
def test_layers_under_autograd(checkpointed, problem, takes_everything, monkeypatch):
    """Gradients of autograd's, which the second call adds to; checkpointed, it runs forward passes in between."""
    monkeypatch.setattr(kernels, "KERNELS", STEPS)
    for name, function in ops.OPERATORS.items():  # the model is to see what they are made of
        monkeypatch.setattr(ops, name, function)
    monkeypatch.setattr(plan, "beside", lambda *asked, **named: BESIDE["all"])
    weight, *factors, scaling = problem.layer

    def train() -> list[Tensor]:
        """The gradients of two calls, one behind the other's loss."""
        x, *adapter = (tensor.detach().clone().requires_grad_() for tensor in (problem.x, *factors))

        def layer(x: Tensor) -> Tensor:
            return dora_kernels.dora_linear(x, weight, *adapter, scaling, problem.bias)

        with dora_kernels.options(backend="triton", way="fused"):
            for _ in range(2):
                y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
                y.square().sum().backward()
        return [one.grad for one in (x, *adapter)]

    expected = train()
    for seed in range(2):
        model = StreamModel(seed)
        with model.entered(), model.on(model.new_stream()):
            made = train()
            model.current_stream().synchronize()
            with torch.utils._python_dispatch._disable_current_modes():
                assert all(map(torch.equal, made, expected))
            del made
        assert not model.races() and {one.stream for one in model.launched if one.grid} == set(model.pool[:2])


@modelled
def test_a_capture_holds_its_side(problem, inputs, expected, takes_everything):
    """Before, inside of and after captures on a stream of their own, as torch.cuda.graph makes them."""
    model = StreamModel(1)
    with model.entered():
        for _ in range(2):
            backward(problem, inputs, BESIDE["all"])
            captured = model.new_stream()
            with model.on(captured), model.capturing(captured):
                gradients = [backward(problem, inputs, BESIDE["all"]) for _ in range(2)]
            captured.synchronize()
            with torch.utils._python_dispatch._disable_current_modes():
                for one in gradients:
                    assert all(torch.equal(actual, right) for _, actual, right in pairs(one, expected["all"]))
            del gradients, one
    assert not model.races()


@modelled
@pytest.mark.parametrize("fault", (Unforked, Unjoined))
def test_a_capture_refuses_a_side_with_a_fault(fault, problem, inputs, takes_everything, monkeypatch):
    """It waits for what is outside, or has a branch that does not come back."""
    monkeypatch.setattr(side_module, "Side", fault)
    model = StreamModel(0)
    with model.entered(), pytest.raises(CaptureError):
        captured = model.new_stream()
        with model.on(captured), model.capturing(captured):
            backward(problem, inputs, BESIDE["all"])


@modelled
def test_a_side_that_launches_nothing_is_waited_for_by_nobody():
    model = StreamModel(0)
    with model.entered(), model.on(model.new_stream()), model.capturing(model.current_stream()):
        Side(torch.device("cpu")).join()
    assert not any(stream.waiting or stream.put for stream in model.streams)


@pytest.fixture
def launched(monkeypatch):
    """The grid of each launch, all of which are on a side."""
    grids, launch = [], Side.launch

    def recorded(side, plan, grid, arguments):
        grids.append(grid)
        launch(side, plan, grid, arguments)

    def refused(*arguments):
        raise AssertionError("the GEMM library was asked")

    monkeypatch.setattr(Side, "launch", recorded)
    for name in ("dora_kernels.gemm", "dora_kernels.kernels.token_sums"):
        monkeypatch.setattr(sys.modules[name], "matmul", refused)
    yield grids


def sums_beside(o: Problem, side: Side | None, steps=STEPS) -> dict[str, Tensor]:
    """What the three steps make of a problem, on a side or without one."""
    names = {"dB": o.lora_B, "dmagnitude": o.magnitude, "dbias": o.bias}
    made = {name: torch.empty_like(like) for name, like in names.items()}
    gain, norm, low, base = o.magnitude.abs() + 0.5, o.magnitude.abs() + 1, o.x @ o.lora_A.T, o.x @ o.weight.T
    counters = torch.zeros(3, max(o.dy.shape + o.x.shape), dtype=torch.int32, device=DEVICE)
    given = {"gain": gain, "saved": base, "norm": norm, "lora_B": o.lora_B}
    steps.token_sums(o.dy, low, 0.75, **given, **made, counters=counters[0], side=side)
    made["P"] = steps.project(o.dy, o.lora_B.mT, counters=counters[1], side=side)
    made["dA"] = steps.outer_product(low, o.x, 0.75, o.x.dtype, counters=counters[2], side=side)
    return made


@modelled
@pytest.mark.parametrize("shape", [*SHAPES, (70, 33, 40, 129), (0, 16, 16, 4)], ids=str)
def test_four_programs_or_as_many_as_there_are_units(shape, launched):
    M, N, K, R = shape
    problem = Problem.random(*shape, torch.float64)
    actual = sums_beside(problem, Side(problem.dy.device))
    expected = sums_beside(problem, None, reference_steps)
    for name in expected:
        close(actual[name], expected[name])
    tiles = [-(-size // 32) for size in (M, N, K)]  # the interpreter's, of 16 ranks
    ranks = -(-R // 16)
    units = [tiles[1] * ranks * max(tiles[0], 1), tiles[0] * ranks * tiles[1], tiles[2] * ranks * max(tiles[0], 1)]
    assert launched == [(min(4, count),) for count in units if count]


reference_steps = mock.Mock(
    token_sums=reference.token_sums, project=reference.project, outer_product=reference.outer_product
)


@modelled
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_tiles_of_a_hopper_gpu(dtype, monkeypatch, launched):
    """Several of them in each direction, with tails, at a rank that is left to the GEMM library elsewhere."""
    problem = Problem.random(272, 272, 272, 66, dtype)
    monkeypatch.setattr(devices, "device_facts", lambda device: DeviceFacts("NVIDIA H200", "sm_90", 132))
    actual = sums_beside(problem, Side(problem.dy.device))
    wide = Problem(
        **{name: value.double() for name, value in vars(problem).items() if isinstance(value, Tensor)}
        | {"x_dropped": None, "scaling": problem.scaling}
    )
    for name, exact in sums_beside(wide, None, reference_steps).items():
        assert (actual[name] - exact).norm() <= 2 ** (-7 if dtype == torch.bfloat16 else -10) * exact.norm(), name
    assert launched == 3 * [(4,)]


@modelled
@pytest.mark.parametrize(
    ("change", "forked"),
    [
        ({}, True),
        ({"beside": ()}, False),
        ({"low": None}, True),
        ({"low": torch.zeros(32, 5, dtype=torch.float32)}, False),  # adapters wider than the weight
        ({"scaled_B": torch.zeros(3, 48, 5, dtype=torch.bfloat16)}, False),  # in parts
        ({"saved": torch.zeros(32, 48, dtype=torch.float32)}, False),  # precision="exact"
        (
            dict(zip(("dy", "merged"), torch.zeros(2, 40, 40, dtype=torch.bfloat16), strict=True)),
            False,
        ),  # no 16 elements
        ({"x": torch.zeros(32, 72, dtype=torch.bfloat16)[:, :64]}, False),  # nor so far apart
        ({"x": torch.zeros(64, 32, dtype=torch.bfloat16).T}, False),
        ({"x": torch.zeros(32 * 64 + 1, dtype=torch.bfloat16)[1:].view(32, 64)}, False),
        ({"gemm": "it is not built for that"}, False),
    ],
)
def test_a_fork(change, forked, monkeypatch):
    given = {"beside": LOW_RANK, "gemm": None}
    sizes = {"dy": (32, 48), "merged": (48, 64), "low": (32, 5), "saved": (32, 48), "scaled_B": (48, 5), "x": (32, 64)}
    given |= {name: torch.zeros(size, dtype=torch.bfloat16) for name, size in sizes.items()} | change
    monkeypatch.setattr(side_module.hopper, "why_not_gemm", lambda dy, merged, nn: given["gemm"])
    side = kernels.fork(*(given[name] for name in ("beside", *sizes)))
    assert isinstance(side, Side) == forked and (side is None) != forked


@pytest.fixture
def on_the_device(takes_everything, monkeypatch):
    """A function that runs a backward pass with all beside dx, and the gradients of one without a side."""
    if DEVICE == "cpu":
        pytest.skip("there is no GPU")
    M, N, K, R = (1000, 1040, 1072, 20) if HAS_GEMM else (100, 272, 304, 20)
    problem = Problem.random(M, N, K, R, torch.bfloat16)
    saved = saved_by_forward(problem)
    saved = saved._replace(norm=saved.norm.float(), gain=saved.gain.float())
    made, init = [], Side.__init__
    monkeypatch.setattr(Side, "__init__", lambda side, device: made.append(side) or init(side, device))

    def run() -> Gradients:
        before = len(made)
        gradients = backward(problem, saved, BESIDE["all"])
        if len(made) == before:
            pytest.skip("nothing runs beside a GEMM on this GPU")
        return gradients

    return run, backward(problem, saved, ())


def test_beside_on_a_gpu(on_the_device):
    run, alone = on_the_device
    first, second = run(), run()
    for _, left, right in pairs(first, second):
        assert torch.equal(left, right)
    for name, actual, expected in pairs(first, alone):  # both have a rounding of bfloat16 to themselves
        assert (actual.double() - expected.double()).norm() <= 2**-7 * expected.double().norm(), name


def test_streams_of_a_gpu(on_the_device):
    """Of the user's, in turn, without a wait of the host; memory is freed and given out again all the time."""
    run, _ = on_the_device
    first, wrong = run(), []
    torch.cuda.synchronize()
    users = [torch.cuda.current_stream(), *(torch.cuda.Stream() for _ in range(2))]
    for user in (10 if HAS_GEMM else 1) * users:
        with torch.cuda.stream(user):
            wrong += [(left != right).sum() for _, left, right in pairs(run(), first)]
            torch.full((1 << 20,), torch.nan, device=DEVICE)  # into what was just freed
    torch.cuda.synchronize()
    assert not any(int(count) for count in wrong)
    assert len({side_module._streams[user] for user in users}) == 3


def test_a_graph_of_a_gpu(on_the_device):
    run, _ = on_the_device
    first = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        for tensor in captured:
            if HAS_GEMM and tensor is not None:  # the replay of a pretended GPU does nothing
                tensor.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(left, right) for _, left, right in pairs(captured, first))
