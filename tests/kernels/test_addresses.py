"""More than 2^31 elements: no offset of any kernel wraps in 32 bits.

A kernel's offset is a sum of index * stride. Here every stride of every argument in turn is 2^30 elements, and every
output that a kernel writes through sizes of its own has rows of 2^30 elements, so that index 2 is 2^31 away. Nothing
of that size is touched: the memory is reserved and never committed, but for the few pages that are read and written.
"""

import contextlib
import mmap
import sys
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from dora_kernels import reference
from dora_kernels.planning import plan
from tests.support.problem import DEVICE, Problem

kernels = pytest.importorskip("dora_kernels.kernels")
from triton.runtime.interpreter import interpreter_builder  # noqa: E402

from dora_kernels.kernels import stored_weight, tile  # noqa: E402
from dora_kernels.kernels.epilogue import _epilogue_kernel  # noqa: E402
from dora_kernels.kernels.merge import _merge_kernel  # noqa: E402
from dora_kernels.kernels.norm import _norm_kernel  # noqa: E402
from dora_kernels.kernels.project import _project_kernel  # noqa: E402
from dora_kernels.kernels.token_sums import Sums, _token_sums_kernel  # noqa: E402

on_cpu = pytest.mark.skipif(
    DEVICE != "cpu" or sys.platform != "linux", reason="reads uncommitted pages, which only host memory has"
)
FAR = 2**30
MAP_NORESERVE = 0x4000  # named in Python's mmap from 3.13 on


