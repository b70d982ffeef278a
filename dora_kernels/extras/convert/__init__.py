"""DoRA checkpoints from one library's format to another's: `python -m dora_kernels convert`.

adapter.py is the neutral form, scaling.py where alpha is kept, formats.py the table of formats, coding.py what
reads and writes by a row of it, files.py the disk, reading.py what finds the format, names.py what finds kohya's
modules, checkpoint.py the conversion. Needs safetensors.
"""

from dora_kernels.extras.convert.adapter import DoraAdapter, Unrepresentable
from dora_kernels.extras.convert.checkpoint import convert_checkpoint, table
from dora_kernels.extras.convert.coding import decode, encode
from dora_kernels.extras.convert.formats import FORMATS, Checkpoint, Format
from dora_kernels.extras.convert.reading import read_adapters

__all__ = [
    "FORMATS",
    "Checkpoint",
    "DoraAdapter",
    "Format",
    "Unrepresentable",
    "convert_checkpoint",
    "decode",
    "encode",
    "read_adapters",
    "table",
]
