"""convert and analyze of what a stranger has made: what is right, or one ValueError that names the file; never a wait.

Here safetensors files, what may be in a file's place, names, and thousands of tensors. Other readers read what is the
project's own: bench/lib/results.load what bench has written, and tools/ what they are given by who runs them.
"""

import contextlib
import io
import json
import math
import re

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file

from dora_kernels.cli import main
from dora_kernels.extras.analysis import analyze
from dora_kernels.extras.convert import convert_checkpoint
from tests.support import hostile_files as hostile
from tests.support import peft_meaning as peft
from tests.support.hostile_files import depths, render, spoilt, value_or_refusal
from tests.support.hostile_readers import analyzed, check_adapter, converted, refuses

WEIGHTS = "adapter_model.safetensors"


def adapter_bytes(case):
    folder = peft.write_adapter(case() / "adapter")
    return (folder / WEIGHTS).read_bytes()


def check_weights(case, content):
    """These bytes as an adapter's weights, as a base, as what was tuned, and as the model that has biases."""
    check_adapter(case, render(peft.CONFIG).encode(), weights=content)
    folder = case()
    base, odd = peft.write_model(folder / "base.safetensors"), folder / "odd.safetensors"
    odd.write_bytes(content)
    for pair in ((base, odd), (odd, base)):
        result = analyzed(folder, *pair, odd)
        for point in result.points if result else ():
            keys = point.layer, f"{point.layer}.weight"
            weights = [load_safetensors(path.read_bytes()) for path in pair]
            w, v = (next(tensors[key] for key in keys if key in tensors) for tensors in weights)
            assert w.dtype.is_floating_point and v.dtype.is_floating_point
            found = (point.delta_magnitude, point.delta_direction)
            assert found == pytest.approx(peft.change(w, v), rel=1e-5, abs=1e-9)
    source = folder / "ours.safetensors"
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in peft.adapter_tensors().items()}
    save_file(tensors, source, {"dora_alpha": json.dumps(dict.fromkeys(peft.MODULES, 8))})
    out = folder / "out"
    written, refused = value_or_refusal(
        folder, lambda: convert_checkpoint(source, out, "dora_kernels", "torchtune", base=odd), odd
    )
    if refused:
        refuses(["convert", source, out, "--from", "dora_kernels", "--to", "torchtune", "--base", odd], refused)
    else:
        keys = load_safetensors(content).keys()
        assert {f"{module}.weight" for module in peft.MODULES} <= keys
        assert not {f"{module}.bias" for module in peft.MODULES} & keys


def model_bytes(case):
    return peft.write_model(case() / "model.safetensors").read_bytes()


CONTENTS = pytest.mark.parametrize("of", [adapter_bytes, model_bytes], ids=("adapter", "model"))


@depths
@CONTENTS
def test_damaged_weights(case, depth, of):
    content = of(case)

    @depth(30)
    @given(content=hostile.damaged(content))
    def holds(content):
        check_weights(case, content)

    holds()


@depths
@CONTENTS
def test_weights_with_a_wrong_header(case, depth, of):
    content = of(case)
    header, data = hostile.safetensors_parts(content)
    lengths = st.none() | st.integers(0, 1000) | st.sampled_from((2**31, 2**32, 2**62, 2**63, 2**64 - 1, 10**8))

    @depth(40)
    @given(header=spoilt(header, hostile.header_values), length=lengths, more=st.binary(max_size=9))
    def holds(header, length, more):
        check_weights(case, hostile.safetensors_bytes(header, data + more, length))

    holds()


