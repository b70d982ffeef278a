"""Without a GPU the kernels run in Triton's interpreter, which has to be chosen before triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser):
    parser.addoption(
        "--no-poison", action="store_true", help="leave fresh memory as it is: compute-sanitizer watches it"
    )
