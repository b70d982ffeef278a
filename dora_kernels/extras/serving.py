"""Inference with adapters that no longer change: whole models merged, or several adapters in one batch.

`norms_and_gains` and `merge_model` go through a model's DoRA layers, those of other libraries after enable(model);
`bank_linear` applies another adapter to each row of x, over one frozen weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_kernels import ops
from dora_kernels.adapters.frozen import frozen_like
from dora_kernels.adapters.promises import Promises
from dora_kernels.adapters.taking import TakenOver
from dora_kernels.functional.arguments import check_dense, check_flag, check_model, check_type
from dora_kernels.functional.linear import operand_dtypes
from dora_kernels.functional.signature import run
from dora_kernels.functional.validate import check_adapter, check_call, check_row, check_tensor
from dora_kernels.functional.weight import weight_norm
from dora_kernels.modules import MergeableLinear
from dora_kernels.planning.options import current_options
from dora_kernels.reference import accumulate_dtype, gain_of


@torch.no_grad()
def norms_and_gains(model: nn.Module, *, progress: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
    """norm (N,) and gain (N,) of every DoRA layer of `model`, by its name; constants.

    progress: show a bar (needs rich). Raises ValueError where a layer has not just one adapter, is split over ranks,
    the model has none, or is no nn.Module.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    check_model("norms_and_gains", model)
    check_flag("norms_and_gains", "progress", progress)
    for names, layer in _tracked("norms_and_gains", model, progress):
        found |= dict.fromkeys(names, layer.norm_and_gain())
    return found


def merge_model(model: nn.Module, *, progress: bool = False) -> dict[str, str]:
    """Replace every DoRA layer of `model` by the frozen layer with its merged weight, in place; nothing can be undone.

    Each layer is merged and let go before the next, so that one weight more than the model is in memory. A layer under
    several names stays one. Returns what was left as it is: the name of a layer, and why no frozen layer can stand in
    its place.

    A PEFT model that is merged is good for inference, and its merge_and_unload() returns the base model, to be saved;
    unload() returns the same, with the merged weights. What it would save itself is an adapter without these layers:
    that, disable_adapter, load_adapter and what else loads these layers' parts raise ValueError from now on, of the
    wrapper, its tuner and its base model, and however the rest was left. The forks of NVlabs/DoRA the same, of those
    that have a peft_config in `model`: give the wrapper.

    progress: show a bar (needs rich). Raises ValueError, and merges nothing, where the model has no layer to merge, is
    one itself or no nn.Module, or is a part of a PEFT model without the peft_config, of which a wrapper could not be
    told.
    """
    check_model("merge_model", model)
    check_flag("merge_model", "progress", progress)
    if isinstance(model, (TakenOver, MergeableLinear)):
        raise ValueError(f"merge_model: model is a {type(model).__name__} itself; expected the model that holds it")
    left: dict[str, str] = {}
    promises = Promises(model)
    for names, layer in _tracked("merge_model", model, progress):
        try:
            frozen = _frozen(layer)
        except ValueError as error:
            left |= dict.fromkeys(names, str(error))
            continue
        frozen.train(layer.training)
        promises.withdraw(layer)
        for name in names:
            model.set_submodule(name, frozen)
    return left


def _tracked(function: str, model: nn.Module, progress: bool) -> Iterable[tuple[list[str], nn.Module]]:
    """(names, layer) of the DoRA layers that dora_kernels computes, with a bar or without.

    A layer is let go when the next is asked for.
    """
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (TakenOver, MergeableLinear)):
            found.setdefault(module, []).append(name)
    if not found:
        raise ValueError(f"{function}: model has no DoRA layer of ours; expected enable(model), or a DoraLinear")
    layers = [(names, layer) for layer, names in reversed(found.items())]
    handed_out = (layers.pop() for _ in range(len(layers)))
    if not progress:
        return handed_out
    try:
        from rich.progress import track
    except ModuleNotFoundError as error:
        raise ValueError(f"{function}: progress is True but {error}; expected rich to be installed") from error
    return track(handed_out, function.replace("_", " "), total=len(layers))


