"""The short cut inside frozen_adapters: a call like the last is answered without the questions, any other is asked."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import dora_kernels
from dora_kernels import DoraLinear, DvoraLinear, VeraProjection
from dora_kernels.quant import layouts
from dora_kernels.reuse import kept, store
from tests.support.problem import DEVICE, definition

K = N = 16  # square, so that a transposed weight has the shape of the weight


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = DoraLinear(K, N, rank=4, alpha=6.0, device=DEVICE).eval()
    nn.init.normal_(layer.lora_B.weight)
    return layer


@pytest.fixture
def asked(monkeypatch):
    """The layers of the calls that took the long way: a list that grows."""
    asked, find = [], store.find

    def counting(layer, *arguments):
        asked.append(layer)
        return find(layer, *arguments)

    monkeypatch.setattr(store, "find", counting)
    return asked


@contextlib.contextmanager
def seen(layer, x):
    """Inside frozen_adapters, after the calls that make the norm and see it unchanged."""
    with dora_kernels.frozen_adapters(layer):
        for _ in range(2):
            layer(x)
        yield


def batch(rows=5):
    return torch.randn(rows, K, device=DEVICE)


def dora(layer):
    return layer


def dvora(_):
    layer = DvoraLinear(K, N, VeraProjection(2 * K, N, rank=3, device=DEVICE), device=DEVICE).eval()
    nn.init.normal_(layer.vera_lambda_b)
    return layer


def lora_dropout(layer):
    layer.dropout, layer.dropout_on = 0.5, "lora"
    return layer.train()


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("kind", (dora, dvora, lora_dropout), ids=lambda kind: kind.__name__)
def test_a_call_like_the_last_asks_nothing(kind, training, layer, asked):
    layer = kind(layer).train(training)
    with seen(layer, batch()):
        before = len(asked)
        assert before
        for rows in (5, 1, 7):
            layer(batch(rows))
        with torch.no_grad():
            layer(batch().requires_grad_())
        assert len(asked) == before


def test_the_last_call_is_asked_for_where_torch_has_no_comparison(layer, asked, monkeypatch):
    """A torch without TensorGuards: the same results, by the long way."""
    monkeypatch.setattr(layouts, "TensorGuards", None)
    x = batch()
    with seen(layer, x):
        before = len(asked)
        torch.testing.assert_close(layer(x), definition(layer, x))
        assert len(asked) == before + 1


def lora_B_of(layer):
    return layer.lora_B.weight


def write(layer):
    with torch.no_grad():
        lora_B_of(layer).mul_(2)


def transpose(layer):
    """Same owner, address, version, storage, dtype and shape: the strides alone tell."""
    layer.weight.data = layer.weight.data.t()


def move_in_its_storage(layer):
    """Same owner, version, storage and layout: the address alone tells."""
    layer.lora_B.weight.data = layer.memory[1]


def take_over_the_address(layer):
    """Same owner, address, version and layout; what was there may have been freed meanwhile."""
    layer.lora_B.weight.data = torch.from_dlpack(lora_B_of(layer).detach())
    lora_B_of(layer).data.mul_(3)


def take_over_the_storage(layer):
    """A new parameter in the storage of the old one, at the same version: the owner alone tells."""
    old = lora_B_of(layer)
    layer.lora_B.weight = nn.Parameter(old.data)
    assert old._version == lora_B_of(layer)._version
    old.data.mul_(3)


def take_over_the_storage_of_one_that_lives(layer):
    layer.others = [lora_B_of(layer)]
    take_over_the_storage(layer)


def step(layer):
    """A step that moves no version."""
    optimizer = torch.optim.SGD([lora_B_of(layer)])
    optimizer.step()
    lora_B_of(layer).data.mul_(3)


def scale(layer):
    layer.scaling *= 2


CHANGES = (
    write, transpose, move_in_its_storage, take_over_the_address, take_over_the_storage,
    take_over_the_storage_of_one_that_lives, step, scale,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_is_asked_about(change, layer, asked):
    layer.memory = torch.randn(2, N, 4, device=DEVICE)
    layer.lora_B.weight = nn.Parameter(layer.memory[0])
    x = batch()
    with seen(layer, x):
        stale, before = layer(x).detach(), len(asked)  # whose graph would hold the tensors
        change(layer)
        y = layer(x)
        assert len(asked) > before
        torch.testing.assert_close(y, definition(layer, x))
        assert not torch.allclose(y, stale, rtol=1e-3)


def test_what_is_dropped_is_not_seen(layer, asked):
    x = batch()
    with seen(layer, x):
        lora_B_of(layer).data.mul_(3)
        dora_kernels.invalidate(layer)
        torch.testing.assert_close(layer(x), definition(layer, x))
        before = len(asked)
    layer(x)
    assert len(asked) == before  # outside the scope nothing is looked for


@pytest.mark.parametrize("mode", (torch.inference_mode, torch.no_grad, torch.enable_grad))
def test_modes_share_what_is_kept(mode, layer, asked):
    x = batch()
    with seen(layer, x):
        norm = store.by_layer[layer].norm
        with mode():
            layer(x)
            before = len(asked)
            layer(x)
        assert len(asked) == before
        layer(x)
        assert store.by_layer[layer].norm is norm


OTHERS_SEE = {
    "a dispatch mode": lambda layer, x: under(FlopCounterMode(display=False), layer, x),
    "jit.trace": lambda layer, x: torch.no_grad()(torch.jit.trace)(layer, x, check_trace=False),
    "make_fx": lambda layer, x: make_fx(layer)(x),
    "make_fx, pre_dispatch": lambda layer, x: make_fx(layer, pre_dispatch=True)(x),
    "forward-mode AD": lambda layer, x: under(forward_ad.dual_level(), layer, x),
}


def under(context, layer, x):
    with context:
        layer(x)


@pytest.mark.parametrize("call", OTHERS_SEE)
def test_where_others_see_the_operators_nothing_is_taken(call, layer, norms):
    x = batch()
    with seen(layer, x):
        made = len(norms)
        OTHERS_SEE[call](layer, x)
        assert len(norms) == made + 1


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_a_region_leaves_what_it_was_given(use_reentrant, layer, norms):
    """For its recomputation, after the scope."""
    x = batch().requires_grad_()
    with seen(layer.train(), x):
        made, norm = len(norms), store.by_layer[layer].norm
        y = checkpoint(layer, x, use_reentrant=use_reentrant)
    assert store.last_calls[layer].kept.norm is norm
    y.sum().backward()
    assert len(norms) == made


def test_autocast_and_another_x_are_other_calls(layer):
    x = batch()
    with seen(layer, x):
        norm = store.by_layer[layer].norm
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            layer(x)
        assert store.by_layer[layer].norm is not norm


def test_an_inference_tensor_has_no_version(layer, asked):
    """In the storage of the parameter it was put in for."""
    x = batch()
    with torch.inference_mode(), seen(layer, x):
        before = len(asked)
        memory = lora_B_of(layer)
        memory.data = torch.empty(0, device=DEVICE).set_(memory.untyped_storage(), 0, memory.shape, memory.stride())
        assert memory.is_inference()
        memory.mul_(3)
        torch.testing.assert_close(layer(x), definition(layer, x))
        assert len(asked) == before  # not even the long way: nothing is kept of such a tensor
        assert layer not in store.last_calls


def test_a_nested_tensor_is_no_layout(layer):
    """torch's comparison would end the process."""
    x = batch()
    with seen(layer, x):
        layer.lora_B.weight = nn.Parameter(torch.nested.nested_tensor([lora_B_of(layer).detach()]), False)
        with pytest.raises((RuntimeError, ValueError), match="[Nn]ested"):
            layer(x)


