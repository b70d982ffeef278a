"""Tensor parallelism: the DoRA linear layer with its weight split over the ranks of a process group.

    column-wise    rows of weight, lora_B, magnitude and bias are split (N): every rank has its own output features, and
                   everything but the gradients of x and lora_A is local
    row-wise       columns of weight and lora_A are split (K), and x with them: the output and the squares of the norm
                   are sums over the ranks

The two alternate, as ColwiseParallel and RowwiseParallel do: the column-wise layer's output is the row-wise layer's
input. Gradients are those of one loss that every rank computes from the same output. A tensor that every rank holds
whole gets its whole gradient, the same on every rank.

`shard_dora_linear` does it to a DoraLinear, `DoraColwise` and `DoraRowwise` in a plan of parallelize_module.
`from dora_kernels import parallel` imports it.
"""

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from dora_kernels import reuse
from dora_kernels.functional.arguments import check_choice, check_type, described
from dora_kernels.functional.derivatives import is_batched
from dora_kernels.functional.linear import check_dtypes, dora_linear_core
from dora_kernels.functional.validate import check_adapter, check_call, check_norm_grad
from dora_kernels.functional.weight import weight_norm
from dora_kernels.modules import DoraLinear
from dora_kernels.quant import Weight
from dora_kernels.reference import over_norm
from dora_kernels.types import DoraWeight, Given


def columnwise_dora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    group: ProcessGroup | None = None,
    *,
    x_dropped: Tensor | None = None,
    norm_grad: bool = False,
) -> Tensor:
    """This rank's output features of `dora_linear`.

    Shapes: x, x_dropped (..., K) and lora_A (R, K), the same on every rank; of this rank's n rows weight (n, K),
    lora_B (n, R), magnitude (n,), bias (n,) -> (..., n). The gradients of x, x_dropped and lora_A are summed over group
    (None: all ranks), so every rank must run the backward pass. Raises ValueError as dora_linear.
    """
    function = "columnwise_dora_linear"
    _check(function, x, DoraWeight(weight, lora_A, lora_B, magnitude, scaling), bias, x_dropped, group=group)
    check_norm_grad(function, norm_grad, None)
    x, lora_A = _sum_gradient(x, group), _sum_gradient(lora_A, group)
    x_dropped = None if x_dropped is None else _sum_gradient(x_dropped, group)
    layer = DoraWeight(weight, lora_A, lora_B, magnitude, scaling)
    return dora_linear_core(x, layer, bias, x_dropped=x_dropped, norm_grad=norm_grad, function=function)[0]


def rowwise_dora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    group: ProcessGroup | None = None,
    *,
    x_dropped: Tensor | None = None,
    norm: Tensor | None = None,
    norm_grad: bool = False,
) -> Tensor:
    """`dora_linear` of the whole x and weight, the same on every rank; each rank has k of the K features.

        y = sum over ranks of gain * (x weight^T + scaling * (x lora_A^T) lora_B^T) + bias

    Shapes: x, x_dropped (..., k), weight (N, k), lora_A (R, k) of this rank; lora_B (N, R), magnitude (N,), bias (N,)
    the same on every rank -> (..., N). norm (N,), of `rowwise_norm`, is a constant; None computes it. Each rank scales
    its part by the whole row's gain, so the forward pass has two sums over group (None: all ranks): that of the norm,
    and that of y in y's dtype. The backward pass sums the gradients of lora_B and magnitude.

    Raises ValueError as dora_linear, and before anything is sent.
    """
    function = "rowwise_dora_linear"
    _check(function, x, DoraWeight(weight, lora_A, lora_B, magnitude, scaling), bias, x_dropped, norm, group)
    check_norm_grad(function, norm_grad, norm)
    lora_B = _sum_gradient(lora_B, group)
    if norm is None:
        norm = _sum_squares(weight_norm(weight, lora_A, lora_B, scaling, norm_grad=norm_grad), group)
    if norm_grad:  # the gain carries the norm's gradient, over a norm of 1
        magnitude = over_norm(magnitude, norm)
        norm = torch.ones_like(norm)
    layer = DoraWeight(weight, lora_A, lora_B, _sum_gradient(magnitude, group), scaling)
    y = _sum(dora_linear_core(x, layer, x_dropped=x_dropped, given=Given(norm), function=function)[0], group)
    return y if bias is None else y + bias.to(y.dtype)


