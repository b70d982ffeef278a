"""A run under fully_shard that is killed goes on from its sharded checkpoint, in new processes, to the same losses."""

import time
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

pytest.importorskip("peft")

import dora_kernels  # noqa: E402
from tests.support.distributed_problem import VOCABULARY, build_llama, fsdp2, loss_of, optimizer_of  # noqa: E402
from tests.support.peft_problem import calls, layers  # noqa: E402
from tests.support.process_worlds import World, world  # noqa: E402

STEPS, SAVED_AT, KILLED_FROM = 20, 8, 11
ROWS = 8
ENDLESS = 10**6
ADAPTERS = StateDictOptions(ignore_frozen_params=True)  # the base is what it was loaded from


def tokens(step, rank, size):
    generator = torch.Generator().manual_seed(1000 + step)
    drawn = torch.randint(VOCABULARY, (2, ROWS, 6), generator=generator)
    return drawn[:, rank * ROWS // size :][:, : ROWS // size]


def run(rank, size, folder, first, last, dropout):
    """Train from step `first`, of which the folder has the checkpoint, to `last`; every loss goes to a file at once."""
    model = build_llama(lora_dropout=dropout)
    report = dora_kernels.enable(model)
    assert len(report.taken_over) == len(layers(model)) > 0
    fsdp2(model)
    optimizer = optimizer_of(model)
    if first > 0:
        load(model, optimizer, folder)
    before = calls("forward")
    for step in range(first, last):
        torch.manual_seed(step * size + rank)  # for the dropout
        inputs, targets = tokens(step, rank, size)
        loss = loss_of(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        distributed.all_reduce(total)
        if rank == 0:
            with open(folder / f"losses-from-{first}", "a") as file:
                print((total / size).item().hex(), file=file)
        if step + 1 == SAVED_AT and first == 0:
            save(model, optimizer, folder)
    return calls("forward") - before


def save(model, optimizer, folder):
    weights, state = get_state_dict(model, optimizer, options=ADAPTERS)
    assert not any("base_layer" in name for name in weights)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")


def load(model, optimizer, folder):
    weights, state = get_state_dict(model, optimizer, options=ADAPTERS)
    saved = {"model": weights, "optimizer": state}
    checkpoint.load(saved, checkpoint_id=folder / "checkpoint")
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    arguments = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"], "options": options}
    set_state_dict(model, optimizer, **arguments)


def losses(folder, first):
    path = folder / f"losses-from-{first}"
    return [float.fromhex(line) for line in path.read_text().split()] if path.exists() else []


def kill_in_the_middle(folder: Path, dropout, seconds=120):
    """Start an endless run in new processes, and SIGKILL all of them when it is past its checkpoint."""
    doomed = World(2)
    doomed.start(run, folder, 0, ENDLESS, dropout)
    deadline = time.monotonic() + seconds
    while len(losses(folder, 0)) < KILLED_FROM:
        assert time.monotonic() < deadline and all(process.is_alive() for process in doomed.processes)
        time.sleep(0.01)
    doomed.kill()
    assert [process.exitcode for process in doomed.processes] == [-9, -9]


@pytest.mark.parametrize("dropout", (0.1,))
def test_a_killed_run_ends_with_the_losses_of_one_that_was_not(dropout, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    forwards = world(2).run(run, whole, 0, STEPS, dropout)
    expected = losses(whole, 0)
    assert len(expected) == STEPS and len(set(expected)) == STEPS
    assert forwards == [STEPS * 8] * 2  # four layers in each of two blocks

    kill_in_the_middle(killed, dropout)
    assert losses(killed, 0)[:KILLED_FROM] == expected[:KILLED_FROM]
    shards = sorted(path.name for path in (killed / "checkpoint").glob("*.distcp"))
    assert [name[:4] for name in shards] == ["__0_", "__1_"]  # a file of each rank

    resumed = World(2)
    try:
        resumed.run(run, killed, SAVED_AT, STEPS, dropout)
    finally:
        resumed.kill()
    assert losses(killed, SAVED_AT) == expected[SAVED_AT:]  # to the bit


@pytest.mark.nightly
def test_a_checkpoint_of_two_ranks_goes_on_with_four(tmp_path):
    world(2).run(run, tmp_path, 0, STEPS, 0.0)
    world(4).run(run, tmp_path, SAVED_AT, STEPS, 0.0)
    torch.testing.assert_close(losses(tmp_path, SAVED_AT), losses(tmp_path, 0)[SAVED_AT:], rtol=3e-6, atol=0)
