"""Is a GEMM of our own worth it? Right at all, percent of cuBLAS, work hidden beside it: a minute on a Hopper GPU.

    python -m bench.studies.probe                                   # into bench/results/<gpu>/probe.json
    python -m bench.studies.probe --seconds 50 --shape 8192 4096 4096 64

The package's forward pass is a GEMM of the vendor's and a pass over its result, and the bytes of that pass are its
floor. Two things go past it: one kernel for both (gluon/), and the backward pass' sums beside its GEMM (beside.py).
This measures whether they pay, most worth first. Sections run in processes apart, which are killed where they hang; the
file is whole after every row. What the machine cannot do is a row with the reason. The last lines are the decisions.
"""

from __future__ import annotations

import argparse
import collections
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.lib import outputs
from bench.lib.apart import Attempt, Row, make
from bench.lib.machine import ROOT, device_folder, meta
from bench.lib.report import write
from bench.lib.shapes import LayerCase
from bench.studies import beside
from bench.studies.gluon.candidates import Candidate, GemmInputs, check_variant, sizes, time_candidates
from bench.studies.gluon.gemm import VARIANTS
from dora_kernels.kernels.hopper.launch import why_not_gluon

FIRST_SHAPE = (8192, 4096, 4096, 64)
OTHER_SHAPES = ((8192, 14336, 4096, 384), (8192, 8192, 8192, 64), (8192, 4096, 14336, 16))
# few steps and tiles; tails everywhere; R of several steps; a tile with almost no rows and a long reduction
CHECKED_SHAPES = ((512, 512, 512, 16), (1000, 1032, 520, 64), (640, 768, 1024, 384), (136, 264, 4096, 8))

# The stop rules, set before anything was measured. Two outputs in percent of cuBLAS' one: below this the fused forward
# pass costs more than the pass that it saves, which would take 34 us on an H200 and 45 us on an H100 at FIRST_SHAPE.
LEAST_PERCENT = {"H200": 93.0, "H100": 91.5}
GRID_TOLERANCE = 0.01  # fewer programs may be slower than one a multiprocessor by this
LEAST_HIDDEN = 0.6  # of the work's time


@dataclass
class Probe:
    """The cases to measure, and the rows so far: later sections read in them which variants are right."""

    case: LayerCase
    others: tuple[LayerCase, ...] = ()
    rows: list[Row] = field(default_factory=list)

    def right(self, variant: str) -> bool:
        """True if all checks of the variant were made and passed."""
        checks = self._checks(variant)
        return len(checks) == len(CHECKED_SHAPES) + 1 and all(checks)

    def wrong(self, variant: str) -> bool:
        """True if a check of the variant failed. It is neither right nor wrong if checks were cut short."""
        return not all(self._checks(variant))

    def _checks(self, variant: str) -> list[bool]:
        return [row["ok"] for row in self.rows if row["section"] == "right" and row.get("variant") == variant]


def right(probe: Probe) -> list[Attempt]:
    """Each variant at the small shapes and at the first one."""
    if reason := why_not_gluon():
        return [Attempt("Gluon", functools.partial(iter, [{"left_out": reason}]))]
    cases = [LayerCase(*shape, "bf16", "cuda") for shape in CHECKED_SHAPES] + [probe.case]
    # the first one also starts CUDA, builds Triton's launcher, and compiles
    return [Attempt(name, functools.partial(check_variant, name, cases), silence=20) for name in VARIANTS]


# the variants, and the first one in other orders of tiles
FUSED = (*map(Candidate, VARIANTS), Candidate("two outputs", group_m=4), Candidate("two outputs", group_m=16))


def percent(probe: Probe) -> list[Attempt]:
    """Each of FUSED against cuBLAS at the first shape."""
    return [_against_cublas(probe, probe.case, FUSED)]


