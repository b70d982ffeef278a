"""frozen_adapters: what is reused between optimizer steps, and what ends it."""

import contextlib
import copy
import gc
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dora_kernels
from dora_kernels import DoraLinear, DvoraLinear, VeraProjection, frozen_adapters, ops, options, reuse
from tests.support import peft_problem
from tests.support.problem import BACKENDS, DEVICE

pytest.importorskip("peft")
NORM_OPS = ("norm", "grouped_norm")


def counts():
    return {name: peft_problem.calls(name) for name in (*NORM_OPS, "merge")}


@contextlib.contextmanager
def made(**expected):
    """Fails unless the operators ran as often as said; a forward pass that makes its own norm counts as `own`."""
    before, own = counts(), []
    forward = ops.run_forward

    def counting(call):
        result = forward(call)
        own.extend([] if result.norm is None else [1])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "run_forward", counting)
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
    with options(backend=backend):
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
    with options(way="merged"), frozen_adapters(layer, keep_merged=True):
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


def switch(model):
    model.set_adapter("second")


def load(model):
    model.load_state_dict({n: 1.2 * t if t.is_floating_point() else t for n, t in model.state_dict().items()})


def merge_and_unmerge(model):
    """Through .data; a row of the weight comes back rounded."""
    model.merge_adapter(["second"])
    model.unmerge_adapter()


def merge_in_place(model):
    """PEFT merges plain LoRA with += on .data: the address and the version stay."""
    layer = model.base_model.model.up
    variant = layer.lora_variant.pop("default")
    layer.merge(adapter_names=["default"])
    layer.merged_adapters.clear()  # as if it had always been that weight
    layer.lora_variant["default"] = variant


def replace_and_delete(model):
    model.delete_adapter("second")
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    peft_problem.randomise(model, seed=5)


def new_parameter(model):
    layer = model.base_model.model.up.lora_A["default"]
    layer.weight = nn.Parameter(2 * layer.weight.detach())


def disable_and_enable(model):
    dora_kernels.disable(model)
    model.base_model.model.up.lora_B["default"].weight.data.mul_(2)
    dora_kernels.enable(model)


def scale(model):
    for layer in peft_problem.layers(model):
        layer.set_scale("default", 3.0)


def disabled_for_a_while(model):
    with model.disable_adapter():
        model(batches(1)[0])
    model.base_model.model.down.lora_B["default"].weight.detach().mul_(2)


def fused_step(model):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=0.1, fused=True).step()


CHANGES = (
    switch, load, merge_and_unmerge, merge_in_place, replace_and_delete, new_parameter, disable_and_enable, scale,
    disabled_for_a_while, fused_step, lambda model: model.to(torch.float64), lambda model: model.to(torch.bfloat16),
    lambda model: model.train(),
)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_that_can_be_seen_ends_the_reuse(change, backend):
    """A copy is in no scope and has nothing that was kept."""
    if backend == "triton" and change is CHANGES[-3]:
        pytest.skip("kernels take no float64")
    model = peft_problem.enabled(peft_problem.build(adapters=2)).eval()
    model.set_adapter("default")
    with options(backend=backend), torch.no_grad(), frozen_adapters(model):
        model(batches(1)[0])
        change(model)
        x = batches(1)[0].to(model.base_model.model.up.base_layer.weight.dtype)
        for _ in range(2):
            torch.testing.assert_close(model(x), copy.deepcopy(model)(x), rtol=1e-5, atol=1e-5)
        assert all(layer in reuse.store.scopes for layer in peft_problem.layers(model))


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


def kept(model):
    return [reuse.store.by_layer.get(layer) for layer in model.modules() if hasattr(layer, "adapter_operands")]


def parts_of(model):
    """The whole model, and one layer of it."""
    return {"whole": model, "part": model.base_model.model.up}


@pytest.mark.parametrize("inner", ("whole", "part"))
@pytest.mark.parametrize("outer", ("whole", "part"))
def test_scopes_nest(outer, inner, model):
    """The reuse of a layer ends with the last of its scopes."""
    outer, inner = parts_of(model)[outer], parts_of(model)[inner]
    x = batches(1)[0]
    with frozen_adapters(outer):
        model(x)
        before = kept(outer)
        ones_own = 0 if model in (outer, inner) else 2
        with frozen_adapters(inner), made(grouped_norm=int(inner is model is not outer), own=ones_own):
            model(x), model(x)
        assert all(a is not None and a.norm is b.norm for a, b in zip(kept(outer), before, strict=True))
        assert all(layer in reuse.store.scopes for layer in outer.modules() if hasattr(layer, "adapter_operands"))
        assert len([one for one in kept(model) if one is not None]) == len(kept(outer))
    assert not len(reuse.store.scopes) and not len(reuse.store.by_layer)


