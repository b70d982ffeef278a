"""frozen_adapters: what is reused between optimizer steps, and what ends it."""

import contextlib
import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dora_kernels
from dora_kernels import DoraLinear, DvoraLinear, VeraProjection, frozen_adapters, launch, ops, reuse
from dora_kernels.dvora import dvora_norm
from tests import peft_problem
from tests.problem import BACKENDS, DEVICE

pytest.importorskip("peft")
NORM_OPS = ("norm", "grouped_norm")


def counts():
    return {name: peft_problem.calls(name) for name in (*NORM_OPS, "merge")}


@contextlib.contextmanager
def made(**expected):
    """Fails unless the operators ran as often as said; a forward pass that makes its own norm counts as `own`."""
    before, own = counts(), []
    forward = ops.forward

    def counting(*arguments):
        result = forward(*arguments)
        own.extend([1] if result[1].numel() else [])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "forward", counting)
        yield
    after = {name: count - before[name] for name, count in counts().items()} | {"own": len(own)}
    assert after == {"norm": 0, "grouped_norm": 0, "merge": 0, "own": 0} | expected


def batches(count=3, features=24):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(7, features, generator=generator).to(DEVICE) for _ in range(count)]


def accumulate(model, scope):
    """The gradients of three micro-batches."""
    model.zero_grad()
    losses = []
    with scope:
        for x in batches():
            model.train()  # as Trainer does
            loss = model(x.requires_grad_()).square().mean()
            loss.backward()
            losses.append(loss.item())
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def model():
    return peft_problem.enabled(peft_problem.build())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep_merged", (False, True))
def test_one_launch_for_all_layers_and_the_same_gradients(model, keep_merged, backend):
    with launch.options(backend=backend):
        expected = accumulate(model, contextlib.nullcontext())
        with made(grouped_norm=1, merge=2 if keep_merged else 0):
            actual = accumulate(model, frozen_adapters(model, keep_merged=keep_merged))
    torch.testing.assert_close(actual, expected)
    assert len(expected[1]) == 6


def test_outside_nothing_is_kept(model):
    accumulate(model, frozen_adapters(model))
    with made(own=6):
        accumulate(model, contextlib.nullcontext())


