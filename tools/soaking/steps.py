"""Operations that compute: training, inference, calls that break off, and calls of single layers."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import dora_kernels
from soaking.changes import is_enabled, operation, without_dropout, write_to
from soaking.models import WIDTH, inputs, normal, of_adapter
from soaking.twins import Records, Twin


class Planted(Exception):
    """Raised by hooks in the middle of a call."""


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.2, momentum=0.9, foreach=False),
    "SGD foreach": lambda parameters: torch.optim.SGD(parameters, lr=0.2, foreach=True),
    "SGD fused": lambda parameters: torch.optim.SGD(parameters, lr=0.2, fused=True),
    # eps: a smaller one makes a step of the sign of a gradient that is all rounding
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.03, eps=0.03, foreach=False),
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.03, eps=0.03, foreach=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.03, eps=0.03, fused=True),
}


def trained(twin: Twin) -> list[nn.Parameter]:
    return [parameter for parameter in twin.model.parameters() if parameter.requires_grad]


def can_train(twin: Twin) -> bool:
    """True where a loss has a gradient: some adapter is active, on, and trained."""
    if twin.merged:
        return False
    active = {id(p) for name in twin.active for _, p in of_adapter(twin.model, name)}
    return any(id(parameter) in active for parameter in trained(twin))


def call(twin: Twin, seed: int, autocast: torch.dtype | None = None) -> Tensor:
    """y of new inputs, in float32 at least."""
    ids, image = inputs(seed, torch.float64)
    if autocast is not None:
        twin.dtypes.append(autocast)
    on = autocast is not None and not twin.exact
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=on):
        y = twin.model(ids, image.to(twin.input_dtype(twin.dtype)))
    return y if y.dtype == torch.float64 else y.float()


def loss_of(y: Tensor, seed: int) -> Tensor:
    return (y - normal(y.shape, seed + 1, y.dtype)).square().mean()


@contextlib.contextmanager
def frozen(twin: Twin, way: str) -> Iterator[None]:
    """frozen_adapters around a part of an operation: way is "no", "scope" or "keep merged"."""
    if way == "no" or not twin.ours or not is_enabled(twin):
        yield
        return
    with dora_kernels.frozen_adapters(twin.model, keep_merged=way == "keep merged"):
        yield


def probe(twin: Twin, draw: random.Random) -> None:
    """Output, and gradients of the image and of all that is trained; done after every operation. Changes nothing."""
    ids, image = inputs(draw.randrange(2**31), twin.dtype)
    image.requires_grad_()
    y = twin.model(ids, image)
    dy = normal(y.shape, draw.randrange(2**31), torch.float64).to(y.dtype)
    wanted = {"image": image} | {name: p for name, p in twin.model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True, retain_graph=True)
    twin.records = {"y": y.detach()} | {f"d{name}": one for name, one in zip(wanted, gradients, strict=True)}
    twin.held = [y, image]


@operation(can_train, weight=4)
def train(twin: Twin, draw: random.Random) -> None:
    """Steps of an optimizer, each over one or several micro-batches."""
    optimizer = OPTIMIZERS[draw.choice(list(OPTIMIZERS))](trained(twin))
    steps, batches = draw.randint(1, 3), draw.choice([1, 1, 2, 3])
    around_step, around_all = draw.choice(["no", "scope", "keep merged"]), draw.choice(["no", "no", "scope"])
    autocast = draw.choice([None, None, None, torch.bfloat16])
    checkpointing = draw.choice([None, None, False, True])
    if autocast is not None or twin.half:
        steps = 1  # of three steps that go astray the last has no digit right, stock's neither
    # a mask is drawn anew when torch.utils.checkpoint runs a block again under shared_dropout
    net = twin.net
    net.checkpointing = checkpointing if without_dropout(twin) else None
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, net, "checkpointing", None)  # also where a reentrant one has left the loss no gradient
        stack.enter_context(frozen(twin, around_all))
        for step in range(steps):
            with frozen(twin, around_step):
                for batch in range(batches):
                    seed = draw.randrange(2**31)
                    loss = loss_of(call(twin, seed, autocast), seed) / batches
                    twin.records[f"loss {step}.{batch}"] = loss.detach()
                    loss.backward()
            for i, parameter in enumerate(trained(twin)):
                gradient = parameter.grad
                twin.records[f"gradient {step}.{i}"] = None if gradient is None else gradient.clone()
            # at full length SGD goes astray in a walk: a softmax at its end has gradients that are rounding alone
            torch.nn.utils.clip_grad_norm_(trained(twin), 1.0)
            optimizer.step()
            if step < steps - 1 or draw.random() < 0.7:
                optimizer.zero_grad()


@operation()
def infer(twin: Twin, draw: random.Random) -> None:
    grad = draw.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])
    autocast, training = draw.choice([None, None, torch.bfloat16]), draw.random() < 0.3
    was = {name: module.training for name, module in twin.model.named_modules()}
    twin.model.train(training)
    with grad(), frozen(twin, draw.choice(["no", "scope"])):
        for i in range(2):
            twin.records[f"y{i}"] = call(twin, draw.randrange(2**31), autocast).detach().clone()
    for name, module in twin.model.named_modules():
        module.training = was[name]


@operation()
def with_adapters_off(twin: Twin, draw: random.Random) -> None:
    seed = draw.randrange(2**31)
    with frozen(twin, draw.choice(["no", "scope"])):
        with twin.model.disable_adapter():
            twin.records["off"] = call(twin, seed).detach()
        twin.records["on"] = call(twin, seed).detach()


@operation()
def interrupted(twin: Twin, draw: random.Random) -> None:
    """A call, or a backward pass, that a hook breaks off; then one that ends."""
    layer, where = draw.choice(twin.layers()), draw.choice(["before", "after", "backward"])
    seed, way = draw.randrange(2**31), draw.choice(["no", "scope", "keep merged"])

    def raising(*_: object) -> None:
        raise Planted

    def raising_in_backward(module: nn.Module, x: object, y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(raising)

    if where == "before":
        handle = layer.register_forward_pre_hook(raising)
    elif where == "after":
        handle = layer.register_forward_hook(raising)
    else:
        handle = layer.register_forward_hook(raising_in_backward)
    with frozen(twin, way):
        try:
            y = call(twin, seed)
            if y.requires_grad:
                y.sum().backward()
            ended = True
        except Planted:
            ended = False
        handle.remove()
        twin.records["ended"] = torch.tensor(float(ended))
        for parameter in twin.model.parameters():
            parameter.grad = None
        twin.records["y"] = call(twin, seed).detach()


@operation()
def threads(twin: Twin, draw: random.Random) -> None:
    """Two threads in eval mode at once, with two batches."""
    seeds, was = [draw.randrange(2**31) for _ in range(2)], {m: m.training for m in twin.model.modules()}
    twin.model.eval()
    found: Records = {}
    errors: list[Exception] = []

    def work(i: int) -> None:
        try:
            with torch.no_grad(), twin.backend():
                for j in range(2):
                    found[f"y{i}.{j}"] = call(twin, seeds[i])
        except Exception as error:
            errors.append(error)

    with frozen(twin, draw.choice(["no", "scope"])):
        workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for worker in workers:
            worker.start() if twin.ours else worker.run()
        for worker in workers if twin.ours else ():
            worker.join()
    for module, training in was.items():
        module.training = training
    if errors:
        raise errors[0]
    twin.records = dict(sorted(found.items()))


@operation(lambda twin: can_train(twin) and without_dropout(twin), weight=2)
def one_by_one(twin: Twin, draw: random.Random) -> None:
    """q, k and v called with one x, with something between them."""
    block = draw.choice(list(twin.net.blocks))
    members = draw.sample(["q_proj", "k_proj", "v_proj"], 3)
    seed, between = draw.randrange(2**31), draw.choice(["nothing", "write", "step", "backward", "eval"])
    x = normal((2, 3, WIDTH), seed, torch.float64).to(twin.input_dtype(twin.dtype)).requires_grad_()
    write_seed, step = draw.randrange(2**31), draw.choice(["SGD fused", "AdamW fused", "SGD"])
    outputs = []
    with frozen(twin, draw.choice(["no", "scope", "keep merged"])):
        for i, name in enumerate(members):
            y = getattr(block, name)(x)
            outputs.append(y)
            twin.records[name] = y.detach().clone()
            if i == 0 and between == "write":
                found = [(path, p) for path, p in of_adapter(twin.model) if members[1] in path]
                write_to(twin, found, random.Random(write_seed))
            elif i == 0 and between == "step":
                parameters = [p for path, p in of_adapter(twin.model) if members[1] in path and p.requires_grad]
                for j, parameter in enumerate(parameters):
                    parameter.grad = normal(parameter.shape, write_seed + j, parameter.dtype)
                if parameters:
                    OPTIMIZERS[step](parameters).step()
            elif i == 0 and between == "backward" and y.requires_grad:
                y.sum().backward(retain_graph=True)
            elif i == 0 and between == "eval":
                block.eval()
        rest = outputs[1:] if between != "nothing" else outputs
        total = sum(y.double().square().sum() for y in rest)
        if total.requires_grad:
            total.backward()
    twin.records["dx"] = x.grad
    twin.held = outputs
