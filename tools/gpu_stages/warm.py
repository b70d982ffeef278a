"""Compile what the benchmarks will launch into Triton's cache, in all cores, before anything waits for it.

    PYTHONPATH=tools python -m gpu_stages.warm --seconds 30 --out ptxas.json      # --tuning: its candidates, too

The kernels, and the launcher that Triton builds with the C compiler for each signature. Processes are forked from one
that has imported everything and asked the GPU nothing: its name comes from one more of them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import compile_kernels
import precompile
import specializations
import torch
import triton
from specializations import Specialization
from triton.compiler import ASTSource

from bench import machine, report
from gpu_stages import workload

SPILLS_SHOWN = 8
FORK = multiprocessing.get_context("fork")
_worklist: list[workload.Wanted] = []  # inherited by the forked workers: a Specialization cannot be pickled


def _build(specialization: Specialization) -> tuple[ASTSource, Any]:
    source = ASTSource(specialization.kernel, specialization.signature, specialization.constexprs, specialization.attrs)
    kernel = triton.compile(source, target=specialization.target.gpu, options=specialization.options.__dict__)
    return source, kernel


def compile_one(index: int) -> dict[str, Any]:
    """What the compiler says of the kernel. One from a cache that was carried here has no assembly to be read again."""
    specialization = _worklist[index].specialization
    try:
        kernel = _build(specialization)[1]
        if "ptx" not in kernel.asm:
            return {"ok": True, "cached": True, "shared": kernel.metadata.shared}
        found = dataclasses.asdict(compile_kernels.compile_ahead(specialization))
        return {"ok": not found["error"], "cached": False} | found
    except Exception as error:  # whatever the compiler raises, it belongs into the table
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}


def launcher_one(index: int) -> dict[str, Any]:
    """Build the launcher of the kernel's signature; Triton 3.7 has one for all."""
    try:
        source, kernel = _build(_worklist[index].specialization)
        triton.runtime.driver.active.launcher_cls(source, kernel.metadata)
        return {"ok": True}
    except Exception as error:
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}


def in_all_cores(
    function: Callable[[int], dict[str, Any]], indices: Sequence[int], processes: int, end: float
) -> dict[int, dict[str, Any]]:
    """function(index) by index, of those that are done at `end`; a worker that dies takes the rest with it."""
    done: dict[int, dict[str, Any]] = {}
    pool = concurrent.futures.ProcessPoolExecutor(processes, FORK)
    futures = {pool.submit(function, index): index for index in indices}
    try:
        for future in concurrent.futures.as_completed(futures, max(0, end - time.monotonic())):
            try:
                done[futures[future]] = future.result()
            except Exception as error:
                done[futures[future]] = {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
    except concurrent.futures.TimeoutError:
        pass
    for future in futures:
        future.cancel()
    pool.shutdown(wait=False)
    if len(done) < len(futures):
        for worker in multiprocessing.active_children():  # the end of this process would wait for them
            worker.kill()
    return done


def one_of_each_signature(wanted: Sequence[workload.Wanted]) -> list[int]:
    """Indices of kernels with different launchers: to them every pointer is alike, and so is every descriptor."""
    found: dict[str, int] = {}
    for index, entry in enumerate(wanted):
        signature = str(list(entry.specialization.signature.values()))
        found.setdefault(re.sub(r"\*\w+", "*", re.sub(r"tensordesc<[^>]*>", "tensordesc", signature)), index)
    return list(found.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where something was not compiled, 2 without a GPU that there are configurations for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="(default: %(default)s)")
    parser.add_argument("--tuning", action="store_true", help="the candidates of tools/tune.py, too")
    parser.add_argument("--target", choices=specializations.TARGETS, help="as on this GPU, which need not be there")
    parser.add_argument("--no-launchers", action="store_true", help="they are linked with the GPU's driver")
    parser.add_argument("--processes", type=int, default=max(2, (os.cpu_count() or 2) - 1))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    end = start + arguments.seconds
    if arguments.target:
        target = specializations.TARGETS[arguments.target]
        shared_limit = target.shared_limit
    else:
        with concurrent.futures.ProcessPoolExecutor(1, FORK) as one:
            name, target, shared_limit = one.submit(precompile.card).result()
        if target is None:
            print(f"warm: {name or 'no GPU'}; expected a GPU that there are configurations for", file=sys.stderr)
            return 2
    wanted = workload.wanted(target, shared_limit, arguments.tuning)
    _worklist[:] = wanted
    rows: list[dict[str, Any]] = []
    results = in_all_cores(compile_one, range(len(wanted)), arguments.processes, end)
    compiled = time.monotonic() - start
    signatures = [index for index in one_of_each_signature(wanted) if results.get(index, {}).get("ok")]
    signatures = [] if arguments.no_launchers else signatures
    launchers = in_all_cores(launcher_one, signatures, arguments.processes, end)
    rows = list(_rows(wanted, results))
    missing = len(wanted) - len(results)
    information = machine.meta(torch.device("cpu"), arguments.commit) | {
        "target": target.name,
        "left_out": [f"{missing} kernels"] if missing else [],
        "seconds": {"kernels": compiled, "all": time.monotonic() - start},
        "launchers": {"wanted": len(signatures), "built": sum(found["ok"] for found in launchers.values())},
    }
    report.write(arguments.out, information, rows)
    return _report(rows, missing, launchers, len(signatures), information["seconds"])


def _rows(wanted: Sequence[workload.Wanted], results: dict[int, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for index, result in sorted(results.items()):
        specialization = wanted[index].specialization
        described = {"kernel": specialization.name, "stage": wanted[index].stage, "tiles": specialization.tiles()}
        yield described | result


def _report(
    rows: Sequence[dict[str, Any]],
    missing: int,
    launchers: dict[int, dict[str, Any]],
    signatures: int,
    seconds: dict[str, float],
) -> int:
    failed = [row for row in rows if not row["ok"]]
    unbuilt = [found for found in launchers.values() if not found["ok"]]
    cached = sum(row.get("cached", False) for row in rows)
    print(
        f"{len(rows)} kernels in {seconds['kernels']:.0f} s ({cached} from the cache), {len(failed)} failed, "
        f"{missing} left out; {len(launchers)} of {signatures} launchers, {len(unbuilt)} failed; "
        f"{seconds['all']:.0f} s"
    )
    spilling = [row for row in rows if row.get("spills", 0) > compile_kernels.HARMLESS_SPILLS]
    for row in sorted(spilling, key=lambda row: -row["spills"])[:SPILLS_SHOWN]:
        print(f"spills {row['spills']} bytes: {row['kernel']} {row['tiles']} ({row['stage']})")
    for row in [*failed[:SPILLS_SHOWN], *unbuilt[:2]]:
        print(f"failed: {row.get('kernel', 'launcher')} {row.get('tiles', '')} {row['error']}")
    return 1 if failed or missing or unbuilt or len(launchers) < signatures else 0


if __name__ == "__main__":
    sys.exit(main())
