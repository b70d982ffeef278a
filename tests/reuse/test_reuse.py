"""norm and gain are used again where that is promised, and computed anew after every change that can be seen."""

import contextlib
import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import dora_kernels
from dora_kernels import DoraLinear, reuse
from dora_kernels.functional import linear
from tests.support.problem import DEVICE, definition


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = DoraLinear(24, 20, rank=4, alpha=6.0, device=DEVICE).eval()
    with torch.no_grad():
        layer.lora_B.weight.normal_()
    return layer


@pytest.fixture
def frozen(layer):
    """The layer inside frozen_adapters."""
    with dora_kernels.frozen_adapters(layer):
        yield layer


@pytest.mark.parametrize("training", (False, True))
def test_a_layer_alone_computes_the_norm_every_time(training, layer, norms):
    layer.train(training)
    for seed in range(3):
        x = torch.randn(5 + seed, 24, device=DEVICE)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(layer(x), definition(layer, x))
    assert len(norms) == 3 and layer not in reuse.store.by_layer and layer not in reuse.store.last_calls


@pytest.mark.parametrize("training", (False, True))
def test_a_scope_computes_the_norm_once(training, frozen):
    frozen.train(training)
    with torch.no_grad():
        first = [frozen(torch.ones(5, 24, device=DEVICE)) for _ in range(2)]
    kept = reuse.store.by_layer[frozen].norm
    for seed in range(3):
        x = torch.randn(5 + seed, 24, device=DEVICE)
        torch.testing.assert_close(frozen(x), definition(frozen, x))
    assert torch.equal(*first) and reuse.store.by_layer[frozen].norm is kept


@pytest.mark.parametrize("first", (torch.no_grad, torch.inference_mode, torch.enable_grad))
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode, torch.enable_grad))
def test_one_norm_for_every_grad_mode(mode, first, frozen):
    x = torch.randn(5, 24, device=DEVICE)
    with first():
        frozen(x)
    kept = reuse.store.by_layer[frozen].norm
    with mode():
        torch.testing.assert_close(frozen(x), definition(frozen, x))
    frozen(x).sum().backward()  # saves norm and gain, which must not be inference tensors
    assert frozen.lora_A.weight.grad is not None and reuse.store.by_layer[frozen].norm is kept


def write_in_place(layer):
    with torch.no_grad():
        layer.lora_B.weight.mul_(2)


def step_optimizer(layer, **arguments):
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, **arguments)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def step_fused(layer):
    """A fused step leaves the version of the parameters alone, which is why the version alone is no key."""
    version = layer.lora_B.weight._version
    step_optimizer(layer, fused=True)
    assert layer.lora_B.weight._version == version


def load(layer):
    layer.load_state_dict({name: 1.5 * value for name, value in layer.state_dict().items()})


def load_submodule(layer):
    layer.lora_B.load_state_dict({"weight": 2 * layer.lora_B.weight})


def change_scaling(layer):
    layer.scaling *= 3


def train_and_eval_around_a_data_write(layer):
    layer.train()
    layer.lora_B.weight.data.mul_(2)
    layer.eval()


def data_write_and_invalidate(layer):
    layer.lora_B.weight.data.mul_(2)
    dora_kernels.invalidate(torch.nn.Sequential(layer))


def merge_and_unmerge(layer):
    layer.merge()
    layer.unmerge()
    write_in_place(layer)


