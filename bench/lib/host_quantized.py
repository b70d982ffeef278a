"""A layer over bitsandbytes' NF4 on the CPU as the host sees it on a GPU: nothing is decoded here, no weight moved.

Not so LLM.int8, whose product goes through other operators on a CPU than on a GPU: there is no case of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from unittest import mock

from peft.tuners.lora import dora
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn

from bench.lib import host_driver
from bench.lib.host_layers import problem_of
from bench.lib.problem import LayerProblem

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None


def nf4() -> LayerProblem:
    """bf16 adapters over Linear4bit, NF4 with its scales quantized too."""
    problem = problem_of("nf4-bf16")
    # else eval mode repacks the weight, and decodes it in a product, on CPUs with AVX-512 alone
    problem.base.support_avx512bf16_for_cpu = False
    return problem


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, bitsandbytes' decoders on the CPU are called and do nothing, as the kernels of a driver that launches
    nothing; and PEFT's DoRA does not move the weight "back to the CPU" after it was decoded, which it does there alone.
    """
    from bitsandbytes.backends.cpu import ops

    nothing = host_driver.loaded().decode_nothing
    with contextlib.ExitStack() as stack:
        for name in ("cdequantize_blockwise_cpu_nf4_bf16", "cdequantize_blockwise_cpu_fp32"):
            stack.enter_context(mock.patch.object(ops.lib, name, nothing, create=True))
        stack.enter_context(mock.patch.object(dora, "dequantize_module_weight", _decoded))
        yield


def _decoded(module: nn.Module) -> object:
    return dequantize_bnb_weight(module.weight, state=None)
