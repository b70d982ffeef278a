"""Which event happens before which, whatever the order in which a simulation ran them: shared memory and its barriers.

An event is a bit. Whoever acts knows a set of events, all that happen before what it does next: a role knows what it
has done, what the arrivals at a barrier knew when it has waited for them, and the end of a copy or of a product when it
has waited for that. Two accesses of the same bytes, one of them a write, of which the later does not know the earlier
are a race, even where this run had them in the right order (vector clocks, written as sets).

Shared memory is reached in two ways, by instructions and by the copy engine and the tensor cores (PTX calls them the
generic and the async proxy). What was written by instructions the other way sees only after a fence of the writer's
(https://docs.nvidia.com/cuda/parallel-thread-execution/#async-proxy); a copy that a barrier waits for needs none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tests.support.gluon_schedule import Body, Program, Role

Box = tuple[tuple[int, int], ...]  # of each dimension, the first place and the one behind the last
MOST_BYTES = 2**20 - 1  # that an mbarrier can expect


class Race(AssertionError):
    """Two accesses that nothing puts in order."""


@dataclass
class Access:
    """A read or a write of a part of a memory."""

    what: str
    event: int
    box: Box
    write: bool
    by_instruction: bool
    fence: int = 0  # the event after which the copy engine and the tensor cores see it


class Order:
    """Gives out events."""

    def __init__(self) -> None:
        self.last = 1

    def event(self) -> int:
        self.last <<= 1
        return self.last

    def fence(self, role: Role) -> None:
        """All that the role has written is seen from now on by the copy engine and the tensor cores."""
        event = self.event()
        for access in role.unfenced:
            access.fence = event
        role.unfenced.clear()
        role.known |= event


class Memory:
    """The accesses of one allocation of shared memory, as far as a later one can race with them."""

    def __init__(self, order: Order, what: str) -> None:
        self.order, self.what = order, what
        self.accesses: list[Access] = []
        self.writes: Counter[Box] = Counter()

    def access(self, role: Role, how: str, box: Box, *, write: bool, by_instruction: bool) -> int:
        """The event of an access that the role makes, or starts; Race unless all it can collide with comes before."""
        what = f"{role.name} {how} {self.what}{list(box)}"
        for other in self.accesses:
            if (write or other.write) and _overlap(box, other.box):
                if not role.known & other.event:
                    raise Race(f"{what} beside: {other.what}")
                if other.write and other.by_instruction and not by_instruction and not role.known & other.fence:
                    raise Race(f"{what} without a fence after: {other.what}")
        event = self.order.event()
        new = Access(what, event, box, write, by_instruction)
        if write:  # who knows the new one knows what it covers
            self.accesses = [other for other in self.accesses if not _covers(box, other.box)]
            self.writes[box] += 1
        self.accesses.append(new)
        if by_instruction:
            role.known |= event
            if write:
                role.unfenced.append(new)
        return event


def _overlap(one: Box, other: Box) -> bool:
    return all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(one, other, strict=True))


def _covers(one: Box, other: Box) -> bool:
    return all(a <= c and d <= b for (a, b), (c, d) in zip(one, other, strict=True))


class Barrier:
    """An mbarrier: a phase ends when so many have arrived and all the bytes that were expected have come."""

    def __init__(self, memory: Memory, place: int) -> None:
        self.memory, self.box = memory, ((place, place + 1),)
        self.name = f"{memory.what}[{place}]"
        self.born: Access | None = None
        self.ended: list[int] = []  # what is known when so many phases have ended
        self.arrived = 0  # what is known by those who have arrived in this phase

    def init(self, role: Role, count: int) -> None:
        assert self.born is None, f"{self.name} is initialised twice"
        assert count > 0, f"{self.name} counts {count} arrivals"
        self.memory.access(role, "initialises", self.box, write=True, by_instruction=True)
        self.born = self.memory.accesses[-1]
        self.count = self.missing = count
        self.bytes = 0
        self.ended = [self.born.event]

    def use(self, role: Role, by_instruction: bool = True) -> None:
        """Race unless the role knows that the barrier is initialised, and the copy engine sees it."""
        if self.born is None or not role.known & self.born.event:
            raise Race(f"{role.name} uses {self.name}, which may not be initialised")
        if not by_instruction and not role.known & self.born.fence:
            raise Race(f"{role.name} has a copy signal {self.name}; no fence since it was initialised")

    def _sign(self, role: Role) -> None:
        """Race unless the role knows that the phase before the one it signals has ended: else it may signal that."""
        if self.ended[-1] & ~role.known:
            raise Race(f"{role.name} signals {self.name}, whose last phase may not have ended")

    def arrive(self, role: Role, count: int, expected: int = 0) -> None:
        self.use(role)
        self._sign(role)
        assert count > 0 and expected >= 0, (count, expected)
        role.known |= self.memory.order.event()
        self.arrived |= role.known
        self.bytes += expected
        assert self.bytes <= MOST_BYTES, f"{self.name} expects {self.bytes} bytes"
        self.missing -= count
        assert self.missing >= 0, f"{self.name}: an arrival too many"
        self._end_phase()

    def start_copy(self, role: Role) -> None:
        """A copy is started that will signal the barrier."""
        self.use(role, by_instruction=False)
        self._sign(role)

    def come(self, event: int, count: int) -> None:
        """The bytes of a copy have come."""
        self.arrived |= event
        self.bytes -= count
        self._end_phase()

    def _end_phase(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.ended.append(self.ended[-1] | self.arrived)
            self.arrived, self.missing = 0, self.count

    def wait(self, program: Program, phase: int) -> Body:
        """Wait until the phase of this parity has ended; the role then knows what is known at its end, and no more."""
        role = program.role
        self.use(role)
        assert phase in (0, 1), f"{self.name}: phase {phase}"
        yield lambda: (len(self.ended) - 1) % 2 != phase
        seen = role.seen.get(self, 0)
        seen += seen % 2 == phase
        role.seen[self] = seen
        assert len(self.ended) - 1 <= seen + 1, f"{self.name} is two phases past the one that {role.name} waits for"
        role.known |= self.ended[seen]

    def check_over(self) -> None:
        """AssertionError unless the program leaves it at the begin of a phase."""
        assert self.born is not None, f"{self.name} is never initialised"
        assert (self.missing, self.bytes) == (self.count, 0), f"{self.name} is left waiting for arrivals or bytes"


class Barriers:
    """Shared memory with barriers in it."""

    def __init__(self, memory: Memory, shape: Sequence[int]) -> None:
        assert len(shape) == 2 and shape[1] == 1, shape
        self.type = None
        self.barriers = [Barrier(memory, place) for place in range(shape[0])]

    def index(self, index: int) -> Barrier:
        assert 0 <= index < len(self.barriers), f"barrier {index} of {len(self.barriers)}"
        return self.barriers[index]
