"""Threads of which one runs at a time, and work that is done at a random later moment: a seed decides every order."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

Action = Callable[[], None]
SECONDS = 120  # for one program; more means that a thread is lost
MOST = 200_000  # operations of one program; the largest that is run takes a tenth


class Deadlock(Exception):
    """Every role waits, and nothing is under way that could wake one."""


class Abandoned(BaseException):
    """Ends a thread whose program has failed in another one."""


class Role:
    """A partition of the kernel's warps: a thread that runs only when the program lets it."""

    def __init__(self, name: str, warps: int, registers: int, known: int) -> None:
        self.name, self.warps, self.registers = name, warps, registers
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] | None = None  # what it waits for
        self.alive = True
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
        self.main = Role("the program", 0, 0, 0)
        self.roles: list[Role] = []
        self.under_way: list[Action] = []
        self.error: BaseException | None = None
        self.over = threading.Event()
        self.current = threading.local()
        self.operations = 0

    def run(self, roles: Sequence[Role], functions: Sequence[Action]) -> None:
        """Run the roles to their ends, and what is still under way; raises what one of them raised, or Deadlock."""
        self.roles = list(roles)
        bodies = zip(roles, functions, strict=True)
        threads = [threading.Thread(target=self._body, args=body, daemon=True) for body in bodies]
        for thread in threads:
            thread.start()
        self._go_on(None)
        if not self.over.wait(SECONDS):
            raise Deadlock(f"not over after {SECONDS} s")
        while self.under_way and self.error is None:
            self.do(self.under_way[0])
        for role in self.roles:
            role.turn.release()
        for thread in threads:
            thread.join(SECONDS)
        if self.error is not None:
            raise self.error

    def _body(self, role: Role, function: Action) -> None:
        self.current.role = role
        role.turn.acquire()
        try:
            if self.error is None:
                function()
        except Abandoned:
            return
        except BaseException as error:  # raised again by run()
            self.error = self.error or error
        role.alive = False
        self._go_on(None)

    @property
    def role(self) -> Role:
        """Whose thread this is."""
        return getattr(self.current, "role", self.main)

    def step(self, ready: Callable[[], bool] | None = None) -> None:
        """Let another role run; go on at some later moment, when `ready()`."""
        self.operations += 1
        assert self.operations < MOST, "the program does not end"
        role = self.role
        if role is self.main:
            assert ready is None or ready(), "a wait before there are roles"
            return
        role.ready = ready
        if not self._go_on(role):
            role.turn.acquire()
        if self.error is not None:
            raise Abandoned

    def later(self, action: Action) -> None:
        """Have this done at some later moment."""
        self.under_way.append(action)

    def do(self, action: Action) -> None:
        """Do what is under way now, if it still is."""
        if any(other is action for other in self.under_way):
            self.under_way = [other for other in self.under_way if other is not action]
            try:
                action()
            except BaseException as error:
                self.error = self.error or error

    def _go_on(self, asking: Role | None) -> bool:
        """Choose what happens now: some asynchronous work, or a role's next operation; True if that of who asks."""
        while True:
            alive = [role for role in self.roles if role.alive]
            if self.error is not None or not alive:
                self.over.set()
                return False
            able = [role for role in alive if role.ready is None or role.ready()]
            if self.under_way and (not able or self.random.random() < self.haste):
                self.do(self.random.choice(self.under_way))
            elif able:
                chosen = self.random.choice(able)
                if chosen is not asking:
                    chosen.turn.release()
                return chosen is asking
            else:
                self.error = Deadlock(f"all wait: {', '.join(role.name for role in alive)}")