CHANGES = (
    write_in_place,
    step_optimizer,
    step_fused,
    load,
    load_submodule,
    change_scaling,
    train_and_eval_around_a_data_write,
    data_write_and_invalidate,
    merge_and_unmerge,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_inside_is_seen(change, frozen):
    x = torch.randn(5, 24, device=DEVICE)
    before = frozen(x)
    change(frozen)
    assert not torch.allclose(frozen(x), before)
    torch.testing.assert_close(frozen(x), definition(frozen, x), rtol=1e-5, atol=1e-5)


def test_a_dtype_move_is_seen(frozen):
    x = torch.randn(5, 24, device=DEVICE)
    frozen(x)
    frozen.double()
    assert (frozen(x.double()) - definition(frozen, x.double())).abs().max() < 1e-12


def test_autocast_has_its_own_norm(frozen):
    x = torch.randn(5, 24, device=DEVICE)
    frozen(x)
    wide = reuse.store.by_layer[frozen].norm
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        frozen(x)
    assert reuse.store.by_layer[frozen].norm is not wide


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_a_checkpoint_recomputes_without_the_norm(use_reentrant, layer, norms):
    layer.train()
    x = torch.randn(5, 24, device=DEVICE, requires_grad=True)
    expected = torch.autograd.grad(definition(layer, x).square().sum(), [x, layer.lora_B.weight])
    for step in range(2):
        y = checkpoint(layer, x, use_reentrant=use_reentrant)
        x.grad = layer.lora_B.weight.grad = None
        y.square().sum().backward()
        torch.testing.assert_close([x.grad, layer.lora_B.weight.grad], list(expected))
        assert len(norms) == step + 1


def lora_of_ones(layer):
    """A write that nobody sees."""
    layer.lora_B.weight.data.fill_(1.0)


def test_what_a_call_leaves_is_no_later_call_s(layer):
    """A forward pass that a backward pass may run again leaves its norm. The next one that may not takes it away."""
    x = torch.randn(5, 24, device=DEVICE, requires_grad=True)
    calls = {
        "plain": lambda: layer(x),
        "no gradients": lambda: torch.no_grad()(layer.eval().forward)(x),
        "counted": functools.partial(under_a_mode, layer, x),
        "traced": lambda: torch.no_grad()(torch.jit.trace)(layer, x, check_trace=False),
    }
    for name, call in calls.items():
        layer.train()
        checkpoint(layer, x, use_reentrant=False)
        assert layer in reuse.store.last_calls, name
        lora_of_ones(layer)
        call()
        assert layer not in reuse.store.last_calls, name


def under_a_mode(layer, x):
    with FlopCounterMode(display=False):
        return layer(x)


def test_a_recomputation_takes_what_its_forward_pass_left_once(layer, norms):
    """A second backward pass over the same graph recomputes with the weights as they are: so does torch's."""
    layer.train()
    x = torch.randn(5, 24, device=DEVICE, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False)
    y.sum().backward(retain_graph=True)
    assert len(norms) == 1
    lora_of_ones(layer)
    x.grad = None
    y.sum().backward()
    (expected,) = torch.autograd.grad(definition(layer, x).sum(), x)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)
    assert len(norms) == 2


def test_a_call_in_a_hook_of_the_backward_pass_is_no_recomputation(layer):
    """As an evaluation in a hook after a write."""
    layer.train()
    x, seen = torch.randn(5, 24, device=DEVICE), []
    y = checkpoint(layer, x.requires_grad_(), use_reentrant=False)

    def hook(gradient):
        lora_of_ones(layer)
        seen.append((layer(x), definition(layer, x)))

    z = y * 2
    z.register_hook(hook)
    z.sum().backward()
    torch.testing.assert_close(*seen[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opened", ("before", "between"))
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_a_recomputation_has_its_forward_pass_s_norm_whatever_a_scope_does(use_reentrant, opened, layer):
    layer.train()
    x = torch.randn(5, 24, device=DEVICE, requires_grad=True)
    given = []
    core = linear.dora_linear_core

    def watching(*arguments, **keywords):
        given.append(keywords["given"].norm)
        return core(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reuse.layers, "dora_linear_core", watching)
        with dora_kernels.frozen_adapters(layer) if opened == "before" else contextlib.nullcontext():
            y = checkpoint(layer, x, use_reentrant=use_reentrant)
        of_the_first = reuse.store.last_calls[layer].kept.norm
        with dora_kernels.frozen_adapters(layer) if opened == "between" else contextlib.nullcontext():
            if opened == "between":
                reuse.store.scopes[layer][0].fill(x)
            y.sum().backward()
    assert len(given) == 2 and given[1] is of_the_first


def test_the_copy_of_a_layer_keeps_nothing(frozen):
    x = torch.randn(5, 24, device=DEVICE)
    frozen(x)
    other, third = copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))
    torch.testing.assert_close(other(x), frozen(x))
    for copied in (other, third):
        copied(x)
        assert copied not in reuse.store.by_layer and copied not in reuse.store.scopes
    assert frozen in reuse.store.by_layer


