"""A small PEFT VeRA model, and the DVoRA model that it is made into."""

import torch
from peft import VeraConfig, get_peft_model
from peft.tuners.vera.layer import Linear as VeraLinear

from dora_kernels import to_dvora
from tests.support.peft_problem import Net
from tests.support.problem import DEVICE


def vera_model(conv1d=False, dtype=torch.float32, trained=True, sizes=(24, 40, 20), **config):
    """A VeRA model in train mode whose lambda_b is not zero."""
    torch.manual_seed(0)
    settings = {"target_modules": ["up", "down"], "r": 5, "projection_prng_key": 7, "fan_in_fan_out": conv1d} | config
    if conv1d:
        settings["target_modules"] = ["up"]
    model = get_peft_model(Net(conv1d, sizes).to(DEVICE, dtype), VeraConfig(**settings))
    if trained:
        for name, parameter in model.named_parameters():
            if "vera_lambda_b" in name:
                parameter.data.normal_()
    return model.train()


def layers(model):
    return [module for module in model.modules() if isinstance(module, VeraLinear)]


def dvora_model(**config):
    """Converted, with a gain far from 1."""
    model = to_dvora(vera_model(**config))
    for layer in layers(model):
        layer.vera_magnitude_vector["default"].data.mul_(1 + torch.rand(layer.out_features, device=DEVICE))
    return model
