"""The ways of a layer, measured: what wins at which shape on this GPU, and by how much, for the planner's table.

    python -m bench.studies.ways                          # rows into bench/results/<gpu>/ways.json
    python -m bench.studies.ways --shape 8192 4096 4096 64 --table table.json

Of a layer in bf16 three passes, each by all its ways: forward in training, with what is kept for the backward pass;
inference; and backward, every gradient wanted, with what runs beside the GEMM of dx (planning/measured.py, BESIDE).
The ways of a pass are CUDA graphs, replayed in turn, with L2 flushed before each.

A way is first held to float64, must give the same bits twice, and must launch what its name says. One that does not, or
hangs, or raises, is a row with the reason, and is not in the table. Both files are written after every pass.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bench.lib import outputs, tuned
from bench.lib.apart import Attempt, Row, make
from bench.lib.machine import ROOT, conditions, device_folder, meta
from bench.lib.measure import failure, interleave, stopwatch_of
from bench.lib.report import write
from bench.lib.shapes import WAY_SHAPES, LayerCase
from bench.studies.one_layer import WAYS, OneLayer, why_not_ours
from dora_kernels.planning import configs
from dora_kernels.testing import compare

SECONDS_EACH = 0.4  # of the interleaved measurement of a pass
ROUNDS = (10, 100)
# without a word a check hangs; the first one starts CUDA, too, and compiles most
SILENCE = (25, 12)
# a case, a pass, a way
Key = tuple[LayerCase, str, str]


@dataclass
class Study:
    """The cases, and what is known of each of their passes and ways: a row each.

    A process apart knows what was known when it was forked, and what it has found since.
    """

    cases: Sequence[LayerCase]
    rows: dict[Key, Row] = field(default_factory=dict)
    _layer: tuple[LayerCase, OneLayer] | None = None

    def attempts(self) -> dict[str, tuple[Attempt, Sequence[Key]]]:
        """By name, each attempt and what it is about: every way of a pass is checked, then all are timed in turn."""
        found: dict[str, tuple[Attempt, Sequence[Key]]] = {}

        def add(name: str, keys: Sequence[Key], run: Callable[[], Iterator[Row]], needs: float) -> None:
            noting = functools.partial(self._noting, keys, run)
            found[name] = Attempt(name, noting, SILENCE[bool(found)], needs), keys

        for case in self.cases:
            for name, ways in WAYS.items():
                keys = [(case, name, way) for way in ways]
                for key, way in zip(keys, ways, strict=True):
                    add(f"{case}: {name} {way}", [key], functools.partial(self.check, key), needs=1.5)
                add(f"{case}: {name}", keys, functools.partial(self.times, case, name), needs=1)
        return found

    def _noting(self, keys: Sequence[Key], run: Callable[[], Iterator[Row]]) -> Iterator[Row]:
        for row in run():
            self.note(keys, row)
            yield row

    def note(self, keys: Sequence[Key], row: Row) -> None:
        """Put what an attempt has found into the rows that it is about: of all its ways alike, or "by_way"."""
        for key in keys:
            case, name, way = key
            known = self.rows.setdefault(key, sizes(case) | {"pass": name, "way": way, "ok": True})
            known |= row.get("by_way", {way: row}).get(way, {})

    def check(self, key: Key) -> Iterator[Row]:
        """Errors and yardsticks of the results, and whether the way is to be timed; or the reason that it is not."""
        case, name, way = key
        if reason := self._why_not_again(name, way):
            yield {"left_out": reason}
            return
        kept = self.kept(case)
        try:
            layer = self._layer_of(case)
            ready = layer.ready(name, way, kept)
            first, second = ready.results(), ready.results()
        except Exception as error:
            if "CUDA" in str(error):
                raise  # no other way is right after it, or has the memory
            self._layer = None  # a capture may have failed in its pool
            yield {"ok": False, "reason": f"{type(error).__name__}: {error}"[:500]}
            return
        exact, yardstick = layer.references
        compared = [compare(one, first[one], yardstick[one], exact[one]) for one in first]
        row: Row = {"errors": {one.name: {"error": one.error, "yardstick": one.yardstick} for one in compared}}
        row |= {"kept_by": kept} if name == "backward" else {}
        reason = failure(compared)
        if reason is None and not all(torch.equal(first[one], second[one]) for one in first):
            reason = "not the same bits twice"
        if reason is not None:
            row |= {"ok": False, "reason": reason}
        elif reason := why_not_ours(layer, name, way, ready.launched):
            row["left_out"] = reason
        yield row | {"timed": reason is None}

    def times(self, case: LayerCase, name: str) -> Iterator[Row]:
        """Microseconds of the ways that are right, in one interleaved measurement."""
        ways = [way for way in WAYS[name] if self.rows.get((case, name, way), {}).get("timed")]
        if not ways:
            return
        layer = self._layer_of(case)
        device = layer.problem.x.device
        calls = {way: layer.ready(name, way, self.kept(case)).call for way in ways}
        timings = interleave(calls, stopwatch_of(device), SECONDS_EACH, ROUNDS)
        card = conditions(device)
        found = {way: {"us": 1e3 * timing.median, "ms": asdict(timing)} | card for way, timing in timings.items()}
        yield {"by_way": found}

    def _layer_of(self, case: LayerCase) -> OneLayer:
        """The case's layer, one at a time."""
        if self._layer is None or self._layer[0] != case:
            self._layer = None  # its memory is wanted
            self._layer = case, OneLayer(case)
        return self._layer[1]

    def _why_not_again(self, name: str, way: str) -> str | None:
        """The reason that a way is not tried again: it has cost a process. Both forward passes have one kernel.

        The first way of a pass is always tried: without it nothing can be said.
        """
        for (case, other, tried), row in self.rows.items():
            reason = row.get("reason", "")
            # torch's errors, and those of Triton's driver
            of_cuda = "CUDA error" in reason or "Error [CUDA]" in reason
            fatal = reason.startswith(("killed: hangs", "its process died")) or of_cuda
            if fatal and tried == way != WAYS[name][0] and "errors" not in row and WAYS[other] == WAYS[name]:
                return f"at {case}: {reason}"
        return None

    def kept(self, case: LayerCase) -> str:
        """The way of the forward pass that the backward pass follows: the one that took least in training."""
        us = self.us(case, "forward")
        return min(us, key=lambda way: us[way], default=WAYS["forward"][0])

    def us(self, case: LayerCase, name: str) -> dict[str, float]:
        """Microseconds of a pass by way, as far as they were measured."""
        known = {way: self.rows.get((case, name, way), {}).get("us") for way in WAYS[name]}
        return {way: us for way, us in known.items() if us is not None}

    def entry(self, case: LayerCase) -> Row | None:
        """The case's entry in the table: the passes of which two ways were measured, the first and another."""
        us = {name: self.us(case, name) for name in WAYS}
        compared = {name: of if WAYS[name][0] in of and len(of) > 1 else {} for name, of in us.items()}
        rounded = {name: {way: float(f"{value:.4g}") for way, value in of.items()} for name, of in compared.items()}
        return sizes(case) | rounded if any(rounded.values()) else None

    def left_out(self) -> list[str]:
        """The passes that were not timed."""
        return [f"{case}: {name}" for case in self.cases for name in WAYS if not self.us(case, name)]