def test_replaced_parameter(frozen):
    """A new parameter may be given the address of the one it replaces, and its version is 0 again."""
    x = torch.randn(5, 24, device=DEVICE)
    memory = torch.randn(20, 4, device=DEVICE)
    frozen.lora_B.weight = torch.nn.Parameter(memory.data)
    first = frozen(x)
    memory.mul_(2)
    frozen.lora_B.weight = torch.nn.Parameter(memory.data)
    torch.testing.assert_close(frozen(x), definition(frozen, x))
    assert not torch.equal(frozen(x), first)


def test_new_storage_through_data(frozen):
    """Here at another address; the allocator may hand out the old one, which the storage's identity tells apart."""
    x = torch.randn(5, 24, device=DEVICE)
    first = frozen(x)
    kept = reuse.store.by_layer[frozen]
    frozen.lora_B.weight.data = frozen.lora_B.weight.data * 2
    tensors = (frozen.weight, frozen.lora_A.weight, frozen.lora_B.weight, frozen.lora_magnitude_vector)
    assert not kept.is_of(tensors, kept.fingerprint)
    assert not torch.equal(frozen(x), first)


def test_moves_and_casts_forget(frozen):
    frozen(torch.randn(5, 24, device=DEVICE))
    frozen.float()
    assert frozen not in reuse.store.by_layer


def test_what_is_kept_goes_with_the_layer(layer):
    copied = copy.deepcopy(layer)
    scope = reuse.hold_adapters(nn.Sequential(layer, copied).train())
    for one in (layer, copied):
        one(torch.randn(5, 24, device=DEVICE))
        assert one in reuse.store.by_layer
    gone = weakref.ref(copied)
    del copied, one
    gc.collect()
    assert gone() is None
    assert layer in reuse.store.by_layer
    scope.close()


def test_peft_layers(norms):
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(24, 20, device=DEVICE))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, use_dora=True, target_modules=["0"])).eval()
    x = torch.randn(5, 24, device=DEVICE)
    expected = model(x)
    dora_kernels.enable(model)
    for _ in range(3):
        torch.testing.assert_close(model(x), expected)
    assert len(norms) == 3
    with dora_kernels.frozen_adapters(model):
        for _ in range(3):
            torch.testing.assert_close(model(x), expected)
        assert len(norms) == 3
    model(x)
    assert len(norms) == 4


def test_a_fake_layer_keeps_nothing():
    """Fake tensors (memory estimates, tracing) have no address."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = DoraLinear(24, 20, rank=4, alpha=6.0).eval()
        with dora_kernels.frozen_adapters(layer):
            assert layer(torch.empty(5, 24)).shape == (5, 20)
            assert layer not in reuse.store.by_layer


class Racing(weakref.WeakKeyDictionary):
    """Runs act() as another thread would, right before something is kept."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def __setitem__(self, key, value):
        act, self.act = self.act, lambda: None
        act()
        super().__setitem__(key, value)


@pytest.mark.parametrize("where", ("by_layer", "last_calls"))
def test_what_is_dropped_while_it_is_being_kept_is_not_kept(where, frozen, monkeypatch):
    def invalidated():
        lora_of_ones(frozen)
        dora_kernels.invalidate(frozen)

    monkeypatch.setattr(reuse.store, where, Racing(invalidated))
    x = torch.randn(5, 24, device=DEVICE, requires_grad=True)
    y = checkpoint(frozen, x, use_reentrant=False)
    assert frozen not in getattr(reuse.store, where)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, *torch.autograd.grad(definition(frozen, x).sum(), x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frozen(x), definition(frozen, x), rtol=1e-4, atol=1e-5)
