"""Readers of compiled code: its loops, their instructions by kind, and its loads from device memory.

Two texts are read: SASS, the machine code, as nvdisasm prints it, for what a loop executes; and PTX, which ptxas makes
it from, for which argument of the kernel a load reads. ptxas changes neither the width of a load nor whether it is
asynchronous; it does unroll and peel loops, so that counts come from the machine code.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One instruction: its operation with modifiers, its operands, its predicate ("" for always) and its labels."""

    operation: str
    operands: str = ""
    predicate: str = ""
    labels: tuple[str, ...] = ()


_LABEL = re.compile(r"\s*(\.L_x_\d+|\$L__\w+):")
# of Blackwell's, nvdisasm tells the waits, too: BAR.SYNC.DEFER_BLOCKING 0x0 &req={4} ?trans6;
_SASS = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)(?:\s*[&?][^\s;]+)*\s*;")
_PTX = re.compile(r"\s*(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*?);")


def instructions(text: str) -> list[Instruction]:
    """The instructions of one kernel in SASS (nvdisasm -c) or PTX, in the order of the text."""
    pattern = _PTX if ".visible .entry" in text else _SASS
    code, labels = [], []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels.append(label[1])
        elif found := pattern.match(line):
            predicate, operation, operands = found.groups(default="")
            code.append(Instruction(operation, operands, predicate, tuple(labels)))
            labels = []
    return code


# Control flow, SASS and PTX; a subroutine that CALL enters comes back to the next instruction and is no part of a loop.
_JUMPS = {"BRA", "bra"}
_ENDS = {"EXIT", "RET", "ret", "exit"}


def _blocks(code: Sequence[Instruction]) -> tuple[list[range], list[list[int]]]:
    """(the straight pieces of the code, the pieces that each may go on to)."""
    leaders = {0}
    for index, instruction in enumerate(code):
        if instruction.labels:
            leaders.add(index)
        if instruction.operation.split(".")[0] in _JUMPS | _ENDS | {"BSYNC"}:
            leaders.add(index + 1)
    edges = [*sorted(leaders - {len(code)}), len(code)]
    blocks = [range(*pair) for pair in zip(edges, edges[1:], strict=False)]
    labelled = {label: number for number, block in enumerate(blocks) for label in code[block[0]].labels}
    return blocks, [_successors(code, block[-1], number + 1, labelled) for number, block in enumerate(blocks)]


def _successors(code: Sequence[Instruction], last: int, following: int, labelled: dict[str, int]) -> list[int]:
    """The instructions at which a piece that ends with the instruction `last` may go on."""
    operation = code[last].operation.split(".")[0]
    label = re.search(r"(\.L_x_\d+|\$L__\w+)", code[last].operands)
    if operation == "BSYNC":  # to where the last BSSY with this barrier said that the threads meet again
        barrier = code[last].operands
        before = (one.operands for one in reversed(code[:last]) if one.operation.startswith("BSSY"))
        label = next((re.search(r"\.L_x_\d+", one) for one in before if one.startswith(f"{barrier},")), None)
    jumps = operation in _JUMPS or operation == "BSYNC"
    found = [labelled[label[0]]] if jumps and label and label[0] in labelled else []
    # a uniform predicate, or one that BRA takes as an operand, leaves no mark before the operation
    sometimes = code[last].predicate or (operation == "BRA" and not code[last].operands.startswith("`"))
    if (sometimes or not (found or operation in _ENDS)) and last + 1 < len(code):
        found.append(following)
    return found


def successors(code: Sequence[Instruction]) -> list[list[int]]:
    """For each instruction, those that may be executed next."""
    blocks, following = _blocks(code)
    found = [[index + 1] for index in range(len(code))]
    for block, targets in zip(blocks, following, strict=True):
        found[block[-1]] = [blocks[target][0] for target in targets]
    return found


@dataclass(frozen=True)
class Loop:
    """A loop, "2.1" for the first one inside the second, or "" for what is in none; without the loops inside it."""

    name: str
    code: tuple[Instruction, ...]

    def counts(self) -> Counter:
        """Kind -> number of instructions; see `kind`."""
        return Counter(kind(instruction) for instruction in self.code)


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """The code outside of loops, then its loops in the order of the text.

    A loop is what lies on a way from the target of a backward branch to the branch. Blocks that stand apart from the
    loop they belong to are part of it, and jumps back out of such blocks are no loops.
    """
    blocks, successors = _blocks(code)
    bodies: dict[int, set[int]] = {}
    seen, reached = set(), [0]
    for source, target, leaving in _depth_first(successors):
        if leaving:
            bodies.setdefault(target, {target}).update(_between(target, source, successors))
        elif target not in seen:
            seen.add(target)
            reached.append(target)
    names, order = {}, sorted(bodies, key=lambda header: (blocks[header][0], -len(bodies[header])))
    children: Counter = Counter()
    for header in order:
        outer = [other for other in names if header in bodies[other]]
        parent = names[outer[-1]] if outer else ""
        children[parent] += 1
        names[header] = f"{parent}.{children[parent]}".lstrip(".")
    owner = {}
    for header in order:  # an inner loop comes after the outer one, and takes its blocks over
        owner.update(dict.fromkeys(bodies[header], names[header]))
    pieces: dict[str, list[Instruction]] = {name: [] for name in ("", *names.values())}
    for number in sorted(set(reached)):
        pieces[owner.get(number, "")] += [code[index] for index in blocks[number]]
    return [Loop(name, tuple(piece)) for name, piece in pieces.items()]


