"""A merged checkpoint holds the merge in float64, rounded once: of every dtype, shape, norm and way to store."""

import pickle
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dora_kernels.extras.merging import CheckFailed, blocks, check, checkpoint, merge_checkpoint
from dora_kernels.extras.merging.base import Source
from tests.support.merge_problem import (
    adapter_of,
    direction_of,
    exact_merge,
    random,
    tensors_of,
    write_adapter,
    write_base,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# of a value before it is rounded, relative to its row: sums of float32, of float64
COMPUTED = {torch.float64: 1e-14}


def assert_merged(found, exact, dtype):
    """Each number within half of its last place of the exact one, and what the sums before have cost."""
    assert found.dtype == dtype and found.shape == exact.shape
    finfo = torch.finfo(dtype)
    row = exact.flatten(1).norm(dim=1).view(-1, *(1,) * (exact.ndim - 1)).expand_as(exact)
    # the last place of numbers of a binade is that of its power of two
    exponents = torch.frexp(exact.abs().clamp(min=finfo.smallest_normal))[1] - 1
    half = torch.ldexp(torch.full_like(exact, finfo.eps / 2), exponents)
    assert ((found.double() - exact).abs() <= half + COMPUTED.get(dtype, 3e-7) * row).all()


def merged(tmp_path, weight, adapter, format="dora_kernels", stored=lambda weight: weight, **config):
    write_base(tmp_path / "base", {"layers.0.weight": stored(weight).contiguous()}, **config)
    write_adapter(tmp_path / "adapter", [adapter], format)
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", source_format=format, check=1)
    assert report.merged == ("layers.0.weight",) and len(report.check) == 1
    return stored(tensors_of(tmp_path / "out")["layers.0.weight"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter_dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path, dtype, adapter_dtype):
    weight = random(37, 53, seed=0, dtype=dtype)
    adapter = adapter_of("layers.0", weight, dtype=adapter_dtype)
    assert_merged(merged(tmp_path, weight, adapter), exact_merge(weight, adapter), dtype)


SHAPES = [(1, 1, 1), (5, 1, 3), (1, 7, 2), (6, 4, 9), (33, 130, 8), (257, 31, 5)]  # K = 1, N = 1, R > K and > N, ragged


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("N, K, R", SHAPES)
def test_every_shape_in_blocks(tmp_path, monkeypatch, N, K, R, rows, axis):
    monkeypatch.setattr(blocks, "COMPUTED", 4 * K * rows)
    weight = random(N, K, seed=0, dtype=torch.bfloat16)
    adapter = adapter_of("layers.0", weight, R=R, axis=axis)
    assert_merged(merged(tmp_path, weight, adapter, "lycoris"), exact_merge(weight, adapter), torch.bfloat16)


@pytest.mark.parametrize("kernel", [(1, 1), (3,), (3, 3), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("axis", ["out", "in"])
def test_convolutions(tmp_path, monkeypatch, kernel, axis):
    monkeypatch.setattr(blocks, "COMPUTED", 1000)
    weight = random(19, 6, *kernel, seed=0, dtype=torch.float16)
    adapter = adapter_of("layers.0", weight, axis=axis)
    assert_merged(merged(tmp_path, weight, adapter, "lycoris"), exact_merge(weight, adapter), torch.float16)


@pytest.mark.parametrize("N, K", [(36, 12), (12, 36), (24, 24), (1, 5)])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_weight_that_is_stored_with_its_inputs_first(tmp_path, monkeypatch, N, K, axis):
    monkeypatch.setattr(blocks, "COMPUTED", 4 * N * 5)
    weight, name = random(N, K, seed=0, dtype=torch.bfloat16), "h.0.attn.c_attn"
    write_base(tmp_path / "base", {f"{name}.weight": weight.T.contiguous()}, model_type="gpt2")
    adapter = adapter_of(name, weight, axis=axis)
    write_adapter(tmp_path / "adapter", [adapter], "lycoris")
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", check=1)
    assert report.check[0].merge == ("PEFT" if axis == "out" else "the definition")
    assert_merged(tensors_of(tmp_path / "out")[f"{name}.weight"].T, exact_merge(weight, adapter), torch.bfloat16)


def merge_blocks(weight, adapter, rows=None, transposed=False, finite=True):
    """The merge of a weight in memory."""
    result = weight.clone()
    merge = blocks.LayerMerge("a.weight", adapter, weight.dtype, transposed, finite)
    rows = rows or merge.rows
    stored = result.flatten(1)
    for step in [merge.measure] * merge.twice + [merge.merge]:
        for first in range(0, len(stored), rows):
            step(stored[first : first + rows], first)
    return result


@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_row_of_zeros_stays_and_is_no_nan(axis):
    weight = random(8, 12, seed=0)
    adapter = adapter_of("a", weight, axis=axis)
    if axis == "out":
        weight[3], adapter.lora_B[3] = 0, 0
    else:
        weight[:, 3], adapter.lora_A[:, 3] = 0, 0
    found = merge_blocks(weight, adapter)
    assert found.isfinite().all() and torch.allclose(found.double(), exact_merge(weight, adapter), atol=1e-5)
    assert not (found[3] if axis == "out" else found[:, 3]).any() and found.any()


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22, 1e30])
def test_rows_whose_squares_leave_float32(size):
    weight = random(6, 40, seed=0)
    adapter = adapter_of("a", weight)
    weight[2], adapter.lora_B[2] = size * weight[2], 0
    adapter.lora_B[4] *= size
    for axis in ("out", "in"):
        one = adapter_of("a", weight, axis=axis) if axis == "in" else adapter
        one.lora_B.copy_(adapter.lora_B)
        exact = exact_merge(weight, one)
        assert (merge_blocks(weight, one).double() - exact).norm() < 1e-6 * exact.norm()
        if axis == "out":
            assert (merge_blocks(weight, one).double() - exact)[2].norm() < 1e-6 * exact[2].norm()


def test_blocks_change_nothing_but_rounding():
    weight = random(70, 300, seed=0)
    for axis in ("out", "in"):
        adapter = adapter_of("a", weight, axis=axis, R=16)
        whole = merge_blocks(weight, adapter, rows=70)
        for rows in (1, 7, 64):
            assert (merge_blocks(weight, adapter, rows) - whole).norm() < 2e-7 * whole.norm()


def test_what_the_process_has_chosen_for_its_models_changes_nothing(tmp_path, monkeypatch):
    weight = random(40, 300, seed=0)
    adapter = adapter_of("layers.0", weight, R=32)
    expected = merged(tmp_path / "usual", weight, adapter)
    products, merge = [], blocks.LayerMerge.merge

    def watched(*arguments):
        products.append(torch.backends.mkldnn.matmul.fp32_precision)
        merge(*arguments)

    monkeypatch.setattr(blocks.LayerMerge, "merge", watched)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # as torch.set_float32_matmul_precision("medium") does
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            found = merged(tmp_path / "other", weight, adapter)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16" and torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert torch.equal(found, expected) and set(products) == {"ieee"}


def peft_layer(weight, adapter, dtype):
    """PEFT's own layer over a weight, in the dtype."""
    config = LoraConfig(r=adapter.R, target_modules=["layer"], use_dora=True)
    model = nn.Sequential(OrderedDict(layer=nn.Linear(weight.shape[1], len(weight), bias=False)))
    layer = get_peft_model(model, config).to(dtype).base_model.model.layer
    layer.base_layer.weight.data = weight.to(dtype, copy=True)
    layer.scaling["default"] = adapter.scaling
    for name, part in (("lora_A", adapter.lora_A), ("lora_B", adapter.lora_B)):
        getattr(layer, name)["default"].weight.data = part.to(dtype)
    layer.lora_magnitude_vector["default"].weight.data = adapter.magnitude.to(dtype)
    return layer


@pytest.mark.parametrize("N, K, R", [(64, 2048, 8), (96, 96, 64), (500, 130, 16)])
def test_before_it_is_rounded_the_error_is_at_most_pefts(N, K, R):
    weight = random(N, K, seed=0)
    adapter = adapter_of("a", weight, R=R)
    theirs, exact = (peft_layer(weight, adapter, dtype) for dtype in (torch.float32, torch.float64))
    theirs.merge(), exact.merge()
    exact = exact.base_layer.weight.data
    assert (exact - exact_merge(weight, adapter)).norm() < 1e-13 * exact.norm()
    ours = (merge_blocks(weight, adapter) - exact).norm()
    assert 0 < ours <= 1.05 * (theirs.base_layer.weight.data - exact).norm()


def test_nothing_is_rounded_twice():
    """Numbers that are just beside the middle of two of bfloat16: rounded to float16 before, they would go wrong."""
    weight = random(64, 64, seed=0, dtype=torch.bfloat16)
    adapter = adapter_of("a", weight)
    exact, found = exact_merge(weight, adapter), merge_blocks(weight, adapter)
    wrong = found != exact.to(torch.bfloat16)
    assert wrong.sum() <= 2  # of 4,096, where float32 is on the other side of the middle
    assert (found != merge_blocks(weight.float(), adapter).to(torch.float16).to(torch.bfloat16)).sum() > 2


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_that_the_gain_multiplies(tmp_path, shards, dtype):
    weight, bias = random(12, 20, seed=0), random(12, seed=9, dtype=dtype)
    adapter = replace(adapter_of("layers.0", weight), scaling=1.0)
    parts = [{"layers.0.bias": bias}, {"layers.0.weight": weight, "other.bias": bias + 1}]
    base = write_base(tmp_path / "base", *(parts if shards == 2 else [parts[0] | parts[1]]))
    write_adapter(tmp_path / "adapter", [adapter], "fsdp_qlora")
    report = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", source_format="fsdp_qlora")
    assert report.merged == ("layers.0.weight", "layers.0.bias") and report.copied == 1
    found, exact = tensors_of(tmp_path / "out"), exact_merge(weight, adapter)
    gain = exact[:, 0] / direction_of(weight, adapter.lora_A, adapter.lora_B, 1.0)[:, 0]
    assert_merged(found["layers.0.weight"], exact, torch.float32)
    assert_merged(found["layers.0.bias"][:, None], (gain * bias.double())[:, None], dtype)
    assert torch.equal(found["other.bias"], bias + 1)


def test_a_plain_lora_adds_its_product():
    weight = random(30, 50, seed=0, dtype=torch.bfloat16)
    adapter = replace(adapter_of("a", weight), magnitude=None)
    assert_merged(merge_blocks(weight, adapter, rows=7), exact_merge(weight, adapter), torch.bfloat16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_number_that_is_not_finite_is_named(value, plain, axis):
    weight = random(30, 50, seed=0, dtype=torch.bfloat16)
    adapter = adapter_of("a", weight, axis=axis)
    adapter = replace(adapter, magnitude=None) if plain else adapter
    weight[17, 23] = value
    line = "column 23" if axis == "in" and not plain else "row 17"
    with pytest.raises(ValueError, match=f"^merge: a.weight: .*{line} is .*; expected"):
        merge_blocks(weight, adapter, rows=7)
    found = merge_blocks(weight, adapter, rows=7, finite=False)
    assert not found[17, 23].isfinite() and found[16].isfinite().any() and found[:, 22].isfinite().any()


def test_what_float16_cannot_hold_is_refused():
    weight = random(30, 50, seed=0, dtype=torch.float16)
    adapter = adapter_of("a", weight)
    adapter.magnitude[3] = 65000  # of a row whose numbers are smaller
    assert merge_blocks(weight, adapter).isfinite().all()
    adapter.magnitude[17] = 1e6
    with pytest.raises(ValueError, match="^merge: a.weight: row 17 is not finite in torch.float16 once it is merged; "):
        merge_blocks(weight, adapter)
    with pytest.raises(ValueError, match="row 5 is not finite"):
        plain = replace(adapter, magnitude=None)
        plain.lora_B[5] = 6e4
        merge_blocks(weight, plain)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_the_check_reads_some_rows_at_a_time(axis, tmp_path, monkeypatch):
    """Of the largest tensor of a model with 70B weights it would else hold 4 GB."""
    weight = random(600, 700, seed=0, dtype=torch.bfloat16)
    adapter, sizes = adapter_of("layers.0", weight, axis=axis), []
    monkeypatch.setattr(check, "_BLOCK", 8 * 700 * 40)
    check_jobs, read_into = checkpoint.check_jobs, Source.read_into

    def seen(self, number, view, start):
        sizes.append(len(view))
        read_into(self, number, view, start)

    def check_these(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(Source, "read_into", seen)
            return check_jobs(*arguments)

    monkeypatch.setattr(checkpoint, "check_jobs", check_these)
    merged(tmp_path, weight, adapter, "lycoris")
    assert set(sizes) == {2 * 700 * 40} and sum(sizes) == (2 if axis == "out" else 3) * weight.nbytes


def test_the_check_finds_what_is_wrong(tmp_path, monkeypatch):
    weight = random(600, 700, seed=0, dtype=torch.bfloat16)
    adapter = adapter_of("layers.0", weight)
    merge = blocks.LayerMerge.merge

    def spoilt(self, block, first):
        merge(self, block, first)
        block[len(block) // 2] *= 1.0625

    monkeypatch.setattr(blocks.LayerMerge, "merge", spoilt)
    with pytest.raises(CheckFailed, match=r"^merge: layers.0.weight: row 300 differs from .* by 6.2\de-02") as error:
        merged(tmp_path, weight, adapter)
    (checked,) = error.value.checked
    assert checked.name == "layers.0.weight" and checked.error > 10 * checked.most and checked.merge == "PEFT"
    assert pickle.loads(pickle.dumps(error.value)).checked == error.value.checked
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
