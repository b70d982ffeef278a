"""Random inputs of one DoRA layer, and the three results every accuracy test compares: actual, yardstick, exact."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels import options, weight_norm
from dora_kernels.functional import linear
from dora_kernels.functional.rescale import rescale
from dora_kernels.reference import dora_linear_ref
from dora_kernels.testing import SCALING, Comparison, compare, random_inputs
from dora_kernels.types import DoraWeight, Given

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# float64 shows an error of meaning to 1e-9; a GPU's kernels do not take it, and float32 stands in
EXACT_DTYPE = torch.float64 if DEVICE == "cpu" else torch.float32
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9} if DEVICE == "cpu" else {"rtol": 1e-4, "atol": 1e-4}
TOLERANCE["check_dtype"] = False
BACKENDS = ("reference", "triton")
# weight dtype, adapter dtype: the last is what PEFT makes of a half-precision model by default
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
)
Results = dict[str, Tensor]
GRADIENTS = ("x", "lora_A", "lora_B", "magnitude", "bias")


def core(x, weight, lora_A, lora_B, magnitude, scaling, bias=None, **arguments) -> Tensor:
    """y of dora_linear_core, which returns norm and gain too; with the fields of its layer and of what is given."""
    given = Given(**{name: arguments.pop(name) for name in Given._fields if name in arguments})
    layer = DoraWeight(weight, lora_A, lora_B, magnitude, scaling)
    return linear.dora_linear_core(x, layer, bias, given=given, **arguments)[0]


def two_pieces(x, weight, lora_A, lora_B, magnitude, scaling, bias=None, *, x_dropped=None, norm_grad=False):
    """The DoRA layer in two pieces, `weight_norm` and `rescale`."""
    gain = magnitude / weight_norm(weight, lora_A, lora_B, scaling, norm_grad=norm_grad)
    low = F.linear((x if x_dropped is None else x_dropped).to(lora_A.dtype), lora_A)
    return rescale(F.linear(x, weight), low, lora_B, gain, scaling, bias)


def definition(layer, x, **arguments) -> Tensor:
    """y of a DoraLinear as reference.py defines it."""
    adapter = (layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector)
    return dora_linear_ref(x, layer.weight, *adapter, layer.scaling, layer.bias, **arguments)


@dataclass
class Problem:
    """The tensors of one call, from random_inputs."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    bias: Tensor | None
    dy: Tensor
    x_dropped: Tensor | None = None
    scaling: float = SCALING

    @classmethod
    def random(
        cls,
        M: int,
        N: int,
        K: int,
        R: int,
        dtype: torch.dtype = EXACT_DTYPE,
        adapter_dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        seed: int = 0,
        scaling: float = SCALING,
        update: float | None = None,
        device: str = DEVICE,
    ) -> "Problem":
        """A problem with M tokens, N out features, K in features, rank R.

        update: |scaling * B A| / |W|, about; None leaves B of the size at which B A alone is as large as W.
        """
        generator = torch.Generator().manual_seed(seed)
        inputs = random_inputs(
            M, N, K, R, dtype, adapter_dtype, scaling, update, bias=bias, device=device, generator=generator
        )
        inputs = {name: value.detach() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        dy = torch.randn(M, N, dtype=torch.float64, generator=generator).to(dtype).to(device)
        x_dropped = F.dropout(inputs["x"], dropout) if dropout else None
        return cls(**inputs, dy=dy, x_dropped=x_dropped)

    @property
    def layer(self) -> DoraWeight:
        """The weight and its adapter."""
        return DoraWeight(self.weight, self.lora_A, self.lora_B, self.magnitude, self.scaling)

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same numbers in another dtype."""
        tensors = {name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Problem(**(vars(self) | tensors))

    def run(self, function: Callable[..., Tensor], needs: tuple[str, ...] = GRADIENTS, **arguments) -> Results:
        """y and the gradients in `needs` (and of x_dropped, where there is one), by name.

        The leaves are views of the problem's own tensors: a clone would have strides of its own.
        """
        leaves = {
            name: value.detach().requires_grad_(name in needs)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name not in ("dy", "weight")
        }
        if self.x_dropped is not None:
            leaves["x_dropped"].requires_grad_("x" in needs)
            arguments["x_dropped"] = leaves["x_dropped"]
        y = function(
            leaves["x"],
            self.weight,
            leaves["lora_A"],
            leaves["lora_B"],
            leaves["magnitude"],
            self.scaling,
            leaves.get("bias"),
            **arguments,
        )
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        gradients = torch.autograd.grad(y, list(wanted.values()), self.dy.to(y.dtype)) if wanted else ()
        return {"y": y.detach()} | dict(zip(wanted, gradients, strict=True))

    def exact(self, **arguments) -> Results:
        """The definition in float64."""
        return self.to(torch.float64).run(dora_linear_ref, **arguments)

    def yardstick(self, **arguments) -> Results:
        """The definition in the problem's own dtypes: what plain PyTorch makes."""
        return self.run(dora_linear_ref, **arguments)

    def ours(self, backend: str, way: str = "auto", precision: str = "auto", **arguments) -> Results:
        """dora_linear_core in the problem's own dtypes."""
        with options(backend=backend, way=way, precision=precision):
            return self.run(core, **arguments)

    def comparisons(self, actual: Results, **arguments) -> list[Comparison]:
        """Every tensor of `actual` against the exact result and the yardstick."""
        exact, yardstick = self.exact(**arguments), self.yardstick(**arguments)
        assert actual.keys() == yardstick.keys()
        # base and z have the weight's dtype, and dmagnitude (with norm_grad every gradient) is made from them
        coarse = {"magnitude"} | ({"lora_A", "lora_B"} if arguments.get("norm_grad") else set())
        return [
            compare(name, actual[name], yardstick[name], exact[name], self.weight.dtype if name in coarse else None)
            for name in actual
        ]
