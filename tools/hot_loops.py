"""The loads in the kernels' loops: the table of compile_kernels.py --loops, and the requirements on sm_90.

What keeps the memory busy is loads under way. A synchronous one (LDG) is waited for by the warp that needs it; an
asynchronous one (LDGSTS, or TMA) is issued several steps ahead, into shared memory, and takes no registers meanwhile.
So on sm_90 a loop, or the whole of a kernel without one, loads asynchronously and in 16 bytes a thread, the most that
one instruction can; EXEMPTIONS says where not, and why. What a program loads once for each of its blocks, of which it
has one or two mostly, is not judged.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compile_kernels import Compiled, Job
    from specializations import Specialization


@dataclass(frozen=True)
class DocumentedCall:
    """Calls whose kernels docs/machine_code.md shows."""

    call: str
    kernels: tuple[str, ...]
    variant: str = "bf16"
    shape: tuple[int, int, int] = (8192, 4096, 4096)  # M, N, K
    rank: int = 64


_WIDE = (8192, 14336, 4096)
DOCUMENTED = (
    DocumentedCall("train", ("norm", "merge", "epilogue", "token_sums", "project")),
    DocumentedCall("fused", ("gemm", "token_sums", "project")),
    DocumentedCall("fused inference", ("gemm",)),
    DocumentedCall("split", ("prepare",)),
    DocumentedCall("train", ("norm",), rank=16),
    DocumentedCall("train", ("token_sums",), shape=_WIDE),
    DocumentedCall("train", ("norm", "epilogue", "token_sums", "project"), shape=_WIDE, rank=384),
    DocumentedCall("merged", ("merge",), shape=_WIDE, rank=384),  # of squares, and of the backward pass
    DocumentedCall("train", ("token_sums", "project"), rank=8),
    DocumentedCall("grouped", ("grouped_norm",)),
    DocumentedCall("codebook4 nested", ("norm", "merge")),
    DocumentedCall("bank", ("bank_epilogue",)),
    DocumentedCall(
        "train", ("norm", "merge", "epilogue", "token_sums", "project", "parts"), variant="bf16, fp32 adapters"
    ),
)


def short(name: str) -> str:
    """_norm_kernel -> norm"""
    return name.removeprefix("_").removesuffix("_kernel")


def _copies_or_multiplies(counts: Mapping[str, int]) -> bool:
    return any(kind.partition(".")[0] in ("UTMALDG", "UTMASTG", "HGMMA") for kind in counts)


HEADER = (
    "kernel", "of", "target", "variant", "M, N, K, R", "tiles", "registers", "shared", "programs", "grid", "waves",
    "memory", "L2", "loop", "instructions", "int+pred", "device memory", "shared memory", "BAR", "SHFL",
    "tensor cores",
)  # fmt: skip


def rows(job: "Job", compiled: "Compiled", every: bool = False) -> list[tuple[str, ...]]:
    """A row of the table for each loop: its own instructions, without those of loops inside it.

    programs: how many a multiprocessor holds, and what limits them. waves: how often the grid fills all of these
    places. memory: MB of all tensors that are read or written. L2: MB that all programs load (traffic.py).
    Without `every` what is in no loop has a row, whose loop is a dash, only where there is no loop; of a kernel that
    walks blocks only the loop over the steps of a block has one; and of a kernel with roles those that copy or
    multiply, with the registers of the role, out of those that it may use.
    """
    specialization, sizes = job.specialization, ", ".join(map(str, (*job.shape, job.rank)))
    grid, places = specialization.grid, compiled.programs * specialization.target.multiprocessors
    first = (
        short(specialization.name),
        specialization.flags(),
        specialization.target.name,
        job.variant,
        sizes,
        specialization.tiles().replace("BLOCK_", ""),
        str(compiled.registers),
        str(compiled.shared),
        f"{compiled.programs} ({compiled.limited_by})",
        "x".join(map(str, grid)),
        f"{math.prod(grid) / places:.2f}" if places else "",
        f"{sum(specialization.bytes_of.values()) / 1e6:.1f}",
        f"{compiled.through_l2 / 1e6:.1f}" if compiled.through_l2 else "",
    )
    roles = {name: f"{used} of {limit}" for name, used, limit in compiled.roles if name}
    walked = [name for name, counts in compiled.loops.items() if _is_walk(name, counts)]
    shown = walked if walked and specialization.walks_blocks() else [name for name in compiled.loops if name]
    if roles:
        shown = [name for name in shown if name not in roles and _copies_or_multiplies(compiled.loops[name])]
    table = []
    for name, counts in compiled.loops.items():
        if not (every or name in shown or len(compiled.loops) == 1):
            continue

        def of(*kinds: str, counts: dict[str, int] = counts) -> str:
            return ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts) if kind.split(".")[0] in kinds)

        numbers = sum(counts.values()), counts.get("integer", 0) + counts.get("predicate", 0)
        memory = of("LDG", "LDGSTS", "UTMALDG", "UBLKCP", "STG", "UTMASTG"), of("LDS", "LDSM", "STS", "STSM", "SYNCS")
        tensor_cores = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()) if "MMA" in kind)
        waits = counts.get("BAR", 0), counts.get("SHFL", 0)
        cells = (name or "-", *map(str, numbers), *memory, *map(str, waits), tensor_cores)
        table.append((first if not table else ("",) * len(first)) + cells)
        if roles:
            table[-1] = _with_registers(table[-1], roles[name.partition(":")[0]])
    return table


def _with_registers(row: tuple[str, ...], registers: str) -> tuple[str, ...]:
    column = HEADER.index("registers")
    return (*row[:column], registers, *row[column + 1 :])


def _is_walk(loop: str, counts: Mapping[str, int]) -> bool:
    """True if a loop inside the one over blocks loads asynchronously: those over parts that are summed do not."""
    return "." in loop and any(kind.startswith("LDGSTS") for kind in counts)


def print_loops(results: Sequence[tuple["Job", "Compiled"]], every: bool = False) -> None:
    """Print the table of what was compiled for CUDA, as Markdown; `every`: with the code outside of loops."""
    print("| " + " | ".join(HEADER) + " |")
    print("|" + " --- |" * len(HEADER))
    for job, compiled in results:
        for row in rows(job, compiled, every) if compiled.loops else ():
            print("| " + " | ".join(row) + " |")


@dataclass(frozen=True)
class Exemption:
    """Loads that need not be as asked, and why: a shell pattern of kernels, patterns of arguments between spaces.

    narrow: asynchronous they have to be, though of fewer bytes.
    """

    kernel: str
    arguments: str
    why: str
    when: Callable[["Specialization"], bool] = lambda specialization: True
    narrow: bool = False

    def covers(self, specialization: "Specialization", argument: str, asynchronous: bool) -> bool:
        """True if such loads of `argument` are exempt."""
        if self.narrow and not asynchronous:
            return False
        plain = argument.replace("[", ".").replace("]", "")  # weight.pointers.0: brackets mean something in a pattern
        return (
            fnmatch(short(specialization.name), self.kernel)
            and any(fnmatch(plain, pattern) for pattern in self.arguments.split())
            and self.when(specialization)
        )


def _format(*names: str) -> Callable[["Specialization"], bool]:
    return lambda specialization: specialization.constants()["FORMAT"].name in names


def _small_tile(*sizes: str) -> Callable[["Specialization"], bool]:
    """In half precision a tile of these sizes has less than 16 bytes for each thread."""

    def when(one: "Specialization") -> bool:
        blocks = [one.constants().get(size) for size in sizes]
        return None not in blocks and 2 * math.prod(blocks) < 16 * 32 * one.options.num_warps

    return when


EXEMPTIONS = (
    Exemption(
        "*",
        "gain_ptr",
        "a float32 for each column: 16 KB at N = 4096, which every program of a column takes from the L2 cache",
    ),
    Exemption("project", "partial_ptr", "the parts of a block, once at its end and just written: in the L2 cache"),
    Exemption("parts", "sources.*", "a pass over 1 MB, in programs of 32 registers: 16 of them on a multiprocessor"),
    Exemption(
        "token_sums",
        "partial.* lora_B dy_again low_again",
        "what the last program of a column reads, once at its end: parts that are just written, as those of project, "
        "and rows of lora_B; dy and low for a gain that is infinite",
    ),
    Exemption("prepare", "lora_B", "all that this kernel reads is 0.5 MB at N = 4096, R = 64; it has 128 programs"),
    Exemption("bank_epilogue", "scaling_ptr", "one number"),
    Exemption("merge", "update.lora_B unfinished.*", "once for a block of rows, as in the norm"),
    Exemption("epilogue", "unfinished.*", "the parts of the norm, once for a block of columns, just written: in L2"),
    Exemption(
        "epilogue",
        "base residual",
        "Triton pipelines innermost loops: where lora_B does not stay, this one has the chunks of R in it",
        lambda one: one.constants()["CHUNKS"] == 0 and one.has("low"),
    ),
    Exemption("bank_epilogue", "low lora_B_ptr", "the loop is over the adapters of a tile of rows, mostly one"),
    Exemption(
        "*",
        "weight.pointers.[1-3]",
        "scales of 64 weights, or of a row: asynchronous, 4 bytes each, which is the least that can be",
        lambda one: one.constants()["FORMAT"].group > 1 or _format("int8", "float8")(one),
        narrow=True,
    ),
    Exemption(
        "*",
        "weight.pointers.* update.lora_A",
        "K is odd: a row may begin within a byte, and each code, and each number of lora_A, has an address of its own",
        lambda one: _format("codebook4")(one) and one.constants()["FORMAT"].group == 1,
    ),
    Exemption(
        "*",
        "weight.pointers.0",
        "K = 4304, an odd multiple of 16: every other row of codes starts at an odd multiple of 8 bytes",
        lambda one: _format("codebook4")(one) and not one.aligned("weight.numbers[0]"),
        narrow=True,
    ),
    Exemption(
        "*",
        "weight.pointers.*",
        "a scale and a zero for every weight: asynchronous, they would take 120 KB of shared memory, and leave room "
        "for one program a multiprocessor instead of two",
        lambda one: _format("hqq4")(one) and one.constants()["FORMAT"].group == 1,
    ),
    Exemption(
        "token_sums",
        "dy",
        "K is odd, as above: dy is x where the sum is dA",
        lambda one: not one.aligned("dy.stride_0"),
    ),
    Exemption(
        "*",
        "weight.pointers.0",
        "W is contiguous along N: loaded so and then turned, it would pass through shared memory twice",
        lambda one: one.constants()["FORMAT"].name == "dense" and one.type_of("weight.numbers[1]") != "constexpr",
    ),
    Exemption(
        "*",
        "weight.pointers.* *layers_ptr->*",
        "Triton pipelines innermost loops: where lora_B does not stay, this one has the chunks of R in it",
        lambda one: one.constants().get("CHUNKS") == 0 and one.name != "_epilogue_kernel",
    ),
    Exemption(
        "*",
        "update.lora_A layers_ptr->",
        "ranks up to 16: tiles of 16 rows have less than 16 bytes for each thread",
        _small_tile("BLOCK_R", "BLOCK_K"),
        narrow=True,
    ),
    Exemption(
        "*",
        "low",
        "as above: 16 numbers of a token; or, float32, 32 numbers of 32 tokens",
        _small_tile("BLOCK_M", "BLOCK_R"),
        narrow=True,
    ),
)


# the arguments whose rows are R numbers
ROWS_OF_R = ("low", "lora_B", "lora_B_ptr", "update.lora_B", "factor")


def faults(job: "Job", compiled: "Compiled") -> Iterator[tuple[str, bool, str]]:
    """(argument, asynchronous, what is wrong with a load of it) in loops or, in a kernel that has none, anywhere."""
    if compiled.roles:  # nothing passes through registers on its way from device memory
        yield from (
            ("", False, f"{kind} in {name}; expected the copy engine alone")
            for name, counts in compiled.loops.items()
            for kind in counts
            if kind.startswith("LDG")
        )
        return
    looped = [load for load in compiled.loads if load.loop]
    judged = looped or compiled.loads
    blocks = job.specialization.walks_blocks()
    if blocks and not any("." in load.loop for load in judged):  # then nothing below would be judged
        yield "", False, "no loop over the steps of a block loads anything"
    for load in dict.fromkeys(judged):
        if blocks and "." not in load.loop:
            continue
        # a row of 8 numbers is 16 bytes, of which a thread may take half; rows of other tensors are long
        enough = 8 if job.rank % 16 and load.argument in ROWS_OF_R else 16
        if not load.asynchronous:
            yield load.argument, False, f"{load.argument} is loaded synchronously"
        elif load.bytes < enough:
            yield load.argument, True, f"{load.argument} is loaded in {load.bytes} bytes a thread, expected {enough}"
    # the PTX is read for what the machine code does: there must be no load that it does not have
    written = {f"{'LDGSTS' if load.asynchronous else 'LDG'}.{8 * load.bytes}" for load in judged}
    for name, counts in compiled.loops.items():
        for kind in counts:
            if kind.startswith("LDG") and (name or not looped) and kind not in written:
                yield "", False, f"{kind} is not in the PTX"


def complaints(results: Sequence[tuple["Job", "Compiled"]], everything: bool) -> list[str]:
    """Loads on sm_90 that break the requirements; if `everything` was compiled, also exemptions that nothing needs."""
    said: dict[str, None] = {}  # a dict keeps the order and drops what is said twice
    needed = set()
    for job, compiled in results:
        specialization = job.specialization
        if specialization.target.name != "sm_90" or compiled.error:
            continue
        for argument, asynchronous, wrong in faults(job, compiled):
            covering = (one for one in EXEMPTIONS if argument and one.covers(specialization, argument, asynchronous))
            excuse = next(covering, None)
            needed.add(excuse)
            if not excuse:
                said[f"{specialization.name} ({job.variant}, R={job.rank}, {job.call}) on sm_90: {wrong}"] = None
    unneeded = [one for one in EXEMPTIONS if everything and one not in needed]
    return [
        *said,
        *(f"hot_loops.EXEMPTIONS: nothing needs {one.kernel} {one.arguments} ({one.why})" for one in unneeded),
    ]
