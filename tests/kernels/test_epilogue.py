"""The epilogue's shares of the work, what of lora_B stays, and norm and gain that it finishes.

test_steps.py has its numbers for every operand, and test_configs.py how work is shared out.
"""

import importlib

import pytest
import torch

from dora_kernels import reference, types
from dora_kernels.planning import configs
from tests.support.problem import DEVICE, DTYPES, EXACT_DTYPE, Problem
from tests.support.step_problem import close

kernels = pytest.importorskip("dora_kernels.kernels")
module = importlib.import_module("dora_kernels.kernels.epilogue")  # kernels.epilogue is the function
launches = importlib.import_module("dora_kernels.kernels.launches")


def operands(M, N, R, dtype, adapter=None):
    """base, low, lora_B, gain, bias, residual, low after the adapter's dtype, all unlike each other."""
    problem = Problem.random(M, N, 24, R, dtype, adapter)
    low = (problem.x.to(problem.lora_A.dtype) @ problem.lora_A.T).contiguous()
    gain = problem.magnitude.to(reference.accumulate_dtype(dtype))
    return problem.x @ problem.weight.T, low, problem.lora_B, gain, problem.bias, problem.dy + 1


def unfinished_of(N, parts, dtype, magnitude_dtype):
    """Sums of squares with a row of zeros, and a magnitude of other strides; norm and gain are still NaN."""
    generator = torch.Generator().manual_seed(2)
    squares = torch.rand(parts, N, dtype=torch.float64, generator=generator).to(dtype).to(DEVICE)
    squares[:, N // 2 : N // 2 + 1] = 0
    magnitude = torch.rand(2 * N, dtype=torch.float64, generator=generator).to(magnitude_dtype).to(DEVICE)[::2]
    norm, gain = squares.new_full((2, N), torch.nan)
    return types.Unfinished(squares, magnitude, norm, gain)


def finished(unfinished):
    """norm and gain, the squares added in their order."""
    norm = sum(unfinished.squares, torch.zeros_like(unfinished.norm)).sqrt()
    return norm, reference.gain_of(unfinished.magnitude, norm)


@pytest.fixture
def programs(monkeypatch):
    """Sets the number of programs of every launch."""
    return lambda count: monkeypatch.setattr(configs, "programs", lambda *sizes: count)


@pytest.fixture
def launched(monkeypatch):
    """The constants of every launch."""
    constants, launch = [], launches.LaunchPlan.launch

    def recorded(plan, *arguments):
        constants.append(plan.constants)
        launch(plan, *arguments)

    monkeypatch.setattr(launches.LaunchPlan, "launch", recorded)
    return constants


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("without", ("", "low", "residual"))
def test_the_number_of_programs_does_not_change_a_bit(without, dtypes, programs):
    """3 steps and 2 blocks: whole blocks, cut ones, programs with less than a block and one with nothing to do."""
    base, low, lora_B, gain, bias, residual = operands(70, 40, 20, *dtypes)
    low, residual = (None if name == without else one for name, one in (("low", low), ("residual", residual)))
    results = []
    for count in (1, 2, 4, 7):
        programs(count)
        results.append(kernels.epilogue(base, low, lora_B, gain, bias, 0.75, base.dtype, residual))
    assert not results[0].isnan().any() and all(torch.equal(y, results[0]) for y in results)


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter runs one program alone")
@pytest.mark.parametrize(
    ("program", "written"),
    [
        (0, [(0, 96, 0, 32)]),  # of 10 units, steps of 32 rows in blocks of 32 columns, each of 3 has 3 or 4
        (1, [(96, 130, 0, 32), (0, 32, 32, 40)]),
        (2, [(32, 130, 32, 40)]),
    ],
)
def test_a_program_writes_its_own_range(program, written, programs, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    set_grid_dim, set_grid_idx = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx
    base, low, lora_B, gain, bias, _ = operands(130, 40, 20, EXACT_DTYPE)
    programs(1)
    monkeypatch.setattr(interpreter_builder, "set_grid_dim", lambda *_: set_grid_dim(3, 1, 1))
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda *_: set_grid_idx(program, 0, 0))
    arguments = base, low, lora_B, gain, bias, 0.75, EXACT_DTYPE
    whole = reference.epilogue(*arguments)
    expected = torch.full_like(whole, torch.nan)  # as memory is that no one has written (conftest.py)
    for top, bottom, left, right in written:
        expected[top:bottom, left:right] = whole[top:bottom, left:right]
    torch.testing.assert_close(kernels.epilogue(*arguments), expected, equal_nan=True)


@pytest.mark.parametrize("count", (1, 3, 6))
def test_rows_past_the_last_are_left_alone(count, programs, monkeypatch):
    base, low, lora_B, gain, bias, _ = operands(33, 70, 20, EXACT_DTYPE)
    memory, new_empty = base.new_full((33 + 64, 70), 77.0), torch.Tensor.new_empty

    def guarded(self, *shape, **given):
        return memory[:33] if shape == (33, 70) else new_empty(self, *shape, **given)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    programs(count)
    y = kernels.epilogue(base, low, lora_B, gain, bias, 0.75, EXACT_DTYPE)
    close(y, reference.epilogue(base, low, lora_B, gain, bias, 0.75, EXACT_DTYPE))
    assert y.data_ptr() == memory.data_ptr() and (memory[33:] == 77).all()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("parts", (1, 3))
def test_an_unfinished_gain_is_the_same_bits(parts, dtypes, programs):
    base, low, lora_B, _, bias, residual = operands(40, 70, 20, *dtypes)
    results = []
    for count, more in ((1, None), (4, residual)):
        programs(count)
        unfinished = unfinished_of(70, parts, reference.accumulate_dtype(base.dtype), lora_B.dtype)
        norm, gain = finished(unfinished)
        rest = bias, 0.75, base.dtype, more
        y = kernels.epilogue(base, low, lora_B, unfinished.gain, *rest, unfinished=unfinished)
        torch.testing.assert_close(unfinished.norm, norm)
        torch.testing.assert_close(unfinished.gain, gain)
        assert unfinished.gain[35] == 0 and (unfinished.gain[:35] > 0).all()
        assert torch.equal(y, kernels.epilogue(base, low, lora_B, unfinished.gain, *rest)) and not y.isnan().any()
        results.append(unfinished)
    assert torch.equal(results[0].norm, results[1].norm) and torch.equal(results[0].gain, results[1].gain)


@pytest.mark.parametrize("shape", ((0, 70), (0, 1), (5, 0), (0, 0)), ids=str)
def test_norm_and_gain_are_finished_for_no_tokens_too(shape):
    M, N = shape
    base, low, lora_B, _, bias, _ = operands(M, N, 20, EXACT_DTYPE)
    unfinished = unfinished_of(N, 3, EXACT_DTYPE, EXACT_DTYPE)
    norm, gain = finished(unfinished)
    y = kernels.epilogue(base, low, lora_B, unfinished.gain, bias, 0.75, EXACT_DTYPE, unfinished=unfinished)
    assert y.shape == shape
    close(unfinished.norm, norm)
    close(unfinished.gain, gain)


@pytest.fixture
def little_memory(monkeypatch):
    """The interpreter has 40000 bytes of shared memory, for any number of chunks."""
    monkeypatch.setitem(configs.SHARED, "interpreter", 40000)
    monkeypatch.setitem(configs.MOST_CHUNKS, ("interpreter", 4), 9)
    launches.forget()
    yield
    launches.forget()


@pytest.mark.skipif(DEVICE != "cpu", reason="what the interpreter's shared memory holds")
@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    ("R", "with_residual", "chunks", "columns"),
    [
        (1, False, 1, 32),
        (16, True, 1, 32),
        (33, False, 3, 32),  # R above K, and above N
        (72, False, 5, 32),  # blocks of 64 columns would not fit
        (72, True, 0, 64),
        (90, False, 0, 64),
    ],
)
def test_lora_B_stays_where_it_fits(R, with_residual, chunks, columns, launched):
    base, low, lora_B, gain, bias, residual = operands(70, 80, R, torch.float32)
    arguments = base, low, lora_B, gain, bias, 0.75, torch.float32, residual if with_residual else None
    torch.testing.assert_close(kernels.epilogue(*arguments), reference.epilogue(*arguments), rtol=1e-4, atol=1e-4)
    (keywords,) = launched
    assert (keywords["CHUNKS"], keywords["BLOCK_N"]) == (chunks, columns)


