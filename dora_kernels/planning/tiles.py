"""The default tile configuration of each kernel for each target: starting points that tools/tune.py measures against.

None has been measured on a GPU. They were compiled ahead of time: at most 64 bytes spilled, within the shared memory.
"""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Tile sizes and schedule of one kernel; a tile size that the kernel does not have is None.

    waves: programs that a multiprocessor holds at a time; it sets among how many the work is shared out.
    maxnreg: registers that a thread may have, where the compiler would take more and a program fewer would fit, or, by
    itself, spills to take fewer.
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


# Programs that run beside a GEMM, and multiprocessors that it leaves them: 1024 tiles, as of 8192 x 4096, take 8 waves
# on 128 multiprocessors as on the 132 of an H100.
PROGRAMS_BESIDE = 4
# One such program has all of a multiprocessor's registers and more than half of its shared memory, 100 KB of which are
# on their way at any time: 64 bytes a clock come in from the L2 cache, some 600 ns after they are asked for. Tiles as
# wide as registers allow: what is read again for each of them is a ninth to a fifth of the bytes.
_BESIDE = {
    "token_sums_beside": Config(BLOCK_M=64, BLOCK_N=256, BLOCK_R=64, num_warps=8, num_stages=4),
    "project_beside": Config(BLOCK_M=256, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=5),
}
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
_PARTS_SM100 = (
    _PARTS_SMALL
    | _walks(
        Config(BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=2),
        Config(BLOCK_N=64, BLOCK_K=32, BLOCK_R=32, num_warps=8, num_stages=2),
    )
    # 4 warps spill 72 bytes
    | dict.fromkeys(
        ("epilogue", "epilogue_high_rank"), Config(BLOCK_M=64, BLOCK_N=32, BLOCK_R=32, num_warps=8, num_stages=2)
    )
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
        # without a limit, 147 to 160 registers over weights of 4 and 8 bits
        Config(BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=4, waves=2, maxnreg=128),
        Config(BLOCK_N=64, BLOCK_K=128, BLOCK_R=64, num_warps=8, num_stages=2),
    )
    | {
        "low": Config(BLOCK_M=64, BLOCK_K=64, BLOCK_R=64, num_warps=4, num_stages=4),  # 64 x 128 spills 72 bytes
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
    "token_sums_beside": Config(BLOCK_M=32, BLOCK_N=32, BLOCK_R=16),
    "project_beside": Config(BLOCK_M=32, BLOCK_K=32, BLOCK_R=16),
    "prepare": Config(BLOCK_N=16, BLOCK_R=16),
}

# (target, bytes of an operand) -> kernel -> Config. compiled: never run on the device; tested: run by the tests.
CONFIGS: dict[tuple[str, int], dict[str, Config]] = {
    ("sm_80", 2): _HALF_SM80,  # compiled
    ("sm_80", 4): _FLOAT_SM80,  # compiled
    ("sm_80", 6): _PARTS_SMALL,  # compiled
    ("sm_90", 2): _HALF | _BESIDE,  # compiled
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


@dataclass(frozen=True)
class GemmConfig:
    """Tiles and schedule of kernels/hopper/gemm.py.

    GROUP_M: rows of tiles that are walked side by side. stages: buffers for the loads, each of one step of a tile.
    slots: buffers of each consumer for its stores, each for a part of a tile's columns. consumers: 2 of 4 warps each,
    or 1 of 8. Registers are a thread's: all warps are launched alike, and the producer's give up what the consumers'
    take.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int = 8
    stages: int = 4
    slots: int = 2
    parts: int = 4
    consumers: int = 2
    producer_registers: int = 24
    consumer_registers: int = 240
    launch_registers: int = 168


# 231 of 232 KB of shared memory, and nothing spilled; one program a multiprocessor.
_GEMM = GemmConfig(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64)
# Steps over K as short as possible, so that there are many of them at test shapes (tests/support/simulated_hopper.py).
_GEMM_SIMULATED = GemmConfig(BLOCK_M=16, BLOCK_N=32, BLOCK_K=8)

# target -> product -> GemmConfig, "dx" where the right operand is not transposed. As CONFIGS.
GEMMS: dict[str, dict[str, GemmConfig]] = {
    "sm_90": {"forward": _GEMM, "dx": _GEMM},  # compiled
    "interpreter": {"forward": _GEMM_SIMULATED, "dx": _GEMM_SIMULATED},  # tested, by the simulator
}
