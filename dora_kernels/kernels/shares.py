"""A program's share of a kernel's work, and how the sums of a block that several programs share are finished.

The work of a kernel is `blocks` of its output, of so many `steps` each along the dimension that it walks. Its programs
take these units in contiguous ranges, block by block: a block is cut where one program's range ends and the next one's
begins, all multiprocessors have as much to do whatever the sizes are, and what a block needs in every step, lora_B say,
is loaded once. The sums of a block that is cut are made in `parts`, one of each program, and added in their order.
"""

import torch
import triton
import triton.language as tl

from dora_kernels.planning.configs import ceil_div


@triton.jit
def steps_over(size, BLOCK: tl.constexpr):
    """The steps of BLOCK over `size` elements; one over none, so that a sum over nothing is written as 0."""
    return tl.maximum(tl.cdiv(size, BLOCK), 1)


@triton.jit
def unit_range(units):
    """(first, end) of this program's units of work, one more or less than any other program's."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    return program * units // programs, (program + 1) * units // programs


@triton.jit
def steps_of(block, steps, first, end):
    """(start, stop): the steps of a block that are among the units from first to end."""
    return tl.maximum(first - block * steps, 0), tl.minimum(end - block * steps, steps)


@triton.jit
def part_of(block, steps, units):
    """(part, parts): this program's place among those that share the steps of a block, and how many they are."""
    programs = tl.num_programs(0).to(tl.int64)
    first = ((block * steps + 1) * programs - 1) // units  # the program whose range has the block's first unit
    last = ((block + 1) * steps * programs - 1) // units
    return tl.program_id(0) - first, last - first + 1


@triton.jit
def is_last(counter_ptr, parts):
    """True in the last program of a block to come here, after it has stored its part: it sees the parts of all.

    The counter is 0 before. It is the one atomic of the package: which program is the last one differs from call to
    call, what it adds up, and in which order, does not.
    """
    # Triton has one thread release what all have stored, and puts no barrier between the two
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == parts - 1


@triton.jit
def add_parts(acc, partial_ptr, parts, size, offs, mask):
    """acc + partial[0, offs] + partial[1, offs] + ..., in this order, for partial sums (parts, size)."""
    for part in range(0, parts):
        # no int64 needed: there are several parts only where the output is small (Launch.programs)
        acc += tl.load(partial_ptr + part * size + offs, mask=mask, other=0.0)
    return acc


# A counter for each block of so many rows or columns, the smallest that a tile may have
COUNTED = 16


def counters(dy: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """(3, ...), for the counters of the sums over the tokens of dy, of P and of dA; as `reference.counters`."""
    # rows of whole 16 bytes: the JIT compiles a kernel again for a pointer that is no multiple of them
    return dy.new_empty(3, 4 * ceil_div(max(dy.shape[0], N, K, 1), 4 * COUNTED), dtype=torch.int32)


def zeroed(counters: torch.Tensor | None, blocks: int, device: torch.device) -> torch.Tensor:
    """`counters`, which are 0, where given and as many as the blocks; else new ones, in a launch of their own."""
    if counters is not None and counters.shape[0] >= blocks:
        return counters
    return torch.zeros(blocks, dtype=torch.int32, device=device)