def grid(probe: Probe) -> list[Attempt]:
    """A program a multiprocessor against fewer, and how many cuBLAS itself launches (by a profiler, hence last)."""
    kinds = ({"variant": "two outputs"}, {"variant": "one output"}, {"variant": "dx"})
    programs = (None, beside.FEWER_PROGRAMS)
    candidates = [Candidate(**kind, programs=count) for kind in kinds for count in programs]
    counting = Attempt("cuBLAS", functools.partial(cublas_kernels, probe.case), needs=3)
    return [_against_cublas(probe, probe.case, candidates), counting]


def overlap(probe: Probe) -> list[Attempt]:
    """Each mechanism in an attempt of its own: what one of them breaks, it breaks alone."""
    attempts = []
    for name in beside.MECHANISMS:
        run = functools.partial(beside.measure_mechanism, name, probe.case)
        if name.startswith("own") and not probe.right("dx"):
            row = {"ok": False, "reason": "our dx was not checked in full"}
            if reason := "our dx is wrong" if probe.wrong("dx") else why_not_gluon():
                row = {"left_out": reason}
            run = functools.partial(iter, [{"mechanism": name} | row])
        attempts.append(Attempt(name, run, needs=4))
    return attempts


def other_shapes(probe: Probe) -> list[Attempt]:
    """Percent of cuBLAS elsewhere."""
    candidates = [Candidate("two outputs"), Candidate("one output"), Candidate("dx")]
    return [_against_cublas(probe, case, candidates) for case in probe.others]


def launched(probe: Probe) -> list[Attempt]:
    """The kernel that the GEMM is with each mechanism that was measured; a profiler slows down what it has seen."""
    names = dict.fromkeys(row["mechanism"] for row in probe.rows if row["section"] == "overlap" and "hidden" in row)
    return [Attempt(name, functools.partial(beside.launched_with, name, probe.case), needs=4) for name in names]


Section = Callable[[Probe], list[Attempt]]
SECTIONS: dict[str, Section] = {
    section.__name__: section for section in (right, percent, grid, overlap, other_shapes, launched)
}
# Those that share a process: to start CUDA in one more takes some 3 s of a minute. Work beside a GEMM is most likely to
# hang, and has one of its own.
TOGETHER = (("percent", "grid"),)


def _against_cublas(probe: Probe, case: LayerCase, candidates: Sequence[Candidate]) -> Attempt:
    """The attempt that times cuBLAS and the candidates that are right."""
    usable = [candidate for candidate in candidates if probe.right(candidate.variant)]
    run = functools.partial(time_candidates, case, usable)
    return Attempt(f"{case.M} x {case.N} x {case.K}", run, needs=4)


def cublas_kernels(case: LayerCase) -> Iterator[Row]:
    """Name, grid and block of what torch's product launches, forward and for dx."""
    for call, nn in (("cuBLAS", False), ("cuBLAS dx", True)):
        inputs = GemmInputs.random(case, nn)
        yield {"call": call, **sizes(case), "kernels": beside.kernels_of(inputs.product)}


def decisions(device: str, probe: Probe) -> list[str]:
    """The most telling numbers, eight lines at most, with what follows from them by the stop rules."""
    rows = [row for row in probe.rows if sizes(probe.case).items() <= row.items()]
    checks = [row for row in probe.rows if row["section"] == "right" and "variant" in row]
    failed = [row for row in probe.rows if row["section"] == "right" and not row["ok"]]
    wrong = dict.fromkeys(row.get("variant") or row["attempt"] for row in failed)  # wrong, or killed
    lines = [f"right: {sum(row['ok'] for row in checks)} of {len(checks)} checks; wrong: {'; '.join(wrong) or '-'}"]
    least = None
    if probe.case == LayerCase(*FIRST_SHAPE, "bf16", "cuda"):
        least = next((value for card, value in LEAST_PERCENT.items() if card in device), None)
    lines += _fused_forward(probe, least, [row for row in rows if row["section"] == "percent" and "us" in row])
    lines += _fewer_programs([row for row in rows if row["section"] == "grid" and "variant" in row])
    launched = [row for row in rows if row["section"] == "grid" and "kernels" in row]
    shown = [f"{row['call']} {one['grid']} {one['name'][:40]}" for row in launched for one in row["kernels"]]
    lines += [f"grids: {', '.join(shown)}"] if shown else []
    return lines + _beside([row for row in probe.rows if row["section"] == "overlap"])


