"""What the tests of single steps share: a tolerance, shapes with their reasons, tiles."""

import contextlib

import pytest
import torch

from dora_kernels.planning import configs
from dora_kernels.planning.tiles import Config
from tests.support.problem import DEVICE

# float64 through the interpreter shows the index arithmetic to 1e-12
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10} if DEVICE == "cpu" else {"rtol": 1e-4, "atol": 1e-4}
# M, N, K, R
SHAPES = (
    (33, 70, 90, 20),  # ragged in every axis; rows of 90 are not loaded in whole vectors; R is a chunk and a part
    (17, 33, 40, 16),  # R is one chunk exactly, and N one element more than a tile
    (7, 24, 10, 33),  # R above K, in several chunks; fewer tokens than a tile has rows
    (9, 40, 80, 33),  # rows of 80 are whole vectors: the norm walks K and R in one loop
    (1, 1, 1, 1),
    (130, 5, 3, 2),  # many tokens, split over programs, and everything else less than a tile
)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@contextlib.contextmanager
def tiles(kernel: str, sizes: dict[str, int]):
    """Inside, launches of `kernel` have tiles of these sizes; there has to be one."""
    config_for, launched = configs.config_for, []

    def chosen(name, *rest):
        config = config_for(name, *rest)
        launched.append(name)
        return Config(**(vars(config) | sizes)) if name == kernel else config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "config_for", chosen)
        yield
    assert kernel in launched, launched
