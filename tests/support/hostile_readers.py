"""convert and analyze, called as a function and as a command on what a stranger has made."""

import contextlib
import io
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file

from dora_kernels.cli import main
from dora_kernels.extras.analysis import analyze
from dora_kernels.extras.convert import convert_checkpoint
from tests.support import hostile_files as hostile
from tests.support import peft_meaning as peft
from tests.support.hostile_files import value_or_refusal


def refuses(arguments, message):
    """The command says what the function says, in one line, and returns 2."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), hostile.bounded():
        assert main([str(argument) for argument in arguments]) == 2
    line = said.getvalue()
    assert line.endswith("\n") and line.strip("\n").isprintable(), line
    assert line.startswith(message[:16])


def converted(folder, source, *names, source_format="peft", seconds=10.0, command=True, **options):
    """The adapters of `source` as they are written in our format and read by safetensors; None where it is refused.

    seconds: in which that has to be known. command: the command has to say the same, which it need not at a time limit.
    """
    options = {"no_bias": True} | options
    out = folder / "out"
    adapters, refused = value_or_refusal(
        folder,
        lambda: convert_checkpoint(source, out, source_format, "dora_kernels", **options),
        *(names or [source]),
        seconds=seconds,
    )
    flags = ["--no-bias"] if options["no_bias"] else ["--base", options["base"]]
    flags += ["--alpha", options["alpha"]] if "alpha" in options else []
    if refused:
        if command:
            refuses(["convert", source, out, "--from", source_format, "--to", "dora_kernels", *flags], refused)
        return None
    with safe_open(out, "pt") as file:
        alphas = json.loads(file.metadata()["dora_alpha"])
    tensors = load_file(out)
    out.unlink()
    assert alphas.keys() == {adapter.module for adapter in adapters} and len(tensors) == 3 * len(alphas)
    parts = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    return {name: (alpha, *(tensors[f"{name}.{part}"] for part in parts)) for name, alpha in alphas.items()}


def assert_bits(ours, theirs):
    """The same numbers in the same places, whatever the strides; a magnitude may have axes of 1."""
    ours, theirs = (tensor.detach().resolve_conj().resolve_neg().contiguous() for tensor in (ours, theirs))
    assert ours.dtype == theirs.dtype and ours.numel() == theirs.numel()
    assert torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


def analyzed(folder, base, tuned, *names, seconds=10.0, command=True):
    """The points and what is left out; None where it is refused. seconds, command: as of `converted`."""
    result, refused = value_or_refusal(
        folder, lambda: analyze(base, [tuned]), *(names or (base, tuned)), seconds=seconds
    )
    if refused and command:
        refuses(["analyze", base, tuned, "--out", folder / "chart.png"], refused)
    return result


def check_adapter(case, text, tensors=None, weights=None):
    """A PEFT folder with this text as its config and, if given, these bytes as its weights."""
    folder = case()
    source = peft.write_adapter(folder / "adapter", text, tensors)
    base = peft.write_model(folder / "base.safetensors")
    if weights is not None:
        (source / "adapter_model.safetensors").write_bytes(weights)
    read, result = converted(folder, source), analyzed(folder, base, source)
    if read is None and result is None:
        return
    # an integer of thousands of digits is none that either takes where it counts
    config = json.loads(text, parse_int=lambda digits: int(digits[:4000]))
    tensors = load_safetensors((source / "adapter_model.safetensors").read_bytes())
    if read is not None:
        assert config["use_dora"] is True and config.get("peft_type", "LORA") == "LORA"
        assert config.get("bias", "none") in ("none", None, False) and isinstance(config, dict)
    for module, (alpha, *parts) in (read or {}).items():
        r, scaling = peft.scaling_of(config, module)
        assert alpha / r == scaling and math.isfinite(scaling) and parts[0].shape[0] == r
        ends = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        for ours, end in zip(parts, ends, strict=True):
            keys = {f"base_model.model.{module}.{end}", f"{module}.{end}"} & tensors.keys()
            assert_bits(ours, tensors[keys.pop()])
    weights = load_file(base)
    for point in result.points if result else ():
        scaling = peft.scaling_of(config, point.layer)[1]
        tuned = peft.tuned_weight(weights[f"{point.layer}.weight"], tensors, point.layer, scaling)
        expected = peft.change(weights[f"{point.layer}.weight"], tuned)
        found = (point.delta_magnitude, point.delta_direction)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-9), (point, expected)
        assert point.method == ("DoRA" if config["use_dora"] else "LoRA")
