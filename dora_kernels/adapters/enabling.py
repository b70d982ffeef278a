"""enable(model) and disable(model)."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from dora_kernels.adapters import parents, training
from dora_kernels.adapters.libraries import dora_layers, libraries
from dora_kernels.adapters.report import LayerReport, ModelReport
from dora_kernels.adapters.taking import give_back, take_over
from dora_kernels.functional.arguments import DROPOUTS, check_choice, check_flag, check_model
from dora_kernels.reuse import sharing


def enable(model: nn.Module, *, dropout: str | None = None, fuse_shared_inputs: bool = False) -> ModelReport:
    """Compute the DoRA layers of `model` with dora_kernels, in place, and report every DoRA layer found.

    dropout: selects where dropout is applied in training, with d = dropout(x), as DoraLinear's dropout_on does:
        "adapter"   where the layer's library applies it. For PEFT that is all that the adapter adds:
                    x W^T + (gain - 1) * d W^T + gain * scaling * (d A^T) B^T + bias, two products with the base weight
        "lora"      the low-rank product alone, and there is one product with the base weight:
                    gain * (x W^T + scaling * (d A^T) B^T) + bias
        None        as before for a layer that is enabled already, "adapter" for any other
    Over the masks both have the output of eval mode as their mean; the first varies more, by (gain - 1) * d W^T.
    A library with a third kind of dropout (of rows of B A, say) keeps it, and the report says so.

    fuse_shared_inputs: in training, layers that are called with the same x (q, k and v of an attention, gate and up of
    an MLP; PEFT's alone, known by their names) make x lora_A^T and dlora_A together (reuse/sharing.py).
    Calls with an active dropout, or with several active adapters, share nothing. Results are the same to rounding.

    Parameters, buffers and the state dict stay as they are; no class of the other library is patched. A layer
    that cannot be taken over is left alone and named in the report with the reason. Calling it again is
    harmless, and needed after add_adapter: a layer that becomes a DoRA layer later is not known now.

    Raises ValueError, and changes nothing, unless model is an nn.Module and dropout and fuse_shared_inputs are one of
    these; ImportError if the model's layers come from a library too old to be known (PEFT before 0.19).
    """
    check_model("enable", model)
    check_choice("enable", "dropout", dropout, (None, *DROPOUTS))
    check_flag("enable", "fuse_shared_inputs", fuse_shared_inputs)
    layers = []
    found = dora_layers(model)
    held = [(functions.held(layer) if hasattr(functions, "held") else layer, layer) for _, layer, _, functions in found]
    past = parents.remarks(model, held)
    for name, layer, library, functions in found:
        reader = past.get(layer)
        if reader is None or reader.is_called:
            cls, reason = functions.class_for(layer)
        else:
            cls, reason = None, ""
        if cls is None:
            give_back(layer)  # taken over before, perhaps, and changed since
        else:
            take_over(layer, cls, dropout)
            own = layer.own_dropout() if layer.dora_dropout == "lora" else None
            if own is not None:
                reason = "; ".join(filter(None, (reason, f"dropout stays the library's, of {own}")))
        sharing.leave(layer)
        reason = "; ".join(filter(None, (reason, None if reader is None else reader.text)))
        remarks = training.remarks(layer, functions.adapters(layer))
        layers.append(LayerReport(name, library, cls is not None, reason, remarks=remarks))
    shares_with = _share(model) if fuse_shared_inputs else {}
    return ModelReport(tuple(replace(report, shares_with=shares_with.get(report.name, ())) for report in layers))


def _share(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Make groups of the layers that are called with the same x; the names of each one's siblings by its name."""
    shares_with = {}
    for _, functions in libraries(model):
        for group in functions.groups(model) if hasattr(functions, "groups") else ():
            names, layers = zip(*group, strict=True)
            sharing.join(layers)
            shares_with |= {name: tuple(other for other in names if other != name) for name in names}
    return shares_with


def disable(model: nn.Module) -> ModelReport:
    """Undo enable(model): every layer is computed by its own library again, and the report says so.

    Other threads may be in forward passes: a call that has begun is computed by one of the two, correctly. Raises
    ValueError unless model is an nn.Module.
    """
    check_model("disable", model)
    for layer in model.modules():
        give_back(layer)
    layers = []
    for name, layer, library, functions in dora_layers(model):
        cls, reason = functions.class_for(layer)
        layers.append(LayerReport(name, library, False, reason if cls is None else "disable(model) was called"))
    return ModelReport(tuple(layers))