@pytest.mark.parametrize("dtype", hostile.DTYPES)
def test_every_dtype_of_safetensors(case, dtype):
    """As the dtype of an alpha, of an adapter's tensors, and of a base's: an empty file and one of zeros."""
    bits = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64, "BOOL": 8}
    size = bits.get(dtype) or int("".join(re.findall(r"\d+", dtype.partition("_")[0])) or 8)
    header, end = {}, 0
    shapes = {f"a.{part}": shape for part, shape in (("lora_down.weight", [8, 8]), ("lora_up.weight", [8, 8]))}
    for key, shape in (shapes | {"a.dora_scale": [8, 1], "a.alpha": [], "a.weight": [8, 8]}).items():
        begin, end = end, end + max(1, math.prod(shape) * size // 8)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    folder = case()
    source, base = folder / "odd.safetensors", folder / "base.safetensors"
    save_file({"a.weight": torch.ones(8, 8)}, base)
    source.write_bytes(hostile.safetensors_bytes(header, b"\0" * end))
    for pair in ((base, source), (source, base)):
        analyzed(folder, *pair, source)
    del header["a.weight"]
    source.write_bytes(hostile.safetensors_bytes(header, b"\0" * (end - 8 * size)))
    assert_refused_or_same(folder, source)


def assert_refused_or_same(folder, source):
    read = converted(folder, source, source_format="lycoris")
    for _, lora_A, _, _ in (read or {}).values():
        assert lora_A.dtype.is_floating_point and lora_A.shape == (8, 8)


@pytest.mark.parametrize("place", hostile.PLACES)
@pytest.mark.parametrize(
    "which",
    ["adapter/adapter_config.json", f"adapter/{WEIGHTS}", "base.safetensors"]
    + ["sharded/model.safetensors.index.json", "sharded/one.safetensors", "state.pt", "state.bin"],
)
def test_something_else_in_a_files_place(case, place, which):
    top = case()
    results, folder = (top / name for name in ("results", "files"))
    results.mkdir()
    folder.mkdir()
    adapter, base = peft.write_adapter(folder / "adapter"), peft.write_model(folder / "base.safetensors")
    (folder / "sharded").mkdir()
    peft.write_model(folder / "sharded" / "one.safetensors")
    (folder / "sharded" / "model.safetensors.index.json").write_text(render(peft.INDEX))
    names = ("lora_a.weight", "lora_b.weight", "magnitude")
    for name in ("state.pt", "state.bin"):
        tensors = (torch.ones(peft.R, peft.K), torch.ones(peft.N, peft.R), torch.ones(peft.N))
        torch.save({f"a.{end}": tensor for end, tensor in zip(names, tensors, strict=True)}, folder / name)
    for path in (results, folder, *folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    source = folder / which.split("/")[0]

    def answers():
        made = []
        if source != base and "sharded" not in which:
            kind = ("peft", {}) if source == adapter else ("torchtune", {"alpha": 8})
            made.append(converted(results, source, source_format=kind[0], **kind[1]))
        if source.suffix not in (".pt", ".bin"):
            pair = (source, base) if "sharded" in which else (base, adapter)
            made.append(analyzed(results, *pair, source))
        return made

    assert all(answers())
    hostile.PLACES[place](folder / which)
    with hostile.as_nobody() if "permission" in place else contextlib.nullcontext():
        made = answers()
    (folder / which).parent.chmod(0o755)
    assert not any(made), "an answer without a file"


@depths
def test_names_of_any_kind(case, depth):
    """Of modules: what is taken is written under the same name."""

    @depth(30)
    @given(name=st.text(min_size=1, max_size=12) | st.sampled_from([name for name in hostile.NAMES if name]))
    def holds(name):
        folder = case()
        source = peft.write_adapter(folder / "adapter", peft.CONFIG, peft.adapter_tensors([name]))
        base = peft.write_model(folder / "base.safetensors", [name])
        read = converted(folder, source)
        result = analyzed(folder, base, source)
        assert read is None or read.keys() == {name}
        assert result is None or {entry.layer for entry in result.points} <= {name}

    holds()


@pytest.mark.parametrize("name", ("$\\frac$", "a\nb", "\x1b[31mred", "é" * 90, "_^{", "中$", "\u202e", "%s{}", "\\"))
def test_names_in_charts_and_tables(tmp_path, name):
    """The files' names, and the layers' where they print, in all that analyze shows of them."""
    path = tmp_path / name
    path.mkdir()
    kinds = [f"layers.0.{name if name.isprintable() else 'w'}{number}" for number in range(2)]
    base = peft.write_model(path / f"{name}.safetensors", kinds)
    source = peft.write_adapter(path / "adapter", None, peft.adapter_tensors(kinds) | {f"{kinds[0]}.x": torch.ones(1)})
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), hostile.bounded(60):
        arguments = ["analyze", base, source, "--out", tmp_path / "a.png", "--json", tmp_path / "a.json"]
        assert main(list(map(str, arguments))) == 0, said.getvalue()
    assert (tmp_path / "a.png").stat().st_size and "\x1b" not in said.getvalue()
    assert {point["layer"] for point in json.loads((tmp_path / "a.json").read_text())["points"]} == set(kinds)


def opened(monkeypatch):
    """Grows by one whenever safetensors opens a file."""
    made, safe_open = [], safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda *rest, **more: made.append(rest) or safe_open(*rest, **more))
    return made


@pytest.mark.parametrize("count", [600, pytest.param(11111, marks=pytest.mark.nightly)])
def test_many_tensors_open_few_files(case, monkeypatch, count):
    modules = [f"layers.{number}.w1" for number in range(count)]
    folder = case()
    source = peft.write_adapter(folder / "a", None, peft.adapter_tensors(modules))
    base = peft.write_model(folder / "base.safetensors", modules)
    tuned = peft.write_model(folder / "tuned.safetensors", modules, seed=1)
    made = opened(monkeypatch)
    with hostile.bounded(10 + count / 100):
        assert len(analyze(base, [source, tuned]).points) == 2 * count
        assert len(convert_checkpoint(source, folder / "out", "peft", "dora_kernels", no_bias=True)) == count
    assert len(made) <= 12, f"{len(made)} times for 4 reads of 3 files"


def test_shards_in_turn_are_opened_once(case, monkeypatch):
    folder, names = case(), [f"{number}.safetensors" for number in range(5)]
    base, weight_map = folder / "base", {}
    base.mkdir()
    for number, name in enumerate(names):
        modules = [f"layers.{layer}" for layer in range(number, 100, 5)]
        peft.write_model(base / name, modules)
        weight_map |= {f"{module}.weight": name for module in modules}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tuned = peft.write_model(folder / "tuned.safetensors", [f"layers.{layer}" for layer in range(100)], seed=1)
    made = opened(monkeypatch)
    assert len(analyze(base, [tuned]).points) == 100 and len(made) == 6