def test_memory_that_other_processes_write_to(layer):
    x = batch()
    if DEVICE != "cpu":
        pytest.skip("shared memory is the CPU's")
    with seen(layer, x):
        lora_B_of(layer).data.share_memory_()
        layer(x)
        lora_B_of(layer).data.mul_(3)
        torch.testing.assert_close(layer(x), definition(layer, x))


def test_what_is_seen_holds_no_tensor(layer):
    x = batch()
    with seen(layer, x):
        gone = weakref.ref(lora_B_of(layer))
        layer.lora_B.weight = nn.Parameter(lora_B_of(layer).detach().clone())
        gc.collect()
        assert gone() is None
        torch.testing.assert_close(layer(x), definition(layer, x))


def test_keep_merged_is_made_once_and_found(layer, asked):
    x = batch().requires_grad_()
    with dora_kernels.options(way="merged"), dora_kernels.frozen_adapters(layer, keep_merged=True):
        for _ in range(3):
            layer(x)
        merged, before = store.by_layer[layer].merged, len(asked)
        layer(x)
        assert merged is not None and store.by_layer[layer].merged is merged and len(asked) == before


def test_a_scope_that_wants_the_merged_weight_gets_it_from_a_call_like_the_last(layer):
    x = batch().requires_grad_()
    with dora_kernels.options(way="merged"), seen(layer, x):
        assert store.by_layer[layer].merged is None
        with dora_kernels.frozen_adapters(layer, keep_merged=True):
            layer(x)
            assert store.by_layer[layer].merged is not None