def _fused_forward(probe: Probe, least: float | None, rows: Sequence[Row]) -> list[str]:
    """No where each candidate with two outputs was timed or is wrong; undecided where one that is not might do it."""
    by_name = {row["candidate"]: row for row in rows}
    two = [row for row in rows if row.get("variant", "").startswith("two outputs")]
    lines = []
    if two:
        best = max(two, key=lambda row: row["percent"])
        verdict = "no rule for this card and shape"
        asked = [candidate for candidate in FUSED if candidate.variant.startswith("two outputs")]
        open_ones = [one for one in asked if one.name not in by_name and not probe.wrong(one.variant)]
        if least is not None:
            answer = _answer(best["percent"] >= least, not open_ones)
            verdict = f"FUSED FORWARD: {answer}, the rule is {least}%, {len(two)} of {len(asked)} timed"
        lines.append(f"{best['candidate']}: {best['percent']:.1f}% of cuBLAS with its one; {verdict}")
        separate = by_name["cuBLAS + epilogue"]["us"]
        lines.append(
            f"one kernel {best['us']:.1f} us, cuBLAS + epilogue {separate:.1f} us, saved {separate - best['us']:.1f} us"
        )
    single = [name for name in ("one output", "dx") if name in by_name]
    shown = ", ".join(f"{name} {by_name[name]['percent']:.1f}%" for name in single)
    return lines + ([f"of cuBLAS: {shown}"] if single else [])


def _answer(reached: bool, complete: bool = True) -> str:
    """The answer to a rule: "undecided" if what was not measured could still reach it."""
    return "yes" if reached else "no" if complete else "undecided"


def _fewer_programs(rows: Sequence[Row]) -> list[str]:
    """By dx, beside which there would be work; the others are shown."""
    fewer = beside.FEWER_PROGRAMS
    us = {(row["variant"], row["programs"]): row["us"] for row in rows}
    slower = {name: us[name, fewer] / us[name, None] - 1 for name, count in us if count is None and (name, fewer) in us}
    if "dx" not in slower:
        return []
    shown = ", ".join(f"{name} {100 * value:+.1f}%" for name, value in slower.items())
    return [
        f"time on {fewer} programs: {shown}; WITHIN {GRID_TOLERANCE:.0%}: {_answer(slower['dx'] <= GRID_TOLERANCE)}"
    ]


def _beside(rows: Sequence[Row]) -> list[str]:
    """The best mechanism, and the best with a GEMM of our own. No where each was measured at each amount of work, or is
    known not to be there.
    """
    lines = []
    own = [name for name in beside.MECHANISMS if name.startswith("own")]
    for what, asked in (("WORK BESIDE A GEMM", list(beside.MECHANISMS)), ("OUR GEMM FOR IT", own)):
        few = [row for row in rows if "hidden" in row and row["mechanism"] in asked]
        amounts = collections.Counter(row["mechanism"] for row in few)
        full = [name for name, count in amounts.items() if count == len(beside.WORK)]
        absent = {row["mechanism"] for row in rows if "left_out" in row and row["mechanism"] in asked}
        if few:
            best = max(few, key=lambda row: row["hidden"])
            answer = _answer(best["hidden"] > LEAST_HIDDEN, len(full) + len(absent) == len(asked))
            count = f"{len(full)} of {len(asked)}" + (f", {len(absent)} cannot be had" if absent else "")
            verdict = f"{what}: {answer}, the rule is above {LEAST_HIDDEN:.0%}, {count}"
            shares = f'{best["hidden"]:.0%} of "{best["beside"]}" hidden, {best["overlapped"]:.0%} overlapped'
            lines.append(f"{best['mechanism']}: {best['saved_us']:+.1f} us, {shares}; {verdict}")
    return lines


