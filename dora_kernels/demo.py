"""The demo: a small Llama fine-tuned with PEFT DoRA twice from the same start, by stock PEFT and enabled.

Nothing is downloaded. The text is the source of Python's standard library, the model reads bytes, and its base
is trained briefly before it is frozen, so that the fine-tuning starts from a model that has learned something.

Both runs take their steps in turns on the same batches. They share the frozen base weights, with --base nf4 packed to
4 bits by bitsandbytes (QDoRA); each has its own adapters and optimizer. `run` exits 1 unless dora_kernels really
computed every layer and the runs agree.
"""

from __future__ import annotations

import copy
import importlib.util
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import matplotlib
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dora_kernels import adapters, launch, ops, quant

TOLERANCE = 1e-3
"""Largest |loss difference| between the runs at any step."""

WARM_UP_STEPS = 3
"""Steps left out of the median time: kernels compile and allocators grow in the first ones."""

EPOCHS = 6
"""How often a fine-tuning sees each batch: the first and the last epoch compare losses of the same text."""

BASE_TEXT = ("*.py",)
TUNING_TEXT = ("asyncio/*.py", "email/*.py")
"""Globs under the standard library's folder: the base model never sees what it is fine-tuned on."""


@dataclass(frozen=True)
class Preset:
    """A Llama model and its training. dtype: of the frozen base on a GPU, with autocast; a CPU takes float32."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    sequence: int
    batch: int
    base_steps: int
    steps: int
    base_rate: float
    rate: float
    rank: int = 16
    dtype: torch.dtype = torch.float32


PRESETS = {
    "tiny": Preset(
        hidden=256,
        layers=4,
        intermediate=704,  # in whole blocks of 64: bitsandbytes decodes some other widths wrongly on a CPU
        heads=4,
        kv_heads=2,
        sequence=128,
        batch=8,
        base_steps=120,
        steps=60,
        base_rate=1e-3,
        # Not more: at 3e-3 stock PEFT drifts 1e-3 away from stock PEFT started one float32 ulp apart.
        rate=1e-3,
    ),
    # The layer shapes of Llama-3.2-1B. Its base is trained in float32: 16 bytes per weight, about 16 GB.
    "llama-1b": Preset(
        hidden=2048,
        layers=16,
        intermediate=8192,
        heads=32,
        kv_heads=8,
        sequence=512,
        batch=8,
        base_steps=100,
        steps=60,
        base_rate=1e-4,
        rate=1e-4,
        dtype=torch.bfloat16,
    ),
}


COLUMNS = (
    TextColumn("{task.description:<24}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[status]}"),
)
"""Of a progress bar: every task has a status."""

METHODS = {"dora": "DoRA", "dvora": "DVoRA"}
"""What is fine-tuned: PEFT's DoRA, or DVoRA, which PEFT does not have (demo_dvora.py)."""

VERA_RANK = 3
"""DVoRA's rank over the preset's: it costs R numbers a layer, not R (N + K). 48 over K = 256 keeps the norm's terms."""


BASES = ("dense", "nf4")
"""What the frozen weights are: as they were trained, or bitsandbytes' NF4, nested."""


@dataclass(frozen=True)
class Settings:
    """The options of the command line. ValueError where this machine cannot run them."""

    preset: str = "tiny"
    method: str = "dora"
    base: str = "dense"
    device: str = "auto"
    backend: str = "auto"
    steps: int | None = None
    seed: int = 0
    out: str = "demo.png"

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"demo: preset is {self.preset!r}; expected one of {', '.join(PRESETS)}")
        if self.method not in METHODS:
            raise ValueError(f"demo: method is {self.method!r}; expected one of {', '.join(METHODS)}")
        if self.base not in BASES:
            raise ValueError(f"demo: base is {self.base!r}; expected one of {', '.join(BASES)}")
        if self.base == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("demo: base is 'nf4' but bitsandbytes is not installed; expected pip install bitsandbytes")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"demo: device is {self.device!r}; expected auto, cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("demo: device is 'cuda' but torch sees no CUDA device; expected auto or cpu")
        if self.steps is not None and self.steps <= WARM_UP_STEPS:
            raise ValueError(f"demo: steps is {self.steps}; expected more than {WARM_UP_STEPS}, the warm-up")
        if not Path(self.out).absolute().parent.is_dir():
            raise ValueError(f"demo: out is {self.out!r}; expected a file in a folder that exists")
        if Path(self.out).suffix != ".png":
            raise ValueError(f"demo: out is {self.out!r}; expected a name that ends in .png")
        launch.backend_for(self.backend, self.torch_device, self.dtype)

    @property
    def torch_device(self) -> torch.device:
        available = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(available if self.device == "auto" else self.device)

    @property
    def rank(self) -> int:
        return PRESETS[self.preset].rank * (VERA_RANK if self.method == "dvora" else 1)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.torch_device.type == "cpu" else PRESETS[self.preset].dtype


