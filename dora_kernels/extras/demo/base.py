"""The demo's base model, trained from random weights, and the text that it and the fine-tuning read."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dora_kernels.extras.demo.settings import Preset

BASE_TEXT = ("*.py",)
TUNING_TEXT = ("asyncio/*.py", "email/*.py")
"""Globs under the standard library's folder: the base model never sees what it is fine-tuned on."""


def trained_base(
    preset: Preset, device: torch.device, dtype: torch.dtype, seed: int, progress: Progress
) -> LlamaForCausalLM:
    """A Llama trained from random weights for preset.base_steps, in float32 weights, then cast to dtype."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,  # bytes
            hidden_size=preset.hidden,
            num_hidden_layers=preset.layers,
            intermediate_size=preset.intermediate,
            num_attention_heads=preset.heads,
            num_key_value_heads=preset.kv_heads,
            max_position_embeddings=preset.sequence,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=preset.base_rate)
    batches = sample(standard_library(BASE_TEXT), preset, preset.base_steps, seed)
    bar = progress.add_task("training the base", total=preset.base_steps, status="")
    for ids in batches:
        loss = loss_of(model, ids.to(device), dtype)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.update(bar, advance=1, status=f"loss {loss.item():.3f}")
    return model.to(dtype)


def pack(model: LlamaForCausalLM) -> None:
    """Replace every linear layer but the head by bitsandbytes' Linear4bit of the same weight, as transformers loads it.

    The compute dtype is that of the weight.
    """
    import bitsandbytes

    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            sizes = (linear.in_features, linear.out_features)
            weight = linear.weight.detach()
            packed = bitsandbytes.nn.Linear4bit(*sizes, False, weight.dtype, quant_type="nf4", device="meta")
            packed.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=packed)
            model.model.set_submodule(name, packed.to(weight.device))
    model.is_loaded_in_4bit = True  # PEFT chooses its layer classes by it


def standard_library(patterns: tuple[str, ...]) -> Tensor:
    """The bytes of the standard library's source files that match, in a fixed order: (length,) uint8."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    if not paths:
        raise RuntimeError(f"demo: no {patterns} in {folder}; expected the standard library's source")
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in paths)), dtype=torch.uint8)


def sample(text: Tensor, preset: Preset, count: int, seed: int) -> list[Tensor]:
    """Random windows of `text` as token ids: `count` batches (batch, sequence) int64."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - preset.sequence, (count, preset.batch, 1), generator=generator)
    return list(text[starts + torch.arange(preset.sequence)].long())


def loss_of(model: torch.nn.Module, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean next-byte cross-entropy; matrix products in `dtype` where that is a half precision."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model(input_ids=ids, labels=ids).loss
