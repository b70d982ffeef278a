"""Roles of which one acts at a time, and work that is done at a random later moment: a seed decides every order."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from typing import Any

Action = Callable[[], None]
# A role's code: it yields before each of its operations, and what it yields says when that may be done; None: any time.
Body = Generator[Callable[[], bool] | None, None, Any]
MOST = 200_000  # operations of one program; the largest that is run takes a tenth


class Deadlock(Exception):
    """Every role waits, and nothing is under way that could wake one."""


class Role:
    """A partition of the kernel's warps."""

    def __init__(self, name: str, warps: int, registers: int, known: int) -> None:
        self.name, self.warps, self.registers = name, warps, registers
        self.ready: Callable[[], bool] | None = None  # what it waits for
        # what is kept by gluon_order.py and gluon_simulator.py
        self.known = known  # the events that happen before whatever it does next, a bit for each
        self.unfenced: list = []  # its writes since its last fence
        self.seen: dict[object, int] = {}  # of each barrier, the phases that it has seen end
        self.stores: list = []  # copies to memory that it has not waited for, oldest first
        self.products: list = []  # of the tensor cores, the same


class Program:
    """One program of the launch: its roles, and what is under way. The seed decides every order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        # how soon asynchronous work is done; at 0 only when all roles wait for some
        self.haste = self.random.choice((0.0, 0.02, 0.2, 0.6))
        self.main = self.role = Role("the program", 0, 0, 0)  # role: who acts now
        self.roles: list[Role] = []
        self.under_way: list[Action] = []
        self.operations = 0

    def run(self, roles: Sequence[Role], bodies: Sequence[Body]) -> None:
        """Run the roles to their ends, and what is still under way; raises what one of them raises, or Deadlock."""
        self.roles = list(roles)
        alive = dict(zip(roles, bodies, strict=True))
        while alive:
            able = [role for role in alive if role.ready is None or role.ready()]
            if self.under_way and (not able or self.random.random() < self.haste):
                self.do(self.random.choice(self.under_way))
            elif able:
                self.role = self.random.choice(able)
                self._count()
                try:
                    self.role.ready = next(alive[self.role])
                except StopIteration:
                    del alive[self.role]
            else:
                raise Deadlock(f"all wait: {', '.join(role.name for role in alive)}")
        self.role = self.main
        while self.under_way:
            self.do(self.under_way[0])

    def finish(self, body: Body) -> Any:
        """Run what is alone to its end; what it returns."""
        while True:
            self._count()
            try:
                ready = next(body)
            except StopIteration as end:
                return end.value
            assert ready is None or ready(), "a wait before there are roles"

    def _count(self) -> None:
        self.operations += 1
        assert self.operations < MOST, "the program does not end"

    def later(self, action: Action) -> None:
        """Have this done at some later moment."""
        self.under_way.append(action)

    def do(self, action: Action) -> None:
        """Do what is under way now, if it still is."""
        if any(other is action for other in self.under_way):
            self.under_way = [other for other in self.under_way if other is not action]
            action()
