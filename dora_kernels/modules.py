"""DoraLinear: the DoRA layer as a module, with PEFT's parameter names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_kernels import reuse
from dora_kernels.functional.validate import (
    DROPOUTS,
    check_elements,
    check_flag,
    check_number,
    check_placement,
    check_probability,
    check_scaling,
    check_sizes,
    check_tracing,
)
from dora_kernels.functional.weight import weight_norm
from dora_kernels.mergeable import MergeableLinear, read_linear


class DoraLinear(MergeableLinear):
    """y = gain * (x weight^T + scaling * (x lora_A^T) lora_B^T) + bias (see `dora_linear`), weight and bias frozen.

    scaling = alpha / rank. What dropout p > 0 means in training, with d = dropout(x), dropout_on says:
        "adapter"   x W^T + (gain - 1) * d W^T + gain * scaling * (d A^T) B^T + bias: all that the adapter adds sees d
                    and the base layer x, as in PEFT. Two products with the base weight
        "lora"      gain * (x W^T + scaling * (d A^T) B^T) + bias: the low-rank product alone sees d. One product
    Over the masks both have the output without dropout as their mean; the first varies more, by (gain - 1) * d W^T.

    State dict: weight, bias (as nn.Linear) and lora_A.weight (R, K), lora_B.weight (N, R), lora_magnitude_vector (N,),
    the names under which PEFT saves an adapter, so that weights move both ways. Over a quantised layer (`from_linear`)
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
        one of the above, bias a bool, device one of torch's and the dtypes floating-point.
        """
        check_sizes("DoraLinear", 0, in_features=in_features, out_features=out_features)
        check_sizes("DoraLinear", 1, rank=rank)
        check_elements("DoraLinear", (out_features, in_features), (rank, in_features), (out_features, rank))
        check_number("DoraLinear", "alpha", alpha)
        check_probability("DoraLinear", "dropout", dropout)
        if dropout_on not in DROPOUTS:
            raise ValueError(f"DoraLinear: dropout_on is {dropout_on!r}; expected one of {', '.join(DROPOUTS)}")
        check_flag("DoraLinear", "bias", bias)
        check_placement("DoraLinear", device, dtype=dtype, adapter_dtype=adapter_dtype)
        dtype = dtype or torch.get_default_dtype()
        check_scaling(f"DoraLinear: alpha is {alpha!r} and rank {rank}", alpha / rank, dtype)
        if adapter_dtype is None:
            adapter_dtype = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        base = nn.Linear(in_features, out_features, bias, device, dtype)
        super().__init__(base.weight, base.bias)
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.alpha, self.scaling = rank, alpha, alpha / rank
        self.dropout, self.dropout_on = dropout, dropout_on
        self.lora_A = nn.Linear(in_features, rank, False, device, adapter_dtype)
        self.lora_B = nn.Linear(rank, out_features, False, device, adapter_dtype)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(out_features, device=device, dtype=adapter_dtype))
        self.reset_adapter()

    @classmethod
    def from_linear(
        cls, linear: nn.Module, rank: int, alpha: float, dropout: float = 0.0, dropout_on: str = "adapter"
    ) -> "DoraLinear":
        """A layer that computes what `linear` does and shares its weight and bias, which it freezes.

        Shared means that merge() changes `linear` too, and whatever is tied to its weight. Not so for a layer that
        bitsandbytes, torchao or HQQ has quantised: it is kept as base_layer, merge() makes a dense weight beside it,
        and unmerge() drops that again.
        """
        weight, bias, base_layer = read_linear("DoraLinear.from_linear", linear)
        N, K = weight.shape
        # on meta, so that no second weight is made
        layer = cls(K, N, rank, alpha, False, dropout, "meta", weight.dtype, dropout_on=dropout_on)
        if base_layer is not None:
            layer.weight, layer.base_layer = None, base_layer.requires_grad_(False)
        else:
            layer.weight = weight.requires_grad_(False)
            layer.bias = None if bias is None else bias.requires_grad_(False)
        layer.lora_A.to_empty(device=weight.device)
        layer.lora_B.to_empty(device=weight.device)
        layer.lora_magnitude_vector = nn.Parameter(torch.empty_like(layer.lora_magnitude_vector, device=weight.device))
        layer.train(linear.training)
        layer.reset_adapter()
        return layer

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """lora_A uniform as nn.Linear, lora_B zero, the magnitude the row norms of weight."""
        self._refuse_while_merged("reset_adapter")
        self.lora_A.reset_parameters()
        self.lora_B.weight.zero_()
        weight, _ = self.base()
        if weight.device.type != "meta":
            norm = weight_norm(weight, self.lora_A.weight, self.lora_B.weight, self.scaling)
            self.lora_magnitude_vector.copy_(norm)

    def factors(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """As MergeableLinear.factors."""
        return self.lora_A.weight, self.lora_B.weight, self.lora_magnitude_vector, self.scaling

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features). NotImplementedError under torch.jit.trace with gradients."""
        if self.merged:
            return self.merged_product(x)
        check_tracing("DoraLinear", x)
        weight, bias = self.base()
        x_dropped = F.dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        return reuse.dora_linear_reusing(
            self,
            x,
            weight,
            self.lora_A.weight,
            self.lora_B.weight,
            self.lora_magnitude_vector,
            self.scaling,
            bias,
            x_dropped=x_dropped,
            lora_dropout=self.dropout_on == "lora",
            function="DoraLinear",
        )

    def adapter_operands(self) -> reuse.Operands | None:
        """What the norm is computed from; None while merged."""
        adapter = (self.lora_A.weight, self.lora_B.weight, self.lora_magnitude_vector)
        return None if self.merged else reuse.Operands(self.base()[0], *adapter, self.scaling)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"alpha={self.alpha}, bias={(self.base_layer or self).bias is not None}, dropout={self.dropout}"
            + (f", dropout_on={self.dropout_on!r}" if self.dropout_on != "adapter" else "")
        )
