"""The search space of tools/tune.py: each kernel's candidate configurations, and the calls that judge them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dora_kernels.planning.configs import Config

ACCUMULATORS = 128  # float32 values of a tile for each thread; above it the tile spills
# bytes of a low-rank operand -> of bench.kernels
PRECISIONS = {2: "bf16", 4: "bf16-fp32"}


@dataclass(frozen=True)
class Subject:
    """Fields of configs.Config to tune, their values, and the calls of bench.kernels (M, N, K, R) that judge them."""

    fields: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    jobs: tuple[tuple[str, int, int, int, int], ...]


_SCHEDULE = ("num_warps", "num_stages", "waves")
_WEIGHT = ("BLOCK_N", "BLOCK_K", *_SCHEDULE)
# 32 x 256 of 4 warps (116 bytes a thread) and 128 x 256 of 8 (696) spill in the norm on sm_90
_NORM = (
    (32, 128, 4, 3, 2),
    (32, 128, 8, 3, 2),
    (64, 64, 4, 4, 2),
    (64, 128, 4, 2, 2),
    (64, 128, 4, 4, 2),
    (64, 128, 8, 3, 2),
    (64, 128, 4, 3, 4),
    (64, 256, 8, 3, 2),
    (128, 64, 4, 4, 2),
    (128, 128, 8, 3, 1),
    (128, 128, 8, 3, 2),
    (128, 128, 8, 4, 1),
    (128, 64, 8, 4, 2),
)
_MERGE = (
    (32, 128, 4, 2, 1),
    (32, 256, 4, 2, 1),
    (64, 64, 4, 2, 1),
    (64, 128, 4, 2, 1),
    (64, 128, 8, 3, 1),
    (64, 128, 4, 3, 1),
    (64, 256, 8, 2, 1),
    (128, 64, 4, 3, 1),
    (128, 128, 8, 2, 1),
    (128, 128, 8, 3, 1),
    (128, 128, 8, 4, 1),
    (128, 256, 16, 3, 1),
)
_EPILOGUE_FIELDS = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
# serves dropout too, at any rank, where 128 x 128 spills
_EPILOGUE = (
    (32, 128, 4, 2),
    (32, 256, 8, 2),
    (64, 64, 4, 2),
    (64, 64, 8, 2),
    (64, 128, 4, 2),
    (64, 128, 8, 3),
    (64, 128, 8, 4),
    (64, 256, 8, 2),
    (128, 64, 4, 2),
    (128, 64, 8, 3),
)
# the adapters are read once for each tile, ten times what HBM has to give at 64 x 128: larger ones
_EPILOGUE_HIGH_RANK = (
    (64, 128, 8, 2),
    (64, 128, 8, 3),
    (64, 256, 8, 2),
    (64, 256, 8, 3),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
    (128, 128, 8, 3),
    (128, 128, 8, 4),
    (128, 256, 8, 2),
    (128, 256, 8, 3),
    (256, 128, 8, 2),
)
# most valuable first
SUBJECTS = {
    "token_sums": Subject(
        ("BLOCK_M", "BLOCK_N", *_SCHEDULE),
        (
            (32, 64, 4, 3, 1),
            (32, 128, 4, 3, 1),
            (32, 128, 8, 4, 1),
            (64, 64, 4, 3, 1),
            (64, 64, 4, 4, 2),
            (64, 128, 4, 3, 1),
            (64, 128, 8, 4, 1),
            (64, 128, 8, 3, 2),
            (64, 256, 8, 3, 1),
            (128, 64, 4, 3, 1),
            (128, 64, 8, 3, 2),
            (128, 128, 8, 2, 1),
        ),
        (
            ("token_sums", 8192, 4096, 4096, 64),
            ("outer_product", 8192, 4096, 4096, 64),
            ("token_sums", 8192, 4096, 4096, 16),
        ),
    ),
    "epilogue": Subject(
        _EPILOGUE_FIELDS, _EPILOGUE, (("epilogue", 8192, 4096, 4096, 64), ("epilogue", 2048, 4096, 4096, 16))
    ),
    "epilogue_high_rank": Subject(
        _EPILOGUE_FIELDS,
        _EPILOGUE_HIGH_RANK,
        (("epilogue", 8192, 14336, 4096, 384), ("epilogue", 8192, 4096, 4096, 384)),
    ),
    "merge": Subject(_WEIGHT, _MERGE, (("merge", 16, 4096, 4096, 64), ("merge", 16, 8192, 8192, 16))),
    "norm": Subject(_WEIGHT, _NORM, (("norm", 16, 4096, 4096, 64), ("norm", 16, 8192, 8192, 64))),
    "project": Subject(
        ("BLOCK_M", "BLOCK_K", *_SCHEDULE),
        (
            (64, 64, 4, 4, 1),
            (64, 64, 4, 4, 2),
            (64, 128, 4, 3, 1),
            (64, 128, 4, 4, 2),
            (128, 64, 4, 3, 1),
            (128, 64, 4, 5, 1),
            (128, 64, 8, 4, 1),
            (128, 64, 4, 4, 2),
            (128, 128, 4, 3, 1),
            (128, 128, 8, 3, 1),
            (256, 64, 8, 3, 1),
        ),
        (("project", 8192, 4096, 4096, 64), ("project", 8192, 8192, 8192, 16)),
    ),
    "norm_high_rank": Subject(_WEIGHT, _NORM, (("norm", 16, 8192, 8192, 384), ("norm", 16, 14336, 4096, 384))),
    "merge_high_rank": Subject(_WEIGHT, _MERGE, (("merge", 16, 8192, 8192, 384), ("merge", 16, 14336, 4096, 384))),
}


def candidates(kernel: str, default: Config, operand_bytes: int, shared_limit: int) -> list[Config]:
    """The default, then the subject's other configurations that can fit the device, without repetition."""
    subject = SUBJECTS[kernel]
    configs = [dataclasses.replace(default, **dict(zip(subject.fields, v, strict=True))) for v in subject.values]
    fitting = [config for config in configs if fits(kernel, config, operand_bytes, shared_limit)]
    return list(dict.fromkeys([default, *fitting]))


def fits(kernel: str, config: Config, operand_bytes: int, shared_limit: int) -> bool:
    """True if the accumulator tile fits the registers and the tiles in flight the shared memory.

    By an estimate from below: a launch may still be refused.
    """
    kernel, R = kernel.removesuffix("_high_rank"), config.BLOCK_R
    if kernel == "project":
        accumulators, loaded = config.BLOCK_M * R, config.BLOCK_K * (2 * config.BLOCK_M + operand_bytes * R)
    elif kernel == "token_sums":
        accumulators = config.BLOCK_N * max(R, config.BLOCK_M)  # the products with base stand beside the sums
        loaded = config.BLOCK_M * (2 * 2 * config.BLOCK_N + operand_bytes * R)
    elif kernel == "epilogue":
        accumulators, loaded = config.BLOCK_M * config.BLOCK_N, operand_bytes * R * (config.BLOCK_M + config.BLOCK_N)
    else:
        accumulators, loaded = config.BLOCK_N * config.BLOCK_K, operand_bytes * R * config.BLOCK_K
    return accumulators <= ACCUMULATORS * 32 * config.num_warps and loaded * config.num_stages <= shared_limit
