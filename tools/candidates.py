"""The search space of tools/tune.py: each kernel's candidate configurations, and the calls that judge them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dora_kernels.planning.tiles import Config

# bytes of a low-rank operand -> of bench.kernels
PRECISIONS = {2: "bf16", 6: "bf16-fp32"}


@dataclass(frozen=True)
class Subject:
    """Fields of tiles.Config to tune, their values, and the calls of bench.kernels (M, N, K, R) that judge them."""

    fields: tuple[str, ...]
    values: tuple[tuple[int | None, ...], ...]
    jobs: tuple[tuple[str, int, int, int, int], ...]


# What a candidate is tried for: tiles of 128 rows of N ask the L2 cache for half of what tiles of 64 do, beside W; deep
# pipelines of small tiles keep as many bytes on their way in more programs; with 8 warps a tile leaves registers for a
# second program, with 4 its addresses are computed half as often. waves: as many as fit on sm_90 by the compiler, and
# for sums, where each makes a part, fewer. Which of them a target can run, its compiler says (precompile.judge).
_SCHEDULE = ("num_warps", "num_stages", "waves", "maxnreg")
_WEIGHT = ("BLOCK_N", "BLOCK_K", *_SCHEDULE)
_WEIGHT_LOW_RANK = (
    (128, 64, 8, 2, 2, 128),
    (128, 64, 8, 3, 2, 128),
    (128, 64, 8, 4, 2, 128),
    (128, 64, 8, 5, 1, None),
    (128, 64, 4, 3, 2, None),
    (128, 32, 8, 4, 3, 80),
    (128, 32, 8, 5, 2, None),
    (128, 32, 4, 4, 3, None),
    (64, 64, 4, 4, 3, None),
    (64, 64, 8, 4, 3, 80),
    (64, 64, 8, 5, 2, None),
    (64, 128, 4, 3, 2, None),
    (64, 128, 8, 3, 2, 128),
    (128, 128, 8, 2, 1, None),
    (128, 128, 8, 3, 1, None),
    (256, 32, 8, 4, 2, 128),
    (256, 64, 8, 2, 1, None),
)
# a lora_B of 128 x 384 is 96 KB: with it there is room for little else
_WEIGHT_HIGH_RANK = (
    (128, 64, 8, 2, 1, None),
    (128, 64, 8, 3, 1, None),
    (128, 64, 4, 2, 1, None),
    (128, 32, 8, 2, 1, None),
    (128, 32, 8, 3, 1, None),
    (128, 32, 4, 2, 1, None),
    (128, 32, 4, 3, 1, None),
    (64, 64, 4, 2, 1, None),
    (64, 64, 8, 2, 1, None),
    (64, 64, 8, 3, 1, None),
    (64, 32, 4, 2, 2, None),
    (64, 32, 4, 3, 1, None),
    (128, 128, 8, 2, 1, None),
    (128, 128, 8, 3, 1, None),
)
_EPILOGUE = ("BLOCK_M", "BLOCK_N", *_SCHEDULE)
_EPILOGUE_LOW_RANK = (
    (64, 128, 8, 2, 2, 128),
    (64, 128, 8, 3, 2, 128),
    (64, 128, 8, 4, 2, 128),
    (64, 128, 8, 3, 1, None),
    (64, 128, 4, 2, 2, None),
    (64, 64, 8, 3, 3, 80),
    (64, 64, 8, 4, 3, 80),
    (64, 64, 4, 3, 3, 168),
    (64, 64, 4, 4, 3, 168),
    (128, 64, 8, 2, 2, 128),
    (128, 64, 8, 3, 2, 128),
    (32, 128, 8, 4, 3, 80),
    (32, 128, 4, 3, 4, 128),
    (32, 128, 4, 4, 3, None),
    (32, 256, 8, 3, 2, 128),
    (128, 128, 8, 2, 1, None),
)
_EPILOGUE_HIGH_RANK = (
    (64, 128, 8, 2, 1, None),
    (64, 128, 8, 3, 1, None),
    (64, 64, 8, 2, 1, None),
    (64, 64, 4, 2, 1, None),
    (32, 128, 8, 2, 1, None),
    (32, 128, 8, 3, 1, None),
    (32, 128, 4, 2, 1, None),
    (128, 64, 8, 2, 1, None),
    (128, 128, 8, 2, 1, None),
    (128, 128, 8, 3, 1, None),
    (128, 256, 8, 2, 1, None),
    (128, 256, 8, 3, 1, None),
    (256, 128, 8, 2, 1, None),
)
_PROJECT = ("BLOCK_M", "BLOCK_K", *_SCHEDULE)
_PROJECTED = (
    (64, 64, 4, 4, 2, None),
    (64, 64, 4, 4, 4, None),
    (64, 64, 4, 6, 3, None),
    (64, 128, 4, 3, 2, None),
    (64, 128, 4, 4, 2, None),
    (64, 128, 8, 4, 2, None),
    (128, 64, 4, 3, 2, None),
    (128, 64, 4, 5, 2, None),
    (128, 64, 8, 3, 1, None),
    (128, 64, 8, 4, 1, None),
    (128, 64, 8, 4, 2, 128),
    (128, 64, 8, 6, 1, None),
    (128, 128, 4, 3, 1, None),
    (128, 128, 8, 3, 1, None),
    (256, 64, 8, 3, 1, None),
)
# in whole blocks, of which there are enough only where they are small (kernels/project.py)
_LOW = (
    (64, 64, 4, 4, 1, None),
    (64, 64, 4, 6, 1, None),
    (64, 64, 4, 8, 1, None),
    (64, 64, 8, 6, 1, None),
    (64, 128, 4, 3, 1, None),
    (64, 128, 4, 5, 1, None),
    (64, 128, 8, 4, 1, None),
    (64, 256, 4, 2, 1, None),
    (64, 256, 8, 3, 1, None),
    (32, 64, 4, 8, 1, None),
    (32, 128, 4, 4, 1, None),
    (32, 128, 4, 6, 1, None),
    (32, 256, 4, 3, 1, None),
)
_TOKEN_SUMS = (
    (32, 64, 4, 5, 4, 128),
    (32, 128, 4, 4, 2, None),
    (32, 128, 8, 4, 2, 128),
    (32, 128, 8, 5, 2, 128),
    (32, 256, 8, 4, 1, None),
    (64, 64, 4, 3, 2, None),
    (64, 64, 4, 4, 3, 168),
    (64, 64, 8, 4, 2, 128),
    (64, 128, 4, 3, 1, None),
    (64, 128, 8, 2, 2, 128),
    (64, 128, 8, 3, 1, None),
    (64, 128, 8, 4, 1, None),
    (64, 256, 8, 3, 1, None),
    (128, 64, 4, 3, 1, None),
    (128, 64, 8, 3, 1, None),
    (128, 128, 8, 2, 1, None),
)
# most valuable first
SUBJECTS = {
    "token_sums": Subject(
        ("BLOCK_M", "BLOCK_N", *_SCHEDULE),
        _TOKEN_SUMS,
        (
            ("token_sums", 8192, 4096, 4096, 64),
            ("outer_product", 8192, 4096, 4096, 64),
            ("token_sums", 8192, 4096, 4096, 16),
        ),
    ),
    "epilogue": Subject(
        _EPILOGUE, _EPILOGUE_LOW_RANK, (("epilogue", 8192, 4096, 4096, 64), ("epilogue", 2048, 4096, 4096, 16))
    ),
    "epilogue_high_rank": Subject(
        _EPILOGUE, _EPILOGUE_HIGH_RANK, (("epilogue", 8192, 14336, 4096, 384), ("epilogue", 8192, 4096, 4096, 384))
    ),
    "merge": Subject(_WEIGHT, _WEIGHT_LOW_RANK, (("merge", 16, 4096, 4096, 64), ("merge", 16, 8192, 8192, 16))),
    "norm": Subject(_WEIGHT, _WEIGHT_LOW_RANK, (("norm", 16, 4096, 4096, 64), ("norm", 16, 8192, 8192, 64))),
    "project": Subject(_PROJECT, _PROJECTED, (("project", 8192, 4096, 4096, 64), ("project", 8192, 8192, 8192, 16))),
    "low": Subject(_PROJECT, _LOW, (("low", 8192, 4096, 4096, 64), ("low", 8192, 8192, 8192, 16))),
    "norm_high_rank": Subject(
        _WEIGHT, _WEIGHT_HIGH_RANK, (("norm", 16, 8192, 8192, 384), ("norm", 16, 14336, 4096, 384))
    ),
    "merge_high_rank": Subject(
        _WEIGHT, _WEIGHT_HIGH_RANK, (("merge", 16, 8192, 8192, 384), ("merge", 16, 14336, 4096, 384))
    ),
}


def candidates(kernel: str, default: Config, target: str) -> list[Config]:
    """The default, then the subject's other configurations, without repetition."""
    subject = SUBJECTS[kernel]
    configs = [dataclasses.replace(default, **dict(zip(subject.fields, v, strict=True))) for v in subject.values]
    if target.startswith("gfx"):  # AMD's compiler takes no bound on registers
        configs = [dataclasses.replace(config, maxnreg=None) for config in configs]
    return list(dict.fromkeys([default, *configs]))
