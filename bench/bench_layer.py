"""Layer steps under pytest-benchmark: `make bench`. Works on a CPU, at smaller sizes.

Each benchmark is one provider in one step of one case, wall time; what fails the correctness gate fails the test and
has no time. For times of the same moment, CUDA graphs and peak memory: python -m bench.layer.
"""

import functools

import pytest
import torch

from bench.layer import DEFAULT_CPU, DEFAULT_GPU, grid
from bench.lib.measure import Flush, Gate, Timing, failure
from bench.lib.problem import PASSES, TRAINING, LayerProblem
from bench.lib.providers import PROVIDERS
from bench.lib.shapes import LayerCase, layer_names
from bench.lib.steps import StepRow

GPU = torch.cuda.is_available()
DEFAULT = DEFAULT_GPU if GPU else DEFAULT_CPU
CASES = grid(DEFAULT["shape"], DEFAULT["tokens"], DEFAULT["rank"][:1], DEFAULT["precision"], "cuda" if GPU else "cpu")


@pytest.fixture(scope="module")
def problem_of():
    """The problem and gate of a case; only the last case's are kept, and pytest runs the tests of a case together."""
    return functools.lru_cache(maxsize=1)(_problem_of)


def _problem_of(case: LayerCase) -> tuple[LayerProblem, Gate]:
    problem = LayerProblem.random(case)
    return problem, Gate(problem)


@pytest.mark.parametrize("provider", ("frozen", "peft_lora", "peft_dora", "ours"))
@pytest.mark.parametrize("step", PASSES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_step(benchmark, case, step, provider, problem_of, record_row):
    benchmark.group = f"{case} {step}"
    problem, gate = problem_of(case)
    layer = PROVIDERS[provider](problem)
    comparisons, backend = gate.check(layer)
    if step not in TRAINING:
        comparisons = gate.check(layer, step)[0]
    reason = failure(comparisons)
    row = StepRow(
        provider, layer.computes, step, layer_names(case.N, case.K), case.M, case.N, case.K, case.R, case.precision
    )
    row.backend = backend
    if reason is not None:
        row.fail(reason)
        record_row(vars(row))
        pytest.fail(reason)

    layer.set_mode(step)
    run = functools.partial(PASSES[step], layer, problem)
    with layer.scope(step):
        benchmark.pedantic(_synchronous(run), setup=_flush, rounds=30, warmup_rounds=3)
    row.ms = vars(Timing.of([1e3 * seconds for seconds in benchmark.stats.stats.data]))
    record_row(vars(row))


def _synchronous(run):
    """The step, waiting for the device."""
    if not GPU:
        return run

    def step():
        run()
        torch.cuda.synchronize()

    return step


@functools.cache
def _flush_of_the_gpu() -> Flush:
    return Flush(torch.device("cuda"))


def _flush() -> None:
    """Nothing of the last round stays in a GPU's L2."""
    if GPU:
        _flush_of_the_gpu()()
        torch.cuda.synchronize()
