"""Instructions of bench.host's steps, counted by callgrind: a second witness, which a busy machine does not move.

The steps run once more in a process under valgrind, which counts between two requests (host_driver.c) and not before.
Left out are the products and the loops over elements of torch on the CPU, which a GPU's kernels would do: in what is
left an addition takes 9,000 instructions, a product 15,000 and a view 8,000, whatever their sizes. Python's collector
is off. valgrind has no AVX-512, and oneDNN no product in bf16 without it: its part in a product's time is not counted.
"""

from __future__ import annotations

import gc
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from bench.lib import host_driver
from bench.lib.machine import ROOT

CALLS = 10  # of one layer
ARITHMETIC = ("at::native::cpublas::gemm(*", "at::TensorIteratorBase::serial_for_each(*")
"""torch's functions that are not counted; neither calls the other, for entering either toggles."""

Counted = tuple[str, str, str]
"""The names of a case, a provider and a step."""


def why_not() -> str:
    """The reason that nothing can be counted here; "" where it can."""
    return "" if shutil.which("valgrind") else "valgrind is not there; expected it, to count instructions"


def count(cases: Sequence[str], providers: Sequence[str], tokens: int) -> dict[Counted, float]:
    """The instructions of a call of each step. Kernels that are not in Triton's cache yet take minutes to compile."""
    with tempfile.TemporaryDirectory(prefix="dora_kernels_callgrind_") as folder:
        counter = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/counts", "--instr-atstart=no"]
        # what is toggled is off at first, unless told otherwise
        counter += [*(f"--toggle-collect={name}" for name in ARITHMETIC), "--collect-atstart=yes"]
        command = [*counter, sys.executable, "-m", __name__, json.dumps([cases, providers, tokens])]
        environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"bench.lib.host_instructions: {done.stderr[-4000:]}")
        counts = read(pathlib.Path(folder))
    if not counts:  # the driver was built without the requests
        raise RuntimeError("bench.host: nothing was counted; expected valgrind/callgrind.h where gcc looks for headers")
    return counts


def read(folder: pathlib.Path) -> dict[Counted, float]:
    """The instructions of a call by the files that callgrind wrote at a request; its last, at the end, has no name."""
    counts = {}
    for path in folder.glob("counts.*"):
        text = path.read_text()
        named = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)", text, re.MULTILINE)
        if named and total:
            case, provider, step, calls = json.loads(named[1])
            counts[case, provider, step] = int(total[1]) / calls
    return counts


def main(cases: Sequence[str], providers: Sequence[str], tokens: int) -> None:
    """Under callgrind: every step of these cases, so that what is counted is written under its name."""
    driver = host_driver.loaded()
    import torch

    from bench.lib.host_cases import CASES, parts
    from bench.lib.host_layers import planned, prepared

    torch.set_num_threads(1)
    gc.disable()
    for name, kind in parts(cases):
        calls = min(CALLS, CASES[name].calls)
        with prepared(CASES[name], kind, providers, planned(kind, tokens)) as steps:
            for key, step in steps.items():
                step()
                gc.collect()
                driver.count_instructions(step, calls, json.dumps([name, *key, calls]))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
