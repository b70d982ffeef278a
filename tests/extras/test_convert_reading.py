"""The format of a file that nobody names, NaN and infinity, and layers of plain LoRA beside the others."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from dora_kernels.cli import main
from dora_kernels.extras.convert import FORMATS, DoraAdapter, convert_checkpoint, encode, read_adapters
from dora_kernels.extras.convert.files import save
from tests.support.convert_problem import adapter, assert_same, axis_of, reread, several, written

# --- the format ---


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_is_found(tmp_path, name):
    originals = several(scaling=1.0, axis=axis_of(name))
    path = written(tmp_path, name, originals)
    found, adapters = read_adapters(path)
    assert found == ("lycoris" if name == "comfy" else name)  # which says the same of it
    assert_same(adapters, originals)
    assert_same(read_adapters(path, name)[1], originals)


def test_the_command_says_which_format_it_found(tmp_path, capsys):
    path = written(tmp_path, "torchtune", several())
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "fsdp_qlora"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"torchtune to fsdp_qlora: 4 layers in {tmp_path / 'out'}"


def test_a_file_of_no_format_is_told_what_is_nearest(tmp_path):
    tensors = dict(encode(FORMATS["automodel"], [adapter("a")]).tensors)
    save_file(tensors | {"a.weight": torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match="as automodel, which is nearest: a.weight is no key of automodel"):
        read_adapters(tmp_path / "more.safetensors")
    save_file({"a.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors has no key of any format's; expected one of peft, "):
        read_adapters(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds none of adapter_model.safetensors, .*; expected a folder with one"):
        read_adapters(tmp_path)


def test_an_alpha_that_nothing_states_is_asked_for(tmp_path):
    save_file(dict(encode(FORMATS["torchtune"], [adapter("a")]).tensors), tmp_path / "tune.safetensors")
    with pytest.raises(ValueError, match="tune.safetensors: the source has no lora_alpha; expected --alpha"):
        read_adapters(tmp_path / "tune.safetensors")
    found, adapters = read_adapters(tmp_path / "tune.safetensors", alpha=8)
    assert found == "torchtune"
    assert_same(adapters, [adapter("a")])


def test_the_config_beside_a_file_is_its_own_formats(tmp_path):
    """adapter_model.pt is torchtune's by its name, and no other format's; adapter_model.safetensors is of several."""
    written(tmp_path, "torchtune", [adapter("a")])
    tensors = dict(encode(FORMATS["torchtune"], [adapter("a")]).tensors)
    for name, save_it in (("adapter_model.pt", torch.save), ("adapter_model.safetensors", save_file)):
        path = tmp_path / "as-torchtune" / name
        save_it(tensors, path)
        assert read_adapters(path)[0] == "torchtune"
        assert_same(read_adapters(path)[1], [adapter("a")])
        with pytest.raises(ValueError, match="lora_alpha is 8 in the source but --alpha is 2"):
            read_adapters(path, alpha=2)


def test_formats_that_say_different_things_are_both_named(tmp_path, monkeypatch):
    twin = replace(FORMATS["lycoris"], name="twin", scaling=FORMATS["fsdp_qlora"].scaling)
    monkeypatch.setitem(FORMATS, "twin", twin)
    path = written(tmp_path, "lycoris", [adapter("a")])
    with pytest.raises(ValueError, match="may be lycoris or twin, which read it differently; expected --from"):
        read_adapters(path)
    one = written(tmp_path, "lycoris", [adapter("a", 1.0)]) if not path.unlink() else None
    assert read_adapters(one)[0] == "lycoris"


# --- NaN and infinity ---


@pytest.mark.parametrize("key", ["a.lora_down.weight", "a.lora_up.weight", "a.dora_scale"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, capsys, key, value):
    checkpoint = encode(FORMATS["lycoris"], [adapter("a", dtype=torch.bfloat16), adapter("b")])
    checkpoint.tensors[key].view(-1)[:2] = value
    path, out = tmp_path / "source", tmp_path / "out"
    save(FORMATS["lycoris"], checkpoint, path)
    size = checkpoint.tensors[key].numel()
    assert main(["convert", str(path), str(out), "--to", "peft"]) == 2
    said = f"convert: {path}: {key} has 2 of {size} values that are NaN or infinite; expected finite ones, or --allow-n"
    assert capsys.readouterr().err.startswith(said) and not out.exists()
    with pytest.raises(ValueError, match="NaN or infinite"):
        read_adapters(path, "lycoris")
    assert main(["convert", str(path), str(out), "--to", "peft", "--allow-nonfinite"]) == 0
    ours, theirs = (read_adapters(place, allow_nonfinite=True)[1] for place in (path, out))
    assert all(a.same(b) for a, b in zip(ours, theirs, strict=True))


# --- plain LoRA beside the others ---


def mixed():
    return [adapter("a"), replace(adapter("b", 0.5, seed=1), magnitude=None), adapter("c", seed=2, rank=3)]


def test_a_plain_layer_beside_others_is_one(tmp_path):
    path = written(tmp_path, "lycoris", mixed())
    found, adapters = read_adapters(path)
    assert found == "lycoris" and [a.magnitude is None for a in adapters] == [False, True, False]
    convert_checkpoint(path, tmp_path / "out", "lycoris", "lycoris", rename=[("^", "lora_unet_")])
    for a, b in zip(mixed(), reread(tmp_path / "out", "lycoris"), strict=True):
        assert a.same(replace(b, module=a.module))


@pytest.mark.parametrize("target", [name for name, row in FORMATS.items() if not row.mixed])
def test_a_plain_layer_is_refused_where_there_is_one_switch_for_all(tmp_path, target):
    path = written(tmp_path, "lycoris", [replace(a, scaling=1.0) for a in mixed()])
    with pytest.raises(ValueError, match=f"b has no magnitude, .* which {target} has no word for"):
        convert_checkpoint(path, tmp_path / "out", None, target, no_bias=True)
    assert not (tmp_path / "out").exists()


def test_a_plain_layer_equals_no_other(tmp_path):
    a = adapter("a")
    plain = replace(a, magnitude=None)
    assert plain.same(replace(a, magnitude=None)) and not plain.same(a) and not a.same(plain)
    with pytest.raises(ValueError, match="magnitude is .*expected"):
        DoraAdapter("a", a.lora_A, a.lora_B, [1.0], 1.0)


def test_the_table_shows_plain_layers(tmp_path, capsys):
    path = written(tmp_path, "lycoris", mixed())
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "lycoris"]) == 0
    assert "none" in capsys.readouterr().out.splitlines()[2].split()