class Run:
    """One fine-tuning: a model, its optimizer, and what was measured at each step."""

    zero_at_start = "lora_B"
    """What a fresh adapter has zero, and its parameters' names have in them."""

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
        loss = _loss(self.model, ids, self.dtype)
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
        return _mean(self.losses[: self.epoch])

    @property
    def last_loss(self) -> float:
        """Mean over the last epoch."""
        return _mean(self.losses[-self.epoch :])

    def adapter_norms(self) -> list[float]:
        """|B| (Frobenius) of every layer; a fresh adapter has 0."""
        return [p.norm().item() for name, p in self.model.named_parameters() if self.zero_at_start in name]


@dataclass(frozen=True)
class Result:
    """Both runs, the DoRA layers of the model, and what dora_kernels says it did."""

    method = "DoRA"
    operators = ("forward", "backward")

    stock: Run
    ours: Run
    layers: int
    report: adapters.Report
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
        """What the demo promises and this result does not keep."""
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


def run(settings: Settings, tune: Callable[..., Result] | None = None) -> int:
    """Run the demo. Returns 0, or 1 where it did not show what it promises. tune: another method's fine_tune."""
    console = Console()
    preset = PRESETS[settings.preset]
    device, dtype = settings.torch_device, settings.dtype
    console.print(
        f"Llama with {preset.layers} blocks of width {preset.hidden}, "
        f"{METHODS[settings.method]} rank {settings.rank}, "
        f"{preset.batch} x {preset.sequence} bytes per step,\n"
        f"{str(dtype).removeprefix('torch.')} on {launch.device_facts(device).name}"
        + (", over a base in NF4" if settings.base == "nf4" else "")
    )
    with Progress(*COLUMNS, console=console) as progress:
        model = trained_base(preset, device, dtype, settings.seed, progress)
        if settings.base == "nf4":
            pack(model)
        result = (tune or fine_tune)(model, settings, progress)
    console.print(result_table(result))
    draw(result, settings.out)
    console.print(f"Chart: {settings.out}", soft_wrap=True)
    failures = result.failures()
    for failure in failures:
        console.print(f"[bold red]FAILED[/] {failure}", soft_wrap=True)
    if not failures:
        passed = f"every layer was taken over, and the losses are those of {result.stock.name}"
        console.print(f"[bold green]passed[/] {passed}", soft_wrap=True)
    return 1 if failures else 0


def trained_base(
    preset: Preset, device: torch.device, dtype: torch.dtype, seed: int, progress: Progress
) -> LlamaForCausalLM:
    """A Llama trained from random weights for preset.base_steps, in float32 weights, then cast to dtype."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,  # bytes
            hidden_size=preset.hidden,
            num_hidden_layers=preset.layers,
            intermediate_size=preset.intermediate,
            num_attention_heads=preset.heads,
            num_key_value_heads=preset.kv_heads,
            max_position_embeddings=preset.sequence,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=preset.base_rate)
    batches = sample(standard_library(BASE_TEXT), preset, preset.base_steps, seed)
    bar = progress.add_task("training the base", total=preset.base_steps, status="")
    for ids in batches:
        loss = _loss(model, ids.to(device), dtype)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.update(bar, advance=1, status=f"loss {loss.item():.3f}")
    return model.to(dtype)


def pack(model: LlamaForCausalLM) -> None:
    """Replace every linear layer but the head by bitsandbytes' Linear4bit of the same weight, as transformers loads it.

    The compute dtype is that of the weight.
    """
    import bitsandbytes

    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            sizes = (linear.in_features, linear.out_features)
            weight = linear.weight.detach()
            packed = bitsandbytes.nn.Linear4bit(*sizes, False, weight.dtype, quant_type="nf4", device="meta")
            packed.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=packed)
            model.model.set_submodule(name, packed.to(weight.device))
    model.is_loaded_in_4bit = True  # PEFT chooses its layer classes by it


def fine_tune(model: LlamaForCausalLM, settings: Settings, progress: Progress) -> Result:
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
    return compare(Result, *runs, report, settings, progress)


def copy_over(model: PeftModel) -> PeftModel:
    """A copy with adapters of its own over the same frozen weights."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, memo=frozen)  # a memo entry is shared and not copied


