"""A checkpoint with an adapter merged into it, for servers that have no DoRA: `python -m dora_kernels merge`.

base.py reads the folder of the model, adapters.py the adapter, matching.py finds the tensor of each layer, plan.py
decides and refuses, blocks.py has the numbers, output.py writes, check.py compares what was written with PEFT's merge.
"""

from dora_kernels.extras.merging.check import Checked, CheckFailed
from dora_kernels.extras.merging.checkpoint import MergeReport, merge_checkpoint

__all__ = ["CheckFailed", "Checked", "MergeReport", "merge_checkpoint"]
