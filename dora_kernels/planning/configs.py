"""The tile configuration of each kernel: tuned/<gpu>.json where tools/tune.py measured, else the defaults in CONFIGS.

No default has been measured on a GPU. They were compiled ahead of time: at most 64 bytes spilled, within the shared
memory.
"""

import dataclasses
import functools
import json
import pathlib
import re
from dataclasses import dataclass

import torch

from dora_kernels.planning.devices import DeviceFacts, logger


@dataclass(frozen=True)
class Config:
    """Tile sizes and schedule of one kernel; a tile size that the kernel does not have is None.

    waves: programs that a multiprocessor holds at a time; it sets among how many the work is shared out.
    maxnreg: registers that a thread may have, where the compiler would take more and a program fewer would fit.
    """

    BLOCK_M: int | None = None
    BLOCK_N: int | None = None
    BLOCK_K: int | None = None
    BLOCK_R: int | None = None
    num_warps: int = 4
    num_stages: int = 2
    waves: int = 1
    maxnreg: int | None = None

    def tiles(self, R: int | None = None) -> dict[str, int]:
        """The keyword arguments of a launch; BLOCK_R shrinks to a small R, but not below tl.dot's minimum of 16."""
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R", "num_warps", "num_stages", "maxnreg")
        sizes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if R is not None and self.BLOCK_R is not None:
            sizes["BLOCK_R"] = min(self.BLOCK_R, max(16, 1 << max(R - 1, 0).bit_length()))
        return sizes


@functools.cache
def unlimited(config: Config) -> Config:
    """`config` for a call that takes more registers than maxnreg allows: one program a multiprocessor."""
    return config if config.maxnreg is None else dataclasses.replace(config, waves=1, maxnreg=None)


