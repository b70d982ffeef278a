"""What tells that a frozen matrix holds other numbers: no change that the norm would show passes."""

import pytest
import torch

from dora_kernels.reuse.constants import _SMALL, _read

SIZES = {"small": (40, 48), "large": (96, 130)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def swapped(matrix, dim, i, j):
    order = torch.arange(matrix.shape[dim])
    order[[i, j]] = order[[j, i]]
    return matrix.index_select(dim, order)


def one_row(change):
    def changed(matrix):
        matrix = matrix.clone()
        matrix[7] = change(matrix[7])
        return matrix

    return changed


CHANGES = {
    "a sign": one_row(lambda row: torch.cat((row[:5], -row[5:6], row[6:]))),
    "two signs": one_row(lambda row: torch.cat((-row[:2], row[2:]))),
    "every sign": torch.neg,
    "two rows": lambda matrix: swapped(matrix, 0, 3, 4),
    "two columns": lambda matrix: swapped(matrix, 1, 3, 5),
    "two numbers of a row": one_row(lambda row: swapped(row, 0, 10, 30)),
    "a row in reverse": one_row(lambda row: row.flip(0)),
    "columns turned": lambda matrix: matrix.roll(1, 1),
    "rows turned": lambda matrix: matrix.roll(1, 0),
    "a row by 2^8 of its roundings": one_row(lambda row: row * (1 + 256 * torch.finfo(row.dtype).eps)),
    "moved between two numbers": one_row(lambda row: torch.cat((row[:1] + 0.25, row[1:2] - 0.25, row[2:]))),
}


def same(ours, theirs):
    return all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_is_seen(dtype, size, change):
    for seed in range(20):
        matrix = torch.randn(SIZES[size], generator=torch.Generator().manual_seed(seed)).to(dtype)
        assert (matrix.numel() <= _SMALL) == (size == "small")
        for other in (matrix, matrix.mT.contiguous().mT):
            assert same(_read(matrix), _read(matrix)) and not same(_read(matrix), _read(CHANGES[change](other)))


def test_where_a_blas_may_round_the_factors():
    """In bfloat16 a change of 2^-9 of a number passes: float32 is then widened."""
    matrix = torch.randn(SIZES["large"])
    assert [number.dtype for number in _read(matrix)] == 2 * [torch.float32]
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        for precision in ("bf16", "tf32"):
            torch.backends.mkldnn.matmul.fp32_precision = precision
            assert [number.dtype for number in _read(matrix)] == [torch.float64]
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
