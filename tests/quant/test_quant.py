"""Each format is read and decoded bit for bit as its own library decodes it, and what is not known is refused."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn

from dora_kernels import quant
from dora_kernels.testing import rms_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# the whole, one row, from the middle of a byte and of a block on, and nothing
ROWS = (slice(None), slice(0, 1), slice(3, 17), slice(5, None), slice(4, 4))


def random_weight(N, K, dtype=torch.float32):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(N + K)).to(dtype)


def assert_decodes_to(weight, expected):
    """Bit for bit, in every range of rows."""
    assert weight.shape == tuple(expected.shape) and weight.dtype == expected.dtype
    assert not weight.requires_grad and weight.device == expected.device
    for rows in ROWS:
        assert torch.equal(weight.dequantize(rows), expected[rows]), rows
    assert torch.equal(weight.dequantize(dtype=torch.float64), expected.double())


# bitsandbytes: nested or not, any storage dtype, blocks that reach over the end of a row.


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes")


@pytest.fixture
def eager():
    """bitsandbytes compiles what it has no CPU kernel for: seconds for each shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def params4bit(bnb, weight, quant_type="nf4", blocksize=64, nested=True, storage=torch.uint8):
    return bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        quant_type=quant_type,
        blocksize=blocksize,
        compress_statistics=nested,
        quant_storage=storage,
    ).to("cpu")


def decoded_by_hand(parameter):
    """code[nibble] * scale, one element at a time in the mind: bitsandbytes' own kernel is wrong at some widths."""
    state, packed = parameter.quant_state, parameter.data.view(torch.uint8).flatten().int()
    absmax = state.absmax
    if state.nested:
        outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: absmax.numel()]
        absmax = state.state2.code[absmax.int()] * outer + state.offset
    values = state.code[torch.stack((packed >> 4, packed & 15), 1).flatten()[: state.shape.numel()]]
    scale = absmax.repeat_interleave(state.blocksize)[: values.numel()]
    return (values * scale).to(state.dtype).view(state.shape)


def decoded_by_library(bnb, parameter):
    return bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_4bit(bnb, eager, quant_type, nested, dtype):
    # a multiple of the blocksize; narrower than a block; 280 blocks, more than a nested one; odd sizes; 96 = 1.5 blocks
    # and, last, less than one block
    shapes = ((20, 128), (40, 24), (70, 256), (21, 33), (64, 96), (3, 16))
    for (N, K), blocksize in itertools.product(shapes, (32, 64, 128, 4096)):
        parameter = params4bit(bnb, random_weight(N, K, dtype), quant_type, blocksize, nested)
        weight = quant.read(parameter)
        assert weight.format == "codebook4" and weight.numbers == (blocksize, 256 if nested else 0)
        by_hand, by_library = decoded_by_hand(parameter), decoded_by_library(bnb, parameter)
        assert_decodes_to(weight, by_hand)
        assert torch.equal(by_hand, by_library) != quant.is_decoded_wrongly(weight), (N, K, blocksize)
        if K % blocksize == 0:
            assert torch.equal(by_hand, by_library)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.int8])
def test_bitsandbytes_storage_of_another_dtype(bnb, storage):
    parameter = params4bit(bnb, random_weight(20, 128), storage=storage)
    assert parameter.dtype == storage
    assert_decodes_to(quant.read(parameter), decoded_by_library(bnb, parameter))


