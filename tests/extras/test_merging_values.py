"""A merged checkpoint holds the merge in float64, rounded once: of every dtype, shape, norm and way to store."""

import pytest
import torch

from dora_kernels.extras.merging import merge_checkpoint
from tests.support.merge_problem import adapter_of, exact_merge, random, tensors_of, write_adapter, write_base

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
