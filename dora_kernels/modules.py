"""DoraLinear: the DoRA layer as a module, with PEFT's parameter names; and merging, which DvoraLinear shares."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dora_kernels import reuse
from dora_kernels.decompositions import is_for_onnx
from dora_kernels.functional.arguments import (
    DROPOUTS,
    check_choice,
    check_elements,
    check_flag,
    check_number,
    check_placement,
    check_probability,
    check_size,
)
from dora_kernels.functional.validate import check_row, check_scaling, check_tensor, check_tracing
from dora_kernels.functional.weight import merge_weight_and_norm, unmerge_weight, weight_norm
from dora_kernels.ops import without_autocast
from dora_kernels.quant import Weight, is_quantized, read, read_or_reason
from dora_kernels.reference import gain_of
from dora_kernels.types import DoraWeight


class MergeableLinear(nn.Module):
    """weight (N, K) and bias (N,), or base_layer in their place; subclasses have the adapter over them.

    A subclass freezes them last: where it refuses its arguments, a layer that it was to share is as it was.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None, base_layer: nn.Module | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.base_layer: Any = base_layer
        # norm and gain with which the weight was merged; None while it is not
        self._merged_with: tuple[Tensor, Tensor] | None = None

    def _freeze_base(self) -> None:
        for part in (self.weight, self.bias, self.base_layer):
            if part is not None:
                part.requires_grad_(False)

    def _detached_base(self) -> Weight:
        """The weight beneath the adapter, of which no gradient can be wanted."""
        weight, _ = self.base()
        return weight.detach() if isinstance(weight, Tensor) else weight

    def factors(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """lora_A (R, K), lora_B (N, R), magnitude (N,), scaling of the adapter."""
        raise NotImplementedError

    def _adapted(self, weight: Weight) -> DoraWeight:
        """`weight` with the adapter over it."""
        return DoraWeight(weight, *self.factors())

    def adapter_operands(self) -> DoraWeight | None:
        """For the one launch of `frozen_adapters`; None where the layer makes its own norm."""
        return None

    def train(self, mode: bool = True) -> "MergeableLinear":
        """nn.Module.train; a change of mode ends what `frozen_adapters` reuses."""
        reuse.mode_set(self, mode)
        return super().train(mode)

    def _apply(self, *arguments: Any, **keywords: Any) -> "MergeableLinear":
        """nn.Module._apply, through which moves and casts go; it ends what `frozen_adapters` reuses."""
        reuse.invalidate(self)
        super()._apply(*arguments, **keywords)
        return self

    def base(self) -> tuple[Weight, Tensor | None]:
        """The weight and the bias beneath the adapter; a quantized one is read anew: its library may have moved it."""
        if not torch.compiler.is_compiling() and self._modules.get("base_layer") is None:  # a dense layer's, in 0.2 us
            parameters = self._parameters
            if "weight" in parameters:
                return parameters["weight"], parameters["bias"] if "bias" in parameters else self.bias
        base_layer = part_of(self, "base_layer")
        return (self.weight, self.bias) if base_layer is None else (read(base_layer), part_of(base_layer, "bias"))

    @property
    def merged(self) -> bool:
        """True between merge() and unmerge()."""
        return self._merged_with is not None

    def merged_product(self, x: Tensor) -> Tensor:
        """x (..., K) through the merged weight -> (..., N)."""
        if self.base_layer is None:
            return F.linear(x, self.weight, self.bias)
        bias = self.base_layer.bias
        return F.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @torch.no_grad()
    def norm_and_gain(self) -> tuple[Tensor, Tensor]:
        """norm and gain (N,) of the adapter, constants; while merged, those with which it was."""
        if self.merged:
            norm, gain = (row.to(self.weight.device) for row in self._merged_with)
            return norm, gain
        weight, lora_A, lora_B, magnitude, scaling = self._adapted(self.base()[0])
        norm = weight_norm(weight, lora_A, lora_B, scaling)
        return norm, gain_of(magnitude, norm)

    @torch.no_grad()
    def merged_weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of the frozen layer that computes what this one does in eval mode."""
        weight, bias = self.base()
        merged = self.weight if self.merged else self._merge(weight)[0]
        return merged.detach(), None if bias is None else bias.detach()

    def _merge(self, weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
        """merge_weight_and_norm, whatever autocast says now: unmerge() takes the adapters out unrounded."""
        with without_autocast(weight.device.type):
            return merge_weight_and_norm(self._adapted(weight))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False) -> None:
        """Put the adapter into weight, in place: the layer then costs what nn.Linear costs. Does nothing if merged.

        Over a quantized layer, which has no place for it, the weight is a new dense one.

        Until unmerge() the adapter gets no gradient, and the state dict can be neither saved nor loaded.

        safe_merge: raise ValueError, and merge nothing, where the merged weight is not finite.
        """
        function = f"{type(self).__name__}.merge"
        check_flag(function, "safe_merge", safe_merge)
        if self.merged:
            return
        merged, norm, gain = self._merge(self.base()[0])
        if safe_merge and not merged.isfinite().all():
            rows = int((~merged.isfinite()).any(dim=1).sum())
            raise ValueError(
                f"{function}: {rows} of {len(merged)} rows of the merged weight are not finite; "
                "expected none with safe_merge"
            )
        if self.base_layer is None:
            self.weight.copy_(merged)
        else:
            self.weight = nn.Parameter(merged, requires_grad=False)
        self._merged_with = norm, gain

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the adapter out of weight again, to within one rounding of its dtype. Does nothing if not merged.

        Raises ValueError where a gain of 0, or one too small for the dtype, has lost a row whose norm is not 0. The
        adapter must not have changed in between.
        """
        if not self.merged:
            return
        if self.base_layer is not None:
            self.weight = self._merged_with = None
            return
        norm, gain = (row.to(self.weight.device) for row in self._merged_with)
        function = f"{type(self).__name__}.unmerge"
        self.weight.copy_(unmerge_weight(function, self._adapted(self.weight), norm, gain))
        self._merged_with = None

    def _save_to_state_dict(self, *arguments: Any) -> None:
        if not is_for_onnx():  # whose exporter numbers the parameters by it, and keeps those that are read
            self._refuse_while_merged("state_dict")
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._refuse_while_merged("load_state_dict")
        reuse.invalidate(self)
        super()._load_from_state_dict(*arguments)

    def _refuse_while_merged(self, function: str) -> None:
        """A merged weight beside its adapter would be merged a second time by whoever loads it."""
        if self.merged:
            raise ValueError(f"{type(self).__name__}.{function}: the layer is merged; expected unmerge() first")


class DoraLinear(MergeableLinear):
    """y = gain * (x weight^T + scaling * (x lora_A^T) lora_B^T) + bias (see `dora_linear`), weight and bias frozen.

    scaling = alpha / rank. In training dropout_on selects where dropout is applied, d = dropout(x):
        "adapter"   x W^T + (gain - 1) * d W^T + gain * scaling * (d A^T) B^T + bias: all that the adapter adds sees d
                    and the base layer x, as in PEFT. Two products with the base weight
        "lora"      gain * (x W^T + scaling * (d A^T) B^T) + bias: the low-rank product alone sees d. One product
    Over the masks both have the output without dropout as their mean; the first varies more, by (gain - 1) * d W^T.

    State dict: weight, bias (as nn.Linear) and lora_A.weight (R, K), lora_B.weight (N, R), lora_magnitude_vector (N,),
    the names under which PEFT saves an adapter, so that weights move both ways. Over a quantized layer (`from_linear`)
    weight and bias are None while not merged: that layer is the submodule base_layer, and saves and moves itself.

    A fresh layer computes what its nn.Linear computes: lora_B is zero and the magnitude is the row norms of weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        dropout_on: str = "adapter",
    ) -> None:
        """adapter_dtype is that of lora_A, lora_B and the magnitude; None: float32 over a half-precision weight.

        Raises ValueError unless the sizes are ints and rank is positive, alpha finite, dropout in [0, 1) and dropout_on
        one of the above, bias a bool, device one that is here and the dtypes floating-point. NumPy's numbers are taken.
        """
        in_features = check_size("DoraLinear", "in_features", in_features)
        out_features = check_size("DoraLinear", "out_features", out_features)
        rank = check_size("DoraLinear", "rank", rank, 1)
        check_elements("DoraLinear", out_features=out_features, in_features=in_features)
        check_elements("DoraLinear", rank=rank, in_features=in_features)
        check_elements("DoraLinear", out_features=out_features, rank=rank)
        alpha = check_number("DoraLinear", "alpha", alpha)
        dropout = check_probability("DoraLinear", "dropout", dropout)
        check_choice("DoraLinear", "dropout_on", dropout_on, DROPOUTS)
        check_flag("DoraLinear", "bias", bias)
        check_placement("DoraLinear", device, dtype=dtype, adapter_dtype=adapter_dtype)
        dtype = dtype or torch.get_default_dtype()
        check_scaling(f"DoraLinear: alpha is {alpha!r} and rank {rank}", alpha / rank, dtype)
        adapter_dtype = adapter_dtype or default_adapter_dtype(dtype)
        base = nn.Linear(in_features, out_features, bias, device, dtype)
        super().__init__(base.weight, base.bias)
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.alpha, self.scaling = rank, alpha, alpha / rank
        self.dropout, self.dropout_on = dropout, dropout_on
        self.lora_A = nn.Linear(in_features, rank, False, device, adapter_dtype)
        self.lora_B = nn.Linear(rank, out_features, False, device, adapter_dtype)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(out_features, device=device, dtype=adapter_dtype))
        self.reset_adapter()
        self._freeze_base()

    @classmethod
    def from_linear(
        cls, linear: nn.Module, rank: int, alpha: float, dropout: float = 0.0, dropout_on: str = "adapter"
    ) -> "DoraLinear":
        """A layer that computes what `linear` does and shares its weight and bias, which it freezes.

        Shared means that merge() changes `linear` too, and whatever is tied to its weight. Not so for a layer that
        bitsandbytes, torchao or HQQ has quantized: it is kept as base_layer, merge() makes a dense weight beside it,
        and unmerge() drops that again.
        """
        weight, bias, base_layer = read_linear("DoraLinear.from_linear", linear)
        N, K = weight.shape
        # on meta, so that no second weight is made
        layer = cls(K, N, rank, alpha, False, dropout, "meta", weight.dtype, dropout_on=dropout_on)
        if base_layer is not None:
            layer.weight, layer.base_layer = None, base_layer
        else:
            layer.weight, layer.bias = weight, bias  # type: ignore[assignment]  # nn.Linear's, dense
        layer.lora_A.to_empty(device=weight.device)
        layer.lora_B.to_empty(device=weight.device)
        layer.lora_magnitude_vector = nn.Parameter(torch.empty_like(layer.lora_magnitude_vector, device=weight.device))
        layer.train(linear.training)
        layer.reset_adapter()
        layer._freeze_base()
        return layer

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """lora_A uniform as nn.Linear, lora_B zero, the magnitude the row norms of weight."""
        self._refuse_while_merged("reset_adapter")
        weight = self._detached_base()
        zero_A, zero_B = torch.zeros_like(self.lora_A.weight), torch.zeros_like(self.lora_B.weight)
        # first: it may be refused, under options(backend="triton") say
        norm = None if weight.device.type == "meta" else weight_norm(weight, zero_A, zero_B, self.scaling)
        self.lora_A.reset_parameters()
        self.lora_B.weight.zero_()
        if norm is not None:
            self.lora_magnitude_vector.copy_(norm)

    def factors(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """lora_A, lora_B, magnitude and scaling."""
        if not torch.compiler.is_compiling():  # in 0.2 us; by part_of in 0.8
            try:
                modules = self._modules
                lora_A, lora_B = modules["lora_A"]._parameters["weight"], modules["lora_B"]._parameters["weight"]
                return lora_A, lora_B, self._parameters["lora_magnitude_vector"], self.scaling
            except KeyError:  # parametrized
                pass
        return self.lora_A.weight, self.lora_B.weight, self.lora_magnitude_vector, self.scaling

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features). NotImplementedError under torch.jit.trace with gradients."""
        if self._merged_with is not None:
            return self.merged_product(x)
        x_dropped = None
        if self.training and self.dropout > 0:
            check_tracing("DoraLinear", x)  # without dropout dora_linear_core does
            x_dropped = F.dropout(x, self.dropout)
        weight, bias = self.base()
        return reuse.dora_linear_reusing(
            self,
            x,
            DoraWeight(weight, *self.factors()),
            bias,
            x_dropped=x_dropped,
            lora_dropout=self.dropout_on == "lora",
            function="DoraLinear",
        )

    def adapter_operands(self) -> DoraWeight | None:
        """The inputs of the norm, for `frozen_adapters`; None while merged."""
        return None if self.merged else self._adapted(self.base()[0])

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"alpha={self.alpha}, bias={(self.base_layer or self).bias is not None}, dropout={self.dropout}"
            + (f", dropout_on={self.dropout_on!r}" if self.dropout_on != "adapter" else "")
        )


