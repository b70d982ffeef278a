"""The demo's two runs, fine-tunings from the same start whose steps alternate, and their result."""

from __future__ import annotations

import copy
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from statistics import median

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import Progress
from torch import Tensor
from transformers import LlamaForCausalLM

from dora_kernels import adapters, ops, quant
from dora_kernels.extras.demo.base import TUNING_TEXT, loss_of, sample, standard_library
from dora_kernels.extras.demo.settings import PRESETS, WARM_UP_STEPS, Settings
from dora_kernels.planning.options import options

TOLERANCE = 1e-3
"""Largest |loss difference| between the runs at any step."""

EPOCHS = 6
"""A fine-tuning sees each batch that many times: the first and the last epoch compare losses of the same text."""


class Run:
    """One fine-tuning: a model, its optimizer, and what was measured at each step."""

    zero_at_start = "lora_B"
    """The part of an adapter that is zero when it is fresh, as it stands in parameters' names."""

    def __init__(self, name: str, model: PeftModel, rate: float, settings: Settings) -> None:
        self.name = name
        self.model = model
        self.dtype = settings.dtype
        steps = settings.steps or PRESETS[settings.preset].steps
        self.epoch = max(1, steps // EPOCHS)  # in steps
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=rate)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.peak_bytes = 0

    def step(self, ids: Tensor) -> float:
        """One training step on token ids (batch, sequence). Returns the loss."""
        cuda = ids.is_cuda
        if cuda:
            torch.cuda.reset_peak_memory_stats(ids.device)
            torch.cuda.synchronize(ids.device)
        start = time.perf_counter()
        loss = loss_of(self.model, ids, self.dtype)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # to None: the other run's peak must not hold this run's gradients
        if cuda:
            torch.cuda.synchronize(ids.device)
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(ids.device))
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())
        return self.losses[-1]

    @property
    def step_seconds(self) -> float:
        """Median over the steps after the warm-up."""
        return median(self.seconds[WARM_UP_STEPS:])

    @property
    def first_loss(self) -> float:
        """Mean over the first epoch."""
        return mean(self.losses[: self.epoch])

    @property
    def last_loss(self) -> float:
        """Mean over the last epoch."""
        return mean(self.losses[-self.epoch :])

    def adapter_norms(self) -> list[float]:
        """|B| (Frobenius) of every layer; a fresh adapter has 0."""
        return [p.norm().item() for name, p in self.model.named_parameters() if self.zero_at_start in name]


@dataclass(frozen=True)
class DemoResult:
    """Both runs, the DoRA layers of the model, and what dora_kernels says it did."""

    method = "DoRA"
    operators = ("forward", "backward")

    stock: Run
    ours: Run
    layers: int
    report: adapters.ModelReport
    calls: Counter[tuple[str, str]]
    weight_bytes: int
    """Of the frozen linear layers, as they are stored."""
    weight_elements: int

    @property
    def expected_calls(self) -> int:
        """Of each operator: one per layer and step."""
        return self.layers * len(self.ours.losses)

    def calls_of(self, op: str) -> int:
        return sum(count for (name, _), count in self.calls.items() if name == op)

    @property
    def largest_difference(self) -> float:
        """Largest |loss difference| at any step; NaN where a loss is NaN."""
        differences = torch.tensor(self.stock.losses, dtype=torch.float64) - torch.tensor(self.ours.losses)
        return differences.abs().max().item()

    def failures(self) -> list[str]:
        """The promises of the demo that this result does not keep."""
        failed = []
        if not len(self.report.taken_over) == len(self.report) == self.layers > 0:
            failed.append(f"expected {self.layers} DoRA layers to be taken over; {self.report}")
        for op in self.operators:
            if self.calls_of(op) != self.expected_calls:
                failed.append(f"the {op} op ran {self.calls_of(op)} times; expected {self.expected_calls}")
        for run in (self.stock, self.ours):
            if not run.last_loss < run.first_loss:
                failed.append(f"{run.name}: the loss went from {run.first_loss:.4f} to {run.last_loss:.4f}")
            if not min(run.adapter_norms(), default=0.0) > 0:
                failed.append(f"{run.name}: {run.zero_at_start} of some layer is still zero")
        if not self.largest_difference <= TOLERANCE:
            failed.append(f"the losses differ by {self.largest_difference:.1e}; expected at most {TOLERANCE:.0e}")
        return failed


def fine_tune(model: LlamaForCausalLM, settings: Settings, progress: Progress) -> DemoResult:
    """Fine-tune `model` with DoRA on every linear layer, by stock PEFT and enabled, step by step in turns."""
    preset = PRESETS[settings.preset]
    config = LoraConfig(
        use_dora=True,
        target_modules="all-linear",
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        lora_dropout=0.0,  # with dropout the two runs would draw different masks
    )
    torch.manual_seed(settings.seed)
    with warnings.catch_warnings():
        # PEFT 0.21 reads a model attribute that transformers 5 has renamed
        warnings.simplefilter("ignore", FutureWarning)
        stock_model = get_peft_model(model, config)
    our_model = copy_over(stock_model)
    report = adapters.enable(our_model)
    runs = (
        Run("stock PEFT", stock_model, preset.rate, settings),
        Run("dora_kernels", our_model, preset.rate, settings),
    )
    return compare(DemoResult, *runs, report, settings, progress)


def copy_over(model: PeftModel) -> PeftModel:
    """A copy with adapters of its own over the same frozen weights."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, memo=frozen)  # a memo entry is shared and not copied


def compare(
    cls: type[DemoResult], stock: Run, ours: Run, report: adapters.ModelReport, settings: Settings, progress: Progress
) -> DemoResult:
    """Take the steps of both runs in turns, on the same batches."""
    preset, epoch = PRESETS[settings.preset], ours.epoch
    steps = settings.steps or preset.steps
    batches = sample(standard_library(TUNING_TEXT), preset, epoch, settings.seed + 1)
    bars = {run: progress.add_task(run.name, total=steps, status="") for run in (stock, ours)}
    before = Counter(ops.calls)
    with options(backend=settings.backend):
        for step in range(steps):
            ids = batches[step % epoch].to(settings.torch_device)
            # in turns, and each run goes first every other time: what else the machine does hits both alike
            for run in (stock, ours) if step % 2 == 0 else (ours, stock):
                loss = run.step(ids)
                progress.update(bars[run], advance=1, status=f"loss {loss:.4f}")
    names = stock.model.targeted_module_names
    bases = [stock.model.base_model.model.get_submodule(name).base_layer for name in names]
    return cls(
        stock,
        ours,
        len(names),
        report,
        ops.calls - before,
        sum(quant.read(base).nbytes if quant.is_quantized(base) else base.weight.nbytes for base in bases),
        sum(base.in_features * base.out_features for base in bases),
    )


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
