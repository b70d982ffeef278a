"""What a checkpoint recomputes takes the norm of its own forward pass, whatever other calls have left since.

The weights are swapped through .data, which moves no version: an average of the weights, SPSA, a mean teacher.
"""

import contextlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dora_kernels import options
from dora_kernels.reuse import store
from tests.support.problem import DEVICE, definition

pytest.importorskip("peft")

from tests.support.layer_kinds import ENABLED  # noqa: E402

REENTRANT = pytest.mark.parametrize("use_reentrant", (False, True))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@contextlib.contextmanager
def other_weights(model, factor=3.0):
    """Other numbers in all that is trained; the old ones, to the bit, afterwards."""
    old = [p.detach().clone() for p in trained(model)]
    for p in trained(model):
        p.data.mul_(factor)
    yield
    for p, values in zip(trained(model), old, strict=True):
        p.data.copy_(values)


def checkpointed(model, x, use_reentrant):
    """Also where x is of tokens: a reentrant region needs an input that requires a gradient."""
    anchor = torch.ones((), device=DEVICE, requires_grad=True)
    return checkpoint(lambda x, anchor: model(x) * anchor, x, anchor, use_reentrant=use_reentrant)


def without_gradients(model, x, use_reentrant):
    with torch.no_grad():
        model(x)


def with_gradients(model, x, use_reentrant):
    return model(x)


def once_more(model, x, use_reentrant):
    return checkpointed(model, x, use_reentrant)


def once_more_and_back(model, x, use_reentrant):
    gradients(model, checkpointed(model, x, use_reentrant))


def twice_more(model, x, use_reentrant):
    """The second with weights of its own."""
    first = checkpointed(model, x, use_reentrant)
    with other_weights(model, 0.5):
        return first, checkpointed(model, x, use_reentrant)


# of every kind of layer, the first two
BETWEEN = (without_gradients, twice_more, with_gradients, once_more, once_more_and_back)


def gradients(model, y):
    for p in trained(model):
        p.grad = None
    y.float().square().sum().backward()
    return [p.grad for p in trained(model)]


def check(model, x, use_reentrant, between):
    expected = gradients(model, checkpointed(model, x, use_reentrant))
    y = checkpointed(model, x, use_reentrant)
    with other_weights(model):
        graph = between(model, x, use_reentrant)  # and it lives on
    torch.testing.assert_close(gradients(model, y), expected, rtol=0, atol=0)
    del graph


@pytest.mark.parametrize("kind", ENABLED)
def test_a_call_with_other_weights_between_a_forward_pass_and_its_backward_pass(kind):
    model, x = ENABLED[kind]()
    model.train()
    with options(backend="reference"):
        for use_reentrant in (False, True):
            for between in BETWEEN[: 5 if kind == "DoraLinear" else 2]:
                check(model, x, use_reentrant, between)


def layer_and_input():
    layer, x = ENABLED["DoraLinear"]()
    return layer.train().double(), x.double()


def leave_without_gradients(layer, x):
    """What a reentrant region does, too."""
    with torch.no_grad():
        return layer(x)


def leave_under_hooks(layer, x):
    """What a region without reentrance does, too."""
    with torch.autograd.graph.save_on_cpu():
        return layer(x)


def leave_in_a_region(layer, x):
    return checkpoint(layer, x.requires_grad_(), use_reentrant=False)


def leave_in_a_reentrant_region(layer, x):
    return checkpoint(layer, x.requires_grad_(), use_reentrant=True)


LEAVE = (leave_without_gradients, leave_under_hooks, leave_in_a_region, leave_in_a_reentrant_region)


@pytest.mark.parametrize("at", ("another tensor", "y", "the node of y, before", "the node of y, after"))
@pytest.mark.parametrize("leave", LEAVE)
def test_a_call_in_a_hook_runs_nothing_again(leave, at):
    (layer, x), seen = layer_and_input(), []
    y = leave(layer, x)

    def hook(*_):
        layer.lora_A.weight.data.mul_(3)
        with torch.enable_grad():
            seen.append((layer(x), definition(layer, x)))

    z = torch.ones((), requires_grad=True, dtype=x.dtype, device=DEVICE) * 2
    if at == "another tensor" or not y.requires_grad:
        z.register_hook(hook)
    elif at == "y":
        y.register_hook(hook)
    else:
        (y.grad_fn.register_prehook if at.endswith("before") else y.grad_fn.register_hook)(hook)
    (y.sum() * z if at != "another tensor" else z).backward()
    torch.testing.assert_close(*seen[0])


@REENTRANT
def test_a_layer_that_its_region_calls_twice_takes_no_norm_of_the_other_call(use_reentrant):
    """A student and a teacher that learns, too; the region swaps the weights, so its recomputation does."""
    layer, x = layer_and_input()

    def both(call):
        first = call(x)
        with other_weights(layer):
            return first - call(2 * x)

    def step(call):
        anchor = torch.ones((), dtype=x.dtype, device=DEVICE, requires_grad=True)
        return gradients(layer, checkpoint(lambda one: both(call) * one, anchor, use_reentrant=use_reentrant))

    torch.testing.assert_close(step(layer), step(lambda x: definition(layer, x)))


@REENTRANT
def test_a_region_inside_a_region(use_reentrant):
    layer, x = layer_and_input()

    def inner(x):
        return checkpointed(layer, x, use_reentrant).tanh()

    expected = gradients(layer, layer(x).tanh())
    y = checkpointed(inner, x, use_reentrant)
    with other_weights(layer):
        leave_without_gradients(layer, x)
        once_more(layer, x, use_reentrant)
    torch.testing.assert_close(gradients(layer, y), expected)


def test_what_no_region_runs_leaves_nothing():
    layer, x = layer_and_input()
    for leave in LEAVE:
        y = leave(layer, x)
        assert (layer in store.last_calls) == (leave in LEAVE[2:]), leave
        del y
        store.forget(layer)
