"""What is not merged is kept to the last byte: headers, other tensors, the index, and the files beside."""

import json
import os
import random as chance
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dora_kernels.extras.convert import DoraAdapter
from dora_kernels.extras.merging import merge_checkpoint, output
from tests.support.merge_problem import INDEX, adapter_of, exact_merge, random, tensors_of, write_adapter, write_base


def model(dtype=torch.bfloat16, layers=3):
    """The tensors of a small model, in two shards, some of them in other dtypes and empty."""
    shards = [{}, {}]
    for i in range(layers):
        shard = shards[i % 2]
        shard[f"model.layers.{i}.mlp.up_proj.weight"] = random(24, 10, seed=2 * i, dtype=dtype)
        shard[f"model.layers.{i}.mlp.down_proj.weight"] = random(10, 24, seed=2 * i + 1, dtype=dtype)
        shard[f"model.layers.{i}.norm.weight"] = random(10, seed=100 + i)
    shards[0] |= {"model.mask": torch.ones(3, 5, dtype=torch.bool), "model.none": torch.zeros(0, 4)}
    shards[1] |= {"model.table": torch.arange(77), "lm_head.weight": random(50, 10, seed=99, dtype=dtype)}
    return shards


def adapters_of(shards, kind="proj"):
    return [
        adapter_of(key.removesuffix(".weight"), tensor, seed=seed)
        for seed, (key, tensor) in enumerate(item for shard in shards for item in shard.items())
        if kind in key
    ]


def header_of(path):
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return content[: 8 + size]


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def problem(tmp_path):
    """(base, adapter, shards, adapters): files and what is in them."""
    shards = model()
    adapters = adapters_of(shards)
    return (
        write_base(tmp_path / "base", *shards),
        write_adapter(tmp_path / "adapter", adapters),
        shards,
        adapters,
    )


def assert_is_merge_of(out, shards, adapters):
    merged = {f"{adapter.module}.weight": adapter for adapter in adapters}
    found = tensors_of(out)
    for key, tensor in (item for shard in shards for item in shard.items()):
        if key in merged:
            exact = exact_merge(tensor, merged[key])
            assert (found[key].double() - exact).norm() < torch.finfo(tensor.dtype).eps / 2 * exact.norm()
            assert found[key].dtype == tensor.dtype and not torch.equal(found[key], tensor)
        else:
            assert torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype
    assert found.keys() == {key for shard in shards for key in shard}


def test_all_but_the_merged_bytes_are_the_bases(problem, tmp_path):
    base, adapter, shards, adapters = problem
    before, out = bytes_of(base), tmp_path / "out"
    seen = []
    report = merge_checkpoint(base, adapter, out, progress=lambda *step: seen.append(step), check=2)
    assert_is_merge_of(out, shards, adapters)
    after = bytes_of(out)
    assert bytes_of(base) == before and after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == [
        name for name in before if name.endswith(".safetensors")
    ]
    for path in base.glob("*.safetensors"):
        assert header_of(path) == header_of(out / path.name) and len(before[path.name]) == len(after[path.name])
        with safe_open(path, "pt") as theirs, safe_open(out / path.name, "pt") as ours:
            assert ours.metadata() == theirs.metadata() == {"format": "pt", "written": "for a test"}
            assert ours.offset_keys() == theirs.offset_keys()
            for key in theirs.keys():
                if "proj" not in key:
                    assert torch.equal(ours.get_tensor(key), theirs.get_tensor(key))
    total = sum(map(len, before.values()))
    assert sorted(report.merged) == sorted(f"{adapter.module}.weight" for adapter in adapters)
    assert [f"{adapter.module}.weight" for adapter in report.adapters] == list(report.merged)
    assert (report.copied, report.bytes, report.format) == (7, total, "dora_kernels")
    assert report.dtypes == {"bfloat16": 6} and report.left_out == ()
    assert [checked.merge for checked in report.check] == ["PEFT", "PEFT"]
    assert all(0 < checked.error <= checked.most < 2**-7 for checked in report.check)
    assert seen[-1][:2] == (total, total) and {step[1] for step in seen} == {total}
    assert [step[0] for step in seen] == sorted({step[0] for step in seen})
    assert {"model.layers.0.mlp.up_proj.weight", "tokenizer.json"} <= {step[2] for step in seen}
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}


