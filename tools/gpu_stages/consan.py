"""Triton's race checker (ConSan) over the GEMM in Gluon: the stage, and the process that it starts for each case.

    TRITON_INSTRUMENTATION_MODE=consan PYTHONPATH=tools python -m gpu_stages.consan --case forward

With this variable the compiler adds to whatever touches shared memory: is a buffer read that is still being written, or
written that a copy or a product still reads, does everything wait for everything else. What it finds is an assertion on
the device, a line on stderr, and every later call of CUDA in the process fails. What is right says nothing: so one case
is a kernel that is broken on purpose. See python/test/gluon/test_consan.py in github.com/triton-lang/triton.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import triton
from changed_kernel import changed
from specializations import VARIANTS, Specialization, Target, recording
from torch import Tensor

from dora_kernels.kernels.hopper import launch
from dora_kernels.planning import devices
from dora_kernels.planning.tiles import GEMMS
from dora_kernels.testing import rms_error
from gpu_stages.benchmarks import COMPILING
from gpu_stages.running import Suite

# M, N, K, R; the second has tails everywhere
SHAPES = ((512, 512, 512, 64), (200, 264, 328, 24))
PROGRAMS = 3  # of a launch, so that each has several tiles
# The protocol is that of the package's tiles, the tile smaller: what is added grows with the buffers and the stores. Of
# the package's own tile Triton 3.7.1 had not made a binary after eight minutes, of this one 3.6.0 makes it in one.
SMALL = {"BLOCK_N": 64, "parts": 2, "stages": 2}
# The wait of a slot for its last copy: with one copy more under way, a slot is written while it is being read.
WAIT, NO_WAIT = "tma_store_wait(SLOTS - 1)", "tma_store_wait(SLOTS)"
CASES = ("forward", "dx", "broken")
BF16 = 2**-8  # of a product rounded once the error is 0.0017
NOT_HERE = 3  # the exit status where there is nothing to check
_FOUND = re.compile(r"Assertion [`'](.*?)[`'] failed")
# what is checked stands in Triton's intermediate code, before ptxas, which takes half the time so
PTXAS_OPTIONS = "-O1"
VARIABLES = {"TRITON_INSTRUMENTATION_MODE": "consan", "PTXAS_OPTIONS": PTXAS_OPTIONS, "CUDA_LAUNCH_BLOCKING": "1"}


def consan(suite: Suite, seconds: float) -> dict[str, Any]:
    """The stage: all cases side by side, since most of each is compiling on one core."""
    with concurrent.futures.ThreadPoolExecutor(len(CASES)) as threads:
        done = dict(zip(CASES, threads.map(lambda case: _run(suite, seconds, case), CASES), strict=True))
    if any(status == NOT_HERE for status, _ in done.values()):
        return {"ok": True, "skipped": done[CASES[0]][1]}
    reasons = []
    for case, (status, log) in done.items():
        found = sorted(set(_FOUND.findall(log)))
        said = "; ".join(found) or ("stopped in time" if status is None else f"exit status {status}")
        if case != "broken" and status != 0:
            reasons.append(f"{case}: {said}")
        elif case == "broken" and (status == 0 or not found):
            reasons.append("nothing seen in a kernel that is broken on purpose" + (f" ({said})" if status else ""))
    seen = sorted(set(_FOUND.findall(done["broken"][1])))
    outcome: dict[str, Any] = {"ok": not reasons, "seen_in_broken": seen}
    return outcome | ({"reason": ", ".join(reasons)} if reasons else {"note": f"{len(SHAPES)} shapes of each"})


def _run(suite: Suite, seconds: float, case: str) -> tuple[int | None, str]:
    """The exit status and the output of a case, None if it was stopped."""
    command = [sys.executable, "-m", "gpu_stages.consan", "--case", case]
    done = suite.run(f"consan_{case}", command, seconds, variables=COMPILING | VARIABLES)
    return done.status, done.log.read_text(errors="replace").strip()


def operands(case: str, sizes: tuple[int, ...], draw: Callable[..., Tensor]) -> dict[str, Any]:
    """The arguments of launch.gemm; draw(*shape) makes a tensor."""
    M, N, K, R = sizes
    if case == "dx":
        return {"left": draw(M, K), "right": draw(K, N), "nn": True}
    given = {"left": draw(M, K), "right": draw(N, K), "nn": False, "low": draw(M, R), "lora": draw(N, R)}
    return given | {"scaling": 0.5, "gain": draw(N).float(), "bias": draw(N), "both": True}


def errors(given: dict[str, Any], y: Tensor, z: Tensor | None) -> list[float]:
    """Of the results against float64."""
    exact = {name: tensor.double() for name, tensor in given.items() if isinstance(tensor, Tensor)}
    product = exact["left"] @ (exact["right"] if given["nn"] else exact["right"].T)
    if z is None:
        return [rms_error(y, product)]
    product += given["scaling"] * exact["low"] @ exact["lora"].T
    return [rms_error(z, product), rms_error(y, exact["gain"] * product + exact["bias"])]


def check(case: str, device: str) -> None:
    """Launches the case at all shapes. Raises AssertionError where a result is wrong."""
    torch.manual_seed(0)
    for sizes in SHAPES:
        given = operands(case, sizes, lambda *shape: torch.randn(shape, device=device).bfloat16())
        found = errors(given, *launch.gemm(**given, multiprocessors=PROGRAMS))
        print(f"{case} {sizes}: errors {found}", flush=True)
        if case != "broken" and not max(found) < BF16:
            raise AssertionError(f"{case}: errors of {found}; expected less than {BF16}")


def kernel_of(case: str) -> Any:
    """The kernel of the case."""
    return changed(WAIT, NO_WAIT) if case == "broken" else launch.kernel()


def ahead(target: Target) -> list[Specialization]:
    """The kernels of the cases, to be compiled before they run: half a minute on one core for each."""
    found = []
    for case in CASES:
        kernel = kernel_of(case)
        with (
            mock.patch.object(triton.knobs.compilation, "instrumentation_mode", "consan"),
            mock.patch.object(launch, "kernel", lambda kernel=kernel: kernel),
            recording(target, VARIANTS["bf16"], {"gemm": SMALL}) as recorded,
        ):
            given = operands(case, SHAPES[0], lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta"))
            launch.gemm(**given)
        options = [dataclasses.replace(one.options, ptx_options=PTXAS_OPTIONS) for one in recorded]
        found += [dataclasses.replace(one, options=given) for one, given in zip(recorded, options, strict=True)]
    return found


def unchecked(function: Any) -> bool:
    """True where a kernel was compiled without assertions: nothing has looked on."""
    kernels = [kernel for cache, *_ in function.device_caches.values() for kernel in cache.values()]
    return not kernels or any("__assertfail" not in kernel.asm["ptx"] for kernel in kernels)


def why_not(device: str) -> str | None:
    """The reason that there is nothing to check on the device, or None."""
    if reason := launch.why_not_gluon():
        return reason
    target = devices.device_facts(torch.device(device)).target
    return None if target == "sm_90" else f"no such kernel is built for {target or device}"


def main(argv: Sequence[str] | None = None) -> int:
    """The process of one case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=CASES, required=True)
    case, device = parser.parse_args(argv).case, "cuda"
    if reason := why_not(device):
        print(reason)
        return NOT_HERE
    GEMMS["sm_90"] = {product: dataclasses.replace(config, **SMALL) for product, config in GEMMS["sm_90"].items()}
    # what the checks know of each buffer lies in device memory
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    kernel = kernel_of(case)
    with mock.patch.object(launch, "kernel", lambda: kernel):
        check(case, device)
    torch.cuda.synchronize()
    if unchecked(kernel):
        print("no checks were compiled in", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
