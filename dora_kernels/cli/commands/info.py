"""info: versions and devices. It has to work where nothing else does."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import TYPE_CHECKING, Any

from dora_kernels import __version__

if TYPE_CHECKING:
    import torch


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("info", help="versions, devices, and which backend each device gets and why")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table. Returns 0."""
    rows = [("dora_kernels", __version__), ("python", platform.python_version())]
    rows += [(name, _version(name)) for name in ("torch", "triton", "peft")]
    rows.append(("requested backend", _requested()))
    rows += _devices()
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        print(f"{key:<{width}}  {value}")
    return 0


def _requested() -> str:
    """The backend in force, or what is wrong with DORA_KERNELS_BACKEND."""
    try:
        from dora_kernels.planning.options import current_options
    except ValueError as error:
        return str(error)
    return current_options().backend


def _devices() -> list[tuple[str, str]]:
    """The rows of every device; of one that cannot be asked, or whose Triton cannot be imported, why."""
    import torch

    from dora_kernels.planning import devices

    rows = []
    cards = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in [*cards, torch.device("cpu")]:
        try:
            facts = devices.device_facts(device)
            name = str(device) if facts.name == str(device) else f"{device} ({facts.name})"
            rows += [("device", name), ("  target", facts.target or "none"), ("  auto picks", _auto_picks(device))]
        except (RuntimeError, ImportError, OSError) as error:
            rows += [("device", str(device)), ("  error", " ".join(str(error).split()))]
    return rows


def _auto_picks(device: torch.device) -> str:
    """The backend that "auto" takes for bfloat16 tensors on `device`, with the reason."""
    import torch

    from dora_kernels.planning import devices

    backend = devices.backend_for("auto", device, torch.bfloat16)
    if backend == "triton":
        return "triton: the kernels are built for this device"
    reason = devices.why_not_triton(device, (torch.bfloat16,))
    return f"reference: {reason or 'Triton would interpret its kernels here, for tests only'}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
