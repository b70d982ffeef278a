"""Small PEFT models and their batches, split over ranks, for the tests of distributed engines."""

import contextlib

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.peft_problem import Net, adapt, layers

STEPS = 20
ROWS = 16
"""Of a whole batch: what 4 ranks can share, in 2 parts each."""
VOCABULARY = 48


class Logits(nn.Module):
    """A Llama whose output is its logits, so that it trains as Net does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(input_ids=tokens, use_cache=False).logits


def build_net(dtype=torch.float32, **config):
    """A PEFT model over two linear layers."""
    torch.manual_seed(0)
    return adapt(Net().to(dtype), **config)


def build_llama(dtype=torch.float32, **config):
    """A PEFT model over a Llama with two blocks, 32 wide."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(dtype)
    return adapt(Logits(model), target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], **config)


def blocks(model):
    """The modules that an engine shards one by one: the blocks of a Llama, or the layers."""
    found = [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]
    return found or layers(model)


def fsdp2(model):
    """The layers, or the blocks of a Llama, and the rest: base and adapters are sharded."""
    for block in blocks(model):
        fully_shard(block)
    return fully_shard(model)


def batch(kind, dtype, rank=0, size=1):
    """Inputs and targets of this rank: its rows of one batch."""
    generator = torch.Generator().manual_seed(1)
    if kind == "net":
        inputs = torch.randn(ROWS, 24, generator=generator, dtype=torch.float64).to(dtype)
        targets = torch.randn(ROWS, 20, generator=generator, dtype=torch.float64).to(dtype)
    else:
        inputs = torch.randint(VOCABULARY, (ROWS, 6), generator=generator)
        targets = torch.randint(VOCABULARY, (ROWS, 6), generator=generator)
    share = ROWS // size
    return inputs[rank * share :][:share], targets[rank * share :][:share]


def loss_of(output, targets):
    if targets.dtype == torch.int64:
        return nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten())
    return nn.functional.mse_loss(output.to(targets.dtype), targets)


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model, data, *, called=None, optimizer=None, steps=STEPS, accumulate=1):
    """The loss of each step over all ranks. With accumulate, a step takes its batch in so many parts."""
    called, optimizer = called or model, optimizer or optimizer_of(model)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0
        parts = list(zip(*(tensor.chunk(accumulate) for tensor in data), strict=True))
        for part, (inputs, targets) in enumerate(parts):
            with synchronised(called, last=part == len(parts) - 1):
                loss = loss_of(called(inputs), targets) / len(parts)
                loss.backward()
            total = total + loss.detach()
        optimizer.step()
        if distributed.is_initialized():
            distributed.all_reduce(total)
            total = total / distributed.get_world_size()
        losses.append(total.item())
    return losses


@contextlib.contextmanager
def synchronised(called, last):
    """Gradients are reduced over the ranks in the last part alone."""
    if hasattr(called, "set_requires_gradient_sync"):
        called.set_requires_gradient_sync(last)
    without = contextlib.nullcontext() if last or not hasattr(called, "no_sync") else called.no_sync()
    with without:
        yield


def worst(values, expected):
    """The largest relative difference."""
    return max(abs(value - other) / abs(other) for value, other in zip(values, expected, strict=True))
