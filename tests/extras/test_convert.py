"""Checkpoints from format to format: the same to the last bit. Scaling, and the command."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dora_kernels.cli import main
from dora_kernels.extras.convert import FORMATS, Checkpoint, Unrepresentable, convert_checkpoint, decode, encode
from dora_kernels.extras.convert.adapter import alpha_of
from tests.support.convert_problem import (
    MIXED,
    ONE,
    PAIRS,
    WEIGHTS,
    K,
    adapter,
    assert_same,
    axis_of,
    reread,
    several,
    written,
)

# --- every pair of formats ---

MANY = settings(deadline=None)
FEW = settings(MANY, max_examples=40)


@pytest.mark.parametrize("source, target", PAIRS)
def test_every_pair_there_and_back(tmp_path, source, target):
    originals = several(torch.bfloat16)
    if {source, target} & set(ONE):  # its scaling is 1: a power of two goes into lora_B without rounding
        originals = [replace(a, lora_B=a.lora_B * 2, scaling=1.0) for a in originals]
    there, back = tmp_path / "there", tmp_path / "back"
    path = written(tmp_path, source, originals)
    convert_checkpoint(path, there, source, target, no_bias=True)
    assert_same(reread(there, target), originals)
    convert_checkpoint(there, back, target, source, no_bias=True)
    assert_same(reread(back, source), originals)


@pytest.mark.parametrize("target", MIXED)
@pytest.mark.parametrize("source", MIXED)
def test_ranks_and_alphas_by_layer(tmp_path, source, target):
    originals = [adapter("a", 16 / 12, rank=12), adapter("b.a", 2.0, seed=1), adapter("c", 0.5, seed=2)]
    convert_checkpoint(written(tmp_path, source, originals), tmp_path / "there", source, target)
    assert_same(reread(tmp_path / "there", target), originals)


@pytest.mark.parametrize("name", FORMATS)
def test_bits_are_kept_of_values_that_equal_nothing_or_another(tmp_path, name):
    a = adapter(scaling=1.0, axis=axis_of(name))
    a.lora_A[0, 0], a.lora_B[0, 0], a.magnitude[0] = -0.0, torch.nan, -0.0
    (b,) = reread(written(tmp_path, name, [a]), name)
    assert a.same(b) and not a.same(replace(b, magnitude=b.magnitude.abs()))


@pytest.mark.parametrize("kernel", [(3,), (1, 1), (3, 2), (2, 1, 3)])
@pytest.mark.parametrize("source", ["peft", "lycoris", "diffusers"])
@pytest.mark.parametrize("target", ["peft", "lycoris", "diffusers"])
def test_convolutions_where_both_have_them(tmp_path, source, target, kernel):
    originals = [adapter("conv", kernel=kernel), adapter("linear", seed=1)]
    convert_checkpoint(written(tmp_path, source, originals), tmp_path / "there", source, target)
    assert_same(reread(tmp_path / "there", target), originals)


@pytest.mark.parametrize("source, target", [("lycoris", "comfy"), ("comfy", "lycoris"), ("comfy", "comfy")])
def test_norms_over_columns_where_both_have_them(tmp_path, source, target):
    originals = [*several(torch.float16, 0.5, axis="in"), adapter("q", kernel=(3, 2), axis="in", seed=9, rank=3)]
    convert_checkpoint(written(tmp_path, source, originals), tmp_path / "there", source, target)
    assert_same(reread(tmp_path / "there", target), originals)


def test_lycoris_keeps_its_norm_over_columns(tmp_path):
    originals = [adapter("linear", axis="in"), adapter("linear_out", seed=1)]
    path = written(tmp_path, "lycoris", originals)
    assert load_file(path)["linear.dora_scale"].shape == (1, K)
    convert_checkpoint(path, tmp_path / "there", "lycoris", "lycoris", rename=[("^linear", "fc")])
    assert_same(
        reread(tmp_path / "there", "lycoris"), [replace(a, module=a.module.replace("linear", "fc")) for a in originals]
    )


# --- scaling ---


@MANY
@given(alpha=st.floats(1e-3, 1e4), rank=st.integers(1, 256))
def test_alpha_of_finds_an_alpha_wherever_one_was(alpha, rank):
    for divisor in (rank, math.sqrt(rank)):
        found = alpha_of(alpha / divisor, divisor)
        assert found is not None and found / divisor == alpha / divisor


@MANY
@given(alpha=st.integers(1, 1 << 20), rank=st.integers(1, 256))
def test_alpha_of_gives_the_integer_back(alpha, rank):
    found = alpha_of(alpha / rank, rank)
    assert found == alpha and isinstance(found, int)


@MANY
@given(scaling=st.floats(1e-3, 1e3), rank=st.integers(1, 256))
def test_alpha_of_is_exact_or_nothing(scaling, rank):
    found = alpha_of(scaling, rank)
    assert found is None or found / rank == scaling
    if found is None:
        guess = scaling * rank
        for step in (-math.inf, math.inf):
            near = guess
            for _ in range(20):
                near = math.nextafter(near, step)
                assert near / rank != scaling


@pytest.mark.parametrize("name", FORMATS)
@FEW
@given(scaling=st.floats(-1e3, 1e3).filter(bool), rank=st.integers(1, 20), size=st.integers(1, 2))
def test_a_format_keeps_a_scaling_exactly_or_not_at_all(name, scaling, rank, size):
    originals = [adapter(module, scaling, rank=rank, axis=axis_of(name)) for module in "ab"[:size]]
    try:
        checkpoint = encode(FORMATS[name], originals)
    except Unrepresentable:
        return
    # as the file holds it: JSON
    config, header = (json.loads(json.dumps(part)) for part in (checkpoint.config, checkpoint.header))
    assert_same(decode(FORMATS[name], Checkpoint(checkpoint.tensors, config, header)), originals)


@MANY
@given(alpha=st.floats(2**-10, 1e4, width=32), rank=st.integers(1, 64))
def test_lycoris_alpha_comes_back(alpha, rank):
    a = adapter(scaling=alpha / rank, rank=rank)
    assert decode(FORMATS["lycoris"], encode(FORMATS["lycoris"], [a]))[0].scaling == alpha / rank


def test_lycoris_alpha_of_zero_means_the_rank():
    tensors = dict(encode(FORMATS["lycoris"], [adapter("fc")]).tensors) | {"fc.alpha": torch.tensor(0.0)}
    assert decode(FORMATS["lycoris"], Checkpoint(tensors))[0].scaling == 1


@pytest.mark.parametrize("scaling", [0.25, 8.0, -2.0])
def test_a_power_of_two_folds_exactly(tmp_path, scaling):
    originals = several(torch.bfloat16, scaling)
    path = written(tmp_path, "lycoris", originals)
    convert_checkpoint(path, tmp_path / "there", "lycoris", "fsdp_qlora", no_bias=True)
    for a, b in zip(originals, reread(tmp_path / "there", "fsdp_qlora"), strict=True):
        assert b.scaling == 1 and torch.equal(b.lora_B.double(), a.lora_B.double() * scaling)


def test_fold_rounds_once(tmp_path):
    originals = several(torch.bfloat16, 16 / 12)
    path = written(tmp_path, "lycoris", [replace(a, scaling=1.5) for a in originals])
    convert_checkpoint(path, tmp_path / "there", "lycoris", "fsdp_qlora", no_bias=True, fold=True)
    for a, b in zip(originals, reread(tmp_path / "there", "fsdp_qlora"), strict=True):
        assert torch.equal(b.lora_B, (a.lora_B.double() * 1.5).bfloat16())


def test_fold_is_left_alone_where_scaling_fits(tmp_path):
    originals = several()
    convert_checkpoint(written(tmp_path, "lycoris", originals), tmp_path / "there", "lycoris", "peft", fold=True)
    assert_same(reread(tmp_path / "there", "peft"), originals)


# --- the command, and what it takes ---


def test_the_command_converts_and_says_what(tmp_path, capsys):
    path = written(tmp_path, "peft", several(torch.bfloat16))
    arguments = [str(path), str(tmp_path / "out.safetensors"), "--from", "peft", "--to", "lycoris"]
    rename = ["--rename", r"^layers\.", "lora_unet_", "--rename", r"\.", "_"]
    assert main(["convert", *arguments, *rename]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["4", "6", "10", "4", "2", "bfloat16", "float32"]
    assert lines[-1] == f"peft to lycoris: 4 layers in {tmp_path / 'out.safetensors'}"
    assert "lora_unet_10_mlp_w1.dora_scale" in load_file(tmp_path / "out.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["as-peft", "out.safetensors"]


def test_the_command_names_every_format(capsys):
    assert main(["convert", "--help"]) == 0
    assert ", ".join(FORMATS) in " ".join(capsys.readouterr().out.split())


def test_without_safetensors_the_command_says_so():
    code = "import sys; sys.modules['safetensors'] = None\nfrom dora_kernels.cli import main\n"
    code += "sys.exit(main(['convert', '.', 'b', '--from', 'peft', '--to', 'lycoris']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2 and "dora-kernels[convert]" in result.stderr


def test_torch_files_are_read(tmp_path):
    originals = several()
    for name, file in (("torchtune", "adapter_model.pt"), ("nvlabs", "adapter_model.bin")):
        folder = written(tmp_path, name, originals)
        torch.save(load_file(folder / WEIGHTS), folder / file)
        if name == "nvlabs":
            (folder / WEIGHTS).unlink()
        else:  # torchtune writes PEFT's names beside its own
            save_file({"x.lora_A.weight": torch.ones(1)}, folder / WEIGHTS)
        assert_same(reread(folder, name), originals)
        assert_same(reread(folder / file, name), originals)


def test_tensors_may_share_memory_or_be_views(tmp_path):
    a = adapter("a")
    originals = [replace(a, lora_B=a.lora_B.T.contiguous().T), replace(a, module="b")]
    torch.save(dict(encode(FORMATS["torchtune"], originals).tensors), tmp_path / "tied.pt")
    convert_checkpoint(tmp_path / "tied.pt", tmp_path / "out", "torchtune", "automodel", alpha=8, no_bias=True)
    assert_same(reread(tmp_path / "out", "automodel"), originals)


def test_alpha_is_taken_where_the_source_has_none(tmp_path):
    a = adapter()
    for name in ("torchtune", "automodel", "megatron-bridge", "dora_kernels", "lycoris"):
        tensors = {key: t for key, t in encode(FORMATS[name], [a]).tensors.items() if not key.endswith("alpha")}
        save_file(dict(tensors), tmp_path / f"{name}.safetensors")
        assert_same(reread(tmp_path / f"{name}.safetensors", name, alpha=8.0), [a])
        with pytest.raises(ValueError, match="--alpha"):
            reread(tmp_path / f"{name}.safetensors", name)


def test_a_model_without_biases_is_looked_at(tmp_path):
    path = written(tmp_path, "peft", [adapter("model.fc")])
    (tmp_path / "base").mkdir()
    save_file({"model.fc.weight": torch.ones(1), "other.bias": torch.ones(1)}, tmp_path / "base" / "1.safetensors")
    convert_checkpoint(path, tmp_path / "a", "peft", "torchtune", base=tmp_path / "base")
    # by the target's names too
    save_file({"fc.weight": torch.ones(1)}, tmp_path / "fc.safetensors")
    rename = [("^model.", "")]
    convert_checkpoint(path, tmp_path / "b", "peft", "torchtune", base=tmp_path / "fc.safetensors", rename=rename)
