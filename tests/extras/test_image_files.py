"""Files of image-model tools: what each tool computes of them, before and after a conversion."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from dora_kernels.extras.convert import convert_checkpoint, read_adapters
from tests.support.image_files import (
    CONV,
    DOTTED,
    KOHYA,
    LINEAR,
    NATIVE,
    SCALING,
    definition,
    renames,
    save_random,
    saved,
)
from tests.support.image_readers import CLOSE, READERS, Unread, error

pytest.importorskip("peft")
pytest.importorskip("diffusers")
pytest.importorskip("lycoris", exc_type=ImportError)

PLAIN = (LINEAR[1], CONV[2])

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


# --- conversions: the table of docs/convert.md ---


@dataclass(frozen=True)
class Kind:
    """A kind of file: the format that it is converted from, who saves it, what is in it, and --alpha."""

    source: str
    tool: str
    options: Mapping[str, Any] = field(default_factory=dict)
    alpha: float | None = None


LINEAR_ONLY, COLUMNS = {"modules": LINEAR}, {"axis": "in"}
KINDS = {
    "`peft`": Kind("peft", "PEFT", LINEAR_ONLY),
    "`peft`, convolutions": Kind("peft", "PEFT"),
    "`peft`, one file": Kind("peft", "PEFT, one file", {"rank": 2}, alpha=2 * SCALING),
    "`peft`, a state dict": Kind("peft", "PEFT, a state dict", {"rank": 2}, alpha=2 * SCALING),
    "`diffusers`": Kind("diffusers", "diffusers pipeline", LINEAR_ONLY),
    "`diffusers`, convolutions": Kind("diffusers", "diffusers model"),
    "`diffusers`, no header": Kind("diffusers", "OneTrainer, diffusers' names"),
    "`diffusers`, plain LoRA beside it": Kind("diffusers", "OneTrainer, diffusers' names", {"plain": PLAIN}),
    "`ai-toolkit`": Kind("ai-toolkit", "ai-toolkit"),
    "`ai-toolkit`, plain LoRA beside it": Kind("ai-toolkit", "ai-toolkit", {"plain": PLAIN}),
    "`lycoris`": Kind("lycoris", "LyCORIS", LINEAR_ONLY),
    "`lycoris`, convolutions": Kind("lycoris", "OneTrainer, kohya's names"),
    "`lycoris`, names for ComfyUI": Kind("lycoris", "OneTrainer, ComfyUI's names"),
    "`lycoris`, plain LoRA beside it": Kind("lycoris", "LyCORIS", LINEAR_ONLY | {"plain": PLAIN}),
    "`lycoris`, columns": Kind("lycoris", "LyCORIS", COLUMNS),
    "`lycoris`, columns, plain LoRA beside it": Kind("lycoris", "LyCORIS", COLUMNS | {"plain": PLAIN}),
    "`comfy`": Kind("comfy", "OneTrainer, ComfyUI's names"),
    "`comfy`, columns": Kind("comfy", "OneTrainer, ComfyUI's names", COLUMNS),
    "`comfy`, columns, plain LoRA beside it": Kind("comfy", "LyCORIS", COLUMNS | {"plain": PLAIN}),
}
TARGETS = {  # how modules are named, and who reads the file
    "peft": (None, ("PEFT",)),
    "diffusers": (DOTTED, ("diffusers",)),
    "ai-toolkit": (DOTTED, ("ai-toolkit", "InvokeAI")),
    "lycoris": (KOHYA, ("LyCORIS", "OneTrainer")),
    "comfy": (NATIVE, ("ComfyUI", "OneTrainer", "InvokeAI")),
}
REASONS = {  # by a part of the message
    "rows": "which ComfyUI takes of the base's weight alone",
    "columns": "its norm is over each input column",
    "plain": "a plain LoRA",
    "convolutions": "a convolution's",
}


def cell(tmp_path, kind, target):
    """What the table says of a conversion: `exact`, once the target's tools compute what the source's file means."""
    path, adapters = saved(tmp_path, kind.tool, **kind.options)
    style, readers = TARGETS[target]
    out = tmp_path / "made" / "file.safetensors"
    out.parent.mkdir()
    try:
        convert_checkpoint(path, out, kind.source, target, alpha=kind.alpha, rename=renames(style))
    except ValueError as refused:
        assert not out.exists()
        (reason,) = (name for name, words in REASONS.items() if words in str(refused)) or (str(refused),)
        return f"refused: {reason}"
    for reader in readers:
        assert error(READERS[reader](out), definition(adapters)) < CLOSE, reader
    return "exact"


def documented():
    """{(kind, target): cell} of the table in docs/convert.md."""
    page = (Path(__file__).parents[2] / "docs" / "convert.md").read_text()
    table = re.search(r"<!-- image files -->\n(.*?)<!-- end -->", page, re.DOTALL)[1]
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n") if "|" in line
    )
    targets = [target.strip("`") for target in head[1:]]
    return {(row[0], target): found for row in rows for target, found in zip(targets, row[1:], strict=True)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_cell_of_the_table(tmp_path, kind, target):
    assert cell(tmp_path, KINDS[kind], target) == documented()[kind, target]


def test_the_table_has_these_cells():
    assert set(documented()) == {(kind, target) for kind in KINDS for target in TARGETS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_format_is_found(tmp_path, kind):
    """Or is not, where the one that it has refuses the file: but ComfyUI's rows are read as LyCORIS' then."""
    row = KINDS[kind]
    path, _ = saved(tmp_path, row.tool, **row.options)
    if kind == "`diffusers`, plain LoRA beside it":
        with pytest.raises(ValueError, match="has no magnitude"):
            read_adapters(path, alpha=row.alpha)
        return
    name, found = read_adapters(path, alpha=row.alpha)
    _, given = read_adapters(path, "lycoris" if kind == "`comfy`" else row.source, alpha=row.alpha)
    assert len(found) == len(given) and all(a.same(b) for a, b in zip(found, given, strict=True))
    assert name == row.source or (name, row.source) == ("lycoris", "comfy")


@pytest.mark.parametrize("prefix", [True, False], ids=["pipeline", "model"])
@pytest.mark.parametrize(
    "config",
    [
        {"alpha_pattern": {"to_q": 7, "^blocks.1.conv": 2}, "rank_pattern": {"ff_out": 2, r"blocks\.0\.mix": 1}},
        {"use_rslora": True, "rank_pattern": {"ff_out": 2}, "target_modules": r".*(to_q|ff_out)$"},
    ],
    ids=["patterns", "rslora"],
)
def test_a_header_means_what_it_means_to_diffusers(tmp_path, config, prefix):
    """Scaling of every layer, through the header and back, by diffusers' own layers, which read it themselves."""
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["to_q", "ff_out", "conv", "mix"]} | config
    path, exact = save_random(tmp_path / "file.safetensors", config, prefix)
    assert error(READERS["diffusers"](path), exact) == 0
    for target, style, reader in (("diffusers", DOTTED, "diffusers"), ("peft", None, "PEFT")):
        out = tmp_path / target / "file.safetensors"
        out.parent.mkdir()
        convert_checkpoint(path, out, "diffusers", target, rename=renames(style))
        assert error(READERS[reader](out), exact) < CLOSE


def test_other_readers_take_the_rank_for_an_alpha_in_the_header(tmp_path):
    """Of diffusers' files, as the docs say."""
    path, adapters = saved(tmp_path, "diffusers pipeline")
    as_one = {name: replace(a, scaling=1.0) for name, a in adapters.items()}
    assert error(READERS["InvokeAI"](path), definition(as_one)) < CLOSE
