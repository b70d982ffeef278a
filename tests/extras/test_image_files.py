"""Files of image-model tools: what each tool computes of them, before and after a conversion."""

from dataclasses import replace

import pytest
import torch

from tests.support import image_files as files
from tests.support.image_files import CONV, LINEAR, definition, trained
from tests.support.image_readers import READERS, Unread

pytest.importorskip("peft")
pytest.importorskip("diffusers")
pytest.importorskip("lycoris", exc_type=ImportError)

CLOSE = 1e-13  # of float64; the gains are off by tenths at least, and LyCORIS' eps is 2e-16 there
PLAIN = (LINEAR[1], CONV[2])
SAVES = {
    "PEFT": files.save_peft,
    "diffusers model": files.save_diffusers_model,
    "diffusers pipeline": files.save_diffusers_pipeline,
    "ai-toolkit": files.save_ai_toolkit,
    "LyCORIS": files.save_lycoris,
    "OneTrainer, kohya's names": files.save_one_trainer_kohya,
    "OneTrainer, ComfyUI's names": files.save_one_trainer_comfy,
    "OneTrainer, diffusers' names": files.save_one_trainer_diffusers,
}


def saved(tmp_path, tool, **options):
    """(path, the adapters in it) of what the tool saves."""
    if tool == "ai-toolkit":  # which has linear layers alone, alpha = rank, and one dtype
        options = {"modules": LINEAR, "scaling": 1.0, "dtype": torch.bfloat16} | options
    adapters = trained(**options)
    path = tmp_path / "saved" / ("folder" if tool == "PEFT" else "file.safetensors")
    path.parent.mkdir()
    SAVES[tool](path, adapters)
    return path, adapters


def error(actual, exact):
    assert actual.keys() == exact.keys() and actual
    return max(((actual[name] - exact[name]).abs().max() / exact[name].abs().max()).item() for name in exact)


# --- the tools among themselves ---

THEIRS = [  # who saves, who reads, over which axis
    ("PEFT", "PEFT", "out"),
    ("diffusers model", "diffusers", "out"),
    ("diffusers pipeline", "diffusers", "out"),
    ("OneTrainer, diffusers' names", "diffusers", "out"),
    ("OneTrainer, diffusers' names", "InvokeAI", "out"),
    ("ai-toolkit", "ai-toolkit", "out"),
    ("ai-toolkit", "InvokeAI", "out"),
    ("LyCORIS", "LyCORIS", "out"),
    ("LyCORIS", "LyCORIS", "in"),
    ("LyCORIS", "ComfyUI", "in"),
    ("LyCORIS", "InvokeAI", "in"),
    ("LyCORIS", "OneTrainer", "out"),
    ("LyCORIS", "OneTrainer", "in"),
    ("OneTrainer, kohya's names", "LyCORIS", "out"),
    ("OneTrainer, kohya's names", "ComfyUI", "in"),
    ("OneTrainer, ComfyUI's names", "ComfyUI", "in"),
    ("OneTrainer, ComfyUI's names", "OneTrainer", "out"),
]


@pytest.mark.parametrize("tool, reader, axis", THEIRS)
def test_what_a_tool_saves_is_read_as_the_definition(tmp_path, tool, reader, axis):
    path, adapters = saved(tmp_path, tool, axis=axis)
    exact = definition(adapters)
    assert error(READERS[reader](path), exact) < CLOSE
    without = definition({name: replace(a, magnitude=None) for name, a in adapters.items()})
    assert error(without, exact) > 0.1


@pytest.mark.parametrize("reader", ["ComfyUI", "InvokeAI"])
def test_rows_of_dora_scale_are_another_function_to(tmp_path, reader):
    """Which is why they are not written for them. Where this fails, the tool may have been mended."""
    path, adapters = saved(tmp_path, "LyCORIS")
    assert error(READERS[reader](path), definition(adapters)) > 0.1


@pytest.mark.parametrize("tool, reader", [("LyCORIS", "LyCORIS"), ("LyCORIS", "ComfyUI"), ("ai-toolkit", "InvokeAI")])
def test_plain_layers_among_dora_ones_are_read_as_such(tmp_path, tool, reader):
    plain = PLAIN[:1] if tool == "ai-toolkit" else PLAIN
    path, adapters = saved(tmp_path, tool, axis="in" if reader == "ComfyUI" else "out", plain=plain)
    assert error(READERS[reader](path), definition(adapters)) < CLOSE


def test_diffusers_makes_a_magnitude_for_a_plain_layer(tmp_path):
    """One switch is for all layers: a plain one gets the norm of its base weight, and is another function."""
    path, _ = saved(tmp_path, "OneTrainer, diffusers' names", plain=PLAIN)
    with pytest.raises(Unread, match="24 tensors of the file's 22"):
        READERS["diffusers"](path)
