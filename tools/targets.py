"""The GPUs that configurations ship for, and what they have room for."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Target:
    """A GPU: whose configs it takes (tiles.py), its shared memory for one program in bytes, and what a multiprocessor
    holds.
    """

    name: str
    family: str
    shared_limit: int
    multiprocessors: int
    warps: int
    programs: int

    @property
    def gpu(self) -> GPUTarget:
        """The target as Triton names it."""
        if self.name.startswith("gfx"):
            return GPUTarget("hip", self.name, 64)
        return GPUTarget("cuda", int(self.name.removeprefix("sm_")), 32)

    def resident(self, registers: int, shared: int, warps: int) -> tuple[int, str]:
        """(programs with these resources that a multiprocessor holds, what it runs out of).

        registers: of a thread; shared: bytes of a program. The tensor memory of sm_100 is not counted.
        """
        amd = self.name.startswith("gfx")
        # registers are given to a warp in units, and each of the four schedulers has a quarter of them
        threads, all_registers, unit = (64, 4 * 512 * 64, 512) if amd else (32, 65536, 256)
        of_scheduler = all_registers // 4 // max(unit, -(-registers * threads // unit) * unit)
        room = {
            "registers": 4 * of_scheduler // warps,
            "shared memory": self._sharing(shared),
            "threads": self.warps // warps,
            "programs": self.programs,
        }
        limit = min(room, key=room.get)
        return room[limit], limit

    def _sharing(self, shared: int) -> int:
        """The programs with so much shared memory that a multiprocessor has the memory for."""
        kept = 0 if self.name.startswith("gfx") else 1024  # of each program's, by CUDA's driver
        return (self.shared_limit + kept) // max(shared + kept, 1)

    def has_room_for_two(self, shared: int) -> bool:
        """True if two programs with so much shared memory may be on one multiprocessor."""
        return self._sharing(shared) > 1


# shared memory, warps and blocks: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", the
# memory less the 1 KiB that the driver keeps of each program's; CDNA3 and CDNA4 ISA guides: LDS, and on each of four
# schedulers 512 vector registers of 64 lanes and 8 wavefronts
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "sm_80", 166912, 108, 64, 32),
        Target("sm_86", "sm_120", 101376, 84, 48, 16),
        Target("sm_89", "sm_120", 101376, 128, 48, 24),
        Target("sm_90", "sm_90", 232448, 132, 64, 32),
        Target("sm_100", "sm_100", 232448, 148, 64, 32),
        Target("sm_120", "sm_120", 101376, 170, 48, 24),
        Target("gfx942", "gfx942", 65536, 304, 32, 16),
        Target("gfx950", "gfx942", 163840, 256, 32, 16),
    )
}
