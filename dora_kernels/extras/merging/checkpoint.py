"""merge_checkpoint: a folder and an adapter in, a folder out, and nothing written unless all of it is right."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from dora_kernels.extras.convert import FORMATS, DoraAdapter
from dora_kernels.extras.convert.checkpoint import check_rename, checked_heads
from dora_kernels.extras.merging import adapters
from dora_kernels.extras.merging.base import Base, open_base
from dora_kernels.extras.merging.blocks import exact_products
from dora_kernels.extras.merging.check import Checked, check_jobs
from dora_kernels.extras.merging.output import Progress, Writer
from dora_kernels.extras.merging.plan import plan
from dora_kernels.files.reading import shown
from dora_kernels.files.writing import check_target, claimed, creating
from dora_kernels.functional.arguments import (
    check_callable,
    check_choice,
    check_flag,
    check_number,
    check_path,
    check_size,
)


@dataclass(frozen=True)
class MergeReport:
    """The tensors and files that a merge has written.

    merged: the keys of the tensors that were merged, in the order of the files. copied: how many tensors were not.
    bytes: of all files. dtypes: how many merged tensors are of each. format: the adapter's. check: what was compared.
    left_out: files and folders of the base that hold its weights once more, as they were before, and are not in `out`.
    adapters: as they were merged, by the names that the base has, and with its rows.
    """

    merged: tuple[str, ...]
    copied: int
    bytes: int
    dtypes: Mapping[str, int]
    format: str
    check: tuple[Checked, ...] = ()
    left_out: tuple[str, ...] = ()
    adapters: tuple[DoraAdapter, ...] = field(default=(), repr=False)


def merge_checkpoint(
    base: str | PathLike[str],
    adapter: str | PathLike[str],
    out: str | PathLike[str],
    *,
    source_format: str | None = None,
    alpha: float | None = None,
    rename: Sequence[tuple[str, str]] = (),
    heads: tuple[int, int] | None = None,
    same_rows: bool = False,
    allow_nonfinite: bool = False,
    check: int = 0,
    progress: Progress | None = None,
) -> MergeReport:
    """Write the checkpoint `base` with an adapter merged into it to `out`, for servers that have no DoRA.

        W' = gain * (W + scaling * lora_B lora_A),  gain = magnitude / ||W + scaling * lora_B lora_A||,  0 where that is

    Of a plain LoRA the gain is 1. W' is computed in float32 (float64 over float64) and rounded once to W's dtype. All
    other tensors, the header, the shards with their index and the files beside are the base's, byte for byte, but that
    copies of the weights in other formats are left out. Some 4 MB of one tensor are in memory at a time, and the
    adapter.

    base: a folder of transformers' or diffusers' (safetensors, one file or shards), which makes `out` a folder, or one
    .safetensors file. adapter: whatever `convert` reads. source_format: one of its names; None to tell by the keys.
    alpha, rename, heads, same_rows: as of `convert`. allow_nonfinite: merge NaN and inf, too. check: so many tensors,
    spread over all, are compared with the merge in float64, by PEFT's layers where it is installed. progress: called
    with the bytes done, those of all files, and the name of what is being written.

    Raises ValueError, and `out` is not there, where a layer of the adapter matches no tensor of the base or several, or
    one of another shape; where the base is quantized, or ties an adapted layer to its embedding; where a row is not
    finite; where `out` exists or the disk has too little space; CheckFailed, which is one, with all that was compared,
    where a tensor was written wrong; and OSError where the disk refuses.
    """
    for name, path in {"base": base, "adapter": adapter, "out": out}.items():
        check_path("merge", name, path)
    base, adapter, out = Path(base), Path(adapter), Path(out)
    if source_format is not None:
        check_choice("merge", "source_format", source_format, tuple(FORMATS))
    alpha = None if alpha is None else check_number("merge", "alpha", alpha)
    for name, flag in {"same_rows": same_rows, "allow_nonfinite": allow_nonfinite}.items():
        check_flag("merge", name, flag)
    check = check_size("merge", "check", check)
    if progress is not None:
        check_callable("merge", "progress", progress)
    check_rename("merge", rename)
    heads = checked_heads("merge", heads, same_rows)
    _check_out(base, out)
    with claimed("merge", out), exact_products():
        found = adapters.read(adapter, source_format, alpha, rename, heads, same_rows, allow_nonfinite)
        opened = open_base(base)
        jobs = plan(opened, found)
        _check_space(opened, out)
        with creating("merge", out) as made:
            Writer(opened, jobs, not allow_nonfinite, progress).write(made)
            checked = check_jobs(jobs, check, made, opened.folder)
    merged = [entry.key for job in jobs for _, entry in ((job.shard, job.entry), *([job.bias] if job.bias else []))]
    dtypes = Counter(str(job.dtype).removeprefix("torch.") for job in jobs)
    copied = len(opened.entries) - len(merged)
    return MergeReport(
        tuple(merged),
        copied,
        opened.bytes,
        dtypes,
        found.format,
        checked,
        opened.left_out,
        tuple(job.adapter for job in jobs),
    )


def _check_out(base: Path, out: Path) -> None:
    """Raise ValueError where there is an `out` or cannot be one, or where it would be within the base."""
    if os.path.lexists(out):
        raise ValueError(f"merge: {shown(out)} exists; expected a name that is free")
    check_target("merge", "out", out)
    inside = Path(os.path.realpath(out.parent))
    if os.path.isdir(base) and inside.is_relative_to(os.path.realpath(base)):
        raise ValueError(f"merge: {shown(out)} is within {shown(base)}, which is copied; expected another place")


def _check_space(base: Base, out: Path) -> None:
    free = shutil.disk_usage(os.path.realpath(out.parent)).free
    if free < base.bytes:
        raise ValueError(
            f"merge: {shown(out.parent)} has {free / 1e9:.2f} GB free; expected {base.bytes / 1e9:.2f} for {shown(out)}"
        )
