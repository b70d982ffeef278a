"""The launch of a call's kernels: tiles, the number of programs that share the work, whether lora_B stays.

Tiles are those of tuned/<gpu>.json where tools/tune.py measured, else the defaults of tiles.py.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from dora_kernels.files.reading import read_bytes
from dora_kernels.planning.devices import DeviceFacts, log_once
from dora_kernels.planning.tiles import BYTES_IN_PARTS, CONFIGS, Config

# Above this rank the products over R outweigh reading the weight: larger tiles.
HIGH_RANK = 64


def unlimited(config: Config) -> Config:
    """`config` for a call that takes more registers than maxnreg allows: one program a multiprocessor."""
    return config if config.maxnreg is None else alone(config)


def alone(config: Config, num_stages: int | None = None) -> Config:
    """`config` for one program a multiprocessor, with any number of registers."""
    return dataclasses.replace(config, num_stages=num_stages or config.num_stages, waves=1, maxnreg=None)


def of_rows(config: Config, BLOCK_N: int, BLOCK_K: int | None = None) -> Config:
    """`config` with blocks of so many rows and, if given, steps of so many columns."""
    return dataclasses.replace(config, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K or config.BLOCK_K)


def ceil_div(number: int, by: int) -> int:
    """number / by, rounded up. triton.cdiv takes 1.4 us for it on the host, and a step divides 25 times."""
    return -(-number // by)


# The cost of one more part of a sum, in steps: filling the pipeline before the first step, and writing what is added up
# later (a prediction: of token_sums at R = 64, 32 KB are as many bytes as 1.6 steps load).
PART_STEPS = 2
# Whole blocks, or as many equal parts of each, are taken where they keep this much of the device at work: fewer partial
# sums, and no program that begins a second block.
FULL = 0.9
# The same of a sum that is made in whole blocks because there are no counters to finish parts with.
FILLED = 0.75


@functools.lru_cache(maxsize=4096)
def programs(blocks: int, steps: int, at_once: int, sums: bool) -> int:
    """The number of programs that share `blocks` of `steps` steps each, where at_once run at a time.

    sums: what the steps of a block give is summed up, so that cutting it costs partial sums: no part has fewer than
    PART_STEPS steps. Depends on shapes and device only: the order of summation is the same in every call. Which units
    each of the programs has, kernels/shares.py says.
    """
    blocks, steps = max(blocks, 1), max(steps, 1)
    units = blocks * steps
    if not sums:
        return min(at_once, units)
    equal_parts = max(1, min(at_once // blocks, steps // PART_STEPS))
    if blocks * equal_parts >= FULL * at_once * ceil_div(blocks, at_once):
        return blocks * equal_parts
    return min(at_once, max(blocks, units // PART_STEPS))


@functools.lru_cache(maxsize=4096)
def most_parts(blocks: int, steps: int, programs: int) -> int:
    """The number of parts of the block that is cut into most (kernels/shares.py, part_of)."""
    blocks, steps = max(blocks, 1), max(steps, 1)
    if programs % blocks == 0:
        return programs // blocks
    if programs < blocks:
        return 1 if blocks % programs == 0 else 2
    units = blocks * steps

    def program_of(unit: int) -> int:
        return ((unit + 1) * programs - 1) // units

    return max(program_of(first + steps - 1) - program_of(first) + 1 for first in range(0, units, steps))


# Bytes of shared memory for one program; a multiprocessor has 1 KiB more, as much as it keeps of each program's
# (tools/targets.py).
SHARED = {
    "sm_80": 166912,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
    "interpreter": 1 << 30,
}
# (target, bytes of an operand) -> the most chunks of lora_B that stay without spilling registers, where that is not any
# number. mma.sync takes its operands from registers, and float32 is cut there into what tensor cores multiply. In the
# interpreter, tests see ranks of 33 that stay and, in float64, that are walked.
MOST_CHUNKS = {
    ("sm_80", 4): 1,
    ("sm_80", 6): 0,
    ("sm_90", 4): 2,
    ("sm_100", 2): 2,
    ("sm_100", 4): 2,
    ("sm_100", 6): 1,
    ("sm_120", 4): 1,
    ("sm_120", 6): 0,
    ("gfx942", 4): 2,
    ("interpreter", 2): 3,
    ("interpreter", 4): 3,
    ("interpreter", 6): 3,
    ("interpreter", 8): 2,
}


def bytes_of_quantized(out_bytes: int) -> tuple[int, int]:
    """(streamed_bytes, out_bytes) of a walk over a quantized weight, as `with_lora_B_resident` takes them.

    A weight has 8 bits at the most, and as much again is taken for scales and tables.
    """
    return 1, out_bytes + 1


def with_lora_B_resident(
    config: Config, R: int, operand_bytes: int, streamed_bytes: int, out_bytes: int, target: str
) -> tuple[Config, int]:
    """(config, chunks) of a walk along K, as norm and merge are, or M, as the epilogue: lora_B stays in so many chunks.

    streamed_bytes: of what a step loads for each element of its tile; out_bytes: of what it stores.
    0 chunks where shared memory has no room for them, and for two steps: R is then walked in every step. The config has
    as many programs a multiprocessor, of the waves given, as there is room for, and with these as many stages; where
    that is one program, its threads may have any number of registers.
    """
    BLOCK_R = config.tiles(R)["BLOCK_R"]
    walked = config.BLOCK_K or config.BLOCK_M
    assert config.BLOCK_N is not None and walked is not None
    tile, chunks = config.BLOCK_N * walked, ceil_div(R, BLOCK_R)
    other, lora_B = operand_bytes * BLOCK_R * walked, operand_bytes * BLOCK_R * config.BLOCK_N
    if chunks <= MOST_CHUNKS.get((target, operand_bytes), chunks):
        choices = [(chunks, waves) for waves in range(config.waves, 0, -1)]
    else:
        choices = []
    for chunks, waves in (*choices, (0, 1)):
        stays, loaded = (chunks * lora_B, chunks * other) if chunks else (0, other + lora_B)
        for stages in range(config.num_stages, 1, -1):
            # what is streamed has a buffer less: a step has it in registers when the next load begins
            shared = stays + stages * loaded + tile * ((stages - 1) * streamed_bytes + out_bytes)
            if waves * (shared + 1024) <= SHARED[target] + 1024:
                maxnreg = config.maxnreg if waves == config.waves else None
                return dataclasses.replace(config, num_stages=stages, waves=waves, maxnreg=maxnreg), chunks
    return dataclasses.replace(config, num_stages=2, waves=1, maxnreg=None), 0


_Part = TypeVar("_Part")
MOST_BYTES = 4 << 20
"""Of a tuned table, in which a shape's entry has some 300."""
MOST_ROWS = 256
"""Of a tile: the most that a default or a candidate of tools/tune.py has."""
TUNED_FOLDER = pathlib.Path(__file__).with_name("tuned")