@pytest.fixture(scope="module")
def memory():
    """2^32 + 2^31 float32 zeros, 24 GiB of addresses and no memory.

    `far` puts its views 2^31 elements after the beginning: an offset that wraps stays inside, and reads zeros.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, 4 * (2**32 + 2**31), flags=flags), dtype=torch.float32)


def far(memory: torch.Tensor, shape: tuple[int, ...], axis: int) -> torch.Tensor:
    """A view of that shape whose elements are FAR apart along `axis`."""
    strides = [1] * len(shape)
    if len(shape) == 2:
        strides[1 - axis] = 7  # not 1, and no multiple of a vector
    strides[axis] = FAR
    return memory.as_strided(shape, strides, 2**31)


def moved(memory: torch.Tensor, tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """The same numbers FAR apart along `axis`."""
    return far(memory, tuple(tensor.shape), axis).copy_(tensor)


def same(actual, expected):
    """Bitwise: the same kernel on the same tiles, whatever the strides."""
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert not one.isnan().any() and other.count_nonzero() > 0
            assert torch.equal(one, other)


def run_norm(weight, lora_A, lora_B, magnitude):
    return kernels.norm(weight, lora_A, lora_B, 0.75, magnitude)


def run_merge(weight, lora_A, lora_B):
    return (kernels.merge(weight, lora_A, lora_B, torch.arange(1.0, 4.0), 0.75),)


def run_project(rows, factor):
    with mock.patch.object(plan, "project_by_kernel", return_value=True):
        return (kernels.project(rows, factor),)


def run_epilogue(base, low, lora_B, bias, residual):
    return (kernels.epilogue(base, low, lora_B, torch.arange(1.0, 4.0), bias, 0.75, torch.float32, residual),)


def run_token_sums(dy, low, saved, lora_B, dB=None):
    dB = dy.new_empty(3, 3) if dB is None else dB
    dmagnitude, dbias, dz = dy.new_empty(3), dy.new_empty(3), dy.new_empty(3, 3)
    kernels.token_sums(
        dy,
        low,
        0.75,
        dB=dB,
        gain=torch.arange(1.0, 4.0),
        saved=saved,
        norm=torch.arange(2.0, 5.0),
        lora_B=lora_B,
        dmagnitude=dmagnitude,
        dbias=dbias,
        dz=dz,
    )
    return dB, dmagnitude, dbias, dz


# every argument that a launcher takes with its strides; all are 3 long in every axis
STRIDED = {
    run_norm: {"weight": 2, "lora_A": 2, "lora_B": 2, "magnitude": 1},
    run_merge: {"weight": 2, "lora_A": 2, "lora_B": 2},
    run_project: {"rows": 2, "factor": 2},
    run_epilogue: {"base": 2, "low": 2, "lora_B": 2, "bias": 1, "residual": 2},
    run_token_sums: {"dy": 2, "low": 2, "saved": 2, "lora_B": 2, "dB": 2},
}
CASES = [(run, name, axis) for run, names in STRIDED.items() for name, axes in names.items() for axis in range(axes)]


@on_cpu
@pytest.mark.parametrize(("run", "name", "axis"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_stride_of_2_to_the_30(run, name, axis, memory, monkeypatch):
    monkeypatch.setattr("dora_kernels.planning.plan.project_by_kernel", lambda *arguments, **keywords: True)
    generator = torch.Generator().manual_seed(0)
    arguments = {
        other: torch.randn((3,) * axes, generator=generator) for other, axes in STRIDED[run].items() if other != "dB"
    }
    expected = run(**arguments)
    if name == "dB":  # an output
        arguments["dB"] = far(memory, (3, 3), axis)
    else:
        arguments[name] = moved(memory, arguments[name], axis)
    same(run(**arguments), expected)


# Where R is in chunks, of a lora_B that stays (33) and of one that is walked (130): of the weight only the rows can be
# far apart, of the adapters the columns too, of which there are more than 3.
WALKED = {"weight": (0,), "lora_A": (0, 1), "lora_B": (0, 1)}


@on_cpu
@pytest.mark.parametrize(("name", "axis"), [(name, axis) for name, axes in WALKED.items() for axis in axes])
@pytest.mark.parametrize(("R", "chunks"), ((33, 3), (130, 0)))
def test_a_long_stride_where_the_rank_is_in_chunks(R, chunks, name, axis, memory):
    shapes = {"weight": (3, 80), "lora_A": (R, 80), "lora_B": (3, R)}
    generator = torch.Generator().manual_seed(0)
    arguments = {other: torch.randn(shape, generator=generator) for other, shape in shapes.items()}
    expected = run_norm(**arguments, magnitude=torch.ones(3)), run_merge(**arguments)
    size = arguments[name].shape[axis]
    strides = [1, 1]
    strides[axis] = 2 ** (31 - (size - 1).bit_length() + 1)
    assert 2**31 <= (size - 1) * strides[axis] < 2**32
    arguments[name] = memory.as_strided(arguments[name].shape, strides, 2**31).copy_(arguments[name])
    launch = tile.Launch.of(memory, torch.float32)
    config, (_, layout) = launch.config("norm", R), stored_weight.weight_argument(arguments["weight"])
    assert stored_weight.walk_config(launch, config, layout, R)[1] == chunks
    same(run_norm(**arguments, magnitude=torch.ones(3)), expected[0])
    same(run_merge(**arguments), expected[1])


# Outputs are contiguous: their rows are as long as a size says. These launch the first program (or, for partial sums,
# the first of each part) of what would be a huge grid.


def tiles(kernel: str) -> dict[str, object]:
    launch = tile.Launch.of(torch.empty(0), torch.float32)
    return {"DTYPES": launch.dtypes} | launch.config(kernel).tiles(3)


@contextlib.contextmanager
def num_programs(count: int) -> Iterator[None]:
    """Inside, the programs launched are the first ones of so many."""
    set_grid_dim = interpreter_builder.set_grid_dim
    with mock.patch.object(interpreter_builder, "set_grid_dim", lambda *_: set_grid_dim(count, 1, 1)):
        yield


def corner(memory: torch.Tensor, rows: int = 3, columns: int = 3) -> torch.Tensor:
    """The first columns of a contiguous (rows, FAR) matrix, zeroed."""
    return memory.as_strided((rows, columns), (FAR, 1), 2**31).zero_()


@on_cpu
def test_merge_writes_rows_of_2_to_the_30(memory):
    problem = Problem.random(3, 3, 3, 3, torch.float32)
    merged, huge = corner(memory), memory[2**31 :]
    far_weight = moved(memory[2**20 :], problem.weight, 0)  # 2^20 further on: beside the output, not on it
    lora_A = torch.zeros(3, 64)
    lora_A[:, :3] = problem.lora_A
    expected = reference.merge(problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, 0.75)
    stored, layout = stored_weight.weight_argument(far_weight)
    update = stored_weight.Update(tile.matrix(lora_A), tile.matrix(problem.lora_B), 3, 0.75)
    with num_programs(FAR // 32):
        _merge_kernel[1,](
            stored, problem.magnitude, huge, 3, FAR, update, None, None, 1.0, None, 0, None, None,
            FORMAT=stored_weight.weight_format(layout, 32), SUBTRACT_WEIGHT=False, CHUNKS=1, R_MULTIPLE=1, STAGES=2,
            **tiles("merge"),
        )  # fmt: skip
    torch.testing.assert_close(merged, expected)


@on_cpu
def test_norm_writes_partial_sums_2_to_the_30_apart(memory):
    """`part * N` with N = 2^30: more rows than any weight has, but the offset must hold."""
    problem = Problem.random(3, 32, 64, 3, torch.float32)
    partial = corner(memory, columns=32)
    partial[2] = torch.nan
    stored, layout = stored_weight.weight_argument(problem.weight)
    update = stored_weight.Update(tile.matrix(problem.lora_A), tile.matrix(problem.lora_B), 3, 0.75)
    with num_programs(2 * FAR // 32):
        _norm_kernel[2,](
            stored, memory[2**31 :], None, None, None, FAR, 64, update, 3,
            FORMAT=stored_weight.weight_format(layout, 32), CHUNKS=1, R_MULTIPLE=1, STAGES=2, **tiles("norm"),
        )  # fmt: skip
    norm, _ = reference.norm(problem.weight, problem.lora_A, problem.lora_B, 0.75)
    assert (partial[:2] > 0).all() and (partial[2] == 0).all()
    torch.testing.assert_close(partial.sum(0).sqrt(), norm)


@on_cpu
def test_project_writes_rows_of_2_to_the_30(memory):
    problem = Problem.random(3, 3, 32, 16, torch.float32)
    projected = corner(memory, columns=16)
    with num_programs(FAR // 16):
        _project_kernel[1,](
            tile.matrix(problem.x), tile.matrix(problem.lora_A.T), tile.Matrix(memory[2**31 :], FAR, 1), None, None,
            3, 32, FAR, R_MULTIPLE=1, **tiles("project"),
        )  # fmt: skip
    torch.testing.assert_close(projected, problem.x @ problem.lora_A.T)


@on_cpu
def test_project_writes_partial_sums_2_to_the_30_apart(memory):
    """`part * M * R` with M = 2^30."""
    problem = Problem.random(32, 3, 96, 1, torch.float32)
    projected, result, counters = corner(memory, columns=32), torch.zeros(32, 1), torch.zeros(1, dtype=torch.int32)
    with num_programs(3 * FAR // 32):
        _project_kernel[3,](
            tile.matrix(problem.x), tile.matrix(problem.lora_A.T), tile.matrix(result), memory[2**31 :], counters,
            FAR, 96, 1, R_MULTIPLE=1, **tiles("project"),
        )  # fmt: skip
    expected = problem.x @ problem.lora_A.T
    assert (projected != 0).all() and counters.item() == 3
    torch.testing.assert_close(projected.sum(0)[:, None], expected)
    torch.testing.assert_close(result, expected)


@on_cpu
def test_epilogue_writes_rows_of_2_to_the_30(memory):
    problem = Problem.random(3, 32, 40, 3, torch.float32)
    base, low = problem.x @ problem.weight.T, problem.x @ problem.lora_A.T
    y = corner(memory, columns=32)
    with num_programs(FAR // 32):
        _epilogue_kernel[1,](
            tile.matrix(base), tile.matrix(low), tile.matrix(problem.lora_B), problem.magnitude, None,
            tile.vector(problem.bias), None, memory[2**31 :], 3, FAR, 3, 0.75,
            CHUNKS=1, R_MULTIPLE=1, STAGES=2, **tiles("epilogue"),
        )  # fmt: skip
    arguments = (base, low, problem.lora_B, problem.magnitude, problem.bias, 0.75, torch.float32)
    torch.testing.assert_close(y, reference.epilogue(*arguments))


@on_cpu
@pytest.mark.parametrize("output", ("dB", "dot", "total", "dz"))
def test_token_sums_writes_2_to_the_30_apart(output, memory):
    """`part * N` with N = 2^30 for the partial sums, tiles of dB that are as far apart, and rows of gain * dy."""
    problem = Problem.random(96, 32, 40, 1, torch.float32)
    low, base = problem.x @ problem.lora_A.T, problem.x @ problem.weight.T
    huge, parts, rows = memory[2**31 :], 1 if output == "dz" else 3, 3 if output == "dz" else 96
    sums = {name: huge if name == output else None for name in ("dB", "dot", "total")}
    results = {name: torch.zeros(32, 1) for name in ("dB", "dot", "total") if name == output}
    written = corner(memory, columns=32)
    N = FAR
    if output == "dB":  # a column of a tile, which is 16 wide
        N, written = FAR // 16, memory.as_strided((3, 32), (FAR, 16), 2**31).zero_()
    counters = torch.zeros(1, dtype=torch.int32)
    with num_programs(parts * N // 32):
        _token_sums_kernel[parts,](
            tile.matrix(problem.dy), tile.matrix(low if output == "dB" else None),
            tile.matrix(base if output == "dot" else None), tile.matrix(problem.dy), tile.matrix(low), None,
            problem.magnitude if output == "dz" else None, torch.ones(32), Sums(**sums), counters,
            tile.matrix(results.get("dB")), results.get("dot"), results.get("total"),
            huge if output == "dz" else None, rows, N, 1, 1.0, R_MULTIPLE=1, SUM_ROWS=16, STAGES=2,
            **tiles("token_sums"),
        )  # fmt: skip
    expected = {
        "dB": lambda: (problem.dy.T @ low)[:, 0],
        "dot": lambda: (problem.dy * base).sum(0),
        "total": lambda: problem.dy.sum(0),
        "dz": lambda: (problem.magnitude * problem.dy)[:3],
    }[output]()
    assert (written != 0).all() and counters.item() == parts
    torch.testing.assert_close(written if output == "dz" else written.sum(0), expected)
    if output in results:
        torch.testing.assert_close(results[output][:, 0], expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_more_than_2_to_the_31_elements_on_a_gpu():
    """x, base, y and dy all have more; the last rows alone have a gradient, and a small call says what it is."""
    free, _ = torch.cuda.mem_get_info()
    if free < 48 * 2**30:
        pytest.skip("needs 48 GiB of free GPU memory")
    M, tail = 2**31 // 16000 + 129, 128
    small = Problem.random(tail, 16000, 16001, 8, torch.bfloat16)
    problem = Problem(**vars(small))
    problem.x = torch.zeros(M, 16001, dtype=torch.bfloat16, device=DEVICE)
    problem.dy = torch.zeros(M, 16000, dtype=torch.bfloat16, device=DEVICE)
    problem.x[-tail:], problem.dy[-tail:] = small.x, small.dy
    assert problem.x.numel() > 2**31 and problem.dy.numel() > 2**31
    for way in ("split", "merged"):
        actual = problem.ours("triton", way)
        assert torch.equal(actual["y"][0], problem.bias)  # x is zero there
        assert actual["x"][:-tail].count_nonzero() == 0
        actual |= {name: actual[name][-tail:] for name in ("y", "x")}
        assert all(comparison.ok for comparison in small.comparisons(actual)), way
