"""Presets of the demo's model and its training, and the options of the command line."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dora_kernels.files import writing

if TYPE_CHECKING:
    import torch

WARM_UP_STEPS = 3
"""Steps left out of the median time: kernels compile and allocators grow in the first ones."""


@dataclass(frozen=True)
class Preset:
    """A Llama model and its training. dtype: torch's name of the frozen base's on a GPU, with autocast; a CPU takes
    float32.
    """

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    sequence: int
    batch: int
    base_steps: int
    steps: int
    base_rate: float
    rate: float
    rank: int = 16
    dtype: str = "float32"


PRESETS = {
    "tiny": Preset(
        hidden=256,
        layers=4,
        intermediate=704,  # in whole blocks of 64: bitsandbytes decodes some other widths wrongly on a CPU
        heads=4,
        kv_heads=2,
        sequence=128,
        batch=8,
        base_steps=120,
        steps=60,
        base_rate=1e-3,
        # Not more: at 3e-3 stock PEFT drifts 1e-3 away from stock PEFT started one float32 ulp apart.
        rate=1e-3,
    ),
    # The layer shapes of Llama-3.2-1B. Its base is trained in float32: 16 bytes per weight, about 16 GB.
    "llama-1b": Preset(
        hidden=2048,
        layers=16,
        intermediate=8192,
        heads=32,
        kv_heads=8,
        sequence=512,
        batch=8,
        base_steps=100,
        steps=60,
        base_rate=1e-4,
        rate=1e-4,
        dtype="bfloat16",
    ),
}


METHODS = {"dora": "DoRA", "dvora": "DVoRA"}
"""The method of fine-tuning: PEFT's DoRA, or DVoRA, which PEFT does not have (dvora.py)."""

VERA_RANK = 3
"""DVoRA's rank over the preset's: it costs R numbers a layer, not R (N + K). 48 over K = 256 keeps the norm's terms."""


BASES = ("dense", "nf4")
"""The frozen weights: as they were trained, or bitsandbytes' NF4, nested."""


@dataclass(frozen=True)
class Settings:
    """The options of the command line. ValueError where this machine cannot run them; torch is imported last."""

    preset: str = "tiny"
    method: str = "dora"
    base: str = "dense"
    device: str = "auto"
    backend: str = "auto"
    steps: int | None = None
    seed: int = 0
    out: str = "demo.png"

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"demo: preset is {self.preset!r}; expected one of {', '.join(PRESETS)}")
        if self.method not in METHODS:
            raise ValueError(f"demo: method is {self.method!r}; expected one of {', '.join(METHODS)}")
        if self.base not in BASES:
            raise ValueError(f"demo: base is {self.base!r}; expected one of {', '.join(BASES)}")
        if self.base == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("demo: base is 'nf4' but bitsandbytes is not installed; expected pip install bitsandbytes")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"demo: device is {self.device!r}; expected auto, cpu or cuda")
        if self.steps is not None and self.steps <= WARM_UP_STEPS:
            raise ValueError(f"demo: steps is {self.steps}; expected more than {WARM_UP_STEPS}, the warm-up")
        writing.check_target("demo", "out", self.out)
        if Path(self.out).suffix != ".png":
            raise ValueError(f"demo: out is {self.out!r}; expected a name that ends in .png")
        self._check_device()

    def _check_device(self) -> None:
        import torch

        from dora_kernels.planning import devices

        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("demo: device is 'cuda' but torch sees no CUDA device; expected auto or cpu")
        devices.backend_for(self.backend, self.torch_device, self.dtype)

    @property
    def torch_device(self) -> torch.device:
        import torch

        available = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(available if self.device == "auto" else self.device)

    @property
    def rank(self) -> int:
        return PRESETS[self.preset].rank * (VERA_RANK if self.method == "dvora" else 1)

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, "float32" if self.torch_device.type == "cpu" else PRESETS[self.preset].dtype)