def _depth_first(successors: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, bool]]:
    """(from, to, back to an ancestor) for each edge that can be reached from block 0."""
    path, done, pending = [0], set(), [iter(successors[0])]
    while path:
        target = next(pending[-1], None)
        if target is None:
            done.add(path.pop())
            pending.pop()
            continue
        yield path[-1], target, target in path
        if target not in path and target not in done:
            path.append(target)
            pending.append(iter(successors[target]))


def _between(header: int, last: int, successors: Sequence[Sequence[int]]) -> set[int]:
    """The blocks from which `last` can be reached without passing `header`."""
    found, pending = set(), [last]
    while pending:
        block = pending.pop()
        if block != header and block not in found:
            found.add(block)
            pending += [source for source, targets in enumerate(successors) if block in targets]
    return found


# CUDA Binary Utilities, "Instruction Set Reference": the integer and the predicate instructions, their uniform forms
# (U...) and conversions between register files. IMAD.MOV and MOV are left out: they compute nothing.
_INTEGER = """
    BMSK BREV FLO IABS IADD IADD3 IADD32I IDP IDP4A IMAD IMNMX IMUL ISCADD LEA LOP LOP3 LOP32I POPC PRMT SEL SGXT SHF
    SHL SHR VABSDIFF VIADD VIADDMNMX VIMNMX VIMNMX3 VHMNMX R2UR S2R S2UR
""".split()
_PREDICATE = "ISETP FSETP PLOP3 P2R R2P PSETP VOTE PSET".split()
_MATRIX = {"HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "OMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA"}
_MEMORY = {"LDG", "LDGSTS", "STG", "LDS", "STS", "LDL", "STL"}
_NAMED = {"LDSM", "STSM", "UTMALDG", "UTMASTG", "UBLKCP", "SYNCS", "BAR", "SHFL"}  # SYNCS: of an mbarrier
_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


def kind(instruction: Instruction) -> str:
    """The kind of a SASS instruction: "LDG.128", "HGMMA.64x128x16", "BAR", "integer", "predicate", or "other"."""
    base, *modifiers = instruction.operation.split(".")
    if instruction.predicate == "!PT":
        return "other"  # never executed: ptxas puts `@!PT LDS RZ, [RZ]` before asynchronous copies
    if base in _MEMORY:
        return f"{base}.{next((_BITS[modifier] for modifier in modifiers if modifier in _BITS), 32)}"
    if base in _MATRIX:
        shape = next((modifier for modifier in modifiers if re.fullmatch(r"\d+(x\d+)*", modifier)), "")
        return f"{base}.{shape}".rstrip(".")
    if base in _NAMED:
        return base
    plain = base.removeprefix("U")
    if plain in _INTEGER or base in _INTEGER:
        return "other" if modifiers[:1] == ["MOV"] else "integer"
    return "predicate" if plain in _PREDICATE else "other"


@dataclass(frozen=True)
class Load:
    """A load from device memory in PTX: its loop, the kernel's argument that it reads, bytes a thread, and its way."""

    loop: str
    argument: str
    bytes: int
    asynchronous: bool


_LOAD = re.compile(r"ld\.global\b.*|cp\.async\.(ca|cg)\.shared\.global\b.*")


def loads(ptx: str, arguments: Sequence[str]) -> list[Load]:
    """The loads of a kernel's PTX. arguments: the names of its parameters, "" for those that are not pointers.

    A load whose address was loaded itself reads "argument->". A load whose width is not in the text (a TMA load) counts
    as one of 16 bytes.
    """
    code = instructions(ptx)
    origins = _Origins(code, arguments)
    found = []
    for loop in loops(code):
        for instruction in loop.code:
            operation = instruction.operation
            if operation.startswith("cp.async.bulk.tensor") and "shared" in operation.split(".global")[0]:
                found.append(Load(loop.name, origins.of(instruction.operands), 16, True))
            elif _LOAD.fullmatch(operation):
                # ld.global.v4.b32 {...}, [address]   cp.async.cg.shared.global [shared], [address], 0x10, bytes
                address = re.findall(r"\[([^\]]*)\]", instruction.operands)[-1]
                if asynchronous := operation.startswith("cp.async"):
                    size = int(re.search(r"0x[0-9a-f]+", instruction.operands)[0], 16)
                else:
                    count = re.search(r"\.v(\d)\b", operation)
                    size = int(re.search(r"\.[a-z](\d+)$", operation)[1]) // 8 * int(count[1] if count else 1)
                found.append(Load(loop.name, origins.of(address), size, asynchronous))
    return found


class _Origins:
    """The kernel's pointers from which a register was computed, however often it was assigned."""

    def __init__(self, code: Sequence[Instruction], arguments: Sequence[str]) -> None:
        self.arguments = arguments
        self.assignments: dict[str, list[Instruction]] = {}
        for instruction in code:
            result = re.match(r"\{[^}]*\}|[^,]*", instruction.operands)[0]
            if not result.startswith("["):
                for register in re.findall(r"%\w+", result):
                    self.assignments.setdefault(register, []).append(instruction)

    def of(self, operand: str) -> str:
        """The argument's name; "name->" where the address was read from it."""
        pending, seen, names, read = re.findall(r"%\w+", operand), set(), set(), []
        while pending:
            register = pending.pop()
            if register in seen:
                continue
            seen.add(register)
            for instruction in self.assignments.get(register, ()):
                if parameter := re.search(r"_param_(\d+)", instruction.operands):
                    number = int(parameter[1])
                    names |= {self.arguments[number]} if number < len(self.arguments) else set()
                elif instruction.operation.startswith("ld.global"):
                    read.append(instruction.operands.rpartition("[")[2])
                elif not instruction.operation.startswith("ld."):
                    pending += re.findall(r"%\w+", instruction.operands)
        names.discard("")
        if not names:
            names = {f"{name}->" for name in map(self.of, read) if name}
        return " + ".join(sorted(names))