def part_of(module: nn.Module, name: str) -> Any:
    """module.name, a parameter, buffer or submodule; unless traced, past nn.Module.__getattr__, which takes 0.4 us."""
    if not torch.compiler.is_compiling():
        for parts in (module._parameters, module._modules, module._buffers):
            if name in parts:
                return parts[name]
    return getattr(module, name)


def default_adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of an adapter over a weight of this dtype: float32 over half precision, else the weight's own."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def read_linear(function: str, linear: Any) -> tuple[Weight, Tensor | None, nn.Module | None]:
    """weight, bias and, where it is quantized, `linear` itself: what a layer over `linear` is made of.

    Raises ValueError, in the name of `function`, where it is neither nn.Linear nor quantized by a library we read.
    """
    quantized = isinstance(linear, nn.Module) and is_quantized(linear)
    if type(linear) is not nn.Linear and not quantized:
        raise ValueError(
            f"{function}: linear is {type(linear).__name__}; "
            "expected torch.nn.Linear, or a layer quantized by bitsandbytes, torchao or HQQ"
        )
    if quantized:
        weight, reason = read_or_reason(linear)
        if reason is not None:
            raise ValueError(f"{function}: {reason}")
    else:
        weight = linear.weight
        _check_parameter(function, "weight", weight)
        check_tensor(function, "weight", weight, None)
        if weight.dim() != 2:
            raise ValueError(f"{function}: weight has shape {tuple(weight.shape)}; expected 2 dimensions")
    if linear.bias is not None:
        if not quantized:
            _check_parameter(function, "bias", linear.bias)
        check_row(function, "bias", linear.bias, weight)
    return weight, linear.bias, linear if quantized else None


def _check_parameter(function: str, name: str, value: object) -> None:
    """Raise ValueError unless `value` is a parameter: weight_norm and prune of nn.utils make it anew at each call."""
    if not isinstance(value, nn.Parameter) or is_lazy(value):
        raise ValueError(f"{function}: {name} is {type(value).__name__}; expected the layer's own nn.Parameter")
