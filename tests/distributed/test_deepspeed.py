"""DeepSpeed's ZeRO under an enabled model: a stand-in for ZeRO-3's weights, and DeepSpeed itself where installed."""

import collections
import os
import sys

import pytest
import torch

pytest.importorskip("peft")

import dora_kernels  # noqa: E402
from dora_kernels import ops, reuse  # noqa: E402
from dora_kernels.planning import devices  # noqa: E402
from tests.support.distributed_problem import STEPS, batch, build_llama, build_net, loss_of, train, worst  # noqa: E402
from tests.support.peft_problem import calls, layers  # noqa: E402
from tests.support.process_worlds import World  # noqa: E402


class Gathering(collections.OrderedDict):
    """A module's parameters as ZeRO-3 keeps them: empty, and whole from a read in a forward on.

    Without reads_gather that is so of the adapters alone; the base weight is gathered by its module's call.
    """

    in_forward = False
    reads_gather = True

    def __getitem__(self, name):
        parameter = super().__getitem__(name)
        if parameter is not None and Gathering.in_forward and (Gathering.reads_gather or parameter.requires_grad):
            gather(parameter)
        return parameter


def gather(parameter):
    parameter.data = parameter.whole.clone()


def partition(model):
    """Every parameter empty; hooks on every module that gather its own. Those of the model end by releasing all."""

    def before(module, inputs):
        for parameter in dict(module._parameters).values():
            if parameter is not None:
                gather(parameter)

    def start(module, inputs):
        Gathering.in_forward = True

    def finish(module, inputs, output):
        Gathering.in_forward = False

    before.__module__ = "deepspeed.runtime.zero.parameter_offload"
    for parameter in model.parameters():
        parameter.whole, parameter.ds_status = parameter.data, 0
        parameter.data = parameter.data.new_empty(0)
    for module in model.modules():
        module._parameters = Gathering(module._parameters)
        module.register_forward_pre_hook(before)
    model.register_forward_pre_hook(start)
    model.register_forward_hook(finish)


@pytest.mark.parametrize("reads_gather", (True, False), ids=("gathered", "not gathered"))
def test_partitioned_weights(reads_gather, monkeypatch):
    monkeypatch.setattr(Gathering, "reads_gather", reads_gather)
    monkeypatch.setattr(devices, "_logged", set())
    stock = build_net(torch.float64)
    model = build_net(torch.float64)
    partition(model)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    assert len(dora_kernels.enable(model).taken_over) == 2  # a model is partitioned before it can be enabled
    inputs, targets = batch("net", torch.float64)
    ops.calls.clear()
    for one in (stock, model):
        loss_of(one(inputs), targets).backward()
    assert calls("forward") == (2 if reads_gather else 0)
    assert devices._logged == (
        set() if reads_gather else {"dora_kernels: a call went to PEFT: DeepSpeed ZeRO-3 has not gathered a weight"}
    )
    gradients = [[p.grad for p in one.parameters() if p.requires_grad] for one in (model, stock)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_nothing_is_kept_of_partitioned_weights():
    model = build_net(torch.float64).eval()
    partition(model)
    dora_kernels.enable(model)
    ops.calls.clear()
    with torch.no_grad(), dora_kernels.frozen_adapters(model):
        model(batch("net", torch.float64)[0])
        assert calls("forward") == 2
        assert not any(layer in reuse.store.by_layer for layer in layers(model))


def test_somebody_else_s_hooks_go_to_peft():
    model = build_net(torch.float64)
    partition(model)
    dora_kernels.enable(model)
    for layer in layers(model):
        layer.base_layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    ops.calls.clear()
    model(batch("net", torch.float64)[0])
    assert calls("forward") == 0


def zero(rank, size, kind, stage, half, ours, persistent):
    """Losses of DeepSpeed's engine, and the calls of our forward."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "DS_ACCELERATOR": "cpu"}
    import deepspeed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # it compiles C++ for a minute
    model = {"net": build_net, "llama": build_llama}[kind]()
    if ours:
        dora_kernels.enable(model)
    inputs, targets = batch(kind, torch.float32, rank, size)
    config = {
        "train_micro_batch_size_per_gpu": len(inputs),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": persistent},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": half},
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    inputs = inputs.bfloat16() if half and kind == "net" else inputs
    losses = []
    ops.calls.clear()
    for _ in range(STEPS):
        loss = loss_of(engine(inputs), targets)
        engine.backward(loss)
        engine.step()
        loss = loss.detach().clone()
        torch.distributed.all_reduce(loss)
        losses.append(loss.item() / size)
    return losses, calls("forward")


def in_new_processes(check, *arguments):
    """A process does not survive several engines of DeepSpeed's."""
    ranks = World(2)
    try:
        return ranks.run(check, *arguments)
    finally:
        ranks.kill()


@pytest.mark.nightly
@pytest.mark.parametrize("half", (False, True), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("stage, persistent", ((2, 0), (3, 0), (3, 10**5)))
@pytest.mark.parametrize("kind", ("net", "llama"))
def test_zero(kind, stage, persistent, half):
    pytest.importorskip("deepspeed")
    build = {"net": build_net, "llama": build_llama}[kind]
    exact = train(build(torch.float64), batch(kind, torch.float64))
    count = STEPS * len(layers(build()))
    results = in_new_processes(zero, kind, stage, half, True, persistent)
    stock = in_new_processes(zero, kind, stage, half, False, persistent)[0][0] if half else exact
    for losses, ran in results:
        assert ran == count
        limit = 2 * worst(stock, exact) + 2**-9 if half else 3e-6
        assert worst(losses, exact) < limit
