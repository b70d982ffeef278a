"""A model and an adapter of it on disk, of one layer, and the commands that read them."""

import json
from pathlib import Path

import torch


def write_checkpoints(folder: Path) -> dict[str, list[str]]:
    """Make `adapter` and `base.safetensors` in a folder. Returns the arguments of commands that are run in it."""
    from safetensors.torch import save_file

    (folder / "adapter").mkdir()
    shapes = {"lora_A.weight": (2, 8), "lora_B.weight": (8, 2), "lora_magnitude_vector": (8,)}
    tensors = {f"base_model.model.a.q_proj.{name}": torch.rand(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": ["q_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a.q_proj.weight": torch.rand(8, 8)}, folder / "base.safetensors")
    return {
        "info": ["info"],
        "check": ["check", "--json", "check.json"],
        "convert": ["convert", "adapter", "out", "--from", "peft", "--to", "lycoris", "--no-bias"],
        "merge": ["merge", "base.safetensors", "adapter", "out", "--check"],
        "analyze": ["analyze", "base.safetensors", "adapter", "--json", "analysis.json"],
        "demo": ["demo", "--steps", "4"],
        "check of peft": ["check", "--layer", "peft", "--json", "check.json"],
    }
