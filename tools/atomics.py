"""The atomics in compiled kernels: all but one are faults, and that one has to be surrounded by what makes it work.

The sums over the tokens are split among programs. The last one of a block to be done adds up what all of them stored,
and it knows by a count: tl.atomic_add on an int32, sem="acq_rel", scope="gpu". One thread of a program counts. What the
others stored is seen elsewhere only if all threads met in between, and Triton writes no barrier for that: the author
does, tl.debug_barrier(). No result on a GPU would show that it is missing, until one is wrong.
"""

import re
from collections.abc import Sequence

from machine_code import Instruction, successors

_COUNT = "ATOMG.E.ADD.STRONG.GPU"
_ATOMICS = {"ATOM", "ATOMG", "ATOMS", "RED", "REDG", "SUATOM", "SURED"}
# of a program alone, and the same in any order: with these ptxas keeps account of tensor memory (tcgen05.alloc, sm_100)
_ACCOUNT = ("ATOMS.OR", "ATOMS.AND")
_STORES = {"ST", "STG", "UTMASTG"}
_READS = {"LD", "LDG", "LDGSTS", "UTMALDG", "UBLKCP"}
_BARRIER = r"BAR\.SYNC\S* 0x0$"  # with a second operand it is one of some threads
# On every way from the atomic (before it: back to it, else on from it): what must come, before which kinds, else what
_RULES = (
    (True, _BARRIER, _STORES, "no barrier between what its threads stored and the count: a tl.debug_barrier() lacks"),
    (True, r"MEMBAR\..*GPU", {"BAR", *_STORES}, "the count releases nothing: no MEMBAR before it"),
    (False, r"CCTL\.IVALL", _READS, "the count acquires nothing: a load before CCTL.IVALL"),
    (False, _BARRIER, _READS, "a thread loads before it knows what the thread that counts has acquired"),
)


def faults(code: Sequence[Instruction]) -> list[str]:
    """The faults of the atomics in SASS; none where there are no atomics."""
    if not any(_kind(one) in _ATOMICS for one in code):
        return []
    after = successors(code)
    before: list[list[int]] = [[] for _ in code]
    for index, following in enumerate(after):
        for one in following:
            before[one].append(index)
    found = []
    for index, atomic in enumerate(code):
        if _kind(atomic) not in _ATOMICS or atomic.operation in _ACCOUNT:
            continue
        if atomic.operation != _COUNT:
            found.append(f"{atomic.operation}: the one atomic that kernels may have is {_COUNT}")
            continue
        for backward, wanted, unwanted, wrong in _RULES:
            met = _until(wanted, index, before if backward else after, code)
            found += [wrong] if unwanted & {_kind(code[one]) for one in met} else []
    return found


def _kind(instruction: Instruction) -> str:
    return instruction.operation.split(".")[0]


def _until(wanted: str, start: int, steps: Sequence[Sequence[int]], code: Sequence[Instruction]) -> set[int]:
    """The instructions on the ways from `start` to one that is `wanted`, and executed wherever `start` is."""
    found, pending = set(), list(steps[start])
    while pending:
        index = pending.pop()
        one = code[index]
        sure = one.predicate in ("", code[start].predicate)
        if index not in found and not (sure and re.match(wanted, f"{one.operation} {one.operands}")):
            found.add(index)
            pending += steps[index]
    return found


def amd_faults(assembly: str, whole: bool) -> list[str]:
    """The faults of the atomics in AMD's assembly. whole: no program counts but for itself.

    A barrier is a bare s_barrier there (Triton 3.6.0 and 3.7.1, gfx942), which waits for no wavefront's stores, and the
    one that counts waits for its own: threads of the same program see what was stored before it, other programs may
    not. LLVM mended the same for gfx10 and gfx11 (llvm-project, pull request 161638).
    """
    found = dict.fromkeys(re.findall(r"\b(?:global|flat|buffer|ds)_(?:atomic_\w+|add_\w+|cmpst_\w+)", assembly))
    others = [one for one in found if one != "global_atomic_add"]
    wrong = [f"{one}: the one atomic that kernels may have is global_atomic_add" for one in others]
    if "global_atomic_add" in found and not whole:
        wrong.append("a block is cut among programs, and the barrier before the count waits for nobody's stores")
    return wrong
