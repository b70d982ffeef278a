"""The DVoRA layer as a function.

Letters: N out features, K in features, R rank, P = min(R, K).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_kernels import reuse
from dora_kernels.functional.autograd import in_dtype
from dora_kernels.functional.linear import check_dtypes, operand_dtypes
from dora_kernels.functional.rescale import rescale
from dora_kernels.functional.validate import check_call, check_norm_grad, check_tensor, check_transforms
from dora_kernels.functional.weight import weight_norm
from dora_kernels.ops import is_autocast
from dora_kernels.quant import QuantizedWeight, Weight, frozen_product, origin_of
from dora_kernels.reference import accumulate_dtype, gain_of, over_norm, row_norms

TERMS_SHARE = 0.25
"""The largest part of the weight's bytes that the terms of its norm may take to be kept: memory is why one adapts."""

_BLOCK_ROWS = 1024
"""Rows of a weight that are decoded and widened to float64 at once."""


class NormTerms(NamedTuple):
    """weight (N, K) and vera_A (R, K) as the norm sees them: (N, P + 1) and (R, P + 1). See `norm_terms`."""

    weight: Tensor
    vera_A: Tensor


def dvora_linear(
    x: Tensor,
    weight: Weight,
    vera_A: Tensor,
    vera_B: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    terms: NormTerms | None = None,
    norm_grad: bool = False,
    x_dropped: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """The DVoRA linear layer, differentiable in x, lambda_d, lambda_b, magnitude and bias.

        y = gain * (x weight^T + lambda_b * (lambda_d * (x vera_A^T)) vera_B^T) + bias
        gain = magnitude / norm,  norm_n = ||weight_n + lambda_b_n * (vera_B_n * lambda_d) vera_A||_2

    Shapes: x (..., K), weight (N, K) or a QuantizedWeight, vera_A (R, K), vera_B (N, R), all three frozen, lambda_d
    (R,), lambda_b, magnitude, bias (N,) -> y (..., N). Dtypes, and rows whose norm is 0, as dora_linear. The low-rank
    product is taken in the dtype in which x would meet vera_A there.

    terms: norm_terms(weight, vera_A), with which the norm reads neither; the same to rounding. They are the caller's
    to keep in step with both. norm_grad: as in dora_linear; the gradient of lambda_d and lambda_b.
    x_dropped: dropout(x). The adapter then sees x_dropped and the base layer x, as in PEFT's DoRA:
        y = x weight^T + (gain - 1) * x_dropped weight^T + gain * lambda_b * (lambda_d * (x_dropped vera_A^T)) vera_B^T
    norm (N,): used in place of the row norms, a constant.

    Raises ValueError, naming the argument, where shapes, dtypes or devices do not fit, or what is frozen requires a
    gradient; NotImplementedError and higher derivatives as dora_linear.
    """
    function = "dvora_linear"
    _check(function, x, weight, vera_A, vera_B, lambda_d, lambda_b, magnitude, bias, x_dropped, norm, norm_grad)
    if norm is None:
        if terms is not None:
            _check_terms(function, terms, weight, vera_A)
        norm = _norm(weight, vera_A, vera_B, lambda_d, lambda_b, terms, norm_grad)
    return _with_norm(x, weight, vera_A, vera_B, lambda_d, lambda_b, magnitude, bias, norm, x_dropped)


def _with_norm(
    x: Tensor,
    weight: Weight,
    vera_A: Tensor,
    vera_B: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    norm: Tensor,
    x_dropped: Tensor | None,
) -> Tensor:
    """dvora_linear of arguments that `_check` has seen."""
    base_dtype, dtype = operand_dtypes(x, vera_A)
    gain = gain_of(magnitude, in_dtype(norm, accumulate_dtype(base_dtype)))

    x_adapter = x if x_dropped is None else x_dropped
    low = F.linear(in_dtype(x_adapter, dtype), in_dtype(vera_A, dtype))
    low = in_dtype(low * lambda_d, dtype)
    base = frozen_product(in_dtype(x_adapter, base_dtype), weight)
    residual = None if x_dropped is None else frozen_product(in_dtype(x, base_dtype), weight)
    return rescale(base, low, lambda_b[:, None] * vera_B, gain, 1.0, bias, residual=residual)


def dvora_linear_ref(
    x: Tensor,
    weight: Tensor,
    vera_A: Tensor,
    vera_B: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    x_dropped: Tensor | None = None,
    norm_grad: bool = False,
) -> Tensor:
    """The definition of dvora_linear in plain PyTorch, dense, by autograd, in any dtype up to float64."""
    norm = row_norms(weight + (lambda_b[:, None] * vera_B) @ (lambda_d[:, None] * vera_A))
    norm = norm if norm_grad else norm.detach()
    gain = over_norm(magnitude, norm)
    x_adapter = x if x_dropped is None else x_dropped
    base = F.linear(x_adapter, weight)
    low = lambda_d * F.linear(x_adapter.to(vera_A.dtype), vera_A)
    y = gain * (base + lambda_b * F.linear(low.to(vera_B.dtype), vera_B))
    if x_dropped is not None:
        y = y + F.linear(x, weight) - base
    return (y if bias is None else y + bias).to(x.dtype)


def dvora_update(
    vera_A: Tensor, vera_B: Tensor, lambda_d: Tensor, lambda_b: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """lora_A (R, K) = vera_A and lora_B (N, R) = lambda_b * vera_B * lambda_d: the adapter as DoRA's functions take it.

    Both of one dtype, in which lora_B is made: the widest among the four, and dtype.
    """
    for tensor in (vera_A, vera_B, lambda_d, lambda_b):
        dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    return vera_A.to(dtype), lambda_b.to(dtype)[:, None] * vera_B.to(dtype) * lambda_d.to(dtype)


def dvora_norm(
    weight: Weight,
    vera_A: Tensor,
    vera_B: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    *,
    terms: NormTerms | None = None,
    norm_grad: bool = False,
) -> Tensor:
    """norm (N,) of dvora_linear, float32 (float64 for float64 weights); a constant unless norm_grad.

    With terms it costs N R P instead of N R K, and reads (N, P + 1) instead of weight. Raises ValueError as
    dvora_linear.
    """
    _check_factors("dvora_norm", weight, vera_A, vera_B, lambda_d, lambda_b)
    check_norm_grad("dvora_norm", norm_grad, None)
    if terms is not None:
        _check_terms("dvora_norm", terms, weight, vera_A)
    return _norm(weight, vera_A, vera_B, lambda_d, lambda_b, terms, norm_grad)


def _norm(
    weight: Weight,
    vera_A: Tensor,
    vera_B: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    terms: NormTerms | None,
    norm_grad: bool,
) -> Tensor:
    """dvora_norm without its checks."""
    with torch.set_grad_enabled(norm_grad and torch.is_grad_enabled()):
        if terms is None:
            lora_A, lora_B = dvora_update(vera_A, vera_B, lambda_d, lambda_b)
            return weight_norm(weight, lora_A, lora_B, 1.0, norm_grad=norm_grad)
        lora_A, lora_B = dvora_update(terms.vera_A, vera_B, lambda_d, lambda_b, terms.vera_A.dtype)
        device = terms.weight.device.type
        if not is_autocast(device):
            return weight_norm(terms.weight, lora_A, lora_B, 1.0, norm_grad=norm_grad)
        # the terms are no weights of a GEMM: they stay float32
        with torch.autocast(device, enabled=False):
            return weight_norm(terms.weight, lora_A, lora_B, 1.0, norm_grad=norm_grad)


@torch.no_grad()
def norm_terms(weight: Weight, vera_A: Tensor) -> NormTerms:
    """The terms that give the norms of weight (N, K) + any (N, R) @ vera_A (R, K): (N, P + 1), (R, P + 1), float32.

    With the rows of Q (P, K) an orthonormal basis that vera_A = L Q lies in, weight = C Q + rest, rest Q^T = 0, and
        ||weight_n + b vera_A||^2 = ||C_n + b L||^2 + ||rest_n||^2 = ||(C_n, |rest_n|) + b (L, 0)||^2
    for every b (R,): the norm of a narrower weight and a narrower vera_A. A sum of squares, where the expanded
    ||W_n||^2 + 2 b U_n + b G b^T would cancel for an update as large as the weight. Made once, so in float64.
    Raises ValueError unless both are frozen matrices of one K.
    """
    _check_frozen("norm_terms", weight=weight, vera_A=vera_A)
    if vera_A.shape[1] != weight.shape[1]:
        raise ValueError(
            f"norm_terms: vera_A has shape {tuple(vera_A.shape)} but weight has shape {tuple(weight.shape)}; "
            f"expected vera_A (R, K) with K = {weight.shape[1]}"
        )
    dtype = accumulate_dtype(weight.dtype)
    basis, factor = torch.linalg.qr(vera_A.double().T)  # (K, P) and (P, R)
    N, P = weight.shape[0], basis.shape[1]
    narrow = vera_A.new_zeros((N, P + 1), dtype=dtype)
    for start in range(0, N, _BLOCK_ROWS):
        rows = slice(start, min(start + _BLOCK_ROWS, N))
        block = weight[rows].double()
        coordinates = block @ basis
        narrow[rows, :P] = coordinates
        if P < weight.shape[1]:  # else basis is all of the space, and the rest is rounding
            narrow[rows, P] = torch.linalg.vector_norm(block.addmm(coordinates, basis.T, alpha=-1), dim=1)
    return NormTerms(narrow, F.pad(factor.T, (0, 1)).to(dtype).contiguous())


def terms_are_small(weight: Weight, vera_A: Tensor) -> bool:
    """True if the terms of the norm take at most TERMS_SHARE of the weight's bytes.

    R = 256 over K = 4096: an eighth in bfloat16 and so kept, a half in 4 bits and so not.
    """
    N = weight.shape[0]
    narrow = N * (min(vera_A.shape) + 1) * accumulate_dtype(weight.dtype).itemsize
    return narrow <= TERMS_SHARE * weight.nbytes


def dvora_linear_reusing(
    layer: nn.Module,
    x: Tensor,
    weight: Weight,
    vera_A: Tensor,
    vera_B: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    x_dropped: Tensor | None = None,
    function: str = "dvora_linear",
) -> Tensor:
    """dvora_linear for `layer`, with the terms of its norm kept while weight and vera_A stay as they are, if small.

    constants.py says where. On a CPU they are made in the first call, so that the same call gives the same bits. In
    eval mode they are neither made nor used: a server would pay for them once and hold them for ever, where
    `frozen_adapters` keeps the norm itself.
    """
    check_transforms(function, x)
    stored, storage = origin_of(weight)
    factors = (vera_A, vera_B, lambda_d, lambda_b)
    arguments = (x, weight, *factors, magnitude, bias)
    _check(function, *arguments, x_dropped, None, False)

    def compute() -> Tensor:
        terms = None
        if layer.training and terms_are_small(weight, vera_A):
            frozen = (*stored, vera_A)
            terms = reuse.constant_reusing(layer, frozen, lambda: norm_terms(weight, vera_A))
        return _norm(weight, *factors, terms, False)

    norm = reuse.norm_reusing(layer, (*stored, *factors), (storage, operand_dtypes(x, vera_A)), compute)
    return _with_norm(*arguments, norm, x_dropped)


def _check(
    function: str,
    x: Tensor,
    weight: Weight,
    vera_A: Tensor,
    vera_B: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    x_dropped: Tensor | None,
    norm: Tensor | None,
    norm_grad: bool,
) -> None:
    """Raise ValueError unless the arguments of dvora_linear fit each other."""
    _check_factors(function, weight, vera_A, vera_B, lambda_d, lambda_b)
    check_call(function, x, weight, magnitude, bias, x_dropped, norm)
    check_norm_grad(function, norm_grad, norm)
    check_dtypes(function, x, weight)


def _check_terms(function: str, terms: NormTerms, weight: Weight, vera_A: Tensor) -> None:
    """Raise ValueError unless `terms` has the sizes of norm_terms(weight, vera_A)."""
    if not isinstance(terms, NormTerms):
        raise ValueError(f"{function}: terms is {type(terms).__name__}; expected norm_terms(weight, vera_A)")
    width, dtype = min(vera_A.shape) + 1, accumulate_dtype(weight.dtype)
    for name, tensor, rows in (("weight", terms.weight, weight.shape[0]), ("vera_A", terms.vera_A, vera_A.shape[0])):
        check_tensor(function, f"terms.{name}", tensor, weight)
        if tuple(tensor.shape) != (rows, width) or tensor.dtype != dtype or tensor.requires_grad:
            raise ValueError(
                f"{function}: terms.{name} is {tensor.dtype} {tuple(tensor.shape)}, requires_grad "
                f"{tensor.requires_grad}; expected {dtype} {(rows, width)}, frozen"
            )


def _check_frozen(function: str, weight: Weight, **factors: Tensor) -> None:
    """Raise ValueError unless all of them are frozen matrices on the device of weight."""
    for name, tensor in {"weight": weight, **factors}.items():
        if name != "weight" or not isinstance(tensor, QuantizedWeight):
            check_tensor(function, name, tensor, weight)
        if tensor.dim() != 2:
            raise ValueError(f"{function}: {name} has shape {tuple(tensor.shape)}; expected 2 dimensions")
        if tensor.requires_grad:
            raise ValueError(f"{function}: {name}.requires_grad is True; expected False: DVoRA freezes it")


def _check_factors(
    function: str, weight: Weight, vera_A: Tensor, vera_B: Tensor, lambda_d: Tensor, lambda_b: Tensor
) -> None:
    """Raise ValueError unless the weight and the factors fit each other."""
    _check_frozen(function, weight, vera_A=vera_A, vera_B=vera_B)
    (N, K), R = weight.shape, vera_A.shape[0]
    shapes = {"vera_A": (R, K), "vera_B": (N, R), "lambda_d": (R,), "lambda_b": (N,)}
    for name, tensor in (("vera_A", vera_A), ("vera_B", vera_B), ("lambda_d", lambda_d), ("lambda_b", lambda_b)):
        if name.startswith("lambda"):
            check_tensor(function, name, tensor, weight)
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{function}: {name} has shape {tuple(tensor.shape)} but weight has shape {tuple(weight.shape)} and "
                f"vera_A {tuple(vera_A.shape)}; expected {name} {shapes[name]}"
            )
