"""What can go wrong outside the package: memory that runs out, a second thread, stream or process, a killed write.

Each ends in the right answer or in a clear error, and the next call is right.
"""

import functools
import importlib.util
import json
import multiprocessing
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dora_kernels
from dora_kernels import DoraLinear, launch, ops, reuse
from dora_kernels.launch import Options
from dora_kernels.reference import REFERENCE, dora_linear_ref
from tests.problem import BACKENDS, DEVICE

ROOT = Path(__file__).parent.parent
needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")


@pytest.fixture
def layer() -> DoraLinear:
    """A layer whose adapter counts, in eval mode."""
    torch.manual_seed(0)
    layer = DoraLinear(24, 20, rank=4, alpha=6.0, device=DEVICE).eval()
    with torch.no_grad():
        layer.lora_B.weight.normal_()
    return layer


def definition(layer: DoraLinear, x: torch.Tensor) -> torch.Tensor:
    adapter = (layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector)
    return dora_linear_ref(x, layer.weight, *adapter, layer.scaling, layer.bias)


def in_threads(*works: Callable[[], None]) -> None:
    """Run each in a thread of its own, all at once and switching often; raises what the first of them raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def run(work):
        try:
            barrier.wait()
            work()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


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

    with launch.options(backend=backend):
        in_threads(*(functools.partial(many, seed) for seed in range(6)), invalidate)
        one(99)


def test_what_one_thread_drops_another_does_not_put_back(layer, monkeypatch):
    """A write through .data and invalidate(), while a call that has read the old weights is still under way."""
    x = torch.randn(5, 24, device=DEVICE)

    def overtaken(*arguments):
        result = REFERENCE.merged_forward(*arguments)
        monkeypatch.setattr(ops, "REFERENCE", REFERENCE)

        def swap():
            layer.lora_B.weight.data.mul_(2)
            dora_kernels.invalidate(layer)

        in_threads(swap)
        return result

    monkeypatch.setattr(ops, "REFERENCE", REFERENCE._replace(merged_forward=overtaken))
    with launch.options(backend="reference", way="merged"):
        layer(x)
        torch.testing.assert_close(layer(x), definition(layer, x))


def test_a_fused_step_of_another_thread_during_the_first_call_is_seen(layer, monkeypatch):
    """Steps are counted from before the first norm is made."""
    x = torch.randn(5, 24, device=DEVICE)
    monkeypatch.setattr(reuse, "_counting", False)
    layer.lora_B.weight.grad = torch.ones_like(layer.lora_B.weight)
    optimizer = torch.optim.AdamW([layer.lora_B.weight], lr=0.1, fused=True)

    def overtaken(*arguments):
        result = REFERENCE.merged_forward(*arguments)
        monkeypatch.setattr(ops, "REFERENCE", REFERENCE)
        in_threads(optimizer.step)
        return result

    monkeypatch.setattr(ops, "REFERENCE", REFERENCE._replace(merged_forward=overtaken))
    with launch.options(backend="reference", way="merged"):
        layer(x)
        torch.testing.assert_close(layer(x), definition(layer, x))


def test_options_of_threads_that_overlap_leave_nothing_behind():
    """The first to enter is the first to leave; the other keeps what it asked for until it leaves."""
    inside, left = threading.Event(), threading.Event()
    seen = []

    def first():
        with launch.options(backend="reference"):
            assert inside.wait(10)
        left.set()

    def second():
        with launch.options(way="merged"):
            inside.set()
            assert left.wait(10)
            seen.append(launch.current_options())

    def enter_first_then_second():
        with launch.options(precision="exact"):
            one = threading.Thread(target=first)
            one.start()
            while launch.current_options().backend != "reference":
                pass
            two = threading.Thread(target=second)
            two.start()
            one.join()
            two.join()
            assert launch.current_options() == Options(precision="exact")

    enter_first_then_second()
    assert seen == [Options(way="merged", precision="exact")]
    assert launch.current_options() == Options()


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
@pytest.mark.skipif(DEVICE == "cuda", reason="parameters in host memory")
def test_what_another_process_writes_into_shared_memory_is_seen(layer):
    """It changes no version that this process could see, so that nothing is kept for such a layer."""
    layer.share_memory()
    x = torch.randn(5, 24)
    before = layer(x)
    forked(lambda: layer.lora_B.weight.data.mul_(2))
    torch.testing.assert_close(layer(x), definition(layer, x))
    assert not torch.allclose(layer(x), before)


@pytest.fixture(scope="module")
def tune():
    spec = importlib.util.spec_from_file_location("tune_for_faults", ROOT / "tools" / "tune.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses looks its module up
    spec.loader.exec_module(module)
    return module


def test_two_tuners_of_one_table_do_not_write_into_one_file(tune, tmp_path, monkeypatch):
    """A second process comes in between writing and replacing: the last one wins, whole."""
    path = tmp_path / "t.json"
    replace, pid = tune.os.replace, tune.os.getpid()

    def overtaken(partial, path):
        monkeypatch.setattr(tune.os, "replace", replace)
        monkeypatch.setattr(tune.os, "getpid", lambda: pid + 1)
        tune.write_table(path, {"configs": "second"})
        replace(partial, path)

    monkeypatch.setattr(tune.os, "replace", overtaken)
    tune.write_table(path, {"configs": "first"})
    assert json.loads(path.read_text()) == {"configs": "first"}
    assert list(tmp_path.iterdir()) == [path]
