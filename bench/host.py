"""Host time of a layer's calls without a GPU, over a driver that launches nothing, and the launches of each.

    python -m bench.host                             # bench/results/cpu/host.json, some four minutes
    python -m bench.host --instructions              # and the instructions of each call, some six more
    python -m bench.host --case bf16 --tokens 512    # a training step as it is planned for fewer tokens
    python -m bench.host --case bf16 --profile       # and where the time of our training steps goes

nn.Linear, PEFT's LoRA and DoRA layers, and ours as the function dora_linear, as DoraLinear and as the PEFT layer after
enable(). Compilation, JIT dispatch and launcher are Triton's own for sm_90, the package's code is all there, and only
the driver's launch does nothing (host_driver.py; gcc is needed). The tensors are tiny and on the CPU, so that torch's
operators cost their dispatch and little else: the CPU's dispatch stands for CUDA's. Compare ratios, not microseconds,
and add to each about 2.5 us per launch, Triton's and the library's, for a driver that launches.

The planner is told a real layer's sizes (PLANNED), so that ways and launches are those of a GPU. Times are process
time on one thread, the median over interleaved rounds; on a busy machine read the least. Launches are counted, Triton's
by the driver, and the library's as torch's operators that write something.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from bench.lib import host_driver, outputs
from bench.lib.machine import ROOT


@outputs.command("bench.host")
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 where nothing can be measured."""
    reason = host_driver.why_not()
    if reason:
        print(f"bench.host: {reason}", file=sys.stderr)
        return 2
    # before PEFT and the libraries that it imports look for a GPU, and load NVIDIA's driver where there is one
    driver = host_driver.loaded()
    from bench.lib import host_cases, host_layers, host_measure

    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180, help="for all that is timed (default: %(default)s)")
    parser.add_argument("--case", nargs="+", choices=host_cases.CASES, default=list(host_cases.CASES))
    parser.add_argument("--provider", nargs="+", choices=host_layers.PROVIDERS, default=list(host_layers.PROVIDERS))
    tokens = host_layers.PLANNED["training"].M
    parser.add_argument("--tokens", type=int, default=tokens, help="training is planned for (default: %(default)s)")
    parser.add_argument("--instructions", action="store_true", help="count them, too, by callgrind")
    parser.add_argument("--profile", action="store_true", help="print where the time of our training steps goes")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "bench" / "results" / "cpu" / "host.json")
    arguments = parser.parse_args(argv)
    outputs.claim("bench.host", arguments.out)
    host_measure.run(arguments, driver)
    return 0


if __name__ == "__main__":
    sys.exit(main())
