"""Small models with every kind of layer that enable() takes over from PEFT and whose numbers float64 can have too."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

WIDTH, HIDDEN, KEYS, TOKENS = 12, 20, 8, 11


def normal(shape: torch.Size | tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers; up to rounding the same ones in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


class Block(nn.Module):
    """A block of Llama: an attention whose q, k and v read one x, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, KEYS, bias=False)
        self.v_proj = nn.Linear(WIDTH, KEYS, bias=False)
        self.o_proj = nn.Linear(KEYS, WIDTH, bias=False)
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        x = F.rms_norm(h, (WIDTH,))
        q, k, v = self.q_proj(x)[..., :KEYS], self.k_proj(x), self.v_proj(x)
        h = h + self.o_proj(torch.softmax(q @ k.mT / KEYS**0.5, dim=-1) @ v)
        x = F.rms_norm(h, (WIDTH,))
        return h + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Others(nn.Module):
    """The other kinds of layers, on an image of 3 x 4 x 4: convolutions, GPT-2's Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, stride=2)
        self.point = nn.Conv1d(6, 10, 1)
        self.c_attn = Conv1D(WIDTH, 10)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        h = torch.tanh(
            self.point(torch.tanh(self.conv(image)).flatten(2))
        ).mT.contiguous()  # PEFT's Conv1D takes no other
        return self.c_proj(torch.tanh(self.c_attn(h)))


class Net(nn.Module):
    """Tokens and an image through `blocks` blocks. checkpointing: None, or use_reentrant of torch's checkpoint."""

    def __init__(self, blocks: int, others: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(TOKENS, WIDTH)
        self.others = Others() if others else None
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.checkpointing: bool | None = None
        self.register_buffer("shift", torch.full((WIDTH,), 0.1))

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        seen = image.mean() if self.others is None else self.others(image)
        h = self.embed_tokens(ids) + seen + self.shift
        for block in self.blocks:
            if self.checkpointing is None or not torch.is_grad_enabled():
                h = block(h)
            else:
                h = checkpoint(block, h, use_reentrant=self.checkpointing)
        return h


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL = (*LINEAR, "embed_tokens", "conv", "point", "c_attn", "c_proj")


@dataclass(frozen=True)
class Kind:
    """A model to walk with. dropout: of the first adapter; wide: half precision's adapters are float32."""

    blocks: int
    others: bool
    dtype: torch.dtype
    dropout: float
    wide: bool
    backend: str
    seed: int

    @classmethod
    def draw(cls, seed: int, backend: str | None = None) -> Kind:
        """The model of one walk. Half of them are float32, where a stale number shows best."""
        draw = random.Random(seed)
        drawn = "triton" if draw.random() < 0.08 else "reference"
        backend = backend or drawn
        others = draw.random() < 0.5
        dtypes = [torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
        return cls(
            blocks=1 if backend == "triton" else draw.randint(1, 2),
            others=others,
            dtype=draw.choice(dtypes),
            dropout=draw.choice([0.0, 0.0, 0.4]),
            # PEFT's convolutions refuse an input that dropout has left in another dtype than the base's
            wide=not others and draw.random() < 0.5,
            backend=backend,
            seed=seed,
        )

    def build(self) -> PeftModel:
        """A stock PEFT model in train mode with one adapter, "a0"."""
        torch.manual_seed(self.seed % 2**32)
        draw = random.Random(self.seed)
        net = Net(self.blocks, self.others).to(self.dtype)
        config = lora_config(draw, self.others, dropout=self.dropout, use_dora=True)
        model = get_peft_model(net, config, adapter_name="a0", autocast_adapter_dtype=self.wide)
        randomise(model, "a0", self.seed)
        return model.train()


def lora_config(draw: random.Random, others: bool, *, dropout: float, use_dora: bool) -> LoraConfig:
    """An adapter on all layers or on most of them."""
    targets = [name for name in ALL if others or name in LINEAR or name == "embed_tokens"]
    for _ in range(draw.choice([0, 0, 0, 3])):
        targets.remove(draw.choice(targets))
    rslora = draw.random() < 0.3
    return LoraConfig(
        r=draw.randint(1, 6), lora_alpha=draw.randint(2, 7), target_modules=targets, lora_dropout=dropout,
        use_dora=use_dora, use_rslora=rslora,
    )  # fmt: skip


def of_adapter(model: nn.Module, name: str | None = None) -> list[tuple[str, nn.Parameter]]:
    """The parameters of one adapter, or of all, by name."""
    found = [(path, p) for path, p in model.named_parameters() if "lora_" in path]
    return [(path, p) for path, p in found if name is None or name in path.split(".")]


def new_numbers(path: str, parameter: Tensor, seed: int) -> Tensor:
    """Values as a trained adapter has: B is not 0, s B A about as large as W, and gains far from 1."""
    noise = normal(parameter.shape, seed, torch.float64)
    if "magnitude" in path:
        return (0.7 + 0.6 * noise.tanh().abs()).to(parameter.dtype)
    return (0.3 * noise).to(parameter.dtype)


def randomise(model: nn.Module, name: str, seed: int) -> None:
    """Give an adapter's parameters `new_numbers`."""
    for i, (path, parameter) in enumerate(of_adapter(model, name)):
        parameter.data.copy_(new_numbers(path, parameter, seed + i))


def inputs(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(ids (2, 4), image (2, 3, 4, 4)) for Net."""
    ids = torch.randint(TOKENS, (2, 4), generator=torch.Generator().manual_seed(seed))
    return ids, normal((2, 3, 4, 4), seed, dtype)
