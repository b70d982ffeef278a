"""convert and analyze of strangers' folders: a value, or one ValueError that names file, key and reason."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from dora_kernels.extras import analysis, checkpoint_files
from dora_kernels.extras.checkpoint_files import TensorFiles, open_model
from dora_kernels.extras.convert import convert_checkpoint

PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "use_dora": True, "r": 4, "lora_alpha": 8}


def parts(name="a", N=6, K=5, R=4):
    return {
        f"{PREFIX}{name}.lora_A.weight": torch.ones(R, K),
        f"{PREFIX}{name}.lora_B.weight": torch.ones(N, R),
        f"{PREFIX}{name}.lora_magnitude_vector": torch.full((N,), 2.0),
    }


def folder(path, tensors=None, **config):
    path.mkdir()
    save_file(parts() if tensors is None else tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return path


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    save_file({"a.weight": torch.randn(6, 5)}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def raw(path, entries, data):
    """A safetensors file of any dtypes, which torch need not have."""
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def convert(source, row="peft", **options):
    return convert_checkpoint(source, source.parent / "out", row, "dora_kernels", no_bias=True, **options)


def both_refuse(base, path, match):
    for command, run in (("convert", convert), ("analyze", lambda path: analysis.analyze(base, [path]))):
        with pytest.raises(ValueError) as raised:
            run(path)
        message = str(raised.value)
        assert message.startswith(f"{command}: ") and path.name in message and match in message, message
        assert len(message) < 800 and "\n" not in message
    assert not (path.parent / "out").exists()


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"r": None}, "r is None"),
        ({"r": "4"}, "r is '4'"),
        ({"r": 0}, "r is 0"),
        ({"rank_pattern": {"a": 0}}, "rank_pattern.a is 0"),
        ({"rank_pattern": {"(a|aa)+x": 4, "(": 4}}, "rank_pattern is {(: ...}"),
        ({"rank_pattern": {"a{99999999999}": 4}}, "rank_pattern is {a{99999999999}: ...}"),
        ({"rank_pattern": {"(" * 2000 + ")" * 2000: 4}}, "rank_pattern is {(((("),
        ({"alpha_pattern": {"a": [4]}}, "alpha_pattern.a is [4]"),
        ({"use_rslora": "no"}, "use_rslora is 'no'"),
        ({"use_dora": 1}, "use_dora is 1"),
        ({"peft_type": 3}, "peft_type is 3"),
    ],
    ids=str,
)
def test_a_config_is_refused_by_its_key(base, tmp_path, config, match):
    both_refuse(base, folder(tmp_path / "adapter", **config), match)


@pytest.mark.parametrize("name", ("adapter_config.json", "adapter_model.safetensors"))
@pytest.mark.parametrize("kind", ("fifo", "folder", "device", "dangling"))
def test_what_is_no_file_is_refused_at_once(base, tmp_path, name, kind):
    path = folder(tmp_path / "adapter")
    (path / name).unlink()
    if kind == "fifo":
        os.mkfifo(path / name)
    elif kind == "folder":
        (path / name).mkdir()
    else:
        (path / name).symlink_to("/dev/zero" if kind == "device" else "/nowhere")
    expected = {"fifo": "is a pipe or a device", "folder": "is a folder", "device": "is a pipe or a device"}
    both_refuse(base, path, expected.get(kind, "No such file or directory"))


@pytest.mark.parametrize(
    "path", ("fifo", "/dev/zero", "/dev/null", "/proc/self/mem", "/proc/self/maps", "x" * 5000, "a\0b")
)
def test_arguments_that_are_no_files_are_refused_at_once(base, tmp_path, path):
    os.mkfifo(tmp_path / "fifo")
    path = tmp_path / path
    for run in (
        lambda: analysis.analyze(path, [base]),
        lambda: analysis.analyze(base, [path]),
        lambda: convert_checkpoint(path, tmp_path / "out", "lycoris", "peft"),
        lambda: convert_checkpoint(folder(tmp_path / "adapter"), tmp_path / "out", "peft", "torchtune", base=path),
    ):
        with pytest.raises(ValueError, match="^(analyze|convert): ") as raised:
            run()
        assert len(str(raised.value)) < 600
        if (tmp_path / "adapter").exists():
            break


@pytest.mark.parametrize("dtype", ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3", "C64", "BOOL", "I8"))
def test_dtypes_that_no_adapter_has_are_named(base, tmp_path, dtype):
    bits = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}.get(dtype, 8)
    path = folder(tmp_path / "adapter")
    shapes = {"a.lora_A.weight": [4, 8], "a.lora_B.weight": [8, 4], "a.lora_magnitude_vector": [8]}
    entries, data = {}, b""
    for key, shape in shapes.items():
        size = shape[0] * (shape[1] if len(shape) > 1 else 1) * bits // 8
        entries[PREFIX + key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += bytes(size)
    raw(path / "adapter_model.safetensors", entries, data)
    save_file({"a.weight": torch.randn(8, 8)}, base)
    both_refuse(base, path, "a.lora_A.weight" if dtype.startswith("F6") else "a")


@pytest.mark.parametrize(
    ("alpha", "match"),
    [
        (torch.tensor(4, dtype=torch.complex64), "a: alpha is torch.complex64"),
        (torch.tensor(True), "a: alpha is torch.bool"),
        (torch.ones(0), "a: alpha is torch.float32 of shape (0,)"),
        (torch.ones(2), "of shape (2,)"),
        (torch.tensor(float("nan")), "a.alpha is nan"),
        (torch.tensor(float("inf"), dtype=torch.float64), "a.alpha is inf"),
    ],
    ids=str,
)
def test_an_alpha_that_is_no_number_is_named(tmp_path, alpha, match):
    tensors = {"a.lora_down.weight": torch.ones(4, 5), "a.lora_up.weight": torch.ones(6, 4)}
    save_file(tensors | {"a.dora_scale": torch.ones(6, 1), "a.alpha": alpha}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError) as raised:
        convert(tmp_path / "x.safetensors", "lycoris")
    assert match in str(raised.value) and "x.safetensors" in str(raised.value)


@pytest.mark.parametrize(
    "alpha", (4, torch.tensor(4, dtype=torch.int64), torch.tensor([4.0]), torch.tensor(4.0).half())
)
def test_an_alpha_of_another_dtype_or_shape_is_read(tmp_path, alpha):
    tensors = {"a.lora_down.weight": torch.ones(4, 5), "a.lora_up.weight": torch.ones(6, 4)}
    save_file(
        tensors | {"a.dora_scale": torch.ones(6, 1), "a.alpha": torch.as_tensor(alpha)}, tmp_path / "x.safetensors"
    )
    assert convert(tmp_path / "x.safetensors", "lycoris")[0].scaling == 1


def test_a_state_dict_of_views_is_converted_to_the_last_bit(tmp_path):
    torch.manual_seed(0)
    views = {
        "a.lora_a.weight": torch.randn(10, 4).T[:, ::2],
        "a.lora_b.weight": torch._neg_view(torch.randn(6, 4)),
        "a.magnitude": torch.randn(6, 2)[:, 0],
        "b.lora_a.weight": torch.randn(1, 5).expand(4, 5),
        "b.lora_b.weight": torch.nn.Parameter(torch.randn(4, 6).T),
        "b.magnitude": torch.randn(12)[::2],
    }
    torch.save(views, tmp_path / "x.pt")
    for adapter in convert(tmp_path / "x.pt", "torchtune", alpha=8):
        for part, name in (("lora_A", "lora_a.weight"), ("lora_B", "lora_b.weight"), ("magnitude", "magnitude")):
            assert torch.equal(getattr(adapter, part), views[f"{adapter.module}.{name}"])


def index(path, weight_map, **files):
    path.mkdir()
    for name, tensors in files.items():
        save_file({key: torch.full((2, 2), value) for key, value in tensors.items()}, path / f"{name}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_of_a_tensor_in_two_shards_the_one_that_the_index_names_counts(tmp_path):
    both = {"w": "a.safetensors", "v": "b.safetensors"}
    model = open_model("f", index(tmp_path / "1", both, a={"w": 1.0, "v": 1.0}, b={"w": 2.0, "v": 2.0, "u": 2.0}))
    assert {key: model[key][0, 0].item() for key in model.shapes} == {"w": 1, "v": 2}
    wrong = index(tmp_path / "2", both, a={"w": 1.0, "v": 1.0}, b={"w": 2.0})
    with pytest.raises(
        ValueError, match="^f: .*2: b.safetensors has no v; expected it, as model.safetensors.index.json"
    ):
        open_model("f", wrong)
    with pytest.raises(ValueError, match="^f: .*gone.safetensors cannot be read: No such file"):
        open_model("f", index(tmp_path / "3", {"w": "gone.safetensors"}))
    (tmp_path / "secret.safetensors").write_bytes((tmp_path / "1" / "a.safetensors").read_bytes())
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "", ".", "..", 3):
        path = index(tmp_path / f"4{len(list(tmp_path.iterdir()))}", {"w": name})
        with pytest.raises(ValueError, match="index.json: weight_map.w is .* expected the name of a file in the same"):
            open_model("f", path)
    linked = index(tmp_path / "5", {"w": "link.safetensors"})
    (linked / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    assert open_model("f", linked)["w"][0, 0] == 1


def test_every_file_is_opened_once_and_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "_OPEN", 4)
    names = [f"m{i}" for i in range(9)]
    where = {f"{name}.{i}": f"{name}.safetensors" for name in names for i in range(50)}
    index(tmp_path / "m", where, **{name: {f"{name}.{i}": 1.0 for i in range(50)} for name in names})
    opened = []
    real = checkpoint_files.open_safetensors
    monkeypatch.setattr(checkpoint_files, "open_safetensors", lambda *a: opened.append(a[1].name) or real(*a))
    model = open_model("f", tmp_path / "m")
    assert len(opened) == 9 and len(model._opened) == 4
    for key in where:
        assert model[key].shape == (2, 2)
    assert len(opened) <= 18


def test_names_and_shapes_beyond_any_models_are_refused(tmp_path):
    for tensors in ({"x" * 1001: torch.ones(1)}, {"x": torch.ones([1] * 9)}):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="^f: .*expected at most 1000 and 8$") as raised:
            TensorFiles("f", tmp_path, [tmp_path / "x.safetensors"])
        assert len(str(raised.value)) < 500 and "\n" not in str(raised.value)


def test_a_layer_with_two_magnitudes_is_refused(base, tmp_path):
    more = {f"{PREFIX}a.lora_magnitude_vector.weight": torch.ones(6)}
    with pytest.raises(ValueError, match=r"a of .* has a magnitude of shape \(6,\) and \(6,\)"):
        analysis.analyze(base, [folder(tmp_path / "adapter", parts() | more)])


def test_many_layers_under_another_prefix_are_found_at_once(tmp_path):
    """Where every name is compared with every other, 10^4 layers are 10^8 comparisons."""
    names = [f"layers.{i}.q_proj" for i in range(10_000)]
    tensors = {f"model.{name}.weight": torch.ones(2, 2) for name in names}
    save_file(tensors, tmp_path / "base.safetensors")
    model = open_model("f", tmp_path / "base.safetensors")
    assert all(analysis.checkpoints._base_key(model, f"{name}.weight") == f"model.{name}.weight" for name in names)
    assert analysis.checkpoints._base_key(model, "q_proj.weight") is None
    assert analysis.checkpoints._base_key(model, "outer.model.layers.0.q_proj.weight") == "model.layers.0.q_proj.weight"
