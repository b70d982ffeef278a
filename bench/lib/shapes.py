"""The cases that are measured: layers of real models, the precisions people train in, and the M and R lists.

Letters: M tokens, N out features, K in features, R rank.
"""

import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LinearShape:
    """The weight (N, K) of one linear layer of a model."""

    model: str
    layer: str
    N: int
    K: int


# From the models' published config.json: hidden_size, intermediate_size, heads times head_dim, kv heads times head_dim.
# Qwen3-32B has more heads than hidden_size would hold, so q and o are not square there.
LAYERS = (
    LinearShape("Llama-3.2-1B", "q/o", 2048, 2048),
    LinearShape("Llama-3.2-1B", "k/v", 512, 2048),
    LinearShape("Llama-3.2-1B", "gate/up", 8192, 2048),
    LinearShape("Llama-3.2-1B", "down", 2048, 8192),
    LinearShape("Llama-3.1-8B", "q/o", 4096, 4096),
    LinearShape("Llama-3.1-8B", "k/v", 1024, 4096),
    LinearShape("Llama-3.1-8B", "gate/up", 14336, 4096),
    LinearShape("Llama-3.1-8B", "down", 4096, 14336),
    LinearShape("Qwen3-32B", "q", 8192, 5120),
    LinearShape("Qwen3-32B", "o", 5120, 8192),
    LinearShape("Qwen3-32B", "k/v", 1024, 5120),
    LinearShape("Qwen3-32B", "gate/up", 25600, 5120),
    LinearShape("Qwen3-32B", "down", 5120, 25600),
    LinearShape("Llama-3.1-70B", "q/o", 8192, 8192),
    LinearShape("Llama-3.1-70B", "k/v", 1024, 8192),
    LinearShape("Llama-3.1-70B", "gate/up", 28672, 8192),
    LinearShape("Llama-3.1-70B", "down", 8192, 28672),
)
# one token to decode, a short prompt, and batches of a few sequences
M_LIST = (1, 512, 2048, 8192, 32768)
# 8 and 16 are what tutorials take, 64 and 128 what large fine-tunes do, 384 the rank of the published DoRA benchmarks
R_LIST = (8, 16, 64, 128, 384)


def layer_names(N: int, K: int) -> list[str]:
    """The layers in LAYERS that have this weight shape."""
    return [f"{shape.model} {shape.layer}" for shape in LAYERS if (shape.N, shape.K) == (N, K)]


@dataclass(frozen=True)
class Precision:
    """The dtype of x and weight, the dtype of the adapter, and whether the step runs under autocast to `dtype`.

    base: "dense", or "nf4": bitsandbytes' Linear4bit, nested, in blocks of 64. What is LoRA over a dense base is QLoRA
    then, and DoRA QDoRA.
    """

    name: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    autocast: bool = False
    base: str = "dense"


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", torch.float32, torch.float32),
        Precision("bf16", torch.bfloat16, torch.bfloat16),
        # what PEFT makes of a bf16 model, in a trainer with bf16=True
        Precision("bf16-autocast", torch.bfloat16, torch.float32, autocast=True),
        Precision("fp16", torch.float16, torch.float16),
    )
}
QUANTIZED = {
    precision.name: precision
    for precision in (
        Precision("nf4-fp32", torch.float32, torch.float32, base="nf4"),
        Precision("nf4-bf16", torch.bfloat16, torch.bfloat16, base="nf4"),
        Precision("nf4-autocast", torch.bfloat16, torch.float32, autocast=True, base="nf4"),
    )
}


@dataclass(frozen=True)
class LayerCase:
    """One point of a grid: what every provider gets alike. dropout: the adapter's, in training."""

    M: int
    N: int
    K: int
    R: int
    precision: str
    device: str = "cpu"
    dropout: float = 0.0

    def __str__(self) -> str:
        return f"M={self.M} N={self.N} K={self.K} R={self.R} {self.precision}{self.variant and f' {self.variant}'}"

    @property
    def variant(self) -> str:
        """The difference from an ordinary case of the same sizes: dropout, or "" for none."""
        return f"dropout {self.dropout:g}" if self.dropout else ""


def sizes_of(text: str) -> tuple[tuple[int, int, int, int], str | None]:
    """((M, N, K, R), precision or None) of "8192x4096x4096x64" or "8192x4096x4096x64:bf16-fp32"."""
    sizes, _, precision = text.partition(":")
    M, N, K, R = map(int, sizes.split("x"))
    return (M, N, K, R), precision or None


def dropout_case(device: str = "cuda") -> LayerCase:
    """The core grid's first case with what many recipes drop."""
    sizes = (64, 256, 256, 16) if device == "cpu" else (8192, 4096, 4096, 64)
    return LayerCase(*sizes, "bf16", device, dropout=0.05)