def sizes(case: LayerCase) -> Row:
    """The columns that name a case."""
    return {letter: getattr(case, letter) for letter in "MNKR"}


def told(study: Study) -> list[str]:
    """A line for each case that was measured: what won each pass, by how much, and what that saves in training."""
    lines = []
    for case in study.cases:
        entry = study.entry(case)
        if entry is None:
            continue
        won = [tuned.won(name, entry[name]) for name in WAYS if entry[name]]
        training = [(entry[name], WAYS[name][0]) for name in ("forward", "backward") if entry[name]]
        saved = sum(min(us.values()) - us[before] for us, before in training)
        lines.append(f"{case.M} x {case.N} x {case.K} R {case.R}: {', '.join(won)}; training {saved:+.0f} us")
    return lines or ["nothing was measured"]


def run(
    study: Study,
    out: pathlib.Path,
    table: pathlib.Path,
    information: dict[str, Any],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """All attempts within `seconds`: rows into `out` after each, entries into `table` after each pass."""
    attempts = study.attempts()
    for attempt, row in make([attempt for attempt, _ in attempts.values()], seconds, clock):
        study.note(attempts[attempt.name][1], row)
        write(out, information | {"left_out": study.left_out()}, list(study.rows.values()))
        entries = [entry for case in study.cases if (entry := study.entry(case))]
        if entries:
            known = tuned.read(table)
            ways = tuned.with_entries(known.get("ways", ()), entries)
            tuned.write(table, known | {"meta": information, "ways": ways})


def facts(commit: str | None) -> Iterator[Row]:
    """The rows of the first attempt: meta of the device, or none if torch sees no device."""
    if torch.cuda.is_available():
        device = torch.device("cuda")
        yield {"meta": meta(device, commit), "folder": device_folder(device)}


@outputs.command("bench.studies.ways")
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where a row is not ok, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.ways", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="for the whole run (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, help="default: bench/results/<gpu>/ways.json")
    parser.add_argument("--table", type=pathlib.Path, help="default: dora_kernels/planning/tuned/<gpu>.json")
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    parser.add_argument("--shape", type=int, nargs=4, action="append", metavar=("M", "N", "K", "R"))
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    # asked in another process: this one must not use CUDA, or it could not be forked any more
    asking = Attempt("facts", functools.partial(facts, arguments.commit), arguments.seconds)
    found = [row for _, row in make([asking], arguments.seconds)]
    if not found or "meta" not in found[0]:
        reason = found[0]["reason"] if found else "torch sees no GPU; expected one"
        print(f"bench.studies.ways: {reason}", file=sys.stderr)
        return 1 if found else 2
    information = found[0]["meta"]
    out = arguments.out or ROOT / "bench" / "results" / found[0]["folder"] / "ways.json"
    table = arguments.table or configs.tuned_path(information["device"])
    outputs.claim("bench.studies.ways", out, table)
    study, stopped = Study([LayerCase(*shape, "bf16", "cuda") for shape in arguments.shape or WAY_SHAPES]), False
    try:
        run(study, out, table, information, arguments.seconds - (time.monotonic() - start))
    except (KeyboardInterrupt, RuntimeError) as error:  # asked to end, or a process that cannot be killed
        print(f"bench.studies.ways: {type(error).__name__}: {error}", file=sys.stderr)
        stopped = True
    rows, lines = list(study.rows.values()), told(study)
    write(out, information | {"left_out": study.left_out(), "told": lines}, rows)
    for row in rows:
        if reason := row.get("reason") or row.get("left_out"):
            print(f"{row['M']} x {row['N']} x {row['K']} R {row['R']}, {row['pass']} {row['way']}: {reason}"[:240])
    print("\n".join(lines))
    return 0 if not stopped and all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
