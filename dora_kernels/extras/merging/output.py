"""The merged checkpoint on disk: each file's bytes as they are in the base, but for those of the merged tensors.

The dtype and the shape of a merged tensor stay, so a header is the base's, byte for byte, and so is the index.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dora_kernels.extras.merging.base import DTYPES, Base, Shard, Source, Stored
from dora_kernels.extras.merging.blocks import LayerMerge
from dora_kernels.extras.merging.plan import Planned
from dora_kernels.files.reading import shown

Progress = Callable[[int, int, str], object]

PIECE = 1 << 20
"""Bytes of one write. 1.7 GB took 0.4 to 0.6 s on ext4, and in pieces of 16 MB up to 5: the system then looks for
larger pages."""
COPIED = 64 << 20
"""Bytes that the system is asked to copy at a time."""
_NOT_HERE = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP, errno.EBADF, errno.ETXTBSY)


class Writer:
    """Writes all files of a base anew, with some tensors merged.

    finite: raise ValueError where a merged row is not. progress: called with the bytes done, those of all files, and
    the name of the tensor or the file, each time that some are done.
    """

    def __init__(self, base: Base, jobs: Sequence[Planned], finite: bool, progress: Progress | None) -> None:
        self.base, self.finite, self.progress = base, finite, progress
        self._jobs = {(job.shard.path, job.entry.key): job for job in jobs}
        self._done = 0
        self._memory = bytearray()

    def write(self, made: Path) -> None:
        """Make the folder, or the file, that `made` names."""
        biases: list[tuple[Shard, Stored, Tensor]] = []
        if not self.base.folder:
            self._write_shard(self.base.shards[0], made, biases)
        else:
            made.mkdir()
            for name, source in self.base.others.items():
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                with source.opened() as number, open(made / name, "xb", buffering=0) as file:
                    self._copy(source, number, file.fileno(), 0, source.bytes, name)
            for shard in self.base.shards:
                self._write_shard(shard, made / shard.path.name, biases)
        for shard, entry, gain in biases:  # which may be in a shard before their weight's
            self._write_bias(shard, entry, gain, made / shard.path.name if self.base.folder else made)

    def _write_shard(self, shard: Shard, path: Path, biases: list[tuple[Shard, Stored, Tensor]]) -> None:
        with shard.opened() as number, open(path, "xb", buffering=0) as file:
            at = 0
            for entry in shard.entries:
                job = self._jobs.get((shard.path, entry.key))
                if job is None:
                    continue
                self._copy(shard, number, file.fileno(), at, entry.start, shard.path.name)
                gain = self._merge(job, number, file.fileno())
                at = entry.end
                if job.bias is not None and gain is not None:
                    biases.append((*job.bias, gain))
            self._copy(shard, number, file.fileno(), at, shard.bytes, shard.path.name)

    def _copy(self, source: Source, number: int, out: int, start: int, end: int, name: str) -> None:
        """Write the bytes from `start` to `end` of a file to the end of another."""
        by_kernel = hasattr(os, "copy_file_range")
        while start < end:
            count = 0
            if by_kernel:
                try:
                    count = os.copy_file_range(number, out, min(end - start, COPIED), start)
                except OSError as error:
                    if error.errno not in _NOT_HERE:
                        raise
            if not count:  # not there, not between these files, or of a file that ends here, which reading says
                by_kernel = False
                view = self._view(min(end - start, PIECE))
                source.read_into(number, view, start)
                _write(out, view)
                count = len(view)
            start += count
            self._report(count, name)

    def _merge(self, job: Planned, number: int, out: int) -> Tensor | None:
        """Write a merged tensor to the end of a file. Returns the gain, None of a plain LoRA."""
        shard, entry = job.shard, job.entry
        merge = LayerMerge(entry.key, job.adapter, job.dtype, job.transposed, self.finite)
        row_bytes = merge.columns * merge.dtype.itemsize
        each = merge.rows * row_bytes
        steps = [merge.measure, merge.merge] if merge.twice else [merge.merge]
        for step in steps:
            for start in range(entry.start, entry.end, each):
                view = self._view(min(each, entry.end - start))
                shard.read_into(number, view, start)
                block = torch.frombuffer(view, dtype=merge.dtype).view(-1, merge.columns)
                step(block, (start - entry.start) // row_bytes)
                if step == steps[-1]:
                    _write(out, view)
                    self._report(len(view), entry.key)
        return merge.gain

    def _write_bias(self, shard: Shard, entry: Stored, gain: Tensor, path: Path) -> None:
        view = self._view(entry.end - entry.start)
        with shard.opened() as number:
            shard.read_into(number, view, entry.start)
        bias = torch.frombuffer(view, dtype=DTYPES[entry.dtype])
        bias.copy_(bias.to(torch.promote_types(gain.dtype, bias.dtype)) * gain)
        if self.finite and not bias.isfinite().all():
            raise ValueError(f"merge: {shown(entry.key)} is not finite once it is merged; expected it finite")
        with open(path, "r+b", buffering=0) as file:
            file.seek(entry.start)
            _write(file.fileno(), view)

    def _view(self, size: int) -> memoryview:
        if len(self._memory) < size:
            self._memory = bytearray(size)
        return memoryview(self._memory)[:size]

    def _report(self, count: int, name: str) -> None:
        self._done += count
        if self.progress is not None:
            self.progress(self._done, self.base.bytes, name)


def _write(out: int, view: memoryview) -> None:
    while view:
        view = view[os.write(out, view[:PIECE]) :]