def test_another_thread_s_layout_is_not_taken_for_the_one_that_was_compared(layer, monkeypatch):
    """Between the comparison and the look that is taken after it."""
    x = batch()

    def racing(tensors):
        transpose(layer)
        return layouts.layout_check(tensors)

    with dora_kernels.frozen_adapters(layer):
        with monkeypatch.context() as patch:
            patch.setattr(kept, "layout_check", racing)
            layer(x)
        assert layer.weight.stride() == (1, K)
        torch.testing.assert_close(layer(x), definition(layer, x))


def test_a_layer_s_parts_are_read_as_attributes_are(layer):
    """Parametrized ones, replicas', and those that torch.func puts in a parameter's place."""
    x = batch()
    doubled = copy.deepcopy(layer)
    for part in (doubled, doubled.lora_A, doubled.lora_B):
        name = "lora_magnitude_vector" if part is doubled else "weight"
        nn.utils.parametrize.register_parametrization(part, name, Doubling())
    torch.testing.assert_close(doubled(x), definition(doubled, x))
    assert not torch.allclose(doubled(x), layer(x))

    replica = layer._replicate_for_data_parallel()
    replica._parameters = {}
    for name, parameter in layer._parameters.items():
        setattr(replica, name, None if parameter is None else 2 * parameter.detach())
    torch.testing.assert_close(replica(x), definition(replica, x))
    assert not torch.allclose(replica(x), layer(x))

    ones = {"lora_B.weight": torch.ones(N, 4, device=DEVICE)}
    expected = copy.deepcopy(layer)
    nn.init.ones_(expected.lora_B.weight)
    torch.testing.assert_close(torch.func.functional_call(layer, ones, (x,)), definition(expected, x))


def test_the_parts_of_dvora_are_read_as_attributes_are():
    layer, x = dvora(None), batch()
    doubled = copy.deepcopy(layer)
    nn.utils.parametrize.register_parametrization(doubled, "vera_lambda_b", Doubling())
    nn.utils.parametrize.register_parametrization(doubled.projection, "vera_B", Doubling())
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        expected.vera_lambda_b.mul_(2)
        expected.projection.vera_B.mul_(2)
    torch.testing.assert_close(doubled(x), expected(x))
    assert not torch.allclose(doubled(x), layer(x))
    buffers = {"projection.vera_B": expected.projection.vera_B, "vera_lambda_b": expected.vera_lambda_b}
    torch.testing.assert_close(torch.func.functional_call(layer, buffers, (x,)), expected(x))


class Doubling(nn.Module):
    def forward(self, tensor):
        return 2 * tensor
