"""Everything that wants a GPU, in plans of five to six minutes: do the kernels run and agree, and how fast are they.

On a machine with a GPU, from a checkout or a copy of one (there --commit names what is measured):

    python tools/gpu_suite.py --plan first --seconds 340 --out DIR --commit $(git rev-parse HEAD)
    python tools/gpu_suite.py --plan second --seconds 340 --out DIR2 --commit $(git rev-parse HEAD) \\
        --cache DIR/cache.tar.xz --failed DIR/suite.json
    python tools/gpu_suite.py --seconds 1800           # everything, into bench/results/<gpu>/; also --plan all
    python tools/gpu_suite.py --stage racecheck        # one of them

Afterwards, anywhere:

    mkdir -p bench/results/<gpu> && tar -xzf DIR/results.tar.gz -C bench/results/<gpu>

What comes back are three files: suite.json (what ran, how it ended, which tests failed, clocks, power and temperature
of the card meanwhile), results.tar.gz (the JSON of each benchmark, JUnit files, logs; packed anew after every stage),
and cache.tar.xz (Triton's cache). The cache is of use to the same build of Triton at the same path, so that every stage
has TRITON_CACHE_DIR=/tmp/dora_kernels_triton_cache, unless the environment names another one, the same in both runs.

Needs torch, triton, peft, pytest and a GPU (gcc for Triton's launchers, transformers for the model, pytest-xdist and
pytest-timeout to test side by side and to the second), nothing that has to be built or installed: the package runs from
the checkout. Every stage is a process of its own. The last one packs up, whatever happened to the others: after SIGINT
and SIGTERM, too. Exit status 0 where every stage ended well, 1 where one failed or had no time left, 2 without a GPU.

A further stage is one more line in STAGES, and its name in a plan.
"""

from __future__ import annotations

import time

START = time.monotonic()  # importing torch from a cold disk is a part of the budget

import argparse  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from dataclasses import replace  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from gpu_stages import card, saving, telling  # noqa: E402
from gpu_stages.benchmarks import KERNEL_CASES, benchmark, compiled, tuning, warm, ways  # noqa: E402
from gpu_stages.consan import consan  # noqa: E402
from gpu_stages.device_tests import tests_core, tests_failed  # noqa: E402
from gpu_stages.running import Stage, Suite, finished_before, run_stages  # noqa: E402
from gpu_stages.sanitizer import sanitizer  # noqa: E402

from bench.lib import machine, outputs  # noqa: E402
from bench.lib.machine import ROOT  # noqa: E402

# bench.layer: the square layer, a larger one, a wide one at a high rank, one token, 512 tokens, a trainer's autocast
HEAD = ("--case", "1-4", "6", "10", "--step-seconds", "0.25", "--no-launches")
# as many cases as 35 s have room for at 2.8 s each (an estimate), with what launches are counted in
LAYER = ("--case", "1-3", "dropout", "shared", "6", "10", "13", "4", "17", "--step-seconds", "0.25")
WHOLE_LAYER = ("--case", "1-3", "dropout", "shared", "4-24", "--step-seconds", "0.25")
STEPS = ("--step", "forward+backward", "inference", "inference+frozen_adapters")
EAGER = ("--provider", "frozen", "peft_lora", "peft_dora", "ours")


def _bench(name: str, *options: str, module: str | None = None, **keywords: Any) -> partial:
    return partial(benchmark, name=name, command=["-m", f"bench.{module or name}", *options], **keywords)


def _layer(name: str, *options: str) -> partial:
    return _bench(name, "--device", "cuda", "--grid", "core", *options, module="layer", spare=8)


