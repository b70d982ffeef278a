"""What can go wrong outside the package: memory that runs out, a second thread, stream or process, a killed write.

Each ends in the right answer or in a clear error, and the next call is right.
"""

import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.checkpoint import checkpoint

import dora_kernels
from bench.lib import tuned
from dora_kernels import DoraLinear, ops, options, reuse
from dora_kernels.planning import configs, devices
from dora_kernels.planning.options import Options, current_options
from tests.support.problem import BACKENDS, DEVICE, GRADIENTS, Problem, core, definition
from tests.support.racing_threads import in_threads

ROOT = Path(__file__).parents[2]
WAYS = ("split", "merged")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
# before it a failure inside a checkpoint left the checkpoint's hooks behind, and the next step failed
needs_checkpoint_that_recovers = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="mended in torch 2.13: https://github.com/pytorch/pytorch/pull/184018"
)

if DEVICE == "cpu":
    # Autograd looks for devices in its first backward pass. Once torch.compile has traced with a CUDA build of torch,
    # it finds one even where there is none, starts a thread for it, and no forked process may differentiate any more.
    torch.ones((), requires_grad=True).backward()


@pytest.fixture
def layer() -> DoraLinear:
    """A layer whose adapter counts, in eval mode."""
    torch.manual_seed(0)
    layer = DoraLinear(24, 20, rank=4, alpha=6.0, device=DEVICE).eval()
    with torch.no_grad():
        layer.lora_B.weight.normal_()
    return layer


class Exhausted(TorchDispatchMode):
    """The `at`-th operation of torch, or launch of a kernel, raises torch.OutOfMemoryError."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.done = at, 0

    def step(self, what: object) -> None:
        self.done += 1
        if self.done == self.at:
            raise torch.OutOfMemoryError(f"no memory for {what}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.step(func)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def memory_for(steps: int) -> Iterator[Exhausted]:
    """Inside, the first operation after `steps` fails: of the caller, inside the operators, or a launch."""
    mode = Exhausted(steps + 1)
    plain_mode = ops.plain_mode

    def plain_and_exhausted(tensor):
        # torch turns a mode off inside the operator that it has seen
        stack = contextlib.ExitStack()
        stack.enter_context(plain_mode(tensor))
        stack.enter_context(mode)
        return stack

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "plain_mode", plain_and_exhausted)
        if devices.has_triton():
            from dora_kernels.kernels import tile

            kernel = type(tile.block_offsets)  # compiled or interpreted
            run = kernel.run

            @functools.wraps(run)
            def counted_run(self, *arguments, **keywords):
                mode.step("a launch")
                with _disable_current_modes():  # what the interpreter does is no step of ours
                    return run(self, *arguments, **keywords)

            patch.setattr(kernel, "run", counted_run)
        with mode:
            yield mode


# the interpreter takes its time: there only one step in so many fails
STRIDE = {"reference": 1, "triton": 2}


def every_failure(call: Callable[[], object], stride: int = 1) -> Iterator[int]:
    """Yields after each failure of `call`, which gets memory for `stride` more steps every time, until it succeeds."""
    for steps in range(0, 1000, stride):
        try:
            with memory_for(steps):
                call()
        except torch.OutOfMemoryError:
            yield steps
        else:
            return
    raise AssertionError("never succeeded")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "arguments", ({}, {"norm_grad": True}, {"dropout": 0.4}), ids=("plain", "norm_grad", "dropout")
)
def test_out_of_memory_at_every_step_of_a_call(arguments, way, backend):
    problem = Problem.random(5, 12, 10, 3, torch.float32, dropout=arguments.get("dropout", 0.0))
    keywords = {name: value for name, value in arguments.items() if name != "dropout"}
    if problem.x_dropped is not None:
        keywords["x_dropped"] = problem.x_dropped
    leaves = {name: getattr(problem, name).requires_grad_() for name in GRADIENTS}
    inputs = {name: value for name, value in vars(problem).items() if isinstance(value, torch.Tensor)}
    before = {name: (value.detach().clone(), value._version) for name, value in inputs.items()}
    failed_in = []

    def call():
        failed_in.append("forward")
        with options(backend=backend, way=way):
            y = core(
                problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, problem.scaling,
                problem.bias, **keywords,
            )  # fmt: skip
        failed_in[-1] = "backward"
        return y, torch.autograd.grad(y, list(leaves.values()), problem.dy)

    y, gradients = call()
    failed_in.clear()
    for steps in every_failure(call, STRIDE[backend]):
        assert current_options() == Options()
        for name, (value, version) in before.items():
            assert torch.equal(inputs[name], value) and inputs[name]._version == version, (steps, name)
        if steps % 5 == 0:
            y_again, gradients_again = call()
            failed_in.pop()
            assert torch.equal(y_again, y) and all(map(torch.equal, gradients_again, gradients)), steps
    assert failed_in.count("forward") >= 5 and failed_in.count("backward") >= 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_pass_that_ran_out_of_memory_may_be_run_again(backend):
    """Right, or torch's error: what the failed pass has freed it cannot use."""
    problem = Problem.random(5, 12, 10, 3, torch.float32)
    expected = problem.ours(backend)
    leaves = [getattr(problem, name).requires_grad_() for name in GRADIENTS]

    def forward():
        return core(
            problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, problem.scaling, problem.bias
        )

    ended = set()
    for steps in range(0, 1000, STRIDE[backend]):
        with options(backend=backend):
            y = forward()
        try:
            with memory_for(steps):
                torch.autograd.grad(y, leaves, problem.dy)
            break
        except torch.OutOfMemoryError:
            pass
        try:
            gradients = torch.autograd.grad(y, leaves, problem.dy)
        except RuntimeError as error:
            assert "backward through the graph a second time" in str(error)
            ended.add("error")
        else:
            assert all(
                torch.equal(gradient, expected[name]) for name, gradient in zip(GRADIENTS, gradients, strict=True)
            )
            ended.add("right")
    assert steps > 5 and "right" in ended


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_half_made_is_kept(backend, layer):
    """Norm and gain are kept whole or not at all, also where others were kept before."""
    x = torch.randn(5, 24, device=DEVICE)
    with options(backend=backend):
        for changed in (False, True):
            if changed:
                layer(x)
                with torch.no_grad():
                    layer.lora_B.weight.mul_(2)
            count = 0
            for _ in every_failure(lambda: layer(x)):
                count += 1
                torch.testing.assert_close(layer(x), definition(layer, x))
                with torch.no_grad():
                    layer.lora_B.weight.mul_(-1.1)  # so that the next call has a norm to make
            assert count >= 3
    assert current_options() == Options()


