"""A row of public_functions.py, and the arguments with which its function succeeds, made anew in each call."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import dora_kernels
from dora_kernels import DoraLinear, DvoraLinear, VeraProjection, testing
from dora_kernels.extras import analysis, convert, serving
from tests.support import convert_problem, peft_problem
from tests.support.problem import DEVICE, Problem
from tests.support.wrong_values import Argument, K, M, N, R, zeros

Arguments = dict[str, Any]
Good = Callable[[Path], Arguments]
"""The arguments by name; a folder of files is made for them."""


@dataclass(frozen=True)
class Public:
    """One function. says: the first words of its messages. good: what it succeeds with. arguments: every parameter.

    enter: it is a context manager, and looks at its arguments on entry.
    """

    function: Callable[..., Any]
    says: str
    good: Good
    arguments: dict[str, Argument]
    enter: bool = False

    def __call__(self, arguments: dict[str, Any]) -> None:
        result = self.function(**arguments)
        if self.enter:
            with result:
                pass

    def __str__(self) -> str:
        return self.function.__qualname__


NAMES = ("x", "weight", "lora_A", "lora_B", "magnitude", "scaling", "bias")


def always(**arguments: Any) -> Good:
    """These; what is called without arguments is called for each time."""
    return lambda _: {name: value() if callable(value) else value for name, value in arguments.items()}


def inputs(*names: str) -> Good:
    """Some of the arguments of dora_linear."""

    def good(_: Path) -> Arguments:
        problem = Problem.random(M, N, K, R, torch.float32)
        return {name: getattr(problem, name) for name in names}

    return good


def in_a_group(*names: str) -> Good:
    """The same in a process group of this process alone."""
    return lambda folder: (mesh(), inputs(*names)(folder))[1]


def mesh() -> DeviceMesh:
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    return init_device_mesh("cpu", (1,))


def layer(**more: Any) -> DoraLinear:
    return DoraLinear(K, N, R, 1.0, device=DEVICE, **more)


def linear() -> nn.Linear:
    return nn.Linear(K, N, device=DEVICE)


def projection() -> VeraProjection:
    return VeraProjection(K, N, R, device=DEVICE)


def dvora_layer() -> DvoraLinear:
    return DvoraLinear(K, N, projection(), device=DEVICE)


def vera(*names: str) -> Good:
    """Some of the arguments of dvora_linear."""

    def good(_: Path) -> Arguments:
        made: dict[str, Tensor] = {"x": zeros(M, K), "weight": torch.randn(N, K, device=DEVICE)}
        made["vera_A"], made["vera_B"] = projection().of(K, N)
        made |= {name: torch.ones(N, device=DEVICE) for name in ("lambda_b", "magnitude")}
        made["lambda_d"] = torch.ones(R, device=DEVICE)
        return {name: made[name] for name in names}

    return good


def enabled() -> nn.Module:
    """A PEFT model that dora_kernels computes."""
    model = peft_problem.build()
    dora_kernels.enable(model)
    return model


def peft_layer() -> nn.Module:
    return peft_problem.layers(peft_problem.build())[0]


def bank() -> serving.AdapterBank:
    problem = Problem.random(M, N, K, R, torch.float32)
    return serving.AdapterBank.of(problem.weight, [(problem.lora_A, problem.lora_B, problem.magnitude, 1.0)])


def bank_call(folder: Path) -> Arguments:
    index = torch.zeros(M, dtype=torch.int64, device=DEVICE)
    return inputs("x", "weight", "bias")(folder) | {"bank": bank(), "index": index}


def matrix() -> Tensor:
    return torch.randn(N, K, device=DEVICE)


@functools.cache
def adapter() -> convert.DoraAdapter:
    """Of 6 out features, 10 in features, rank 4."""
    return convert_problem.adapter()


def checkpoint() -> convert.Checkpoint:
    return convert.encode(convert.FORMATS["peft"], [adapter()])


def conversion(folder: Path) -> Arguments:
    source = convert_problem.written(folder, "peft", [adapter()])
    formats = {"source_format": "peft", "target_format": "dora_kernels"}
    return {"source": source, "out": folder / "out", **formats, "no_bias": True}


def adapters_on_disk(folder: Path) -> Arguments:
    return {"source": convert_problem.written(folder, "peft", [adapter()])}


def two_checkpoints(folder: Path) -> Arguments:
    for name in ("base", "tuned"):
        save_file({"a.weight": torch.randn(N, K)}, folder / f"{name}.safetensors")
    return {"base": folder / "base.safetensors", "tuned": [str(folder / "tuned.safetensors")]}


def points() -> list[analysis.Point]:
    return [analysis.Point("a.b", "c", "LoRA", 0.1 * i, 0.2 * i) for i in range(3)]


def figure(folder: Path) -> Arguments:
    return {"analysis": analysis.Analysis(points()), "path": folder / "figure.png"}


def check_function(_: Path) -> Arguments:
    inputs = testing.random_inputs(3, 4, 5, 2)
    return {"function": dora_kernels.dora_linear, "inputs": inputs, "finite_differences": False}


def errors(*names: str) -> Good:
    """Some of the arguments of compare."""

    def good(_: Path) -> Arguments:
        exact = torch.randn(N, dtype=torch.float64, device=DEVICE)
        made = {"name": "y", "actual": exact.float(), "yardstick": exact.float(), "exact": exact}
        return {name: made[name] for name in names}

    return good
