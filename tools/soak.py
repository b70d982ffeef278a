"""Do at random what people do with a PEFT model, to an enabled one and to a stock twin, and look for a difference.

    python tools/soak.py --seconds 1200 --seed 7    # walk after walk, as `make soak` and `make nightly` do
    python tools/soak.py --walk 7000012             # one walk again, by the seed that a report names

A walk builds a small model (Llama's blocks with an embedding, in half of the walks convolutions and GPT-2's Conv1D
too; four dtypes; the plain-PyTorch backend, in one of twelve the kernels in Triton's interpreter) and does up to 50
operations of the kinds in soaking/changes.py and soaking/steps.py. After each, both twins must have the same names,
shapes, dtypes and flags, and every number of ours (outputs, losses, gradients, parameters, buffers, and those of a
probe after the operation) must be as good as stock's; soaking/comparing.py has the criterion. Then stock gets the
numbers of ours, so that each operation is judged alone; ours is never written to, whatever it keeps. What stock
refuses, ours must refuse with the same class of exception.

Exit status 0 without a difference; 1 with one: its seed, its operations, and the fewest of them that still differ.

Left out, because stock's own result has no meaning, or none to compare with:
- changes of an adapter, its scale or the base weight while merged: unmerge then takes out other numbers than went in
- rows merged with a gain that is 0 in the weight's dtype, which ours refuses to unmerge: the walk ends
- merge_model while merged: the layer as it computes then; merge_and_unload merges what else is active first
- adapter_names of a mixed batch: PEFT leaves its hooks in the model after its own error
- dropout="lora" with a dropout that is active: another function than PEFT's, by request
- dropout with torch.utils.checkpoint: under the shared masks a block that runs again draws new ones
- float32 adapters on convolutions in half precision: PEFT raises under dropout or between several, ours computes
- a transposed x for Conv1D, for which PEFT raises too
- the mode (train or eval) of layers after the model was unloaded: nothing without dropout depends on it
- quantized bases, which float64 has no twin for, and torch.compile, DDP and FSDP, which take seconds for each model
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # the models are on the CPU

import torch  # noqa: E402
from soaking import comparing  # noqa: E402
from soaking.models import Kind  # noqa: E402
from soaking.walks import Step, Walk, shrunk, walk  # noqa: E402

LENGTH = {"reference": 50, "triton": 6}
"""Operations of a walk: a few seconds each."""


def listed(steps: Sequence[Step]) -> str:
    return " ".join(f"{name}({seed})" for name, seed in steps)


def report(failed: Walk, seconds: float) -> None:
    """Print what differed, after which operations, and after the fewest of them."""
    print(
        f"walk {failed.kind.seed}: {failed.kind}\n    {failed.difference}\n    after {listed(failed.done)}", flush=True
    )
    print(f"    shrunk to {listed(shrunk(failed.kind, failed.done, seconds))}")
    print(f"    again: python tools/soak.py --walk {failed.kind.seed} --backend {failed.kind.backend}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1200, help="begin no operation after this time")
    parser.add_argument("--seed", type=int, default=0, help="of the walks, whose own are 10**6 times this and up")
    parser.add_argument("--walk", type=int, metavar="SEED", help="only this walk")
    parser.add_argument("--backend", choices=LENGTH, help="of all walks (default: as each draws)")
    parser.add_argument("--length", type=int, help="operations of a walk (default: what takes a few seconds)")
    parser.add_argument("--shrink", type=float, default=120, metavar="SECONDS", help="the longest that shrinking takes")
    arguments = parser.parse_args(argv)
    end = time.monotonic() + (float("inf") if arguments.walk is not None else arguments.seconds)
    done: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    seeds = (
        [arguments.walk] if arguments.walk is not None else range(arguments.seed * 10**6, (arguments.seed + 1) * 10**6)
    )
    walks = 0
    for seed in seeds:
        if time.monotonic() > end:
            break
        kind = Kind.draw(seed, arguments.backend)
        print(f"walk {seed}: {kind.backend}, {kind.dtype}", end="\r" if sys.stdout.isatty() else "\n", flush=True)
        made = walk(kind, arguments.length or LENGTH[kind.backend], until=lambda: time.monotonic() > end)
        walks += 1
        done.update(name for name, _ in made.done)
        refused.update(made.refused)
        if made.difference is not None:
            report(made, arguments.shrink)
            return 1
    print(f"{walks} walks, {done.total()} operations, no difference, seed {arguments.seed}")
    print("    " + ", ".join(f"{name} {count}" for name, count in done.most_common()))
    print(f"    {len(comparing.not_judged)} tensors not judged, of which stock's is more than 50% off")
    for what, count in refused.most_common():
        print(f"    refused {count} times: {what}")
    return 0


if __name__ == "__main__":
    logging.getLogger("dora_kernels").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # more do not help models of this size
    sys.exit(main())
