"""The change of a weight in magnitude and in direction by fine-tuning: the analysis of the DoRA paper's section 3.2.

`adapter_change` and `weight_change` measure one layer, `analyze` checkpoints on disk, `analyze_model` a live model;
`draw` makes the paper's figure 2 of the result.
"""

from dora_kernels.extras.analysis.checkpoints import analyze
from dora_kernels.extras.analysis.layers import Analysis, LeftOut, Point, Trend, trend
from dora_kernels.extras.analysis.measure import Change, adapter_change, weight_change
from dora_kernels.extras.analysis.models import analyze_model
from dora_kernels.extras.analysis.plot import draw

__all__ = [
    "Analysis",
    "Change",
    "LeftOut",
    "Point",
    "Trend",
    "adapter_change",
    "analyze",
    "analyze_model",
    "draw",
    "trend",
    "weight_change",
]
