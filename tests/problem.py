"""Random inputs of one DoRA layer, and the three results every accuracy test compares: actual, yardstick, exact."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels import functional, launch
from dora_kernels.reference import dora_linear_ref
from dora_kernels.testing import Comparison, compare

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


def core(*arguments, **keywords) -> Tensor:
    """y of dora_linear_core, which returns norm and gain too."""
    return functional.dora_linear_core(*arguments, **keywords)[0]


@dataclass
class Problem:
    """The tensors of one call; gains are spread around 1 and lora_B is not zero, so that every term counts."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    bias: Tensor | None
    dy: Tensor
    x_dropped: Tensor | None = None
    # 0.75 and not 0.7: Triton takes a float32 scaling, and float64 tests want it exact
    scaling: float = 0.75

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
        scaling: float = 0.75,
        update: float | None = None,
    ) -> "Problem":
        """A problem with M tokens, N out features, K in features, rank R.

        update: |scaling * B A| / |W|, about; None leaves B of the size at which B A alone is as large as W.
        """
        generator = torch.Generator().manual_seed(seed)
        adapter_dtype = adapter_dtype or dtype

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).to(DEVICE)

        x = normal(M, K)
        weight = normal(N, K) * max(K, 1) ** -0.5
        lora_A = normal(R, K, dtype=adapter_dtype) * max(K, 1) ** -0.5
        size = 1.0 if update is None else update / abs(scaling)
        lora_B = normal(N, R, dtype=adapter_dtype) * (size * max(R, 1) ** -0.5)
        spread = 0.5 + torch.rand(N, dtype=torch.float64, generator=generator).to(DEVICE)
        norm = torch.linalg.vector_norm(weight.double() + scaling * lora_B.double() @ lora_A.double(), dim=1)
        return cls(
            x,
            weight,
            lora_A,
            lora_B,
            (spread * norm).to(adapter_dtype),
            normal(N) if bias else None,
            normal(M, N),
            F.dropout(x, dropout) if dropout else None,
            scaling,
        )

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
        with launch.options(backend=backend, way=way, precision=precision):
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