@pytest.mark.parametrize(
    ("R", "streamed_bytes", "in_vectors", "expected"),
    [
        (0, 2, True, (128, 3, 2, 128, 0)),
        (8, 2, True, (128, 3, 2, 128, 1)),
        (64, 2, True, (128, 3, 2, 128, 1)),
        (64, 4, True, (128, 2, 2, 128, 1)),  # base in float32, or a residual
        (64, 2, False, (128, 3, 1, None, 1)),
        (128, 2, True, (128, 2, 2, 128, 1)),
        (128, 4, True, (128, 2, 2, 128, 1)),
        (384, 2, True, (128, 2, 1, None, 3)),
        (384, 4, True, (64, 2, 1, None, 3)),
        (512, 2, True, (64, 2, 1, None, 4)),
        (640, 2, True, (128, 3, 1, None, 0)),
    ],
)
def test_what_a_multiprocessor_of_sm_90_holds(R, streamed_bytes, in_vectors, expected):
    """(columns, stages, programs, registers, chunks): up to R = 128 two programs, up to R = 512 all of lora_B."""
    table = configs.CONFIGS["sm_90", 2]
    config = table["epilogue" if R <= configs.HIGH_RANK else "epilogue_high_rank"]
    config, chunks = module._config(config, R, 2, streamed_bytes, 2, in_vectors, "sm_90")
    assert (config.BLOCK_N, config.num_stages, config.waves, config.maxnreg, chunks) == expected


@pytest.mark.skipif(DEVICE != "cpu", reason="tiles and multiprocessors are the interpreter's")
def test_registers_are_held_down_where_base_is_read_in_whole_vectors(launched):
    base, low, lora_B, gain, bias, residual = operands(5, 80, 8, torch.float32)
    wide = base.new_full((5, 88), torch.nan)
    wide[:, :80] = base
    shifted = torch.cat((base.new_zeros(1), base.flatten()))[1:].view(5, 80)
    cases = [(base, None, 2), (wide[:, :80], None, 1), (base.T.contiguous().T, None, 1), (shifted, None, 1)]
    cases += [(base, residual, 2), (base, residual.T.contiguous().T, 1), (base[:, :72], None, 1)]
    for given, more, waves in cases:
        N = given.shape[1]
        arguments = given, low, lora_B[:N], gain[:N], bias[:N], 0.75, torch.float32, more
        asked = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(configs, "programs", lambda *sizes, asked=asked: asked.append(sizes[2]) or 1)
            actual = kernels.epilogue(*arguments)
        torch.testing.assert_close(actual, reference.epilogue(*arguments), rtol=1e-4, atol=1e-4)
        assert asked == [2 * waves]  # of the interpreter's two multiprocessors
