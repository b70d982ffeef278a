"""Layers without tokens, outputs, inputs or rank, in every dtype, on both backends: as the definition has them.

    python -m tests.support.empty_layers some|all      # "ok" and 0, or what went wrong and 1

A process of its own: one of PyTorch's sums ends it (SIGFPE) where it is given no columns. "some": half precision on the
reference, which is where that is; "all" takes a minute.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import itertools
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from dora_kernels import DoraLinear, dora_linear, ops, options
from dora_kernels.extras import serving
from dora_kernels.extras.dvora import DvoraLinear, VeraProjection, dvora_linear, dvora_linear_ref, norm_terms
from dora_kernels.functional.rescale import rescale
from dora_kernels.functional.weight import merge_weight_and_norm, unmerge_weight, weight_norm
from dora_kernels.planning.options import current_options
from dora_kernels.reference import accumulate_dtype, dora_linear_ref
from dora_kernels.types import DoraWeight
from tests.support.problem import core

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = ((BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, FP32), (FP64, FP64))
# M, N, K, R with at least one 0
SIZES = [sizes for sizes in itertools.product((0, 3), (0, 5), (0, 4), (0, 2)) if 0 in sizes]


def assert_same(function: Callable[..., Tensor], definition: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """Output and gradients; a leaf that the definition does not reach has a gradient of 0, if any."""
    actual, expected = function(), definition()
    gradients = torch.autograd.grad(actual.sum(), leaves, allow_unused=True)
    exact = torch.autograd.grad(expected.sum(), leaves, allow_unused=True)
    for one, other, leaf in zip((actual, *gradients), (expected, *exact), (actual, *leaves), strict=True):
        one, other = (torch.zeros_like(leaf) if tensor is None else tensor for tensor in (one, other))
        torch.testing.assert_close(one.double(), other.double(), rtol=0.05, atol=0.05)


def run(sizes: tuple[int, int, int, int], dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    """Every function and layer of these sizes."""
    M, N, K, R = sizes

    def leaf(*shape: int, of: torch.dtype = adapter_dtype) -> Tensor:
        return torch.randn(shape, dtype=FP64).to(of).requires_grad_()

    x, dropped, weight, bias = (
        leaf(M, K, of=dtype),
        leaf(M, K, of=dtype),
        leaf(N, K, of=dtype).detach(),
        leaf(N, of=dtype),
    )
    lora_A, lora_B, magnitude = leaf(R, K), leaf(N, R), leaf(N)
    arguments, leaves = (x, weight, lora_A, lora_B, magnitude, 0.75, bias), [x, lora_A, lora_B, magnitude, bias]
    variants = ({}, {"norm_grad": True}, {"x_dropped": dropped})
    for way, precision, more in itertools.product(("split", "merged"), ("auto", "exact"), variants):
        with options(way=way, precision=precision):
            assert_same(
                lambda more=more: core(*arguments, **more),
                lambda more=more: dora_linear_ref(*arguments, **more),
                [*leaves, dropped] if "x_dropped" in more else leaves,
            )
    assert dora_linear(x[:0] if M else x.new_empty(2, 0, K), *arguments[1:]).shape[-1] == N
    norm = weight_norm(weight, lora_A, lora_B, 0.75, norm_grad=True)
    assert norm.shape == (N,) and len(torch.autograd.grad(norm.sum(), (lora_A, lora_B))) == 2
    with torch.no_grad():
        merged, norm, gain = merge_weight_and_norm(DoraWeight(weight, lora_A, lora_B, magnitude, 0.75))
        unmerged = unmerge_weight("unmerge", DoraWeight(merged, lora_A, lora_B, None, 0.75), norm, gain)
        torch.testing.assert_close(unmerged, weight, rtol=0.1, atol=0.1)
        adapters = [(lora_A, lora_B, magnitude, 0.5), (lora_A, lora_B, None, 1.0)]
        index = torch.arange(M) - 1
        assert serving.bank_linear(x, weight, serving.AdapterBank.of(weight, adapters), index, bias).shape == (M, N)
        backend = current_options().backend
        low = ops.shared_low(x, [lora_A, lora_A], adapter_dtype, backend)
        made = ops.shared_low_backward(x, [low[:, :R].contiguous()], adapter_dtype, backend)
        assert made[0].shape == (R, K) and not (M == 0 and made[0].any())
        grouped = [[tensor] * 2 for tensor in (weight, lora_A, lora_B, magnitude)]
        assert ops.grouped_norm(*grouped, [0.75, 0.5], adapter_dtype, backend)[0].shape == (2 * N,)

    base, low, gain = leaf(M, N, of=dtype), leaf(M, R), leaf(N, of=accumulate_dtype(dtype))
    assert_same(
        lambda: rescale(base, low, lora_B, gain, 0.75, bias),
        lambda: gain * (base + 0.75 * low @ lora_B.T) + bias,
        [base, low, lora_B, gain, bias],
    )
    lambda_d, lambda_b = leaf(R), leaf(N)
    frozen = (x, weight, lora_A.detach(), lora_B.detach(), lambda_d, lambda_b, magnitude, bias)
    terms = norm_terms(weight, lora_A.detach())
    for more in ({}, {"norm_grad": True}, {"x_dropped": dropped}, {"terms": terms}):
        plain = {name: value for name, value in more.items() if name != "terms"}
        assert_same(
            lambda more=more: dvora_linear(*frozen, **more),
            lambda plain=plain: dvora_linear_ref(*frozen, **plain),
            [x, lambda_d, lambda_b, magnitude, bias],
        )
    layers = [DoraLinear(K, N, R, 1.0, dropout=p, dropout_on=on, dtype=dtype)
              for p in (0.0, 0.5) for on in ("adapter", "lora")] if R else []  # fmt: skip
    layers += [DvoraLinear(K, N, VeraProjection(K, N, R), dropout=0.5, dtype=dtype)] if R and K and N else []
    for layer in layers:
        layer(x).sum().backward()
        expected = layer.eval()(x)
        layer.merge()
        torch.testing.assert_close(layer(x), expected, rtol=0.1, atol=0.1)
        layer.unmerge()


def main(how_many: str) -> int:
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # "Initializing zero-element tensors is a no-op"
    some = how_many == "some"
    for sizes, dtypes, backend in itertools.product(SIZES, DTYPES[:3] if some else DTYPES, ("reference", "triton")):
        if some and (backend == "triton") != (dtypes[0] == FP16 and sizes[3] > 0):
            continue
        print(f"{sizes} {dtypes} {backend}", file=sys.stderr, flush=True)  # the last line, where the process ends
        with options(backend=backend):
            run(sizes, *dtypes)
    print("ok")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1]))