# parameters that outlive an inference mode around the call
@torch.inference_mode(False)
@torch.no_grad()
def _frozen(layer: nn.Module) -> nn.Module:
    if isinstance(layer, TakenOver):
        return layer.frozen_layer()
    return frozen_like(layer.base_layer, *layer.merged_weight_and_bias())


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
    gain and scaling are float32, float64 over a float64 weight. Raises ValueError, naming the field, unless they fit
    each other; made contiguous, as the kernels read them.

    The gains are those of the weight that `of` was given. A bank does not know which that was: one of another weight of
    the same sizes, or of this one after it was written to, gives another layer's output.
    """

    lora_A: Tensor
    lora_B: Tensor
    gain: Tensor
    scaling: Tensor

    def __post_init__(self) -> None:
        _check_bank(self.lora_A, self.lora_B, self.gain, self.scaling)
        for name in ("lora_B", "gain", "scaling"):
            object.__setattr__(self, name, getattr(self, name).contiguous())

    def __setstate__(self, state: dict[str, Tensor]) -> None:
        """For pickle and deepcopy, which go past __init__."""
        self.__dict__.update(state)
        self.__post_init__()

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, adapters: Sequence[Adapter]) -> AdapterBank:
        """The bank of `adapters`, in their order. Raises ValueError unless each fits weight, and all share a dtype."""
        check_type("AdapterBank.of", "weight", weight, Tensor, "a torch.Tensor")
        try:
            adapters = [Adapter(*adapter) for adapter in adapters]
        except (RuntimeError, TypeError) as error:  # nothing to go through, or not of four parts; of some tensors, too
            raise ValueError(
                f"AdapterBank.of: adapters is {type(adapters).__name__}; expected a list of (lora_A, lora_B, magnitude "
                f"or None, scaling): {error}"
            ) from error
        if not adapters:
            raise ValueError("AdapterBank.of: adapters is empty; expected at least one")
        gains, scalings = [], []
        accumulate = accumulate_dtype(weight.dtype)
        for e, (lora_A, lora_B, magnitude, scaling) in enumerate(adapters):
            scalings.append(check_adapter(f"AdapterBank.of: adapter {e}", weight, lora_A, lora_B, scaling))
            if lora_A.dtype != adapters[0].lora_A.dtype:
                raise ValueError(
                    f"AdapterBank.of: adapter {e} is {lora_A.dtype} but adapter 0 is {adapters[0].lora_A.dtype}; "
                    "expected one dtype"
                )
            if magnitude is None:
                gains.append(weight.new_ones(weight.shape[0], dtype=accumulate))
            else:
                check_row(f"AdapterBank.of: adapter {e}", "magnitude", magnitude, weight)
                gains.append(gain_of(magnitude, weight_norm(weight, lora_A, lora_B, scaling)))
        R = max(adapter.lora_A.shape[0] for adapter in adapters)
        return cls(
            torch.cat([F.pad(lora_A, (0, 0, 0, R - len(lora_A))) for lora_A, *_ in adapters]),
            torch.stack([F.pad(lora_B, (0, R - lora_B.shape[1])) for _, lora_B, *_ in adapters]),
            torch.stack(gains),
            torch.tensor(scalings, dtype=accumulate, device=weight.device),
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
    check_type("bank_linear", "bank", bank, AdapterBank, "an AdapterBank")
    check_type("bank_linear", "weight", weight, Tensor, "a torch.Tensor")
    lora_A, lora_B = bank.lora_A, bank.lora_B
    _check_bank(lora_A, lora_B, bank.gain, bank.scaling)  # again: what a tensor holds may have been changed since
    R = lora_B.shape[2]
    check_adapter("bank_linear", weight, lora_A[:R], lora_B[0], 1.0)
    check_call("bank_linear", x, weight, bank.gain[0], bias, None, None)
    N = weight.shape[0]
    if bank.gain.dtype != accumulate_dtype(weight.dtype):
        raise ValueError(
            f"bank_linear: bank.gain is {bank.gain.dtype} but weight is {weight.dtype}; "
            f"expected {accumulate_dtype(weight.dtype)}"
        )
    if x.dtype != weight.dtype and not ops.is_autocast(x.device.type):
        raise ValueError(f"bank_linear: x is {x.dtype} but weight is {weight.dtype}; expected one dtype")
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, lora_A, lora_B, bank.gain, bank.scaling, bias)
    ):
        raise ValueError("bank_linear: a gradient is wanted; expected torch.no_grad(): it is forward only")
    check_dense("bank_linear", "index", index)
    shapes = [x.shape[:-1], x.shape[: min(1, x.dim() - 1)]]  # x (K,) is one row: an index ()
    # compared, and not looked for in a set: torch.jit.trace has tensors for sizes
    if index.dtype not in (torch.int32, torch.int64) or all(index.shape != shape for shape in shapes):
        raise ValueError(
            f"bank_linear: index is {index.dtype} of shape {tuple(index.shape)} but x has shape {tuple(x.shape)}; "
            f"expected integers of shape {' or '.join(dict.fromkeys(str(tuple(shape)) for shape in shapes))}"
        )
    if index.device != x.device:
        raise ValueError(f"bank_linear: index is on {index.device} but x is on {x.device}; expected one device")
    if index.dim() < x.dim() - 1:
        index = index.reshape((*index.shape, *(1 for _ in range(x.dim() - 1 - index.dim())))).expand(x.shape[:-1])
    base_dtype, dtype = operand_dtypes(x, lora_A)
    # math.prod and not Size.numel(), which makes a symbolic or traced size a number
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y: Tensor = run(
        "bank_epilogue",
        F.linear(rows.to(base_dtype), weight.to(base_dtype)),
        F.linear(rows.to(dtype), lora_A.to(dtype)),
        # the kernel has no strides of these: what a bank holds may have others by now, an index is a column of a table
        lora_B.to(dtype).contiguous(),
        bank.gain.contiguous(),
        bank.scaling.contiguous(),
        bias,
        index.reshape(-1).to(torch.int64).contiguous(),
        current_options().backend,
    )
    return y.view(*x.shape[:-1], N)


def _check_bank(lora_A: Tensor, lora_B: Tensor, gain: Tensor, scaling: Tensor) -> None:
    """Raise ValueError unless these are the fields of an AdapterBank."""
    fields = (("lora_A", lora_A, 2), ("lora_B", lora_B, 3), ("gain", gain, 2), ("scaling", scaling, 1))
    for name, tensor, dimensions in fields:
        check_tensor("AdapterBank", name, tensor, lora_B, "lora_B")
        if tensor.dim() != dimensions:
            raise ValueError(f"AdapterBank: {name} has shape {tuple(tensor.shape)}; expected {dimensions} dimensions")
    E, N, R = lora_B.shape
    if E == 0:
        raise ValueError(f"AdapterBank: lora_B has shape {tuple(lora_B.shape)}; expected at least one adapter")
    shapes = (("lora_A", lora_A, (E * R, lora_A.shape[1])), ("gain", gain, (E, N)), ("scaling", scaling, (E,)))
    for name, tensor, shape in shapes:
        if tensor.shape != shape:
            raise ValueError(
                f"AdapterBank: {name} has shape {tuple(tensor.shape)} but lora_B has shape {tuple(lora_B.shape)}; "
                f"expected {shape}"
            )
    if lora_A.dtype != lora_B.dtype:
        raise ValueError(f"AdapterBank: lora_A is {lora_A.dtype} but lora_B is {lora_B.dtype}; expected one dtype")
    if gain.dtype not in (torch.float32, torch.float64) or scaling.dtype != gain.dtype:
        raise ValueError(
            f"AdapterBank: gain is {gain.dtype} and scaling {scaling.dtype}; expected both float32, or both float64"
        )