def ceil_div(number: int, by: int) -> int:
    """number / by, rounded up. triton.cdiv takes 1.4 us for it on the host, and a step divides 25 times."""
    return -(-number // by)


# The cost of one more part of a split sum, in steps: filling the pipeline before the first step, and writing partial
# sums that another kernel reads (a prediction: at 64 x 128 x 64 they are as many bytes as 1.6 steps load).
PART_STEPS = 2
# Whole blocks, or as many equal parts of each, are taken where they keep this much of the device at work: fewer partial
# sums, and no program that begins a second block.
FULL = 0.9
# The same of a sum that is made in whole blocks because there are no counters to finish parts with.
FILLED = 0.75


@functools.lru_cache(maxsize=4096)
def programs(blocks: int, steps: int, at_once: int, sums: bool) -> int:
    """The number of programs that share `blocks` of `steps` steps each, where at_once run at a time (kernels/tile.py).

    sums: what the steps of a block give is summed up, so that cutting it costs partial sums: no part has fewer than
    PART_STEPS steps. Depends on shapes and device only: the order of summation is the same in every call.
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
    """The number of parts of the block that is cut into most (kernels/tile.py, part_of)."""
    blocks, steps = max(blocks, 1), max(steps, 1)
    if programs % blocks == 0:
        return programs // blocks
    if programs < blocks:
        return 2
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


@functools.lru_cache(maxsize=4096)
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


# Of norm and merge, for half precision: lora_A is read once for a block of rows, 128 x 64 takes half as much of it as
# 64 x 128; 121 to 128 registers and two programs a multiprocessor up to R = 128, up to R = 384 one.
_WALK = Config(BLOCK_N=128, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=4, waves=2, maxnreg=128)
_WALK_HIGH_RANK = dataclasses.replace(_WALK, BLOCK_R=128)
# 4-byte operands: those tiles would need twice the shared memory and registers; 64 x 64 spills in the merge.
_WALK_FLOAT = Config(BLOCK_N=64, BLOCK_K=32, BLOCK_R=32, num_warps=8, num_stages=2)


# Of the epilogue: two programs a multiprocessor, of which one loads and stores while the other one computes. By itself
# the compiler takes 148 registers and more, for one program.
_EPILOGUE = Config(BLOCK_M=64, BLOCK_N=128, BLOCK_R=64, num_warps=8, num_stages=3, waves=2, maxnreg=128)
_BANK_EPILOGUE = Config(BLOCK_M=64, BLOCK_N=128, BLOCK_R=64, num_warps=8, num_stages=2)
_EPILOGUE_FLOAT = Config(BLOCK_M=32, BLOCK_N=64, BLOCK_R=16, num_warps=8, num_stages=2, waves=2, maxnreg=128)


def _walks(config: Config, high_rank: Config) -> dict[str, Config]:
    """The entries of the kernels that walk along K."""
    return {"norm": config, "norm_high_rank": high_rank, "merge": config, "merge_high_rank": high_rank}


# Starting points for sm_90, by the registers and shared memory that tools/compile_kernels.py shows.
_HALF = _walks(_WALK, _WALK_HIGH_RANK) | {
    "prepare": Config(BLOCK_N=32, BLOCK_R=64, num_warps=4, num_stages=1),
    "project": Config(BLOCK_M=128, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=4),
    "low": Config(BLOCK_M=64, BLOCK_K=128, BLOCK_R=64, num_warps=4, num_stages=4),  # for whole blocks: twice as many
    "epilogue": _EPILOGUE,
    "epilogue_high_rank": dataclasses.replace(_EPILOGUE, BLOCK_R=128),
    "bank_epilogue": dataclasses.replace(_BANK_EPILOGUE, waves=2, maxnreg=128),
    # two programs a multiprocessor: while one waits, for its tiles or at a barrier, the other one works. 128 registers
    # are too few at BLOCK_M = 64, and enough at 32, but for what writes dz: that runs alone
    "token_sums": Config(BLOCK_M=32, BLOCK_N=128, BLOCK_R=64, num_warps=8, num_stages=5, waves=2, maxnreg=128),
}
# 4-byte operands: the same tiles would need twice the shared memory and registers.
_FLOAT = (
    _HALF
    | _walks(_WALK_FLOAT, _WALK_FLOAT)
    | {
        "project": Config(BLOCK_M=64, BLOCK_K=32, BLOCK_R=64, num_warps=8, num_stages=3),
        "low": Config(BLOCK_M=64, BLOCK_K=32, BLOCK_R=64, num_warps=8, num_stages=3),
        "epilogue": _EPILOGUE_FLOAT,
        "epilogue_high_rank": _EPILOGUE_FLOAT,
        "bank_epilogue": Config(BLOCK_M=32, BLOCK_N=64, BLOCK_R=32, num_warps=8, num_stages=2),
        "token_sums": Config(BLOCK_M=32, BLOCK_N=64, BLOCK_R=64, num_warps=8, num_stages=2),
    }
)
# float32 operands in three bfloat16 parts, or two (kernels/parts.py). Four warps for every 64 rows of a product: with
# more, the warps share out its columns, and Triton has each of them make the small products of all columns.
BYTES_IN_PARTS = 6
_NORM_PARTS = Config(BLOCK_N=128, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=3, waves=2, maxnreg=128)
_MERGE_PARTS = Config(BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, num_warps=4, num_stages=3, waves=2)
_WALK_PARTS = Config(BLOCK_N=128, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=2)
_PARTS = _HALF | {
    "norm": _NORM_PARTS,
    "norm_high_rank": _WALK_PARTS,
    "merge": _MERGE_PARTS,
    "merge_high_rank": _WALK_PARTS,
    "project": Config(BLOCK_M=128, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=3),
    "low": Config(BLOCK_M=64, BLOCK_K=64, BLOCK_R=64, num_warps=4, num_stages=3),
    "epilogue": Config(BLOCK_M=64, BLOCK_N=64, BLOCK_R=64, num_warps=4, num_stages=2, waves=2),
    "epilogue_high_rank": Config(BLOCK_M=128, BLOCK_N=64, BLOCK_R=64, num_warps=8, num_stages=2),
    "token_sums": Config(BLOCK_M=64, BLOCK_N=128, BLOCK_R=64, num_warps=8, num_stages=3),
}
# Where the parts of an operand stand in registers.
_PARTS_SMALL = (
    _PARTS
    | _walks(*2 * [Config(BLOCK_N=64, BLOCK_K=32, BLOCK_R=32, num_warps=4, num_stages=2)])
    | {
        "epilogue": Config(BLOCK_M=64, BLOCK_N=32, BLOCK_R=32, num_warps=4, num_stages=2),
        "epilogue_high_rank": Config(BLOCK_M=64, BLOCK_N=32, BLOCK_R=32, num_warps=4, num_stages=2),
        "token_sums": Config(BLOCK_M=64, BLOCK_N=128, BLOCK_R=64, num_warps=8, num_stages=2),
    }
)
_PARTS_SM100 = _PARTS_SMALL | _walks(
    Config(BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=2),
    Config(BLOCK_N=64, BLOCK_K=32, BLOCK_R=32, num_warps=8, num_stages=2),
)
# Products come out of tensor memory many at a time: 180 registers and more in norm and merge at R = 128, and 195 in the
# epilogue at any rank.
_HALF_SM100 = (
    _HALF
    | _walks(_WALK, dataclasses.replace(_WALK_HIGH_RANK, waves=1, maxnreg=None))
    | {
        "epilogue": dataclasses.replace(_EPILOGUE, waves=1, maxnreg=None),
        "epilogue_high_rank": dataclasses.replace(_EPILOGUE, waves=1, maxnreg=None),
    }
)
# Of 64 rows, 384 ranks of lora_B fit into the shared memory.
_HALF_SM80 = (
    _HALF
    | _walks(_WALK, dataclasses.replace(_WALK_HIGH_RANK, BLOCK_N=64))
    | {"bank_epilogue": _BANK_EPILOGUE}  # 108 bytes spilled in 128 registers, and 160 on sm_120
)
_FLOAT_SM90 = (
    _FLOAT
    | _walks(*2 * [dataclasses.replace(_WALK_FLOAT, waves=2, maxnreg=128)])
    | {"epilogue": dataclasses.replace(_EPILOGUE_FLOAT, BLOCK_R=32)}
)
# Half of sm_90's shared memory: two programs of 128 x 64 do not fit, and the tiles of 128 x 128 spill.
_HALF_SM120 = (
    _HALF
    | _walks(
        Config(BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=4, waves=2),
        Config(BLOCK_N=64, BLOCK_K=128, BLOCK_R=64, num_warps=8, num_stages=2),
    )
    | {
        "bank_epilogue": _BANK_EPILOGUE,
        # without a limit the compiler spills down to 128 registers at R = 8 (124 bytes), for a second program for which
        # there is no room
        "token_sums": Config(BLOCK_M=32, BLOCK_N=128, BLOCK_R=64, num_warps=8, num_stages=4, maxnreg=255),
    }
)
# 64 KB of shared memory, and a wavefront of 64: fewer stages.
_HALF_GFX = (
    _HALF
    | _walks(
        Config(BLOCK_N=128, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=2),
        Config(BLOCK_N=64, BLOCK_K=128, BLOCK_R=64, num_warps=8, num_stages=2),
    )
    | {
        "project": Config(BLOCK_M=128, BLOCK_K=64, BLOCK_R=64, num_warps=4, num_stages=2),
        "low": Config(BLOCK_M=64, BLOCK_K=64, BLOCK_R=64, num_warps=4, num_stages=2),
        "epilogue": dataclasses.replace(_EPILOGUE, num_stages=2, waves=1, maxnreg=None),
        "epilogue_high_rank": dataclasses.replace(_EPILOGUE, num_stages=2, waves=1, maxnreg=None),
        "bank_epilogue": _BANK_EPILOGUE,
        "token_sums": Config(BLOCK_M=32, BLOCK_N=128, BLOCK_R=64, num_warps=8, num_stages=2),
    }
)
# at R = 8, for tf32 products, the compiler spills 84 bytes a thread down to 128 registers; one program runs at a time
_FLOAT_SM80 = _FLOAT | {"token_sums": dataclasses.replace(_FLOAT["token_sums"], maxnreg=255)}
# 32 x 64 spills 84 bytes a thread beside a weight in half precision
_FLOAT_SM120 = _FLOAT | {"token_sums": Config(BLOCK_M=16, BLOCK_N=64, BLOCK_R=64, num_warps=8, num_stages=2)}
# Of float32 operands, 32 x 64 spills 192 bytes a thread where lora_B stays.
_FLOAT_GFX = _FLOAT | dict.fromkeys(
    ("epilogue", "epilogue_high_rank"), Config(BLOCK_M=64, BLOCK_N=32, BLOCK_R=32, num_warps=8, num_stages=2)
)
# The interpreter pays per tile operation; tiles of 32 leave ragged edges and several steps at test shapes.
_INTERPRETER = {
    "norm": Config(BLOCK_N=32, BLOCK_K=32, BLOCK_R=16, waves=4),
    "norm_high_rank": Config(BLOCK_N=64, BLOCK_K=32, BLOCK_R=16, waves=4),
    "merge": Config(BLOCK_N=32, BLOCK_K=32, BLOCK_R=16, waves=2),
    "merge_high_rank": Config(BLOCK_N=64, BLOCK_K=32, BLOCK_R=16, waves=2),
    "project": Config(BLOCK_M=32, BLOCK_K=32, BLOCK_R=16, waves=4),
    "low": Config(BLOCK_M=32, BLOCK_K=32, BLOCK_R=16),
    "epilogue": Config(BLOCK_M=32, BLOCK_N=32, BLOCK_R=16, waves=2),
    "epilogue_high_rank": Config(BLOCK_M=32, BLOCK_N=64, BLOCK_R=16, waves=2),
    "bank_epilogue": Config(BLOCK_M=32, BLOCK_N=32, BLOCK_R=16),
    "token_sums": Config(BLOCK_M=32, BLOCK_N=32, BLOCK_R=16, waves=4),
    "prepare": Config(BLOCK_N=16, BLOCK_R=16),
}
# Above this rank the products over R outweigh reading the weight: larger tiles.
HIGH_RANK = 64

# (target, bytes of an operand) -> kernel -> Config. compiled: never run on the device; tested: run by the tests.
CONFIGS: dict[tuple[str, int], dict[str, Config]] = {
    ("sm_80", 2): _HALF_SM80,  # compiled
    ("sm_80", 4): _FLOAT_SM80,  # compiled
    ("sm_80", 6): _PARTS_SMALL,  # compiled
    ("sm_90", 2): _HALF,  # compiled
    ("sm_90", 4): _FLOAT_SM90,  # compiled
    ("sm_90", 6): _PARTS,  # compiled
    ("sm_100", 2): _HALF_SM100,  # compiled
    ("sm_100", 4): _FLOAT_SM90,  # compiled
    ("sm_100", 6): _PARTS_SM100,  # compiled
    ("sm_120", 2): _HALF_SM120,  # compiled
    ("sm_120", 4): _FLOAT_SM120,  # compiled
    ("sm_120", 6): _PARTS_SMALL,  # compiled
    ("gfx942", 2): _HALF_GFX,  # compiled
    ("gfx942", 4): _FLOAT_GFX,  # compiled
    ("interpreter", 2): _INTERPRETER,  # tested
    ("interpreter", 4): _INTERPRETER,  # tested
    ("interpreter", 6): _INTERPRETER,  # tested
    ("interpreter", 8): _INTERPRETER,  # tested
}

TUNED_FOLDER = pathlib.Path(__file__).with_name("tuned")


def tuned_path(name: str) -> pathlib.Path:
    """The file in which tools/tune.py keeps what it measured on the GPU of that name: tuned/nvidia-h200.json."""
    return TUNED_FOLDER / (re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


@functools.cache
def tuned_configs(name: str, target: str) -> dict[tuple[int, str], Config]:
    """(bytes of an operand, kernel) -> the configuration measured to be faster than CONFIGS on the GPU of that name.

    Empty if the file is missing, and, with a warning, if anything in it is not a configuration of its kernel.
    """
    path = tuned_path(name)
    try:
        table = json.loads(path.read_text())["configs"]
        return {
            (int(itemsize), kernel): _checked(fields, CONFIGS[target, int(itemsize)][kernel])
            for itemsize, kernels in table.items()
            for kernel, fields in kernels.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("dora_kernels ignores %s, default configurations are used: %r", path, error)
        return {}


def _checked(fields: dict[str, int], default: Config) -> Config:
    """Config(**fields). Raises ValueError if a launch with it could be wrong, TypeError for an unknown field."""
    config = Config(**fields)
    for name, least, most in (("num_warps", 1, 16), ("num_stages", 1, 8), ("waves", 1, 64)):
        value = getattr(config, name)
        power = name != "num_warps" or (type(value) is int and value & (value - 1) == 0)
        if type(value) is not int or not least <= value <= most or not power:
            raise ValueError(f"tuned: {name} is {value!r}; expected {least} to {most}, num_warps a power of two")
    if config.maxnreg is not None and (type(config.maxnreg) is not int or not 24 <= config.maxnreg <= 255):
        raise ValueError(f"tuned: maxnreg is {config.maxnreg!r}; expected 24 to 255")
    for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R"):
        value, tile = getattr(config, name), getattr(default, name) is not None
        if (value is not None) != tile:
            raise ValueError(f"tuned: {name} is {value!r}; expected {'a size' if tile else 'none'}")
        if tile and (type(value) is not int or value < 16 or value & (value - 1)):
            raise ValueError(f"tuned: {name} is {value!r}; expected a power of two of at least 16")
    return config


def config_for(kernel: str, facts: DeviceFacts, operand: torch.dtype, parts: int = 1) -> Config:
    """The configuration of `kernel` for low-rank operands of dtype `operand`: measured on this GPU, or the default.

    parts: of such an operand in bfloat16 (kernels/parts.py); two have the tiles of three, which fit.
    """
    size = operand.itemsize if parts == 1 else BYTES_IN_PARTS
    return tuned_configs(facts.name, facts.target).get((size, kernel)) or CONFIGS[facts.target, size][kernel]