def test_avx512_trap(bnb):
    """Where this machine has it, the library's error is gross, and ours is that of 4 bits."""
    original = random_weight(64, 96)
    parameter = params4bit(bnb, original)
    weight = quant.read(parameter)
    assert rms_error(weight.dequantize(), original) < 0.1
    if not quant.is_decoded_wrongly(weight):
        pytest.skip("bitsandbytes decodes this width rightly here")
    assert rms_error(decoded_by_library(bnb, parameter), original) > 0.2


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_repacking_trap(bnb, nested, storage):
    """In eval mode the layer repacks its weight; its scales are then rounded to bfloat16, and no more is lost."""
    layer = linear4bit(bnb, 64, 128, nested=nested, storage=storage)
    before = quant.read(layer).dequantize()
    x = torch.randn(3, 128)
    layer.eval()(x)
    if not quant.is_packed_for_cpu(layer.weight):
        pytest.skip("bitsandbytes repacks on CPUs with AVX512_BF16 alone")
    after = quant.read(layer).dequantize()
    assert after.dtype == before.dtype and rms_error(after, before) < 2**-8
    assert torch.equal(after.sign(), before.sign())
    assert rms_error(layer(x), x @ after.T + layer.bias) < 2**-6  # bitsandbytes computes in bfloat16
    saved = copy.deepcopy(layer)
    saved.state_dict()  # which puts the weight back, and rounds the scales once more
    assert not quant.is_packed_for_cpu(saved.weight)
    assert rms_error(quant.read(saved).dequantize(), before) < 2e-2
    quant.unpack_for_cpu(layer.weight)
    assert not quant.is_packed_for_cpu(layer.weight) and layer.weight.dtype == storage
    assert torch.equal(quant.read(layer).dequantize(), after)
    assert torch.equal(decoded_by_library(bnb, layer.weight), after)
    layer(x)
    assert torch.equal(quant.read(layer).dequantize(), after)


@pytest.mark.parametrize("nested", [True, False])
def test_repacking_that_fails(bnb, nested):
    """Where K is no multiple of the blocksize the layer raises in eval mode, its state half changed."""
    layer = linear4bit(bnb, 64, 96, nested=nested)
    before = quant.read(layer).dequantize()
    try:
        layer.eval()(torch.randn(3, 96))
        assert not layer.support_avx512bf16_for_cpu
    except RuntimeError:
        assert torch.equal(quant.read(layer).dequantize(), before)


def linear4bit(bnb, N, K, **settings):
    layer = bnb.nn.Linear4bit(K, N)
    layer.weight = params4bit(bnb, layer.weight.data, **settings)
    return layer


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
def test_bitsandbytes_int8(bnb, called):
    """The scales move in the first call. The expected weight is what the layer's own GEMM multiplies with."""
    layer = bnb.nn.Linear8bitLt(48, 20, has_fp16_weights=False)
    original = layer.weight.data.clone()
    layer.to("cpu")
    if called:
        layer(torch.randn(3, 48))
    absmax = layer.state.SCB if called else layer.weight.SCB
    weight = quant.read(layer)
    eye = torch.eye(48)
    layer.bias.data.zero_()
    assert_decodes_to(weight, layer(eye).T.contiguous())
    assert rms_error(weight.dequantize(), bnb.functional.int8_vectorwise_dequant(layer.weight.data, absmax)) < 1e-7
    assert rms_error(weight.dequantize(), original) < 1e-2


def test_bitsandbytes_int8_scales_that_were_loaded(bnb):
    """In place, or by a write that nobody sees."""
    layer, other = (bnb.nn.Linear8bitLt(48, 20, has_fp16_weights=False).to("cpu") for _ in range(2))
    quant.read(layer)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(quant.read(layer).dequantize(), quant.read(other).dequantize())
    layer.weight.SCB.data.mul_(2)
    assert torch.equal(quant.read(layer).dequantize(), 2 * quant.read(other).dequantize())


# torchao


@pytest.fixture
def torchao():
    pytest.importorskip("torchao")
    import torchao.quantization as quantization

    return quantization


@pytest.mark.parametrize("dtype", DTYPES)
def test_torchao_int8(torchao, dtype):
    layer = nn.Linear(48, 20, dtype=dtype)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    assert_decodes_to(quant.read(layer), layer.weight.dequantize())
    assert_decodes_to(quant.read(layer.weight), layer.weight.dequantize())


