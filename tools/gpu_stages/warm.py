"""Compile what the benchmarks will launch into Triton's cache, in all cores, before anything waits for it.

    PYTHONPATH=tools python -m gpu_stages.warm --seconds 30 --out ptxas.json      # --tuning: its candidates, too
    PYTHONPATH=tools python -m gpu_stages.warm --part layer model --out ptxas.json

The kernels with the tiles that they have on this card, tuned ones if there is a table, and the launcher that Triton
builds with the C compiler for each signature. Processes are forked from one that has imported
everything and asked the GPU nothing: its name comes from one more of them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import compile_kernels
import precompile
import specializations
import torch

from bench.lib import machine, outputs, report
from gpu_stages import workload

SPILLS_SHOWN = 8


def compile_one(entry: workload.Wanted) -> dict[str, Any]:
    """Compile one kernel; the compiler's figures. One from a cache carried here has no assembly to be read."""
    kernel = entry.build()
    if "ptx" not in kernel.asm:
        return {"ok": True, "cached": True, "shared": kernel.metadata.shared}
    found = entry.resources(kernel)
    return {"ok": not found.get("error"), "cached": False} | found


def launcher_one(entry: workload.Wanted) -> dict[str, Any]:
    """Build the launcher of the kernel's signature; Triton 3.7 has one for all."""
    precompile.build_launcher(entry.build())
    return {"ok": True}


def one_of_each_signature(wanted: Sequence[workload.Wanted]) -> list[workload.Wanted]:
    """Kernels with different launchers: to them every pointer is alike, and so is every descriptor of as many sizes."""
    found: dict[str, workload.Wanted] = {}
    for entry in wanted:
        signature = re.sub(r"\*\w+", "*", entry.signature())
        signature = re.sub(r"tensordesc<\w+\[([\d, ]+)\][^>]*>", _dimensions, signature)
        found.setdefault(signature, entry)
    return list(found.values())


def _dimensions(descriptor: re.Match) -> str:
    return f"tensordesc of {len(descriptor[1].split(','))}"


@outputs.command("warm")
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where something was not compiled, 2 without a GPU that there are configurations for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="(default: %(default)s)")
    parser.add_argument("--tuning", action="store_true", help="the candidates of tools/tune.py, too")
    parser.add_argument("--part", nargs="+", choices=workload.PARTS, default=list(workload.PARTS))
    parser.add_argument("--target", choices=specializations.TARGETS, help="as on this GPU, which need not be there")
    parser.add_argument("--no-launchers", action="store_true", help="they are linked with the GPU's driver")
    parser.add_argument("--processes", type=int, default=max(2, (os.cpu_count() or 2) - 1))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    arguments = parser.parse_args(argv)
    outputs.claim("warm", arguments.out)
    start = time.monotonic()
    end = start + arguments.seconds
    if arguments.target:
        name, target = "", specializations.TARGETS[arguments.target]
    else:
        with concurrent.futures.ProcessPoolExecutor(1, precompile.FORK) as one:
            name, target = one.submit(precompile.card).result()
        if target is None:
            print(f"warm: {name or 'no GPU'}; expected a GPU that there are configurations for", file=sys.stderr)
            return 2
    wanted = workload.wanted(name, target, arguments.part, arguments.tuning)
    recorded = time.monotonic() - start
    results = precompile.in_all_cores(compile_one, wanted, arguments.processes, end)
    compiled = time.monotonic() - start
    good = [entry for index, entry in enumerate(wanted) if results.get(index, {}).get("ok")]
    signatures = [] if arguments.no_launchers else one_of_each_signature(good)
    launchers = precompile.in_all_cores(launcher_one, signatures, arguments.processes, end)
    rows = list(_rows(wanted, results))
    missing = len(wanted) - len(results)
    information = machine.meta(torch.device("cpu"), arguments.commit) | {
        "target": target.name,
        "left_out": [f"{missing} kernels"] if missing else [],
        "seconds": {"recorded": recorded, "kernels": compiled, "all": time.monotonic() - start},
        "launchers": {"wanted": len(signatures), "built": sum(found["ok"] for found in launchers.values())},
    }
    report.write(arguments.out, information, rows)
    return _report(rows, missing, launchers, len(signatures), information["seconds"])


def _rows(wanted: Sequence[workload.Wanted], results: dict[int, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for index, result in sorted(results.items()):
        entry = wanted[index]
        yield {"kernel": entry.name, "stage": entry.stage, "tiles": entry.tiles()} | result


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
