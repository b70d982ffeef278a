"""The description of a measurement: device, versions, commit, date."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import pathlib
import platform
import subprocess

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_folder(device: torch.device) -> str:
    """The folder of a device's results below bench/results: "nvidia-h200"; "cpu" for any processor."""
    return "-".join(device_name(device).lower().split()) if device.type == "cuda" else "cpu"


def conditions(device: torch.device) -> dict[str, int | None]:
    """Clock of the multiprocessors in MHz, power in W and temperature in degrees of a GPU now; None where unknown."""
    readers = {"clock_mhz": torch.cuda.clock_rate, "power_w": torch.cuda.power_draw, "celsius": torch.cuda.temperature}
    found: dict[str, int | None] = {}
    for name, read in readers.items():
        try:
            value = read(device) if device.type == "cuda" else None
            found[name] = value // 1000 if name == "power_w" and value is not None else value  # torch gives milliwatts
        except Exception:  # no nvidia-ml-py, a driver that does not tell, or a build without a GPU
            found[name] = None
    return found


def meta(device: torch.device, commit: str | None = None) -> dict[str, object]:
    """The device, the versions, the commit and the time. `commit` names the checkout of a copy without .git."""
    names = ("torch", "triton", "peft", "transformers", "bitsandbytes")
    head = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return {
        "commit": head or commit,
        "dirty": None if changes is None else bool(changes),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _git(*arguments: str) -> str | None:
    """The output of a git command in the checkout, or None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
