"""Launches through Triton's JIT and around it, of kernels that are never compiled: no GPU, compiler or interpreter.

A program of its own, since the other tests interpret: `python -m tests.support.jit_launches hip` prints what each of
CHECKS has found, "" where all was right. Where Triton would compile, a kernel is made that notes what calls it.
"""

import contextlib
import json
import random
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from dora_kernels import kernels
from dora_kernels.kernels import launches
from dora_kernels.kernels.launches import LaunchPlan
from dora_kernels.kernels.tile import Matrix
from dora_kernels.planning import devices
from dora_kernels.planning.tiles import Config

TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}
FAMILIES = {"cuda": "sm_90", "hip": "gfx942"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int8)
NUMBERS = (1, 0, 2, 16, 48, -1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40 + 1)


class Inner(NamedTuple):
    """Tensors with strides and without, and numbers, in a tuple."""

    ptr: torch.Tensor | None
    matrix: Matrix
    number: int
    scale: float
    more: tuple


@triton.jit(do_not_specialize=["count"])
def _kernel(
    matrix, vector, tensor_ptr, count, number, scale, inner, left, right, SIZE: tl.constexpr, NAME: tl.constexpr
):
    pass


def simple(tensor: torch.Tensor, number: Any = 2, scale: float = 0.5, inner: Inner | None = None) -> tuple:
    """Arguments of _kernel."""
    return tensor, None, tensor, number, number, scale, inner, None, None


def plan_of(size: int = 64, name: str = "a") -> LaunchPlan:
    return LaunchPlan(_kernel, Config(), SIZE=size, NAME=name, num_warps=8)


