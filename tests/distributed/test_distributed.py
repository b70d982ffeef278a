"""An enabled PEFT model under PyTorch's own engines: ours computes, and the losses are those of one process.

Each check runs on every rank of a world of real processes (support/process_worlds.py). A rank trains on its share of
the batch; the expected losses are stock PEFT's, in one process, on the whole batch.
"""

import contextlib
import copy
import functools

import pytest
import torch
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")

from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import dora_kernels
from dora_kernels import DvoraLinear, VeraProjection, ops, reuse
from dora_kernels.adapters.taking import TakenOver
from dora_kernels.extras.dvora import dvora_linear_ref
from dora_kernels.planning import devices
from tests.support.distributed_problem import STEPS, batch, blocks, build_llama, build_net, fsdp2, train, worst
from tests.support.peft_problem import calls, layers
from tests.support.process_worlds import world

SIZES = (2, pytest.param(4, marks=pytest.mark.nightly))
BUILD = {"net": build_net, "llama": build_llama}
# of losses over STEPS steps, relative
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-12}


# Each engine puts a model under it, and returns what is called.


def ddp(model, **arguments):
    return DistributedDataParallel(model, **arguments)


def fsdp2_whole(model):
    return fully_shard(model)


def fsdp2_kept_gathered(model):
    for block in blocks(model):
        fully_shard(block, reshard_after_forward=False)
    return fully_shard(model, reshard_after_forward=False)


def fsdp2_adapters(model):
    """The base is not sharded: every rank has all of it."""
    return fully_shard(model, ignored_params={p for p in model.parameters() if not p.requires_grad})


def fsdp1(model, whole=False, policy=None, **arguments):
    """Units as fsdp2's, or one, or by PEFT's policy: the blocks, and each lora_A, lora_B and magnitude."""
    if policy is None and not whole:
        policy = ModuleWrapPolicy({type(block) for block in blocks(model)})
    arguments |= {"auto_wrap_policy": policy, "device_id": torch.device("cpu")}
    return FullyShardedDataParallel(model, **arguments)


ENGINES = {
    "ddp": ddp,
    "ddp unused": lambda model: ddp(model, find_unused_parameters=True),
    "ddp static": lambda model: ddp(model, static_graph=True),
    "ddp views": lambda model: ddp(model, gradient_as_bucket_view=True),
    "fsdp2": fsdp2,
    "fsdp2 whole": fsdp2_whole,
    "fsdp2 kept gathered": fsdp2_kept_gathered,
    "fsdp2 adapters": fsdp2_adapters,
    "fsdp1": lambda model: fsdp1(model, use_orig_params=True),
    "fsdp1 whole": lambda model: fsdp1(model, whole=True, use_orig_params=True),
    "fsdp1 policy": lambda model: fsdp1(model, policy=fsdp_auto_wrap_policy(model), use_orig_params=False),
    "fsdp1 policy, original": lambda model: fsdp1(model, policy=fsdp_auto_wrap_policy(model), use_orig_params=True),
}


def losses_under(rank, size, engine, kind, dtype, accumulate):
    """Ours under the engine, the calls of our operators in it, and the messages of what went to PEFT."""
    model = BUILD[kind](dtype)
    report = dora_kernels.enable(model)
    assert len(report.taken_over) == len(layers(model)) > 0, str(report)
    called = ENGINES[engine](model)
    ops.calls.clear()
    devices._logged.clear()
    losses = train(model, batch(kind, dtype, rank, size), called=called, accumulate=accumulate)
    return losses, (calls("forward"), calls("backward")), sorted(devices._logged)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("engine", ENGINES)
def test_losses_are_those_of_one_process(engine, size):
    parts = 1 if engine == "ddp static" else 2  # a static graph cannot start with no_sync
    for kind, dtype, accumulate in (("net", torch.float32, parts), ("llama", torch.float64, 1)):
        results = world(size).run(losses_under, engine, kind, dtype, accumulate)
        stock = BUILD[kind](dtype)
        expected = train(stock, batch(kind, dtype))
        assert abs(expected[-1] - expected[0]) > 0.03 * expected[0]  # it learns
        ran = STEPS * accumulate * len(layers(stock))
        for losses, counts, logged in results:
            assert worst(losses, expected) < TOLERANCE[dtype], (engine, kind)
            assert counts == (ran, ran) and logged == []


HALF = {
    "fsdp2": lambda model: fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)),
    "fsdp1": lambda model: fsdp1(
        model,
        policy=fsdp_auto_wrap_policy(model),
        use_orig_params=False,
        mixed_precision=MixedPrecision(torch.bfloat16, torch.float32),
    ),
}


def losses_in_half_precision(rank, size, engine, ours):
    model = build_net()
    if ours:
        dora_kernels.enable(model)
    called = HALF[engine](model)
    ops.calls.clear()
    return train(model, batch("net", torch.float32, rank, size), called=called), calls("forward")


@pytest.mark.parametrize("engine", HALF)
def test_mixed_precision_is_as_exact_as_stock(engine):
    exact = train(build_net(torch.float64), batch("net", torch.float64))
    stock, _ = world(2).run(losses_in_half_precision, "fsdp2", False)[0]  # PEFT raises under fsdp1: A is float32
    ours, count = world(2).run(losses_in_half_precision, engine, True)[0]
    assert count == 2 * STEPS
    assert 1e-5 < worst(stock, exact) < 1e-2
    assert worst(ours, exact) < 2 * worst(stock, exact) + 2**-9


