"""Every test: the interpreter where there is no GPU, and uninitialised memory that is NaN."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # has to be chosen before triton is imported


@pytest.fixture(autouse=True)
def poison():
    """torch fills what it allocates with NaN: an element that nobody writes, or that is read too early, shows.

    torch.empty and its kin, and what its own operators allocate, in every thread; warnings of operators that are not
    deterministic on a GPU are not what this is for.
    """
    filled = torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled
