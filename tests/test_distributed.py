"""An enabled PEFT model under PyTorch's own engines: ours computes, and the losses are those of one process.

Each check runs on every rank of a world of real processes (tests/distributed.py). A rank trains on its share of the
batch; the expected losses are stock PEFT's, in one process, on the whole batch.
"""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("peft")


import dora_kernels  # noqa: E402
from dora_kernels import launch, ops  # noqa: E402
from tests.distributed import world  # noqa: E402
from tests.distributed_problem import (  # noqa: E402
    STEPS,
    batch,
    blocks,
    build_llama,
    build_net,
    train,
    worst,
)
from tests.peft_problem import calls, layers  # noqa: E402

SIZES = (2, pytest.param(4, marks=pytest.mark.nightly))
BUILD = {"net": build_net, "llama": build_llama}
# of losses over STEPS steps, relative
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-12}


# Each engine puts a model under it, and returns what is called.


def ddp(model, **arguments):
    return DistributedDataParallel(model, **arguments)


def fsdp2(model):
    """The layers, or the blocks of a Llama, and the rest: base and adapters are sharded."""
    for block in blocks(model):
        fully_shard(block)
    return fully_shard(model)


def fsdp2_whole(model):
    return fully_shard(model)


def fsdp2_kept_gathered(model):
    for block in blocks(model):
        fully_shard(block, reshard_after_forward=False)
    return fully_shard(model, reshard_after_forward=False)


def fsdp2_adapters(model):
    """The base is not sharded: every rank has all of it."""
    return fully_shard(model, ignored_params={p for p in model.parameters() if not p.requires_grad})


ENGINES = {
    "ddp": ddp,
    "ddp unused": lambda model: ddp(model, find_unused_parameters=True),
    "ddp static": lambda model: ddp(model, static_graph=True),
    "ddp views": lambda model: ddp(model, gradient_as_bucket_view=True),
    "fsdp2": fsdp2,
    "fsdp2 whole": fsdp2_whole,
    "fsdp2 kept gathered": fsdp2_kept_gathered,
    "fsdp2 adapters": fsdp2_adapters,
}


def losses_under(rank, size, engine, kind, dtype, accumulate):
    """Ours under the engine, the calls of our operators in it, and the messages of what went to PEFT."""
    model = BUILD[kind](dtype)
    report = dora_kernels.enable(model)
    assert len(report.taken_over) == len(layers(model)) > 0, str(report)
    called = ENGINES[engine](model)
    ops.calls.clear()
    launch._logged.clear()
    losses = train(model, batch(kind, dtype, rank, size), called=called, accumulate=accumulate)
    return losses, (calls("forward"), calls("backward")), sorted(launch._logged)


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
