"""The small PEFT model over quantized weights, and its dense twin: the same numbers in nn.Linear layers."""

import copy
import inspect

import pytest
import torch
from peft.tuners.lora.torchao import TorchaoLoraLinear

from dora_kernels import quant
from tests.support.peft_problem import Net, adapt, layers
from tests.support.problem import DEVICE

# K = 24 and 40 are no multiple of a block of 64, and no width that bitsandbytes decodes wrongly on a CPU; 48 and 96 are
STRADDLING, ALIGNED, TRAPPED = (24, 40, 20), (64, 128, 32), (48, 96, 32)


def nf4(linear, dtype, **settings):
    return bitsandbytes4(linear, dtype, "nf4", **settings)


def fp4(linear, dtype):
    return bitsandbytes4(linear, dtype, "fp4", compress_statistics=False)


def bitsandbytes4(linear, dtype, quant_type, **settings):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, quant_type=quant_type, **settings
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to(dtype).to(DEVICE)


def int8(linear, dtype):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
    )
    layer.load_state_dict(linear.state_dict())
    layer.to(DEVICE)
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(dtype)
    return layer


def hqq(linear, dtype, axis=1):
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=8, axis=axis)
    with torch.no_grad():  # or its bias is no leaf
        return quantize.HQQLinear(linear, config, compute_dtype=dtype, device=DEVICE)


def torchao_int8(linear, dtype):
    quantization = pytest.importorskip("torchao.quantization")
    how_to_quantize = inspect.signature(TorchaoLoraLinear.__init__).parameters["get_apply_tensor_subclass"]
    if how_to_quantize.default is inspect.Parameter.empty:
        pytest.skip("this PEFT takes a torchao layer only from transformers")
    linear = linear.to(DEVICE, dtype).requires_grad_(False)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    return linear


FORMATS = {"nf4": nf4, "fp4": fp4, "int8": int8, "hqq": hqq, "torchao int8": torchao_int8}


def build(format, dtype=torch.float32, sizes=STRADDLING, settings=None, **config):
    """A stock PEFT model in train mode over quantized layers, with active DoRA adapters (see peft_problem.adapt)."""
    torch.manual_seed(0)
    net = Net(sizes=sizes)
    net.up = FORMATS[format](net.up, dtype, **(settings or {}))
    net.down = FORMATS[format](net.down, dtype, **(settings or {}))
    # what transformers sets on a model it has loaded quantized; PEFT chooses its layer classes by them
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = format in ("nf4", "fp4"), format == "int8"
    return adapt(net, **config)


def dense(model, dtype):
    """The restatement: stock PEFT over nn.Linear layers of the weights decoded to `dtype`, the adapters `model`'s."""
    config = model.peft_config["default"]
    net = Net(sizes=(model.up.in_features, model.up.out_features, model.down.out_features)).to(DEVICE, dtype)
    settings = {"r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    twin = adapt(net, len(model.peft_config), **settings)
    for layer, other in zip(layers(model), layers(twin), strict=True):
        base, linear = layer.base_layer, other.base_layer
        linear.weight.data = quant.read(base).dequantize().to(dtype)
        if base.bias is not None:
            linear.bias.data = base.bias.detach().to(dtype)
        for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
            setattr(other, part, copy.deepcopy(getattr(layer, part)))
    return twin
