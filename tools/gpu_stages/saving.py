"""The two archives beside suite.json: the results of a run, and the cache for a later one."""

from __future__ import annotations

import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dora_kernels.files import writing
from gpu_stages.running import Suite

RESULTS, CACHE = "results.tar.gz", "cache.tar.xz"
LOG_BYTES = 1_500_000  # of each log: its end
# Of what Triton keeps of a kernel these are looked at again; with its intermediate languages it is five times as much.
KEPT = (".cubin", ".hsaco", ".json", ".so")
CACHE_BYTES = 15_000_000  # of the archive
XZ_PRESET = 1


def pack_results(suite: Suite) -> int:
    """The bytes of results.tar.gz: suite.json and all of the folder of results, logs cut to their ends."""
    suite.out.mkdir(parents=True, exist_ok=True)
    for log in suite.work.rglob("*.log"):
        if log.stat().st_size > LOG_BYTES:
            with writing.replacing(log) as made:
                made.write_bytes(log.read_bytes()[-LOG_BYTES:])
    archive = suite.out / RESULTS
    with writing.replacing(archive) as made, tarfile.open(made, "w:gz", compresslevel=6) as tar:
        for path in sorted(suite.work.iterdir()):
            tar.add(path, path.name, filter=_not_hidden)
        if (suite.out / "suite.json").exists():
            tar.add(suite.out / "suite.json", f"suite-{suite.plan}.json")
    return archive.stat().st_size


def _not_hidden(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The entry, or None for what a stage that was killed has left of a file that it wrote."""
    return None if os.path.basename(entry.name).startswith(".") else entry


def unpack_results(archive: Path, folder: Path) -> None:
    """Unpack what pack_results has packed into `folder`."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def pack_cache(
    cache: Path, archive: Path, seconds: float, clock: Callable[[], float] = time.monotonic
) -> tuple[int, int]:
    """(files packed, files left out) of Triton's cache: the oldest first, while time and room last.

    A kernel's files stand together: one that is cut in two is compiled again.
    """
    end = clock() + seconds
    paths = [path for path in cache.rglob("*") if path.suffix in KEPT and path.is_file()] if cache.exists() else []
    paths.sort(key=lambda path: (path.parent.stat().st_mtime, path))
    packed = 0
    with writing.replacing(archive) as made, made.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w:xz", preset=XZ_PRESET) as tar:
            for path in paths:
                if clock() >= end or file.tell() > CACHE_BYTES:
                    break
                tar.add(path, str(path.relative_to(cache)))
                packed += 1
    return packed, len(paths) - packed


def unpack_cache(archive: Path, cache: Path) -> int:
    """Unpack an earlier run's cache into `cache`; the number of its files.

    Triton writes absolute paths into it: `cache` has to be the folder that it was packed from.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(cache, filter="data")
        return len(tar.getnames())


def save(suite: Suite, seconds: float) -> dict[str, Any]:
    """The results first, then the cache in what is left of the time."""
    start = time.monotonic()
    results = pack_results(suite)
    packed, left_out = pack_cache(suite.triton_cache, suite.out / CACHE, seconds - (time.monotonic() - start))
    size = (suite.out / CACHE).stat().st_size
    note = f"{RESULTS} {results / 1e6:.2f} MB, {CACHE} {size / 1e6:.1f} MB of {packed} files, {left_out} left out"
    return {"ok": True, "note": note}
