"""check_layer: another library's DoRA layer, as that library computes it against the same layer after enable()."""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from dora_kernels import ops
from dora_kernels.adapters import disable, enable
from dora_kernels.functional.arguments import check_flag, check_model, check_seed, check_type
from dora_kernels.quant import is_quantized
from dora_kernels.testing.gradients import check_gradients, with_bias
from dora_kernels.testing.measure import compare
from dora_kernels.testing.report import Report, Row

TOKENS = 12
MARGIN = 3
"""The difference in size between an image and the kernel that moves over it."""


def dora_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, layer) for every DoRA layer in `model` that enable() would take over. The model stays as it is.

    Raises ValueError unless model is an nn.Module.
    """
    check_model("dora_layers", model)
    names = [layer.name for layer in enable(copy.deepcopy(model)).taken_over]
    return [(name, model.get_submodule(name)) for name in names]


def check_layer(layer: nn.Module, x: Tensor | None = None, *, randomise: bool = True, seed: int = 0) -> Report:
    """Compare a DoRA layer, as its own library computes it, with the same layer after enable().

    layer: any layer that enable() takes over, already enabled or not. It is copied and stays as it is.
    x: the input; by default random, in the dtype of the layer's weight: (2, 6, K) for a linear layer, two
        images for a convolution, 12 tokens for an embedding.
    randomise: give the copies a lora_B that is not zero and gains other than 1; a fresh adapter tests nothing.

    The library's layer gives the exact result in float64, and the measure in its own dtypes. As in check_gradients,
    output and gradients are compared, in train mode, with one dropout mask for all, and in eval mode. If the layer can
    merge, so are the merged output and the weight after unmerge. It fails if enable() leaves the layer alone, with the
    reason, and if every call still goes to the library.

    Raises ValueError unless layer is an nn.Module, x a tensor or None, randomise a bool and seed an int.
    """
    check_model("check_layer", layer, "layer")
    if x is not None:
        check_type("check_layer", "x", x, Tensor, "a torch.Tensor, or None")
    check_flag("check_layer", "randomise", randomise)
    seed = check_seed("check_layer", seed)
    model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    disable(model)
    stock = model["layer"]
    if randomise:
        _randomise(stock, seed)
    ours = nn.ModuleDict({"layer": copy.deepcopy(stock)})
    title = f"{type(stock).__module__.partition('.')[0]} {type(stock).__name__}"
    found = enable(ours).layers
    reasons = [entry.reason or "not a DoRA layer that enable() knows" for entry in found if not entry.taken_over]
    if not found or reasons:
        return Report(title, (Row("enable", "layer", False, "; ".join(reasons) or "no DoRA layer found"),))
    ours = ours["layer"]
    x = _random_x(stock, seed) if x is None else x
    rows = []
    for mode in ("train", "eval"):
        stock.train(mode == "train")
        ours.train(mode == "train")
        calls = ops.calls.total()
        report = check_gradients(ours, x, stock, finite_differences=False, seed=seed)
        rows += [replace(row, check=f"{mode}, {row.check}") for row in report.rows]
        if ops.calls.total() == calls:
            rows.append(Row(f"{mode}, by dora_kernels", "y", False, "every call went to the layer's own library"))
    if hasattr(ours, "merge") and hasattr(ours, "unmerge"):
        rows += _merge_round_trip(ours, stock, x)
    return Report(title, tuple(rows))


@torch.no_grad()
def _randomise(layer: nn.Module, seed: int) -> None:
    """Replace adapter tensors that are zero by random ones, and scale magnitudes by factors from 0.75 to 1.25."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        if not parameter.requires_grad or is_quantized(parameter):  # a base that nobody has frozen yet
            continue
        noise = torch.rand(parameter.shape, generator=generator).to(parameter)
        if any(word in name for word in ("magnitude", "dora_scale", "weight_m")):
            parameter.mul_(0.75 + 0.5 * noise)
        elif not parameter.any():
            parameter.copy_((noise - 0.5) * parameter.shape[-1] ** -0.5)


def _random_x(layer: nn.Module, seed: int) -> Tensor:
    # PEFT's layer has a base_layer, LyCORIS' a list of the one that it wraps, Megatron-Bridge's one to_wrap
    (base,) = getattr(layer, "org_module", [getattr(layer, "base_layer", getattr(layer, "to_wrap", layer))])
    weight = base.weight if hasattr(base, "weight") else base.weight_v  # in NVlabs' VL-T5 tree
    generator = torch.Generator().manual_seed(seed)
    if isinstance(base, nn.Embedding):
        return torch.randint(base.num_embeddings, (TOKENS,), generator=generator).to(weight.device)
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        extents = (dilation * (size - 1) + 1 for size, dilation in zip(base.kernel_size, base.dilation, strict=True))
        shape = (2, base.in_channels, *(extent + MARGIN for extent in extents))
    else:
        shape = (2, TOKENS // 2, layer.in_features if hasattr(layer, "in_features") else weight.shape[1])
    x = torch.randn(shape, generator=generator)
    return x.to(weight.device, weight.dtype if weight.is_floating_point() else None).requires_grad_()


@torch.no_grad()
def _merge_round_trip(ours: nn.Module, stock: nn.Module, x: Tensor) -> list[Row]:
    """Rows on the merged output, against the library's, and on the weight after unmerge, up to a rounding."""
    ours, stock = copy.deepcopy(ours), copy.deepcopy(stock)
    for module in (ours, stock):
        module.train(False)  # eval() of some libraries returns None
    exact = copy.deepcopy(stock).double()
    before = [parameter.clone() for parameter in stock.parameters()]
    exact_y = with_bias(exact(x.double() if x.is_floating_point() else x))
    against = _row_against("merge", ours, stock)
    if against is not None:
        return [against]
    rows = [_row("merge, accuracy", compare("y", *(with_bias(module(x)) for module in (ours, stock)), exact_y))]
    against = _row_against("unmerge", ours, stock)
    if against is not None:
        return [*rows, against]
    changes = zip(before, ours.parameters(), stock.parameters(), strict=True)
    for (name, _), (old, new, yardstick) in zip(ours.named_parameters(), changes, strict=True):
        if not torch.equal(old, yardstick):
            rows.append(_row("unmerge, accuracy", compare(name, new, yardstick, old.double())))
        elif not torch.equal(old, new):
            rows.append(Row("unmerge, accuracy", name, False, "changed by merge and unmerge"))
    return rows


def _row_against(method: str, ours: nn.Module, stock: nn.Module) -> Row | None:
    """Call merge or unmerge of both. A row if one raises, failed unless the library's own layer raises; else None."""
    raised = []
    for module in (stock, ours):
        try:
            getattr(module, method)()
        except Exception as error:  # whatever somebody's code may raise
            raised.append((module is stock, f"{type(error).__name__}: {error}"))
    if not raised:
        return None
    (by_stock, message), *_ = raised
    check = f"{method}, accuracy"
    return Row(check, "y", None if by_stock else False, f"{'the library' if by_stock else 'ours'} cannot: {message}")


def _row(check: str, comparison) -> Row:
    reason = "" if comparison.ok else f"rms error above {comparison.limit:.2e}"
    return Row(check, comparison.name, comparison.ok, reason, comparison)
