"""The launches of a call on a GPU, in order: Triton kernels, and operators of torch.

    python tools/launches.py                                       # a training step at 8192, 4096 x 4096, R = 64
    python tools/launches.py --call "no bias" --variant fp32 --shape 512 4096 4096 --rank 8

The call runs on meta tensors (specializations.py). An operator of torch counts as one launch: matrix products do in
the GEMM libraries as a rule, one that splits its sum takes two.
"""

import argparse
import sys

import torch
from specializations import CALLS, TARGETS, VARIANTS, Inputs, Target, Variant, recording
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SHAPE = (8192, 4096, 4096)  # M, N, K


class _Operators(TorchDispatchMode):
    """Inside, operators that compute are added to `launched`, behind the kernels that were recorded before them."""

    def __init__(self, recorded: list) -> None:
        super().__init__()
        self.recorded, self.seen = recorded, 0
        self.launched: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        if isinstance(result, Tensor | tuple) and not function.is_view and "empty" not in name:
            self.add_kernels()
            # gemm.matmul: on a GPU the library itself rounds its sums to float32, on meta tensors a copy does
            widened = name == "_to_copy" and self.launched[-1:] == ["mm"] and result.dtype == torch.float32
            self.launched += [] if widened else [name]
        return result

    def add_kernels(self) -> None:
        """Add the kernels that were recorded since the last time."""
        self.launched += [one.name for one in self.recorded[self.seen :]]
        self.seen = len(self.recorded)


def launches(
    target: Target, variant: Variant, call: str, shape: tuple[int, int, int] = SHAPE, R: int = 64
) -> list[str]:
    """The names of what the call launches; those of kernels end in _kernel."""
    inputs = Inputs.of(variant, *shape, R=R)
    with recording(target, variant) as recorded, _Operators(recorded) as operators:
        CALLS[call](inputs)
    operators.add_kernels()
    return operators.launched


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=list(TARGETS), default="sm_90")
    parser.add_argument("--variant", choices=list(VARIANTS), default="bf16")
    parser.add_argument("--call", choices=list(CALLS), default="train")
    parser.add_argument("--shape", nargs=3, type=int, default=SHAPE, metavar=("M", "N", "K"))
    parser.add_argument("--rank", type=int, default=64)
    options = parser.parse_args(arguments)
    found = launches(
        TARGETS[options.target], VARIANTS[options.variant], options.call, tuple(options.shape), options.rank
    )
    print(len(found), *found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
