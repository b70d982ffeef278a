"""check: outputs and gradients of this machine against the definition in float64."""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING, Any

from dora_kernels.cli import stopping
from dora_kernels.cli.arguments import SEED, device_name, number, shape
from dora_kernels.cli.memory import available, check_memory
from dora_kernels.files import writing
from dora_kernels.planning.choices import BACKENDS, WAYS

if TYPE_CHECKING:
    import torch

LAYERS = ("function", "module", "peft")
DTYPES = ("float32", "bfloat16", "float16", "bfloat16-float32")
# no size a multiple of a block; ranks in one chunk and in several; a rank above K; one token; rank 1
SHAPES = ((33, 70, 90, 20), (7, 24, 10, 33), (1, 50, 33, 4), (130, 40, 24, 1))


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "check", help="prove on this machine that outputs and gradients are those of the definition in float64"
    )
    add = parser.add_argument
    add("--layer", nargs="+", default=["function"], choices=LAYERS, help="default: function")
    add(
        "--shape",
        nargs="+",
        type=shape,
        default=SHAPES,
        metavar="MxNxKxR",
        help="tokens, out and in features, rank (default: a few ragged ones)",
    )
    add("--dtype", nargs="+", default=DTYPES, choices=DTYPES, help="weight and adapter (default: all)")
    add("--backend", nargs="+", choices=BACKENDS, help="default: reference, and triton where there is one")
    add("--way", default="auto", choices=WAYS, help="default: %(default)s")
    probability = number("a probability, 0 or more and below 1", lambda value: 0 <= value < 1)
    add("--dropout", type=probability, default=0.0, help="of module and peft (default: %(default)s)")
    add(
        "--device",
        type=device_name,
        default="auto",
        help="cpu, cuda, cuda:N or auto; on a CPU Triton interprets its kernels (default: auto)",
    )
    add("--seed", type=SEED, default=0, help="of the random inputs (default: %(default)s)")
    add("--json", help="where every error and verdict goes")
    add("--verbose", action="store_true", help="a table for every case, not only for those that failed")
    parser.set_defaults(run=run, extra="peft")


def run(arguments: argparse.Namespace) -> int:
    """Check every combination. Returns 0, or 1 where one failed."""
    if arguments.json is not None:
        writing.check_target("check", "json", arguments.json)
    free = available()
    for sizes in arguments.shape:  # wherever the case will run, its numbers are drawn here
        check_memory(f"shape is {'x'.join(map(str, sizes))}", _drawn_bytes(*sizes), free)

    import torch

    from dora_kernels.planning import devices

    device = device_of("check", arguments.device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free
    for sizes in arguments.shape:
        check_memory(f"shape is {'x'.join(map(str, sizes))}", _least_bytes(*sizes), free)
    backends = arguments.backend or ["reference", "triton"][: 1 + devices.has_triton()]
    if device.type == "cpu" and "triton" in backends:
        devices.interpret_on_cpu()  # before anything that imports triton, as peft does
    for backend in backends:
        devices.backend_for(backend, device, torch.float32)
    if "peft" in arguments.layer:
        importlib.import_module("peft")
    from dora_kernels.testing import suite

    cases = suite.cases(
        arguments.layer,
        arguments.shape,
        arguments.dtype,
        backends,
        way=arguments.way,
        dropout=arguments.dropout,
        device=str(device),
        seed=arguments.seed,
    )
    with stopping.unwinding():
        return suite.run(cases, arguments.json, arguments.verbose)


def device_of(command: str, name: str) -> torch.device:
    """The device that `name` stands for, auto for a GPU where there is one. Raises ValueError where it is not here."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(("cuda" if count else "cpu") if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= count:
        there = f"one of the {count} that torch sees" if count else "cpu, as torch sees no CUDA device"
        raise ValueError(f"{command}: device is {name!r}; expected {there}")
    return device


def _drawn_bytes(M: int, N: int, K: int, R: int) -> int:
    """Of the largest random tensor, which is drawn in float64."""
    return 8 * max(M * K, N * K, R * K, N * R, M * N)


def _least_bytes(M: int, N: int, K: int, R: int) -> int:
    """Of all that a check holds at one time at least: in float64 each argument, its copy and its gradient, y and dy.

    The reference on a CPU was seen to take 1.9 to 4.5 times as much.
    """
    return 8 * (3 * (M * K + R * K + N * R) + 2 * (N * K + M * N))
