"""A whole model for bench.host: a Llama of two blocks with adapters on each of its linear layers."""

from __future__ import annotations

import functools

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

import dora_kernels
from bench.lib.host_layers import Case, K, M, N, R, problem_of
from bench.lib.problem import SCALING, LayerProblem, TimedLayer

BLOCKS = 2
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _problem() -> LayerProblem:
    """x and dy of the model: one sequence of embeddings, and the gradient of its hidden states."""
    problem = problem_of("bf16")
    problem.x = problem.x.detach()[None].requires_grad_()
    problem.dy = torch.randn(problem.x.shape, generator=torch.Generator().manual_seed(1)).to(problem.x.dtype)
    return problem


def _llama() -> LlamaModel:
    config = LlamaConfig(
        hidden_size=K,
        intermediate_size=N,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=M,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaModel(config).to(torch.bfloat16).requires_grad_(False)


def _frozen(problem: LayerProblem) -> TimedLayer:
    """The model without adapters."""
    return _timed(_llama(), "frozen")


def _adapted(problem: LayerProblem, use_dora: bool, ours: bool = False) -> TimedLayer:
    """PEFT's model; ours: after enable()."""
    config = peft.LoraConfig(r=R, lora_alpha=SCALING * R, target_modules=list(TARGETS), use_dora=use_dora)
    model = peft.get_peft_model(_llama(), config, autocast_adapter_dtype=False)
    if ours:
        report = dora_kernels.enable(model)
        if len(report.taken_over) != BLOCKS * len(TARGETS) or report.left_alone:
            raise RuntimeError(f"bench.lib.host_models: {report}; expected every layer to be taken over")
    return _timed(model, "dora" if use_dora else "lora", ours)


def _timed(model: nn.Module, computes: str, ours: bool = False) -> TimedLayer:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return TimedLayer(lambda x: model(inputs_embeds=x)[0], trained, computes, ours, model)


LLAMA = Case(
    _problem,
    {
        "nn.Linear": _frozen,
        "PEFT LoRA": functools.partial(_adapted, use_dora=False),
        "PEFT DoRA": functools.partial(_adapted, use_dora=True),
        "enabled PEFT layer": functools.partial(_adapted, use_dora=True, ours=True),
    },
    calls=2,
)
"""Two calls in a reading: one takes as long as twenty of a layer."""