def losses_with_checkpoints(rank, size, engine):
    """Each block of a Llama computes its forward again in the backward pass."""
    model = build_llama(torch.float64)
    dora_kernels.enable(model)
    for block in blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    called = ENGINES[engine](model)
    ops.calls.clear()
    return train(model, batch("llama", torch.float64, rank, size), called=called), calls("forward")


@pytest.mark.parametrize("engine", ("ddp", "fsdp2", "fsdp1", pytest.param("fsdp1 policy", marks=pytest.mark.nightly)))
def test_activation_checkpointing(engine):
    stock = build_llama(torch.float64)
    expected = train(stock, batch("llama", torch.float64))
    for losses, count in world(2).run(losses_with_checkpoints, engine):
        assert worst(losses, expected) < TOLERANCE[torch.float64]
        assert count == 2 * STEPS * len(layers(stock))


def eval_outputs(rank, size, engine, in_scope):
    """Outputs in eval mode, before and after the shards got other values; every gather at the old address."""
    model = build_net(torch.float64).eval()
    dora_kernels.enable(model)
    called = ENGINES[engine](model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fsdp_param, "free_storage", lambda tensor: None)
        with torch.no_grad(), dora_kernels.frozen_adapters(model) if in_scope else contextlib.nullcontext():
            inputs, _ = batch("net", torch.float64)
            outputs = [called(inputs), called(inputs)]
            if isinstance(called, FullyShardedDataParallel):
                with FullyShardedDataParallel.summon_full_params(called):
                    for name, parameter in called.named_parameters():
                        parameter.mul_(2 if "lora_B" in name else 1)
            else:
                state = get_model_state_dict(called)
                state = {name: 2 * value if "lora_B" in name else value for name, value in state.items()}
                set_model_state_dict(called, state)
            outputs.append(called(inputs))
            return outputs, sum(layer in reuse.store.by_layer for layer in layers(model))


@pytest.mark.parametrize(
    ("engine", "in_scope"), [("fsdp2", False)] + [(e, True) for e in ("ddp", "fsdp2", "fsdp2 kept gathered", "fsdp1")]
)
def test_a_norm_of_other_weights_is_not_used_again(engine, in_scope):
    model = build_net(torch.float64).eval()
    inputs, _ = batch("net", torch.float64)
    with torch.no_grad():
        before = model(inputs)
        for name, parameter in model.named_parameters():
            parameter.mul_(2 if "lora_B" in name else 1)
        after = model(inputs)
    assert (after - before).abs().max() > 1e-2
    for outputs, kept in world(2).run(eval_outputs, engine, in_scope):
        torch.testing.assert_close(outputs, [before, before, after], rtol=1e-12, atol=1e-12)
        assert kept == (2 if in_scope and engine != "fsdp1" else 0)


def dvora_outputs(rank, size):
    """Outputs of a DVoRA layer in train mode, before and after its shards got other values at the same address."""
    torch.manual_seed(0)
    layer = DvoraLinear(48, 40, VeraProjection(48, 40, 6, dtype=torch.float64), dtype=torch.float64)
    with torch.no_grad():
        layer.vera_lambda_b.normal_()
    x, outputs, moved = torch.randn(5, 48, dtype=torch.float64), [], copy.deepcopy(layer)
    called = fully_shard(layer, reshard_after_forward=False)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fsdp_param, "free_storage", lambda tensor: None)
        for factor in (1, 3):
            called.reshard()
            called.weight.to_local().mul_(factor)  # as a load of a shard does
            moved.weight.mul_(factor)
            expected = dvora_linear_ref(x, moved.weight, *moved._vera(), moved.vera_magnitude_vector, moved.bias)
            outputs += [(called(x), expected) for _ in range(3)]
    return outputs


def test_norm_terms_of_other_weights_are_not_used_again():
    for outputs in world(2).run(dvora_outputs):
        assert (outputs[0][0] - outputs[-1][0]).abs().max() > 1e-2
        for y, expected in outputs:
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def steps_aside(rank, size):
    """Units inside a layer are for PEFT to call; and what the reports say before and after."""
    model = build_net(torch.float64)
    dora_kernels.enable(model)
    for layer in layers(model):
        for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            fully_shard(part["default"])
    fully_shard(model)
    ops.calls.clear()
    devices._logged.clear()
    losses = train(model, batch("net", torch.float64, rank, size))
    return losses, sum(ops.calls.values()), sorted(devices._logged)


def test_fully_sharded_parts_of_a_layer_go_to_peft():
    expected = train(build_net(torch.float64), batch("net", torch.float64))
    for losses, count, logged in world(2).run(steps_aside):
        assert worst(losses, expected) < TOLERANCE[torch.float64]
        assert count == 0
        assert logged == ["dora_kernels: a call went to PEFT: lora_A has hooks"]  # which gather it


def enabled_late_and_disabled(rank, size):
    """The report of enable after fully_shard, and losses after disable of layers that are units."""
    late, model = build_net(torch.float64), build_net(torch.float64)
    report = dora_kernels.enable(fully_shard(late))
    dora_kernels.enable(model)
    fsdp2(model)
    dora_kernels.disable(model)
    assert all(isinstance(layer, (FSDPModule, LoraLinear)) for layer in layers(model))
    assert not any(isinstance(layer, TakenOver) for layer in layers(model))
    ops.calls.clear()
    losses = train(model, batch("net", torch.float64, rank, size))
    return str(report), losses, sum(ops.calls.values())


def test_enabled_late_and_disabled():
    expected = train(build_net(torch.float64), batch("net", torch.float64))
    for report, losses, count in world(2).run(enabled_late_and_disabled):
        assert "taken over 0 of 2" in report and "DTensor, not a plain tensor: enable before fully_shard" in report
        assert worst(losses, expected) < TOLERANCE[torch.float64] and count == 0
