"""What the launchers share: tiles of any size compute the same, and the multiples that the compiler is told of."""

import pytest
import torch

from tests.support.problem import EXACT_DTYPE, Problem
from tests.support.step_problem import close, tiles

kernels = pytest.importorskip("dora_kernels.kernels")

from tests.support.launcher_operands import launch, tensors_of  # noqa: E402


def test_what_the_rank_and_the_strides_are_multiples_of():
    def multiple(R, *widths):
        return kernels.tile.rank_multiple(R, *(torch.empty(3, width)[:, :R] for width in widths))

    assert [multiple(R) for R in (1, 2, 4, 8, 20, 24, 33)] == [1, 2, 4, 8, 4, 8, 1]
    assert [multiple(R, R) for R in (16, 64, 384)] == [1, 1, 1]  # the JIT's own
    assert [multiple(8, width) for width in (8, 9, 10, 12, 16, 24)] == [8, 1, 2, 4, 8, 8]
    assert multiple(16, 24) == 8 and multiple(8, 8, 12) == 4 and multiple(8, 8, 9) == 1
    assert kernels.tile.rank_multiple(8, torch.empty(8, 16).T) == 1 and kernels.tile.rank_multiple(8, None) == 8


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


@pytest.mark.parametrize(("kernel", "sizes"), TILES, ids=str)
def test_tile_sizes_do_not_change_the_result(kernel, sizes):
    tensors = tensors_of(Problem.random(33, 70, 90, 20))
    expected = launch(kernel, tensors)
    with tiles(kernel, sizes):
        for one, other in zip(launch(kernel, tensors), expected, strict=True):
            close(one, other)
