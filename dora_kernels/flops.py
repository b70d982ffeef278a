"""FLOPs of each operator for FlopCounterMode of torch.utils.flop_counter, and for all that asks its registry.

They are those of the products of the definition (reference.py) that the operator stands for, as torch counts it itself,
forward and backward, for the gradients wanted:

    norm       lora_B @ lora_A; with norm_grad, backward, one for each factor's gradient through it
    forward    x weight^T, x lora_A^T, low lora_B^T; the norm's unless it is given; x weight^T once more with dropout
    backward   dx: dz weight, P lora_A        P = dz lora_B: for dx, dlow and dA        dA: P^T x        dB: dz^T low

So a count is of the model, whatever computes it: the way, the backend, what is kept and what is made again do not
change it, where the merged way, say, has a product of N R K for those of M R (N + K). Decoding a weight is no product.

torch.utils.flop_counter imports Triton's JIT, 0.05 to 0.16 s beside the 0.08 of this package, and FlopCounterMode
copies the registry when it is made: so the formulas are registered as that module is imported, by whomever.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from dora_kernels import ops

COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]


def _product(rows: int, inner: int, columns: int) -> int:
    """(rows, inner) @ (inner, columns), a multiplication and an addition each."""
    return 2 * rows * inner * columns


def _norm(
    weight: Any, weight_format: str, weight_numbers: Any, weight_dtype: torch.dtype, lora_A: Shape, lora_B: Shape,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    """lora_B @ lora_A, of a merged weight, too."""
    (R, K), N = lora_A, lora_B[0]
    return _product(N, R, K)


def _norm_backward(
    dnorm: Shape, weight: Any, weight_format: str, weight_numbers: Any, weight_dtype: torch.dtype, lora_A: Shape,
    lora_B: Shape, norm: Shape, scaling: float, dtype: torch.dtype, needs: Sequence[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    """dA = lora_B^T dV, dB = dV lora_A^T, of dV (N, K)."""
    (R, K), N = lora_A, lora_B[0]
    return sum(needs) * _product(N, R, K)


def _grouped_norm(weights: Any, lora_As: Sequence[Shape], lora_Bs: Sequence[Shape], *_: Any, **__: Any) -> int:
    return sum(_product(lora_B[0], *lora_A) for lora_A, lora_B in zip(lora_As, lora_Bs, strict=True))


def _forward(
    x: Shape, x_dropped: Shape | None, weight: Any, weight_format: str, weight_numbers: Any,
    weight_dtype: torch.dtype, lora_A: Shape, lora_B: Shape, magnitude: Shape, bias: Shape | None = None,
    norm: Shape | None = None, *_: Any, given_low: Shape | None = None, **__: Any,
) -> int:  # fmt: skip
    (M, K), (N, R) = x, lora_B
    flops = _product(M, K, N) * (1 if x_dropped is None else 2) + _product(M, R, N)
    if given_low is None:
        flops += _product(M, K, R)
    return flops if norm is not None else flops + _product(N, R, K)


def _backward(
    dy: Shape, x: Shape | None, weight: Any, weight_format: str, weight_numbers: Any, weight_dtype: torch.dtype,
    lora_A: Shape, lora_B: Shape, norm: Shape, gain: Shape, low: Shape | None, kept: Shape | None,
    merged: Shape | None, scaling: float, dtype: torch.dtype, way: str, keep: str, dropped: bool, norm_grad: bool,
    needs: Sequence[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    (M, N), (R, K) = dy, lora_A
    needs_x, needs_x_dropped, needs_A, needs_B, _magnitude, _bias, *needs_low = needs
    # with dropout x meets the weight alone, and x_dropped both
    inputs = needs_x + needs_x_dropped
    through_adapter = needs_x_dropped if dropped else needs_x
    flops = inputs * _product(M, N, K) + through_adapter * _product(M, R, K)
    if through_adapter or needs_A or any(needs_low):
        flops += _product(M, N, R)
    flops += needs_A * _product(R, M, K) + needs_B * _product(N, M, R)
    return flops + (needs_A + needs_B) * _product(N, R, K) if norm_grad else flops


def _rescale(base: Shape, low: Shape, *_: Any, **__: Any) -> int:
    (M, N), R = base, low[1]
    return _product(M, R, N)


def _rescale_backward(
    dy: Shape, base: Shape | None, low: Shape, lora_B: Shape, gain: Shape, scaling: float, residual: bool,
    needs: Sequence[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    _base, needs_low, needs_B, *_others = needs
    return (needs_low + needs_B) * _product(dy[0], lora_B[1], dy[1])


def _bank_epilogue(base: Shape, low: Shape, lora_B: Shape, *_: Any, **__: Any) -> int:
    """One adapter a row, also where a row has none: which rows those are stands in the numbers of index."""
    (M, N), R = base, lora_B[2]
    return _product(M, R, N)


def _shared_low(x: Shape, lora_As: Sequence[Shape], *_: Any, **__: Any) -> int:
    M, K = x
    return sum(_product(M, K, lora_A[0]) for lora_A in lora_As)


def _shared_low_backward(x: Shape, dlows: Sequence[Shape], *_: Any, **__: Any) -> int:
    M, K = x
    return sum(_product(dlow[1], M, K) for dlow in dlows)


FORMULAS: dict[str, Callable[..., int]] = {
    "forward": _forward,
    "backward": _backward,
    "norm": _norm,
    "merge": _norm,
    "norm_backward": _norm_backward,
    "grouped_norm": _grouped_norm,
    "rescale": _rescale,
    "rescale_backward": _rescale_backward,
    "bank_epilogue": _bank_epilogue,
    "shared_low": _shared_low,
    "shared_low_backward": _shared_low_backward,
}
"""FLOPs of each operator, of its arguments with shapes in the place of tensors."""


def _register(counter: ModuleType) -> None:
    for name in ops.OPERATORS:
        counter.register_flop_formula(getattr(torch.ops.dora_kernels, name))(FORMULAS[name])


class _Registration:
    """A finder of modules (sys.meta_path) that finds COUNTER alone, as the others do, and registers once it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        loader: Any = None if spec is None else spec.loader
        if loader is None or isinstance(loader, type):  # one loader for many modules
            return spec
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        loader.exec_module = execute_and_register
        return spec


if COUNTER in sys.modules:
    _register(sys.modules[COUNTER])
else:
    sys.meta_path.insert(0, _Registration())