@pytest.mark.parametrize("use_reentrant", (pytest.param(False, marks=needs_checkpoint_that_recovers), True))
@pytest.mark.parametrize("backend", BACKENDS)
def test_out_of_memory_under_checkpointing(backend, use_reentrant, layer):
    """The backward pass computes the forward pass once more, with the norm that is kept; then comes the next step."""
    layer.train()
    x = torch.randn(5, 24, device=DEVICE, requires_grad=True)
    wanted = [x, layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector]
    expected = torch.autograd.grad(definition(layer, x).square().sum(), wanted)

    def step():
        for leaf in wanted:
            leaf.grad = None
        checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()

    with options(backend=backend):
        count = 0
        for _ in every_failure(step, STRIDE[backend]):
            count += 1
            if count % 5 == 0:
                step()
                torch.testing.assert_close([leaf.grad for leaf in wanted], list(expected))
    assert count > 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_is_merged_or_it_is_not(backend, layer):
    x = torch.randn(5, 24, device=DEVICE)
    weight, expected = layer.weight.clone(), definition(layer, x)
    with options(backend=backend):
        for _ in every_failure(layer.merge):
            assert not layer.merged and torch.equal(layer.weight, weight)
        assert layer.merged
        merged = layer.weight.clone()
        torch.testing.assert_close(layer(x), expected)
        for _ in every_failure(layer.unmerge):
            assert layer.merged and torch.equal(layer.weight, merged)
    assert not layer.merged
    torch.testing.assert_close(layer.weight, weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))
