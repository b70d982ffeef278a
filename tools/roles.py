"""The roles of a warp-specialised kernel, in its machine code: what each of its warps does, and in how many registers.

All warps of a program start with as many registers as the launch gives them. USETMAXREG sets another number: what one
role's warps give up, another's take. So a role is the code from one USETMAXREG to the next.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from machine_code import Instruction, successors


@dataclass(frozen=True)
class Role:
    """Code between two changes of the registers: the number that it may use, and the number that it does use.

    name: "producer" for what has the copy engine load, "consumer" for what multiplies, numbered in the order of the
    text where there are several; "" for the rest, which sets up and waits.
    """

    name: str
    limit: int
    registers: int
    code: tuple[Instruction, ...]


def roles(code: Sequence[Instruction], launched: int) -> list[Role]:
    """The roles of a kernel in SASS whose threads are launched with so many registers; none without USETMAXREG."""
    starts = [index for index, one in enumerate(code) if _changes(one)]
    if not starts:
        return []
    after = successors(code)
    pieces = [(launched, _until_the_next(code, 0, after))]
    pieces += [(int(code[start].operands.split()[-1], 16), _until_the_next(code, start, after)) for start in starts]
    consumers = sum(_name(piece) == "consumer" for _, piece in pieces)
    found: list[Role] = []
    for limit, piece in pieces:
        name = _name(piece)
        if name == "consumer" and consumers > 1:
            name += f" {sum(one.name.startswith(name) for one in found)}"
        found.append(Role(name, limit, registers(piece), tuple(piece)))
    return found


def _changes(instruction: Instruction) -> bool:
    return instruction.operation.startswith("USETMAXREG")


def _until_the_next(code: Sequence[Instruction], start: int, after: Sequence[Sequence[int]]) -> list[Instruction]:
    """The code that is executed from `start` on, with an EXIT in the place of each USETMAXREG that ends it."""
    seen, pending, ends = {start}, list(after[start]), set()
    while pending:
        index = pending.pop()
        if index in seen:
            continue
        seen.add(index)
        if _changes(code[index]):
            ends.add(index)
        else:
            pending += after[index]
    # from its start on, in the order of the text: behind the last instruction nothing goes on
    order = sorted(seen, key=lambda index: (index < start, index))
    return [Instruction("EXIT", labels=code[index].labels) if index in ends else code[index] for index in order]


def _name(code: Iterable[Instruction]) -> str:
    kinds = {instruction.operation.split(".")[0] for instruction in code}
    return "consumer" if "HGMMA" in kinds else "producer" if "UTMALDG" in kinds else ""


def registers(code: Iterable[Instruction]) -> int:
    """The number of registers that the code uses: one more than the highest of them."""
    return 1 + max((highest for instruction in code for highest in _highest(instruction)), default=-1)


_REGISTER = re.compile(r"(?<![A-Z])R(\d+)(\.64)?")


def _highest(instruction: Instruction) -> Iterator[int]:
    """The last register of each operand: R4 of LDS.128 is R4 to R7, and of an address [R4.64] R4 and R5."""
    width, rest = _width(instruction.operation), re.sub(r"\[[^]]*\]", "", instruction.operands)
    for first, _ in _REGISTER.findall(rest):
        yield int(first) + width - 1
    for address in re.findall(r"\[([^]]*)\]", instruction.operands):
        for first, pair in _REGISTER.findall(address):
            yield int(first) + bool(pair)


def _width(operation: str) -> int:
    """The registers of the operands of an operation that say so."""
    if product := re.match(r"HGMMA\.64x(\d+)x\d+\.F32", operation):
        return int(product[1]) // 2  # of 64 rows, in the 128 threads of a warp group
    if matrices := re.match(r"(?:STSM|LDSM)\.16\.\w+\.([24])", operation):
        return int(matrices[1])
    bits = re.search(r"\.(64|128)(?:\.|$)", operation)
    return int(bits[1]) // 32 if bits else 2 if ".WIDE" in operation else 1
