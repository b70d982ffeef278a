"""When the epilogue takes the large tile of a high rank, which computes the same; test_steps.py has its numbers."""

import dataclasses

import pytest
import torch

from dora_kernels import reference
from dora_kernels.planning import configs, devices
from tests.support.problem import Problem

kernels = pytest.importorskip("dora_kernels.kernels")


def _in_rows_of(tensor, width, offset=0):
    """The same numbers in rows of `width`, from `offset` on."""
    wide = tensor.new_full((len(tensor), width), torch.nan)
    wide[:, offset : offset + tensor.shape[1]] = tensor
    return wide[:, offset : offset + tensor.shape[1]]


@pytest.mark.parametrize(
    ("N", "R", "others", "expected"),
    [
        (80, 72, "", "epilogue_high_rank"),
        (80, 64, "", "epilogue"),
        (80, 68, "", "epilogue"),  # loads of 8 bytes
        (72, 72, "", "epilogue"),
        (80, 72, "residual", "epilogue"),
        (80, 72, "no low", "epilogue"),
        (80, 72, "wider base", "epilogue"),
        (80, 72, "base of 96", "epilogue_high_rank"),
        (80, 72, "base of 88", "epilogue"),
        (80, 72, "base by columns", "epilogue"),
        (80, 72, "low of 80", "epilogue_high_rank"),
        (80, 72, "low of 140", "epilogue"),
        (80, 72, "low of 80 from 1", "epilogue"),
        (80, 72, "low by twos", "epilogue"),
        (80, 72, "lora_B of 76", "epilogue"),
    ],
)
def test_the_large_tile_of_a_high_rank_is_for_what_fits_its_registers(N, R, others, expected, monkeypatch):
    dtype, config_for, used = torch.float32, configs.config_for, []
    monkeypatch.setattr(configs, "config_for", lambda kernel, *rest: used.append(kernel) or config_for(kernel, *rest))
    problem = Problem.random(33, N, 24, R, dtype)
    facts = dataclasses.replace(devices.device_facts(problem.x.device), multiprocessors=1)  # which one tile fills
    monkeypatch.setattr(devices, "device_facts", lambda device: facts)
    operands = {"base": problem.x @ problem.weight.T, "low": problem.x @ problem.lora_A.T, "lora_B": problem.lora_B}
    residual = problem.dy if others == "residual" else None
    name, _, change = others.partition(" ")
    if others == "no low":
        operands["low"] = None
    elif others == "wider base":
        operands |= {name: operands[name].to(torch.bfloat16) for name in ("low", "lora_B")}
    elif change == "by columns":
        operands[name] = operands[name].T.contiguous().T
    elif change == "by twos":
        operands[name] = operands[name].repeat_interleave(2, dim=1)[:, ::2]
    elif change:
        operands[name] = _in_rows_of(operands[name], *(int(word) for word in change.split() if word.isdigit()))
    arguments = (*operands.values(), problem.magnitude, problem.bias, 0.75, dtype, residual)
    torch.testing.assert_close(kernels.epilogue(*arguments), reference.epilogue(*arguments), rtol=1e-4, atol=1e-4)
    assert used[-1] == expected


@pytest.mark.parametrize(
    ("M", "N", "multiprocessors", "expected"),
    [
        (33, 80, 4, "epilogue_high_rank"),
        (33, 80, 5, "epilogue"),  # 2 x 2 tiles of 32 x 64
        (32, 80, 4, "epilogue"),
        (1, 256, 4, "epilogue_high_rank"),
    ],
)
def test_the_large_tile_of_a_high_rank_is_for_what_fills_the_device(M, N, multiprocessors, expected, monkeypatch):
    problem = Problem.random(M, N, 24, 72, torch.float32)
    facts = dataclasses.replace(devices.device_facts(problem.x.device), multiprocessors=multiprocessors)
    config, used = configs.CONFIGS["interpreter", 4]["epilogue_high_rank"], []
    monkeypatch.setattr(devices, "device_facts", lambda device: facts)
    monkeypatch.setattr(configs, "config_for", lambda kernel, *rest: used.append(kernel) or config)
    arguments = (problem.dy, problem.x @ problem.lora_A.T, problem.lora_B, problem.magnitude, None, 0.75, torch.float32)
    torch.testing.assert_close(kernels.epilogue(*arguments), reference.epilogue(*arguments), rtol=1e-4, atol=1e-4)
    assert used[-1] == expected