def test_three_scopes_closed_in_any_order(model):
    x = batches(1)[0]
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        with contextlib.ExitStack() as stack:
            contexts = [frozen_adapters(model) for _ in range(3)]
            for context in contexts:
                stack.enter_context(context)
            first = model(x)
            norms = [one.norm for one in kept(model)]
            for index in order[:2]:
                contexts[index].__exit__(None, None, None)
                assert torch.equal(model(x), first)
                assert all(a.norm is b for a, b in zip(kept(model), norms, strict=True))
            contexts[order[2]].__exit__(None, None, None)
            assert kept(model) == [None, None]
            stack.pop_all()


@pytest.mark.parametrize("keeps_first", (True, False))
def test_merged_weights_go_with_the_scope_that_wanted_them(keeps_first, model):
    x = batches(1)[0].requires_grad_()
    with options(way="merged"), frozen_adapters(model, keep_merged=keeps_first):
        with frozen_adapters(model, keep_merged=not keeps_first):
            model(x)
            assert all(one.merged is not None for one in kept(model))
            norms = [one.norm for one in kept(model)]
        assert [one.merged is not None for one in kept(model)] == [keeps_first] * 2
        model(x)
        assert all(a.norm is b for a, b in zip(kept(model), norms, strict=True))


def test_a_region_that_is_never_run_again_holds_no_merged_weight(model):
    """As after an error in the forward pass: its regions are gone, and nothing asks for what they have left."""
    x = batches(1)[0].requires_grad_()
    with options(way="merged"), frozen_adapters(model, keep_merged=True):
        y = checkpoint(model, x, use_reentrant=False)
        assert all(one.merged is not None for one in kept(model))
        left = list(reuse.store.last_calls.values())
        assert len(left) == 2 and all(one.kept.merged is None and one.kept.norm is not None for one in left)
        y.sum().backward()


def test_an_error_in_the_inner_scope(model):
    x = batches(1)[0]
    with frozen_adapters(model):
        model(x)
        with pytest.raises(RuntimeError), frozen_adapters(model, keep_merged=True):
            raise RuntimeError
        with made():
            model(x)
    assert not len(reuse.store.scopes)


def test_scopes_of_threads(model):
    """Each opens and closes its own over the others': every output is that of the model, and nothing is left."""
    x, errors = batches(1)[0], []
    expected = model(x).detach()

    def serve():
        try:
            for _ in range(20):
                with frozen_adapters(model):
                    torch.testing.assert_close(model(x), expected)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and not len(reuse.store.scopes) and not len(reuse.store.by_layer)


def test_what_is_computed_while_the_last_scope_closes_is_not_kept(model, monkeypatch):
    scope = reuse.scope._opened("frozen_adapters", model, False, False)
    grouped_norm = ops.grouped_norm
    monkeypatch.setattr(ops, "grouped_norm", lambda *arguments: (scope.close(), grouped_norm(*arguments))[1])
    model(batches(1)[0])
    assert not len(reuse.store.by_layer)


def test_layers_disabled_inside_the_scope():
    """One layer of two is enabled again: the launch for all of them leaves the other to PEFT."""
    model = peft_problem.build(dtype=torch.float64)
    x = torch.randn(3, 24, dtype=torch.float64, device=DEVICE)
    expected = model(x)
    dora_kernels.enable(model)
    with frozen_adapters(model):
        dora_kernels.disable(model)
        dora_kernels.enable(peft_problem.layers(model)[0])
        torch.testing.assert_close(model(x), expected)


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
        norms, norm = [], dora_kernels.extras.dvora.function._norm
        patch.setattr(dora_kernels.extras.dvora.function, "_norm", lambda *a: norms.append(1) or norm(*a))
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


def test_a_held_scope_gives_way_to_the_next_held(model):
    first = reuse.hold_adapters(model)
    second = reuse.hold_adapters(model, keep_merged=True)
    first.close()  # does nothing to the second
    assert len(reuse.store.scopes) == 2 and set(reuse.store.scopes.values()) == {(second,)}
    with frozen_adapters(model):
        third = reuse.hold_adapters(model)
        assert all(len(scopes) == 2 and second not in scopes for scopes in reuse.store.scopes.values())
    assert set(reuse.store.scopes.values()) == {(third,)}
    third.close()
    assert not len(reuse.store.scopes)


def test_what_a_held_scope_has_kept_is_no_promise_of_the_next_caller_s(model):
    """One that a broken run left open: eval mode keeps nothing, and a scope that is opened starts afresh."""
    x = batches(1)[0]
    left_open = reuse.hold_adapters(model)
    model.train()
    model(x)
    model.base_model.model.up.lora_B["default"].weight.data.mul_(2)  # whoever does that has forgotten the run
    expected = copy.deepcopy(model)(x)
    with frozen_adapters(model):
        torch.testing.assert_close(model(x), expected)
    model.eval()
    with made(own=4), torch.no_grad():
        model(x), model(x)
    left_open.close()


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
    from dora_kernels.extras.trainer import FrozenAdaptersCallback

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
