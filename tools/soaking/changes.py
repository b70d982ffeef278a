"""Operations that change a model: its numbers, adapters, dtype, class. steps.py has those that compute."""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn

import dora_kernels
from dora_kernels.adapters.taking import TakenOver
from soaking.models import lora_config, new_numbers, of_adapter, randomise
from soaking.twins import Twin

Run = Callable[[Twin, random.Random], None]
DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Operation:
    """A kind of operation: it does to each twin what the same Random draws.

    Not done unless possible(twin). weight: how often it is drawn, to the others' 1.
    """

    name: str
    run: Run
    possible: Callable[[Twin], bool] = lambda twin: True
    weight: int = 1


OPERATIONS: dict[str, Operation] = {}


def operation(possible: Callable[[Twin], bool] = lambda twin: True, weight: int = 1) -> Callable[[Run], Run]:
    """Enter a function into OPERATIONS under its own name."""

    def enter(run: Run) -> Run:
        OPERATIONS[run.__name__] = Operation(run.__name__, run, possible, weight)
        return run

    return enter


def not_merged(twin: Twin) -> bool:
    """True if the base weights are the base's own."""
    return not twin.merged


def without_dropout(twin: Twin) -> bool:
    """True if no adapter has a dropout."""
    return all(isinstance(one, nn.Identity) for layer in twin.layers() for one in layer.lora_dropout.values())


def enable_again(twin: Twin, draw: random.Random) -> None:
    """enable(); dropout="lora" means what PEFT computes only where there is none."""
    dropout, fuse = draw.choice([None, "adapter", "lora"]), draw.random() < 0.5
    if twin.ours:
        plain = without_dropout(twin)
        dora_kernels.enable(twin.model, dropout=dropout if plain else "adapter", fuse_shared_inputs=fuse)


def is_enabled(twin: Twin) -> bool:
    """True if a layer is ours."""
    return any(isinstance(layer, TakenOver) for layer in twin.layers())


@operation()
def enable(twin: Twin, draw: random.Random) -> None:
    enable_again(twin, draw)


@operation()
def disable(twin: Twin, draw: random.Random) -> None:
    if twin.ours:
        dora_kernels.disable(twin.model)
    if draw.random() < 0.8:
        enable_again(twin, draw)


@operation(lambda twin: len(twin.scopes) < 3)
def open_scope(twin: Twin, draw: random.Random) -> None:
    keep_merged = draw.random() < 0.5
    if twin.ours and is_enabled(twin):
        twin.scopes.append(contextlib.ExitStack())
        twin.scopes[-1].enter_context(dora_kernels.frozen_adapters(twin.model, keep_merged=keep_merged))


@operation(lambda twin: bool(twin.scopes))
def close_scope(twin: Twin, draw: random.Random) -> None:
    which = draw.random()
    if twin.scopes:
        twin.scopes.pop(int(which * len(twin.scopes))).close()


@operation(lambda twin: len(twin.names) < 3)
def add(twin: Twin, draw: random.Random) -> None:
    name = next(name for name in ("a0", "a1", "a2") if name not in twin.names)
    dropout, use_dora = draw.choice([0.0, 0.0, 0.3]), draw.random() < 0.85
    config = lora_config(draw, twin.kind.others, dropout=dropout, use_dora=use_dora)
    twin.model.add_adapter(name, config, autocast_adapter_dtype=twin.kind.wide and not twin.exact)
    if twin.exact:
        twin.model.double()
    randomise(twin.model, name, draw.randrange(2**31))
    if draw.random() < 0.8 or dropout:
        enable_again(twin, draw)


@operation(lambda twin: not twin.merged and len(twin.names) > 1)
def delete(twin: Twin, draw: random.Random) -> None:
    twin.model.delete_adapter(draw.choice(twin.names))
    if twin.active:
        twin.model.active_adapter = twin.active[0]
    else:
        twin.model.set_adapter(draw.choice(twin.names))


@operation()
def activate(twin: Twin, draw: random.Random) -> None:
    twin.model.set_adapter(draw.choice(twin.names))


@operation(lambda twin: len(twin.names) > 1)
def activate_several(twin: Twin, draw: random.Random) -> None:
    twin.model.base_model.set_adapter(draw.sample(twin.names, draw.randint(2, len(twin.names))))
    twin.model.active_adapter = twin.active[0]  # the wrapper knows of one, which must be there


@operation(not_merged)
def write(twin: Twin, draw: random.Random) -> None:
    """New numbers for some parameters of an adapter, in one of the ways in which people write them."""
    found = of_adapter(twin.model, draw.choice(twin.names))
    found = found if draw.random() < 0.5 or not found else draw.sample(found, min(2, len(found)))
    write_to(twin, found, draw)


@operation(not_merged)
def write_base(twin: Twin, draw: random.Random) -> None:
    weights = [(path, p) for path, p in twin.model.named_parameters() if path.endswith("base_layer.weight")]
    write_to(twin, draw.sample(weights, min(2, len(weights))), draw)


