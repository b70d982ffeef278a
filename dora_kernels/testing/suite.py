"""The cases of `python -m dora_kernels check`: layers, shapes, dtypes and backends, each checked against float64."""

import contextlib
import importlib.metadata
import itertools
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from dora_kernels.files import writing
from dora_kernels.functional.linear import dora_linear
from dora_kernels.modules import DoraLinear
from dora_kernels.planning.options import options
from dora_kernels.testing.gradients import check_gradients
from dora_kernels.testing.layers import check_layer
from dora_kernels.testing.problem import random_inputs
from dora_kernels.testing.report import Report, Row, aligned

# name -> (dtype of x and weight, dtype of the adapter); the last is what PEFT makes of a bfloat16 model by default
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16-float32": (torch.bfloat16, torch.float32),
}


@dataclass(frozen=True)
class CheckCase:
    """One check of the suite: a layer, its sizes, dtypes and backend."""

    layer: str
    shape: tuple[int, int, int, int]
    dtype: str
    backend: str
    way: str = "auto"
    dropout: float = 0.0
    device: str = "cpu"
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.layer} {'x'.join(map(str, self.shape))} {self.dtype} {self.backend}"

    def check(self) -> Report:
        """Run it; an error in it is a failure. Raises ValueError if the backend cannot take it, or MemoryError."""
        try:
            with options(backend=self.backend, way=self.way):
                return LAYERS[self.layer](self)
        except (ValueError, ImportError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the installed Triton cannot compile or interpret a kernel, for example
            if "can't allocate memory" in str(error):  # torch's on a CPU
                raise MemoryError(str(error)) from error
            return Report(str(self), (Row("runs", self.layer, False, f"{type(error).__name__}: {error}"),))


def cases(
    layers: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[str],
    backends: Sequence[str],
    **more: object,
) -> list[CheckCase]:
    """All combinations; the shapes are (M, N, K, R)."""
    return [CheckCase(*combination, **more) for combination in itertools.product(layers, shapes, dtypes, backends)]


def run(cases: Sequence[CheckCase], json_path: str | None = None, verbose: bool = False) -> int:
    """Check every case and print a table. Returns 0 if all are ok, else 1."""
    with contextlib.nullcontext() if json_path is None else writing.claimed("check", json_path):
        reports = _reports(cases)
        for case, report in zip(cases, reports, strict=True):
            if verbose or not report.ok:
                print(f"{case}\n{report}\n")
        print("\n".join(aligned(_lines(cases, reports))))
        passed = sum(report.ok for report in reports)
        print(f"{passed} of {len(reports)} cases ok")
        if json_path is not None:
            content = [asdict(case) | report.to_json() for case, report in zip(cases, reports, strict=True)]
            writing.write_text(json_path, json.dumps({"meta": _meta(), "cases": content}, indent=1) + "\n")
    return 0 if passed == len(reports) else 1


def _reports(cases: Sequence[CheckCase]) -> list[Report]:
    """Every case's, with a line on a terminal that says which is running."""
    terminal = sys.stderr if sys.stderr.isatty() else None
    reports = []
    try:
        for number, case in enumerate(cases, 1):
            if terminal:
                print(f"\r\x1b[2K{number} of {len(cases)}: {case}", end="", file=terminal, flush=True)
            reports.append(case.check())
    finally:
        if terminal:
            print("\r\x1b[2K", end="", file=terminal, flush=True)
    return reports


def _lines(cases: Sequence[CheckCase], reports: Sequence[Report]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [
        ("layer", "MxNxKxR", "dtypes", "backend", "worst ratio to PyTorch's error", "verdict")
    ]
    for case, report in zip(cases, reports, strict=True):
        ratios = [(row.comparison.ratio, row.subject) for row in report.rows if row.comparison is not None]
        worst = "{:.2f} {}".format(*max(ratios)) if ratios else ""
        verdict = "ok" if report.ok else f"FAILED: {len(report.failures)} of {len(report.rows)}"
        lines.append((case.layer, "x".join(map(str, case.shape)), case.dtype, case.backend, worst, verdict))
    return lines


def _meta() -> dict[str, str]:
    names = ("dora-kernels", "torch", "triton", "peft")
    installed = {entry.metadata["Name"] for entry in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in names if name in installed}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return versions | {"device": device}


def _generator(case: CheckCase) -> torch.Generator:
    return torch.Generator().manual_seed(case.seed)


def _check_function(case: CheckCase) -> Report:
    inputs = random_inputs(*case.shape, *DTYPES[case.dtype], device=case.device, generator=_generator(case))
    return check_gradients(dora_linear, inputs, seed=case.seed)


def _check_module(case: CheckCase) -> Report:
    _, N, K, R = case.shape
    inputs = random_inputs(*case.shape, *DTYPES[case.dtype], device=case.device, generator=_generator(case))
    layer = DoraLinear(K, N, R, R * inputs["scaling"], True, case.dropout, case.device, *DTYPES[case.dtype])
    _copy(layer.weight, inputs["weight"])
    _copy(layer.bias, inputs["bias"])
    _copy(layer.lora_A.weight, inputs["lora_A"])
    _copy(layer.lora_B.weight, inputs["lora_B"])
    _copy(layer.lora_magnitude_vector, inputs["magnitude"])
    return check_gradients(layer, inputs["x"], seed=case.seed)


def _check_peft(case: CheckCase) -> Report:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ValueError(f"layer is 'peft': {error}; expected the peft extra") from error

    _, N, K, R = case.shape
    dtype, adapter_dtype = DTYPES[case.dtype]
    inputs = random_inputs(*case.shape, dtype, device=case.device, generator=_generator(case))
    linear = nn.Linear(K, N, device=case.device, dtype=dtype)
    _copy(linear.weight, inputs["weight"])
    _copy(linear.bias, inputs["bias"])
    config = peft.LoraConfig(r=R, use_dora=True, lora_dropout=case.dropout, target_modules=["0"])
    widen = dtype != adapter_dtype
    model = peft.get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=widen)
    return check_layer(model.base_model.model[0], inputs["x"], seed=case.seed)


@torch.no_grad()
def _copy(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)


LAYERS = {"function": _check_function, "module": _check_module, "peft": _check_peft}
