"""The GEMM for Hopper under the simulator: its source, its builds, and what is wrong with one run of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dora_kernels.kernels.hopper import launch
from dora_kernels.planning.tiles import GEMMS, GemmConfig
from tests.support.gluon_simulator import Simulator
from tests.support.gluon_values import Descriptor

SOURCE = Path(launch.__file__).with_name("gemm.py").read_text()
SCALING = 0.7
SMALL = GEMMS["interpreter"]["forward"]
Shape = tuple[int, int, int, int, int]  # M, N, K, R, programs


@dataclass(frozen=True)
class Build:
    """A build of the kernel: its configuration, and which of its operands there are."""

    config: GemmConfig = SMALL
    nn: bool = False
    both: bool = True
    low: bool = True
    gain: bool = True
    bias: bool = True
    dtype: torch.dtype = torch.bfloat16

    def with_config(self, **fields: int) -> Build:
        """The same with another configuration."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **fields))


def rows_apart(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random numbers in rows of a multiple of 16 bytes, between which is NaN."""
    made = torch.full((*shape[:-1], -(-shape[-1] // 8) * 8), float("nan"), dtype=dtype)[..., : shape[-1]]
    return made.copy_(torch.randn(shape, generator=generator))


def simulate(source: str, build: Build, shape: Shape, seed: int) -> Simulator:
    """Runs the kernel in one order of events. AssertionError where a result or anything on the way is wrong.

    Each element may be wrong by its rounding, once, and by what 1000 sums in float32 round.
    """
    M, N, K, R, programs = shape
    config, dtype, generator = build.config, build.dtype, torch.Generator().manual_seed(seed)

    def random(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return rows_apart(*size, dtype=dtype, generator=generator)

    def right(columns: int, rows: int) -> Tensor:
        return random(rows, columns) if build.nn else random(columns, rows)

    tensors: dict[str, Tensor | None] = {"x": random(M, K), "weight": right(N, K)}
    tensors |= {"low": random(M, R), "lora": right(N, R)} if build.low else {"low": None, "lora": None}
    tensors |= {"y": random(M, N), "z": random(M, N) if build.both else None}
    tensors["gain"] = random(N, dtype=torch.float32) if build.gain else None
    tensors["bias"] = random(N) if build.bias else None
    for name in ("y", "z"):
        if tensors[name] is not None:
            tensors[name].fill_(float("nan"))
    descriptors = [
        None if tensor is None else Descriptor(tensor, block)
        for tensor, block in zip(tensors.values(), launch.blocks(config, build.nn).values(), strict=True)
    ]
    constants = launch.constants(config, build.nn)
    simulator = Simulator(constants.pop("num_warps"), constants.pop("maxnreg"))
    kernel = simulator.load(source).gemm_kernel
    sizes = (M, N, K, R, SCALING, config.GROUP_M)
    simulator.launch(kernel, programs, seed, *descriptors, *sizes, *constants.values())

    expected, stored_at = corners(config, M, N, programs), descriptors[list(tensors).index("y")].stored_at
    walked = [corner for corner in stored_at if corner in expected]
    assert walked == expected, f"tiles are walked in another order: {walked}, expected {expected}"

    exact = {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
    left_to_right = (lambda matrix: matrix) if build.nn else (lambda matrix: matrix.T)
    z = exact["x"] @ left_to_right(exact["weight"])
    if build.low:
        z += SCALING * exact["low"] @ left_to_right(exact["lora"])
    y = z if exact["gain"] is None else exact["gain"] * z
    y = y if exact["bias"] is None else y + exact["bias"]
    for name, found, expected in (("y", exact["y"], y), ("z", exact["z"], z)):
        if found is not None:
            allowed = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-4
            right_ones = (found - expected).abs() <= allowed
            assert right_ones.all(), f"{name} is wrong in {int((~right_ones).sum())} places"
    return simulator


def corners(config: GemmConfig, M: int, N: int, programs: int) -> list[tuple[int, int]]:
    """Of each tile its first row and column, in the order in which the programs, one after another, walk them."""
    rows, columns = range(0, M, config.BLOCK_M), range(0, N, config.BLOCK_N)
    groups = [rows[first : first + config.GROUP_M] for first in range(0, len(rows), config.GROUP_M)]
    tiles = [(row, column) for group in groups for column in columns for row in group]
    return [tile for place in range(programs) for tile in tiles[place::programs]]


def fault(source: str, runs: Iterable[tuple[Build, Shape, int]], refused: Iterable[Build] = ()) -> str | None:
    """What is wrong with the source in the first run that shows it, or None. refused: builds that it must refuse."""
    for build, shape, seed in runs:
        try:
            simulator = simulate(source, build, shape, seed)
        except Exception as error:  # whatever a broken source raises is noticed
            return f"{type(error).__name__}: {error} ({build}, {shape}, {seed})"
        if lazy := idle(simulator, build, shape):
            return lazy
    for build in refused:
        try:
            simulate(source, build, (16, 32, 40, 8, 1), 0)
        except AssertionError as error:
            if "static_assert" in str(error):
                continue
        return f"not refused: {build}"
    return None


def idle(simulator: Simulator, build: Build, shape: Shape) -> str | None:
    """What was less busy than it should be: a product in flight beside each but the first of a sum, loads of all stages
    ahead of the consumers, stores from all slots once each has had its first, buffers that are filled in turn.
    """
    seen, config = simulator.seen, build.config
    tiles = -(-shape[0] // config.BLOCK_M) * -(-shape[1] // config.BLOCK_N)
    consumers = min(tiles, shape[-1]) * config.consumers  # of all programs that have tiles
    sums = tiles * config.consumers * (1 + build.low)
    stores = tiles * config.consumers * config.parts * (1 + build.both)
    stores_under_way = stores * config.slots - consumers * config.slots * (config.slots - 1) // 2
    busy = (seen["products alone"], seen["stores"]) == (sums, stores_under_way)
    if not busy or seen["loads"] < 2 * config.stages or seen["turns"] > 1:
        return f"idle: {dict(seen)} for {sums} sums, {stores_under_way} stores and {config.stages} stages"
    return None