def tuned_path(name: str) -> pathlib.Path:
    """The file with what was measured on the GPU of that name, tuned/nvidia-h200.json.

    "configs" is tools/tune.py's, "ways" the GPU suite's (measured.py); where one is missing or broken the other counts.
    """
    return TUNED_FOLDER / (re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def tuned_part(name: str, part: str, read: Callable[[object], _Part]) -> _Part | None:
    """`read` of what the file of the GPU of that name has under `part`; None where it has nothing, or `read` refuses.

    read: raises ValueError, which names the key and says what was expected. A warning has it, and the file.
    """
    path = tuned_path(name)
    if not os.path.lexists(path):
        return None
    ignored = f"{path}"
    try:
        table = object_at(json.loads(read_bytes("tuned", path, MOST_BYTES)), "the file")
        ignored = f"{part!r} of {path}"
        return read(table[part]) if part in table else None
    except Exception as error:  # no table makes a call raise; nested deep, one is too deep even for a message of it
        log_once(f"dora_kernels ignores {ignored}: {error}")
        return None


def object_at(found: object, key: str) -> dict[str, Any]:
    """`found`, the value of `key` in a table. Raises ValueError unless it is an object of JSON."""
    if not isinstance(found, dict):
        raise ValueError(f"{key} is {found!r:.80}; expected an object")
    return found


@functools.cache
def tuned_configs(name: str, target: str) -> dict[tuple[int, str], Config]:
    """(bytes of an operand, kernel) -> the configuration measured to be faster than CONFIGS on the GPU of that name.

    Empty if there are none, and, with a warning, if any of them is not a configuration of its kernel.
    """

    def read(found: object) -> dict[tuple[int, str], Config]:
        tuned = {}
        for size, kernels in object_at(found, "configs").items():
            for kernel, fields in object_at(kernels, f"configs.{size:.80}").items():
                key = f"configs.{size:.80}.{kernel:.80}"
                default = CONFIGS.get((target, int(size) if size.isdecimal() else 0), {}).get(kernel)
                if default is None:
                    raise ValueError(f"{key} is unknown; expected the bytes of an operand and a kernel")
                tuned[int(size), kernel] = _checked(object_at(fields, key), default, target, key)
        return tuned

    return tuned_part(name, "configs", read) or {}


def _checked(fields: dict[str, Any], default: Config, target: str, key: str = "tuned") -> Config:
    """Config(**fields), the value of `key`. Raises ValueError if a launch with it could be wrong."""
    unknown = fields.keys() - {field.name for field in dataclasses.fields(Config)}
    if unknown:
        raise ValueError(f"{key}.{min(unknown):.80} is unknown; expected a field of Config")
    config = Config(**fields)
    for name, least, most in (("num_warps", 1, 16), ("num_stages", 1, 8), ("waves", 1, 16)):
        value = getattr(config, name)
        power = name != "num_warps" or (type(value) is int and value & (value - 1) == 0)
        if type(value) is not int or not least <= value <= most or not power:
            raise ValueError(f"{key}.{name} is {value!r:.80}; expected {least} to {most}, num_warps a power of two")
    if config.maxnreg is not None and (type(config.maxnreg) is not int or not 24 <= config.maxnreg <= 255):
        raise ValueError(f"{key}.maxnreg is {config.maxnreg!r:.80}; expected 24 to 255")
    if config.maxnreg is not None and target.startswith("gfx"):  # a launch with it raises
        raise ValueError(f"{key}.maxnreg is {config.maxnreg!r}; expected none on {target}")
    for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R"):
        value, tile = getattr(config, name), getattr(default, name) is not None
        if (value is not None) != tile:
            raise ValueError(f"{key}.{name} is {value!r:.80}; expected {'a size' if tile else 'none'}")
        if tile and (type(value) is not int or not 16 <= value <= MOST_ROWS or value & (value - 1)):
            raise ValueError(f"{key}.{name} is {value!r:.80}; expected a power of two from 16 to {MOST_ROWS}")
    return config


def config_for(kernel: str, facts: DeviceFacts, operand: torch.dtype, parts: int = 1) -> Config:
    """The configuration of `kernel` for low-rank operands of dtype `operand`: measured on this GPU, or the default.

    parts: of such an operand in bfloat16 (kernels/parts.py); two have the tiles of three, which fit.
    """
    size = operand.itemsize if parts == 1 else BYTES_IN_PARTS
    return tuned_configs(facts.name, facts.target).get((size, kernel)) or CONFIGS[facts.target, size][kernel]