def core_grid(device: str = "cuda") -> list[LayerCase]:
    """24 cases, those that say most first, in case the time runs out."""
    points = (
        # a large batch of one square layer, then the same of a larger one, and of a wide one at a high rank
        (8192, 4096, 4096, 64, "bf16"),
        (8192, 8192, 8192, 64, "bf16"),
        (8192, 14336, 4096, 384, "bf16"),
        # one token
        (1, 4096, 4096, 64, "bf16"),
        (1, 14336, 4096, 64, "bf16"),
        # down to a short prompt
        (512, 4096, 4096, 64, "bf16"),
        (2048, 4096, 4096, 64, "bf16"),
        (1024, 4096, 4096, 64, "bf16"),
        (4096, 4096, 4096, 64, "bf16"),
        # what a trainer with bf16=True runs
        (8192, 4096, 4096, 64, "bf16-autocast"),
        (8192, 14336, 4096, 384, "bf16-autocast"),
        (512, 4096, 4096, 64, "bf16-autocast"),
        # the smallest layer that is to be below PEFT's LoRA, other ranks, the norm at its most expensive
        (2048, 2048, 2048, 64, "bf16"),
        (8192, 8192, 8192, 384, "bf16"),
        (8192, 4096, 4096, 16, "bf16"),
        (8192, 4096, 4096, 384, "bf16"),
        # the other shapes of a block, and a very large one
        (8192, 4096, 14336, 64, "bf16"),
        (8192, 1024, 4096, 64, "bf16"),
        (8192, 28672, 8192, 64, "bf16"),
        (32768, 4096, 4096, 64, "bf16"),
        # a few sequences decoded at once
        (8, 4096, 4096, 64, "bf16"),
        (16, 4096, 4096, 64, "bf16"),
        # spot checks of the other dtypes
        (2048, 4096, 4096, 64, "fp16"),
        (2048, 4096, 4096, 64, "fp32"),
    )
    return [LayerCase(*point, device) for point in points]


def decode_grid(device: str = "cuda") -> list[LayerCase]:
    """A few tokens through the layers of Llama-3.1-8B."""
    shapes = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
    return [LayerCase(M, N, K, R, "bf16", device) for R in (64, 16) for N, K in shapes for M in (1, 8, 16)]


def full_grid(device: str = "cuda") -> list[LayerCase]:
    """Every layer with every M and R, in half precision; the core grid's other dtypes at its end."""
    weights = list(dict.fromkeys((shape.N, shape.K) for shape in LAYERS))
    cases = [
        LayerCase(M, N, K, R, precision, device)
        for precision in ("bf16", "bf16-autocast")
        for N, K in weights
        for M in M_LIST
        for R in R_LIST
    ]
    return cases + [case for case in core_grid(device) if case.precision in ("fp16", "fp32")]


def cpu_grid(device: str = "cpu") -> list[LayerCase]:
    """The cases that two cores can step in a few seconds."""
    shapes = ((1024, 1024), (2048, 2048), (4096, 4096), (4096, 1024), (1024, 4096))
    axes = itertools.product(("fp32", "bf16"), shapes, (64, 512, 2048), (8, 64))
    return [LayerCase(M, N, K, R, precision, device) for precision, (N, K), M, R in axes]


def qdora_grid(device: str = "cuda") -> list[LayerCase]:
    """A 4-bit base: on a GPU the layer that the target is for, as two trainers run it, and shapes of Llama-3.1-8B."""
    if device == "cpu":
        points = ((64, 1024, 1024, 16), (512, 1024, 1024, 16), (512, 4096, 4096, 64))
        return [LayerCase(*point, precision, device) for point in points for precision in QUANTIZED]
    points = ((8192, 4096, 4096, 64), (8192, 14336, 4096, 64), (8192, 4096, 14336, 64), (512, 4096, 4096, 64))
    return [LayerCase(*point, precision, device) for point in points for precision in ("nf4-bf16", "nf4-autocast")]


GRIDS = {"core": core_grid, "cpu": cpu_grid, "decode": decode_grid, "full": full_grid, "qdora": qdora_grid}
# M, N, K, R at which all ways of a layer are measured, most telling first: the square layer; a wide one; a high rank; a
# larger one; a long reduction, where one GEMM for all is predicted not to pay; fewer tokens; a low rank
WAY_SHAPES = (
    (8192, 4096, 4096, 64),
    (8192, 14336, 4096, 64),
    (8192, 4096, 4096, 384),
    (8192, 8192, 8192, 64),
    (8192, 4096, 14336, 16),
    (2048, 4096, 4096, 64),
    (8192, 4096, 4096, 16),
)
