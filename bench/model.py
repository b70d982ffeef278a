"""A whole model's training steps, frozen and adapted: JSON {meta, rows}, one row per variant.

    python -m bench.model                                         # bench/results/<gpu>/model.json
    python -m bench.model --preset tiny --device cpu --out /tmp/model.json

The model is built from its config with random bfloat16 weights: nothing is downloaded, and nothing is float32 first.
Adapters on every linear layer, float32 as PEFT has them over a bfloat16 base, bfloat16 autocast, gradient
checkpointing, micro-steps of one random sequence each with the loss on its last tokens, no optimizer step: the protocol
of arXiv 2603.22276, but for the autocast and for half as many micro-steps a repeat. One variant after another over one
base, what says most first; the file is complete after every variant.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

import dora_kernels
from bench.lib import machine, outputs
from bench.lib.machine import ROOT, device_folder, meta
from bench.lib.problem import SCALING
from bench.lib.report import write
from dora_kernels import ops

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# in order of worth, for the time may run out
VARIANTS = ("ours", "peft_dora", "frozen", "peft_lora")
# ours against peft_dora, relative. On a CPU the tiny preset differs by 5e-5 and 3e-4, with eight layers by 1e-4 and
# 5e-3; PEFT LoRA on the tiny preset by 6e-3 and 8e-2.
LOSS_TOLERANCE = 1e-3
GRADIENT_TOLERANCE = 5e-2


@dataclass(frozen=True)
class ModelPreset:
    """A model's config, and what one repeat is: micro_steps of 1 x tokens, loss on the last loss_tokens."""

    config: dict[str, Any]
    rank: int
    micro_steps: int
    tokens: int
    loss_tokens: int


PRESETS = {
    # the text part, from the model's published config.json
    "qwen3-vl-8b": ModelPreset(
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        rank=384,
        micro_steps=4,
        tokens=4096,
        loss_tokens=1024,
    ),
    "tiny": ModelPreset(
        {
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            # logits of size 1, as those of the large model: at 0.02 they would all be near 0 and every loss log(512)
            "initializer_range": 0.09,
        },
        rank=16,
        micro_steps=2,
        tokens=128,
        loss_tokens=64,
    ),
}


@dataclass
class ModelRow:
    """One variant, as it stands in the JSON. A row that is not ok has no time.

    seconds: median time of a repeat; loss and gradient_norm: of the warm-up micro-step, which is the same for every
    variant, the norm over everything that is trained; peak_bytes: device memory at the peak, weights and all;
    conditions: the device's at the end (bench.lib.machine).
    """

    variant: str
    preset: str
    adapted_layers: int = 0
    R: int = 0
    micro_steps: int = 0
    tokens: int = 0
    ok: bool = True
    reason: str | None = None
    backend: str | None = None
    seconds: float | None = None
    repeats: list[float] = field(default_factory=list)
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    loss: float | None = None
    gradient_norm: float | None = None
    conditions: dict[str, int | None] = field(default_factory=dict)

    def fail(self, reason: str) -> None:
        """Take back the times."""
        self.ok, self.reason = False, reason
        self.seconds = self.tokens_per_second = self.peak_bytes = None
        self.repeats = []


def base_model(preset: ModelPreset, device: torch.device) -> nn.Module:
    """The frozen model in training mode with gradient checkpointing, which every variant adapts in its turn."""
    torch.manual_seed(0)
    with device:
        model = Qwen3ForCausalLM._from_config(Qwen3Config(**preset.config), dtype=torch.bfloat16)
    model.requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


@contextlib.contextmanager
def adapted(
    base: nn.Module, preset: ModelPreset, variant: str, device: torch.device
) -> Iterator[tuple[nn.Module, int]]:
    """The model of a variant, and how many layers are adapted; afterwards `base` is without adapters again.

    The DoRA variants have the same lora_B, far from zero, and gains of 0.5 to 1.5. Raises RuntimeError where a layer
    of "ours" was left to PEFT.
    """
    if variant == "frozen":
        yield base, 0
        return
    R = preset.rank
    config = peft.LoraConfig(
        r=R, lora_alpha=SCALING * R, lora_dropout=0.0, target_modules=LINEARS, use_dora=variant != "peft_lora"
    )
    with device:  # PEFT makes adapters where torch does: a billion random numbers take the CPU ten seconds
        model = peft.get_peft_model(base, config)
    try:
        _randomise(model, model.config.initializer_range, device)
        if variant == "ours":
            report = dora_kernels.enable(model)
            if report.left_alone or not report.taken_over:
                raise RuntimeError(f"ours: {report}")
        yield model.train(), sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters())
    finally:
        dora_kernels.disable(model)
        model.unload()
        base.requires_grad_(False)


def _randomise(model: nn.Module, size: float, device: torch.device) -> None:
    """Adapters whose update is about a tenth of a weight of standard deviation `size`; gains are 0.5 to 1.5."""
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.normal_(generator=generator)
            elif "lora_B" in name:
                parameter.normal_(std=0.1 * size / (SCALING * parameter.shape[1] ** 0.5), generator=generator)
        # a pass of its own: peft_lora has no magnitudes, and its other numbers must not depend on that
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(0.5 + torch.rand(parameter.shape, device=device, generator=generator))


def micro_step(model: nn.Module, tokens: Tensor, loss_tokens: int) -> Tensor:
    """Forward and backward of one sequence (1, T); the loss, on the last loss_tokens of it.

    x of the first layer requires a gradient: the frozen model then has a backward pass, and all variants the same one.
    """
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        # the logits before each of the last tokens, and the last one's own, which nothing is compared with
        logits = model(inputs_embeds=embedded, logits_to_keep=loss_tokens + 1, use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits.float(), tokens[0, -loss_tokens:])
    loss.backward()
    return loss.detach()