def test_a_folder_of_the_hubs_cache_is_links(problem, tmp_path):
    """snapshots/<commit>/<name> links to ../../blobs/<hash>, whatever is merged from them is files."""
    base, adapter, shards, adapters = problem
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in base.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        link = snapshot / path.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    (tmp_path / "link").symlink_to(snapshot)
    merge_checkpoint(tmp_path / "link", adapter, tmp_path / "out")
    assert_is_merge_of(tmp_path / "out", shards, adapters)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert bytes_of(tmp_path / "out").keys() == bytes_of(snapshot).keys()


@pytest.mark.parametrize("by", ["the system", "reading"])
def test_bytes_are_copied_either_way(problem, tmp_path, monkeypatch, by):
    base, adapter, shards, adapters = problem
    monkeypatch.setattr(output, "PIECE", 100)
    if by == "reading":
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(output, "COPIED", 100)
        assert hasattr(os, "copy_file_range")
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert_is_merge_of(tmp_path / "out", shards, adapters)


def test_a_system_that_copies_nothing_is_not_asked_twice(problem, tmp_path, monkeypatch):
    base, adapter, shards, adapters = problem
    asked = []

    def refuses(*arguments):
        asked.append(arguments)
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuses)
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert asked
    assert_is_merge_of(tmp_path / "out", shards, adapters)


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "any.safetensors"])
def test_one_file_as_a_file_and_in_a_folder(tmp_path, name):
    shards = model(torch.float16)
    tensors = shards[0] | shards[1]
    adapter = write_adapter(tmp_path / "adapter", adapters_of(shards))
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / name, {"format": "pt"})
    merge_checkpoint(tmp_path / "base" / name, adapter, tmp_path / "file")
    assert_is_merge_of(tmp_path / "file", shards, adapters_of(shards))
    if name == "any.safetensors":
        with pytest.raises(ValueError, match="^merge: .*base holds no model.safetensors and no index of one; expected"):
            merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    else:
        merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "file").read_bytes()


def test_copies_of_the_weights_are_left_out_and_told(problem, tmp_path):
    base, adapter, *_ = problem
    stale = ["pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors", "m.Q4_K_M.gguf", "tf_model.h5"]
    stale += ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "flax_model.msgpack"]
    kept = ["generation_config.json", "tokenizer.model", "modeling_own.py", "README.md", "LICENSE", ".gitattributes"]
    kept += ["1_Pooling/more/deep.txt", "2_Dense/model.safetensors", "merges.txt", "imatrix.dat", "training_args.bin"]
    for name in [*stale, *kept, "original/consolidated.00.pth", ".git/HEAD", "onnx/model.onnx", ".cache/a/b"]:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert sorted(report.left_out) == sorted([*stale, "original/", ".git/", "onnx/", ".cache/"])
    assert set(kept) <= bytes_of(tmp_path / "out").keys()
    assert not any((tmp_path / "out" / name).exists() for name in [*stale, "original", ".git", "onnx", ".cache"])
    assert all((tmp_path / "out" / name).read_text() == name for name in kept)


def test_several_hundred_layers(tmp_path):
    tensors = {f"layers.{i}.weight": random(5, 7, seed=i) for i in range(600)}
    adapters = [adapter_of(key.removesuffix(".weight"), tensor, R=2) for key, tensor in tensors.items()]
    write_base(tmp_path / "base", tensors)
    report = merge_checkpoint(tmp_path / "base", write_adapter(tmp_path / "adapter", adapters), tmp_path / "out")
    assert len(report.merged) == 600 and report.copied == 0
    found = tensors_of(tmp_path / "out")
    for adapter in adapters[::37]:
        exact = exact_merge(tensors[f"{adapter.module}.weight"], adapter)
        assert (found[f"{adapter.module}.weight"].double() - exact).norm() < 1e-6 * exact.norm()


