"""What a conversion cannot keep is refused by name, with exit status 2, and nothing is written."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from dora_kernels.cli import main
from dora_kernels.extras.convert import FORMATS, convert_checkpoint, encode
from dora_kernels.extras.convert.files import save
from tests.support.convert_problem import (
    BIAS,
    CONV,
    PAIRS,
    ROWS,
    K,
    N,
    R,
    adapter,
    assert_same,
    axis_of,
    reread,
    written,
)


def refuses(tmp_path, capsys, expected, path, source, target, *options):
    before = sorted(tmp_path.rglob("*"))
    arguments = [str(path), str(tmp_path / "out"), "--from", source, "--to", target, *map(str, options)]
    assert main(["convert", *arguments]) == 2
    message = capsys.readouterr().err
    for part in [expected] if isinstance(expected, str) else expected:
        assert part in message, message
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


@pytest.mark.parametrize("target", [name for name in FORMATS if name not in CONV])
def test_refuses_convolutions_elsewhere(tmp_path, capsys, target):
    path = written(tmp_path, "peft", [adapter("conv", kernel=(3, 3))])
    refuses(tmp_path, capsys, ("conv", "dimensions"), path, "peft", target, "--no-bias")


@pytest.mark.parametrize("target", [name for name in ROWS if name != "lycoris"])
def test_refuses_a_norm_over_columns_elsewhere(tmp_path, capsys, target):
    path = written(tmp_path, "lycoris", [adapter("fc", axis="in")])
    refuses(tmp_path, capsys, ("fc", "wd_on_out"), path, "lycoris", target, "--no-bias")


@pytest.mark.parametrize("source, target", [(a, b) for a, b in PAIRS if BIAS.get(a) != BIAS.get(b)])
def test_refuses_a_bias_it_cannot_know(tmp_path, capsys, source, target):
    path = written(tmp_path, source, [adapter("fc", 1.0)])
    refuses(tmp_path, capsys, ("bias", "--no-bias", "--base"), path, source, target)
    save_file({"fc.weight": torch.ones(1), "fc.bias": torch.ones(1)}, tmp_path / "base.safetensors")
    refuses(tmp_path, capsys, "fc has a bias", path, source, target, "--base", tmp_path / "base.safetensors")
    save_file({"gc.weight": torch.ones(1)}, tmp_path / "else.safetensors")
    refuses(tmp_path, capsys, "has no fc.weight", path, source, target, "--base", tmp_path / "else.safetensors")


@pytest.mark.parametrize("target", ["torchtune", "nvlabs", "llava", "megatron-bridge", "automodel"])
def test_refuses_two_scalings_where_there_is_one(tmp_path, capsys, target):
    path = written(tmp_path, "peft", [adapter("a"), adapter("b", 0.5)])
    refuses(tmp_path, capsys, ("b has rank", "0.5"), path, "peft", target, "--no-bias")
    path = written(tmp_path, "lycoris", [adapter("a"), adapter("b", rank=8)])
    refuses(tmp_path, capsys, "b has rank 8", path, "lycoris", target, "--no-bias", "--fold")


def test_refuses_layers_of_which_one_alone_is_rslora():
    root, plain = adapter("a", 16 / math.sqrt(5), rank=5), adapter("b", 8 / 10, rank=10)
    assert encode(FORMATS["peft"], [root]).config["use_rslora"]
    assert not encode(FORMATS["peft"], [plain]).config["use_rslora"]
    with pytest.raises(ValueError, match="a: no lora_alpha makes lora_alpha / 5 exactly"):
        encode(FORMATS["peft"], [root, plain])


def test_refuses_a_scaling_that_has_no_alpha(tmp_path, capsys):
    root = 16 / math.sqrt(8)  # exact as alpha / 8 in float64, and in no float32
    path = written(tmp_path, "peft", [adapter("a", root, rank=8)])
    refuses(tmp_path, capsys, ("a: no float32 alpha", "--fold"), path, "peft", "lycoris")
    convert_checkpoint(path, tmp_path / "folded", "peft", "lycoris", fold=True)
    assert reread(tmp_path / "folded", "lycoris")[0].scaling == 1
    path = written(tmp_path, "torchtune", [adapter("a", 1.5)])
    refuses(tmp_path, capsys, ("a: scaling 1.5", "--fold"), path, "torchtune", "fsdp_qlora")


def test_refuses_a_fold_whose_rounding_a_division_hides(tmp_path, capsys):
    lora_B = torch.full((N, R), 1 + 2**-7).bfloat16()
    assert torch.equal((lora_B * 1.5) / 1.5, lora_B) and not torch.equal((lora_B * 1.5).double(), lora_B.double() * 1.5)
    path = written(tmp_path, "torchtune", [replace(adapter("a", 1.5, torch.bfloat16), lora_B=lora_B)])
    refuses(tmp_path, capsys, "a: scaling 1.5", path, "torchtune", "fsdp_qlora")


def test_refuses_a_fold_that_leaves_the_range(tmp_path, capsys):
    tiny = replace(adapter("a", 2.0**-10, torch.float16), lora_B=torch.full((N, R), 2.0**-15 * 1.5).half())
    path = written(tmp_path, "torchtune", [tiny, adapter("b", 2.0**-10, torch.float16)])
    refuses(tmp_path, capsys, "a: scaling", path, "torchtune", "fsdp_qlora")
    huge = replace(adapter("a", 4.0, torch.float16), lora_B=torch.full((N, R), 3e4).half())
    save(FORMATS["torchtune"], encode(FORMATS["torchtune"], [huge]), tmp_path / "huge")
    refuses(tmp_path, capsys, "overflows", tmp_path / "huge", "torchtune", "fsdp_qlora", "--fold")
    huge.lora_B[0] = torch.inf  # which may stay, where no other becomes one
    save(FORMATS["torchtune"], encode(FORMATS["torchtune"], [huge]), tmp_path / "more")
    options = ("--fold", "--allow-nonfinite")
    refuses(tmp_path, capsys, "overflows", tmp_path / "more", "torchtune", "fsdp_qlora", *options)


def test_refuses_torchtunes_rows_without_a_word(tmp_path, capsys):
    path = written(tmp_path, "peft", [adapter("layers.0.q_proj")])
    for options, expected in (
        ((), ("q_proj", "--heads", "--same-rows")),
        (("--heads", 2, 1), "6 rows but 2 heads"),
        (("--heads", 0, 1), "--heads: is '0'; expected an integer from 1"),
        (("--heads", 1, 1, "--same-rows"), "not allowed with argument --heads"),
    ):
        refuses(tmp_path, capsys, expected, path, "peft", "torchtune", "--no-bias", *options)
    for heads, same_rows, expected in (((0, 1), False, r"heads\[0\] is 0"), ((1, 1), True, "expected one of them")):
        with pytest.raises(ValueError, match=f"convert: .*{expected}"):
            convert_checkpoint(path, tmp_path / "out", "peft", "torchtune", heads=heads, same_rows=same_rows)
    convert_checkpoint(path, tmp_path / "same", "peft", "torchtune", no_bias=True, same_rows=True)
    assert_same(reread(tmp_path / "same", "torchtune"), reread(path, "peft"))
    convert_checkpoint(path, tmp_path / "ours", "peft", "dora_kernels")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda t, row, size: t | {"extra.thing": torch.ones(1)}, ("extra.thing", "is no key of")),
        (lambda t, row, size: t | {f"{row.prefix}a.weight": torch.ones(1)}, ("a.weight", "is no key of")),
        (lambda t, row, size: {k: v for k, v in t.items() if v.numel() != size}, ("has no magnitude", "plain LoRA")),
        (lambda t, row, size: {k: v for k, v in t.items() if v.shape != (N, R)}, "has no lora_B"),
        (lambda t, row, size: {k: v for k, v in t.items() if v.shape != (R, K)}, "has no lora_A"),
        (lambda t, row, size: {k: v.flatten()[:-1] if v.numel() == size else v for k, v in t.items()}, "has shape"),
        (lambda t, row, size: {k: v[:, :-1] if v.shape == (N, R) else v for k, v in t.items()}, "lora_B (6, 3)"),
        (lambda t, row, size: {k: v.char() if v.shape == (R, K) else v for k, v in t.items()}, "torch.int8"),
        (lambda t, row, size: {}, "no tensors"),
    ],
    ids=("unknown", "base weight", "plain", "no B", "no A", "magnitude", "rank", "dtype", "empty"),
)
def test_refuses_what_is_no_adapter(tmp_path, capsys, name, change, expected):
    row = FORMATS[name]
    checkpoint = encode(row, [adapter("a", 1.0, axis=axis_of(name))])
    size = N if name in ROWS else K
    save(row, replace(checkpoint, tensors=change(dict(checkpoint.tensors), row, size)), tmp_path / "broken")
    refuses(tmp_path, capsys, expected, tmp_path / "broken", name, "lycoris", "--no-bias")


@pytest.mark.parametrize(
    "name, key, expected",
    [
        ("peft", "base_model.model.a.lora_embedding_A", "embedding"),
        ("peft", "base_model.model.a.lora_B.bias", "lora_bias"),
        ("lycoris", "a.lora_mid.weight", "Tucker"),
        ("llava", "base_model.model.b.lora_A.other.weight", "expected one"),
    ],
)
def test_refuses_parts_without_counterpart(tmp_path, capsys, name, key, expected):
    checkpoint = encode(FORMATS[name], [adapter("a")])
    tensors = dict(checkpoint.tensors) | {key: torch.ones(2, 2)}
    save(FORMATS[name], replace(checkpoint, tensors=tensors), tmp_path / "source")
    refuses(tmp_path, capsys, expected, tmp_path / "source", name, "dora_kernels")


@pytest.mark.parametrize(
    "name, field, value, expected",
    [
        ("peft", "use_dora", False, "use_dora"),
        ("peft", "use_dora", None, "use_dora"),  # as torchtune writes it
        ("peft", "peft_type", "LOHA", "LOHA"),
        ("peft", "bias", "all", "bias"),
        ("peft", "lora_bias", True, "lora_bias"),
        ("peft", "init_lora_weights", "pissa", "pissa"),
        ("peft", "modules_to_save", ["head"], "modules_to_save"),
        ("peft", "layer_replication", [[0, 2]], "layer_replication"),
        ("peft", "something_new", 3, "something_new"),
        ("peft", "rank_pattern", {"a": 3}, "rank 4 but"),
        ("peft", "lora_alpha", "8", "expected a number"),
        ("peft", "lora_alpha", 0, "scaling is 0.0"),
        ("peft", "alpha_pattern", {"(": 8}, "alpha_pattern"),
        ("torchtune", "use_rslora", True, "use_rslora"),
        ("torchtune", "alpha_pattern", {"a": 3}, "alpha_pattern"),
        ("torchtune", "use_dora", False, "use_dora"),
        ("torchtune", "r", 3, "rank 4 but"),
        ("nvlabs", "peft_type", "LORA", "expected DORA"),
        ("nvlabs", "fan_in_fan_out", True, "fan_in_fan_out"),
        ("nvlabs", "Wdecompose_target_modules", ["b"], "Wdecompose_target_modules"),
    ],
)
def test_refuses_settings_without_counterpart(tmp_path, capsys, name, field, value, expected):
    path = written(tmp_path, name, [adapter("a")])
    config = json.loads((path / "adapter_config.json").read_text()) | {field: value}
    (path / "adapter_config.json").write_text(json.dumps(config))
    refuses(tmp_path, capsys, expected, path, name, "dora_kernels", "--no-bias")


def test_refuses_paths_and_options_that_cannot_be(tmp_path, capsys):
    path = written(tmp_path, "lycoris", [adapter("a"), adapter("b")])
    refuse = lambda expected, *rest: refuses(tmp_path, capsys, expected, *rest)  # noqa: E731
    refuse("does not exist", tmp_path / "none", "lycoris", "peft")
    refuse("'lora'", path, "lora", "peft")
    refuse("expected no --alpha", path, "lycoris", "peft", "--alpha", 3)
    refuse("a name that another module has", path, "lycoris", "peft", "--rename", "[ab]", "c")
    refuse("no name", path, "lycoris", "peft", "--rename", "a", "")
    refuse("expected what re.sub takes", path, "lycoris", "peft", "--rename", "(", "c")
    refuse("without dots", path, "lycoris", "llava", "--adapter-name", "a.b")
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage")
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    (tmp_path / "folder").mkdir()
    refuse("cannot be read", tmp_path / "garbage.safetensors", "lycoris", "peft")
    refuse("cannot be read", tmp_path / "garbage.pt", "lycoris", "peft")
    refuse("holds none of", tmp_path / "folder", "peft", "lycoris")
    torch.save({"a": 3}, tmp_path / "numbers.pt")
    refuse("expected a state dict", tmp_path / "numbers.pt", "torchtune", "lycoris")
    refuse(
        "scaling is always 1",
        written(tmp_path, "fsdp_qlora", [adapter("a", 1.0)]),
        "fsdp_qlora",
        "torchtune",
        "--alpha",
        3,
    )
    folder = written(tmp_path, "peft", [adapter("a")])
    (folder / "adapter_config.json").write_text("[]")
    refuse("expected a JSON object", folder, "peft", "lycoris")
    (folder / "adapter_config.json").write_text("{")
    refuse("expected JSON", folder, "peft", "lycoris")
    (folder / "adapter_config.json").unlink()
    refuse("no adapter_config.json", folder, "peft", "lycoris")
    for header, expected in (("[]", "expected a JSON object"), ("{", "expected JSON"), ('{"b": 3}', "['b']")):
        tensors = dict(encode(FORMATS["dora_kernels"], [adapter("a")]).tensors)
        save_file(tensors, tmp_path / "ours.safetensors", {"dora_alpha": header})
        refuse(expected, tmp_path / "ours.safetensors", "dora_kernels", "lycoris")
    (tmp_path / "out").mkdir()
    refuse("out exists", path, "lycoris", "peft")
    assert main(["convert", str(path), str(tmp_path / "no" / "where"), "--from", "lycoris", "--to", "peft"]) == 2
    assert "in a folder that exists" in capsys.readouterr().err


def test_a_file_that_came_meanwhile_is_left_alone(tmp_path):
    checkpoint = encode(FORMATS["lycoris"], [adapter("a")])
    (tmp_path / "out").write_text("theirs")
    with pytest.raises(ValueError, match="out exists"):
        save(FORMATS["lycoris"], checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out").read_text() == "theirs"