def measure_variant(
    base: nn.Module,
    name: str,
    variant: str,
    device: torch.device,
    seconds: float,
    repeats: int,
    clock: Callable[[], float] = time.monotonic,
) -> ModelRow:
    """One row: a warm-up micro-step, then as many of `repeats` as begin within `seconds`, at least one."""
    preset = PRESETS[name]
    row = ModelRow(variant, name, 0, preset.rank, preset.micro_steps, preset.tokens)
    end = clock() + seconds
    try:
        with adapted(base, preset, variant, device) as (model, row.adapted_layers):
            _measure(model, row, preset, device, repeats, lambda: clock() < end)
    except Exception as error:  # a variant that does not fit in memory is a result
        row.fail(f"{type(error).__name__}: {error}")
    row.conditions = machine.conditions(device) if device.type == "cuda" else {}
    return row


def _measure(
    model: nn.Module, row: ModelRow, preset: ModelPreset, device: torch.device, repeats: int, more: Callable[[], bool]
) -> None:
    """The results of a model into its row; repeats after the first one while there is `more` time."""
    on_gpu = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(2)
    shape = (preset.micro_steps, 1, preset.tokens)
    batches = torch.randint(preset.config["vocab_size"], shape, device=device, generator=generator)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    before = ops.calls.copy()
    row.loss = micro_step(model, batches[0], preset.loss_tokens).item()
    ran = ops.calls - before
    if trained:
        row.gradient_norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(parameter.grad) for parameter in trained])
        ).item()
    if row.variant == "ours":
        backends = {backend for _, backend in ran}
        row.backend = backends.pop() if len(backends) == 1 else None
        if row.backend is None or any(ran[step, row.backend] < row.adapted_layers for step in ("forward", "backward")):
            raise RuntimeError(f"operators called: {dict(ran)}; expected every adapted layer on one backend")

    if on_gpu:  # what building the model took at its peak is not training's
        torch.cuda.reset_peak_memory_stats(device)
    while not row.repeats or (len(row.repeats) < repeats and more()):
        model.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        losses = [micro_step(model, batch, preset.loss_tokens) for batch in batches]
        if on_gpu:
            torch.cuda.synchronize(device)
        row.repeats.append(time.perf_counter() - start)
    row.seconds = statistics.median(row.repeats)
    row.tokens_per_second = preset.micro_steps * preset.tokens / row.seconds
    row.peak_bytes = torch.cuda.max_memory_allocated(device) if on_gpu else None
    if not all(map(math.isfinite, [row.loss, row.gradient_norm or 0.0, *torch.stack(losses).tolist()])):
        row.fail(f"loss {row.loss}, gradient norm {row.gradient_norm}; expected finite numbers")


def disagreement(ours: ModelRow, theirs: ModelRow) -> str | None:
    """The difference of loss or gradient norm between ours and peft_dora that is too large, as a line, or None."""
    for name, tolerance in (("loss", LOSS_TOLERANCE), ("gradient_norm", GRADIENT_TOLERANCE)):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine is None or other is None or not abs(mine - other) <= tolerance * abs(other):
            return f"{name} is {mine}, PEFT DoRA's is {other}; expected a relative difference of {tolerance} at most"
    return None


def run(
    preset: str,
    variants: Sequence[str],
    device: torch.device,
    out: pathlib.Path,
    seconds: float,
    repeats: int,
    information: dict[str, Any],
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """Measure the variants in order into `out`; each may use its share of the seconds that are left."""
    end = clock() + seconds
    base = base_model(PRESETS[preset], device)
    print(f"base model in {clock() - end + seconds:.0f} s", flush=True)
    rows: list[ModelRow] = []
    for done, variant in enumerate(variants):
        left = end - clock()
        if left <= 0:
            print(f"out of time, left out: {', '.join(variants[done:])}", flush=True)
            break
        row = measure_variant(base, preset, variant, device, left / (len(variants) - done), repeats, clock)
        rows.append(row)
        by_name = {row.variant: row for row in rows if row.ok}
        if {"ours", "peft_dora"} <= by_name.keys():
            reason = disagreement(by_name["ours"], by_name["peft_dora"])
            if reason is not None:
                by_name["ours"].fail(reason)
        print(line(row), flush=True)
        write(out, information | {"left_out": list(variants[done + 1 :])}, [asdict(row) for row in rows])
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return [asdict(row) for row in rows]


def line(row: ModelRow) -> str:
    """One variant in a line."""
    if not row.ok:
        return f"{row.variant:<10} {row.reason}"
    memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:7.1f} GiB"
    return f"{row.variant:<10} {row.seconds:8.3f} s {row.tokens_per_second:9.0f} tokens/s {memory}  loss {row.loss:.4f}"


@outputs.command("bench.model")
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where a variant was not measured, 2 where the device is not there."""
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="qwen3-vl-8b")
    parser.add_argument(
        "--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="(default: all, as here)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=240, help="for all variants (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="at most (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, help="default: bench/results/<gpu>/model.json")
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench.model: torch sees no GPU; expected one, or --preset tiny --device cpu", file=sys.stderr)
        return 2
    out = arguments.out or ROOT / "bench" / "results" / device_folder(device) / "model.json"
    outputs.claim("bench.model", out)
    information = meta(device, arguments.commit)
    print(information["device"])
    rows = run(arguments.preset, arguments.variant, device, out, arguments.seconds, arguments.repeats, information)
    return 0 if len(rows) == len(arguments.variant) and all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