def test_the_merged_weight_is_taken_by_the_backward_pass():
    """A wrong one must show."""
    layer = DoraLinear(24, 20, rank=4, alpha=6.0, device=DEVICE).train()
    nn.init.normal_(layer.lora_B.weight)
    x = batches(1)[0].requires_grad_()
    with launch.options(way="merged"), frozen_adapters(layer, keep_merged=True):
        (right,) = torch.autograd.grad(layer(x).sum(), x)
        dora_kernels.reuse.store.by_layer[layer].merged.mul_(2)
        (doubled,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(doubled, 2 * right)


def adamw8bit(parameters):
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(parameters, lr=0.1)


def versions(model):
    return [parameter._version for parameter in model.parameters() if parameter.requires_grad]


class WritesThroughData(torch.optim.Optimizer):
    """What moves no version, whichever the release of an optimizer."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(0.1 * parameter.grad)


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "8-bit AdamW": adamw8bit,
    "writes through .data": WritesThroughData,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_step_inside_ends_the_reuse(model, optimizer):
    """Fused and 8-bit optimizers may leave tensor._version alone: the scope does not depend on it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[optimizer](parameters)
    x = batches(1)[0]
    with frozen_adapters(model):
        model(x).square().mean().backward()
        before = versions(model)
        optimizer.step()
        if isinstance(optimizer, WritesThroughData):
            assert versions(model) == before
        inside = model(x)
    assert torch.equal(inside, model(x))


def test_without_the_count_of_steps_a_stale_norm_would_be_used(model, monkeypatch):
    """What the test above would see: with the hook gone, a write that moves no version goes unnoticed."""
    monkeypatch.setattr(dora_kernels.reuse.store, "_count_one_step", lambda *_: None)
    monkeypatch.setattr(dora_kernels.reuse.store, "_counting", True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    x = batches(1)[0]
    with frozen_adapters(model):
        model(x).square().mean().backward()
        steps = dora_kernels.reuse.store._optimizer_steps
        WritesThroughData(parameters).step()
        dora_kernels.reuse.store._optimizer_steps = steps
        inside = model(x)
    assert not torch.equal(inside, model(x))


def test_checkpointing_inside_the_scope(model):
    x = batches(1)[0].requires_grad_()
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    with made(grouped_norm=1), frozen_adapters(model):
        for _ in range(2):
            (actual,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).sum(), x)
    torch.testing.assert_close(actual, expected)


def test_autocast_and_what_cannot_share_a_launch():
    """Two layers in bfloat16 and one in float32: under autocast the latter is cast, and makes its own norm."""
    layers = nn.Sequential(*(DoraLinear(24, 24, 4, 6.0, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)))
    layers.append(DoraLinear(24, 24, 4, 6.0, device=DEVICE))
    x = batches(1)[0].bfloat16()
    with torch.autocast(DEVICE, dtype=torch.bfloat16), made(grouped_norm=1, own=1), frozen_adapters(layers):
        first, second = layers(x), layers(x)
    assert torch.equal(first, second)


def test_scopes_do_not_overlap(model):
    with frozen_adapters(model):
        with pytest.raises(ValueError, match="frozen_adapters: 2 of 2 layers are in another scope"):
            with frozen_adapters(model):
                pass
        with made(grouped_norm=1):
            accumulate(model, contextlib.nullcontext())
    with frozen_adapters(model):
        pass


def test_an_error_inside_closes_the_scope(model):
    with pytest.raises(RuntimeError), frozen_adapters(model):
        raise RuntimeError
    assert not len(dora_kernels.reuse.store.scopes)


def test_dvora_layers_make_their_norm_once():
    projection = VeraProjection(24, 20, rank=3, device=DEVICE)
    layer = DvoraLinear(24, 20, projection, device=DEVICE)
    nn.init.normal_(layer.vera_lambda_b)
    model = nn.Sequential(layer)
    expected = accumulate(model, contextlib.nullcontext())
    with pytest.MonkeyPatch.context() as patch:
        norms = []
        patch.setattr(dora_kernels.dvora.function, "dvora_norm", lambda *a, **k: norms.append(1) or dvora_norm(*a, **k))
        actual = accumulate(model, frozen_adapters(model))
    torch.testing.assert_close(actual, expected)
    assert len(norms) == 1


def test_what_is_dropped_meanwhile_is_not_kept(model, monkeypatch):
    """Another thread forgets a layer while the one launch runs: its adapter may have changed."""
    grouped_norm = ops.grouped_norm

    def dropping(*arguments):
        dora_kernels.reuse.forget(model.base_model.model.up)
        return grouped_norm(*arguments)

    monkeypatch.setattr(ops, "grouped_norm", dropping)
    with frozen_adapters(model):
        model(batches(1)[0])
        assert model.base_model.model.up not in dora_kernels.reuse.store.by_layer


def test_a_held_scope_gives_way_to_the_next(model):
    first = reuse.hold_adapters(model)
    with pytest.raises(ValueError, match="2 of 2 layers are in another scope"):
        with frozen_adapters(model):
            pass
    second = reuse.hold_adapters(model, keep_merged=True)
    first.close()  # does nothing to the second
    assert len(reuse.store.scopes) == 2 and set(reuse.store.scopes.values()) == {second}
    second.close()
    with frozen_adapters(model), pytest.raises(ValueError, match="2 of 2 layers are in another scope"):
        reuse.hold_adapters(model)
    assert not len(reuse.store.scopes)


def test_a_held_scope_holds_no_model():
    """It may be left open by a run that an exception has ended."""
    layer = DoraLinear(24, 20, 4, 6.0, device=DEVICE)
    reuse.hold_adapters(layer)
    assert len(reuse.store.scopes) == 1
    del layer
    gc.collect()
    assert not len(reuse.store.scopes)


def test_a_model_without_layers():
    with pytest.raises(ValueError, match="frozen_adapters: model has no DoRA layer of ours; expected enable"):
        with frozen_adapters(nn.Linear(3, 3)):
            pass


def test_the_trainer_callback(model, tmp_path):
    """Three micro-batches a step: the norms are made once a step, and the losses are those without the callback."""
    transformers = pytest.importorskip("transformers")
    from dora_kernels.trainer import FrozenAdaptersCallback

    class Regression(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, labels):
            return {"loss": nn.functional.mse_loss(self.inner(x), labels)}

    rows = [{"x": torch.randn(24), "labels": torch.randn(20)} for _ in range(12)]

    def train(callbacks, enabled=None):
        twin = Regression(enabled or peft_problem.enabled(model))
        arguments = transformers.TrainingArguments(
            tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=1, report_to=[],
            learning_rate=0.1, logging_steps=1, save_strategy="no", use_cpu=DEVICE == "cpu", disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(twin, arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    with made(own=12):
        expected = train([])
    with made(grouped_norm=2):
        actual = train([FrozenAdaptersCallback()])
    assert len(expected) == 2 and actual == pytest.approx(expected, rel=1e-6)
    assert not len(dora_kernels.reuse.store.scopes)

    class Broken(transformers.TrainerCallback):
        def on_substep_end(self, *_, **__):
            raise RuntimeError("broken")

    cut_short = peft_problem.enabled(model)
    with pytest.raises(RuntimeError, match="broken"):
        train([FrozenAdaptersCallback(), Broken()], cut_short)
    assert len(dora_kernels.reuse.store.scopes) == 2
    with made(grouped_norm=2):
        train([FrozenAdaptersCallback()], cut_short)
    assert not len(dora_kernels.reuse.store.scopes)
