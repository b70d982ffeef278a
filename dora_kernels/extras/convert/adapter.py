"""DoraAdapter: what every format says about one layer, in this package's own terms."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dora_kernels.files.reading import shown
from dora_kernels.functional.arguments import check_choice, check_dense, check_flag, check_number, check_type

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Unrepresentable(ValueError):
    """A scaling that a format cannot hold to the last bit."""


@dataclass(frozen=True, eq=False)
class DoraAdapter:
    """The adapter of one layer: gain * (base + scaling * low lora_B^T), gain = magnitude / norm.

    lora_A (R, K), lora_B (N, R), magnitude (N,); of a convolution lora_A (R, K, *kernel), lora_B (N, R, 1, ...).
    norm_axis "out" is one norm for each of the N rows; "in", of LyCORIS and ComfyUI, one for each of the K columns,
    and the magnitude is (K,). A magnitude of None is a layer of plain LoRA, whose gain is 1. Raises ValueError where
    shapes, dtypes or scaling are none of these.
    """

    module: str
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor | None
    scaling: float
    norm_axis: str = "out"

    def __post_init__(self) -> None:
        check_type("DoraAdapter", "module", self.module, str, "a module's name")
        check_choice("DoraAdapter", "norm_axis", self.norm_axis, ("out", "in"))
        object.__setattr__(self, "scaling", float(check_number("DoraAdapter", "scaling", self.scaling)))
        for name in ("lora_A", "lora_B", "magnitude"):
            tensor = getattr(self, name)
            if tensor is None and name == "magnitude":
                continue
            check_dense(f"convert: {shown(self.module)}", name, tensor)
            if tensor.dtype not in DTYPES or tensor.is_meta:
                found = f"{tensor.dtype} on {tensor.device}"
                raise ValueError(f"convert: {shown(self.module)}: {name} is {found}; expected numbers, of {DTYPES}")
        check_shapes(self.module, self.lora_A, self.lora_B)
        expected = (self.N if self.norm_axis == "out" else self.K,)
        if self.magnitude is not None and tuple(self.magnitude.shape) != expected:
            raise ValueError(
                f"convert: {shown(self.module)}: magnitude has shape {tuple(self.magnitude.shape)} but lora_B "
                f"{tuple(self.lora_B.shape)}; expected {expected}"
            )
        if not math.isfinite(self.scaling) or self.scaling == 0:
            raise ValueError(f"convert: {shown(self.module)}: scaling is {self.scaling}; expected it finite and not 0")

    @property
    def N(self) -> int:
        return self.lora_B.shape[0]

    @property
    def K(self) -> int:
        return self.lora_A.shape[1]

    @property
    def R(self) -> int:
        return self.lora_A.shape[0]

    @property
    def ndim(self) -> int:
        """Dimensions of the layer's weight: 2 for a linear layer, 3 and more for a convolution."""
        return self.lora_A.ndim

    def folded(self, rounding: bool) -> DoraAdapter:
        """The same adapter with scaling * lora_B in place of lora_B, and a scaling of 1.

        Exact where scaling is a power of two and nothing leaves the dtype's range; else lora_B is rounded to its dtype
        if `rounding`, and Unrepresentable is raised if not.
        """
        check_flag("DoraAdapter.folded", "rounding", rounding)
        if self.scaling == 1:
            return self
        lora_B = (self.lora_B.double() * self.scaling).to(self.lora_B.dtype)
        power_of_two = abs(math.frexp(self.scaling)[0]) == 0.5
        exact = power_of_two and same_bits((lora_B.double() / self.scaling).to(lora_B.dtype), self.lora_B)
        if not exact and not rounding:
            raise Unrepresentable(
                f"convert: {shown(self.module)}: scaling {self.scaling!r} cannot be folded into lora_B "
                "without rounding it; expected a power of two, or --fold to round"
            )
        if (lora_B.isinf() & ~self.lora_B.isinf()).any():
            raise Unrepresentable(
                f"convert: {shown(self.module)}: scaling {self.scaling!r} times lora_B overflows {lora_B.dtype}; "
                "expected a lora_B that can hold it"
            )
        return replace(self, lora_B=lora_B, scaling=1.0)

    def same(self, other: DoraAdapter) -> bool:
        """Equal to the last bit: names, tensors and their dtypes, scaling."""
        check_type("DoraAdapter.same", "other", other, DoraAdapter, "a DoraAdapter")
        return (
            (self.module, self.scaling, self.norm_axis) == (other.module, other.scaling, other.norm_axis)
            and same_bits(self.lora_A, other.lora_A)
            and same_bits(self.lora_B, other.lora_B)
            and (self.magnitude is None) == (other.magnitude is None)
            and (self.magnitude is None or same_bits(self.magnitude, other.magnitude))
        )


def check_shapes(module: str, lora_A: Tensor, lora_B: Tensor) -> None:
    """Raise ValueError unless lora_A is (R, K, *kernel) and lora_B (N, R, 1, ...), of as many dimensions, none 0."""
    ndim = lora_A.ndim
    fits = 2 <= ndim <= 5 and 0 not in lora_A.shape and 0 not in lora_B.shape
    if not fits or tuple(lora_B.shape[1:]) != (lora_A.shape[0], *(1,) * (ndim - 2)):
        raise ValueError(
            f"convert: {shown(module)}: lora_A has shape {tuple(lora_A.shape)} and lora_B "
            f"{tuple(lora_B.shape)}; expected "
            "(R, K) and (N, R), or (R, K, *kernel) and (N, R, 1, ...) of a convolution without groups"
        )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every bit: -0.0 is not 0.0, and a NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(tensor.detach().resolve_neg().contiguous().view(-1).view(torch.uint8) for tensor in (a, b)))


def alpha_of(scaling: float, divisor: float) -> int | float | None:
    """The alpha with alpha / divisor == scaling to the last bit, an int where one does it; None where none does.

    There need not be one: multiples of a divisor that is no power of two are coarser than floats.
    """
    guess = scaling * divisor
    if not math.isfinite(guess):
        return None
    # the guess is the float nearest to the exact product, so no other alpha's quotient is nearer to scaling
    for alpha in (float(round(guess)), guess):
        if alpha / divisor == scaling:
            return int(alpha) if alpha.is_integer() else alpha
    return None
