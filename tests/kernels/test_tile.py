"""What the launchers share: tiles of any size compute the same, and the multiples that the compiler is told of."""

import pytest
import torch

from tests.support.problem import DEVICE, EXACT_DTYPE, Problem
from tests.support.step_problem import close, tiles

kernels = pytest.importorskip("dora_kernels.kernels")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from dora_kernels.kernels import tile  # noqa: E402
from tests.support.launcher_operands import launch, tensors_of  # noqa: E402


def test_what_the_rank_and_the_strides_are_multiples_of():
    def multiple(R, *widths):
        return kernels.tile.rank_multiple(R, *((width, 1) for width in widths))

    assert [multiple(R) for R in (1, 2, 4, 8, 20, 24, 33)] == [1, 2, 4, 8, 4, 8, 1]
    assert [multiple(R, R) for R in (16, 64, 384)] == [1, 1, 1]  # the JIT's own
    assert [multiple(8, width) for width in (8, 9, 10, 12, 16, 24)] == [8, 1, 2, 4, 8, 8]
    assert multiple(16, 24) == 8 and multiple(8, 8, 12) == 4 and multiple(8, 8, 9) == 1
    assert kernels.tile.rank_multiple(8, (1, 16)) == 1 and kernels.tile.rank_multiple(8, None) == 8


@pytest.mark.parametrize("width", (8, 9, 12, 24))
def test_a_rank_of_8_in_rows_of_another_width(width):
    """What the compiler is told to be multiples of 8 is cut to that: a wrong word would read other elements."""
    problem = Problem.random(33, 70, 48, 8)
    low, base = problem.x @ problem.lora_A.T, problem.x @ problem.weight.T
    index = torch.arange(33, device=low.device) % 3 - 1

    def results(low, lora_B):
        gain, dB = problem.magnitude, torch.empty_like(problem.lora_B)
        kernels.token_sums(problem.dy, low, 0.75, dB=dB)
        bank = lora_B.contiguous()[None], gain[None], gain[:1], None, index
        return (
            dB,
            kernels.norm(problem.weight, problem.lora_A, lora_B, 0.75)[0],
            kernels.merge(problem.weight, problem.lora_A, lora_B, None, 0.75),
            launch("project", {"x": problem.dy, "lora_A": lora_B.T})[0],
            kernels.epilogue(base, low, lora_B, gain, None, 0.75, EXACT_DTYPE),
            kernels.bank_epilogue(base, low, *bank),
        )

    def widened(tensor):
        wide = tensor.new_full((len(tensor), width), torch.nan)
        wide[:, :8] = tensor
        return wide[:, :8]

    expected = results(low, problem.lora_B)
    for factors in ((widened(low), problem.lora_B), (low, widened(problem.lora_B))):
        for one, other in zip(results(*factors), expected, strict=True):
            close(one, other)


# the axes of each kernel's tiles, but for the rank's
AXES = {"norm": "NK", "merge": "NK", "project": "MK", "epilogue": "MN", "bank_epilogue": "MN", "token_sums": "MN"}
TILES = [
    (kernel, sizes)
    for kernel, (one, other) in AXES.items()
    for sizes in ({f"BLOCK_{other}": 16}, {f"BLOCK_{one}": 16}, {f"BLOCK_{other}": 64, f"BLOCK_{one}": 64})
]
TILES.append(("project", {"BLOCK_R": 32}))  # another size than that of `low`, which the same launcher may take


@pytest.mark.parametrize(("kernel", "sizes"), TILES, ids=str)
def test_tile_sizes_do_not_change_the_result(kernel, sizes):
    tensors = tensors_of(Problem.random(33, 70, 90, 20))
    expected = launch(kernel, tensors)
    with tiles(kernel, sizes):
        for one, other in zip(launch(kernel, tensors), expected, strict=True):
            close(one, other)


@pytest.mark.parametrize("parts", (2, 3))
def test_products_of_parts_are_summed_from_the_smallest(parts):
    """Of all pairs but those below the last part; what is infinite does not meet the zeros of a lower part."""
    dtypes = tile.Dtypes("fp32", "fp32", "ieee", parts)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(16, parts * 20, generator=generator).to(DEVICE) for _ in range(2))
    left[3, 1], left[3, 21::20], right[5, 20:] = torch.inf, 0, 0
    out = torch.empty(16, 16, device=DEVICE)
    _parts_kernel[1,](tile.matrix(left), tile.matrix(right), out, 20, DTYPES=dtypes)
    pieces = [[one[:, 20 * part : 20 * part + 20].double() for part in range(parts)] for one in (left, right)]
    pairs = [(i, j) for i in range(parts) for j in range(parts - i)]
    expected = sum(pieces[0][i] @ pieces[1][j].T for i, j in pairs)
    expected[3] = (pieces[0][0] @ pieces[1][0].T)[3]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert out[3].isinf().all() and out[3].sign().unique().numel() == 2 and out.isinf().sum() == 16


@triton.jit
def _parts_kernel(left, right, out_ptr, R, DTYPES: tl.constexpr):
    """left (16, R) @ right (16, R).T, in chunks of 16."""
    offs = tl.arange(0, 16).to(tl.int64)
    acc = tl.zeros([16, 16], dtype=tl.float32)
    mask = offs < 16
    chunks = tile.resident(left, offs, mask, R, 2, 16, DTYPES)
    for chunk in tl.static_range(2):
        offs_r = chunk * 16 + offs
        other = tile.load_parts(tile.transposed(right), offs_r, offs, offs_r < R, mask, R, 0, DTYPES)
        acc = tile.add_dot(acc, chunks[chunk], other, DTYPES)
    tl.store(out_ptr + offs[:, None] * 16 + offs[None, :], acc)
