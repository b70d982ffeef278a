"""How the programs of a kernel share its work."""

import pytest
import torch

from dora_kernels.planning import configs
from tests.support.problem import DEVICE

pytest.importorskip("dora_kernels.kernels")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from dora_kernels.kernels import shares  # noqa: E402


@triton.jit
def _shares_kernel(owner_ptr, part_ptr, parts_ptr, blocks, size, BLOCK: tl.constexpr):
    """For each unit of work the program that has it, its part, and the parts of its block."""
    steps = shares.steps_over(size, BLOCK)
    units = blocks.to(tl.int64) * steps
    first, end = shares.unit_range(units)
    for block in range(first // steps, tl.cdiv(end, steps)):
        start, stop = shares.steps_of(block, steps, first, end)
        part, parts = shares.part_of(block, steps, units)
        for step in range(start, stop):
            unit = block * steps + step
            tl.store(owner_ptr + unit, tl.program_id(0))
            tl.store(part_ptr + unit, part)
            tl.store(parts_ptr + unit, parts)


@pytest.mark.parametrize("programs", (1, 2, 3, 7, 20))
@pytest.mark.parametrize(("blocks", "size"), ((2, 80), (3, 10), (4, 160), (7, 33), (2, 0)))
def test_the_work_is_shared_in_contiguous_ranges(blocks, size, programs):
    """Of as many units each, but for one, and in the order of the blocks; parts are numbered as programs are."""
    steps = max(1, -(-size // 16))
    units = blocks * steps
    programs = min(programs, units)
    owner, part, parts = torch.full((3, units), -1, dtype=torch.int32, device=DEVICE)
    _shares_kernel[programs,](owner, part, parts, blocks, size, BLOCK=16)
    counts = owner.bincount(minlength=programs)
    assert torch.equal(owner, owner.sort().values) and counts.max() - counts.min() <= 1 and len(counts) == programs
    for block in range(blocks):
        mine = slice(block * steps, (block + 1) * steps)
        assert torch.equal(part[mine], owner[mine] - owner[mine][0])
        assert (parts[mine] == owner[mine].unique().numel()).all()
    assert parts.max() <= configs.most_parts(blocks, steps, programs)
