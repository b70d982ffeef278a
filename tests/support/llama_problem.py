"""A small Llama with DoRA adapters, taken over: attention, a gated MLP and seven DoRA layers in each of its layers."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.peft_problem import enabled, randomise
from tests.support.problem import DEVICE


def stock_llama(layers=1, **config):
    """With PEFT's own layers, in train mode."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False)).to(DEVICE)
    settings = {"use_dora": True, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 5} | config
    model = get_peft_model(base, LoraConfig(**settings))
    randomise(model)
    return model.train()


def llama(layers=1, **config):
    return enabled(stock_llama(layers, **config))


def step(model, ids, call=None):
    """The loss and every gradient of one training step, by name."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = (model if call is None else call)(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