class Driver:
    """A driver with several devices, of which a check says which one is current."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.device, self.stream = target, 0, 7

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 1000 * device + self.stream

    def get_current_target(self) -> GPUTarget:
        return self.target


class Launched(NamedTuple):
    """A call of a compiled kernel."""

    kernel: int
    grid: tuple[int, int, int]
    stream: int
    metadata: str
    arguments: tuple


class World:
    """What was launched, and how: `by_jit` has for each launch whether Triton's JIT has made it."""

    def __init__(self, target: str) -> None:
        self.target, self.driver = target, Driver(TARGETS[target])
        self.launched: list[Launched] = []
        self.by_jit: list[bool] = []
        self.kernels = 0

    def compile(self, source: Any, target: GPUTarget, options: dict) -> CompiledKernel:
        """In place of triton.compile."""
        self.kernels += 1
        kernel, number = CompiledKernel.__new__(CompiledKernel), self.kernels
        kernel.function, kernel.packed_metadata, kernel.module = number, f"metadata of {number}", number
        kernel.launch_metadata = lambda grid, stream, *arguments: "by Triton's JIT"

        def run(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
            self.launched.append(Launched(function, (x, y, z), stream, metadata, pointers(arguments)))
            self.by_jit.append(launch_metadata is not None)

        kernel._run = run
        return kernel

    @contextlib.contextmanager
    def entered(self) -> Iterator["World"]:
        """Inside, Triton's driver and compiler are those of this world."""
        active = triton.runtime.driver._active
        triton.runtime.driver.set_active(self.driver)
        facts = devices.DeviceFacts("a GPU that is not there", FAMILIES[self.target], 132)
        with (
            mock.patch("triton.compiler.compile", self.compile),
            mock.patch.object(launches, "_ASKS_FOR_STORAGES", self.target == "hip"),
            mock.patch.object(devices, "device_facts", lambda device: facts),
        ):
            for function in [_kernel, *launched_by_the_package()]:
                function.device_caches.clear()
            launches.forget()
            yield self
        triton.runtime.driver.set_active(active)


def launched_by_the_package() -> list[JITFunction]:
    modules = [module for name, module in sys.modules.items() if name.startswith("dora_kernels.kernels.")]
    return [one for module in modules for one in vars(module).values() if isinstance(one, JITFunction)]


def pointers(arguments: tuple) -> tuple:
    """The arguments, with the addresses of tensors in place of these."""
    return tuple(
        pointers(one) if isinstance(one, tuple | list) else one.data_ptr() if isinstance(one, torch.Tensor) else one
        for one in arguments
    )


class Arguments:
    """Random arguments of _kernel: most of them usual, so that the same kinds come again, in other tensors."""

    def __init__(self, target: str) -> None:
        self.random = random.Random(0)
        self.memories = [torch.empty(4096, dtype=torch.int8) for _ in range(2)]
        if target == "hip":  # asks whether the storage is within 2 GiB
            self.memories += [torch.empty(2**31 - 1, dtype=torch.int8), torch.empty(2**31, dtype=torch.int8)]

    def usual(self, of: tuple, seldom: float = 0.06) -> Any:
        """The first of them, or, seldom, any."""
        return self.random.choice(of) if self.random.random() < seldom else of[0]

    def tensor(self, dims: int) -> torch.Tensor:
        memories = self.usual((self.memories[:2], self.memories))
        memory, dtype = self.random.choice(memories), self.usual(DTYPES)
        start = -memory.data_ptr() % 64 + self.usual((0, 16, 8, 4))  # a storage begins anywhere
        memory = memory[start : start + 2048].view(dtype)
        shape = [self.random.choice((1, 3, 4)) for _ in range(dims)]
        strides = [self.usual((8, 0, 1, 16, 24), 0.05) for _ in shape[1:]] + [self.usual((1, 2))]
        tensor = memory.as_strided(shape, strides)
        return torch.nn.Parameter(tensor, requires_grad=False) if self.random.random() < 0.05 else tensor

    def number(self) -> int:
        return self.usual(NUMBERS, 0.15)

    def inner(self) -> Inner:
        more = self.tensor(1), self.usual((2, None, 16, 1)), *self.usual(((), (16,)))
        return Inner(self.usual((self.tensor(1), None)), self.tensor(2), self.number(), self.usual((0.5, 1.0)), more)

    def drawn(self) -> tuple:
        one = self.tensor(1)
        return (
            self.usual((self.tensor(2), None, self.tensor(3))),
            self.usual((None, self.tensor(1)), 0.2),
            self.usual((self.tensor(1), None, self.tensor(2))),
            self.number(),
            self.number(),
            self.usual((0.5, 1.0, 1, 16, 3, None)),
            self.usual((None, self.inner()), 0.15),
            *self.usual((((one, 2), (2, 2)), ((one, 2, 2), (2,)), (None, (1, 2)), ((), ())), 0.05),
        )


def check_every_hit_is_what_the_jit_would_launch(world: World) -> None:
    drawn, plans = Arguments(world.target), [plan_of(64, "a"), plan_of(128, "a"), plan_of(64, "b")]
    hits = 0
    with mock.patch.object(launches, "KEPT", 1 << 20):
        for _ in range(6000):
            plan, arguments = drawn.random.choice(plans), drawn.drawn()
            grid = drawn.random.choice(((3,), (2, 5)))
            world.driver.device, world.driver.stream = drawn.random.choice((0, 1)), drawn.random.choice((7, 8))
            plan.launch(grid, *arguments)
            if world.by_jit[-1]:
                plan.launch(grid, *arguments)
                assert not world.by_jit[-1], arguments
            else:
                hits += 1
            _kernel[grid](*launches._as_written(arguments, plan._strided), **plan.constants)
            assert world.by_jit[-1]
            assert world.launched[-2] == world.launched[-1], (arguments, world.launched[-2:])
    assert hits > 1000 and world.kernels > 1000, (hits, world.kernels)


def check_batches_of_any_size_meet_one_kernel(world: World) -> None:
    """Through the launchers, of which each makes its own grid of them."""
    R = 16
    lora_A, lora_B, gain = torch.empty(R, 256), torch.empty(512, R), torch.empty(512)

    def step(M: int) -> None:
        x, base, low = torch.empty(M, 256), torch.empty(M, 512), torch.empty(M, R)
        kernels.epilogue(base, low, lora_B, gain, None, 0.5, torch.float32)
        counters = torch.empty(64, dtype=torch.int32)
        kernels.token_sums(base, low, 0.5, dB=torch.empty_like(lora_B), gain=gain, counters=counters)
        with mock.patch("dora_kernels.planning.plan.project_by_kernel", lambda *sizes, **named: True):
            kernels.project(x, lora_A, counters=counters)

    for M in (1, 16, 17):
        step(M)
    known, grids = world.kernels, set()
    for M in range(1, 1500, 7):
        before = len(world.launched)
        step(M)
        assert not any(world.by_jit[before:]), M
        grids.add(tuple(one.grid for one in world.launched[before:]))
        assert all(M in one.arguments for one in world.launched[before:])
    assert world.kernels == known and len(grids) > 5


def check_tuples_of_several_lengths_are_read_by_turns(world: World) -> None:
    plan, tensor = plan_of(), torch.empty(4, 4)
    with mock.patch.object(launches, "_reader", wraps=launches._reader) as made:
        for turn in range(12):
            plan.launch((1,), *simple(tensor)[:-1], (tensor,) * (turn % 3))
            assert world.by_jit[-1] == (turn < 3)
    assert made.call_count == 3


def check_what_is_kept_is_bounded(world: World) -> None:
    plan, tensor = plan_of(), torch.empty(4, 4)
    for device in range(3 * launches.KEPT):
        world.driver.device = device
        plan.launch((1,), *simple(tensor))
        (((_, kept),),) = plan._kept.values()
        assert len(kept) <= launches.KEPT
    for length in range(3 * launches.KEPT):
        plan.launch((1,), *simple(tensor)[:-1], (1,) * length)
        assert all(len(readers) <= launches.KEPT for readers in plan._kept.values())
    with mock.patch.object(launches, "NUMBERS", 50):
        launches._classes.clear()
        for number in range(500):
            plan.launch((1,), *simple(tensor, number))
            assert len(launches._classes) <= 50
            assert world.launched[-1].arguments[3:5] == (number, number)


def check_who_looks_on_sees_every_launch(world: World) -> None:
    plan, tensor, seen = plan_of(), torch.empty(4, 4), []

    def launch() -> bool:
        plan.launch((1,), *simple(tensor))
        return world.by_jit[-1]

    assert launch() and not launch()
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(seen.append)
        assert launch()
        chain.remove(seen.append)
        assert not launch()
    _kernel.add_pre_run_hook(lambda *arguments, **constants: seen.append(arguments))
    assert launch() and len(seen) == 1
    _kernel.pre_run_hooks.clear()
    own = JITFunction.run

    def run(self, *arguments, **named):
        seen.append(self)
        return own(self, *arguments, **named)

    with mock.patch.object(JITFunction, "run", run):
        assert launch() and len(seen) == 2
    for hook in ("launch_enter_hook", "launch_exit_hook"):
        with mock.patch.object(knobs.runtime, hook, None):
            assert launch()
    assert not launch()


def check_what_the_jit_would_compile_anew(world: World) -> None:
    plan, tensor = plan_of(), torch.empty(4, 4)

    def launch() -> int:
        plan.launch((1,), *simple(tensor))
        return world.launched[-1].kernel

    plain = launch()
    assert launch() == plain and not world.by_jit[-1]
    for owner, name, value in (
        (knobs.runtime, "debug", True),
        (knobs.compilation, "instrumentation_mode", "consan"),
    ):
        with mock.patch.object(owner, name, value):
            other = launch()
            assert other != plain and world.by_jit[-1], name
        assert launch() == plain
    inspected = []
    with mock.patch.object(knobs.runtime, "add_stages_inspection_hook", lambda: inspected.append(1) or ("a", "b")):
        assert launch() is not None and world.by_jit[-1]
    with mock.patch.object(launches, "_version", "3.8"):
        assert launch() == plain and world.by_jit[-1]
    assert launch() == plain and not world.by_jit[-1]
    kept, hook = launches.LaunchPlan(_kernel, Config(), SIZE=1, NAME="hooked"), mock.Mock(return_value=True)
    with mock.patch.object(knobs.runtime, "jit_cache_hook", hook):  # keeps it from being compiled
        before = len(world.launched)
        for _ in range(2):
            kept.launch((1,), *simple(tensor))
    assert len(world.launched) == before and hook.call_count == 2
    assert not any(found for readers in kept._kept.values() for _, found in readers)


def check_another_driver_is_asked_anew(world: World) -> None:
    plan, tensor = plan_of(), torch.empty(4, 4)
    for _ in range(2):
        plan.launch((1,), *simple(tensor))
    assert world.by_jit == [True, False]
    triton.runtime.driver.set_active(Driver(TARGETS[world.target]))
    plan.launch((1,), *simple(tensor))
    assert world.by_jit[-1]


def check_memory_elsewhere_is_asked_of_triton(world: World) -> None:
    """Its launcher refuses a tensor that the GPU cannot read, and cannot where it gets a number."""
    plan, tensor, elsewhere = plan_of(), torch.empty(4, 4), torch.empty(4, 4, device="meta")
    assert tensor.data_ptr() % 16 == elsewhere.data_ptr() % 16
    for _ in range(2):
        plan.launch((1,), *simple(tensor))
    assert world.by_jit == [True, False]
    plan.launch((1,), *simple(elsewhere))
    assert world.by_jit[-1]


class Subclass(torch.Tensor):
    """It could have a data_ptr of its own."""


class Float(float):
    """As numpy's float64 is one."""


def check_unknown_types_take_the_ordinary_way(world: World) -> None:
    tensor = torch.empty(4, 4)
    for strange in (
        simple(tensor.as_subclass(Subclass)),
        simple(tensor, True),
        simple(tensor, scale=Float(0.5)),
        simple(tensor, inner=Inner(None, tensor, 2, 0.5, (True,))),
    ):
        plan = plan_of()
        for _ in range(3):
            plan.launch((1,), *strange)
            assert world.by_jit[-1], strange
        assert not plan._kept
    plan = plan_of()  # for dicts, True and 1.0 are 1
    for number in (1, True, 1.0, 1):
        arguments = simple(tensor, number)
        plan.launch((1,), *arguments)
        _kernel[1,](*launches._as_written(arguments, plan._strided), **plan.constants)
        assert world.launched[-2] == world.launched[-1], number


def check_threads(world: World) -> None:
    """Each launch has its own arguments, and the kernel of these, of which all threads have the same few."""
    plan, tensors = plan_of(), [torch.empty(4, 4, dtype=dtype) for dtype in DTYPES]
    of_dtype = {}
    for tensor in tensors:
        plan.launch((1,), *simple(tensor))
        of_dtype[tensor.data_ptr()] = world.launched[-1].kernel
    world.launched.clear()

    def launch(seed: int) -> None:
        own = random.Random(seed)
        for count in range(300):
            tensor = own.choice(tensors)
            if count % 50 == 49:
                plan._kept.clear()
            plan.launch((seed,), *simple(tensor, own.choice((2, 3, 5))))

    threads = [threading.Thread(target=launch, args=(seed,)) for seed in range(8)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(before)
    wrong = [one for one in world.launched if of_dtype[one.arguments[2]] != one.kernel]
    assert len(world.launched) == 8 * 300 and not wrong, wrong[:3]


class OnAnotherStream:
    """A side (kernels/side.py), as a plan knows it."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def launch(self, plan: LaunchPlan, grid: tuple[int, ...], arguments: tuple) -> None:
        with mock.patch.object(self.driver, "stream", 11):
            plan.launch(grid, *arguments)


def check_a_side_launches_on_its_own_stream(world: World) -> None:
    plan, tensor = plan_of(), torch.empty(4, 4)
    for side, stream in ((OnAnotherStream(world.driver), 11), (None, 7)) * 2:
        plan.launch((3,), *simple(tensor), side=side)
        assert world.launched[-1].stream == stream and world.launched[-1].grid[0] == 3
    assert world.by_jit == [True, False, False, False]


def check_forget(world: World) -> None:
    asked = []
    choose = launches.planned(lambda size: asked.append(size) or plan_of(size))
    assert choose(64) is choose(64) and asked == [64]
    launches.forget()
    choose(64)
    assert asked == [64, 64]


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def main(target: str) -> dict[str, str]:
    """Name -> what is wrong."""
    found = {}
    for name, check in CHECKS.items():
        try:
            with World(target).entered() as world:
                check(world)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()[-3000:]
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
