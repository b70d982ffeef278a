"""The cases of bench.host by name."""

from __future__ import annotations

from collections.abc import Sequence

from bench.lib import host_quantized
from bench.lib.host_layers import DROPOUT, DROPS_LOW_RANK, MODULES, PROVIDERS, Case, float32_adapters, problem_of
from bench.lib.host_models import LLAMA

CASES: dict[str, Case] = {
    "bf16": Case(lambda: problem_of("bf16"), PROVIDERS),
    "bf16-autocast": Case(lambda: problem_of("bf16-autocast"), PROVIDERS),
    "bf16-fp32": Case(float32_adapters, PROVIDERS),
    "bias": Case(lambda: problem_of("bf16", bias=True), PROVIDERS),
    # in eval mode nobody drops
    "dropout": Case(lambda: problem_of("bf16", dropout=DROPOUT), MODULES, ("training",)),
    "dropout-on-lora": Case(lambda: problem_of("bf16", dropout=DROPOUT), DROPS_LOW_RANK, ("training",)),
    "checkpointed": Case(lambda: problem_of("bf16"), PROVIDERS, ("training",), checkpointed=True),
    "llama": LLAMA,
}
if host_quantized.INSTALLED:
    CASES["nf4"] = Case(host_quantized.nf4, MODULES, context=host_quantized.as_on_gpu)


def parts(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each of these cases with each kind of steps that it has."""
    return [(name, kind) for name in names for kind in CASES[name].kinds]