@pytest.mark.parametrize("granularity", ["PerRow", "PerTensor"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchao_float8(torchao, dtype, granularity):
    granularity = getattr(torchao, granularity)()
    weight = torchao.Float8Tensor.from_hp(random_weight(20, 48, dtype), granularity=granularity)
    assert_decodes_to(quant.read(weight), weight.dequantize())


@pytest.mark.parametrize("blocks", [(64, 256), (32, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchao_nf4(dtype, blocks):
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    weight = nf4.to_nf4(random_weight(128, 384, dtype), *blocks)  # a row is not a multiple of 256 blocks
    assert_decodes_to(quant.read(weight), weight.get_original_weight())


# HQQ


@pytest.mark.parametrize("view_as_float", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hqq(dtype, axis, view_as_float):
    hqq = pytest.importorskip("hqq.core.quantize")
    for (N, K), group_size in itertools.product(((40, 96), (40, 32)), (64, 32, None)):
        config = hqq.BaseQuantizeConfig(nbits=4, group_size=group_size, axis=axis, view_as_float=view_as_float)
        layer = hqq.HQQLinear(nn.Linear(K, N), config, compute_dtype=dtype, device="cpu")
        assert_decodes_to(quant.read(layer), layer.dequantize())


# What is refused, and what is not imported.


def test_what_is_no_quantised_weight():
    for source in (nn.Linear(3, 4), nn.Linear(3, 4).weight, torch.zeros(3, 4), nn.ReLU()):
        assert not quant.is_quantized(source)
        with pytest.raises(ValueError, match="read: the weight is a .*; expected one of bitsandbytes.Params4bit"):
            quant.read(source)


def test_blocks(bnb, monkeypatch):
    """A weight of several blocks of rows, the last one shorter, and the rows that do not start at a block."""
    weight = quant.read(params4bit(bnb, random_weight(70, 40)))
    expected = weight.dequantize()
    monkeypatch.setattr(quant.formats, "_BLOCK_ELEMENTS", {"cpu": 16 * 40, "gpu": 16 * 40})
    assert_decodes_to(weight, expected)


def test_rows_have_step_1():
    weight = quant.QuantizedWeight(
        "row8", (4, 3), torch.float32, (torch.ones(4, 3, dtype=torch.int8), torch.arange(4.0))
    )
    assert weight.nbytes == 12 + 16
    assert torch.equal(weight.dequantize(slice(-2, None)), torch.tensor([[2.0] * 3, [3.0] * 3]))
    with pytest.raises(ValueError, match="step 2; expected 1"):
        weight.dequantize(slice(0, 4, 2))


def test_bitsandbytes_refusals(bnb):
    fresh = bnb.nn.Linear4bit(64, 32)
    with pytest.raises(ValueError, match="not quantized yet"):
        quant.read(fresh)
    with pytest.raises(ValueError, match="not quantized yet"):
        quant.read(bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False))
    with pytest.raises(ValueError, match="has_fp16_weights=True"):
        quant.read(bnb.nn.Linear8bitLt(64, 32))
    with pytest.raises(ValueError, match=r"packed has shape \(1024,\); expected \(1000,\) \(shape \(40, 50\)"):
        broken = linear4bit(bnb, 32, 64)
        broken.weight.quant_state.shape = torch.Size((40, 50))
        quant.read(broken)


def test_torchao_refusals(torchao):
    layer = nn.Linear(64, 32)
    both = copy.deepcopy(layer)
    torchao.quantize_(both, torchao.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match="quantize or scale x too"):
        quant.read(both)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    layer.weight.zero_point += 1
    with pytest.raises(ValueError, match="zero points"):
        quant.read(layer)
    groups = torchao.Int8Tensor.from_hp(random_weight(20, 64), granularity=torchao.PerGroup(32))
    with pytest.raises(ValueError, match=r"scales \(20, 2\); expected one for each of 20 rows"):
        quant.read(groups)


def test_hqq_refusals():
    hqq = pytest.importorskip("hqq.core.quantize")
    layer = hqq.HQQLinear(nn.Linear(64, 32), hqq.BaseQuantizeConfig(nbits=8, group_size=64), device="cpu")
    with pytest.raises(ValueError, match="packed as 8bit_u8; expected 4bit_u8"):
        quant.read(layer)


def test_no_library_is_imported():
    code = (
        "import sys, torch; from dora_kernels import quant; quant.is_quantized(torch.nn.Linear(2, 2)); "
        "assert not {'bitsandbytes', 'torchao', 'hqq'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