def test_many_threads_through_one_layer(training, backend, layer):
    """Each with its own x; one of them drops what is kept again and again."""
    layer.train(training)
    parameters = [layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector]

    def one(seed):
        x = torch.randn(3 + seed, 24, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        y, expected = layer(x), definition(layer, x)
        torch.testing.assert_close(y, expected)
        gradients = torch.autograd.grad(y.square().sum(), parameters)
        torch.testing.assert_close(
            gradients, torch.autograd.grad(expected.square().sum(), parameters), rtol=1e-4, atol=1e-4
        )

    def many(seed):
        for round in range(3):
            one(seed + round)

    def invalidate():
        for _ in range(40):
            dora_kernels.invalidate(layer)

    with options(backend=backend):
        in_threads(*(functools.partial(many, seed) for seed in range(6)), invalidate)
        one(99)


@pytest.fixture
def overtaken(monkeypatch):
    """overtaken(change): while a scope's one launch of norms is under way, another thread makes the change."""

    def arrange(change):
        grouped_norm = ops.grouped_norm

        def slow(*arguments):
            result = grouped_norm(*arguments)
            monkeypatch.setattr(ops, "grouped_norm", grouped_norm)
            in_threads(change)
            return result

        monkeypatch.setattr(ops, "grouped_norm", slow)

    return arrange


def test_what_one_thread_drops_another_does_not_put_back(layer, overtaken):
    """A write through .data and invalidate(), while a call that has read the old weights is still under way."""
    x = torch.randn(5, 24, device=DEVICE)

    def swap():
        layer.lora_B.weight.data.mul_(2)
        dora_kernels.invalidate(layer)

    overtaken(swap)
    with dora_kernels.frozen_adapters(layer):
        layer(x)
        torch.testing.assert_close(layer(x), definition(layer, x))


def test_a_fused_step_of_another_thread_during_the_first_call_is_seen(layer, overtaken, monkeypatch):
    """Steps are counted from before the first norm is made."""
    x = torch.randn(5, 24, device=DEVICE)
    monkeypatch.setattr(reuse.store, "_counting", False)
    layer.lora_B.weight.grad = torch.ones_like(layer.lora_B.weight)
    overtaken(torch.optim.AdamW([layer.lora_B.weight], lr=0.1, fused=True).step)
    with dora_kernels.frozen_adapters(layer):
        layer(x)
        torch.testing.assert_close(layer(x), definition(layer, x))


def test_options_of_threads_that_overlap_leave_nothing_behind():
    """The first to enter is the first to leave; the other keeps what it asked for until it leaves."""
    inside, left = threading.Event(), threading.Event()
    seen = []

    def first():
        with options(backend="reference"):
            assert inside.wait(10)
        left.set()

    def second():
        with options(way="merged"):
            inside.set()
            assert left.wait(10)
            seen.append(current_options())

    def enter_first_then_second():
        with options(precision="exact"):
            one = threading.Thread(target=first)
            one.start()
            while current_options().backend != "reference":
                pass
            two = threading.Thread(target=second)
            two.start()
            one.join()
            two.join()
            assert current_options() == Options(precision="exact")

    enter_first_then_second()
    assert seen == [Options(way="merged", precision="exact")]
    assert current_options() == Options()


@pytest.mark.gpu
@needs_gpu
def test_a_second_stream_does_not_read_a_norm_that_is_not_made_yet(layer):
    """The first stream sleeps before it makes the norm that it keeps; the second one calls the layer at once."""
    x = torch.randn(64, 24, device=DEVICE)
    expected = definition(layer, x).detach()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    for backend in BACKENDS:
        layer.eval()
        with options(backend=backend), torch.no_grad():
            layer(x), layer(x)  # the kernels are there: to load one would wait for the stream that sleeps
        layer.train().eval()  # nothing is kept
        torch.cuda.synchronize()
        with options(backend=backend), torch.no_grad():
            with torch.cuda.stream(first):
                poison = [torch.full((20,), float("nan"), device=DEVICE) for _ in range(16)]
                torch.cuda._sleep(200_000_000)  # about 0.1 s
                del poison  # what is allocated next on this stream is NaN until it is written
                y_first = layer(x)
            with torch.cuda.stream(second):
                y_second = layer(x)
                y_again = layer(x)
        torch.cuda.synchronize()
        for y in (y_first, y_second, y_again):
            torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


def forked(work: Callable[[], None]) -> None:
    """Run `work` in a forked process; raises AssertionError where that fails or does not end."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run():
        torch.set_num_threads(1)  # an OpenMP pool does not survive a fork; a DataLoader's workers do the same
        try:
            work()
            sender.send("")
        except BaseException as error:
            sender.send(f"{type(error).__name__}: {error}")

    process = context.Process(target=run)
    process.start()
    said = receiver.recv() if receiver.poll(60) else "no answer in 60 s"
    process.kill()
    process.join()
    assert not said, said


@needs_fork
@pytest.mark.skipif(DEVICE == "cuda", reason="a fork after CUDA has its own test")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forked_worker_computes_what_its_parent_does(backend, layer):
    """It inherits what is kept, and neither sees the other's weights."""
    x = torch.randn(5, 24)
    parameters = [layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector]

    def check():
        y, expected = layer(x), definition(layer, x)
        torch.testing.assert_close(y, expected)
        gradients = torch.autograd.grad(y.square().sum(), parameters)
        torch.testing.assert_close(
            gradients, torch.autograd.grad(expected.square().sum(), parameters), rtol=1e-4, atol=1e-4
        )

    def check_changed():
        check()
        with torch.no_grad():
            layer.lora_B.weight.mul_(2)
        check()

    with options(backend=backend):
        check()
        forked(check_changed)
        check()


@needs_fork
@pytest.mark.skipif(DEVICE == "cuda", reason="parameters in host memory")
def test_what_another_process_writes_into_shared_memory_is_seen(layer):
    """It changes no version that this process could see, so that nothing is kept for such a layer."""
    layer.share_memory()
    x = torch.randn(5, 24)
    before = layer(x)
    forked(lambda: layer.lora_B.weight.data.mul_(2))
    torch.testing.assert_close(layer(x), definition(layer, x))
    assert not torch.allclose(layer(x), before)


FORK_AFTER_CUDA = """
import os, sys, torch
from dora_kernels import DoraLinear
layer = DoraLinear(24, 20, rank=4, alpha=6.0, device="cuda").eval()
x = torch.randn(5, 24, device="cuda")
layer(x), torch.cuda.synchronize()
child = os.fork()
if child == 0:
    try:
        print(layer(torch.randn(5, 24).cuda()).sum().item(), flush=True)
    except RuntimeError as error:
        print("RuntimeError:", error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("parent", torch.isfinite(layer(x)).all().item())
"""


@pytest.mark.gpu
@needs_gpu
def test_a_fork_after_cuda_says_so():
    done = subprocess.run([sys.executable, "-c", FORK_AFTER_CUDA], capture_output=True, text=True, timeout=120)
    assert "RuntimeError: Cannot re-initialize CUDA in forked subprocess" in done.stdout, done.stdout + done.stderr
    assert "parent True" in done.stdout


@pytest.fixture(scope="module")
def tune():
    spec = importlib.util.spec_from_file_location("tune_for_faults", ROOT / "tools" / "tune.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses looks its module up
    spec.loader.exec_module(module)
    return module


@needs_fork
@pytest.mark.parametrize("there_was_one", (False, True), ids=("no table before", "an old table"))
def test_a_killed_write_leaves_the_old_table_or_none(there_was_one, tune, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(configs, "TUNED_FOLDER", tmp_path)
    path = configs.tuned_path("NVIDIA H200")
    default = configs.CONFIGS["sm_90", 2]["norm"]
    old = tune.fields_of(default) | {"num_stages": 4}
    if there_was_one:
        tuned.write(path, {"meta": {}, "configs": {"2": {"norm": old}}, "measured": {}})

    def write_half_and_die():
        write_text = Path.write_text

        def half(path, text, **keywords):
            write_text(path, text[: len(text) // 2], **keywords)
            os.kill(os.getpid(), signal.SIGKILL)

        Path.write_text = half
        tuned.write(path, {"meta": {}, "configs": {"2": {"norm": {"BLOCK_N": 32}}}, "measured": {}})

    process = multiprocessing.get_context("fork").Process(target=write_half_and_die)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [file for file in tmp_path.iterdir() if file != path], "the write was not killed in the middle"
    configs.tuned_configs.cache_clear()
    try:
        expected = {(2, "norm"): configs.Config(**old)} if there_was_one else {}
        assert configs.tuned_configs("NVIDIA H200", "sm_90") == expected and not caplog.records
    finally:
        configs.tuned_configs.cache_clear()
    assert path.exists() == there_was_one
    tuned.write(path, {"meta": {}, "configs": {}, "measured": {}})
    assert json.loads(path.read_text())["configs"] == {}
