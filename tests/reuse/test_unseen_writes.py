"""Whatever way a tensor is written to, the next call is right: nothing is kept from call to call without a promise."""

import copy

import pytest
import torch
from torch import nn

import dora_kernels
from dora_kernels import options
from tests.support.problem import DEVICE

pytest.importorskip("peft")

from tests.support.layer_kinds import ENABLED, batch, seeded  # noqa: E402
from tests.support.peft_problem import build, enabled  # noqa: E402


def alias_of_numpy(tensor):
    tensor.detach().numpy()[...] *= 1.5


def swap_in(tensor):
    """As an average of the weights is, and the weights out."""
    tensor.data = tensor.data * 1.5


def fused_step(tensor):
    """The kernel of a fused optimizer, which moves no version, without its Optimizer."""
    state = [torch.zeros_like(tensor) for _ in range(2)]
    torch._fused_adamw_(
        [tensor.detach()], [torch.ones_like(tensor)], *([each] for each in state), [], [torch.ones((), device=DEVICE)],
        lr=0.5, beta1=0.9, beta2=0.99, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip


WRITES = {
    "data.mul_": lambda tensor: tensor.data.mul_(1.5),
    "data.copy_": lambda tensor: tensor.data.copy_(1.5 * tensor),
    "detach().add_": lambda tensor: tensor.detach().add_(0.3),
    "an index of .data": lambda tensor: tensor.data.view(-1).__setitem__(slice(0, None, 2), 0.4),
    "numpy": alias_of_numpy,
    "dlpack": lambda tensor: torch.from_dlpack(tensor.detach()).mul_(1.5),
    "the storage": lambda tensor: tensor.untyped_storage().copy_((1.5 * tensor.detach()).untyped_storage()),
    "a swap": swap_in,
    "a fused step": fused_step,
}


def stored(model):
    """What a layer computes from: its parameters and, of a quantized weight, the scales."""
    tensors = [p for p in model.parameters() if p.is_floating_point() and type(p) is nn.Parameter]
    for module in model.modules():
        weight = getattr(module, "weight", None)
        scales = []
        if isinstance(getattr(module, "meta", None), dict):
            scales.append(module.meta["scale"])  # HQQ's
        elif hasattr(weight, "quant_state"):
            scales.append(weight.quant_state.offset)  # NF4's: the scales themselves are packed
        elif hasattr(weight, "SCB"):
            scales.append(weight.SCB)  # int8's
        tensors += [scale for scale in scales if not scale.is_inference()]
    return tensors


# the interpreter takes a second for a quantized layer's call: what is kept does not depend on who computed it
SETTINGS = {
    "eval": (False, "reference", WRITES),
    "train": (True, "reference", ("data.copy_", "a fused step")),
    "eval, triton": (False, "triton", ("data.mul_",)),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ENABLED)
def test_the_next_call_is_that_of_a_layer_that_kept_nothing(kind, setting):
    """A copy of a layer has nothing that was kept. Every write to all of its tensors."""
    training, backend, names = SETTINGS[setting]
    model, x = ENABLED[kind]()
    model.train(training)
    with options(backend=backend):
        before = seeded(model, x)
        for name in names:
            if name == "numpy" and DEVICE != "cpu":
                continue
            for tensor in stored(model):
                WRITES[name](tensor)
            after, fresh = seeded(model, x), seeded(copy.deepcopy(model), x)
            torch.testing.assert_close(after, fresh, rtol=1e-5, atol=1e-5, msg=name)
            assert not torch.allclose(after, before, rtol=1e-2), f"{name} changed nothing: nothing was tested"
            before = after


@pytest.mark.parametrize("kind", ENABLED)
def test_one_tensor_at_a_time(kind):
    model, x = ENABLED[kind]()
    model.eval()
    seeded(model, x)
    for tensor in stored(model):
        tensor.data.mul_(1.5)
        torch.testing.assert_close(seeded(model, x), seeded(copy.deepcopy(model), x), rtol=1e-5, atol=1e-5)


def test_a_zeroth_order_step_and_its_way_back():
    """As evolution strategies and MeZO perturb: out, over, and back through .data; stock is the measure."""
    stock = build().eval()
    ours, x = enabled(stock), batch()
    start = seeded(stock, x)
    for scale in (0.1, -0.2, 0.1):
        for model in (stock, ours):
            generator = torch.Generator().manual_seed(7)
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(DEVICE), alpha=scale)
        torch.testing.assert_close(seeded(ours, x), seeded(stock, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seeded(ours, x), start, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ENABLED)
def test_the_promise_is_what_keeps(kind):
    """Inside the scope such a write is not seen, for every kind of layer, and invalidate() ends the reuse after one."""
    model, x = ENABLED[kind]()
    model.eval()
    with dora_kernels.frozen_adapters(model):
        seeded(model, x)
        for tensor in stored(model):
            if tensor.dim() > 1:
                tensor.data.mul_(1.5)
        stale, fresh = seeded(model, x), seeded(copy.deepcopy(model), x)
        assert not torch.allclose(stale, fresh, rtol=1e-3)
        dora_kernels.invalidate(model)
        torch.testing.assert_close(seeded(model, x), fresh, rtol=1e-5, atol=1e-5)
