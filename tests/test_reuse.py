"""norm and gain are used again where that is safe, and computed anew wherever they may have changed."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dora_kernels
from dora_kernels import DoraLinear, reuse
from dora_kernels.reference import REFERENCE, dora_linear_ref
from tests.problem import DEVICE


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = DoraLinear(24, 20, rank=4, alpha=6.0, device=DEVICE).eval()
    with torch.no_grad():
        layer.lora_B.weight.normal_()
    return layer


@pytest.fixture
def norms(monkeypatch):
    """Grows by one whenever a norm is computed; on the CPU the forward pass makes it with the merged weight."""
    made = []

    def counting(function, name):
        def wrapped(*arguments, **keywords):
            result = function(*arguments, **keywords)
            if name == "norm" or result[1] is not None:
                made.append(name)
            return result

        return wrapped

    steps = REFERENCE._replace(
        norm=counting(REFERENCE.norm, "norm"),
        merged_forward=counting(REFERENCE.merged_forward, "merged_forward"),
    )
    monkeypatch.setattr("dora_kernels.ops.REFERENCE", steps)
    with dora_kernels.options(backend="reference"):
        yield made


def definition(layer, x):
    return dora_linear_ref(
        x,
        layer.weight,
        layer.lora_A.weight,
        layer.lora_B.weight,
        layer.lora_magnitude_vector,
        layer.scaling,
        layer.bias,
    )


def test_eval_computes_the_norm_once(layer, norms):
    for seed in range(3):
        x = torch.randn(5 + seed, 24, device=DEVICE)
        torch.testing.assert_close(layer(x), definition(layer, x))
    assert len(norms) == 1


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode, torch.enable_grad))
def test_eval_under_every_grad_mode(mode, layer, norms):
    x = torch.randn(5, 24, device=DEVICE)
    with torch.inference_mode():
        layer(x)
    with mode():
        layer(x)
        torch.testing.assert_close(layer(x), definition(layer, x))
    layer(x).sum().backward()  # saves norm and gain, which must not be inference tensors
    assert layer.lora_A.weight.grad is not None


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
def test_a_change_is_seen(change, layer):
    x = torch.randn(5, 24, device=DEVICE)
    before = layer(x)
    change(layer)
    assert not torch.allclose(layer(x), before)
    torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-5, atol=1e-5)


def test_a_dtype_move_is_seen(layer, norms):
    x = torch.randn(5, 24, device=DEVICE)
    layer(x)
    layer.double()
    assert (layer(x.double()) - definition(layer, x.double())).abs().max() < 1e-12
    assert len(norms) == 2


def test_autocast_has_its_own_norm(layer, norms):
    x = torch.randn(5, 24, device=DEVICE)
    layer(x)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        layer(x)
    assert len(norms) == 2


def test_training_computes_the_norm_every_time(layer, norms):
    layer.train()
    x = torch.randn(5, 24, device=DEVICE)
    layer(x)
    layer(x)
    assert len(norms) == 2


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


def test_the_copy_of_a_layer_keeps_nothing(layer, norms):
    x = torch.randn(5, 24, device=DEVICE)
    layer(x)
    other, third = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    assert layer in reuse.store.by_layer and other not in reuse.store.by_layer and third not in reuse.store.by_layer
    torch.testing.assert_close(other(x), layer(x))


def test_replaced_parameter(layer):
    """A new parameter may be given the address of the one it replaces, and its version is 0 again."""
    x = torch.randn(5, 24, device=DEVICE)
    memory = torch.randn(20, 4, device=DEVICE)
    layer.lora_B.weight = torch.nn.Parameter(memory.data)
    first = layer(x)
    memory.mul_(2)
    layer.lora_B.weight = torch.nn.Parameter(memory.data)
    torch.testing.assert_close(layer(x), definition(layer, x))
    assert not torch.equal(layer(x), first)


def test_new_storage_through_data(layer):
    """Here at another address; the allocator may hand out the old one, which the storage's identity tells apart."""
    x = torch.randn(5, 24, device=DEVICE)
    first = layer(x)
    kept = reuse.store.by_layer[layer]
    layer.lora_B.weight.data = layer.lora_B.weight.data * 2
    tensors = (layer.weight, layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector)
    assert not kept.is_of(tensors, kept.fingerprint)
    assert not torch.equal(layer(x), first)


def test_moves_and_casts_forget(layer):
    layer(torch.randn(5, 24, device=DEVICE))
    layer.float()
    assert layer not in reuse.store.by_layer


def test_what_is_kept_goes_with_the_layer(layer):
    layer(torch.randn(5, 24, device=DEVICE))
    copied = copy.deepcopy(layer)
    copied(torch.randn(5, 24, device=DEVICE))
    assert copied in reuse.store.by_layer
    gone = weakref.ref(copied)
    del copied
    gc.collect()
    assert gone() is None
    assert layer in reuse.store.by_layer


def test_peft_layers_reuse_in_eval(norms):
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(24, 20, device=DEVICE))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, use_dora=True, target_modules=["0"])).eval()
    x = torch.randn(5, 24, device=DEVICE)
    expected = model(x)
    dora_kernels.enable(model)
    for _ in range(3):
        torch.testing.assert_close(model(x), expected)
    assert len(norms) == 1
    model.train()
    model(x)
    model(x)
    assert len(norms) == 3


def test_a_fake_layer_keeps_nothing():
    """Fake tensors (memory estimates, tracing) have no address."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = DoraLinear(24, 20, rank=4, alpha=6.0).eval()
        assert layer(torch.empty(5, 24)).shape == (5, 20)
    assert layer not in reuse.store.by_layer
