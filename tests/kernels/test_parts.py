"""float32 matrices in bfloat16 parts: what they sum to, at the edges of float32 too."""

import math

import pytest
import torch

from tests.support.problem import DEVICE

parts_module = pytest.importorskip("dora_kernels.kernels.parts")
LARGEST = torch.finfo(torch.float32).max


def total(parts: torch.Tensor) -> torch.Tensor:
    """The sum of the parts (count, rows, columns), in float64."""
    assert parts.dtype == torch.bfloat16
    return parts.double().sum(0)


def random_matrix(*shape: int, least: int, most: int) -> torch.Tensor:
    """Numbers of all 24 bits and both signs, from 2^least to 2^most."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(least, most, shape, generator=generator)
    mantissas = 1 + torch.randint(0, 1 << 23, shape, generator=generator) / (1 << 23)
    signs = 1 - 2 * torch.randint(0, 2, shape, generator=generator)
    return torch.ldexp(signs * mantissas, exponents).to(DEVICE)


def test_three_parts_are_the_matrix_itself():
    matrix = random_matrix(50, 70, least=-110, most=128)
    (parts,) = parts_module.parts(3, matrix)
    assert parts.shape == (3, 50, 70) and torch.equal(total(parts), matrix.double())
    # a product of the first parts alone is one of bfloat16s rounded to nearest
    assert torch.equal(parts[0][matrix.abs() < 1e38], matrix.bfloat16()[matrix.abs() < 1e38])


def test_two_parts_are_the_matrix_to_16_bits():
    matrix = random_matrix(50, 70, least=-110, most=128).double()
    (parts,) = parts_module.parts(2, matrix.float())
    error = (total(parts) / matrix - 1).abs().max()
    assert 2**-18 < error <= 2**-16


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("count", (1, 2, 3))
def test_the_edges_of_float32(count):
    """What bfloat16 would round to inf; subnormals, of which the last bits are lost; zeros; inf and NaN."""
    large = torch.tensor([[LARGEST, -LARGEST, 3.4e38, 3.396e38, 3.39e38, -3.389e38]], device=DEVICE)
    (parts,) = parts_module.parts(count, large)
    assert parts.isfinite().all()
    assert ((total(parts) / large.double() - 1).abs() <= (0 if count == 3 else 2.0 ** (-8 * count + 1))).all()
    small = random_matrix(20, 20, least=-149, most=-110)
    (parts,) = parts_module.parts(count, small)
    assert (total(parts) - small).abs().max() <= max(2**-134, 2.0**-110 * 2.0 ** (-8 * count + 1))
    special = torch.tensor([[0.0, math.inf, -math.inf, math.nan]], device=DEVICE)
    (parts,) = parts_module.parts(count, special)
    assert torch.equal(parts[0, :, :3], special[:, :3].bfloat16()) and parts[0, 0, 3].isnan()
    assert not parts[1:].any()


def test_several_matrices_in_one_launch(monkeypatch):
    """Of unlike sizes, none, transposed, and with rows apart."""
    matrices = [random_matrix(*shape, least=-20, most=20) for shape in ((33, 70), (0, 5), (1, 1), (3, 1024), (70, 33))]
    matrices += [matrices[0].T, matrices[0][:, 3:50]]
    launched = []
    kernel = parts_module._parts_kernel

    class Counting:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(parts_module, "_parts_kernel", Counting())
    results = parts_module.parts(3, *matrices)
    assert launched == [(3 + 1 + 3 + 3 + 3 + 2,)]
    for matrix, parts in zip(matrices, results, strict=True):
        assert torch.equal(total(parts), matrix.double())
    assert results[-2].mT.is_contiguous()
    assert parts_module.parts(3, matrices[1])[0].shape == (3, 0, 5)
