"""Random adapters, written in a format and read again."""

import torch

from dora_kernels.extras.convert import FORMATS, DoraAdapter, decode, encode
from dora_kernels.extras.convert.files import load, save

N, K, R = 6, 10, 4
WEIGHTS = "adapter_model.safetensors"
ROWS = [name for name in FORMATS if name != "comfy"]  # formats whose norms are over rows
PAIRS = [(source, target) for source in ROWS for target in ROWS]
CONV = ("peft", "lycoris", "comfy", "diffusers")
ONE = ("fsdp_qlora", "ai-toolkit")  # formats whose scaling is 1
# formats that do not leave a layer's bias as it is
BIAS = {"torchtune": "scaled", "fsdp_qlora": "scaled", "megatron-bridge": "either"}
MIXED = ("peft", "lycoris", "dora_kernels", "diffusers")  # formats in which layers may differ in rank and alpha


def adapter(module="layers.0.mlp.w1", scaling=2.0, dtype=torch.float32, seed=0, kernel=(), rank=R, axis="out"):
    """A random adapter with lora_B of the weight's size and gains far from 1."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    magnitude = 3 * normal(N if axis == "out" else K).abs() + 1
    return DoraAdapter(
        module,
        normal(rank, K, *kernel),
        normal(N, rank, *(1,) * len(kernel)),
        magnitude.float(),  # another dtype than lora_A's, where that is not float32
        scaling,
        axis,
    )


def several(dtype=torch.float32, scaling=2.0, axis="out"):
    # a module within another, whose keys sort before the other's
    names = ("layers.0.mlp.a", "layers.0.mlp", "layers.10.mlp.w1", "layers.2.mlp.w1")
    return [adapter(name, scaling, dtype, seed, axis=axis) for seed, name in enumerate(sorted(names))]


def axis_of(name):
    """The axis that a format has, or its first."""
    return "out" if name in ROWS else "in"


def written(tmp_path, name, adapters):
    path = tmp_path / f"as-{name}"
    save(FORMATS[name], encode(FORMATS[name], adapters), path)
    return path


def reread(path, name, alpha=None):
    return decode(FORMATS[name], load(FORMATS[name], path), alpha)


def assert_same(ours, theirs):
    assert [a.module for a in ours] == [b.module for b in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.scaling == b.scaling and a.norm_axis == b.norm_axis
        for name in ("lora_A", "lora_B", "magnitude"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y), (a.module, name)
