"""Every test: the interpreter where there is no GPU, and uninitialised memory that is NaN."""

import gc
import os
import signal

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # has to be chosen before triton is imported
# Memory is poisoned in torch's deterministic mode, which wants a cuBLAS that is deterministic, too: without this each
# of its products warns, and may add up its parts in another order. Read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(parser):
    parser.addoption(
        "--no-poison", action="store_true", help="leave fresh memory as it is: compute-sanitizer watches it"
    )


def pytest_collection_finish():
    """What was imported for the tests stays: no collection looks through it again, which takes a second each time.

    gc.collect() is called by tests, by benchmarks between cases, and by torch's compiler.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def poison(request):
    """Fresh memory is NaN, in every thread: an element that nobody writes, or that is read too early, shows."""
    if request.config.getoption("--no-poison"):
        yield
        return
    from dora_kernels.testing import nan_filled_memory  # not above: the interpreter has to be chosen first

    with nan_filled_memory():
        yield


@pytest.fixture
def heard_signals():
    """Signals that the run was started to ignore are heard: SIGINT by a shell's background job, SIGHUP under nohup.

    What a test starts inherits that they are ignored, and obeys.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = [number for number in usual if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, usual[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def norms(monkeypatch):
    """Grows by one whenever a norm is computed; on the CPU the forward pass makes it with the merged weight."""
    import dora_kernels  # not above: the interpreter has to be chosen first
    from dora_kernels.pytorch import PYTORCH

    made = []

    def counting(function, name):
        def wrapped(*arguments, **keywords):
            result = function(*arguments, **keywords)
            if name != "merged_forward" or result[1] is not None:
                made.append(name)
            return result

        return wrapped

    steps = PYTORCH._replace(
        norm=counting(PYTORCH.norm, "norm"),
        start_norm=counting(PYTORCH.start_norm, "start_norm"),
        merged_forward=counting(PYTORCH.merged_forward, "merged_forward"),
    )
    monkeypatch.setattr("dora_kernels.ops.PYTORCH", steps)
    with dora_kernels.options(backend="reference"):
        yield made
