"""Inference with adapters that no longer change: several of them in one batch, over one frozen weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels import launch, ops
from dora_kernels.functional import operand_dtypes, weight_norm
from dora_kernels.reference import accumulate_dtype, gain_ref
from dora_kernels.validate import check_adapter, check_call, check_row


class Adapter(NamedTuple):
    """lora_A (R, K), lora_B (N, R), magnitude (N,), scaling. A magnitude of None is plain LoRA, whose gain is 1."""

    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor | None
    scaling: float


@dataclass(frozen=True)
class AdapterBank:
    """E adapters of one weight (N, K), each with its gain, which is computed once: in `of`.

    lora_A (E * R, K), lora_B (E, N, R), gain (E, N), scaling (E,); R is the largest rank, smaller ones end in zeros.
    """

    lora_A: Tensor
    lora_B: Tensor
    gain: Tensor
    scaling: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, adapters: Sequence[Adapter]) -> AdapterBank:
        """The bank of `adapters`, in their order. Raises ValueError unless each fits weight, and all share a dtype."""
        adapters = [Adapter(*adapter) for adapter in adapters]
        if not adapters:
            raise ValueError("AdapterBank.of: adapters is empty; expected at least one")
        gains = []
        accumulate = accumulate_dtype(weight.dtype)
        for e, (lora_A, lora_B, magnitude, scaling) in enumerate(adapters):
            check_adapter(f"AdapterBank.of: adapter {e}", weight, lora_A, lora_B, scaling)
            if lora_A.dtype != adapters[0].lora_A.dtype:
                raise ValueError(
                    f"AdapterBank.of: adapter {e} is {lora_A.dtype} but adapter 0 is {adapters[0].lora_A.dtype}; "
                    "expected one dtype"
                )
            if magnitude is None:
                gains.append(weight.new_ones(weight.shape[0], dtype=accumulate))
            else:
                check_row(f"AdapterBank.of: adapter {e}", "magnitude", magnitude, weight)
                gains.append(gain_ref(magnitude, weight_norm(weight, lora_A, lora_B, scaling)))
        R = max(adapter.lora_A.shape[0] for adapter in adapters)
        return cls(
            torch.cat([F.pad(lora_A, (0, 0, 0, R - len(lora_A))) for lora_A, *_ in adapters]),
            torch.stack([F.pad(lora_B, (0, R - lora_B.shape[1])) for _, lora_B, *_ in adapters]),
            torch.stack(gains),
            torch.tensor([adapter.scaling for adapter in adapters], dtype=accumulate, device=weight.device),
        )

    def __len__(self) -> int:
        return self.lora_B.shape[0]


def bank_linear(x: Tensor, weight: Tensor, bank: AdapterBank, index: Tensor, bias: Tensor | None = None) -> Tensor:
    """dora_linear with an adapter of its own for each row of x; forward only.

        y_m = gain_e * (x_m weight^T + scaling_e * x_m lora_A_e^T lora_B_e^T) + bias,  e = index_m

    Shapes: x (..., K), weight (N, K), index x.shape[:-1], or x.shape[:1] where a sequence has one adapter; integers.
    An index of -1 (any outside the bank) is the frozen layer: x_m weight^T + bias.

    One GEMM with the weight, one with all lora_A of the bank, and one pass over the output, in which a tile of rows
    walks the adapters that its rows have. The GEMM with lora_A grows with the bank: 16 adapters of rank 16 are 256 more
    output features.

    Raises ValueError, naming the argument, where shapes, dtypes or devices do not fit, and where a gradient is wanted.
    """
    N = weight.shape[0]
    if not isinstance(bank, AdapterBank):
        raise ValueError(f"bank_linear: bank is {type(bank).__name__}; expected an AdapterBank")
    lora_A, lora_B = bank.lora_A, bank.lora_B
    R = lora_B.shape[2]
    check_adapter("bank_linear", weight, lora_A[:R], lora_B[0], 1.0)
    check_call("bank_linear", x, weight, bank.gain[0], bias, None, None)
    if x.dtype != weight.dtype and not ops.is_autocast(x.device.type):
        raise ValueError(f"bank_linear: x is {x.dtype} but weight is {weight.dtype}; expected one dtype")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, lora_A, lora_B)):
        raise ValueError("bank_linear: a gradient is wanted; expected torch.no_grad(): it is forward only")
    if index.dtype not in (torch.int32, torch.int64) or index.shape not in (x.shape[:-1], x.shape[:1]):
        raise ValueError(
            f"bank_linear: index is {index.dtype} of shape {tuple(index.shape)} but x has shape {tuple(x.shape)}; "
            f"expected integers of shape {tuple(x.shape[:-1])} or {tuple(x.shape[:1])}"
        )
    if index.device != x.device:
        raise ValueError(f"bank_linear: index is on {index.device} but x is on {x.device}; expected one device")
    index = index.reshape(*index.shape, *(1 for _ in range(x.dim() - 1 - index.dim()))).expand(x.shape[:-1])
    base_dtype, dtype = operand_dtypes(x, lora_A)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    y = ops.bank_epilogue(
        F.linear(rows.to(base_dtype), weight.to(base_dtype)),
        F.linear(rows.to(dtype), lora_A.to(dtype)),
        lora_B.to(dtype),
        bank.gain,
        bank.scaling,
        bias,
        index.reshape(-1).to(torch.int64),
        launch.current_options().backend,
    )
    return y.view(*x.shape[:-1], N)