def write_to(twin: Twin, parameters: list[tuple[str, nn.Parameter]], draw: random.Random) -> None:
    """Give the parameters `new_numbers`; after the ways that nobody can see, invalidate."""
    way, seed = draw.choice(["data", "alias", "numpy", "in place", "assigned", "replaced"]), draw.randrange(2**31)
    for i, (path, parameter) in enumerate(parameters):
        new = new_numbers(path, parameter, seed + i)
        if way == "data" or (way == "numpy" and parameter.dtype == torch.bfloat16):
            parameter.data.copy_(new)
        elif way == "alias":
            parameter.detach().copy_(new)
        elif way == "numpy":
            parameter.detach().numpy()[...] = new.numpy()
        elif way == "in place":
            with torch.no_grad():
                parameter.copy_(new)
        elif way == "assigned":
            parameter.data = new
        else:
            holder, _, name = path.rpartition(".")
            setattr(twin.model.get_submodule(holder), name, nn.Parameter(new, parameter.requires_grad))
    if twin.ours and way in ("data", "alias", "numpy", "assigned"):
        dora_kernels.invalidate(twin.model)


@operation(not_merged)
def freeze(twin: Twin, draw: random.Random) -> None:
    path = draw.choice([path for path, _ in of_adapter(twin.model)])
    twin.model.get_parameter(path).requires_grad_(draw.random() < 0.5)


@operation(not_merged)
def scale(twin: Twin, draw: random.Random) -> None:
    way, factor, all_layers = draw.choice(["scale", "unscale", "reset", "set"]), draw.choice([0.5, 1.5, 2.0]), 0.7
    layers, name = twin.layers(), draw.choice(twin.names)
    if way == "scale" and max((max(layer.scaling.values(), default=0) for layer in layers), default=0) > 4:
        way = "reset"  # or a walk that scales often has outputs of scaling alone
    for layer in layers if draw.random() < all_layers else [draw.choice(layers)]:
        if way == "scale":
            layer.scale_layer(factor)
        elif way == "set":
            layer.set_scale(name, factor)
        else:
            layer.unscale_layer(factor if way == "unscale" else None)


@operation()
def merge(twin: Twin, draw: random.Random) -> None:
    names = draw.choice([None, None, twin.names, [draw.choice(twin.names)]])
    twin.model.base_model.merge_adapter(adapter_names=names, safe_merge=draw.random() < 0.3)


@operation(lambda twin: twin.merged, weight=5)
def unmerge(twin: Twin, draw: random.Random) -> None:
    twin.model.base_model.unmerge_adapter()


@operation()
def mode(twin: Twin, draw: random.Random) -> None:
    module = twin.model if draw.random() < 0.8 else draw.choice(list(twin.model.modules()))
    module.train(draw.random() < 0.5)


@operation()
def cast(twin: Twin, draw: random.Random) -> None:
    """To one of five: four dtypes, or float32 adapters over half precision."""
    dtype, wide = draw.choice(DTYPES), not twin.kind.others and draw.random() < 0.3
    if not twin.exact:
        twin.model.to(dtype)
    if wide and dtype.itemsize == 2:
        for _, parameter in of_adapter(twin.model):
            parameter.data, parameter.grad = parameter.data.to(twin.input_dtype(torch.float32)), None


@operation()
def copies(twin: Twin, draw: random.Random) -> None:
    twin.model = copy.deepcopy(twin.model) if draw.random() < 0.5 else pickle.loads(pickle.dumps(twin.model))


@operation(not_merged)
def save_and_load(twin: Twin, draw: random.Random) -> None:
    names, active, wide = twin.names, twin.active, twin.kind.wide and not twin.exact
    with tempfile.TemporaryDirectory() as folder:
        twin.model.save_pretrained(folder, save_embedding_layers=False)
        base = copy.deepcopy(twin.model).unload()
        first, *others = names
        keywords = {"is_trainable": True, "autocast_adapter_dtype": wide}
        model = PeftModel.from_pretrained(base, f"{folder}/{first}", adapter_name=first, **keywords)
        for name in others:
            model.load_adapter(f"{folder}/{name}", name, **keywords)
    model.base_model.set_adapter(active)
    model.active_adapter = active[0]
    twin.model = model.double() if twin.exact else model
    enable_again(twin, draw)


@operation(not_merged)
def load_state_dict(twin: Twin, draw: random.Random) -> None:
    seed = draw.randrange(2**31)
    state = {
        name: new_numbers(name, value, seed + i) if "lora_" in name else value.clone()
        for i, (name, value) in enumerate(twin.model.state_dict().items())
    }
    twin.model.load_state_dict(state, assign=draw.random() < 0.5)


def finish(twin: Twin, draw: random.Random) -> None:
    """The end of a walk: merge_and_unload, or merge_model and unload where it leaves no layer and none was merged."""
    merge_model, training = draw.random() < 0.5, draw.random() < 0.5
    if merge_model and twin.ours and is_enabled(twin) and not twin.merged:
        merged = Twin(copy.deepcopy(twin.model), twin.kind)
        if not dora_kernels.serving.merge_model(merged.model) and not merged.layers():
            twin.model = merged.model.unload().train(training)
            return
    # what was unloaded has the mode of the base layers, and merge_model's layers that of those they replace
    twin.model = twin.model.merge_and_unload().train(training)
