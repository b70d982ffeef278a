"""DvoraLinear: the DVoRA layer as a module, with PEFT VeRA's parameter names; and the matrices that layers share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_kernels.extras.dvora.function import dvora_linear_reusing, dvora_norm, dvora_update
from dora_kernels.functional.arguments import (
    check_elements,
    check_flag,
    check_number,
    check_placement,
    check_probability,
    check_seed,
    check_size,
    check_type,
    described,
)
from dora_kernels.modules import MergeableLinear, default_adapter_dtype, part_of, read_linear
from dora_kernels.quant import Weight


class VeraProjection(nn.Module):
    """vera_A (rank, max_in_features) and vera_B (max_out_features, rank): random, frozen, one pair for all layers.

    A layer uses the first of their columns and rows. They are PEFT's for projection_prng_key = seed and the same sizes:
    Kaiming-uniform, drawn on the CPU in float32. Other sizes make other matrices.

    save: whether they are in the state dict, of every layer that holds them; without it they are drawn again from the
    seed, which gives the same numbers only where torch's generator does.
    """

    def __init__(
        self,
        max_in_features: int,
        max_out_features: int,
        rank: int,
        seed: int = 0,
        save: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Raises ValueError unless the sizes are positive ints, seed one of 64 bits, save a bool, device one of torch's
        and dtype floating-point."""
        max_in_features = check_size("VeraProjection", "max_in_features", max_in_features, 1)
        max_out_features = check_size("VeraProjection", "max_out_features", max_out_features, 1)
        rank = check_size("VeraProjection", "rank", rank, 1)
        check_elements("VeraProjection", rank=rank, max_in_features=max_in_features)
        check_elements("VeraProjection", max_out_features=max_out_features, rank=rank)
        seed = check_seed("VeraProjection", seed)
        check_flag("VeraProjection", "save", save)
        check_placement("VeraProjection", device, dtype=dtype)
        super().__init__()
        self.rank, self.seed = rank, seed
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("vera_A", (rank, max_in_features)), ("vera_B", (max_out_features, rank))):
            matrix = torch.empty(shape, dtype=torch.float32, device="cpu")
            nn.init.kaiming_uniform_(matrix, generator=generator)
            self.register_buffer(name, matrix.to(device or torch.get_default_device(), dtype), persistent=save)

    def of(self, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        """vera_A (R, K) and vera_B (N, R) of a layer of that size. Raises ValueError where it is too large."""
        vera_A, vera_B = part_of(self, "vera_A"), part_of(self, "vera_B")
        max_in, max_out = vera_A.shape[1], vera_B.shape[0]
        are_ints = isinstance(in_features, int) and isinstance(out_features, int)
        if not are_ints or not (0 <= in_features <= max_in and 0 <= out_features <= max_out):
            given = f"in_features is {described(in_features)} and out_features {described(out_features)}"
            raise ValueError(
                f"VeraProjection.of: {given}; expected ints from 0 to {max_in} and to {max_out}, the projection's"
            )
        # a view takes 1.6 us
        A = vera_A if in_features == max_in else vera_A[:, :in_features]
        return A, vera_B if out_features == max_out else vera_B[:out_features]


class DvoraLinear(MergeableLinear):
    """y = gain * (x weight^T + lambda_b * (lambda_d * (x vera_A^T)) vera_B^T) + bias (see `dvora_linear`).

    Trained are vera_lambda_d (R,), vera_lambda_b (N,) and vera_magnitude_vector (N,). With dropout p > 0, in training
    the adapter sees dropout(x) and the base layer x, as in PEFT's DoRA.

    State dict: weight, bias (as nn.Linear, not over a quantized layer: that is the submodule base_layer), the three
    above, and projection.vera_A, projection.vera_B if the projection is saved.

    projection is a submodule, the same object in every layer: moves, casts and deepcopy of a model keep it shared.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        projection: VeraProjection,
        d_initial: float = 0.1,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """A layer over a new nn.Linear; the arguments as those of DoraLinear and `from_linear`.

        adapter_dtype is that of the three vectors; None: float32 over a half-precision weight.
        """
        in_features = check_size("DvoraLinear", "in_features", in_features)
        out_features = check_size("DvoraLinear", "out_features", out_features)
        check_elements("DvoraLinear", out_features=out_features, in_features=in_features)
        check_flag("DvoraLinear", "bias", bias)
        check_placement("DvoraLinear", device, dtype=dtype, adapter_dtype=adapter_dtype)
        like = torch.empty(0, device=device, dtype=dtype)
        size = in_features, out_features
        numbers = _check_adapter("DvoraLinear", *size, like, projection, d_initial, dropout, adapter_dtype)
        linear = nn.Linear(*size, bias, device, dtype)
        self._build(linear.weight, linear.bias, None, projection, *numbers)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, projection: VeraProjection, d_initial: float = 0.1, dropout: float = 0.0
    ) -> "DvoraLinear":
        """A layer that computes what `linear` does and shares its weight and bias, which it freezes.

        A layer that bitsandbytes, torchao or HQQ has quantized becomes the submodule base_layer. Raises ValueError for
        other layers, for one that is larger than the projection or elsewhere, and for numbers that make no sense.
        """
        function = "DvoraLinear.from_linear"
        weight, bias, base_layer = read_linear(function, linear)
        N, K = weight.shape
        numbers = _check_adapter(function, K, N, weight, projection, d_initial, dropout, None)
        layer = cls.__new__(cls)
        layer._build(weight, bias, base_layer, projection, *numbers)
        return layer.train(linear.training)

    def _build(
        self,
        weight: Weight,
        bias: Tensor | None,
        base_layer: nn.Module | None,
        projection: VeraProjection,
        d_initial: float,
        dropout: float,
        adapter_dtype: torch.dtype,
    ) -> None:
        super().__init__(*((weight, bias) if base_layer is None else (None, None, base_layer)))
        N, K = weight.shape
        self.in_features, self.out_features = K, N
        self.d_initial, self.dropout = d_initial, dropout
        self.projection = projection
        for name, size in (("vera_lambda_d", projection.rank), ("vera_lambda_b", N), ("vera_magnitude_vector", N)):
            empty = torch.empty(size, device=weight.device, dtype=adapter_dtype)
            self.register_parameter(name, nn.Parameter(empty))
        self.reset_adapter()
        self._freeze_base()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """lambda_d to d_initial, lambda_b to zero, the magnitude to the row norms of weight."""
        self._refuse_while_merged("reset_adapter")
        vera_A, vera_B, lambda_d, lambda_b = self._vera()
        fresh = torch.full_like(lambda_d, self.d_initial), torch.zeros_like(lambda_b)
        weight = self._detached_base()
        # first: it may be refused, under options(backend="triton") say
        norm = None if weight.device.type == "meta" else dvora_norm(weight, vera_A, vera_B, *fresh)
        lambda_d.copy_(fresh[0])
        lambda_b.zero_()
        if norm is not None:
            self.vera_magnitude_vector.copy_(norm)

    def _vera(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """vera_A (R, K), vera_B (N, R), lambda_d (R,), lambda_b (N,)."""
        projection = part_of(self, "projection")
        lambda_d, lambda_b = part_of(self, "vera_lambda_d"), part_of(self, "vera_lambda_b")
        return *projection.of(self.in_features, self.out_features), lambda_d, lambda_b

    def factors(self) -> tuple[Tensor, Tensor, Tensor, float]:
        return *dvora_update(*self._vera()), self.vera_magnitude_vector, 1.0

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        if self.merged:
            return self.merged_product(x)
        weight, bias = self.base()
        x_dropped = F.dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        return dvora_linear_reusing(
            self,
            x,
            weight,
            *self._vera(),
            part_of(self, "vera_magnitude_vector"),
            bias,
            x_dropped=x_dropped,
            function="DvoraLinear",
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.projection.rank}, "
            f"bias={(self.base_layer or self).bias is not None}, dropout={self.dropout}"
        )


def _check_adapter(
    function: str,
    in_features: int,
    out_features: int,
    weight: Weight,
    projection: VeraProjection,
    d_initial: float,
    dropout: float,
    adapter_dtype: torch.dtype | None,
) -> tuple[float, float, torch.dtype]:
    """d_initial, dropout and adapter_dtype of a layer over a weight of this size, or like this one.

    Raises ValueError unless the projection has room for it and is where weight is.
    """
    check_type(function, "projection", projection, VeraProjection, "a VeraProjection")
    dropout = check_probability(function, "dropout", dropout)
    try:
        projection.of(in_features, out_features)
    except ValueError as error:
        raise ValueError(f"{function}: {error}") from error
    if weight.device != projection.vera_A.device:
        raise ValueError(
            f"{function}: the weight is on {weight.device} but projection is on {projection.vera_A.device}; "
            "expected one device"
        )
    adapter_dtype = adapter_dtype or default_adapter_dtype(weight.dtype)
    return check_number(function, "d_initial", d_initial, adapter_dtype), dropout, adapter_dtype