def test_a_key_in_a_shard_that_the_index_does_not_count(tmp_path):
    shards = model()
    base = write_base(tmp_path / "base", *shards)
    extra = {"model.layers.0.mlp.up_proj.weight": torch.zeros(24, 10)} | shards[1]
    save_file(extra, base / "model-00002-of-00002.safetensors")
    adapter = write_adapter(tmp_path / "adapter", adapters_of(shards))
    with pytest.raises(ValueError, match="^merge: model.layers.0.mlp.up_proj.weight is in model-00001.* and in model-"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    others = [one for one in adapters_of(shards) if one.module != "model.layers.0.mlp.up_proj"]
    merge_checkpoint(base, write_adapter(tmp_path / "others", others), tmp_path / "out")
    assert (tmp_path / "out" / INDEX).read_bytes() == (base / INDEX).read_bytes()


PROGRAM = """
import sys
from dora_kernels.extras.convert import DoraAdapter
from dora_kernels.extras.merging import merge_checkpoint

def highest():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

for name in sys.argv[1:]:
    before = highest()
    merge_checkpoint(f"{name}/base", f"{name}/adapter", f"{name}/out", source_format="dora_kernels")
    print(highest() - before)
"""


def growth(*folders):
    """The bytes by which each merge in turn raised the peak of one process' memory."""
    command = [sys.executable, "-c", PROGRAM, *map(str, folders)]
    return [int(line) for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


def of_layers(folder, layers, stored):
    """A base in two shards, of so many layers that are the same, and an adapter of each."""
    tensors = {f"layers.{i}.weight": stored.clone() for i in range(layers)}
    shards = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
    write_base(folder / "base", *shards)
    N, K = stored.shape
    parts = random(2, K, seed=1), random(N, 2, seed=2), random(N, seed=3)
    write_adapter(folder / "adapter", [DoraAdapter(f"layers.{i}", *parts, 0.5) for i in range(layers)])
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("few, many, rows", [(2, 6, 8192), pytest.param(2, 7, 16384, marks=pytest.mark.nightly)])
def test_memory_is_a_block_whatever_the_file_has(tmp_path, few, many, rows):
    # the first merge has the threads and the libraries' own memory made
    small = of_layers(tmp_path / "small", 2, torch.full((2000, 2048), 0.5, dtype=torch.bfloat16))
    tensor = torch.full((rows, 2048), 0.5, dtype=torch.bfloat16)  # of 32 MB, or 64
    large = of_layers(tmp_path / "large", few, tensor), of_layers(tmp_path / "larger", many, tensor)
    of_small, of_large, of_larger = growth(small, *large)
    assert of_small + of_large + of_larger < 3 * tensor.nbytes
    assert of_large < tensor.nbytes / 2 and of_larger < tensor.nbytes / 4


def header_and_data(path):
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_headers_as_others_write_them(tmp_path):
    """Keys in any order, metadata at the end or none, no padding or much of it."""
    shards = model()
    tensors, adapters = shards[0] | shards[1], adapters_of(shards)
    write_adapter(tmp_path / "adapter", adapters)
    save_file(tensors, tmp_path / "base", {"a": "\u00e9\n"})
    header, data = header_and_data(tmp_path / "base")
    metadata = {"__metadata__": header.pop("__metadata__")}
    backwards = dict(reversed(header.items()))
    for number, text in enumerate(
        [backwards, header | metadata, metadata | backwards, json.dumps(header).encode() + b" " * 999]
    ):
        (tmp_path / "base").write_bytes(with_header(text, data))
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / f"out{number}")
        assert header_of(tmp_path / f"out{number}") == header_of(tmp_path / "base")
        assert_is_merge_of(tmp_path / f"out{number}", shards, adapters)


@pytest.mark.parametrize("times", [150, pytest.param(5000, marks=pytest.mark.nightly)])
def test_damaged_headers(tmp_path, times):
    """One or two bytes are others: it is merged as safetensors reads it, or refused by one line."""
    weight = random(4, 6, seed=0)
    base = write_base(tmp_path / "base", {"a.weight": weight, "b": weight + 1}) / "model.safetensors"
    adapter = write_adapter(tmp_path / "adapter", [adapter_of("a", weight)])
    good, draw = base.read_bytes(), chance.Random(times)
    size = len(header_of(base))
    merged = 0
    for _ in range(times):
        content = bytearray(good)
        for _ in range(draw.randint(1, 2)):
            content[draw.randrange(size)] = draw.choice([draw.randrange(256), ord(draw.choice('0123456789"{}[],:ab '))])
        base.write_bytes(content)
        out = tmp_path / "out"
        try:
            merge_checkpoint(tmp_path / "base", adapter, out)
        except ValueError as error:
            assert str(error).startswith("merge: ") and str(error).isprintable() and not out.exists()
            continue
        merged += 1
        before, after = load_file(base), load_file(out / base.name)
        assert header_of(out / base.name) == bytes(content[:size])
        assert before.keys() == after.keys() and all(
            torch.equal(before[key], after[key]) for key in before.keys() - {"a.weight"}
        )
        shutil.rmtree(out)
    assert times / 20 < merged < times / 2