def compare(
    cls: type[Result], stock: Run, ours: Run, report: adapters.Report, settings: Settings, progress: Progress
) -> Result:
    """Take the steps of both runs in turns, on the same batches."""
    preset, epoch = PRESETS[settings.preset], ours.epoch
    steps = settings.steps or preset.steps
    batches = sample(standard_library(TUNING_TEXT), preset, epoch, settings.seed + 1)
    bars = {run: progress.add_task(run.name, total=steps, status="") for run in (stock, ours)}
    before = Counter(ops.calls)
    with launch.options(backend=settings.backend):
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


def standard_library(patterns: tuple[str, ...]) -> Tensor:
    """The bytes of the standard library's source files that match, in a fixed order: (length,) uint8."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    if not paths:
        raise RuntimeError(f"demo: no {patterns} in {folder}; expected the standard library's source")
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in paths)), dtype=torch.uint8)


def sample(text: Tensor, preset: Preset, count: int, seed: int) -> list[Tensor]:
    """Random windows of `text` as token ids: `count` batches (batch, sequence) int64."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - preset.sequence, (count, preset.batch, 1), generator=generator)
    return list(text[starts + torch.arange(preset.sequence)].long())


def result_table(result: Result) -> Table:
    """The numbers of both runs side by side."""
    stock, ours = result.stock, result.ours
    table = Table(title=f"{result.method} fine-tuning, {len(ours.losses)} steps")
    table.add_column("")
    table.add_column(stock.name, justify="right")
    table.add_column(ours.name, justify="right")
    table.add_row("layers taken over", "", f"{len(result.report.taken_over)} of {result.layers}")
    for op in result.operators:
        table.add_row(f"{op} op calls", "", f"{result.calls_of(op)} of {result.expected_calls}")
    table.add_row("backend", "", ", ".join(sorted({backend for _, backend in result.calls})))
    table.add_row("loss, first epoch", f"{stock.first_loss:.5f}", f"{ours.first_loss:.5f}")
    table.add_row("loss, last epoch", f"{stock.last_loss:.5f}", f"{ours.last_loss:.5f}")
    table.add_row("largest |loss difference|", "", f"{result.largest_difference:.1e}")
    norms = (f"{_mean(run.adapter_norms()):.4f}" for run in (stock, ours))
    table.add_row(f"mean |{ours.zero_at_start}| at end (0 at start)", *norms)
    table.add_row("time per step (median)", *(f"{run.step_seconds * 1e3:.1f} ms" for run in (stock, ours)))
    table.add_row(f"  {stock.name} / dora_kernels", "", f"{stock.step_seconds / ours.step_seconds:.2f} x")
    bits = 8 * result.weight_bytes / result.weight_elements
    table.add_row("frozen linear weights, shared", "", f"{result.weight_bytes / 2**20:.2f} MiB, {bits:.2f} bits each")
    if ours.peak_bytes:
        peaks = (f"{run.peak_bytes / 2**20:.0f} MiB" for run in (stock, ours))
        table.add_row("peak GPU memory of a step", *peaks)
    return table


def draw(result: Result, out: str) -> None:
    """Write a PNG of both loss curves and both runs' step times."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, times) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for run, style in ((result.stock, {"linewidth": 5, "alpha": 0.4}), (result.ours, {"linewidth": 1.2})):
        losses.plot(run.losses, label=run.name, **style)
        steps = range(WARM_UP_STEPS, len(run.seconds))
        milliseconds = [1e3 * seconds for seconds in run.seconds[WARM_UP_STEPS:]]
        times.plot(steps, milliseconds, ".", label=f"{run.name}, median {run.step_seconds * 1e3:.1f} ms")
    losses.set(title=f"largest difference {result.largest_difference:.1e}", xlabel="step", ylabel="loss")
    times.set(title="time per step", xlabel="step", ylabel="ms", ylim=(0, None))
    losses.legend()
    times.legend()
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def _loss(model: torch.nn.Module, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean next-byte cross-entropy; matrix products in `dtype` where that is a half precision."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model(input_ids=ids, labels=ids).loss


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