def facts(commit: str | None) -> Iterator[Row]:
    """The rows of the first attempt: meta of the device, or none if torch sees no device."""
    if torch.cuda.is_available():
        device = torch.device("cuda")
        count = torch.cuda.get_device_properties(device).multi_processor_count
        yield {"meta": meta(device, commit) | {"multiprocessors": count}, "folder": device_folder(device)}


def run(
    probe: Probe,
    out: pathlib.Path,
    information: dict[str, Any],
    seconds: float,
    sections: dict[str, Section] = SECTIONS,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """The sections in order, within `seconds`: their rows into probe.rows, and all of these into `out` after each."""
    end = clock() + seconds
    for names in _by_process(sections):
        start, before = clock(), len(probe.rows)
        attempts = [(name, attempt) for name in names for attempt in sections[name](probe)]
        section_of = {id(attempt): name for name, attempt in attempts}
        for attempt, row in make([attempt for _, attempt in attempts], end - start, clock):
            probe.rows.append({"section": section_of[id(attempt)], "attempt": attempt.name, "ok": True} | row)
            write(out, information | {"left_out": without_rows(sections, probe)}, probe.rows)
        print(f"{', '.join(names)}: {len(probe.rows) - before} rows in {clock() - start:.0f} s", flush=True)


def _by_process(sections: Iterable[str]) -> list[tuple[str, ...]]:
    """The sections in order, those together that are so in TOGETHER."""
    groups = (next((few for few in TOGETHER if name in few), (name,)) for name in sections)
    return [tuple(name for name in few if name in sections) for few in dict.fromkeys(groups)]


def without_rows(sections: Iterable[str], probe: Probe) -> list[str]:
    """The sections that nothing is known of."""
    return [name for name in sections if name not in {row["section"] for row in probe.rows}]


@outputs.command("bench.studies.probe")
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where a row is not ok, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.probe", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="for the whole run (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, help="default: bench/results/<gpu>/probe.json")
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    parser.add_argument("--shape", type=int, nargs=4, default=FIRST_SHAPE, metavar=("M", "N", "K", "R"))
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    # asked in another process: this one must not use CUDA, or it could not be forked any more
    asking = Attempt("facts", functools.partial(facts, arguments.commit), arguments.seconds)
    found = [row for _, row in make([asking], arguments.seconds)]
    if not found or "meta" not in found[0]:
        print(
            f"bench.studies.probe: {found[0]['reason'] if found else 'torch sees no GPU; expected one'}",
            file=sys.stderr,
        )
        return 1 if found else 2
    information = found[0]["meta"]
    out = arguments.out or ROOT / "bench" / "results" / found[0]["folder"] / "probe.json"
    outputs.claim("bench.studies.probe", out)
    shapes = [tuple(arguments.shape), *(shape for shape in OTHER_SHAPES if shape != tuple(arguments.shape))]
    first, *others = (LayerCase(*shape, "bf16", "cuda") for shape in shapes)
    probe, stopped = Probe(first, tuple(others)), False
    try:
        run(probe, out, information, arguments.seconds - (time.monotonic() - start))
    except (KeyboardInterrupt, RuntimeError) as error:  # asked to end, or a process that cannot be killed
        print(f"bench.studies.probe: {type(error).__name__}: {error}", file=sys.stderr)
        stopped = True
    lines = decisions(str(information["device"]), probe)
    write(out, information | {"left_out": without_rows(SECTIONS, probe), "decisions": lines}, probe.rows)
    for row in probe.rows:
        if not row["ok"] or "left_out" in row:
            reason = row.get("reason") or row.get("left_out") or "wrong"
            print(f"{row['section']}, {row['attempt']}: {reason.splitlines()[0]}")
    print("\n".join(lines))
    return 0 if not stopped and all(row["ok"] for row in probe.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
