"""Threads of which one runs at a time, and work that is done at a random later moment: a seed decides every order."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

Action = Callable[[], None]
SECONDS = 120  # for one program; more means that a thread is lost


class Deadlock(Exception):
    """Every role waits, and nothing is under way that could wake one."""


class Role:
    """A partition of the kernel's warps: a thread that runs only when the program lets it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] | None = None  # what it waits for
        self.alive = True
        self.stores: list[Store] = []  # not yet known to have ended, oldest first
        self.products: list[Action] = []


class Store:
    """A copy from a buffer to memory. Those of one role end in order."""

    def __init__(self, program: Program, role: Role, copy: Action) -> None:
        self.program, self.role, self.copy = program, role, copy

    def __call__(self) -> None:
        """End the older ones, and this one."""
        while self in self.role.stores:
            store = self.role.stores.pop(0)
            self.program.under_way = [other for other in self.program.under_way if other is not store]
            store.copy()


class Program:
    """One program of the launch: its roles, and what is under way. The seed decides every order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        # how soon asynchronous work is done; at 0 only when all roles wait for some
        self.haste = self.random.choice((0.0, 0.02, 0.2, 0.6))
        self.roles: list[Role] = []
        self.under_way: list[Action] = []
        self.error: BaseException | None = None
        self.over = threading.Event()
        self.current = threading.local()
        self.operations = 0

    def run(self, functions: Sequence[Action]) -> None:
        """Run the roles to their ends; raises what one of them raised, or Deadlock."""
        self.roles = [Role(getattr(function, "__name__", "role")) for function in functions]
        for role, function in zip(self.roles, functions, strict=True):
            threading.Thread(target=self._body, args=(role, function), daemon=True).start()
        self._next()
        if not self.over.wait(SECONDS):
            raise Deadlock(f"not over after {SECONDS} s")
        while self.under_way and self.error is None:
            self.do(self.under_way[0])
        if self.error is not None:
            raise self.error

    def _body(self, role: Role, function: Action) -> None:
        self.current.role = role
        role.turn.acquire()
        try:
            function()
        except BaseException as error:  # raised again by run()
            self.error = self.error or error
        role.alive = False
        self._next()

    @property
    def role(self) -> Role:
        """Whose thread this is."""
        return self.current.role

    def step(self, ready: Callable[[], bool] | None = None) -> None:
        """Let another role run; go on at some later moment, when `ready()`."""
        self.operations += 1
        role = self.role
        role.ready = ready
        self._next()
        role.turn.acquire()

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

    def _next(self) -> None:
        """Choose what happens now: some asynchronous work, or a role's next operation."""
        while True:
            alive = [role for role in self.roles if role.alive]
            if self.error is not None or not alive:
                self.over.set()
                return
            able = [role for role in alive if role.ready is None or role.ready()]
            if self.under_way and (not able or self.random.random() < self.haste):
                self.do(self.random.choice(self.under_way))
            elif able:
                self.random.choice(able).turn.release()
                return
            else:
                self.error = Deadlock(f"all wait: {', '.join(role.name for role in alive)}")