FACTS = partial(benchmark, name="facts", command=["-m", "gpu_stages.facts"], spare=None, show=8)
KERNELS = _bench("kernels", "--device", "cuda", "--case", *KERNEL_CASES, roof=True, spare=8)
SAVE = Stage("save", 3, 7, 12, saving.save, always=True)
# least, expected and most seconds, expected being an estimate for 16 cores; in each plan in order of worth
FIRST = (
    Stage("facts", 12, 18, 40, FACTS, "facts.json"),
    Stage("warm", 16, 20, 40, warm, "ptxas.json"),
    Stage("kernels", 20, 35, 50, KERNELS, "kernels.json"),
    Stage("tests_core", 40, 60, 85, tests_core, "tests_core.xml"),
    # these two keep their own time, and kill what hangs
    Stage("ways", 30, 45, 55, ways, "ways.json"),
    Stage("head", 26, 34, 45, _layer("head", *HEAD, *EAGER, *STEPS), "head.json"),
    Stage("probe", 40, 50, 60, _bench("probe", module="studies.probe", show=12, spare=6), "probe.json"),
    Stage("decisive", 30, 36, 50, _bench("decisive", module="studies.decisive", roof=True), "decisive.json"),
    SAVE,
)
SECOND = (
    # some 530 kernels, at 1 s each in 15 processes
    Stage("warm", 25, 42, 60, partial(warm, more=["--tuning"]), "ptxas.json"),
    Stage("tests_failed", 35, 45, 75, tests_failed, "tests_failed.xml"),
    # its cases start torch side by side, and their kernels are compiled
    Stage("consan", 12, 18, 40, consan),
    Stage("tuning", 45, 48, 80, tuning, "tuned.json"),
    Stage("layer", 35, 48, 65, _layer("layer", *LAYER, *EAGER, *STEPS), "layer.json"),
    Stage("model", 40, 46, 80, _bench("model"), "model.json"),
    Stage("compiled", 35, 41, 60, compiled, "factored_compose_compiled.json"),
    # What is left. Nobody knows yet how long torch takes to start under it: it may need more, and then says so.
    Stage("memcheck", 25, 25, 120, partial(sanitizer, tool="memcheck")),
    SAVE,
)
MORE = tuple(Stage(tool, 30, 60, 90, partial(sanitizer, tool=tool)) for tool in ("racecheck", "initcheck"))


def _all() -> tuple[Stage, ...]:
    """Every stage of the two plans and the rest, warm with what tuning needs and the whole grid of the layer; without
    their hurry.
    """
    first = [stage for stage in FIRST if stage.name not in ("warm", "save")]
    unhurried = [replace(stage, most=3 * stage.most) for stage in (SECOND[0], *first[1:], *SECOND[1:-1], *MORE)]
    whole = _layer("layer", *WHOLE_LAYER, *EAGER, *STEPS)
    unhurried = [replace(stage, run=whole) if stage.name == "layer" else stage for stage in unhurried]
    return (first[0], *unhurried, SAVE)


PLANS = {"first": (FIRST, 340.0), "second": (SECOND, 340.0), "all": (_all(), 1800.0)}
STAGES = {stage.name: stage for stage in _all()}


@outputs.command("gpu_suite")
def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    arguments = _parser().parse_args(argv)
    if not torch.cuda.is_available():  # makes no context: the card may be exclusive to one process at a time
        build = "ROCm" if torch.version.hip else "CUDA" if torch.version.cuda else "CPU"
        print(f"gpu_suite: torch {torch.__version__} (a {build} build) sees no GPU; expected one", file=sys.stderr)
        return 2
    name = (card.query("name") or [torch.cuda.get_device_name()])[0]
    stages, seconds = PLANS[arguments.plan]
    if arguments.stage:
        stages = tuple(replace(STAGES[stage], most=float("inf")) for stage in arguments.stage) + (SAVE,)
    seconds = arguments.seconds or seconds
    out = (arguments.out or ROOT / "bench" / "results" / "-".join(name.lower().split())).resolve()
    outputs.claim("gpu_suite", out / "suite.json")
    suite = Suite(out, arguments.commit, arguments.plan, cache=arguments.cache, failed=arguments.failed)
    # as machine.meta of the GPU, which would make a CUDA context
    about = machine.meta(torch.device("cpu"), arguments.commit) | {"device": name, "threads": None}
    about |= {"plan": arguments.plan, "budget_seconds": seconds}
    finished = {}
    if arguments.resume and (out / saving.RESULTS).exists():
        saving.unpack_results(out / saving.RESULTS, suite.work)
        finished = finished_before(out, suite.work, stages, about["commit"])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
            signal.signal(number, lambda number, frame: suite.stop.set())
    left = seconds - (time.monotonic() - START)
    results = run_stages(stages, suite, left, about, finished=finished, after=saving.pack_results)
    try:
        print("\n" + telling.summary(results, suite.work, arguments.plan))
    except Exception as error:  # what a stage has left may be anything; all of it is packed by now
        print(f"no summary: {type(error).__name__}: {error}")
    return 0 if all(result["ok"] and "not_kept" not in result for result in results) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plan", choices=PLANS, default="all", help="(default: %(default)s)")
    parser.add_argument("--stage", nargs="+", choices=STAGES, help="only these, and save")
    parser.add_argument("--seconds", type=float, help="for everything (default: 340, 340 and 1800)")
    parser.add_argument("--out", type=Path, help="default: bench/results/<gpu>")
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    parser.add_argument("--cache", type=Path, help="cache.tar.xz of an earlier run")
    parser.add_argument("--failed", type=Path, help="suite.json of an earlier run: what passed is left out")
    parser.add_argument("--resume", action="store_true", help="skip what ended well for this commit in the folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