def rowwise_norm(
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    group: ProcessGroup | None = None,
    *,
    norm_grad: bool = False,
) -> Tensor:
    """norm (N,) of a weight whose columns are split: `weight_norm` of the whole, the same on every rank.

    Shapes: weight (N, k) and lora_A (R, k) of this rank, lora_B (N, R) the same on every rank. norm_grad: True gives
    lora_A and lora_B their gradient, lora_B's summed over group. Raises ValueError as weight_norm.
    """
    check_adapter("rowwise_norm", weight, lora_A, lora_B, scaling)
    check_norm_grad("rowwise_norm", norm_grad, None)
    _check_group("rowwise_norm", group)
    lora_B = _sum_gradient(lora_B, group)
    return _sum_squares(weight_norm(weight, lora_A, lora_B, scaling, norm_grad=norm_grad), group)


def _check(
    function: str,
    x: Tensor,
    layer: DoraWeight,
    bias: Tensor | None,
    x_dropped: Tensor | None,
    norm: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> None:
    """dora_linear's checks, before a rank waits for the others."""
    _check_group(function, group)
    check_adapter(function, layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
    check_call(function, x, layer.weight, layer.magnitude, bias, x_dropped, norm)
    check_dtypes(function, x, layer.weight)


def _check_group(function: str, group: ProcessGroup | None) -> None:
    """Raise ValueError unless `group` is a ProcessGroup or None."""
    if group is not None:
        check_type(function, "group", group, ProcessGroup, "a ProcessGroup, or None for all ranks")


def _sum_squares(norm: Tensor, group: ProcessGroup | None) -> Tensor:
    """The norm (N,) of whole rows, from each rank's norm (N,) of its columns; squared in float64: no overflow."""
    squares = _sum(norm.double().square(), group)
    zero = squares == 0
    return torch.where(zero, 0, torch.where(zero, 1, squares).sqrt()).to(norm.dtype)


def _sum(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over group, the same on every rank; its gradient is every rank's own."""
    return _Sum.apply(tensor, group)


def _sum_gradient(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """`tensor`, which every rank has; its gradient is the sum over group."""
    return _SumGradient.apply(tensor, group) if torch.is_grad_enabled() and tensor.requires_grad else tensor


def _summed(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(tensor, group=group)
    return tensor


class _Sum(torch.autograd.Function):
    """torch's own differentiable all_reduce sums the gradient too: it is for a loss of each rank's own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _summed(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        _check_one(gradient)
        return _sum_gradient(gradient, ctx.group), None


class _SumGradient(torch.autograd.Function):
    """The adjoint of _Sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        _check_one(gradient)
        return _sum(gradient, ctx.group), None


def _check_one(gradient: Tensor) -> None:
    """Raise NotImplementedError where `gradient` is a batch of them: no collective takes one."""
    if not torch.compiler.is_compiling() and is_batched(gradient):
        raise NotImplementedError(
            "dora_kernels.parallel: the backward pass has a batch of gradients (is_grads_batched=True, "
            "functional.jacobian(vectorize=True), torch.func.vmap); expected one at a time where a layer is split"
        )


class _Local(torch.autograd.Function):
    """The local part of a DTensor. DTensor.to_local's own backward pass ends the graph of a gradient in torch 2.11."""

    @staticmethod
    def forward(ctx: Any, whole: DTensor) -> Tensor:
        ctx.settings = whole.device_mesh, whole.placements, whole.shape, whole.stride()
        local = whole.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> DTensor:
        return _Whole.apply(gradient, *ctx.settings)


class _Whole(torch.autograd.Function):
    """The adjoint of _Local."""

    @staticmethod
    def forward(
        ctx: Any,
        local: Tensor,
        mesh: DeviceMesh,
        placements: tuple[Placement, ...],
        shape: torch.Size,
        stride: tuple[int, ...],
    ) -> DTensor:
        ctx.placements = placements
        return DTensor.from_local(local, mesh, placements, shape=shape, stride=stride)

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> tuple[Tensor | None, ...]:
        return _Local.apply(gradient.redistribute(placements=ctx.placements)), None, None, None, None


class ParallelDoraLinear(DoraLinear):
    """A DoraLinear split over a mesh by `shard_dora_linear`; never constructed.

    The parameters are DTensors under DoraLinear's names, so that torch.distributed.checkpoint saves and loads them and
    clip_grad_norm_ and optimizers see the whole. x and y are plain tensors: column-wise x (..., K) -> (..., n),
    row-wise x (..., k) -> (..., N). in_features and out_features are the whole layer's.

    Every call computes the norm, in eval mode too: a write to a DTensor leaves no trace in its local part (reuse/).

    With dropout, a row-wise layer must draw another mask on every rank, a column-wise one the same: torch's generator
    has to be seeded so, as for ColwiseParallel and RowwiseParallel.
    """

    def forward(self, x: Tensor) -> Tensor:
        """y, by `columnwise_dora_linear` or `rowwise_dora_linear`."""
        group = self._mesh.get_group()
        x_dropped = F.dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        whole = (self.weight, self.lora_A.weight, self.lora_B.weight, self.lora_magnitude_vector, self.bias)
        weight, lora_A, lora_B, magnitude, bias = (_Local.apply(p) if isinstance(p, DTensor) else p for p in whole)
        arguments = (x, weight, lora_A, lora_B, magnitude, self.scaling, bias, group)
        linear = columnwise_dora_linear if self._split == "column" else rowwise_dora_linear
        return linear(*arguments, x_dropped=x_dropped)

    def reset_adapter(self) -> None:
        """Raises ValueError: a split layer cannot."""
        self._refuse("reset_adapter")

    def merge(self, safe_merge: bool = False) -> None:
        """Raises ValueError: a split layer cannot."""
        self._refuse("merge")

    def unmerge(self) -> None:
        """Raises ValueError: a split layer cannot."""
        self._refuse("unmerge")

    def norm_and_gain(self) -> tuple[Tensor, Tensor]:
        """Raises ValueError: a split layer cannot."""
        self._refuse("norm_and_gain")

    def merged_weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Raises ValueError: a split layer cannot."""
        self._refuse("merged_weight_and_bias")

    def _refuse(self, function: str) -> NoReturn:
        raise ValueError(f"DoraLinear.{function}: the layer is split {self._split}-wise; expected a whole one")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, split={self._split!r} over {self._mesh.size()}"


PLACEMENTS = {
    "column": {"weight": Shard(0), "bias": Shard(0), "A": Replicate(), "B": Shard(0), "magnitude": Shard(0)},
    "row": {"weight": Shard(1), "bias": Replicate(), "A": Shard(1), "B": Replicate(), "magnitude": Replicate()},
}
"""The placement of each tensor of a layer; sizes that the mesh does not divide are split as torch.chunk does."""


def shard_dora_linear(layer: DoraLinear, mesh: DeviceMesh, split: str) -> DoraLinear:
    """Split `layer` over a mesh of one dimension, "column"-wise or "row"-wise, in place; returns it.

    The values are those of the mesh's first rank. Raises ValueError unless layer is a DoraLinear over a dense weight,
    with dropout_on="adapter", not merged, not split yet, and with at least a row or column for each rank; nothing is
    changed then.
    """
    if type(layer) is not DoraLinear:
        raise ValueError(f"shard_dora_linear: layer is {described(layer)}; expected a DoraLinear")
    check_choice("shard_dora_linear", "split", split, tuple(PLACEMENTS))
    check_type("shard_dora_linear", "mesh", mesh, DeviceMesh, "a DeviceMesh")
    if mesh.ndim != 1:
        raise ValueError(
            f"shard_dora_linear: mesh has {mesh.ndim} dimensions; expected 1: take one of them by its name"
        )
    if layer.base_layer is not None or layer.merged:
        found = "is merged" if layer.merged else f"is over a {type(layer.base_layer).__name__}"
        raise ValueError(f"shard_dora_linear: layer {found}; expected a dense weight, not merged")
    if layer.dropout_on != "adapter":
        raise ValueError(f"shard_dora_linear: dropout_on is {layer.dropout_on!r}; expected 'adapter'")
    size = layer.out_features if split == "column" else layer.in_features
    if size < mesh.size():
        features = "out_features" if split == "column" else "in_features"
        raise ValueError(f"shard_dora_linear: {features} is {size}; expected at least {mesh.size()}, one for each rank")

    placements = PLACEMENTS[split]
    owners = {
        "weight": (layer, "weight"),
        "bias": (layer, "bias"),
        "A": (layer.lora_A, "weight"),
        "B": (layer.lora_B, "weight"),
        "magnitude": (layer, "lora_magnitude_vector"),
    }
    for part, (owner, name) in owners.items():
        parameter = getattr(owner, name)
        if parameter is not None:
            shards = distribute_tensor(parameter.detach(), mesh, [placements[part]])
            setattr(owner, name, nn.Parameter(shards, requires_grad=parameter.requires_grad))
    reuse.forget(layer)
    layer.__class__ = ParallelDoraLinear
    layer._mesh, layer._split = mesh, split
    return layer


class _DoraParallel(ParallelStyle):
    """`shard_dora_linear` for a plan of torch.distributed.tensor.parallel.parallelize_module."""

    split = ""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return shard_dora_linear(module, device_mesh, self.split)


class DoraColwise(_DoraParallel):
    """A DoraLinear column-wise: x whole on every rank, y this rank's features."""

    split = "column"


class DoraRowwise(_DoraParallel):
    """A DoraLinear row-wise: x this rank's features, y whole on every rank."""

    split = "row"
